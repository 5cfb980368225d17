//! The optimizers.

use super::{Reference, Scalar};
use crate::kernels::{Adafactor, AdamW, Bytes, Sgd, View, quantised};
use crate::{Error, Result};

pub(super) fn adamw<S: Scalar>(
    b: &mut Reference<S>,
    s: AdamW,
    p: View,
    g: View,
    m: View,
    v: View,
) -> Result<()> {
    let g = b.get(g)?;
    b.update(m, |i, m| m + (1.0 - s.beta1) * (g[i] * s.gradient_scale as f64 - m))?;
    b.update(v, |i, v| s.beta2 * v + (1.0 - s.beta2) * (g[i] * s.gradient_scale as f64).powi(2))?;
    let (m, v) = (b.get(m)?, b.get(v)?);
    adam_update(b, s, p, &m, &v)
}

pub(super) fn adamw_8bit<S: Scalar>(
    b: &mut Reference<S>,
    s: AdamW,
    p: View,
    g: View,
    codes: [Bytes; 2],
    scales: [View; 2],
) -> Result<()> {
    let g = b.get(g)?;
    let moments = [0, 1].map(|n| {
        let (values, scales) = (quantised::values(n == 0), b.get(scales[n])?);
        let codes = b.memory.bytes(codes[n])?;
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
    adam_update(b, s, p, &m, &v)?;
    for (n, moment) in [m, v].into_iter().enumerate() {
        let values = quantised::values(n == 0);
        let moment: Vec<f32> = moment.iter().map(|x| *x as f32).collect();
        let mut new_scales = Vec::new();
        let all = b.memory.bytes_mut(codes[n])?;
        for (codes, x) in all.chunks_mut(quantised::BLOCK).zip(moment.chunks(quantised::BLOCK)) {
            let mut scale = 0.0;
            quantised::store(values, x, codes, &mut scale);
            new_scales.push(f64::from(scale));
        }
        b.set(scales[n], &new_scales)?;
    }
    Ok(())
}

pub(super) fn adafactor<S: Scalar>(
    b: &mut Reference<S>,
    s: Adafactor,
    p: View,
    g: View,
    rows: View,
    columns: Option<View>,
) -> Result<()> {
    let g: Vec<f64> = b.get(g)?.iter().map(|g| g * f64::from(s.gradient_scale)).collect();
    let (width, height, beta2) = (p.width(), p.rows(), s.beta2());
    let square = |i: usize| g[i] * g[i] + Adafactor::EPS;
    let blend = |old: f64, new: f64| beta2 * old + (1.0 - beta2) * new;
    let update: Vec<f64> = match columns {
        None => {
            b.update(rows, |i, old| blend(old, square(i)))?;
            b.get(rows)?.iter().zip(&g).map(|(v, g)| g / v.sqrt()).collect()
        }
        Some(columns) => {
            let row = |i: usize| (0..width).map(|j| square(i * width + j)).sum::<f64>() / width as f64;
            b.update(rows, |i, old| blend(old, row(i)))?;
            let column = |j: usize| (0..height).map(|i| square(i * width + j)).sum::<f64>() / height as f64;
            b.update(columns, |j, old| blend(old, column(j)))?;
            let (rows, columns) = (b.get(rows)?, b.get(columns)?);
            let mean = rows.iter().sum::<f64>() / height as f64;
            let of = |(i, g): (usize, &f64)| g / (rows[i / width] / mean * columns[i % width]).sqrt();
            g.iter().enumerate().map(of).collect()
        }
    };
    let rms = (update.iter().map(|u| u * u).sum::<f64>() / update.len() as f64).sqrt();
    b.update(p, |i, p| p - s.weight_decay * s.lr * p - s.lr * update[i] / rms.max(1.0))
}

pub(super) fn sgd<S: Scalar>(b: &mut Reference<S>, s: Sgd, p: View, g: View, m: Option<View>) -> Result<()> {
    let (g, old) = (b.get(g)?, b.get(p)?);
    let mut d: Vec<f64> =
        g.iter().zip(&old).map(|(g, p)| g * f64::from(s.gradient_scale) + s.weight_decay * p).collect();
    if let Some(m) = m {
        b.update(m, |i, m| s.momentum * m + d[i])?;
        d = b.get(m)?;
    }
    b.update(p, |i, p| p - s.lr * d[i])
}

/// Updates the parameters after their moments have been updated.
fn adam_update<S: Scalar>(b: &mut Reference<S>, s: AdamW, p: View, m: &[f64], v: &[f64]) -> Result<()> {
    let (c1, c2) = (1.0 - s.beta1.powi(s.t as i32), 1.0 - s.beta2.powi(s.t as i32));
    b.update(p, |i, p| {
        p * (1.0 - s.lr * s.weight_decay) - s.lr / c1 * m[i] / (v[i].sqrt() / c2.sqrt() + s.eps)
    })
}
