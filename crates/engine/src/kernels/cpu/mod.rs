//! The fast backend: all cores of one machine, f32.
//!
//! Determinism: work is cut into pieces whose size depends on the shapes alone, each piece is computed by one thread in
//! a fixed order, and partial sums are combined in the order of the pieces. The number of threads determines which
//! thread computes a piece, never the bytes of the result.

mod activation;
mod attention;
mod columns;
mod files;
mod loss;
mod matmul;
mod memory;
mod noise;
mod norm;
mod optimizer;
mod rows;
mod simd;

use super::check::{self, or_none};
use super::experts::{self, Slots};
use super::host::host_methods;
use super::shapes::AdamWScalars;
use super::{
    Activation, Adafactor, AdamW, Attention, AttentionPlan, AttentionRange, Backend, Buffer, ByteBuffer,
    Bytes, Draw, Dropout, FileBuffer, FileTensor, Heads, IndexBuffer, Indices, Norm, PlanBuffer, Routes,
    Routing, Sgd, TargetLoss, View,
};
use crate::Result;
use crate::collective::Collective;
use matmul::{Matrix, Right};
pub use memory::Cpu;
use memory::{Disjoint, Scratch, zeros};
use rayon::prelude::*;

/// Elements per piece of an element-wise operation: large enough to hide a task's overhead (a few µs), small enough to
/// balance the load.
const PIECE: usize = 1 << 16;

/// Rows per piece of a row-wise operation.
const ROWS: usize = 64;

/// Bytes of a cache line; buffers start on one.
const LINE: usize = 64;

impl Backend for Cpu {
    fn allocate(&mut self, len: usize) -> Result<Buffer> {
        self.memory.collect();
        let spare = LINE / size_of::<f32>();
        let buffer = zeros(len.saturating_add(spare))?;
        let start = buffer.as_ptr().align_offset(LINE).min(spare);
        Ok(self.memory.add_buffer(buffer, start, len))
    }

    host_methods!();

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
        check::scatter_add(y, x, rows)?;
        let (width, rows) = (y.width(), self.memory.indices(rows)?);
        let ([y], [x], _) = self.slices([y], [x])?;
        rows::scatter_add(y, x, &rows, width);
        Ok(())
    }

    fn norm(&mut self, norm: Norm, y: View, stats: View, x: View, w: View, b: Option<View>) -> Result<()> {
        check::norm(norm, y, stats, x, w, b)?;
        let shape = norm::Groups::of(norm, x, w);
        let ([to, stats], [from, w, b], _) = self.slices([y, stats], [x, w, or_none(b)])?;
        norm::statistics(shape, stats, from);
        norm::apply(shape, to, y.stride(), stats, from, w, b);
        Ok(())
    }

    fn norm_again(&mut self, n: Norm, y: View, stats: View, x: View, w: View, b: Option<View>) -> Result<()> {
        check::norm_again(n, y, stats, x, w, b)?;
        let shape = norm::Groups::of(n, x, w);
        let ([to], [stats, from, w, b], _) = self.slices([y], [stats, x, w, or_none(b)])?;
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
        check::norm_backward(norm, dx, [dw, db], [dy, stats, x, w])?;
        let (shape, strides) = (norm::Groups::of(norm, x, w), (dx.stride(), dy.stride()));
        let ([dx, dw, db], [dy, stats, x, w], scratch) =
            self.slices([dx, or_none(dw), or_none(db)], [dy, stats, x, w])?;
        norm::backward(shape, dx, dw, db, dy, strides, stats, x, w, scratch);
        Ok(())
    }

    fn linear(&mut self, y: View, accumulate: bool, x: View, w: View, b: Option<View>) -> Result<()> {
        check::linear(y, x, w, b)?;
        let sizes = (y.rows(), y.width(), x.width());
        if let Some(weights) = self.in_file(w)? {
            let ([to], [from, b], scratch) = self.slices([y], [x, or_none(b)])?;
            let right = Right::File(&weights.t(), scratch);
            matmul::tiled(sizes, to, y.stride(), accumulate, Matrix::of(x, from), right, b);
            return Ok(());
        }
        let ([to], [from, weights, b], _) = self.slices([y], [x, w, or_none(b)])?;
        let (x, w) = (Matrix::of(x, from), Matrix::of(w, weights).t());
        matmul::tiled(sizes, to, y.stride(), accumulate, x, Right::Buffer(w), b);
        Ok(())
    }

    fn linear_dx(&mut self, dx: View, accumulate: bool, dy: View, w: View) -> Result<()> {
        check::linear_dx(dx, dy, w)?;
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
        check::linear_dw(dw, dy, x)?;
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
        let ([n], [own, b, a], scratch) = self.slices([n], [or_none(own), b, a])?;
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
        let ([y], [x, factors, bias], _) = self.slices([y], [x, factors, or_none(bias)])?;
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
        check::linear_db(db, dy)?;
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
        check::scale_rows(x, sizes)?;
        let width = x.width();
        let ([x], [sizes], _) = self.slices([x], [sizes])?;
        noise::add_noise(x, sizes, width, draw);
        Ok(())
    }

    fn attention(&mut self, a: Attention, o: View, lse: View, q: View, kv: View) -> Result<()> {
        check::attention(a, o, lse, q, kv)?;
        let plan = self.memory.plan(a.plan)?;
        let ([o, lse], [q, kv], scratch) = self.slices([o, lse], [q, kv])?;
        attention::forward(a.heads, &plan, a.dropout, o, lse, q, kv, scratch);
        Ok(())
    }

    fn attention_backward(
        &mut self,
        a: Attention,
        dq: View,
        dkv: View,
        d_o: View,
        o: View,
        lse: View,
        q: View,
        kv: View,
    ) -> Result<()> {
        check::attention_backward(a, [dq, dkv], [d_o, o, lse, q, kv])?;
        let plan = self.memory.plan(a.plan)?;
        let ([dq, dkv], [d_o, o, lse, q, kv], scratch) = self.slices([dq, dkv], [d_o, o, lse, q, kv])?;
        attention::backward(a.heads, &plan, a.dropout, dq, dkv, d_o, o, lse, q, kv, scratch);
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
        check::activate_backward(f, dup, da, up)?;
        let width = da.width();
        let ([dup], [da, up], _) = self.slices([dup], [da, up])?;
        activation::backward(f, dup, da, up, width);
        Ok(())
    }

    fn scale_rows(&mut self, x: View, factors: View) -> Result<()> {
        check::scale_rows(x, factors)?;
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
        Ok(slots.keep(&mut self.memory))
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
            let wide = r.choose_backward(&p, slots, |slot| f64::from(d_weights[slot]));
            d.iter_mut().zip(wide).for_each(|(to, d)| *to = d as f32);
        });
        Ok(())
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
        let ([losses, logits], [weights], _) = self.slices([losses, logits], [or_none(weights)])?;
        let weights = weighted.then_some(weights);
        loss::cross_entropy(losses, logits, vocab, &ids, weights, softcap, smoothing);
        Ok(())
    }

    fn sum_squares(&self, x: View) -> Result<f64> {
        Ok(optimizer::sum_squares(self.slice(x)?))
    }

    fn adamw(&mut self, s: AdamW, p: View, g: View, m: View, v: View) -> Result<()> {
        check::adamw(p, g, m, v)?;
        let ([p, m, v], [g], _) = self.slices([p, m, v], [g])?;
        optimizer::adamw(s, p, g, m, v);
        Ok(())
    }

    fn adamw_8bit(&mut self, s: AdamW, p: View, g: View, codes: [Bytes; 2], scales: [View; 2]) -> Result<()> {
        check::adamw_8bit(p, g, codes, scales)?;
        // Both are checked before either is taken out, so that an error loses neither. They are taken out so that the
        // slices can borrow the memory, and put back afterwards.
        codes.iter().try_for_each(|codes| self.memory.bytes(*codes).map(drop))?;
        let (mut m, mut v) = (self.memory.take_bytes(codes[0])?, self.memory.take_bytes(codes[1])?);
        let done = self.slices([p, scales[0], scales[1]], [g]).map(|([p, m_scales, v_scales], [g], _)| {
            let (m, v) = (&mut m[codes[0].range()], &mut v[codes[1].range()]);
            optimizer::adamw_8bit(s, p, g, (m, m_scales), (v, v_scales));
        });
        self.memory.put_bytes(codes[0], m);
        self.memory.put_bytes(codes[1], v);
        done
    }

    fn adafactor(&mut self, s: Adafactor, p: View, g: View, rows: View, columns: Option<View>) -> Result<()> {
        check::adafactor(p, g, rows, columns)?;
        let width = p.width();
        let factored = columns.is_some();
        let ([p, rows, columns], [g], _) = self.slices([p, rows, or_none(columns)], [g])?;
        match factored {
            true => optimizer::adafactor_matrix(s, p, g, rows, columns, width),
            false => optimizer::adafactor_vector(s, p, g, rows),
        }
        Ok(())
    }

    fn sgd(&mut self, s: Sgd, p: View, g: View, m: Option<View>) -> Result<()> {
        check::sgd(p, g, m)?;
        let has_momentum = m.is_some();
        let ([p, m], [g], _) = self.slices([p, or_none(m)], [g])?;
        optimizer::sgd(s, p, g, has_momentum.then_some(m));
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
