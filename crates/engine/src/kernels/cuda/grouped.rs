//! Linear layers of a mixture of experts: the card alone knows which rows are of which expert.

use super::allocation::Allocation;
use super::launch::{Size, launch, pair, small};
use super::{Cuda, Precision, lies_as};
use crate::Result;
use crate::dtype::WeightType;
use crate::kernels::check::{self, rule};
use crate::kernels::{Indices, View, experts};

/// Rows and columns of a tile.
const SIDE: usize = 64;

/// Words of a `GroupedPiece`.
const WORDS: usize = 3;

/// Where the weights of all experts lie.
struct Weights {
    /// `GroupedPiece`s, `[experts, pieces]`.
    address: u64,
    pieces: usize,
}

impl Cuda {
    /// A launch of 64 × 64 tiles.
    fn tiles(&self, grid: [usize; 3]) -> Result<Size> {
        let [x, y, z] = grid;
        let parts = if self.precision == Precision::Bf16 { 1 } else { 3 };
        Ok(Size::new([small(x)?, small(y)?, small(z)?], [128, 1, 1]).with_shared(8192 * parts))
    }

    /// The address of offsets that are in order. Only the card knows those that it has found itself.
    fn offsets(&self, offsets: Indices, slots: usize) -> Result<u64> {
        let (list, range) = self.memory.list(offsets)?;
        let fits = list.slots == Some(slots) && range == (0..list.len);
        rule!("experts", fits, "a list that is not the offsets of {slots} slots");
        self.list(offsets)
    }

    /// The table of the experts' weights, which is uploaded once for the same views.
    fn weights(&mut self, w: &[View], experts: usize, outputs: usize) -> Result<Weights> {
        let of_experts = experts::of_experts(w, experts, outputs)?;
        let pieces = of_experts.iter().map(Vec::len).max().unwrap_or(0);
        let mut words = Vec::with_capacity(experts * pieces * WORDS);
        for of_expert in &of_experts {
            for (rows, view) in of_expert {
                rule!("experts", view.column() == 1, "weights that lie as their transpose");
                let (address, kind) = match self.copy_of(*view)? {
                    Some(copy) => (copy, WeightType::BF16),
                    None => (self.source(*view)?, lies_as(*view)),
                };
                let kind = match kind {
                    WeightType::F32 => 0,
                    WeightType::BF16 => 1,
                    WeightType::F16 => 2,
                };
                words.push(address);
                words.push(pair(small(rows.start)?, small(rows.end)?));
                words.push(pair(small(view.stride())?, kind));
            }
            // No row looks at these.
            words.resize(words.len() + (pieces - of_expert.len()) * WORDS, u64::MAX);
        }
        if !self.tables.contains_key(&words) {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            self.tables.insert(words.clone(), Allocation::kept(&self.driver, &bytes)?);
        }
        Ok(Weights { address: self.tables.get(&words).map_or(0, Allocation::address), pieces })
    }

    pub(super) fn grouped_linear(&mut self, y: View, x: View, w: &[View], offsets: Indices) -> Result<()> {
        check::grouped(y, x, offsets)?;
        let (list, experts) = (self.offsets(offsets, x.rows())?, offsets.len() - 1);
        let weights = self.weights(w, experts, y.width())?;
        let ([to], [from]) = self.addresses([y], [x])?;
        check::apart(&[y], w)?;
        let size = self.tiles([x.rows().div_ceil(SIDE) + experts, y.width().div_ceil(SIDE), 1])?;
        let (outputs, inputs) = (small(y.width())?, small(x.width())?);
        let kernel = match self.precision {
            Precision::Bf16 => c"grouped_linear_bf16",
            _ => c"grouped_linear_f32",
        };
        self.grouped(kernel, size, [to, from, list], weights, experts, [outputs, inputs])
    }

    pub(super) fn grouped_dx(&mut self, dx: View, dy: View, w: &[View], offsets: Indices) -> Result<()> {
        check::grouped(dx, dy, offsets)?;
        let (list, experts) = (self.offsets(offsets, dy.rows())?, offsets.len() - 1);
        let weights = self.weights(w, experts, dy.width())?;
        let ([to], [from]) = self.addresses([dx], [dy])?;
        check::apart(&[dx], w)?;
        let size = self.tiles([dy.rows().div_ceil(SIDE) + experts, dx.width().div_ceil(SIDE), 1])?;
        let (outputs, inputs) = (small(dy.width())?, small(dx.width())?);
        let kernel = match self.precision {
            Precision::Bf16 => c"grouped_dx_bf16",
            _ => c"grouped_dx_f32",
        };
        self.grouped(kernel, size, [to, from, list], weights, experts, [outputs, inputs])
    }

    fn grouped(
        &self,
        kernel: &'static std::ffi::CStr,
        size: Size,
        [to, from, list]: [u64; 3],
        weights: Weights,
        experts: usize,
        [outputs, inputs]: [u32; 2],
    ) -> Result<()> {
        let (experts, pieces) = (small(experts)?, small(weights.pieces)?);
        launch!(self, kernel, size, [to, from, weights.address, pieces, list, experts, outputs, inputs])
    }

    pub(super) fn grouped_dw(
        &mut self,
        dw: View,
        first: usize,
        accumulate: bool,
        dy: View,
        x: View,
        offsets: Indices,
    ) -> Result<()> {
        check::grouped(dy, x, offsets)?;
        check::element_wise(dw)?;
        let (experts, outputs, rows) = (offsets.len() - 1, dy.width(), dw.rows());
        let fits = dw.width() == x.width() && first.saturating_add(rows) <= experts.saturating_mul(outputs);
        rule!("experts", fits, "{dw:?} from row {first} of {experts} experts of {outputs} by {x:?}");
        let ([to], [dy_at, x_at]) = self.addresses([dw], [dy, x])?;
        let list = self.offsets(offsets, dy.rows())?;
        // Those whose outputs the rows reach.
        let reached = (first + rows).div_ceil(outputs) - first / outputs;
        let size = self.tiles([x.width().div_ceil(SIDE), outputs.min(rows).div_ceil(SIDE), reached])?;
        let arguments = (small(first)?, small(rows)?, small(experts)?, small(outputs)?, small(x.width())?);
        let (first, rows, experts, outputs, inputs) = arguments;
        let kernel = match self.precision {
            Precision::Bf16 => c"grouped_dw_bf16",
            _ => c"grouped_dw_f32",
        };
        launch!(
            self,
            kernel,
            size,
            [to, first, rows, accumulate, dy_at, x_at, list, experts, outputs, inputs]
        )
    }
}
