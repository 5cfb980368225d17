//! The reference backend: every operation as a plain loop, in f64.
//!
//! Storage is `f32` (as the reference for the fast backends) or `f64` (for central differences); arithmetic is f64
//! either way. It is not optimised: read it to learn what an operation computes.

#![forbid(unsafe_code)]

mod attention;
mod functions;
mod optimizer;

use super::buffers::Memory;
use super::experts::{self, Slots};
use super::host::host_methods;
use super::stored::Elements;
use super::{
    Activation, Adafactor, AdamW, Attention, AttentionPlan, Backend, Buffer, ByteBuffer, Bytes, Draw,
    Dropout, FileBuffer, FileTensor, IndexBuffer, Indices, Norm, PlanBuffer, Routes, Routing, Sgd, View,
    check, random,
};
use crate::collective::Collective;
use crate::{Error, Result};
use functions::{capped, factor, gate};

/// The storage type of a [`Reference`] backend.
pub trait Scalar: Copy + Default {
    /// From f64, the type of all arithmetic.
    fn from_f64(x: f64) -> Self;
    /// To f64, the type of all arithmetic.
    fn to_f64(self) -> f64;
}

impl Scalar for f32 {
    fn from_f64(x: f64) -> f32 {
        x as f32
    }
    fn to_f64(self) -> f64 {
        self as f64
    }
}

impl Scalar for f64 {
    fn from_f64(x: f64) -> f64 {
        x
    }
    fn to_f64(self) -> f64 {
        self
    }
}

/// Plain loops over host memory.
#[derive(Debug, Default)]
pub struct Reference<S: Scalar = f32> {
    memory: Memory<Vec<S>>,
}

impl<S: Scalar> Reference<S> {
    /// A backend without buffers.
    pub fn new() -> Self {
        Reference { memory: Memory::default() }
    }

    /// The values in full precision (the trait's `read` rounds to f32), row by row without gaps.
    ///
    /// # Errors
    /// [`Error::Operands`] for a view of another backend or of freed memory.
    pub fn get(&self, x: View) -> Result<Vec<f64>> {
        if let Some(tensor) = self.memory.file(x)? {
            return Ok(match tensor.elements() {
                Elements::Plain(bytes, kind) => {
                    (0..x.len()).map(|i| kind.element(bytes, place(x, i))).collect()
                }
                Elements::Packed(packed) => {
                    let mut values = vec![0.0; x.extent()];
                    packed.run(x.start, &mut values);
                    (0..x.len()).map(|i| f64::from(values[place(x, i) - x.start])).collect()
                }
            });
        }
        let buffer = self.memory.buffer(x)?;
        Ok((0..x.len()).map(|i| buffer[place(x, i)].to_f64()).collect())
    }

    /// Writes values in full precision.
    ///
    /// # Errors
    /// As [`Reference::get`], and if the lengths differ.
    pub fn set(&mut self, x: View, values: &[f64]) -> Result<()> {
        if x.len() != values.len() {
            let message = format!("{} values for a view of {}", values.len(), x.len());
            return Err(Error::Operands { operation: "set", message });
        }
        self.update(x, |i, _| values[i])
    }

    /// Replaces the values by `f(index, old)`.
    fn update(&mut self, x: View, mut f: impl FnMut(usize, f64) -> f64) -> Result<()> {
        let buffer = self.memory.buffer_mut(x)?;
        for i in 0..x.len() {
            let cell = &mut buffer[place(x, i)];
            *cell = S::from_f64(f(i, cell.to_f64()));
        }
        Ok(())
    }

    fn get_optional(&self, x: Option<View>) -> Result<Option<Vec<f64>>> {
        x.map(|x| self.get(x)).transpose()
    }
}

/// The index of element `i` of a view in its buffer.
fn place(x: View, i: usize) -> usize {
    x.start + i / x.width() * x.stride() + i % x.width() * x.column()
}

/// `c[m, n] = a(i, p) · b(p, j)` summed over `p < k`.
fn matmul(
    m: usize,
    n: usize,
    k: usize,
    a: impl Fn(usize, usize) -> f64,
    b: impl Fn(usize, usize) -> f64,
) -> Vec<f64> {
    let mut c = vec![0.0; m * n];
    for i in 0..m {
        for j in 0..n {
            c[i * n + j] = (0..k).map(|p| a(i, p) * b(p, j)).sum();
        }
    }
    c
}

impl<S: Scalar> Backend for Reference<S> {
    fn allocate(&mut self, len: usize) -> Result<Buffer> {
        let failed = |_| Error::Memory { bytes: (len as u64).saturating_mul(size_of::<S>() as u64) };
        self.memory.collect();
        let mut values = Vec::new();
        values.try_reserve_exact(len).map_err(failed)?;
        values.resize(len, S::default());
        Ok(self.memory.add_buffer(values, 0, len))
    }

    host_methods!();

    fn write(&mut self, to: View, from: &[f32]) -> Result<()> {
        check::transfer(to, from.len())?;
        self.update(to, |i, _| from[i] as f64)
    }

    fn read(&self, from: View, to: &mut [f32]) -> Result<()> {
        check::transfer(from, to.len())?;
        for (to, from) in to.iter_mut().zip(self.get(from)?) {
            *to = from as f32;
        }
        Ok(())
    }

    fn fill(&mut self, x: View, value: f32) -> Result<()> {
        check::element_wise(x)?;
        self.update(x, |_, _| value as f64)
    }

    fn scale(&mut self, x: View, factor: f32) -> Result<()> {
        check::element_wise(x)?;
        self.update(x, |_, x| factor as f64 * x)
    }

    fn copy(&mut self, y: View, x: View) -> Result<()> {
        check::copy(y, x)?;
        let x = self.get(x)?;
        self.update(y, |i, _| x[i])
    }

    fn blend(&mut self, y: View, x: View, share: f32) -> Result<()> {
        check::add(y, x)?;
        let x = self.get(x)?;
        self.update(y, |i, y| y + f64::from(share) * (x[i] - y))
    }

    fn swap(&mut self, x: View, y: View) -> Result<()> {
        check::add(y, x)?;
        let (old_x, old_y) = (self.get(x)?, self.get(y)?);
        self.update(x, |i, _| old_y[i])?;
        self.update(y, |i, _| old_x[i])
    }

    fn add(&mut self, y: View, x: View) -> Result<()> {
        check::add(y, x)?;
        let x = self.get(x)?;
        self.update(y, |i, y| y + x[i])
    }

    fn gather(&mut self, y: View, x: View, rows: Indices) -> Result<()> {
        check::gather(y, x, rows)?;
        let (x, rows, width) = (self.get(x)?, self.memory.indices(rows)?, y.width());
        self.update(y, |i, _| x[rows[i / width] as usize * width + i % width])
    }

    fn scatter_add(&mut self, y: View, x: View, rows: Indices) -> Result<()> {
        check::scatter_add(y, x, rows)?;
        let (values, rows) = (self.get(x)?, self.memory.indices(rows)?);
        for (i, &row) in rows.iter().enumerate() {
            let row = row as usize;
            self.update(y.row_range(row..row + 1), |j, y| y + values[i * x.width() + j])?;
        }
        Ok(())
    }

    fn norm(&mut self, norm: Norm, y: View, stats: View, x: View, w: View, b: Option<View>) -> Result<()> {
        check::norm(norm, y, stats, x, w, b)?;
        let (xs, width) = (self.get(x)?, w.len());
        let mut s = Vec::new();
        for row in xs.chunks(width) {
            let n = width as f64;
            match norm {
                Norm::Rms { eps, .. } => {
                    s.push(1.0 / (row.iter().map(|x| x * x).sum::<f64>() / n + eps as f64).sqrt());
                }
                Norm::Layer { eps } => {
                    let mean = row.iter().sum::<f64>() / n;
                    let var = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
                    s.extend([mean, 1.0 / (var + eps as f64).sqrt()]);
                }
            }
        }
        self.set(stats, &s)?;
        self.norm_again(norm, y, stats, x, w, b)
    }

    fn norm_again(&mut self, n: Norm, y: View, stats: View, x: View, w: View, b: Option<View>) -> Result<()> {
        check::norm_again(n, y, stats, x, w, b)?;
        let (s, x, w, b) = (self.get(stats)?, self.get(x)?, self.get(w)?, self.get_optional(b)?);
        let width = w.len();
        self.update(y, |i, _| {
            let (r, j) = (i / width, i % width);
            let hat = match n {
                Norm::Rms { .. } => x[i] * s[r],
                Norm::Layer { .. } => (x[i] - s[2 * r]) * s[2 * r + 1],
            };
            hat * (w[j] + n.offset() as f64) + b.as_ref().map_or(0.0, |b| b[j])
        })
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
        let (s, x, w, dy) = (self.get(stats)?, self.get(x)?, self.get(w)?, self.get(dy)?);
        let width = w.len();
        let (mut gx, mut gw, mut gb) = (vec![0.0; x.len()], vec![0.0; width], vec![0.0; width]);
        for r in 0..x.len() / width {
            let row = r * width..(r + 1) * width;
            let (x, dy, gx) = (&x[row.clone()], &dy[row.clone()], &mut gx[row]);
            let (mean, inv) = match norm {
                Norm::Rms { .. } => (0.0, s[r]),
                Norm::Layer { .. } => (s[2 * r], s[2 * r + 1]),
            };
            let hat = |j: usize| (x[j] - mean) * inv;
            let n = width as f64;
            let g = |j: usize| dy[j] * (w[j] + norm.offset() as f64);
            let along = (0..width).map(|j| g(j) * hat(j)).sum::<f64>() / n;
            let level = match norm {
                Norm::Rms { .. } => 0.0,
                Norm::Layer { .. } => (0..width).map(g).sum::<f64>() / n,
            };
            for j in 0..width {
                gx[j] = inv * (g(j) - level - hat(j) * along);
                gw[j] += dy[j] * hat(j);
                gb[j] += dy[j];
            }
        }
        self.update(dx, |i, old| old + gx[i])?;
        dw.map_or(Ok(()), |dw| self.update(dw, |i, old| old + gw[i]))?;
        db.map_or(Ok(()), |db| self.update(db, |i, old| old + gb[i]))
    }

    fn linear(&mut self, y: View, accumulate: bool, x: View, w: View, b: Option<View>) -> Result<()> {
        check::linear(y, x, w, b)?;
        let (rows, k, n) = (x.rows(), x.width(), y.width());
        let (x, w, b) = (self.get(x)?, self.get(w)?, self.get_optional(b)?);
        let c = matmul(rows, n, k, |i, p| x[i * k + p], |p, j| w[j * k + p]);
        self.update(y, |i, old| {
            c[i] + b.as_ref().map_or(0.0, |b| b[i % n]) + if accumulate { old } else { 0.0 }
        })
    }

    fn linear_dx(&mut self, dx: View, accumulate: bool, dy: View, w: View) -> Result<()> {
        check::linear_dx(dx, dy, w)?;
        let (rows, k, n) = (dx.rows(), dx.width(), dy.width());
        let (dy, w) = (self.get(dy)?, self.get(w)?);
        let c = matmul(rows, k, n, |i, p| dy[i * n + p], |p, j| w[p * k + j]);
        self.update(dx, |i, old| c[i] + if accumulate { old } else { 0.0 })
    }

    fn linear_dw(&mut self, dw: View, accumulate: bool, dy: View, x: View) -> Result<()> {
        check::linear_dw(dw, dy, x)?;
        let (rows, k, n) = (x.rows(), x.width(), dy.width());
        let (dy, x) = (self.get(dy)?, self.get(x)?);
        let c = matmul(n, k, rows, |i, p| dy[p * n + i], |p, j| x[p * k + j]);
        self.update(dw, |i, old| c[i] + if accumulate { old } else { 0.0 })
    }

    fn linear_db(&mut self, db: View, accumulate: bool, dy: View) -> Result<()> {
        check::linear_db(db, dy)?;
        let (rows, n, dy) = (dy.rows(), dy.width(), self.get(dy)?);
        self.update(db, |j, old| {
            (0..rows).map(|r| dy[r * n + j]).sum::<f64>() + if accumulate { old } else { 0.0 }
        })
    }

    fn row_norms(&mut self, n: View, w: View, b: View, a: View, scale: f32) -> Result<()> {
        check::row_norms(n, w, b, a)?;
        let (inputs, rank) = (w.width(), a.rows());
        let (w, b, a) = (self.get(w)?, self.get(b)?, self.get(a)?);
        let moved = |i: usize, j: usize| {
            let low: f64 = (0..rank).map(|r| b[i * rank + r] * a[r * inputs + j]).sum();
            w[i * inputs + j] + f64::from(scale) * low
        };
        self.update(n, |i, _| (0..inputs).map(|j| moved(i, j).powi(2)).sum::<f64>().sqrt())
    }

    fn divide(&mut self, y: View, a: View, b: View) -> Result<()> {
        check::divide(y, a, b)?;
        let (a, b) = (self.get(a)?, self.get(b)?);
        self.update(y, |i, _| a[i] / b[i])
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
        let width = x.width();
        let (x, factors, bias) = (self.get(x)?, self.get(factors)?, self.get_optional(bias)?);
        self.update(y, |i, old| {
            let bias = bias.as_ref().map_or(0.0, |bias| bias[i % width]);
            factors[i % width] * x[i] + bias + if accumulate { old } else { 0.0 }
        })
    }

    fn column_dots(&mut self, out: View, accumulate: bool, a: View, b: View, divisors: View) -> Result<()> {
        check::column_dots(out, a, b, divisors)?;
        let (rows, width) = (a.rows(), a.width());
        let (a, b, divisors) = (self.get(a)?, self.get(b)?, self.get(divisors)?);
        self.update(out, |j, old| {
            let sum: f64 = (0..rows).map(|i| a[i * width + j] * b[i * width + j]).sum();
            sum / divisors[j] + if accumulate { old } else { 0.0 }
        })
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
        let rotated = table.width();
        let (table, half, positions) = (self.get(table)?, rotated / 2, self.memory.indices(positions)?);
        for (r, &p) in positions.iter().enumerate() {
            let angles = &table[p as usize * rotated..][..rotated];
            for start in (0..x.width()).step_by(head_dim) {
                let front = x.row_range(r..r + 1).columns(start..start + rotated);
                let old = self.get(front)?;
                self.update(front, |i, _| {
                    let f = i % half;
                    let (cos, sin) = (angles[f], angles[half + f] * if inverse { -1.0 } else { 1.0 });
                    if i < half {
                        old[f] * cos - old[f + half] * sin
                    } else {
                        old[f + half] * cos + old[f] * sin
                    }
                })?;
            }
        }
        Ok(())
    }

    fn dropout(&mut self, x: View, dropout: Dropout) -> Result<()> {
        check::dropout(x, dropout)?;
        let width = x.width();
        self.update(x, |i, x| x * factor(Some(dropout), i / width, i % width))
    }

    fn add_noise(&mut self, x: View, sizes: View, draw: Draw) -> Result<()> {
        check::scale_rows(x, sizes)?;
        let (sizes, width) = (self.get(sizes)?, x.width());
        self.update(x, |i, x| {
            let word = draw.word((i / width) as u64, i % width);
            x + sizes[i / width] * f64::from(random::symmetric(word))
        })
    }

    fn attention(&mut self, a: Attention, o: View, lse: View, q: View, kv: View) -> Result<()> {
        check::attention(a, o, lse, q, kv)?;
        let plan = self.memory.plan(a.plan)?;
        let (out, sums) = attention::forward(a, &plan, &self.get(q)?, &self.get(kv)?);
        self.set(o, &out)?;
        self.set(lse, &sums)
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
        let (d_o, o, lse) = (self.get(d_o)?, self.get(o)?, self.get(lse)?);
        let (gq, gkv) = attention::backward(a, &plan, &d_o, &o, &lse, &self.get(q)?, &self.get(kv)?);
        self.set(dq, &gq)?;
        self.set(dkv, &gkv)
    }

    fn activate(&mut self, f: Activation, a: View, up: View) -> Result<()> {
        check::activate(f, a, up)?;
        let (width, up) = (a.width(), self.get(up)?);
        self.update(a, |i, _| match f.gate_width() {
            2 => {
                let (x, up) =
                    (up[i / width * 2 * width + i % width], up[(i / width * 2 + 1) * width + i % width]);
                gate(f, x).0 * up
            }
            _ => gate(f, up[i]).0,
        })
    }

    fn activate_backward(&mut self, f: Activation, dup: View, da: View, up: View) -> Result<()> {
        check::activate_backward(f, dup, da, up)?;
        let (width, da, up) = (da.width(), self.get(da)?, self.get(up)?);
        self.update(dup, |i, _| match f.gate_width() {
            2 => {
                let (r, j) = (i / (2 * width), i % (2 * width));
                let (x, up) = (up[r * 2 * width + j % width], up[(r * 2 + 1) * width + j % width]);
                let ((value, slope), da) = (gate(f, x), da[r * width + j % width]);
                if j < width { da * up * slope } else { da * value }
            }
            _ => da[i] * gate(f, up[i]).1,
        })
    }

    fn scale_rows(&mut self, x: View, factors: View) -> Result<()> {
        check::scale_rows(x, factors)?;
        let (factors, width) = (self.get(factors)?, x.width());
        self.update(x, |i, x| factors[i / width] * x)
    }

    fn row_dots(&mut self, out: View, a: View, b: View) -> Result<()> {
        check::row_dots(out, a, b)?;
        let (width, a, b) = (a.width(), self.get(a)?, self.get(b)?);
        let products: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a * b).collect();
        let sums: Vec<f64> = products.chunks(width).map(|row| row.iter().sum()).collect();
        self.set(out, &sums)
    }

    fn route(&mut self, r: Routing, probabilities: View, weights: View) -> Result<Routes> {
        check::route(r, probabilities, weights)?;
        let (mut x, experts) = (self.get(probabilities)?, probabilities.width());
        let taken: Vec<_> = x.chunks_mut(experts).map(|row| r.choose(row)).collect();
        let slots = Slots::of(experts, &taken);
        self.set(probabilities, &x)?;
        self.set(weights, &slots.weights)?;
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
        let (p, d_weights) = (self.get(probabilities)?, self.get(d_weights)?);
        let (rows, offsets) = (self.memory.indices(routes.rows())?, self.memory.indices(routes.offsets())?);
        let taken = experts::taken(&rows, &offsets, probabilities.rows())?;
        let rows = p.chunks(experts).zip(&taken);
        let d: Vec<f64> =
            rows.flat_map(|(p, slots)| r.choose_backward(p, slots, |slot| d_weights[slot])).collect();
        self.set(d_logits, &d)
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
        let smoothing = f64::from(smoothing);
        let (ids, weights) = (self.memory.indices(ids)?, self.get_optional(weights)?);
        let mut columns = Vec::new();
        for (i, &id) in ids.iter().enumerate() {
            let row = logits.row_range(i..i + 1);
            let (x, slopes): (Vec<f64>, Vec<f64>) =
                self.get(row)?.into_iter().map(|x| capped(x, softcap)).unzip();
            let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum = x.iter().map(|x| (x - max).exp()).sum::<f64>();
            let top1 = x.iter().position(|&v| v == max) == Some(id as usize);
            let entropy =
                x.iter().map(|x| (x - max).exp() / sum).filter(|p| *p > 0.0).map(|p| -p * p.ln()).sum();
            let mean = x.iter().sum::<f64>() / x.len() as f64;
            let uniform = if smoothing > 0.0 { max + sum.ln() - mean } else { 0.0 };
            columns.extend([max + sum.ln() - x[id as usize], f64::from(u8::from(top1)), entropy, uniform]);
            if let Some(weights) = &weights {
                self.update(row, |j, _| {
                    let label = if j == id as usize { 1.0 - smoothing } else { 0.0 };
                    let p = (x[j] - max).exp() / sum - label - smoothing / x.len() as f64;
                    weights[i] * p * slopes[j]
                })?;
            }
        }
        self.set(losses, &columns)
    }

    fn sum_squares(&self, x: View) -> Result<f64> {
        Ok(self.get(x)?.iter().map(|x| x * x).sum())
    }

    fn adamw(&mut self, s: AdamW, p: View, g: View, m: View, v: View) -> Result<()> {
        check::adamw(p, g, m, v)?;
        optimizer::adamw(self, s, p, g, m, v)
    }

    fn adamw_8bit(&mut self, s: AdamW, p: View, g: View, codes: [Bytes; 2], scales: [View; 2]) -> Result<()> {
        check::adamw_8bit(p, g, codes, scales)?;
        optimizer::adamw_8bit(self, s, p, g, codes, scales)
    }

    fn adafactor(&mut self, s: Adafactor, p: View, g: View, rows: View, columns: Option<View>) -> Result<()> {
        check::adafactor(p, g, rows, columns)?;
        optimizer::adafactor(self, s, p, g, rows, columns)
    }

    fn sgd(&mut self, s: Sgd, p: View, g: View, m: Option<View>) -> Result<()> {
        check::sgd(p, g, m)?;
        optimizer::sgd(self, s, p, g, m)
    }

    fn all_reduce(&mut self, x: View, collective: &dyn Collective) -> Result<()> {
        let mut values: Vec<f32> = self.get(x)?.iter().map(|x| *x as f32).collect();
        collective.all_reduce(&mut values)?;
        self.update(x, |i, _| values[i] as f64)
    }
}
