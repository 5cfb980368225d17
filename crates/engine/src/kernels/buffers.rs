//! Ownership of device memory: handles that free their memory when they are dropped.

use super::plan::AttentionPlan;
use super::stored::FileTensor;
use super::view::{Dtype, View};
use crate::{Error, Result};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Owner of one item in a backend's memory. Dropping it releases the item; the backend frees released items when it
/// next allocates or synchronises.
#[derive(Debug)]
struct Lease {
    backend: u64,
    item: u64,
    released: Arc<Mutex<Vec<u64>>>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        lock(&self.released).push(self.item);
    }
}

fn lock(list: &Mutex<Vec<u64>>) -> MutexGuard<'_, Vec<u64>> {
    // The list is consistent even if a thread panicked while holding the lock.
    list.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A buffer of elements, freed when it is dropped.
#[derive(Debug)]
pub struct Buffer {
    lease: Lease,
    /// Where its elements start in the backend's allocation.
    start: usize,
    len: usize,
}

impl Buffer {
    /// All its elements, as one row.
    pub fn view(&self) -> View {
        View::of_buffer(self.lease.backend, self.lease.item, self.start, self.len)
    }

    /// All its elements as `rows` rows of equal width.
    ///
    /// # Panics
    /// As [`View::matrix`].
    pub fn matrix(&self, rows: usize, width: usize) -> View {
        self.view().matrix(rows, width)
    }
}

/// A buffer of bytes, freed when it is dropped.
#[derive(Debug)]
pub struct ByteBuffer {
    lease: Lease,
    len: usize,
}

impl ByteBuffer {
    /// All its bytes.
    pub fn view(&self) -> Bytes {
        Bytes { backend: self.lease.backend, buffer: self.lease.item, start: 0, len: self.len }
    }
}

/// A reference to a range of a [`ByteBuffer`], as [`View`] is to a range of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes {
    backend: u64,
    buffer: u64,
    start: usize,
    len: usize,
}

impl Bytes {
    /// Number of bytes in the range.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(self) -> usize {
        self.len
    }

    /// `len` bytes of the range from `start` on.
    ///
    /// # Panics
    /// When they are not inside the range.
    pub fn part(self, start: usize, len: usize) -> Bytes {
        assert!(start <= self.len && len <= self.len - start, "bytes {start}+{len} of {}", self.len);
        Bytes { start: self.start + start, len, ..self }
    }

    /// True if both are ranges of the same buffer.
    pub(super) fn shares(self, other: Bytes) -> bool {
        (self.backend, self.buffer) == (other.backend, other.buffer)
    }

    /// Its range in its buffer.
    pub(super) fn range(self) -> Range<usize> {
        self.start..self.start + self.len
    }
}

/// A read-only tensor, released when it is dropped.
#[derive(Debug)]
pub struct FileBuffer {
    lease: Lease,
    len: usize,
    dtype: Dtype,
}

impl FileBuffer {
    /// All its elements, as one row.
    pub fn view(&self) -> View {
        View::of_file(self.lease.backend, self.lease.item, self.len, self.dtype)
    }
}

/// A list of row or token numbers in a backend's memory, freed when it is dropped.
#[derive(Debug)]
pub struct IndexBuffer {
    lease: Lease,
    len: usize,
    bound: usize,
}

impl IndexBuffer {
    /// The whole list.
    pub fn view(&self) -> Indices {
        let Lease { backend, item, .. } = self.lease;
        Indices { backend, list: item, start: 0, len: self.len, bound: self.bound }
    }
}

/// A reference to a range of an [`IndexBuffer`], as [`View`] is to a range of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Indices {
    backend: u64,
    list: u64,
    start: usize,
    len: usize,
    bound: usize,
}

impl Indices {
    /// Number of indices in the range.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(self) -> usize {
        self.len
    }

    /// An exclusive upper bound of all numbers in the list. The host knows it, so an operation can be checked without
    /// waiting for the device.
    pub fn bound(self) -> usize {
        self.bound
    }

    /// A part of the range.
    ///
    /// # Panics
    /// When it is not inside the range.
    pub fn part(self, range: Range<usize>) -> Indices {
        assert!(range.start <= range.end && range.end <= self.len, "indices {range:?} of {}", self.len);
        Indices { start: self.start + range.start, len: range.len(), ..self }
    }
}

/// The slots of some rows, in a backend's memory.
#[derive(Debug)]
pub struct Routes {
    pub(super) rows: IndexBuffer,
    pub(super) offsets: IndexBuffer,
}

impl Routes {
    /// The row of each slot.
    pub fn rows(&self) -> Indices {
        self.rows.view()
    }

    /// The first slot of each expert, and the end of the last.
    pub fn offsets(&self) -> Indices {
        self.offsets.view()
    }
}

/// A checked attention plan in a backend's memory, freed when it is dropped.
#[derive(Debug)]
pub struct PlanBuffer {
    lease: Lease,
    queries: usize,
    keys: usize,
}

impl PlanBuffer {
    /// Query rows of the plan.
    pub fn queries(&self) -> usize {
        self.queries
    }

    /// Key rows that the plan reaches: one past the largest.
    pub fn keys(&self) -> usize {
        self.keys
    }
}

/// Items of one kind. Numbers are never reused, so a handle that outlives its item finds nothing.
#[derive(Debug)]
struct Store<T> {
    items: HashMap<u64, T>,
    next: u64,
    released: Arc<Mutex<Vec<u64>>>,
}

impl<T> Default for Store<T> {
    fn default() -> Self {
        Store { items: HashMap::new(), next: 0, released: Arc::default() }
    }
}

impl<T> Store<T> {
    fn add(&mut self, backend: u64, item: T) -> Lease {
        self.collect();
        let number = self.next;
        self.next += 1;
        self.items.insert(number, item);
        Lease { backend, item: number, released: Arc::clone(&self.released) }
    }

    fn collect(&mut self) {
        for item in lock(&self.released).drain(..) {
            self.items.remove(&item);
        }
    }
}

/// The memory of a backend: `M` is its type of a buffer, `F` of a read-only tensor, `I` of a list of indices, `P` of an
/// attention plan and `B` of a buffer of bytes. The defaults are those of host backends.
#[derive(Debug)]
pub(super) struct Memory<M, F = FileTensor, I = Arc<[u32]>, P = Arc<AttentionPlan>, B = Vec<u8>> {
    backend: u64,
    buffers: Store<M>,
    files: Store<F>,
    indices: Store<I>,
    plans: Store<P>,
    bytes: Store<B>,
}

impl<M, F, I, P, B> Default for Memory<M, F, I, P, B> {
    fn default() -> Self {
        static BACKENDS: AtomicU64 = AtomicU64::new(0);
        let backend = BACKENDS.fetch_add(1, Ordering::Relaxed);
        let files = Store::default();
        Memory {
            backend,
            files,
            buffers: Store::default(),
            indices: Store::default(),
            plans: Store::default(),
            bytes: Store::default(),
        }
    }
}

impl<M, F, I, P, B> Memory<M, F, I, P, B> {
    /// Adds a buffer whose `len` elements start at element `start` of `memory`.
    pub(super) fn add_buffer(&mut self, memory: M, start: usize, len: usize) -> Buffer {
        Buffer { lease: self.buffers.add(self.backend, memory), start, len }
    }

    /// Adds a read-only tensor.
    pub(super) fn keep_file(&mut self, kept: F, len: usize, dtype: Dtype) -> FileBuffer {
        FileBuffer { lease: self.files.add(self.backend, kept), len, dtype }
    }

    /// Adds a list of `len` indices below `bound`.
    pub(super) fn keep_indices(&mut self, kept: I, len: usize, bound: usize) -> IndexBuffer {
        IndexBuffer { lease: self.indices.add(self.backend, kept), len, bound }
    }

    /// Adds a checked plan.
    pub(super) fn keep_plan(&mut self, kept: P, queries: usize, keys: usize) -> PlanBuffer {
        PlanBuffer { lease: self.plans.add(self.backend, kept), queries, keys }
    }

    /// Adds a buffer of `len` bytes.
    pub(super) fn keep_bytes(&mut self, kept: B, len: usize) -> ByteBuffer {
        ByteBuffer { lease: self.bytes.add(self.backend, kept), len }
    }

    /// Frees all released items.
    pub(super) fn collect(&mut self) {
        self.buffers.collect();
        self.files.collect();
        self.indices.collect();
        self.plans.collect();
        self.bytes.collect();
    }

    pub(super) fn buffer(&self, view: View) -> Result<&M> {
        self.own(view.backend, "view")?;
        in_buffer(view)?;
        self.buffers.items.get(&view.buffer).ok_or_else(|| freed("view"))
    }

    /// All live buffers, oldest first.
    pub(super) fn each_buffer(&self) -> impl Iterator<Item = &M> {
        let mut all: Vec<(&u64, &M)> = self.buffers.items.iter().collect();
        all.sort_by_key(|(number, _)| **number);
        all.into_iter().map(|(_, buffer)| buffer)
    }

    pub(super) fn buffer_mut(&mut self, view: View) -> Result<&mut M> {
        self.own(view.backend, "view")?;
        in_buffer(view)?;
        self.buffers.items.get_mut(&view.buffer).ok_or_else(|| freed("view"))
    }

    /// The tensor that a view refers to; `None` if the view is in a buffer.
    pub(super) fn file(&self, view: View) -> Result<Option<&F>> {
        self.own(view.backend, "view")?;
        if view.dtype() == Dtype::F32 {
            return Ok(None);
        }
        self.files.items.get(&view.buffer).map(Some).ok_or_else(|| freed("view"))
    }

    pub(super) fn file_mut(&mut self, view: View) -> Result<Option<&mut F>> {
        self.file(view)?;
        Ok(self.files.items.get_mut(&view.buffer).filter(|_| view.dtype() != Dtype::F32))
    }

    /// The list of a range of indices, and the range within it.
    pub(super) fn list(&self, indices: Indices) -> Result<(&I, Range<usize>)> {
        self.own(indices.backend, "list of indices")?;
        let list = self.indices.items.get(&indices.list).ok_or_else(|| freed("list of indices"))?;
        Ok((list, indices.start..indices.start + indices.len))
    }

    pub(super) fn kept_plan(&self, plan: &PlanBuffer) -> Result<&P> {
        self.own(plan.lease.backend, "attention plan")?;
        self.plans.items.get(&plan.lease.item).ok_or_else(|| freed("attention plan"))
    }

    pub(super) fn kept_bytes(&self, bytes: Bytes) -> Result<&B> {
        self.own(bytes.backend, "buffer of bytes")?;
        self.bytes.items.get(&bytes.buffer).ok_or_else(|| freed("buffer of bytes"))
    }

    fn kept_bytes_mut(&mut self, bytes: Bytes) -> Result<&mut B> {
        self.own(bytes.backend, "buffer of bytes")?;
        self.bytes.items.get_mut(&bytes.buffer).ok_or_else(|| freed("buffer of bytes"))
    }

    /// Sizes of all live buffers, byte buffers and read-only tensors.
    pub(super) fn sizes(
        &self,
        of: impl Fn(&M) -> usize,
        of_bytes: impl Fn(&B) -> usize,
        of_files: impl Fn(&F) -> usize,
    ) -> u64 {
        let buffers: usize = self.buffers.items.values().map(of).sum();
        let bytes: usize = self.bytes.items.values().map(of_bytes).sum();
        let files: usize = self.files.items.values().map(of_files).sum();
        (buffers + bytes + files) as u64
    }

    fn own(&self, backend: u64, what: &str) -> Result<()> {
        if backend == self.backend {
            return Ok(());
        }
        let message = format!("a {what} of another backend");
        Err(Error::Operands { operation: "memory", message })
    }
}

/// Memory on the host.
impl<M> Memory<M> {
    pub(super) fn add_file(&mut self, tensor: FileTensor) -> FileBuffer {
        let (len, dtype) = (tensor.len(), tensor.dtype());
        self.keep_file(tensor, len, dtype)
    }

    pub(super) fn add_indices(&mut self, values: &[u32]) -> IndexBuffer {
        let bound = values.iter().max().map_or(0, |&largest| largest as usize + 1);
        self.keep_indices(values.into(), values.len(), bound)
    }

    pub(super) fn add_plan(&mut self, plan: AttentionPlan) -> Result<PlanBuffer> {
        plan.check()?;
        let (queries, keys) = (plan.rows.len(), plan.keys());
        Ok(self.keep_plan(Arc::new(plan), queries, keys))
    }

    /// A buffer of `len` zero bytes.
    pub(super) fn add_bytes(&mut self, len: usize) -> Result<ByteBuffer> {
        let mut memory = Vec::new();
        memory.try_reserve_exact(len).map_err(|_| Error::Memory { bytes: len as u64 })?;
        memory.resize(len, 0);
        Ok(self.keep_bytes(memory, len))
    }

    pub(super) fn bytes(&self, bytes: Bytes) -> Result<&[u8]> {
        Ok(&self.kept_bytes(bytes)?[bytes.range()])
    }

    pub(super) fn bytes_mut(&mut self, bytes: Bytes) -> Result<&mut [u8]> {
        Ok(&mut self.kept_bytes_mut(bytes)?[bytes.range()])
    }

    /// Takes a buffer out, to be returned with [`Memory::put_bytes`].
    pub(super) fn take_bytes(&mut self, bytes: Bytes) -> Result<Vec<u8>> {
        self.kept_bytes_mut(bytes).map(std::mem::take)
    }

    pub(super) fn put_bytes(&mut self, bytes: Bytes, memory: Vec<u8>) {
        self.bytes.items.insert(bytes.buffer, memory);
    }

    pub(super) fn indices(&self, indices: Indices) -> Result<HostIndices> {
        let (list, range) = self.list(indices)?;
        Ok(HostIndices { list: Arc::clone(list), range })
    }

    pub(super) fn plan(&self, plan: &PlanBuffer) -> Result<Arc<AttentionPlan>> {
        self.kept_plan(plan).cloned()
    }
}

impl<S> Memory<Vec<S>> {
    /// Bytes of the live buffers and packed matrices.
    pub(super) fn allocated(&self) -> u64 {
        let held = |tensor: &FileTensor| match tensor.dtype() {
            Dtype::Packed(_) => tensor.size() as usize,
            Dtype::F32 | Dtype::File(_) => 0,
        };
        self.sizes(|buffer| buffer.len() * size_of::<S>(), Vec::len, held)
    }
}

/// The numbers of an [`Indices`] in host memory.
pub(super) struct HostIndices {
    list: Arc<[u32]>,
    range: Range<usize>,
}

impl std::ops::Deref for HostIndices {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        &self.list[self.range.clone()]
    }
}

fn in_buffer(view: View) -> Result<()> {
    match view.dtype() {
        Dtype::F32 => Ok(()),
        Dtype::File(_) | Dtype::Packed(_) => {
            let message = "a tensor in a file, which this operation does not read".into();
            Err(Error::Operands { operation: "memory", message })
        }
    }
}

fn freed(what: &str) -> Error {
    Error::Operands { operation: "memory", message: format!("a {what} whose memory was freed") }
}
