//! References to ranges of device memory.

use crate::dtype::{Packing, WeightType};
use std::ops::Range;

/// Type of a view's elements, and where they are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE 754 single precision, in a buffer.
    F32,
    /// A read-only tensor in a file ([`super::Backend::map`]). It may be the weights of [`super::Backend::linear`],
    /// `linear_dx`, `grouped_linear`, `grouped_linear_dx` and `row_norms`, and the table of `gather`; every other
    /// operation rejects it.
    File(WeightType),
    /// A read-only matrix packed into fewer bits. It may be the weights of [`super::Backend::linear`], `linear_dx` and
    /// `row_norms`.
    Packed(Packing),
}

/// A row-major matrix in a buffer of a backend: `rows` rows of `width` elements whose starts are `stride` apart. In a
/// file it may be the transpose of the stored matrix; then the elements of a row are not adjacent either.
///
/// A view is only a reference: it is `Copy`, owns no memory and keeps none alive. Only the backend that made the buffer
/// can read or write through it; every other backend, and the same one after the buffer is freed, rejects the
/// operation.
///
/// Views are cut like slices: a part outside the view is a bug of the caller and panics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    pub(super) backend: u64,
    pub(super) buffer: u64,
    pub(super) start: usize,
    rows: usize,
    width: usize,
    stride: usize,
    /// Distance between the elements of a row: 1 except in a transposed matrix.
    column: usize,
    dtype: Dtype,
}

impl View {
    /// All `len` elements of a buffer from `start` on, as one row.
    pub(super) fn of_buffer(backend: u64, buffer: u64, start: usize, len: usize) -> View {
        View { backend, buffer, start, rows: 1, width: len, stride: len, column: 1, dtype: Dtype::F32 }
    }

    /// All `len` elements of a read-only tensor, as one row.
    pub(super) fn of_file(backend: u64, file: u64, len: usize, dtype: Dtype) -> View {
        View { dtype, ..View::of_buffer(backend, file, 0, len) }
    }

    /// A matrix without memory, for planning: its size may exceed any machine's memory.
    pub(crate) fn planned(rows: usize, width: usize) -> View {
        View { rows, stride: width, ..View::of_buffer(u64::MAX, u64::MAX, 0, width) }
    }

    /// Number of rows.
    pub fn rows(self) -> usize {
        self.rows
    }

    /// Number of elements in a row.
    pub fn width(self) -> usize {
        self.width
    }

    /// Distance between the starts of two rows, in elements.
    pub fn stride(self) -> usize {
        self.stride
    }

    /// Distance between two elements of a row.
    pub fn column(self) -> usize {
        self.column
    }

    /// Type of the elements.
    pub fn dtype(self) -> Dtype {
        self.dtype
    }

    /// Number of elements in the view.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(self) -> usize {
        self.rows.saturating_mul(self.width)
    }

    /// True if the rows follow each other without a gap.
    pub fn is_contiguous(self) -> bool {
        self.column == 1 && (self.rows <= 1 || self.stride == self.width)
    }

    /// Number of elements from the first of the view to its last, gaps included.
    pub(super) fn extent(self) -> usize {
        match self.rows {
            0 => 0,
            _ if self.width == 0 => 0,
            rows => {
                let last = self.width.saturating_sub(1).saturating_mul(self.column);
                (rows - 1).saturating_mul(self.stride).saturating_add(last).saturating_add(1)
            }
        }
    }

    /// `len` elements of a contiguous view from element `start` on, as one row.
    ///
    /// # Panics
    /// When the view is not contiguous, or the part is not inside it.
    pub fn part(self, start: usize, len: usize) -> View {
        assert!(self.is_contiguous(), "a part of a view with gaps: {self:?}");
        let all = self.len();
        assert!(start <= all && len <= all - start, "part {start}+{len} of a view of {all}");
        View { start: self.start + start, rows: 1, width: len, stride: len, ..self }
    }

    /// The first `rows · width` elements of a contiguous view as a matrix.
    ///
    /// # Panics
    /// When the view is not contiguous or has fewer elements, and for a `width` of 0.
    pub fn matrix(self, rows: usize, width: usize) -> View {
        assert!(self.is_contiguous(), "a matrix over a view with gaps: {self:?}");
        let fits = rows.checked_mul(width).is_some_and(|len| len <= self.len());
        assert!(fits && width > 0, "a matrix of {rows} × {width} in a view of {}", self.len());
        View { rows, width, stride: width, ..self }
    }

    /// A range of the rows.
    ///
    /// # Panics
    /// When the range is not inside the view.
    pub fn row_range(self, rows: Range<usize>) -> View {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        // No overflow: the offset is at most the view's extent, which lies inside a buffer.
        View { start: self.start + rows.start * self.stride, rows: rows.len(), ..self }
    }

    /// The first `count` rows.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn top(self, count: usize) -> View {
        self.row_range(0..count)
    }

    /// A range of the columns.
    ///
    /// # Panics
    /// When the range is empty or not inside the view.
    pub fn columns(self, columns: Range<usize>) -> View {
        let inside = columns.start < columns.end && columns.end <= self.width;
        assert!(inside, "columns {columns:?} of {}", self.width);
        View { start: self.start + columns.start * self.column, width: columns.len(), ..self }
    }

    /// The transpose of a matrix in a file.
    ///
    /// # Panics
    /// When it is in a buffer: no operation takes such a transpose.
    pub fn transposed(self) -> View {
        assert!(self.dtype != Dtype::F32, "the transpose of a matrix in a buffer: {self:?}");
        View { rows: self.width, width: self.rows, stride: self.column, column: self.stride, ..self }
    }

    /// True if both are in the same buffer.
    pub(super) fn shares_buffer(self, other: View) -> bool {
        self.backend == other.backend && self.dtype == other.dtype && self.buffer == other.buffer
    }

    /// True if the spans from first to last element of the two views overlap.
    pub(super) fn overlaps(self, other: View) -> bool {
        self.shares_buffer(other)
            && self.start < other.start.saturating_add(other.extent())
            && other.start < self.start.saturating_add(self.extent())
    }
}
