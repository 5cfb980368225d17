//! The oracle: every operation as a plain loop, in f64.
//!
//! Storage is `f32` (the oracle of the fast backends) or `f64` (for central differences); arithmetic is f64
//! either way. Nothing here is fast and nothing should be: read it to learn what an operation means.

use super::*;

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
    buffers: Vec<Vec<S>>,
}

impl<S: Scalar> Reference<S> {
    /// A backend without buffers.
    pub fn new() -> Self {
        Reference { buffers: Vec::new() }
    }

    /// The values in full precision (the trait's `read` rounds to f32).
    pub fn get(&self, x: View) -> Vec<f64> {
        self.buffers[x.buffer][x.start..x.start + x.len].iter().map(|x| x.to_f64()).collect()
    }

    /// Overwrites with values in full precision.
    pub fn set(&mut self, x: View, values: &[f64]) {
        assert_eq!(x.len, values.len());
        for (to, from) in self.buffers[x.buffer][x.start..].iter_mut().zip(values) {
            *to = S::from_f64(*from);
        }
    }

    /// Replaces the values by `f(index, old)`.
    fn update(&mut self, x: View, mut f: impl FnMut(usize, f64) -> f64) {
        for i in 0..x.len {
            let cell = &mut self.buffers[x.buffer][x.start + i];
            *cell = S::from_f64(f(i, cell.to_f64()));
        }
    }
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
    fn allocate(&mut self, len: usize) -> Result<View> {
        self.buffers.push(vec![S::default(); len]);
        Ok(View { buffer: self.buffers.len() - 1, start: 0, len })
    }

    fn write(&mut self, to: View, from: &[f32]) {
        assert_eq!(to.len, from.len());
        self.update(to, |i, _| from[i] as f64);
    }

    fn read(&self, from: View, to: &mut [f32]) {
        assert_eq!(from.len, to.len());
        for (to, from) in to.iter_mut().zip(self.get(from)) {
            *to = from as f32;
        }
    }

    fn fill(&mut self, x: View, value: f32) {
        self.update(x, |_, _| value as f64);
    }

    fn copy(&mut self, y: View, x: View) {
        let x = self.get(x);
        self.set(y, &x);
    }

    fn add(&mut self, y: View, x: View) {
        let x = self.get(x);
        self.update(y, |i, y| y + x[i]);
    }

    fn gather(&mut self, y: View, x: View, rows: &[u32], width: usize) {
        let x = self.get(x);
        self.update(y, |i, _| x[rows[i / width] as usize * width + i % width]);
    }

    fn scatter_add(&mut self, y: View, x: View, rows: &[u32], width: usize) {
        let x = self.get(x);
        for (i, &row) in rows.iter().enumerate() {
            self.update(y.part(row as usize * width, width), |j, y| y + x[i * width + j]);
        }
    }

    fn norm(&mut self, norm: Norm, y: View, stats: View, x: View, w: View, b: Option<View>) {
        let (xs, width) = (self.get(x), w.len);
        let mut s = Vec::new();
        for row in xs.chunks(width) {
            let n = width as f64;
            match norm {
                Norm::Rms { eps } => {
                    s.push(1.0 / (row.iter().map(|x| x * x).sum::<f64>() / n + eps as f64).sqrt());
                }
                Norm::Layer { eps } => {
                    let mean = row.iter().sum::<f64>() / n;
                    let var = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
                    s.extend([mean, 1.0 / (var + eps as f64).sqrt()]);
                }
            }
        }
        self.set(stats, &s);
        self.norm_again(norm, y, stats, x, w, b);
    }

    fn norm_again(&mut self, norm: Norm, y: View, stats: View, x: View, w: View, b: Option<View>) {
        let (s, x, w, b) = (self.get(stats), self.get(x), self.get(w), b.map(|b| self.get(b)));
        let width = w.len();
        self.update(y, |i, _| {
            let (r, j) = (i / width, i % width);
            let hat = match norm {
                Norm::Rms { .. } => x[i] * s[r],
                Norm::Layer { .. } => (x[i] - s[2 * r]) * s[2 * r + 1],
            };
            hat * w[j] + b.as_ref().map_or(0.0, |b| b[j])
        });
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
        let (s, x, w, dy) = (self.get(stats), self.get(x), self.get(w), self.get(dy));
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
            let along = (0..width).map(|j| dy[j] * w[j] * hat(j)).sum::<f64>() / n;
            let level = match norm {
                Norm::Rms { .. } => 0.0,
                Norm::Layer { .. } => (0..width).map(|j| dy[j] * w[j]).sum::<f64>() / n,
            };
            for j in 0..width {
                gx[j] = inv * (dy[j] * w[j] - level - hat(j) * along);
                gw[j] += dy[j] * hat(j);
                gb[j] += dy[j];
            }
        }
        self.update(dx, |i, old| old + gx[i]);
        self.update(dw, |i, old| old + gw[i]);
        if let Some(db) = db {
            self.update(db, |i, old| old + gb[i]);
        }
    }

    fn linear(&mut self, s: Linear, y: View, accumulate: bool, x: View, w: View, b: Option<View>) {
        let (x, w, b) = (self.get(x), self.get(w), b.map(|b| self.get(b)));
        let k = s.inputs;
        let c = matmul(s.rows, s.outputs, k, |i, p| x[i * k + p], |p, j| w[j * k + p]);
        self.update(y, |i, old| {
            c[i] + b.as_ref().map_or(0.0, |b| b[i % s.outputs]) + if accumulate { old } else { 0.0 }
        });
    }

    fn linear_dx(&mut self, s: Linear, dx: View, accumulate: bool, dy: View, w: View) {
        let (dy, w) = (self.get(dy), self.get(w));
        let (n, k) = (s.outputs, s.inputs);
        let c = matmul(s.rows, k, n, |i, p| dy[i * n + p], |p, j| w[p * k + j]);
        self.update(dx, |i, old| c[i] + if accumulate { old } else { 0.0 });
    }

    fn linear_dw(&mut self, s: Linear, dw: View, db: Option<View>, accumulate: bool, dy: View, x: View) {
        let (dy, x) = (self.get(dy), self.get(x));
        let (n, k) = (s.outputs, s.inputs);
        let c = matmul(n, k, s.rows, |i, p| dy[p * n + i], |p, j| x[p * k + j]);
        self.update(dw, |i, old| c[i] + if accumulate { old } else { 0.0 });
        if let Some(db) = db {
            self.update(db, |j, old| {
                (0..s.rows).map(|r| dy[r * n + j]).sum::<f64>() + if accumulate { old } else { 0.0 }
            });
        }
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
        let (table, half) = (self.get(table), head_dim / 2);
        for (r, &p) in positions.iter().enumerate() {
            for h in 0..heads {
                let head = x.part(r * width + h * head_dim, head_dim);
                let old = self.get(head);
                self.update(head, |i, _| {
                    let f = i % half;
                    let cos = table[p as usize * head_dim + f];
                    let sin = table[p as usize * head_dim + half + f] * if inverse { -1.0 } else { 1.0 };
                    if i < half {
                        old[f] * cos - old[f + half] * sin
                    } else {
                        old[f + half] * cos + old[f] * sin
                    }
                });
            }
        }
    }

    fn attention(&mut self, h: Heads, plan: &Attention, o: View, lse: View, q: View, kv: View) {
        let (q, kv) = (self.get(q), self.get(kv));
        let (mut out, mut sums) = (vec![0.0; o.len], vec![0.0; lse.len]);
        for_each_row(h, plan, |i, head, keys| {
            let scores = scores(h, &q, &kv, i, head, &keys);
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum = scores.iter().map(|s| (s - max).exp()).sum::<f64>();
            sums[i * h.heads + head] = max + sum.ln();
            for (s, &key) in scores.iter().zip(&keys) {
                for d in 0..h.head_dim {
                    out[i * h.query_width() + head * h.head_dim + d] +=
                        (s - max).exp() / sum * kv[value_at(h, key, head) + d];
                }
            }
        });
        self.set(o, &out);
        self.set(lse, &sums);
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
        let (q, kv, do_, o, lse) = (self.get(q), self.get(kv), self.get(do_), self.get(o), self.get(lse));
        let (mut gq, mut gkv) = (vec![0.0; dq.len], vec![0.0; dkv.len]);
        for_each_row(h, plan, |i, head, keys| {
            let at = i * h.query_width() + head * h.head_dim;
            let through: f64 = (0..h.head_dim).map(|d| do_[at + d] * o[at + d]).sum();
            for (s, &key) in scores(h, &q, &kv, i, head, &keys).iter().zip(&keys) {
                let (k, v) = (key_at(h, key, head), value_at(h, key, head));
                let p = (s - lse[i * h.heads + head]).exp();
                let dp: f64 = (0..h.head_dim).map(|d| do_[at + d] * kv[v + d]).sum();
                let ds = p * (dp - through) * h.scale as f64;
                for d in 0..h.head_dim {
                    gq[at + d] += ds * kv[k + d];
                    gkv[k + d] += ds * q[at + d];
                    gkv[v + d] += p * do_[at + d];
                }
            }
        });
        self.set(dq, &gq);
        self.set(dkv, &gkv);
    }

    fn activate(&mut self, f: Activation, a: View, up: View, width: usize) {
        let up = self.get(up);
        self.update(a, |i, _| match f {
            Activation::SwiGlu => {
                let (gate, up) =
                    (up[i / width * 2 * width + i % width], up[(i / width * 2 + 1) * width + i % width]);
                gate * sigmoid(gate) * up
            }
            Activation::GeluTanh => {
                let x = up[i];
                0.5 * x * (1.0 + (GELU_C * (x + 0.044715 * x * x * x)).tanh())
            }
        });
    }

    fn activate_backward(&mut self, f: Activation, dup: View, da: View, up: View, width: usize) {
        let (da, up) = (self.get(da), self.get(up));
        self.update(dup, |i, _| match f {
            Activation::SwiGlu => {
                let (r, j) = (i / (2 * width), i % (2 * width));
                let (gate, up) = (up[r * 2 * width + j % width], up[(r * 2 + 1) * width + j % width]);
                let (s, da) = (sigmoid(gate), da[r * width + j % width]);
                if j < width { da * up * (s + gate * s * (1.0 - s)) } else { da * gate * s }
            }
            Activation::GeluTanh => {
                let x = up[i];
                let t = (GELU_C * (x + 0.044715 * x * x * x)).tanh();
                let slope = GELU_C * (1.0 + 3.0 * 0.044715 * x * x);
                da[i] * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope)
            }
        });
    }

    fn cross_entropy(
        &mut self,
        logits: View,
        vocab: usize,
        ids: &[u32],
        weights: Option<&[f32]>,
        out: &mut [Outcome],
    ) {
        for (i, (&id, out)) in ids.iter().zip(out).enumerate() {
            let row = logits.part(i * vocab, vocab);
            let x = self.get(row);
            let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum = x.iter().map(|x| (x - max).exp()).sum::<f64>();
            let nll = max + sum.ln() - x[id as usize];
            *out = Outcome { nll: nll as f32, top1: x.iter().position(|&v| v == max) == Some(id as usize) };
            if let Some(weights) = weights {
                self.update(row, |j, x| {
                    weights[i] as f64 * ((x - max).exp() / sum - if j == id as usize { 1.0 } else { 0.0 })
                });
            }
        }
    }

    fn sum_squares(&self, x: View) -> f64 {
        self.get(x).iter().map(|x| x * x).sum()
    }

    fn adamw(&mut self, s: AdamW, p: View, g: View, m: View, v: View) {
        let g = self.get(g);
        self.update(m, |i, m| m + (1.0 - s.beta1) * (g[i] * s.gradient_scale as f64 - m));
        self.update(v, |i, v| s.beta2 * v + (1.0 - s.beta2) * (g[i] * s.gradient_scale as f64).powi(2));
        let (m, v) = (self.get(m), self.get(v));
        let (c1, c2) = (1.0 - s.beta1.powi(s.t as i32), 1.0 - s.beta2.powi(s.t as i32));
        self.update(p, |i, p| {
            p * (1.0 - s.lr * s.weight_decay) - s.lr / c1 * m[i] / (v[i].sqrt() / c2.sqrt() + s.eps)
        });
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

/// Calls `f(query row, head, the key rows that it sees)` for each of them.
fn for_each_row(h: Heads, plan: &Attention, mut f: impl FnMut(usize, usize, Vec<usize>)) {
    for span in &plan.spans {
        for i in span.queries.clone() {
            let keys: Vec<usize> =
                span.prefix.clone().chain(span.own.start..plan.rows[i] as usize + 1).collect();
            for head in 0..h.heads {
                f(i, head, keys.clone());
            }
        }
    }
}

/// Scaled scores of query row `i` with `keys`.
fn scores(h: Heads, q: &[f64], kv: &[f64], i: usize, head: usize, keys: &[usize]) -> Vec<f64> {
    let q = &q[i * h.query_width() + head * h.head_dim..][..h.head_dim];
    keys.iter()
        .map(|&key| {
            q.iter().zip(&kv[key_at(h, key, head)..]).map(|(q, k)| q * k).sum::<f64>() * h.scale as f64
        })
        .collect()
}
