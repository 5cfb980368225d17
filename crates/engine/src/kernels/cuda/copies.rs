//! Copies of weights in the type that products multiply (bf16). A copy is made once. Optimizers write it together with
//! the weights; after any other write it is refreshed before a product reads it.
//!
//! Activations that several products read one after the other have a copy until they are written or released.
//!
//! Nothing can read a stale copy: every operation gets the address that it writes to from [`Cuda::target`], which marks
//! the copies of the written range as stale.

use super::allocation::{Allocation, Work};
use super::launch::{Size, launch};
use super::{Cuda, Precision};
use crate::Result;
use crate::dtype::WeightType;
use crate::kernels::check::rule;
use crate::kernels::{Dtype, View};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{MutexGuard, PoisonError};

/// Rows of converted factors are padded to a multiple of this: 16 bytes of bf16, which tensor cores load at once.
pub(super) const PAD: usize = 8;

/// Elements that are rounded as one matrix row.
const ROW: usize = 1 << 15;

/// A buffer of f32 values, and copies of parts of it.
#[derive(Debug)]
pub(super) struct DeviceBuffer {
    memory: Allocation,
    copies: Vec<Copy>,
}

/// A copy of some elements of a buffer.
#[derive(Debug)]
struct Copy {
    elements: Range<usize>,
    memory: Allocation,
    /// True if the elements were written after the copy was made.
    old: AtomicBool,
}

impl Copy {
    fn meets(&self, elements: &Range<usize>) -> bool {
        self.elements.start < elements.end && elements.start < self.elements.end
    }

    /// The address of an element's copy.
    fn at(&self, element: usize) -> u64 {
        self.memory.address() + 2 * (element - self.elements.start) as u64
    }
}

impl DeviceBuffer {
    pub(super) fn new(memory: Allocation) -> DeviceBuffer {
        DeviceBuffer { memory, copies: Vec::new() }
    }

    /// Bytes of the buffer and its copies.
    pub(super) fn bytes(&self) -> usize {
        self.memory.bytes() + self.copies.iter().map(|copy| copy.memory.bytes()).sum::<usize>()
    }

    /// Number of elements.
    pub(super) fn len(&self) -> usize {
        self.memory.bytes() / 4
    }

    /// The address of an element, for reading; [`Cuda::target`] returns it for writing.
    pub(super) fn address(&self, element: usize) -> u64 {
        self.memory.address() + 4 * element as u64
    }

    /// Reads bytes from an element on, waiting for them.
    pub(super) fn read(&self, element: usize, to: &mut [u8]) -> Result<()> {
        self.memory.read(4 * element, to)
    }

    /// Writes bytes from an element on; the caller has the address from [`Cuda::target`].
    pub(super) fn write(&self, element: usize, from: &[u8]) -> Result<()> {
        self.memory.write(4 * element, from)
    }

    /// Marks the copies of these elements as stale.
    pub(super) fn written(&self, elements: &Range<usize>) {
        for copy in self.copies.iter().filter(|copy| copy.meets(elements)) {
            copy.old.store(true, Ordering::Relaxed);
        }
    }
}

/// The range of elements from a view's first to its last, in its buffer.
pub(super) fn elements(view: View) -> Range<usize> {
    view.start..view.start.saturating_add(view.extent())
}

/// A range of parameters that one launch updates.
pub(super) struct Run {
    /// The first, counted from the start of the view.
    pub(super) first: usize,
    pub(super) len: usize,
    /// Where the kernel writes their copy; 0 if they have none.
    pub(super) copy: u64,
}

/// An activation that several products read, and its copy once a product has made one.
#[derive(Debug)]
pub(super) struct Shared {
    view: View,
    copy: Option<(Work, usize)>,
}

impl Shared {
    /// The row and column of the activation at which a view starts, if the view is inside it row by row.
    fn place(&self, view: View) -> Option<[usize; 2]> {
        let (of, stride) = (self.view, self.view.stride().max(1));
        let at = view.start.checked_sub(of.start)?;
        let [row, column] = [at / stride, at % stride];
        let aligned = view.rows() <= 1 || view.stride() == of.stride();
        let inside = row + view.rows() <= of.rows() && column + view.width() <= of.width();
        (view.shares_buffer(of) && aligned && inside && view.column() == 1).then_some([row, column])
    }
}

impl Cuda {
    /// See [`crate::kernels::Backend::share_factor`].
    pub(super) fn share(&mut self, x: View) -> Result<()> {
        if self.rounded_type(x)? == Some(WeightType::F32) && x.column() == 1 {
            self.shared_factors().push(Shared { view: x, copy: None });
        }
        Ok(())
    }

    /// See [`crate::kernels::Backend::release_factor`].
    pub(super) fn release(&mut self, x: View) {
        let mut shared = self.shared_factors();
        if let Some(place) = shared.iter().rposition(|shared| shared.view == x) {
            shared.remove(place);
        }
    }

    pub(super) fn shared_factors(&self) -> MutexGuard<'_, Vec<Shared>> {
        // The list is consistent even if a thread panicked while holding the lock.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Discards copies of activations that are written.
    pub(super) fn forget(&self, written: View) {
        for shared in self.shared_factors().iter_mut().filter(|shared| shared.view.overlaps(written)) {
            shared.copy = None;
        }
    }

    /// The copy of a factor that is in a shared activation: its address and its row stride.
    pub(super) fn shared_copy(&self, view: View) -> Result<Option<(u64, usize)>> {
        let mut all = self.shared_factors();
        let found = all.iter_mut().find_map(|shared| Some((shared.place(view)?, shared)));
        let Some(([row, column], shared)) = found else { return Ok(None) };
        let (memory, stride) = match &mut shared.copy {
            Some(known) => known,
            none => none.insert(self.rounded_rows(shared.view)?),
        };
        Ok(Some((memory.address() + 2 * (row * *stride + column) as u64, *stride)))
    }

    /// The rows of a matrix in a buffer, rounded, and their stride.
    fn rounded_rows(&self, x: View) -> Result<(Work, usize)> {
        let (from, stride) = (self.source(x)?, x.width().next_multiple_of(PAD));
        let memory = self.work(x.rows().saturating_mul(stride).saturating_mul(2))?;
        self.count_rounded(x.len());
        let size = Size::matrix(x.rows(), stride);
        launch!(self, c"f32_to_bf16", size, [&memory, stride, from, x.stride(), x.rows(), x.width()])?;
        Ok((memory, stride))
    }

    /// See [`crate::kernels::Backend::keep_factor`].
    pub(super) fn keep(&mut self, w: View, alone: bool) -> Result<()> {
        let Some(kind) = self.rounded_type(w)? else { return Ok(()) };
        if w.dtype() != Dtype::F32 {
            return self.keep_of_file(w, kind, alone);
        }
        let of = elements(w);
        let buffer = self.memory.buffer(w)?;
        let fits = w.is_contiguous() && of.end <= buffer.len();
        rule!("keep factor", fits && !of.is_empty(), "no range of a buffer: {w:?}");
        rule!("keep factor", !buffer.copies.iter().any(|copy| copy.meets(&of)), "kept already: {w:?}");
        let memory = Allocation::new(&self.driver, 2 * of.len())?;
        let copy = Copy { elements: of, memory, old: AtomicBool::new(true) };
        self.memory.buffer_mut(w)?.copies.push(copy);
        Ok(())
    }

    /// Rounds a tensor of a file; if only products read it, its own values are freed.
    fn keep_of_file(&mut self, w: View, kind: WeightType, alone: bool) -> Result<()> {
        let Some(values) = self.memory.file(w)?.and_then(|tensor| tensor.memory.as_ref()) else {
            return Ok(());
        };
        let len = values.bytes() / kind.bytes();
        let copy = Allocation::new(&self.driver, 2 * len)?;
        self.round(kind, copy.address(), values.address(), len)?;
        if let Some(tensor) = self.memory.file_mut(w)? {
            tensor.copy = Some(copy);
            if alone {
                tensor.memory = None;
            }
        }
        Ok(())
    }

    /// The type of a view's elements, if products take them rounded.
    fn rounded_type(&self, view: View) -> Result<Option<WeightType>> {
        if self.precision != Precision::Bf16 || !self.keeps_copies {
            return Ok(None);
        }
        let kind = match view.dtype() {
            Dtype::F32 => WeightType::F32,
            Dtype::File(kind) => kind,
            Dtype::Packed(_) => return Ok(None),
        };
        Ok(Some(kind).filter(|kind| self.precision.copy_bytes(*kind) > 0))
    }

    /// `to[n] = from[n]`, rounded to bf16.
    fn round(&self, kind: WeightType, to: u64, from: u64, n: usize) -> Result<()> {
        let kernel = match kind {
            WeightType::F32 => c"f32_to_bf16",
            WeightType::F16 => c"f16_to_bf16",
            WeightType::BF16 => unreachable!("bf16 is not rounded"),
        };
        self.count_rounded(n);
        let (rows, rest) = (n / ROW, n % ROW);
        for (first, rows, width) in [(0, rows, ROW), (rows * ROW, 1, rest)] {
            let (to, from) = (to + 2 * first as u64, from + (kind.bytes() * first) as u64);
            let size = Size::matrix(rows, width);
            launch!(self, kernel, size, [to, width, from, width, rows, width])?;
        }
        Ok(())
    }

    /// The address of the refreshed copy of a factor's elements; `None` if there is none.
    pub(super) fn copy_of(&self, view: View) -> Result<Option<u64>> {
        if view.dtype() != Dtype::F32 {
            let copy = self.memory.file(view)?.and_then(|tensor| tensor.copy.as_ref());
            let Some(copy) = copy else { return Ok(None) };
            let of = elements(view);
            assert!(of.end <= copy.bytes() / 2, "views are cut from tensors: {view:?}");
            return Ok(Some(copy.address() + 2 * of.start as u64));
        }
        let (buffer, of) = (self.memory.buffer(view)?, elements(view));
        let around = |copy: &&Copy| copy.elements.start <= of.start && of.end <= copy.elements.end;
        let Some(copy) = buffer.copies.iter().find(around) else { return Ok(None) };
        self.renew(buffer, copy)?;
        Ok(Some(copy.at(of.start)))
    }

    /// Refreshes a copy if its elements were written.
    fn renew(&self, buffer: &DeviceBuffer, copy: &Copy) -> Result<()> {
        if copy.old.swap(false, Ordering::Relaxed) {
            let from = buffer.address(copy.elements.start);
            self.round(WeightType::F32, copy.memory.address(), from, copy.elements.len())?;
        }
        Ok(())
    }

    /// Refreshes all stale copies, so that passes that find none stale issue the same commands.
    pub(super) fn renew_all(&self) -> Result<()> {
        for buffer in self.memory.each_buffer() {
            buffer.copies.iter().try_for_each(|copy| self.renew(buffer, copy))?;
        }
        Ok(())
    }

    /// The runs in which an element-wise optimizer updates parameters together with their copies.
    pub(super) fn runs(&self, p: View) -> Result<Vec<Run>> {
        self.forget(p);
        let (buffer, of) = (self.memory.buffer(p)?, elements(p));
        let mut met: Vec<&Copy> = buffer.copies.iter().filter(|copy| copy.meets(&of)).collect();
        met.sort_by_key(|copy| copy.elements.start);
        let (mut runs, mut at) = (Vec::new(), of.start);
        let run = |from: usize, to: usize, copy| Run { first: from - of.start, len: to - from, copy };
        for copy in met {
            self.renew(buffer, copy)?;
            let (start, end) = (copy.elements.start.max(of.start), copy.elements.end.min(of.end));
            runs.extend((at < start).then(|| run(at, start, 0)));
            runs.push(run(start, end, copy.at(start)));
            at = end;
        }
        runs.extend((at < of.end).then(|| run(at, of.end, 0)));
        Ok(runs)
    }

    /// Where an optimizer that updates whole parameters writes their copy; 0 if they have none, or a copy of a part
    /// only.
    pub(super) fn copy_of_all(&self, p: View) -> Result<u64> {
        match self.runs(p)?[..] {
            [Run { copy, .. }] => Ok(copy),
            _ => self.target(p).map(|_| 0),
        }
    }
}
