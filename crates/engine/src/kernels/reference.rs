//! The oracle: every operation as a plain loop, in f64.
//!
//! Storage is `f32` (the oracle of the fast backends) or `f64` (for central differences); arithmetic is f64
//! either way. Nothing here is fast and nothing should be: read it to learn what an operation means.

#![forbid(unsafe_code)]

use super::buffers::Memory;
use super::experts::Slots;
use super::stored::Elements;
use super::{
    Activation, Adafactor, AdamW, AttentionPlan, Backend, Buffer, ByteBuffer, Bytes, Draw, Dropout,
    FileBuffer, FileTensor, Heads, IndexBuffer, Indices, Norm, PlanBuffer, Routes, Routing, Sgd, View, check,
    experts, quantised, random,
};
use crate::collective::Collective;
use crate::{Error, Result};

/// What a [`Reference`] backend stores its values in.
pub trait Scalar: Copy + Default {
    /// From the f64 in which everything is computed.
    fn from_f64(x: f64) -> Self;
    /// To the f64 in which everything is computed.
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

    /// The values in full precision (the trait's `read` rounds to f32), row after row without gaps.
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

    /// Overwrites with values in full precision.
    ///
    /// # Errors
    /// As [`Reference::get`], and where the lengths differ.
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

/// Where element `i` of a view is in its buffer.
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

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

const GELU_C: f64 = 0.797_884_560_802_865_4; // sqrt(2/pi)

impl<S: Scalar> Backend for Reference<S> {
    fn allocate(&mut self, len: usize) -> Result<Buffer> {
        let failed = |_| Error::Memory { bytes: (len as u64).saturating_mul(size_of::<S>() as u64) };
        self.memory.collect();
        let mut values = Vec::new();
        values.try_reserve_exact(len).map_err(failed)?;
        values.resize(len, S::default());
        Ok(self.memory.add_buffer(values, 0, len))
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
        check::apart(&[y], &[x])?;
        let x = self.get(x)?;
        self.update(y, |i, _| x[i])
    }

    fn blend(&mut self, y: View, x: View, share: f32) -> Result<()> {
        check::add(y, x)?;
        check::apart(&[y], &[x])?;
        let x = self.get(x)?;
        self.update(y, |i, y| y + f64::from(share) * (x[i] - y))
    }

    fn swap(&mut self, x: View, y: View) -> Result<()> {
        check::add(y, x)?;
        check::apart(&[x, y], &[])?;
        let (old_x, old_y) = (self.get(x)?, self.get(y)?);
        self.update(x, |i, _| old_y[i])?;
        self.update(y, |i, _| old_x[i])
    }

    fn add(&mut self, y: View, x: View) -> Result<()> {
        check::add(y, x)?;
        check::apart(&[y], &[x])?;
        let x = self.get(x)?;
        self.update(y, |i, y| y + x[i])
    }

    fn gather(&mut self, y: View, x: View, rows: Indices) -> Result<()> {
        check::gather(y, x, rows)?;
        check::apart(&[y], &[x])?;
        let (x, rows, width) = (self.get(x)?, self.memory.indices(rows)?, y.width());
        self.update(y, |i, _| x[rows[i / width] as usize * width + i % width])
    }

    fn scatter_add(&mut self, y: View, x: View, rows: Indices) -> Result<()> {
        check::gather(x, y, rows)?;
        check::apart(&[y], &[x])?;
        let (values, rows) = (self.get(x)?, self.memory.indices(rows)?);
        for (i, &row) in rows.iter().enumerate() {
            let row = row as usize;
            self.update(y.row_range(row..row + 1), |j, y| y + values[i * x.width() + j])?;
        }
        Ok(())
    }

    fn norm(&mut self, norm: Norm, y: View, stats: View, x: View, w: View, b: Option<View>) -> Result<()> {
        check::norm(norm, y, stats, x, w, b)?;
        check::apart(&[y, stats], &[x, w])?;
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
        self.norm_recompute(norm, y, stats, x, w, b)
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
        check::apart(&[y], &[stats, x, w])?;
        b.map_or(Ok(()), |b| check::apart(&[y], &[b]))?;
        let (s, x, w, b) = (self.get(stats)?, self.get(x)?, self.get(w)?, self.get_optional(b)?);
        let width = w.len();
        self.update(y, |i, _| {
            let (r, j) = (i / width, i % width);
            let hat = match norm {
                Norm::Rms { .. } => x[i] * s[r],
                Norm::Layer { .. } => (x[i] - s[2 * r]) * s[2 * r + 1],
            };
            hat * (w[j] + norm.offset() as f64) + b.as_ref().map_or(0.0, |b| b[j])
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
        check::norm_backward(norm, dx, dw, db, dy, stats, x, w)?;
        let written: Vec<View> = [Some(dx), dw, db].into_iter().flatten().collect();
        check::apart(&written, &[dy, stats, x, w])?;
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
        check::apart(&[y], &[x, w])?;
        b.map_or(Ok(()), |b| check::apart(&[y], &[b]))?;
        let (rows, k, n) = (x.rows(), x.width(), y.width());
        let (x, w, b) = (self.get(x)?, self.get(w)?, self.get_optional(b)?);
        let c = matmul(rows, n, k, |i, p| x[i * k + p], |p, j| w[j * k + p]);
        self.update(y, |i, old| {
            c[i] + b.as_ref().map_or(0.0, |b| b[i % n]) + if accumulate { old } else { 0.0 }
        })
    }

    fn linear_dx(&mut self, dx: View, accumulate: bool, dy: View, w: View) -> Result<()> {
        check::linear(dy, dx, w, None)?;
        check::apart(&[dx], &[dy, w])?;
        let (rows, k, n) = (dx.rows(), dx.width(), dy.width());
        let (dy, w) = (self.get(dy)?, self.get(w)?);
        let c = matmul(rows, k, n, |i, p| dy[i * n + p], |p, j| w[p * k + j]);
        self.update(dx, |i, old| c[i] + if accumulate { old } else { 0.0 })
    }

    fn linear_dw(&mut self, dw: View, accumulate: bool, dy: View, x: View) -> Result<()> {
        check::linear(dy, x, dw, None)?;
        check::apart(&[dw], &[dy, x])?;
        let (rows, k, n) = (x.rows(), x.width(), dy.width());
        let (dy, x) = (self.get(dy)?, self.get(x)?);
        let c = matmul(n, k, rows, |i, p| dy[p * n + i], |p, j| x[p * k + j]);
        self.update(dw, |i, old| c[i] + if accumulate { old } else { 0.0 })
    }

    fn linear_db(&mut self, db: View, accumulate: bool, dy: View) -> Result<()> {
        check::sum_rows(db, dy)?;
        check::apart(&[db], &[dy])?;
        let (rows, n, dy) = (dy.rows(), dy.width(), self.get(dy)?);
        self.update(db, |j, old| {
            (0..rows).map(|r| dy[r * n + j]).sum::<f64>() + if accumulate { old } else { 0.0 }
        })
    }

    fn row_norms(&mut self, n: View, w: View, b: View, a: View, scale: f32) -> Result<()> {
        check::row_norms(n, w, b, a)?;
        check::apart(&[n], &[w, b, a])?;
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
        check::apart(&[y], &[a, b])?;
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
        check::apart(&[y], &[x, factors])?;
        let width = x.width();
        let (x, factors, bias) = (self.get(x)?, self.get(factors)?, self.get_optional(bias)?);
        self.update(y, |i, old| {
            let bias = bias.as_ref().map_or(0.0, |bias| bias[i % width]);
            factors[i % width] * x[i] + bias + if accumulate { old } else { 0.0 }
        })
    }

    fn column_dots(&mut self, out: View, accumulate: bool, a: View, b: View, divisors: View) -> Result<()> {
        check::column_dots(out, a, b, divisors)?;
        check::apart(&[out], &[a, b, divisors])?;
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
        check::apart(&[x], &[table])?;
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
        check::each_row(x, sizes)?;
        check::apart(&[x], &[sizes])?;
        let (sizes, width) = (self.get(sizes)?, x.width());
        self.update(x, |i, x| {
            let word = draw.word((i / width) as u64, i % width);
            x + sizes[i / width] * f64::from(random::symmetric(word))
        })
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
        check::apart(&[o, lse], &[q, kv])?;
        let (q, kv, plan) = (self.get(q)?, self.get(kv)?, self.memory.plan(plan)?);
        let (mut out, mut sums) = (vec![0.0; o.len()], vec![0.0; lse.len()]);
        for_each_row(h, &plan, |i, head, keys, first| {
            let row = plan.rows[i] as usize * h.heads + head;
            let (scores, _) = scores(h, &q, &kv, i, head, &keys);
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum = scores.iter().map(|s| (s - max).exp()).sum::<f64>();
            sums[i * h.heads + head] = max + sum.ln();
            for (n, (s, &key)) in scores.iter().zip(&keys).enumerate() {
                let p = (s - max).exp() / sum * factor(dropout, row, first + n);
                for d in 0..h.head_dim {
                    out[i * h.query_width() + head * h.head_dim + d] += p * kv[value_at(h, key, head) + d];
                }
            }
        });
        self.set(o, &out)?;
        self.set(lse, &sums)
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
        check::apart(&[dq, dkv], &[do_, o, lse, q, kv])?;
        let plan = self.memory.plan(plan)?;
        let (mut gq, mut gkv) = (vec![0.0; dq.len()], vec![0.0; dkv.len()]);
        let (q, kv, do_, o, lse) =
            (self.get(q)?, self.get(kv)?, self.get(do_)?, self.get(o)?, self.get(lse)?);
        for_each_row(h, &plan, |i, head, keys, first| {
            let row = plan.rows[i] as usize * h.heads + head;
            let at = i * h.query_width() + head * h.head_dim;
            let through: f64 = (0..h.head_dim).map(|d| do_[at + d] * o[at + d]).sum();
            let (scores, slopes) = scores(h, &q, &kv, i, head, &keys);
            for (n, ((s, slope), &key)) in scores.iter().zip(slopes).zip(&keys).enumerate() {
                let (k, v) = (key_at(h, key, head), value_at(h, key, head));
                let p = (s - lse[i * h.heads + head]).exp();
                let kept = factor(dropout, row, first + n);
                let dp: f64 = kept * (0..h.head_dim).map(|d| do_[at + d] * kv[v + d]).sum::<f64>();
                let ds = p * (dp - through) * slope * h.scale as f64;
                for d in 0..h.head_dim {
                    gq[at + d] += ds * kv[k + d];
                    gkv[k + d] += ds * q[at + d];
                    gkv[v + d] += p * kept * do_[at + d];
                }
            }
        });
        self.set(dq, &gq)?;
        self.set(dkv, &gkv)
    }

    fn activate(&mut self, f: Activation, a: View, up: View) -> Result<()> {
        check::activate(f, a, up)?;
        check::apart(&[a], &[up])?;
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
        check::activate(f, da, up)?;
        check::activate(f, da, dup)?;
        check::apart(&[dup], &[da, up])?;
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
        check::each_row(x, factors)?;
        check::apart(&[x], &[factors])?;
        let (factors, width) = (self.get(factors)?, x.width());
        self.update(x, |i, x| factors[i / width] * x)
    }

    fn row_dots(&mut self, out: View, a: View, b: View) -> Result<()> {
        check::row_dots(out, a, b)?;
        check::apart(&[out], &[a, b])?;
        let (width, a, b) = (a.width(), self.get(a)?, self.get(b)?);
        let products: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a * b).collect();
        let sums: Vec<f64> = products.chunks(width).map(|row| row.iter().sum()).collect();
        self.set(out, &sums)
    }

    fn route(&mut self, r: Routing, probabilities: View, weights: View) -> Result<Routes> {
        check::route(r, probabilities, weights)?;
        check::apart(&[probabilities, weights], &[])?;
        let (mut x, experts) = (self.get(probabilities)?, probabilities.width());
        let taken: Vec<_> = x.chunks_mut(experts).map(|row| r.choose(row)).collect();
        let slots = Slots::of(experts, &taken);
        self.set(probabilities, &x)?;
        self.set(weights, &slots.weights)?;
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
        check::apart(&[d_logits], &[probabilities, d_weights])?;
        let experts = probabilities.width();
        let (p, d_weights) = (self.get(probabilities)?, self.get(d_weights)?);
        let (rows, offsets) = (self.memory.indices(routes.rows())?, self.memory.indices(routes.offsets())?);
        let taken = experts::taken(&rows, &offsets, probabilities.rows())?;
        let mut d = vec![0.0; d_logits.len()];
        for (row, slots) in taken.iter().enumerate() {
            let d = &mut d[row * experts..][..experts];
            slots.iter().for_each(|(expert, slot)| d[*expert] = d_weights[*slot]);
            let experts_of_row: Vec<usize> = slots.iter().map(|(expert, _)| *expert).collect();
            r.choose_backward(&p[row * experts..][..experts], &experts_of_row, d);
        }
        self.set(d_logits, &d)
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
        let smoothing = f64::from(smoothing);
        check::apart(&[losses, logits], &weights.into_iter().collect::<Vec<_>>())?;
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
        check::apart(&[p, m, v], &[g])?;
        let g = self.get(g)?;
        self.update(m, |i, m| m + (1.0 - s.beta1) * (g[i] * s.gradient_scale as f64 - m))?;
        self.update(v, |i, v| s.beta2 * v + (1.0 - s.beta2) * (g[i] * s.gradient_scale as f64).powi(2))?;
        let (m, v) = (self.get(m)?, self.get(v)?);
        let (c1, c2) = (1.0 - s.beta1.powi(s.t as i32), 1.0 - s.beta2.powi(s.t as i32));
        self.update(p, |i, p| {
            p * (1.0 - s.lr * s.weight_decay) - s.lr / c1 * m[i] / (v[i].sqrt() / c2.sqrt() + s.eps)
        })
    }

    fn adamw_8bit(&mut self, s: AdamW, p: View, g: View, codes: [Bytes; 2], scales: [View; 2]) -> Result<()> {
        check::adamw_8bit(p, g, codes, scales)?;
        check::apart(&[p, scales[0], scales[1]], &[g])?;
        let g = self.get(g)?;
        let moments = [0, 1].map(|n| {
            let (values, scales) = (quantised::values(n == 0), self.get(scales[n])?);
            let codes = self.memory.bytes(codes[n])?;
            let value =
                |(i, code): (usize, &u8)| f64::from(values[*code as usize]) * scales[i / quantised::BLOCK];
            Ok::<_, Error>(codes.iter().enumerate().map(value).collect::<Vec<f64>>())
        });
        let [m, v] = moments;
        let (mut m, mut v) = (m?, v?);
        for (i, g) in g.iter().map(|g| g * f64::from(s.gradient_scale)).enumerate() {
            m[i] = s.beta1 * m[i] + (1.0 - s.beta1) * g;
            v[i] = s.beta2 * v[i] + (1.0 - s.beta2) * g * g;
        }
        let (c1, c2) = (1.0 - s.beta1.powi(s.t as i32), 1.0 - s.beta2.powi(s.t as i32));
        self.update(p, |i, p| {
            p * (1.0 - s.lr * s.weight_decay) - s.lr / c1 * m[i] / (v[i].sqrt() / c2.sqrt() + s.eps)
        })?;
        for (n, moment) in [m, v].into_iter().enumerate() {
            let values = quantised::values(n == 0);
            let moment: Vec<f32> = moment.iter().map(|x| *x as f32).collect();
            let mut new_scales = Vec::new();
            let all = self.memory.bytes_mut(codes[n])?;
            for (codes, x) in all.chunks_mut(quantised::BLOCK).zip(moment.chunks(quantised::BLOCK)) {
                let mut scale = 0.0;
                quantised::store(values, x, codes, &mut scale);
                new_scales.push(f64::from(scale));
            }
            self.set(scales[n], &new_scales)?;
        }
        Ok(())
    }

    fn adafactor(&mut self, s: Adafactor, p: View, g: View, rows: View, columns: Option<View>) -> Result<()> {
        check::adafactor(p, g, rows, columns)?;
        check::apart(&[Some(p), Some(rows), columns].into_iter().flatten().collect::<Vec<_>>(), &[g])?;
        let g: Vec<f64> = self.get(g)?.iter().map(|g| g * f64::from(s.gradient_scale)).collect();
        let (width, height, beta2) = (p.width(), p.rows(), s.beta2());
        let square = |i: usize| g[i] * g[i] + Adafactor::EPS;
        let blend = |old: f64, new: f64| beta2 * old + (1.0 - beta2) * new;
        let update: Vec<f64> = match columns {
            None => {
                self.update(rows, |i, old| blend(old, square(i)))?;
                self.get(rows)?.iter().zip(&g).map(|(v, g)| g / v.sqrt()).collect()
            }
            Some(columns) => {
                let row = |i: usize| (0..width).map(|j| square(i * width + j)).sum::<f64>() / width as f64;
                self.update(rows, |i, old| blend(old, row(i)))?;
                let column =
                    |j: usize| (0..height).map(|i| square(i * width + j)).sum::<f64>() / height as f64;
                self.update(columns, |j, old| blend(old, column(j)))?;
                let (rows, columns) = (self.get(rows)?, self.get(columns)?);
                let mean = rows.iter().sum::<f64>() / height as f64;
                let of = |(i, g): (usize, &f64)| g / (rows[i / width] / mean * columns[i % width]).sqrt();
                g.iter().enumerate().map(of).collect()
            }
        };
        let rms = (update.iter().map(|u| u * u).sum::<f64>() / update.len() as f64).sqrt();
        self.update(p, |i, p| p - s.weight_decay * s.lr * p - s.lr * update[i] / rms.max(1.0))
    }

    fn sgd(&mut self, s: Sgd, p: View, g: View, m: Option<View>) -> Result<()> {
        check::sgd(p, g, m)?;
        check::apart(&[Some(p), m].into_iter().flatten().collect::<Vec<_>>(), &[g])?;
        let (g, old) = (self.get(g)?, self.get(p)?);
        let mut d: Vec<f64> =
            g.iter().zip(&old).map(|(g, p)| g * f64::from(s.gradient_scale) + s.weight_decay * p).collect();
        if let Some(m) = m {
            self.update(m, |i, m| s.momentum * m + d[i])?;
            d = self.get(m)?;
        }
        self.update(p, |i, p| p - s.lr * d[i])
    }

    fn all_reduce(&mut self, x: View, collective: &dyn Collective) -> Result<()> {
        let mut values: Vec<f32> = self.get(x)?.iter().map(|x| *x as f32).collect();
        collective.all_reduce(&mut values)?;
        self.update(x, |i, _| values[i] as f64)
    }
}

/// Where the key of row `key` for query head `head` starts in `kv`.
fn key_at(h: Heads, key: usize, head: usize) -> usize {
    key * h.kv_width() + head / (h.heads / h.kv_heads) * h.head_dim
}

/// Where the value of row `key` for query head `head` starts in `kv`.
fn value_at(h: Heads, key: usize, head: usize) -> usize {
    key_at(h, key, head) + h.kv_heads * h.head_dim
}

/// What dropout multiplies an element by.
fn factor(dropout: Option<Dropout>, row: usize, column: usize) -> f64 {
    dropout.map_or(1.0, |dropout| f64::from(dropout.factor(dropout.draw.word(row as u64, column))))
}

/// Calls `f(query row, head, the key rows that it sees, the place of the first of them in its range)` for each of
/// them.
fn for_each_row(h: Heads, plan: &AttentionPlan, mut f: impl FnMut(usize, usize, Vec<usize>, usize)) {
    for range in &plan.ranges {
        for i in range.queries.clone() {
            let keys: Vec<usize> =
                range.prefix.clone().chain(range.own.start..plan.rows[i] as usize + 1).collect();
            let first = h.window.map_or(0, |window| keys.len().saturating_sub(window));
            for head in 0..h.heads {
                f(i, head, keys[first..].to_vec(), first);
            }
        }
    }
}

/// Scaled and capped scores of query row `i` with `keys`, and the derivatives of the capping.
fn scores(h: Heads, q: &[f64], kv: &[f64], i: usize, head: usize, keys: &[usize]) -> (Vec<f64>, Vec<f64>) {
    let q = &q[i * h.query_width() + head * h.head_dim..][..h.head_dim];
    keys.iter()
        .map(|&key| {
            let product: f64 = q.iter().zip(&kv[key_at(h, key, head)..]).map(|(q, k)| q * k).sum();
            capped(product * h.scale as f64, h.softcap)
        })
        .unzip()
}

/// `cap · tanh(x / cap)`, and its derivative.
fn capped(x: f64, cap: Option<f32>) -> (f64, f64) {
    let Some(cap) = cap.map(f64::from) else { return (x, 1.0) };
    let t = (x / cap).tanh();
    (cap * t, 1.0 - t * t)
}

/// `gelu_new(x)`, and its derivative.
fn gelu_tanh(x: f64) -> (f64, f64) {
    let t = (GELU_C * (x + 0.044715 * x * x * x)).tanh();
    let slope = GELU_C * (1.0 + 3.0 * 0.044715 * x * x);
    (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope)
}

/// `x·Φ(x)`, and its derivative `Φ(x) + x·φ(x)`.
fn gelu(x: f64) -> (f64, f64) {
    let cdf = 0.5 * (1.0 + erf(x / std::f64::consts::SQRT_2));
    (x * cdf, cdf + x * (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt())
}

/// The error function, by the series `2/√π · e^(−x²) · Σ 2ⁿ·x^(2n+1) / (1·3·…·(2n+1))`, whose terms have one sign.
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut total, mut n) = (x, 0.0, 0.0);
    while total + term != total {
        total += term;
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
    }
    2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * total
}

/// A gate's function, and its derivative.
fn gate(f: Activation, x: f64) -> (f64, f64) {
    match f {
        Activation::SwiGlu => {
            let s = sigmoid(x);
            (x * s, s + x * s * (1.0 - s))
        }
        Activation::GeGluTanh | Activation::GeluTanh => gelu_tanh(x),
        Activation::Gelu => gelu(x),
    }
}
