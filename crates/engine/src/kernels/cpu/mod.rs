//! The fast backend: all cores of one machine, f32.
//!
//! Determinism: work is cut into pieces whose size follows from the shapes alone, each piece is computed by
//! one thread in a fixed order, and partial sums are combined in the order of the pieces. The number of
//! threads changes who computes a piece, never the bytes of the result.

mod activation;
mod attention;
mod loss;
mod matmul;
mod norm;
mod optimizer;
mod rows;
mod simd;

use super::*;
use crate::Error;
use std::sync::Mutex;

/// Elements per piece of an element-wise operation: large enough to hide a task's cost (a few µs), small
/// enough to balance.
const PIECE: usize = 1 << 16;

/// Rows per piece of a row-wise operation.
const ROWS: usize = 64;

/// Bytes that a cache line holds; buffers start on one.
const LINE: usize = 64;

/// All cores, through the rayon pool in which it is called.
#[derive(Debug, Default)]
pub struct Cpu {
    buffers: Vec<Vec<f32>>,
    scratch: Scratch,
}

impl Cpu {
    /// A backend without buffers.
    pub fn new() -> Cpu {
        Cpu::default()
    }

    /// The slices behind some views: those in `outs` to write, those in `ins` to read.
    ///
    /// # Panics
    /// When a view to write overlaps another one, or a view lies outside its buffer.
    fn slices<const O: usize, const I: usize>(
        &mut self,
        outs: [View; O],
        ins: [View; I],
    ) -> ([&mut [f32]; O], [&[f32]; I], &Scratch) {
        for (i, out) in outs.iter().enumerate() {
            let others = outs[i + 1..].iter().chain(&ins);
            assert!(others.into_iter().all(|v| !out.overlaps(*v)), "a written view overlaps another");
        }
        let buffers = &mut self.buffers;
        let mut start = |v: View| {
            if v.len == 0 {
                return std::ptr::NonNull::<f32>::dangling().as_ptr();
            }
            let buffer = &mut buffers[v.buffer];
            assert!(v.start <= buffer.len() && v.len <= buffer.len() - v.start, "a view outside its buffer");
            // SAFETY: inside the buffer. `Vec::as_mut_ptr` makes no reference to the elements, so that the
            // pointers handed out before stay good.
            unsafe { buffer.as_mut_ptr().add(v.start) }
        };
        // SAFETY: `&mut self` is held for the life of the result, so nobody else reaches the buffers. Each
        // range was checked against its buffer just above, no buffer moves while they are borrowed, and a
        // written range overlaps no other range of this call.
        let outs = outs.map(|v| unsafe { std::slice::from_raw_parts_mut(start(v), v.len) });
        // SAFETY: as above; ranges that are only read may overlap each other.
        let ins = ins.map(|v| unsafe { std::slice::from_raw_parts(start(v), v.len) });
        (outs, ins, &self.scratch)
    }

    fn slice(&self, v: View) -> &[f32] {
        if v.len == 0 { &[] } else { &self.buffers[v.buffer][v.start..v.start + v.len] }
    }
}

/// `vec![0.0; len]`, but an error where that would abort. Zeroed pages come from the system untouched: memory
/// counts when it is first written.
fn zeros(len: usize) -> Result<Vec<f32>> {
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

/// An absent bias: an empty slice.
fn or_empty(view: Option<View>) -> View {
    view.unwrap_or(View { buffer: 0, start: 0, len: 0 })
}

impl Backend for Cpu {
    fn allocate(&mut self, len: usize) -> Result<View> {
        let spare = LINE / size_of::<f32>();
        let buffer = zeros(len.saturating_add(spare))?;
        let start = buffer.as_ptr().align_offset(LINE).min(spare);
        self.buffers.push(buffer);
        Ok(View { buffer: self.buffers.len() - 1, start, len })
    }

    fn write(&mut self, to: View, from: &[f32]) {
        let ([to], [], _) = self.slices([to], []);
        to.copy_from_slice(from);
    }

    fn read(&self, from: View, to: &mut [f32]) {
        to.copy_from_slice(self.slice(from));
    }

    fn fill(&mut self, x: View, value: f32) {
        let ([x], [], _) = self.slices([x], []);
        rows::fill(x, value);
    }

    fn copy(&mut self, y: View, x: View) {
        let ([y], [x], _) = self.slices([y], [x]);
        rows::copy(y, x);
    }

    fn add(&mut self, y: View, x: View) {
        let ([y], [x], _) = self.slices([y], [x]);
        rows::add(y, x);
    }

    fn gather(&mut self, y: View, x: View, rows: &[u32], width: usize) {
        let ([y], [x], _) = self.slices([y], [x]);
        rows::gather(y, x, rows, width);
    }

    fn scatter_add(&mut self, y: View, x: View, rows: &[u32], width: usize) {
        let ([y], [x], _) = self.slices([y], [x]);
        rows::scatter_add(y, x, rows, width);
    }

    fn norm(&mut self, norm: Norm, y: View, stats: View, x: View, w: View, b: Option<View>) {
        let ([y, stats], [x, w, b], _) = self.slices([y, stats], [x, w, or_empty(b)]);
        norm::statistics(norm, stats, x, w.len());
        norm::apply(norm, y, stats, x, w, b);
    }

    fn norm_again(&mut self, norm: Norm, y: View, stats: View, x: View, w: View, b: Option<View>) {
        let ([y], [stats, x, w, b], _) = self.slices([y], [stats, x, w, or_empty(b)]);
        norm::apply(norm, y, stats, x, w, b);
    }

    fn norm_backward(
        &mut self,
        norm: Norm,
        dx: View,
        dw: View,
        db: Option<View>,
        dy: View,
        stats: View,
        x: View,
        w: View,
    ) {
        let ([dx, dw, db], [dy, stats, x, w], scratch) =
            self.slices([dx, dw, or_empty(db)], [dy, stats, x, w]);
        norm::backward(norm, dx, dw, db, dy, stats, x, w, scratch);
    }

    fn linear(&mut self, s: Linear, y: View, accumulate: bool, x: View, w: View, b: Option<View>) {
        let ([y], [x, w, b], _) = self.slices([y], [x, w, or_empty(b)]);
        matmul::linear(s, y, accumulate, x, w, b);
    }

    fn linear_dx(&mut self, s: Linear, dx: View, accumulate: bool, dy: View, w: View) {
        let ([dx], [dy, w], _) = self.slices([dx], [dy, w]);
        matmul::linear_dx(s, dx, accumulate, dy, w);
    }

    fn linear_dw(&mut self, s: Linear, dw: View, db: Option<View>, accumulate: bool, dy: View, x: View) {
        let ([dw, db], [dy, x], _) = self.slices([dw, or_empty(db)], [dy, x]);
        matmul::linear_dw(s, dw, db, accumulate, dy, x);
    }

    fn rotate(
        &mut self,
        x: View,
        width: usize,
        heads: usize,
        head_dim: usize,
        table: View,
        positions: &[u32],
        inverse: bool,
    ) {
        let ([x], [table], _) = self.slices([x], [table]);
        rows::rotate(x, width, heads, head_dim, table, positions, inverse);
    }

    fn attention(&mut self, h: Heads, plan: &Attention, o: View, lse: View, q: View, kv: View) {
        plan.check(q.len / h.query_width(), kv.len / h.kv_width());
        let ([o, lse], [q, kv], scratch) = self.slices([o, lse], [q, kv]);
        attention::forward(h, plan, o, lse, q, kv, scratch);
    }

    fn attention_backward(
        &mut self,
        h: Heads,
        plan: &Attention,
        dq: View,
        dkv: View,
        do_: View,
        o: View,
        lse: View,
        q: View,
        kv: View,
    ) {
        plan.check(q.len / h.query_width(), kv.len / h.kv_width());
        let ([dq, dkv], [do_, o, lse, q, kv], scratch) = self.slices([dq, dkv], [do_, o, lse, q, kv]);
        attention::backward(h, plan, dq, dkv, do_, o, lse, q, kv, scratch);
    }

    fn activate(&mut self, f: Activation, a: View, up: View, width: usize) {
        let ([a], [up], _) = self.slices([a], [up]);
        activation::forward(f, a, up, width);
    }

    fn activate_backward(&mut self, f: Activation, dup: View, da: View, up: View, width: usize) {
        let ([dup], [da, up], _) = self.slices([dup], [da, up]);
        activation::backward(f, dup, da, up, width);
    }

    fn cross_entropy(
        &mut self,
        logits: View,
        vocab: usize,
        ids: &[u32],
        weights: Option<&[f32]>,
        out: &mut [Outcome],
    ) {
        let ([logits], [], _) = self.slices([logits], []);
        loss::cross_entropy(logits, vocab, ids, weights, out);
    }

    fn sum_squares(&self, x: View) -> f64 {
        optimizer::sum_squares(self.slice(x))
    }

    fn adamw(&mut self, step: AdamW, p: View, g: View, m: View, v: View) {
        let ([p, m, v], [g], _) = self.slices([p, m, v], [g]);
        optimizer::adamw(step, p, g, m, v);
    }
}

/// Work space that tasks borrow and give back, so that a step allocates nothing after the first.
#[derive(Debug, Default)]
struct Scratch(Mutex<Vec<Vec<f32>>>);

impl Scratch {
    /// Calls `f` with `len` floats of unspecified content.
    fn with<R>(&self, len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
        let mut buffer = self.lock().pop().unwrap_or_default();
        if buffer.len() < len {
            buffer.resize(len, 0.0);
        }
        let result = f(&mut buffer[..len]);
        self.lock().push(buffer);
        result
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Vec<f32>>> {
        // A panic elsewhere leaves a list of buffers, which is still a list of buffers.
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// A slice that tasks write at places which the caller has made disjoint.
#[derive(Clone, Copy)]
struct Disjoint<'a> {
    start: *mut f32,
    len: usize,
    life: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: it is a `&mut [f32]` whose users promise, at each `at`, to touch ranges that no other task touches.
unsafe impl Send for Disjoint<'_> {}
// SAFETY: as above.
unsafe impl Sync for Disjoint<'_> {}

impl<'a> Disjoint<'a> {
    fn new(slice: &'a mut [f32]) -> Self {
        Disjoint { start: slice.as_mut_ptr(), len: slice.len(), life: std::marker::PhantomData }
    }

    /// A pointer to `at`, from which `extent` elements may be touched.
    ///
    /// # Safety
    /// Until the pointer is dropped no other task touches the elements that the caller touches through it.
    unsafe fn at(self, at: usize, extent: usize) -> *mut f32 {
        assert!(at <= self.len && extent <= self.len - at);
        // SAFETY: inside the slice, as just checked.
        unsafe { self.start.add(at) }
    }
}
