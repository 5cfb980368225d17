//! The operations, by our kernels.

use super::allocation::{Allocation, Work};
use super::copies::DeviceBuffer;
use super::driver::Move;
use super::launch::{Size, launch, small};
use super::packed::DevicePacked;
use super::{Cuda, DeviceList, DeviceTensor, LOGITS, as_bytes, as_bytes_mut, lies_as, or_none};
use crate::Result;
use crate::collective::Collective;
use crate::dtype::WeightType;
use crate::kernels::stored::Elements;
use crate::kernels::{
    Activation, Adafactor, AdamW, AttentionPlan, Backend, Buffer, ByteBuffer, Bytes, Draw, Dropout, Dtype,
    FileBuffer, FileTensor, Heads, IndexBuffer, Indices, Norm, PlanBuffer, Routes, Routing, Sgd, View, check,
};

/// Groups of columns that are normalised by themselves.
struct Groups {
    width: usize,
    per_row: usize,
    count: usize,
}

impl Groups {
    fn of(x: View, w: View) -> Groups {
        let (width, per_row) = (w.len(), x.width() / w.len());
        Groups { width, per_row, count: x.rows() * per_row }
    }

    /// `N` of kernels.h.
    fn size(&self) -> Size {
        match self.width <= 512 {
            true => Size::of(self.count, 8, 65536, [32, 8, 1]),
            false => Size::of(self.count, 1, 65536, [256, 1, 1]),
        }
    }
}

impl Cuda {
    /// `out[j] (+)= Σ of partial[chunks, width] / divisors`.
    fn sum_partials(
        &self,
        out: u64,
        partial: &Work,
        chunks: usize,
        width: usize,
        divisors: u64,
        accumulate: bool,
    ) -> Result<()> {
        let arguments = (out, partial.address(), small(chunks)?, small(width)?);
        let (out, partial, chunks, columns) = arguments;
        launch!(
            self,
            c"sum_partials",
            Size::partials(width),
            [out, partial, chunks, columns, divisors, accumulate]
        )
    }

    /// Work space of `n` f32 values.
    pub(super) fn floats(&self, n: usize) -> Result<Work> {
        self.work(n.saturating_mul(4))
    }

    /// A list; its numbers are below `bound`.
    fn keep_list(
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
            // SAFETY: both views are inside their memory, have as many elements and are apart.
            return unsafe { self.driver.copy(to, from, 4 * x.len()) };
        }
        let (rows, width) = (x.rows(), x.width());
        let (y_stride, x_stride) = (small(y.stride())?, small(x.stride())?);
        let arguments = (small(rows)?, small(width)?);
        launch!(
            self,
            c"copy_rows",
            Size::matrix(rows, width),
            [to, y_stride, from, x_stride, arguments.0, arguments.1]
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
        let list = self.list(rows)?;
        let (row, column, size) = (small(x.stride())?, small(x.column())?, Size::matrix(y.rows(), y.width()));
        let (count, width) = (small(y.rows())?, small(y.width())?);
        let kernel = match lies_as(x) {
            WeightType::F32 => c"gather_f32",
            WeightType::BF16 => c"gather_bf16",
            WeightType::F16 => c"gather_f16",
        };
        launch!(self, kernel, size, [to, from, row, column, list, count, width])
    }

    fn scatter_add(&mut self, y: View, x: View, rows: Indices) -> Result<()> {
        check::gather(x, y, rows)?;
        let ([to], [from]) = self.addresses([y], [x])?;
        let list = self.list(rows)?;
        let (n, wide) = (x.rows(), x.width());
        let (count, width) = (small(n)?, small(wide)?);
        let links = self.floats(n)?;
        launch!(
            self,
            c"scatter_links",
            Size::of(n, 256, usize::MAX, [256, 1, 1]),
            [links.address(), list, count]
        )?;
        let grid = [wide.div_ceil(128).min(256) as u32, n.min(65535) as u32, 1];
        launch!(
            self,
            c"scatter_add",
            Size::new(grid, [128, 1, 1]),
            [to, from, list, links.address(), count, width]
        )
    }

    fn norm(&mut self, norm: Norm, y: View, stats: View, x: View, w: View, b: Option<View>) -> Result<()> {
        check::norm(norm, y, stats, x, w, b)?;
        let ([to, stats], [from, weights, bias]) = self.addresses([y, stats], [x, w, or_none(b)])?;
        let groups = Groups::of(x, w);
        let (y_stride, x_stride) = (small(y.stride())?, small(x.stride())?);
        let (count, per_row, width) = (small(groups.count)?, small(groups.per_row)?, small(groups.width)?);
        match norm {
            Norm::Rms { eps, offset } => launch!(
                self,
                c"rms_norm",
                groups.size(),
                [to, y_stride, stats, from, x_stride, weights, bias, count, per_row, width, eps, offset]
            ),
            Norm::Layer { eps } => launch!(
                self,
                c"layer_norm",
                groups.size(),
                [to, y_stride, stats, from, x_stride, weights, bias, count, per_row, width, eps]
            ),
        }
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
        let ([to], [stats, from, weights, bias]) = self.addresses([y], [stats, x, w, or_none(b)])?;
        let groups = Groups::of(x, w);
        let (y_stride, x_stride) = (small(y.stride())?, small(x.stride())?);
        let (count, per_row, width) = (small(groups.count)?, small(groups.per_row)?, small(groups.width)?);
        let layer = matches!(norm, Norm::Layer { .. });
        launch!(
            self,
            c"norm_again",
            Size::matrix(groups.count, groups.width),
            [to, y_stride, stats, from, x_stride, weights, bias, count, per_row, width, norm.offset(), layer]
        )
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
        let (outs, ins) = ([dx, or_none(dw), or_none(db)], [dy, stats, x, w]);
        let ([to, to_w, to_b], [from, stats, input, weights]) = self.addresses(outs, ins)?;
        let groups = Groups::of(x, w);
        let (dx_stride, dy_stride, x_stride) = (small(dx.stride())?, small(dy.stride())?, small(x.stride())?);
        let (count, per_row, width) = (small(groups.count)?, small(groups.per_row)?, small(groups.width)?);
        let size = match groups.width <= 512 {
            true => Size::of(groups.count, 8, 256, [32, 8, 1]),
            false => Size::of(groups.count, 1, 256, [256, 1, 1]),
        };
        let chunks = size.grid[0] as usize;
        let partial = |wanted: u64| match wanted {
            0 => Ok(None),
            _ => self.floats(chunks * groups.width).map(Some),
        };
        let (w_partial, b_partial) = (partial(to_w)?, partial(to_b)?);
        let sums = w_partial.is_some() as u32 + b_partial.is_some() as u32;
        let start = |partial: &Option<Work>| partial.as_ref().map_or(0, Work::address);
        let (w_at, b_at) = (start(&w_partial), start(&b_partial));
        let layer = matches!(norm, Norm::Layer { .. });
        launch!(
            self,
            c"norm_backward",
            size.with_shared(sums * size.block[1] * width * 4),
            [
                to,
                dx_stride,
                w_at,
                b_at,
                from,
                dy_stride,
                stats,
                input,
                x_stride,
                weights,
                count,
                per_row,
                width,
                norm.offset(),
                layer
            ]
        )?;
        for (to, partial) in [(to_w, w_partial), (to_b, b_partial)] {
            if let Some(partial) = partial {
                self.sum_partials(to, &partial, chunks, groups.width, 0, true)?;
            }
        }
        Ok(())
    }

    fn linear(&mut self, y: View, accumulate: bool, x: View, w: View, b: Option<View>) -> Result<()> {
        check::linear(y, x, w, b)?;
        check::apart(&[y], &[x, w, or_none(b)])?;
        self.product(y, accumulate, (x, false), (w, true), b)
    }

    fn linear_dx(&mut self, dx: View, accumulate: bool, dy: View, w: View) -> Result<()> {
        check::linear(dy, dx, w, None)?;
        check::apart(&[dx], &[dy, w])?;
        self.product(dx, accumulate, (dy, false), (w, false), None)
    }

    fn linear_dw(&mut self, dw: View, accumulate: bool, dy: View, x: View) -> Result<()> {
        check::linear(dy, x, dw, None)?;
        check::apart(&[dw], &[dy, x])?;
        self.product(dw, accumulate, (dy, true), (x, false), None)
    }

    fn linear_db(&mut self, db: View, accumulate: bool, dy: View) -> Result<()> {
        check::sum_rows(db, dy)?;
        let ([to], [from]) = self.addresses([db], [dy])?;
        let (rows, width) = (dy.rows(), dy.width());
        let (size, chunk, chunks) = Size::columns(rows, width);
        let partial = self.floats(chunks * width)?;
        let (stride, r, c, per) = (small(dy.stride())?, small(rows)?, small(width)?, small(chunk)?);
        launch!(self, c"column_sums", size, [partial.address(), from, stride, r, c, per])?;
        self.sum_partials(to, &partial, chunks, width, 0, accumulate)
    }

    fn row_norms(&mut self, n: View, w: View, b: View, a: View, scale: f32) -> Result<()> {
        check::row_norms(n, w, b, a)?;
        check::apart(&[n], &[w, b, a])?;
        let unpacked = match w.dtype() {
            Dtype::Packed(_) => Some(self.unpacked(w, false)?),
            Dtype::F32 | Dtype::File(_) => None,
        };
        let weights = unpacked.as_ref().map_or_else(|| self.source(w), |(at, _)| Ok(*at))?;
        let ([to], [b, low]) = self.addresses([n], [b, a])?;
        let row = if unpacked.is_some() { w.width() } else { w.stride() };
        let (row, column) = (small(row)?, small(w.column())?);
        let (outputs, inputs, rank) = (small(w.rows())?, small(w.width())?, small(a.rows())?);
        let size = Size::of(w.rows(), 8, usize::MAX, [256, 1, 1]).with_shared(8 * rank * 4);
        let kernel = match lies_as(w) {
            WeightType::F32 => c"row_norms_f32",
            WeightType::BF16 => c"row_norms_bf16",
            WeightType::F16 => c"row_norms_f16",
        };
        launch!(self, kernel, size, [to, weights, row, column, b, low, outputs, inputs, rank, scale])
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
        let (y_stride, x_stride) = (small(y.stride())?, small(x.stride())?);
        let (rows, width) = (small(x.rows())?, small(x.width())?);
        launch!(
            self,
            c"scale_columns",
            Size::matrix(x.rows(), x.width()),
            [to, y_stride, from, x_stride, factors, bias, rows, width, accumulate]
        )
    }

    fn column_dots(&mut self, out: View, accumulate: bool, a: View, b: View, divisors: View) -> Result<()> {
        check::column_dots(out, a, b, divisors)?;
        let ([to], [left, right, divisors]) = self.addresses([out], [a, b, divisors])?;
        let (rows, width) = (a.rows(), a.width());
        let (size, chunk, chunks) = Size::columns(rows, width);
        let partial = self.floats(chunks * width)?;
        let (a_stride, b_stride) = (small(a.stride())?, small(b.stride())?);
        let (r, c, per) = (small(rows)?, small(width)?, small(chunk)?);
        launch!(self, c"column_dots", size, [partial.address(), left, a_stride, right, b_stride, r, c, per])?;
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
        let half = small(table.width() / 2)?;
        if half == 0 {
            return Ok(());
        }
        let (stride, rows, heads) = (small(x.stride())?, small(x.rows())?, small(x.width() / head_dim)?);
        launch!(
            self,
            c"rotate",
            Size::of(x.rows(), 1, 65536, [128, 1, 1]),
            [to, stride, rows, heads, small(head_dim)?, angles, half, list, inverse]
        )
    }

    fn dropout(&mut self, x: View, dropout: Dropout) -> Result<()> {
        check::dropout(x, dropout)?;
        let ([to], []) = self.addresses([x], [])?;
        let (rows, width) = (small(x.rows())?, small(x.width())?);
        let Draw { key, site } = dropout.draw;
        launch!(
            self,
            c"dropout",
            Size::matrix(x.rows(), x.width().div_ceil(32) * 8),
            [to, rows, width, key, site, dropout.limit(), dropout.kept()]
        )
    }

    fn add_noise(&mut self, x: View, sizes: View, draw: Draw) -> Result<()> {
        check::each_row(x, sizes)?;
        let ([to], [sizes]) = self.addresses([x], [sizes])?;
        let (rows, width) = (small(x.rows())?, small(x.width())?);
        launch!(
            self,
            c"add_noise",
            Size::matrix(x.rows(), x.width().div_ceil(32) * 8),
            [to, sizes, rows, width, draw.key, draw.site]
        )
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
        self.attend(h, plan, dropout, [o, lse], [q, kv])
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
        self.attend_backward(h, plan, dropout, [dq, dkv], [do_, o, lse, q, kv])
    }

    fn activate(&mut self, f: Activation, a: View, up: View) -> Result<()> {
        check::activate(f, a, up)?;
        let ([to], [from]) = self.addresses([a], [up])?;
        let (size, rows, width) = (Size::matrix(a.rows(), a.width()), small(a.rows())?, small(a.width())?);
        let kernel = match f {
            Activation::SwiGlu => c"swiglu",
            Activation::GeGluTanh => c"geglu_tanh",
            Activation::GeluTanh => c"gelu_tanh",
            Activation::Gelu => c"gelu",
        };
        launch!(self, kernel, size, [to, from, rows, width])
    }

    fn activate_backward(&mut self, f: Activation, dup: View, da: View, up: View) -> Result<()> {
        check::activate(f, da, up)?;
        check::activate(f, da, dup)?;
        let ([to], [da_at, from]) = self.addresses([dup], [da, up])?;
        let (size, rows, width) =
            (Size::matrix(da.rows(), da.width()), small(da.rows())?, small(da.width())?);
        let kernel = match f {
            Activation::SwiGlu => c"swiglu_backward",
            Activation::GeGluTanh => c"geglu_tanh_backward",
            Activation::GeluTanh => c"gelu_tanh_backward",
            Activation::Gelu => c"gelu_backward",
        };
        launch!(self, kernel, size, [to, da_at, from, rows, width])
    }

    fn scale_rows(&mut self, x: View, factors: View) -> Result<()> {
        check::each_row(x, factors)?;
        let ([to], [factors]) = self.addresses([x], [factors])?;
        let (rows, width) = (small(x.rows())?, small(x.width())?);
        launch!(self, c"scale_rows", Size::matrix(x.rows(), x.width()), [to, factors, rows, width])
    }

    fn row_dots(&mut self, out: View, a: View, b: View) -> Result<()> {
        check::row_dots(out, a, b)?;
        let ([to], [left, right]) = self.addresses([out], [a, b])?;
        let (rows, width) = (small(a.rows())?, small(a.width())?);
        launch!(self, c"row_dots", Size::rows(a.rows()), [to, left, right, rows, width])
    }

    fn route(&mut self, r: Routing, probabilities: View, weights: View) -> Result<Routes> {
        check::route(r, probabilities, weights)?;
        let ([x, to], []) = self.addresses([probabilities, weights], [])?;
        let (rows, wide) = (probabilities.rows(), probabilities.width());
        let slots = rows * r.per_row;
        let (n, experts, per_row) = (small(slots)?, small(wide)?, small(r.per_row)?);
        let new = |len: usize| Allocation::zeros(&self.driver, 4 * len);
        let (slot_rows, offsets) = (new(slots)?, new(wide + 1)?);
        let (chosen, chosen_weights, counts) = (self.floats(slots)?, self.floats(slots)?, self.floats(wide)?);
        launch!(
            self,
            c"route_choose",
            Size::rows(rows),
            [x, chosen.address(), chosen_weights.address(), small(rows)?, experts, per_row, r.normalise]
        )?;
        launch!(self, c"route_count", Size::blocks(experts, 256), [counts.address(), chosen.address(), n])?;
        launch!(
            self,
            c"route_place",
            Size::blocks(experts, 256),
            [
                slot_rows.address(),
                offsets.address(),
                to,
                chosen.address(),
                chosen_weights.address(),
                counts.address(),
                n,
                experts,
                per_row
            ]
        )?;
        let rows = self.keep_list(slot_rows, slots, rows, None);
        let offsets = self.keep_list(offsets, wide + 1, slots + 1, Some(slots));
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
        let ([to], [p, d]) = self.addresses([d_logits], [probabilities, d_weights])?;
        let (slot_rows, offsets) = (self.list(routes.rows())?, self.list(routes.offsets())?);
        let (rows, experts) = (small(d_logits.rows())?, small(d_logits.width())?);
        launch!(
            self,
            c"route_backward",
            Size::rows(d_logits.rows()),
            [to, p, d, slot_rows, offsets, rows, experts, r.normalise]
        )
    }

    fn grouped_linear(&mut self, y: View, x: View, w: &[View], offsets: Indices) -> Result<()> {
        Cuda::grouped_linear(self, y, x, w, offsets)
    }

    fn grouped_linear_dx(&mut self, dx: View, dy: View, w: &[View], offsets: Indices) -> Result<()> {
        self.grouped_dx(dx, dy, w, offsets)
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
        self.grouped_dw(dw, first, accumulate, dy, x, offsets)
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
        let list = self.list(ids)?;
        let (rows, vocab) = (small(logits.rows())?, small(logits.width())?);
        launch!(
            self,
            c"cross_entropy",
            Size::blocks(rows, 512),
            [to, x, list, weights, rows, vocab, softcap.unwrap_or(0.0), smoothing]
        )
    }

    fn sum_squares(&self, x: View) -> Result<f64> {
        self.squares(x)
    }

    fn adamw(&mut self, step: AdamW, p: View, g: View, m: View, v: View) -> Result<()> {
        check::adamw(p, g, m, v)?;
        self.step_adamw(step, p, g, m, v)
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
        self.step_adamw_8bit(step, p, g, codes, scales)
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
        match columns {
            Some(columns) => self.step_adafactor(step, p, g, rows, columns),
            None => self.step_adafactor_vector(step, p, g, rows),
        }
    }

    fn sgd(&mut self, step: Sgd, p: View, g: View, m: Option<View>) -> Result<()> {
        check::sgd(p, g, m)?;
        self.step_sgd(step, p, g, m)
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
