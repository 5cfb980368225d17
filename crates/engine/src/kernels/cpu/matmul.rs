//! Matrix products, cut into tiles of our own and computed by the `gemm` crate, one thread a tile.
//!
//! The crate's own threading was bimodal on two cores (ENGINE.md) and splits by the number of threads; tiles
//! that follow from the shape alone give the same bytes for any number of threads.

use super::{Disjoint, Linear};
use rayon::prelude::*;

/// Largest tile of a product. 256×512 keeps both packed operands in a 1 MiB L2 cache and still gives the
/// smallest product of a 576-wide model (1024×384) four tiles to share.
const TILE: (usize, usize) = (256, 512);

/// A matrix in memory: element `(i, j)` is at `i·row + j·column`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub(super) data: &'a [f32],
    pub(super) row: usize,
    pub(super) column: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major with `width` columns.
    pub(super) fn new(data: &'a [f32], width: usize) -> Self {
        Matrix { data, row: width, column: 1 }
    }

    /// The transpose: the same memory, read the other way.
    pub(super) fn t(self) -> Self {
        Matrix { row: self.column, column: self.row, ..self }
    }

    /// From row `i` and column `j` on.
    fn from(self, i: usize, j: usize) -> Self {
        Matrix { data: &self.data[i * self.row + j * self.column..], ..self }
    }

    /// Elements that an `m × n` matrix of this layout reaches.
    fn extent(&self, m: usize, n: usize) -> usize {
        if m == 0 || n == 0 { 0 } else { (m - 1) * self.row + (n - 1) * self.column + 1 }
    }
}

/// `c[m, n] (+)= alpha · a[m, k] · b[k, n]` on the calling thread; rows of `c` are `stride` apart.
///
/// # Safety
/// `c` points to `(m − 1)·stride + n` elements that nobody else touches meanwhile.
pub(super) unsafe fn product(
    m: usize,
    n: usize,
    k: usize,
    c: *mut f32,
    stride: usize,
    accumulate: bool,
    a: Matrix,
    b: Matrix,
    alpha: f32,
) {
    assert!(a.extent(m, k) <= a.data.len() && b.extent(k, n) <= b.data.len());
    let (a_row, a_column) = (a.row as isize, a.column as isize);
    let (b_row, b_column) = (b.row as isize, b.column as isize);
    // SAFETY: the operands' extents were checked just above, `c` is the caller's promise.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c,
            1,
            stride as isize,
            accumulate,
            a.data.as_ptr(),
            a_column,
            a_row,
            b.data.as_ptr(),
            b_column,
            b_row,
            1.0f32,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// `c[m, n] (+)= a[m, k] · b[k, n] + bias[n]`, over all threads.
fn tiled(m: usize, n: usize, k: usize, c: &mut [f32], accumulate: bool, a: Matrix, b: Matrix, bias: &[f32]) {
    assert_eq!(c.len(), m * n);
    let (tall, wide) = TILE;
    let (down, across) = (m.div_ceil(tall), n.div_ceil(wide));
    let c = Disjoint::new(c);
    (0..down * across).into_par_iter().with_max_len(1).for_each(|tile| {
        let (i, j) = (tile / across * tall, tile % across * wide);
        let (m, w) = (tall.min(m - i), wide.min(n - j));
        // SAFETY: tiles share no element of `c`, and each is visited once.
        let c = unsafe { c.at(i * n + j, (m - 1) * n + w) };
        if !bias.is_empty() {
            for r in 0..m {
                // SAFETY: row `r` of this tile.
                let row = unsafe { std::slice::from_raw_parts_mut(c.add(r * n), w) };
                for (y, b) in row.iter_mut().zip(&bias[j..]) {
                    *y = if accumulate { *y + b } else { *b };
                }
            }
        }
        // SAFETY: as above.
        unsafe { product(m, w, k, c, n, accumulate || !bias.is_empty(), a.from(i, 0), b.from(0, j), 1.0) };
    });
}

/// `y[rows, outputs] (+)= x[rows, inputs] · wᵀ + b`.
pub(super) fn linear(s: Linear, y: &mut [f32], accumulate: bool, x: &[f32], w: &[f32], b: &[f32]) {
    let (x, w) = (Matrix::new(x, s.inputs), Matrix::new(w, s.inputs).t());
    tiled(s.rows, s.outputs, s.inputs, y, accumulate, x, w, b);
}

/// `dx[rows, inputs] (+)= dy[rows, outputs] · w`.
pub(super) fn linear_dx(s: Linear, dx: &mut [f32], accumulate: bool, dy: &[f32], w: &[f32]) {
    let (dy, w) = (Matrix::new(dy, s.outputs), Matrix::new(w, s.inputs));
    tiled(s.rows, s.inputs, s.outputs, dx, accumulate, dy, w, &[]);
}

/// `dw[outputs, inputs] (+)= dyᵀ · x` and `db[outputs] (+)= Σ_rows dy`.
pub(super) fn linear_dw(s: Linear, dw: &mut [f32], db: &mut [f32], accumulate: bool, dy: &[f32], x: &[f32]) {
    if !db.is_empty() {
        if !accumulate {
            db.fill(0.0);
        }
        // A piece of columns each: every sum runs over the rows in order, on one thread.
        db.par_chunks_mut(64).enumerate().for_each(|(piece, db)| {
            for dy in dy.chunks(s.outputs) {
                for (db, dy) in db.iter_mut().zip(&dy[piece * 64..]) {
                    *db += dy;
                }
            }
        });
    }
    let (dy, x) = (Matrix::new(dy, s.outputs).t(), Matrix::new(x, s.inputs));
    tiled(s.outputs, s.inputs, s.rows, dw, accumulate, dy, x, &[]);
}
