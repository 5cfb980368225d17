//! Norms.

use super::Cuda;
use super::allocation::Work;
use super::launch::{Size, launch, small};
use crate::Result;
use crate::kernels::{Norm, View};

/// Groups of columns that are normalised separately.
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

    /// Size `N` of kernels.h.
    fn size(&self) -> Size {
        match self.width <= 512 {
            true => Size::of(self.count, 8, 65536, [32, 8, 1]),
            false => Size::of(self.count, 1, 65536, [256, 1, 1]),
        }
    }
}

impl Cuda {
    pub(super) fn normalise(&self, norm: Norm, y: View, stats: View, [x, w, b]: [View; 3]) -> Result<()> {
        let ([to, stats], [from, weights, bias]) = self.addresses([y, stats], [x, w, b])?;
        let groups = Groups::of(x, w);
        let (size, Groups { count, per_row, width }) = (groups.size(), groups);
        let (y_stride, x_stride) = (y.stride(), x.stride());
        match norm {
            Norm::Rms { eps, offset } => launch!(
                self,
                c"rms_norm",
                size,
                [to, y_stride, stats, from, x_stride, weights, bias, count, per_row, width, eps, offset]
            ),
            Norm::Layer { eps } => launch!(
                self,
                c"layer_norm",
                size,
                [to, y_stride, stats, from, x_stride, weights, bias, count, per_row, width, eps]
            ),
        }
    }

    pub(super) fn normalise_again(
        &self,
        norm: Norm,
        y: View,
        stats: View,
        [x, w, b]: [View; 3],
    ) -> Result<()> {
        let ([to], [stats, from, weights, bias]) = self.addresses([y], [stats, x, w, b])?;
        let Groups { count, per_row, width } = Groups::of(x, w);
        let (y_stride, x_stride) = (y.stride(), x.stride());
        let (offset, layer) = (norm.offset(), matches!(norm, Norm::Layer { .. }));
        launch!(
            self,
            c"norm_again",
            Size::matrix(count, width),
            [to, y_stride, stats, from, x_stride, weights, bias, count, per_row, width, offset, layer]
        )
    }

    pub(super) fn normalise_backward(
        &self,
        norm: Norm,
        [dx, dw, db]: [View; 3],
        [dy, stats, x, w]: [View; 4],
    ) -> Result<()> {
        let (strides, outs) = ([dx, dy, x].map(View::stride), [dx, dw, db]);
        let ([to, to_w, to_b], [from, stats, input, weights]) = self.addresses(outs, [dy, stats, x, w])?;
        let Groups { count, per_row, width } = Groups::of(x, w);
        let size = match width <= 512 {
            true => Size::of(count, 8, 256, [32, 8, 1]),
            false => Size::of(count, 1, 256, [256, 1, 1]),
        };
        let chunks = size.grid[0] as usize;
        let partial = |wanted: u64| match wanted {
            0 => Ok(None),
            _ => self.floats(chunks * width).map(Some),
        };
        let (w_partial, b_partial) = (partial(to_w)?, partial(to_b)?);
        let sums = w_partial.is_some() as u32 + b_partial.is_some() as u32;
        let start = |partial: &Option<Work>| partial.as_ref().map_or(0, Work::address);
        let (w_at, b_at) = (start(&w_partial), start(&b_partial));
        let [dx_stride, dy_stride, x_stride] = strides;
        let (offset, layer) = (norm.offset(), matches!(norm, Norm::Layer { .. }));
        launch!(
            self,
            c"norm_backward",
            size.with_shared(sums * size.block[1] * small(width)? * 4),
            [
                to, dx_stride, w_at, b_at, from, dy_stride, stats, input, x_stride, weights, count, per_row,
                width, offset, layer
            ]
        )?;
        for (to, partial) in [(to_w, w_partial), (to_b, b_partial)] {
            if let Some(partial) = partial {
                self.sum_partials(to, &partial, chunks, width, 0, true)?;
            }
        }
        Ok(())
    }
}
