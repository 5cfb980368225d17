//! Optimizers, and the norm that clipping needs.

use super::allocation::Allocation;
use super::copies::Run;
use super::launch::{Size, launch};
use super::{Cuda, as_bytes};
use crate::Result;
use crate::kernels::check::{self, or_none};
use crate::kernels::quantised::{self, BLOCK};
use crate::kernels::{Adafactor, AdamW, Bytes, Sgd, View};

impl Cuda {
    /// `Σ x²`, waiting for the result.
    pub(super) fn squares(&self, x: View) -> Result<f64> {
        check::element_wise(x)?;
        let from = self.source(x)?;
        let n = x.len();
        let size = Size::of(n, 4096, 1024, [256, 1, 1]);
        let count = size.grid[0];
        let memory = self.work(8 * (count as usize + 1))?;
        let (out, partial) = (memory.address(), memory.address() + 8);
        launch!(self, c"sum_squares", size, [partial, from, n as u64])?;
        launch!(self, c"sum_f64", Size::blocks(1, 256), [out, partial, count])?;
        let mut bytes = [0; 8];
        // SAFETY: the scratch memory has this many bytes.
        unsafe { memory.read(&mut bytes)? };
        Ok(f64::from_ne_bytes(bytes))
    }

    pub(super) fn step_adamw(&self, step: AdamW, p: View, g: View, m: View, v: View) -> Result<()> {
        let runs = self.runs(p)?;
        let ([m, v], [p, g]) = self.addresses([m, v], [p, g])?;
        let s = step.scalars();
        for Run { first, len, copy } in runs {
            let [p, g, m, v] = [p, g, m, v].map(|at| at + 4 * first as u64);
            let size = Size::elements(len);
            launch!(
                self,
                c"adamw",
                size,
                [
                    p, copy, g, m, v, len as u64, s.keep, s.lerp1, s.beta2, s.lerp2, s.root2, s.eps, s.rate,
                    s.scale
                ]
            )?;
        }
        Ok(())
    }

    /// The values of the one-byte codes on the card: the signed ones, then the unsigned ones.
    pub(super) fn code_values(&mut self) -> Result<[u64; 2]> {
        let values = |signed| Allocation::of(&self.driver, as_bytes(quantised::values(signed)));
        let known = match self.codes.take() {
            Some(known) => known,
            None => [values(true)?, values(false)?],
        };
        Ok(self.codes.insert(known).each_ref().map(Allocation::address))
    }

    pub(super) fn step_adamw_8bit(
        &mut self,
        step: AdamW,
        p: View,
        g: View,
        codes: [Bytes; 2],
        scales: [View; 2],
    ) -> Result<()> {
        let (copy, n) = (self.copy_of_all(p)?, p.len());
        let ([m_scales, v_scales], [p, g]) = self.addresses(scales, [p, g])?;
        let (m_codes, v_codes) = (self.bytes(codes[0])?, self.bytes(codes[1])?);
        let [signed, unsigned] = self.code_values()?;
        let s = step.scalars();
        launch!(
            self,
            c"adamw_8bit",
            Size::of(n, BLOCK, 65536, [256, 1, 1]),
            [
                p, copy, g, m_codes, m_scales, v_codes, v_scales, n as u64, signed, unsigned, s.keep,
                s.beta1, s.lerp1, s.beta2, s.lerp2, s.root2, s.eps, s.rate, s.scale
            ]
        )
    }

    pub(super) fn step_adafactor(
        &self,
        step: Adafactor,
        p: View,
        g: View,
        rows: View,
        columns: View,
    ) -> Result<()> {
        let (copy, height, width) = (self.copy_of_all(p)?, p.rows(), p.width());
        let ([rows, columns], [p, g]) = self.addresses([rows, columns], [p, g])?;
        let (beta2, scale) = (step.beta2() as f32, step.gradient_scale);
        let (by_columns, chunk, chunks) = Size::columns(height, width);
        let sums = self.floats(chunks * width)?;
        let numbers = self.work(8 * (256 + 2))?;
        let (scalars, partial) = (numbers.address(), numbers.address() + 16);
        launch!(self, c"adafactor_rows", Size::rows(height), [rows, g, height, width, beta2, scale])?;
        launch!(self, c"adafactor_columns", by_columns, [&sums, g, height, width, chunk, scale])?;
        launch!(
            self,
            c"adafactor_blend",
            Size::partials(width),
            [columns, &sums, chunks, height, width, beta2]
        )?;
        launch!(self, c"adafactor_mean", Size::blocks(1, 256), [scalars, rows, height])?;
        let size = Size::of(height, 8, 256, [32, 8, 1]);
        launch!(
            self,
            c"adafactor_squares",
            size,
            [partial, g, rows, columns, scalars, height, width, scale]
        )?;
        launch!(self, c"sum_f64", Size::blocks(1, 256), [scalars + 8, partial, size.grid[0]])?;
        let keep = (1.0 - step.lr * step.weight_decay) as f32;
        launch!(
            self,
            c"adafactor_apply",
            Size::matrix(height, width),
            [p, copy, g, rows, columns, scalars, height, width, keep, step.lr, scale]
        )
    }

    pub(super) fn step_adafactor_vector(&self, step: Adafactor, p: View, g: View, v: View) -> Result<()> {
        let (copy, n) = (self.copy_of_all(p)?, p.len());
        let ([v], [p, g]) = self.addresses([v], [p, g])?;
        let numbers = self.work(8 * (256 + 2))?;
        let (scalars, partial) = (numbers.address(), numbers.address() + 16);
        let size = Size::of(n, 1024, 256, [256, 1, 1]);
        let (beta2, scale) = (step.beta2() as f32, step.gradient_scale);
        launch!(self, c"adafactor_vector", size, [partial, v, g, n as u64, beta2, scale])?;
        launch!(self, c"sum_f64", Size::blocks(1, 256), [scalars + 8, partial, size.grid[0]])?;
        let keep = (1.0 - step.lr * step.weight_decay) as f32;
        launch!(
            self,
            c"adafactor_vector_apply",
            Size::elements(n),
            [p, copy, g, v, scalars, n as u64, keep, step.lr, scale]
        )
    }

    pub(super) fn step_sgd(&self, step: Sgd, p: View, g: View, m: Option<View>) -> Result<()> {
        let runs = self.runs(p)?;
        let ([m], [p, g]) = self.addresses([or_none(m)], [p, g])?;
        let (rate, momentum, decay) = (step.lr as f32, step.momentum as f32, step.weight_decay as f32);
        for Run { first, len, copy } in runs {
            let at = |start: u64| if start == 0 { 0 } else { start + 4 * first as u64 };
            launch!(
                self,
                c"sgd",
                Size::elements(len),
                [at(p), copy, at(g), at(m), len as u64, rate, momentum, decay, step.gradient_scale]
            )?;
        }
        Ok(())
    }
}
