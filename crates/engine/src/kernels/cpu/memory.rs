//! Buffers of the CPU as slices, and scratch memory.

use super::files::FileMatrix;
use crate::kernels::buffers::Memory;
use crate::kernels::{View, check};
use crate::{Error, Result};
use std::sync::Mutex;

/// All cores, through the current rayon pool.
#[derive(Debug, Default)]
pub struct Cpu {
    pub(super) memory: Memory<Vec<f32>>,
    scratch: Scratch,
}

/// The slices of some views: those to write and those to read.
pub(super) type Slices<'a, const O: usize, const I: usize> =
    ([&'a mut [f32]; O], [&'a [f32]; I], &'a Scratch);

impl Cpu {
    /// A backend without buffers.
    pub fn new() -> Cpu {
        Cpu::default()
    }

    /// The slices from the first to the last element of some views: those in `outs` for writing, those in `ins` for
    /// reading. A view without elements has an empty slice.
    ///
    /// # Errors
    /// When a view to write overlaps another one, or a view is of another backend or of freed memory.
    pub(super) fn slices<const O: usize, const I: usize>(
        &mut self,
        outs: [View; O],
        ins: [View; I],
    ) -> Result<Slices<'_, O, I>> {
        check::apart(&outs, &ins)?;
        let memory = &mut self.memory;
        let mut start = |v: View| -> Result<*mut f32> {
            if v.extent() == 0 {
                return Ok(std::ptr::NonNull::<f32>::dangling().as_ptr());
            }
            let buffer = memory.buffer_mut(v)?;
            let inside = v.start <= buffer.len() && v.extent() <= buffer.len() - v.start;
            assert!(inside, "views are cut from buffers: {v:?}");
            // SAFETY: inside the buffer. `Vec::as_mut_ptr` creates no reference to the elements, so the pointers
            // returned before stay valid.
            Ok(unsafe { buffer.as_mut_ptr().add(v.start) })
        };
        let (mut out_starts, mut in_starts) = ([std::ptr::null_mut(); O], [std::ptr::null_mut(); I]);
        for (to, view) in out_starts.iter_mut().zip(outs).chain(in_starts.iter_mut().zip(ins)) {
            *to = start(view)?;
        }
        // SAFETY: `&mut self` is held for the lifetime of the result, so nothing else accesses the buffers. Each range
        // was checked against its buffer just above, no buffer moves while they are borrowed, and a written range
        // overlaps no other range of this call.
        let out = |i: usize| unsafe { std::slice::from_raw_parts_mut(out_starts[i], outs[i].extent()) };
        // SAFETY: as above; ranges that are only read may overlap each other.
        let read = |i: usize| unsafe { std::slice::from_raw_parts(in_starts[i], ins[i].extent()) };
        Ok((std::array::from_fn(out), std::array::from_fn(read), &self.scratch))
    }

    /// The matrix of a view in a file; `None` if the view is in a buffer.
    pub(super) fn in_file(&self, w: View) -> Result<Option<FileMatrix>> {
        Ok(self.memory.file(w)?.map(|tensor| FileMatrix::of(w, tensor)))
    }

    /// The slice of a contiguous view.
    pub(super) fn slice(&self, v: View) -> Result<&[f32]> {
        check::element_wise(v)?;
        match v.len() {
            0 => Ok(&[]),
            len => Ok(&self.memory.buffer(v)?[v.start..v.start + len]),
        }
    }
}

/// `vec![0.0; len]`, but returns an error instead of aborting. The system provides zeroed pages lazily: memory is used
/// when it is first written.
pub(super) fn zeros(len: usize) -> Result<Vec<f32>> {
    let failed = || Error::Memory { bytes: (len as u64).saturating_mul(size_of::<f32>() as u64) };
    let layout = std::alloc::Layout::array::<f32>(len).map_err(|_| failed())?;
    if layout.size() == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the layout is not empty.
    let start = unsafe { std::alloc::alloc_zeroed(layout) }.cast::<f32>();
    if start.is_null() {
        return Err(failed());
    }
    // SAFETY: just allocated by the global allocator with the layout of `len` f32, all of them 0.0.
    Ok(unsafe { Vec::from_raw_parts(start, len, len) })
}

/// Scratch buffers that tasks borrow and return, so that after the first step nothing is allocated.
#[derive(Debug, Default)]
pub(super) struct Scratch(Mutex<Vec<Vec<f32>>>);

impl Scratch {
    /// Calls `f` with `len` floats of unspecified content.
    pub(super) fn with<R>(&self, len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
        let mut buffer = self.lock().pop().unwrap_or_default();
        if buffer.len() < len {
            buffer.resize(len, 0.0);
        }
        let result = f(&mut buffer[..len]);
        self.lock().push(buffer);
        result
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Vec<f32>>> {
        // The list is consistent even if a thread panicked while holding the lock.
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// A slice that tasks write at ranges that the caller keeps disjoint.
#[derive(Clone, Copy)]
pub(super) struct Disjoint<'a> {
    start: *mut f32,
    len: usize,
    life: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: it is a `&mut [f32]` whose users guarantee, at each `at`, to access only ranges that no other task accesses.
unsafe impl Send for Disjoint<'_> {}
// SAFETY: as above.
unsafe impl Sync for Disjoint<'_> {}

impl<'a> Disjoint<'a> {
    pub(super) fn new(slice: &'a mut [f32]) -> Self {
        Disjoint { start: slice.as_mut_ptr(), len: slice.len(), life: std::marker::PhantomData }
    }

    /// A pointer to element `at`, from which `extent` elements may be accessed.
    ///
    /// # Safety
    /// Until the pointer is dropped, no other task accesses the elements that the caller accesses through it.
    pub(super) unsafe fn at(self, at: usize, extent: usize) -> *mut f32 {
        assert!(at <= self.len && extent <= self.len - at);
        // SAFETY: inside the slice, as just checked.
        unsafe { self.start.add(at) }
    }
}
