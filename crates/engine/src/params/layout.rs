//! Layouts of parameters in files.

use std::borrow::Cow;

/// How a tensor's layout in a file differs from the engine's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// The same layout.
    #[default]
    Same,
    /// The file has its transpose (Conv1D keeps `[inputs, outputs]`).
    Transposed,
    /// The file has its rows as `[heads, 3, head_dim]`, the engine as `[3, heads, head_dim]`.
    ByHead {
        /// Number of heads.
        heads: usize,
    },
}

impl Layout {
    /// Converts values from the layout of a file of this shape to the engine's.
    pub(crate) fn of_file<'a>(self, values: &'a [f32], shape: &[usize]) -> Cow<'a, [f32]> {
        match self {
            Layout::Same => values.into(),
            Layout::Transposed => transpose(values, shape[0], shape[1]).into(),
            Layout::ByHead { heads } => swap(values, heads, 3).into(),
        }
    }

    /// The inverse of [`Layout::of_file`].
    pub(crate) fn to_file(self, values: Vec<f32>, shape: &[usize]) -> Vec<f32> {
        match self {
            Layout::Same => values,
            Layout::Transposed => transpose(&values, shape[1], shape[0]),
            Layout::ByHead { heads } => swap(&values, 3, heads),
        }
    }
}

/// `[rows, columns]` → `[columns, rows]`.
fn transpose(x: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    for (i, row) in x.chunks(columns).enumerate() {
        for (j, v) in row.iter().enumerate() {
            y[j * rows + i] = *v;
        }
    }
    y
}

/// `[a, b, …]` → `[b, a, …]`.
fn swap(x: &[f32], a: usize, b: usize) -> Vec<f32> {
    let run = x.len() / (a * b);
    (0..a * b).flat_map(|i| &x[(i % a * b + i / a) * run..][..run]).copied().collect()
}
