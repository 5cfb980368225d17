//! Matrix products, cut into our own tiles and computed by the `gemm` crate, each tile on one thread.
//!
//! The crate's own threading was bimodal on two cores (ENGINE.md) and splits by the number of threads. Tiles that
//! depend on the shape alone give the same bytes with any number of threads.

use super::files::FileMatrix;
use super::{Disjoint, Scratch, View};
use rayon::prelude::*;

/// Largest tile of a product. 256×512 keeps both packed operands in a 1 MiB L2 cache and still splits the smallest
/// product of a 576-wide model (1024×384) into four tiles.
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

    /// The matrix that a view refers to; `data` is its slice.
    pub(super) fn of(view: View, data: &'a [f32]) -> Self {
        Matrix::new(data, view.stride())
    }

    /// The transpose: the same memory with rows and columns exchanged.
    pub(super) fn t(self) -> Self {
        Matrix { row: self.column, column: self.row, ..self }
    }

    /// The submatrix from row `i` and column `j` on.
    fn from(self, i: usize, j: usize) -> Self {
        Matrix { data: &self.data[i * self.row + j * self.column..], ..self }
    }

    /// True if an `m × n` matrix of this layout is inside the slice.
    fn holds(&self, m: usize, n: usize) -> bool {
        extent(m, n, self.row, self.column).is_some_and(|extent| extent <= self.data.len())
    }
}

/// The right operand of a product.
#[derive(Clone, Copy)]
pub(super) enum Right<'a> {
    /// In memory.
    Buffer(Matrix<'a>),
    /// In a file: a tile of it is widened to f32 when it is used, [`DEPTH`] rows at a time.
    File(&'a FileMatrix, &'a Scratch),
}

/// Rows of an operand in a file that are widened at once: 512 KiB with a tile's 512 columns, which stay in cache. Each
/// widened row is used by 256 rows of the left operand, so widening costs a few percent of the product.
const DEPTH: usize = 256;

/// Number of elements from the first to the last of an `m × n` matrix with distances `row` between rows and `column`
/// between columns; `None` if it overflows.
fn extent(m: usize, n: usize, row: usize, column: usize) -> Option<usize> {
    if m == 0 || n == 0 {
        return Some(0);
    }
    (m - 1).checked_mul(row)?.checked_add((n - 1).checked_mul(column)?)?.checked_add(1)
}

/// `c[m, n] (+)= alpha · a[m, k] · b[k, n]` on the calling thread; rows of `c` are `stride` apart.
///
/// # Safety
/// `c` points to `(m − 1)·stride + n` elements that nothing else accesses during the call.
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
    assert!(a.holds(m, k) && b.holds(k, n), "operands of a product that are too short");
    let (a_row, a_column) = (a.row as isize, a.column as isize);
    let (b_row, b_column) = (b.row as isize, b.column as isize);
    // SAFETY: the operands' extents were checked just above; the caller guarantees `c`.
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

/// `c[m, n] (+)= a[m, k] · b[k, n] + bias[n]`, on all threads; rows of `c` are `stride` apart.
pub(super) fn tiled(
    (m, n, k): (usize, usize, usize),
    c: &mut [f32],
    stride: usize,
    accumulate: bool,
    a: Matrix,
    b: Right,
    bias: &[f32],
) {
    assert_eq!(Some(c.len()), extent(m, n, stride, 1), "the result's size");
    let (tall, wide) = TILE;
    let (down, across) = (m.div_ceil(tall), n.div_ceil(wide));
    let c = Disjoint::new(c);
    (0..down * across).into_par_iter().with_max_len(1).for_each(|tile| {
        let (i, j) = (tile / across * tall, tile % across * wide);
        let (m, w) = (tall.min(m - i), wide.min(n - j));
        // SAFETY: tiles share no element of `c`, and each tile is visited once.
        let c = unsafe { c.at(i * stride + j, (m - 1) * stride + w) };
        if !bias.is_empty() {
            for r in 0..m {
                // SAFETY: row `r` of this tile.
                let row = unsafe { std::slice::from_raw_parts_mut(c.add(r * stride), w) };
                for (y, b) in row.iter_mut().zip(&bias[j..]) {
                    *y = if accumulate { *y + b } else { *b };
                }
            }
        }
        let accumulate = accumulate || !bias.is_empty();
        match b {
            // SAFETY: as above.
            Right::Buffer(b) => unsafe {
                product(m, w, k, c, stride, accumulate, a.from(i, 0), b.from(0, j), 1.0);
            },
            Right::File(b, scratch) => scratch.with(DEPTH.min(k) * w, |panel| {
                for p in (0..k).step_by(DEPTH) {
                    let depth = DEPTH.min(k - p);
                    let (row, column) = b.widen((p, j), (depth, w), panel);
                    let b = Matrix { data: panel, row, column };
                    let accumulate = accumulate || p > 0;
                    // SAFETY: as above.
                    unsafe { product(m, w, depth, c, stride, accumulate, a.from(i, p), b, 1.0) };
                }
            }),
        }
    });
}

/// `db[outputs] (+)= Σ_rows dy`, whose rows are `stride` apart.
pub(super) fn sum_rows(db: &mut [f32], accumulate: bool, dy: &[f32], stride: usize) {
    if !accumulate {
        db.fill(0.0);
    }
    // Each thread takes a piece of columns, so every sum runs over the rows in order on one thread.
    db.par_chunks_mut(64).enumerate().for_each(|(piece, db)| {
        for dy in dy.chunks(stride) {
            for (db, dy) in db.iter_mut().zip(&dy[piece * 64..]) {
                *db += dy;
            }
        }
    });
}
