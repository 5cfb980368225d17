//! The operations of the backend, run by our kernels.

use super::allocation::{Allocation, Work};
use super::copies::DeviceBuffer;
use super::driver::Move;
use super::launch::{Size, launch, small};
use super::packed::DevicePacked;
use super::{Cuda, DeviceList, DeviceTensor, LOGITS, as_bytes, as_bytes_mut, lies_as};
use crate::Result;
use crate::collective::Collective;
use crate::dtype::WeightType;
use crate::kernels::check::{self, or_none};
use crate::kernels::stored::Elements;
use crate::kernels::{
    Activation, Adafactor, AdamW, Attention, AttentionPlan, Backend, Buffer, ByteBuffer, Bytes, Draw,
    Dropout, Dtype, FileBuffer, FileTensor, IndexBuffer, Indices, Norm, PlanBuffer, Routes, Routing, Sgd,
    View,
};

impl Cuda {
    /// `out[j] (+)= Σ of partial[chunks, width] / divisors`.
    pub(super) fn sum_partials(
        &self,
        out: u64,
        partial: &Work,
        chunks: usize,
        width: usize,
        divisors: u64,
        accumulate: bool,
    ) -> Result<()> {
        let size = Size::partials(width);
        launch!(self, c"sum_partials", size, [out, partial, chunks, width, divisors, accumulate])
    }

    /// Scratch memory for `n` f32 values.
    pub(super) fn floats(&self, n: usize) -> Result<Work> {
        self.work(n.saturating_mul(4))
    }

    /// Uploads a list whose numbers are below `bound`.
    pub(super) fn keep_list(
        &mut self,
        memory: Allocation,
        len: usize,
        bound: usize,
        slots: Option<usize>,
    ) -> IndexBuffer {
        self.memory.keep_indices(DeviceList { memory, len, slots }, len, bound)
    }
}

impl Backend for Cuda {
    fn allocate(&mut self, len: usize) -> Result<Buffer> {
        self.memory.collect();
        let memory = Allocation::zeros(&self.driver, len.saturating_mul(4))?;
        Ok(self.memory.add_buffer(DeviceBuffer::new(memory), 0, len))
    }

    fn allocate_bytes(&mut self, len: usize) -> Result<ByteBuffer> {
        self.memory.collect();
        let memory = Allocation::zeros(&self.driver, len)?;
        Ok(self.memory.keep_bytes(memory, len))
    }

    fn write_bytes(&mut self, to: Bytes, from: &[u8]) -> Result<()> {
        check::bytes(to, from.len())?;
        self.memory.kept_bytes(to)?.write(to.range().start, from)
    }

    fn read_bytes(&self, from: Bytes, to: &mut [u8]) -> Result<()> {
        check::bytes(from, to.len())?;
        self.memory.kept_bytes(from)?.read(from.range().start, to)
    }

    fn map(&mut self, tensor: FileTensor) -> Result<FileBuffer> {
        let (len, dtype) = (tensor.len(), tensor.dtype());
        let kept = match tensor.elements() {
            Elements::Plain(bytes, kind) => {
                let memory = Some(Allocation::of(&self.driver, bytes)?);
                DeviceTensor { memory, size: kind.bytes(), copy: None, packed: None }
            }
            Elements::Packed(packed) => {
                let packed = Some(self.upload_packed(packed)?);
                DeviceTensor { memory: None, size: 1, copy: None, packed }
            }
        };
        Ok(self.memory.keep_file(kept, len, dtype))
    }

    fn allocated(&self) -> u64 {
        self.memory.sizes(DeviceBuffer::bytes, Allocation::bytes, |tensor| {
            tensor.packed.as_ref().map_or(0, DevicePacked::bytes)
        })
    }

    fn logits(&self) -> usize {
        LOGITS
    }

    fn keep_factor(&mut self, w: View, alone: bool) -> Result<()> {
        self.keep(w, alone)
    }

    fn share_factor(&mut self, x: View) -> Result<()> {
        self.share(x)
    }

    fn release_factor(&mut self, x: View) {
        self.release(x);
    }

    fn copy_bytes(&self, kind: WeightType) -> usize {
        if self.keeps_copies { self.precision.copy_bytes(kind) } else { 0 }
    }

    fn upload_indices(&mut self, values: &[u32]) -> Result<IndexBuffer> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        let memory = Allocation::of(&self.driver, &bytes)?;
        let bound = values.iter().max().map_or(0, |&largest| largest as usize + 1);
        let are_offsets = values.first() == Some(&0) && values.is_sorted();
        let slots = values.last().filter(|_| are_offsets).map(|last| *last as usize);
        Ok(self.keep_list(memory, values.len(), bound, slots))
    }

    fn upload_plan(&mut self, plan: AttentionPlan) -> Result<PlanBuffer> {
        self.plan(plan)
    }

    fn begin_pass(&mut self, kind: &[u64]) -> Result<()> {
        self.memory.collect();
        self.renew_all()?;
        self.driver.begin_pass(kind)
    }

    fn end_pass(&mut self) -> Result<()> {
        self.driver.end_pass()
    }

    fn sync(&mut self) -> Result<()> {
        self.memory.collect();
        self.driver.synchronise()
    }

    fn write(&mut self, to: View, from: &[f32]) -> Result<()> {
        check::transfer(to, from.len())?;
        self.target(to)?;
        match from.is_empty() {
            true => Ok(()),
            false => self.memory.buffer(to)?.write(to.start, as_bytes(from)),
        }
    }

    fn read(&self, from: View, to: &mut [f32]) -> Result<()> {
        check::transfer(from, to.len())?;
        match to.is_empty() {
            true => Ok(()),
            false => self.memory.buffer(from)?.read(from.start, as_bytes_mut(to)),
        }
    }

    fn fill(&mut self, x: View, value: f32) -> Result<()> {
        check::element_wise(x)?;
        let ([to], []) = self.addresses([x], [])?;
        let n = x.len();
        launch!(self, c"fill", Size::elements(n), [to, n as u64, value])
    }

    fn scale(&mut self, x: View, factor: f32) -> Result<()> {
        check::element_wise(x)?;
        let ([to], []) = self.addresses([x], [])?;
        let n = x.len();
        launch!(self, c"scale", Size::elements(n), [to, n as u64, factor])
    }

    fn copy(&mut self, y: View, x: View) -> Result<()> {
        check::copy(y, x)?;
        let ([to], [from]) = self.addresses([y], [x])?;
        if x.len() == 0 {
            return Ok(());
        }
        if y.is_contiguous() && x.is_contiguous() {
            // SAFETY: both views are inside their memory, have the same number of elements and do not overlap.
            return unsafe { self.driver.copy(to, from, 4 * x.len()) };
        }
        let (rows, width) = (x.rows(), x.width());
        launch!(
            self,
            c"copy_rows",
            Size::matrix(rows, width),
            [to, y.stride(), from, x.stride(), rows, width]
        )
    }

    fn blend(&mut self, y: View, x: View, share: f32) -> Result<()> {
        check::add(y, x)?;
        let ([to], [from]) = self.addresses([y], [x])?;
        let n = x.len();
        launch!(self, c"blend", Size::elements(n), [to, from, n as u64, share])
    }

    fn swap(&mut self, x: View, y: View) -> Result<()> {
        check::add(y, x)?;
        let ([a, b], []) = self.addresses([x, y], [])?;
        let n = x.len();
        launch!(self, c"swap", Size::elements(n), [a, b, n as u64])
    }

    fn add(&mut self, y: View, x: View) -> Result<()> {
        check::add(y, x)?;
        let ([to], [from]) = self.addresses([y], [x])?;
        let n = x.len();
        launch!(self, c"add", Size::elements(n), [to, from, n as u64])
    }

    fn gather(&mut self, y: View, x: View, rows: Indices) -> Result<()> {
        check::gather(y, x, rows)?;
        let ([to], [from]) = self.addresses([y], [x])?;
        let (list, count, width) = (self.list(rows)?, y.rows(), y.width());
        let kernel = match lies_as(x) {
            WeightType::F32 => c"gather_f32",
            WeightType::BF16 => c"gather_bf16",
            WeightType::F16 => c"gather_f16",
        };
        launch!(
            self,
            kernel,
            Size::matrix(count, width),
            [to, from, x.stride(), x.column(), list, count, width]
        )
    }

    fn scatter_add(&mut self, y: View, x: View, rows: Indices) -> Result<()> {
        check::scatter_add(y, x, rows)?;
        let ([to], [from]) = self.addresses([y], [x])?;
        let (list, count, width) = (self.list(rows)?, x.rows(), x.width());
        let links = self.floats(count)?;
        launch!(
            self,
            c"scatter_links",
            Size::of(count, 256, usize::MAX, [256, 1, 1]),
            [&links, list, count]
        )?;
        let grid = [width.div_ceil(128).min(256) as u32, count.min(65535) as u32, 1];
        launch!(self, c"scatter_add", Size::new(grid, [128, 1, 1]), [to, from, list, &links, count, width])
    }

    fn norm(&mut self, norm: Norm, y: View, stats: View, x: View, w: View, b: Option<View>) -> Result<()> {
        check::norm(norm, y, stats, x, w, b)?;
        self.normalise(norm, y, stats, [x, w, or_none(b)])
    }

    fn norm_again(&mut self, n: Norm, y: View, stats: View, x: View, w: View, b: Option<View>) -> Result<()> {
        check::norm_again(n, y, stats, x, w, b)?;
        self.normalise_again(n, y, stats, [x, w, or_none(b)])
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
        self.normalise_backward(norm, [dx, or_none(dw), or_none(db)], [dy, stats, x, w])
    }

    fn linear(&mut self, y: View, accumulate: bool, x: View, w: View, b: Option<View>) -> Result<()> {
        check::linear(y, x, w, b)?;
        self.product(y, accumulate, (x, false), (w, true), b)
    }

    fn linear_dx(&mut self, dx: View, accumulate: bool, dy: View, w: View) -> Result<()> {
        check::linear_dx(dx, dy, w)?;
        self.product(dx, accumulate, (dy, false), (w, false), None)
    }

    fn linear_dw(&mut self, dw: View, accumulate: bool, dy: View, x: View) -> Result<()> {
        check::linear_dw(dw, dy, x)?;
        self.product(dw, accumulate, (dy, true), (x, false), None)
    }

    fn linear_db(&mut self, db: View, accumulate: bool, dy: View) -> Result<()> {
        check::linear_db(db, dy)?;
        let ([to], [from]) = self.addresses([db], [dy])?;
        let (rows, width) = (dy.rows(), dy.width());
        let (size, chunk, chunks) = Size::columns(rows, width);
        let partial = self.floats(chunks * width)?;
        launch!(self, c"column_sums", size, [&partial, from, dy.stride(), rows, width, chunk])?;
        self.sum_partials(to, &partial, chunks, width, 0, accumulate)
    }

    fn row_norms(&mut self, n: View, w: View, b: View, a: View, scale: f32) -> Result<()> {
        check::row_norms(n, w, b, a)?;
        let unpacked = match w.dtype() {
            Dtype::Packed(_) => Some(self.unpacked(w, false)?),
            Dtype::F32 | Dtype::File(_) => None,
        };
        let weights = unpacked.as_ref().map_or_else(|| self.source(w), |(at, _)| Ok(*at))?;
        let ([to], [b, low]) = self.addresses([n], [b, a])?;
        let row = if unpacked.is_some() { w.width() } else { w.stride() };
        let (outputs, inputs, rank) = (w.rows(), w.width(), a.rows());
        let size = Size::of(outputs, 8, usize::MAX, [256, 1, 1]).with_shared(8 * small(rank)? * 4);
        let kernel = match lies_as(w) {
            WeightType::F32 => c"row_norms_f32",
            WeightType::BF16 => c"row_norms_bf16",
            WeightType::F16 => c"row_norms_f16",
        };
        launch!(self, kernel, size, [to, weights, row, w.column(), b, low, outputs, inputs, rank, scale])
    }

    fn divide(&mut self, y: View, a: View, b: View) -> Result<()> {
        check::divide(y, a, b)?;
        let ([to], [a, b]) = self.addresses([y], [a, b])?;
        let n = y.len();
        launch!(self, c"divide", Size::elements(n), [to, a, b, n as u64])
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
        let ([to], [from, factors, bias]) = self.addresses([y], [x, factors, or_none(bias)])?;
        let (rows, width) = (x.rows(), x.width());
        launch!(
            self,
            c"scale_columns",
            Size::matrix(rows, width),
            [to, y.stride(), from, x.stride(), factors, bias, rows, width, accumulate]
        )
    }

    fn column_dots(&mut self, out: View, accumulate: bool, a: View, b: View, divisors: View) -> Result<()> {
        check::column_dots(out, a, b, divisors)?;
        let ([to], [left, right, divisors]) = self.addresses([out], [a, b, divisors])?;
        let (rows, width) = (a.rows(), a.width());
        let (size, chunk, chunks) = Size::columns(rows, width);
        let partial = self.floats(chunks * width)?;
        launch!(
            self,
            c"column_dots",
            size,
            [&partial, left, a.stride(), right, b.stride(), rows, width, chunk]
        )?;
        self.sum_partials(to, &partial, chunks, width, divisors, accumulate)
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
        let ([to], [angles]) = self.addresses([x], [table])?;
        let list = self.list(positions)?;
        let (rows, heads, half) = (x.rows(), x.width() / head_dim, table.width() / 2);
        if half == 0 {
            return Ok(());
        }
        launch!(
            self,
            c"rotate",
            Size::of(rows, 1, 65536, [128, 1, 1]),
            [to, x.stride(), rows, heads, head_dim, angles, half, list, inverse]
        )
    }

    fn dropout(&mut self, x: View, dropout: Dropout) -> Result<()> {
        check::dropout(x, dropout)?;
        let ([to], []) = self.addresses([x], [])?;
        let Draw { key, site } = dropout.draw;
        launch!(
            self,
            c"dropout",
            Size::draws(x.rows(), x.width()),
            [to, x.rows(), x.width(), key, site, dropout.limit(), dropout.kept()]
        )
    }

    fn add_noise(&mut self, x: View, sizes: View, draw: Draw) -> Result<()> {
        check::scale_rows(x, sizes)?;
        let ([to], [sizes]) = self.addresses([x], [sizes])?;
        let (rows, width) = (x.rows(), x.width());
        launch!(self, c"add_noise", Size::draws(rows, width), [to, sizes, rows, width, draw.key, draw.site])
    }

    fn attention(&mut self, a: Attention, o: View, lse: View, q: View, kv: View) -> Result<()> {
        check::attention(a, o, lse, q, kv)?;
        self.attend(a, [o, lse], [q, kv])
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
        self.attend_backward(a, [dq, dkv], [d_o, o, lse, q, kv])
    }

    fn activate(&mut self, f: Activation, a: View, up: View) -> Result<()> {
        check::activate(f, a, up)?;
        let ([to], [from]) = self.addresses([a], [up])?;
        let (rows, width) = (a.rows(), a.width());
        let kernel = match f {
            Activation::SwiGlu => c"swiglu",
            Activation::GeGluTanh => c"geglu_tanh",
            Activation::GeluTanh => c"gelu_tanh",
            Activation::Gelu => c"gelu",
        };
        launch!(self, kernel, Size::matrix(rows, width), [to, from, rows, width])
    }

    fn activate_backward(&mut self, f: Activation, dup: View, da: View, up: View) -> Result<()> {
        check::activate_backward(f, dup, da, up)?;
        let ([to], [da_at, from]) = self.addresses([dup], [da, up])?;
        let (rows, width) = (da.rows(), da.width());
        let kernel = match f {
            Activation::SwiGlu => c"swiglu_backward",
            Activation::GeGluTanh => c"geglu_tanh_backward",
            Activation::GeluTanh => c"gelu_tanh_backward",
            Activation::Gelu => c"gelu_backward",
        };
        launch!(self, kernel, Size::matrix(rows, width), [to, da_at, from, rows, width])
    }

    fn scale_rows(&mut self, x: View, factors: View) -> Result<()> {
        check::scale_rows(x, factors)?;
        let ([to], [factors]) = self.addresses([x], [factors])?;
        let (rows, width) = (x.rows(), x.width());
        launch!(self, c"scale_rows", Size::matrix(rows, width), [to, factors, rows, width])
    }

    fn row_dots(&mut self, out: View, a: View, b: View) -> Result<()> {
        check::row_dots(out, a, b)?;
        let ([to], [left, right]) = self.addresses([out], [a, b])?;
        launch!(self, c"row_dots", Size::rows(a.rows()), [to, left, right, a.rows(), a.width()])
    }

    fn route(&mut self, r: Routing, probabilities: View, weights: View) -> Result<Routes> {
        check::route(r, probabilities, weights)?;
        self.choose(r, probabilities, weights)
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
        self.choose_backward(r, d_logits, [probabilities, d_weights], routes)
    }

    fn grouped_linear(&mut self, y: View, x: View, w: &[View], offsets: Indices) -> Result<()> {
        check::grouped(y, x, w, offsets)?;
        self.grouped(false, y, x, w, offsets)
    }

    fn grouped_linear_dx(&mut self, dx: View, dy: View, w: &[View], offsets: Indices) -> Result<()> {
        check::grouped(dx, dy, w, offsets)?;
        self.grouped(true, dx, dy, w, offsets)
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
        check::grouped_dw(dw, first, dy, x, offsets)?;
        self.grouped_dw((dw, first), accumulate, [dy, x], offsets)
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
        let ([to, x], [weights]) = self.addresses([losses, logits], [or_none(weights)])?;
        let (list, rows, softcap) = (self.list(ids)?, logits.rows(), softcap.unwrap_or(0.0));
        let size = Size::blocks(small(rows)?, 512);
        launch!(
            self,
            c"cross_entropy",
            size,
            [to, x, list, weights, rows, logits.width(), softcap, smoothing]
        )
    }

    fn sum_squares(&self, x: View) -> Result<f64> {
        self.squares(x)
    }

    fn adamw(&mut self, s: AdamW, p: View, g: View, m: View, v: View) -> Result<()> {
        check::adamw(p, g, m, v)?;
        self.step_adamw(s, p, g, m, v)
    }

    fn adamw_8bit(&mut self, s: AdamW, p: View, g: View, codes: [Bytes; 2], scales: [View; 2]) -> Result<()> {
        check::adamw_8bit(p, g, codes, scales)?;
        self.step_adamw_8bit(s, p, g, codes, scales)
    }

    fn adafactor(&mut self, s: Adafactor, p: View, g: View, rows: View, columns: Option<View>) -> Result<()> {
        check::adafactor(p, g, rows, columns)?;
        match columns {
            Some(columns) => self.step_adafactor(s, p, g, rows, columns),
            None => self.step_adafactor_vector(s, p, g, rows),
        }
    }

    fn sgd(&mut self, s: Sgd, p: View, g: View, m: Option<View>) -> Result<()> {
        check::sgd(p, g, m)?;
        self.step_sgd(s, p, g, m)
    }

    fn join(&mut self, collective: &dyn Collective) -> Result<()> {
        self.join_ranks(collective)
    }

    fn all_reduce(&mut self, x: View, collective: &dyn Collective) -> Result<()> {
        check::element_wise(x)?;
        self.sum_over_ranks(x, collective)
    }

    fn reduce_scatter(&mut self, x: View, cuts: &[usize], collective: &dyn Collective) -> Result<()> {
        check::shares(x, cuts, collective.ranks())?;
        self.exchange_shares(Move::Sum, x, cuts, collective)
    }

    fn all_gather(&mut self, x: View, cuts: &[usize], collective: &dyn Collective) -> Result<()> {
        check::shares(x, cuts, collective.ranks())?;
        self.exchange_shares(Move::Copy, x, cuts, collective)
    }
}
