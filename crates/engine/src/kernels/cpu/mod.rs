//! The fast backend: all cores of one machine, f32.
//!
//! Determinism: work is cut into pieces whose size follows from the shapes alone, each piece is computed by
//! one thread in a fixed order, and partial sums are combined in the order of the pieces. The number of
//! threads changes which one computes a piece, never the bytes of the result.

mod activation;
mod attention;
mod columns;
mod files;
mod loss;
mod matmul;
mod noise;
mod norm;
mod optimizer;
mod rows;
mod simd;

use super::buffers::Memory;
use super::experts::Slots;
use super::shapes::AdamWScalars;
use super::{
    Activation, Adafactor, AdamW, AttentionPlan, AttentionRange, Backend, Buffer, ByteBuffer, Bytes, Draw,
    Dropout, FileBuffer, FileTensor, Heads, IndexBuffer, Indices, Norm, PlanBuffer, Routes, Routing, Sgd,
    TargetLoss, View, check, experts,
};
use crate::collective::Collective;
use crate::{Error, Result};
use files::FileMatrix;
use matmul::{Matrix, Right};
use rayon::prelude::*;
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
    memory: Memory<Vec<f32>>,
    scratch: Scratch,
}

/// The slices of some views: those to write, those to read.
type Slices<'a, const O: usize, const I: usize> = ([&'a mut [f32]; O], [&'a [f32]; I], &'a Scratch);

impl Cpu {
    /// A backend without buffers.
    pub fn new() -> Cpu {
        Cpu::default()
    }

    /// The slices from the first to the last element of some views: those in `outs` to write, those in `ins`
    /// to read. A view without elements has an empty slice.
    ///
    /// # Errors
    /// When a view to write overlaps another one, is of another backend or of freed memory.
    fn slices<const O: usize, const I: usize>(
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
            // SAFETY: inside the buffer. `Vec::as_mut_ptr` makes no reference to the elements, so that the
            // pointers handed out before stay good.
            Ok(unsafe { buffer.as_mut_ptr().add(v.start) })
        };
        let (mut out_starts, mut in_starts) = ([std::ptr::null_mut(); O], [std::ptr::null_mut(); I]);
        for (to, view) in out_starts.iter_mut().zip(outs).chain(in_starts.iter_mut().zip(ins)) {
            *to = start(view)?;
        }
        // SAFETY: `&mut self` is held for the life of the result, so nothing else reaches the buffers. Each
        // range was checked against its buffer just above, no buffer moves while they are borrowed, and a
        // written range overlaps no other range of this call.
        let out = |i: usize| unsafe { std::slice::from_raw_parts_mut(out_starts[i], outs[i].extent()) };
        // SAFETY: as above; ranges that are only read may overlap each other.
        let read = |i: usize| unsafe { std::slice::from_raw_parts(in_starts[i], ins[i].extent()) };
        Ok((std::array::from_fn(out), std::array::from_fn(read), &self.scratch))
    }

    /// The matrix that a view names in a file; `None` where it is in a buffer.
    fn in_file(&self, w: View) -> Result<Option<FileMatrix>> {
        Ok(self.memory.file(w)?.map(|tensor| FileMatrix::of(w, tensor)))
    }

    /// The slice of a contiguous view.
    fn slice(&self, v: View) -> Result<&[f32]> {
        check::element_wise(v)?;
        match v.len() {
            0 => Ok(&[]),
            len => Ok(&self.memory.buffer(v)?[v.start..v.start + len]),
        }
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

/// The view of an absent operand: an empty slice.
fn or_empty(view: Option<View>) -> View {
    view.unwrap_or(View::planned(0, 0))
}

impl Backend for Cpu {
    fn allocate(&mut self, len: usize) -> Result<Buffer> {
        self.memory.collect();
        let spare = LINE / size_of::<f32>();
        let buffer = zeros(len.saturating_add(spare))?;
        let start = buffer.as_ptr().align_offset(LINE).min(spare);
        Ok(self.memory.add_buffer(buffer, start, len))
    }

    fn allocate_bytes(&mut self, len: usize) -> Result<ByteBuffer> {
        self.memory.collect();
        self.memory.add_bytes(len)
    }

    fn write_bytes(&mut self, to: Bytes, from: &[u8]) -> Result<()> {
        check::bytes(to, from.len())?;
        self.memory.bytes_mut(to)?.copy_from_slice(from);
        Ok(())
    }

    fn read_bytes(&self, from: Bytes, to: &mut [u8]) -> Result<()> {
        check::bytes(from, to.len())?;
        to.copy_from_slice(self.memory.bytes(from)?);
        Ok(())
    }

    fn map(&mut self, tensor: FileTensor) -> Result<FileBuffer> {
        Ok(self.memory.add_file(tensor))
    }

    fn allocated(&self) -> u64 {
        self.memory.allocated()
    }

    fn upload_indices(&mut self, values: &[u32]) -> Result<IndexBuffer> {
        Ok(self.memory.add_indices(values))
    }

    fn upload_plan(&mut self, plan: AttentionPlan) -> Result<PlanBuffer> {
        self.memory.add_plan(plan)
    }

    fn sync(&mut self) -> Result<()> {
        self.memory.collect();
        Ok(())
    }

    fn write(&mut self, to: View, from: &[f32]) -> Result<()> {
        check::transfer(to, from.len())?;
        let ([to], [], _) = self.slices([to], [])?;
        to.copy_from_slice(from);
        Ok(())
    }

    fn read(&self, from: View, to: &mut [f32]) -> Result<()> {
        check::transfer(from, to.len())?;
        to.copy_from_slice(self.slice(from)?);
        Ok(())
    }

    fn fill(&mut self, x: View, value: f32) -> Result<()> {
        check::element_wise(x)?;
        let ([x], [], _) = self.slices([x], [])?;
        rows::fill(x, value);
        Ok(())
    }

    fn scale(&mut self, x: View, factor: f32) -> Result<()> {
        check::element_wise(x)?;
        let ([x], [], _) = self.slices([x], [])?;
        rows::scale(x, factor);
        Ok(())
    }

    fn copy(&mut self, y: View, x: View) -> Result<()> {
        check::copy(y, x)?;
        let ([to], [from], _) = self.slices([y], [x])?;
        if y.is_contiguous() && x.is_contiguous() {
            rows::copy(to, from);
        } else {
            rows::copy_strided(to, y.stride(), from, x.stride(), x.width());
        }
        Ok(())
    }

    fn blend(&mut self, y: View, x: View, share: f32) -> Result<()> {
        check::add(y, x)?;
        let ([y], [x], _) = self.slices([y], [x])?;
        rows::blend(y, x, share);
        Ok(())
    }

    fn swap(&mut self, x: View, y: View) -> Result<()> {
        check::add(y, x)?;
        let ([x, y], [], _) = self.slices([x, y], [])?;
        x.swap_with_slice(y);
        Ok(())
    }

    fn add(&mut self, y: View, x: View) -> Result<()> {
        check::add(y, x)?;
        let ([y], [x], _) = self.slices([y], [x])?;
        rows::add(y, x);
        Ok(())
    }

    fn gather(&mut self, y: View, x: View, rows: Indices) -> Result<()> {
        check::gather(y, x, rows)?;
        let (width, rows) = (y.width(), self.memory.indices(rows)?);
        if let Some(table) = self.in_file(x)? {
            let ([y], [], _) = self.slices([y], [])?;
            table.gather(y, &rows, width);
            return Ok(());
        }
        let ([y], [x], _) = self.slices([y], [x])?;
        rows::gather(y, x, &rows, width);
        Ok(())
    }

    fn scatter_add(&mut self, y: View, x: View, rows: Indices) -> Result<()> {
        check::gather(x, y, rows)?;
        let (width, rows) = (y.width(), self.memory.indices(rows)?);
        let ([y], [x], _) = self.slices([y], [x])?;
        rows::scatter_add(y, x, &rows, width);
        Ok(())
    }

    fn norm(&mut self, norm: Norm, y: View, stats: View, x: View, w: View, b: Option<View>) -> Result<()> {
        check::norm(norm, y, stats, x, w, b)?;
        let shape = norm::Groups::of(norm, x, w);
        let ([to, stats], [from, w, b], _) = self.slices([y, stats], [x, w, or_empty(b)])?;
        norm::statistics(shape, stats, from);
        norm::apply(shape, to, y.stride(), stats, from, w, b);
        Ok(())
    }

    fn norm_recompute(
        &mut self,
        norm: Norm,
        y: View,
        stats: View,
        x: View,
        w: View,
        b: Option<View>,
    ) -> Result<()> {
        check::norm(norm, y, stats, x, w, b)?;
        let shape = norm::Groups::of(norm, x, w);
        let ([to], [stats, from, w, b], _) = self.slices([y], [stats, x, w, or_empty(b)])?;
        norm::apply(shape, to, y.stride(), stats, from, w, b);
        Ok(())
    }

    fn norm_backward(
        &mut self,
        norm: Norm,
        dx: View,
        dw: Option<View>,
        db: Option<View>,
        dy: View,
        stats: View,
        x: View,
        w: View,
    ) -> Result<()> {
        check::norm_backward(norm, dx, dw, db, dy, stats, x, w)?;
        let (shape, strides) = (norm::Groups::of(norm, x, w), (dx.stride(), dy.stride()));
        let ([dx, dw, db], [dy, stats, x, w], scratch) =
            self.slices([dx, or_empty(dw), or_empty(db)], [dy, stats, x, w])?;
        norm::backward(shape, dx, dw, db, dy, strides, stats, x, w, scratch);
        Ok(())
    }

    fn linear(&mut self, y: View, accumulate: bool, x: View, w: View, b: Option<View>) -> Result<()> {
        check::linear(y, x, w, b)?;
        let sizes = (y.rows(), y.width(), x.width());
        if let Some(weights) = self.in_file(w)? {
            let ([to], [from, b], scratch) = self.slices([y], [x, or_empty(b)])?;
            let right = Right::File(&weights.t(), scratch);
            matmul::tiled(sizes, to, y.stride(), accumulate, Matrix::of(x, from), right, b);
            return Ok(());
        }
        let ([to], [from, weights, b], _) = self.slices([y], [x, w, or_empty(b)])?;
        let (x, w) = (Matrix::of(x, from), Matrix::of(w, weights).t());
        matmul::tiled(sizes, to, y.stride(), accumulate, x, Right::Buffer(w), b);
        Ok(())
    }

    fn linear_dx(&mut self, dx: View, accumulate: bool, dy: View, w: View) -> Result<()> {
        check::linear(dy, dx, w, None)?;
        let sizes = (dx.rows(), dx.width(), dy.width());
        if let Some(weights) = self.in_file(w)? {
            let ([to], [from], scratch) = self.slices([dx], [dy])?;
            let right = Right::File(&weights, scratch);
            matmul::tiled(sizes, to, dx.stride(), accumulate, Matrix::of(dy, from), right, &[]);
            return Ok(());
        }
        let ([to], [from, weights], _) = self.slices([dx], [dy, w])?;
        let right = Right::Buffer(Matrix::of(w, weights));
        matmul::tiled(sizes, to, dx.stride(), accumulate, Matrix::of(dy, from), right, &[]);
        Ok(())
    }

    fn linear_dw(&mut self, dw: View, accumulate: bool, dy: View, x: View) -> Result<()> {
        check::linear(dy, x, dw, None)?;
        let ([to], [left, right], _) = self.slices([dw], [dy, x])?;
        let sizes = (dw.rows(), dw.width(), x.rows());
        matmul::tiled(
            sizes,
            to,
            dw.stride(),
            accumulate,
            Matrix::of(dy, left).t(),
            Right::Buffer(Matrix::of(x, right)),
            &[],
        );
        Ok(())
    }

    fn row_norms(&mut self, n: View, w: View, b: View, a: View, scale: f32) -> Result<()> {
        check::row_norms(n, w, b, a)?;
        let (inputs, rank) = (w.width(), a.rows());
        let file = self.in_file(w)?;
        let own = if file.is_some() { None } else { Some(w) };
        let ([n], [own, b, a], scratch) = self.slices([n], [or_empty(own), b, a])?;
        let row = |i: usize, to: &mut [f32]| match &file {
            Some(file) => file.row(i, to),
            None => to.copy_from_slice(&own[i * inputs..][..inputs]),
        };
        columns::row_norms(n, row, (b, a, scale), inputs, rank, scratch);
        Ok(())
    }

    fn divide(&mut self, y: View, a: View, b: View) -> Result<()> {
        check::divide(y, a, b)?;
        let ([y], [a, b], _) = self.slices([y], [a, b])?;
        y.iter_mut().zip(a).zip(b).for_each(|((y, a), b)| *y = a / b);
        Ok(())
    }

    fn scale_columns(
        &mut self,
        y: View,
        accumulate: bool,
        x: View,
        factors: View,
        bias: Option<View>,
    ) -> Result<()> {
        check::scale_columns(y, x, factors, bias)?;
        let strides = (y.stride(), x.stride());
        let ([y], [x, factors, bias], _) = self.slices([y], [x, factors, or_empty(bias)])?;
        columns::scale(y, accumulate, x, strides, factors, bias);
        Ok(())
    }

    fn column_dots(&mut self, out: View, accumulate: bool, a: View, b: View, divisors: View) -> Result<()> {
        check::column_dots(out, a, b, divisors)?;
        let strides = (a.stride(), b.stride());
        let ([out], [a, b, divisors], _) = self.slices([out], [a, b, divisors])?;
        columns::dots(out, accumulate, a, b, strides, divisors);
        Ok(())
    }

    fn linear_db(&mut self, db: View, accumulate: bool, dy: View) -> Result<()> {
        check::sum_rows(db, dy)?;
        let stride = dy.stride();
        let ([db], [dy], _) = self.slices([db], [dy])?;
        matmul::sum_rows(db, accumulate, dy, stride);
        Ok(())
    }

    fn rotate(
        &mut self,
        x: View,
        head_dim: usize,
        table: View,
        positions: Indices,
        inverse: bool,
    ) -> Result<()> {
        check::rotate(x, head_dim, table, positions)?;
        let positions = self.memory.indices(positions)?;
        let (shape, rotated) = ((x.width(), x.stride()), table.width());
        let ([x], [table], _) = self.slices([x], [table])?;
        rows::rotate(x, shape, head_dim, table, rotated, &positions, inverse);
        Ok(())
    }

    fn dropout(&mut self, x: View, dropout: Dropout) -> Result<()> {
        check::dropout(x, dropout)?;
        let width = x.width();
        let ([x], [], _) = self.slices([x], [])?;
        noise::dropout(x, width, dropout);
        Ok(())
    }

    fn add_noise(&mut self, x: View, sizes: View, draw: Draw) -> Result<()> {
        check::each_row(x, sizes)?;
        let width = x.width();
        let ([x], [sizes], _) = self.slices([x], [sizes])?;
        noise::add_noise(x, sizes, width, draw);
        Ok(())
    }

    fn attention(
        &mut self,
        h: Heads,
        plan: &PlanBuffer,
        dropout: Option<Dropout>,
        o: View,
        lse: View,
        q: View,
        kv: View,
    ) -> Result<()> {
        check::attention(h, plan, dropout, o, lse, q, kv)?;
        let plan = self.memory.plan(plan)?;
        let ([o, lse], [q, kv], scratch) = self.slices([o, lse], [q, kv])?;
        attention::forward(h, &plan, dropout, o, lse, q, kv, scratch);
        Ok(())
    }

    fn attention_backward(
        &mut self,
        h: Heads,
        plan: &PlanBuffer,
        dropout: Option<Dropout>,
        dq: View,
        dkv: View,
        do_: View,
        o: View,
        lse: View,
        q: View,
        kv: View,
    ) -> Result<()> {
        check::attention(h, plan, dropout, o, lse, q, kv)?;
        check::attention(h, plan, dropout, do_, lse, dq, dkv)?;
        let plan = self.memory.plan(plan)?;
        let ([dq, dkv], [do_, o, lse, q, kv], scratch) = self.slices([dq, dkv], [do_, o, lse, q, kv])?;
        attention::backward(h, &plan, dropout, dq, dkv, do_, o, lse, q, kv, scratch);
        Ok(())
    }

    fn activate(&mut self, f: Activation, a: View, up: View) -> Result<()> {
        check::activate(f, a, up)?;
        let width = a.width();
        let ([a], [up], _) = self.slices([a], [up])?;
        activation::forward(f, a, up, width);
        Ok(())
    }

    fn activate_backward(&mut self, f: Activation, dup: View, da: View, up: View) -> Result<()> {
        check::activate(f, da, up)?;
        check::activate(f, da, dup)?;
        let width = da.width();
        let ([dup], [da, up], _) = self.slices([dup], [da, up])?;
        activation::backward(f, dup, da, up, width);
        Ok(())
    }

    fn scale_rows(&mut self, x: View, factors: View) -> Result<()> {
        check::each_row(x, factors)?;
        let width = x.width();
        let ([x], [factors], _) = self.slices([x], [factors])?;
        rows::scale_rows(x, factors, width);
        Ok(())
    }

    fn row_dots(&mut self, out: View, a: View, b: View) -> Result<()> {
        check::row_dots(out, a, b)?;
        let width = a.width();
        let ([out], [a, b], _) = self.slices([out], [a, b])?;
        rows::dots(out, a, b, width);
        Ok(())
    }

    fn route(&mut self, r: Routing, probabilities: View, weights: View) -> Result<Routes> {
        check::route(r, probabilities, weights)?;
        let experts = probabilities.width();
        let ([x, weights], [], _) = self.slices([probabilities, weights], [])?;
        let taken: Vec<_> = x
            .par_chunks_mut(experts)
            .with_min_len(ROWS)
            .map(|row| {
                let mut wide: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
                let taken = r.choose(&mut wide);
                row.iter_mut().zip(wide).for_each(|(x, p)| *x = p as f32);
                taken
            })
            .collect();
        let slots = Slots::of(experts, &taken);
        weights.iter_mut().zip(&slots.weights).for_each(|(to, weight)| *to = *weight as f32);
        let (rows, offsets) = (self.memory.add_indices(&slots.rows), self.memory.add_indices(&slots.offsets));
        Ok(Routes { rows, offsets })
    }

    fn route_backward(
        &mut self,
        r: Routing,
        d_logits: View,
        probabilities: View,
        d_weights: View,
        routes: &Routes,
    ) -> Result<()> {
        check::route_backward(r, d_logits, probabilities, d_weights, routes)?;
        let experts = probabilities.width();
        let (rows, offsets) = (self.memory.indices(routes.rows())?, self.memory.indices(routes.offsets())?);
        let taken = experts::taken(&rows, &offsets, probabilities.rows())?;
        let ([d], [p, d_weights], _) = self.slices([d_logits], [probabilities, d_weights])?;
        let work = d.par_chunks_mut(experts).zip(p.par_chunks(experts)).zip(&taken).with_min_len(ROWS);
        work.for_each(|((d, p), slots)| {
            let p: Vec<f64> = p.iter().map(|p| f64::from(*p)).collect();
            let mut wide = vec![0.0; experts];
            slots.iter().for_each(|(expert, slot)| wide[*expert] = f64::from(d_weights[*slot]));
            let experts_of_row: Vec<usize> = slots.iter().map(|(expert, _)| *expert).collect();
            r.choose_backward(&p, &experts_of_row, &mut wide);
            d.iter_mut().zip(wide).for_each(|(to, d)| *to = d as f32);
        });
        Ok(())
    }

    fn grouped_linear(&mut self, y: View, x: View, w: &[View], offsets: Indices) -> Result<()> {
        let offsets = self.memory.indices(offsets)?;
        experts::linear(self, &offsets, y, x, w)
    }

    fn grouped_linear_dx(&mut self, dx: View, dy: View, w: &[View], offsets: Indices) -> Result<()> {
        let offsets = self.memory.indices(offsets)?;
        experts::linear_dx(self, &offsets, dx, dy, w)
    }

    fn grouped_linear_dw(
        &mut self,
        dw: View,
        first: usize,
        accumulate: bool,
        dy: View,
        x: View,
        offsets: Indices,
    ) -> Result<()> {
        let offsets = self.memory.indices(offsets)?;
        experts::linear_dw(self, &offsets, dw, first, accumulate, dy, x)
    }

    fn cross_entropy(
        &mut self,
        losses: View,
        logits: View,
        ids: Indices,
        weights: Option<View>,
        softcap: Option<f32>,
        smoothing: f32,
    ) -> Result<()> {
        check::cross_entropy(losses, logits, ids, weights, smoothing)?;
        let (vocab, ids) = (logits.width(), self.memory.indices(ids)?);
        let weighted = weights.is_some();
        let ([losses, logits], [weights], _) = self.slices([losses, logits], [or_empty(weights)])?;
        let weights = weighted.then_some(weights);
        loss::cross_entropy(losses, logits, vocab, &ids, weights, softcap, smoothing);
        Ok(())
    }

    fn sum_squares(&self, x: View) -> Result<f64> {
        Ok(optimizer::sum_squares(self.slice(x)?))
    }

    fn adamw(&mut self, step: AdamW, p: View, g: View, m: View, v: View) -> Result<()> {
        check::adamw(p, g, m, v)?;
        let ([p, m, v], [g], _) = self.slices([p, m, v], [g])?;
        optimizer::adamw(step, p, g, m, v);
        Ok(())
    }

    fn adamw_8bit(
        &mut self,
        step: AdamW,
        p: View,
        g: View,
        codes: [Bytes; 2],
        scales: [View; 2],
    ) -> Result<()> {
        check::adamw_8bit(p, g, codes, scales)?;
        check::apart(&[p, scales[0], scales[1]], &[g])?;
        // Both are good: taken out, so that the slices can borrow the memory, and put back.
        codes.iter().try_for_each(|codes| self.memory.bytes(*codes).map(drop))?;
        let (mut m, mut v) = (self.memory.take_bytes(codes[0])?, self.memory.take_bytes(codes[1])?);
        let done = self.slices([p, scales[0], scales[1]], [g]).map(|([p, m_scales, v_scales], [g], _)| {
            let (m, v) = (&mut m[codes[0].range()], &mut v[codes[1].range()]);
            optimizer::adamw_8bit(step, p, g, (m, m_scales), (v, v_scales));
        });
        self.memory.put_bytes(codes[0], m);
        self.memory.put_bytes(codes[1], v);
        done
    }

    fn adafactor(
        &mut self,
        step: Adafactor,
        p: View,
        g: View,
        rows: View,
        columns: Option<View>,
    ) -> Result<()> {
        check::adafactor(p, g, rows, columns)?;
        let width = p.width();
        let factored = columns.is_some();
        let ([p, rows, columns], [g], _) = self.slices([p, rows, or_empty(columns)], [g])?;
        match factored {
            true => optimizer::adafactor_matrix(step, p, g, rows, columns, width),
            false => optimizer::adafactor_vector(step, p, g, rows),
        }
        Ok(())
    }

    fn sgd(&mut self, step: Sgd, p: View, g: View, m: Option<View>) -> Result<()> {
        check::sgd(p, g, m)?;
        let has_momentum = m.is_some();
        let ([p, m], [g], _) = self.slices([p, or_empty(m)], [g])?;
        optimizer::sgd(step, p, g, has_momentum.then_some(m));
        Ok(())
    }

    fn all_reduce(&mut self, x: View, collective: &dyn Collective) -> Result<()> {
        check::element_wise(x)?;
        let ([x], [], _) = self.slices([x], [])?;
        collective.all_reduce(x)
    }

    fn reduce_scatter(&mut self, x: View, cuts: &[usize], collective: &dyn Collective) -> Result<()> {
        check::shares(x, cuts, collective.ranks())?;
        let ([x], [], _) = self.slices([x], [])?;
        collective.reduce_scatter(x, cuts)
    }

    fn all_gather(&mut self, x: View, cuts: &[usize], collective: &dyn Collective) -> Result<()> {
        check::shares(x, cuts, collective.ranks())?;
        let ([x], [], _) = self.slices([x], [])?;
        collective.all_gather(x, cuts)
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
