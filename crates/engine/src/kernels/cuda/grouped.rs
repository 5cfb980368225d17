//! A mixture of experts: only the card knows which rows belong to which expert.

use super::allocation::Allocation;
use super::launch::{Size, launch, pair, small};
use super::{Cuda, Precision, lies_as};
use crate::Result;
use crate::dtype::WeightType;
use crate::kernels::check::rule;
use crate::kernels::{Indices, Routes, Routing, View, experts};

/// Rows and columns of a tile.
const SIDE: usize = 64;

/// Words of a `GroupedPiece`.
const WORDS: usize = 3;

/// Where the weights of all experts are.
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

    /// The address of ascending offsets. The order of offsets that the card computed itself is known only there.
    fn offsets(&self, offsets: Indices, slots: usize) -> Result<u64> {
        let (list, range) = self.memory.list(offsets)?;
        let fits = list.slots == Some(slots) && range == (0..list.len);
        rule!("experts", fits, "a list that is not the offsets of {slots} slots");
        self.list(offsets)
    }

    /// The table of the experts' weights, uploaded once for the same views.
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
            // No row reads these entries.
            words.resize(words.len() + (pieces - of_expert.len()) * WORDS, u64::MAX);
        }
        if !self.tables.contains_key(&words) {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            self.tables.insert(words.clone(), Allocation::kept(&self.driver, &bytes)?);
        }
        Ok(Weights { address: self.tables.get(&words).map_or(0, Allocation::address), pieces })
    }

    /// `y = x · w[expert]ᵀ`, or, with `turned`, `y = x · w[expert]`.
    pub(super) fn grouped(
        &mut self,
        turned: bool,
        y: View,
        x: View,
        w: &[View],
        offsets: Indices,
    ) -> Result<()> {
        let (list, experts) = (self.offsets(offsets, x.rows())?, offsets.len() - 1);
        let (outputs, inputs) = if turned { (x.width(), y.width()) } else { (y.width(), x.width()) };
        let Weights { address, pieces } = self.weights(w, experts, outputs)?;
        let ([to], [from]) = self.addresses([y], [x])?;
        let size = self.tiles([x.rows().div_ceil(SIDE) + experts, y.width().div_ceil(SIDE), 1])?;
        let kernel = match (self.precision, turned) {
            (Precision::Bf16, false) => c"grouped_linear_bf16",
            (Precision::Bf16, true) => c"grouped_dx_bf16",
            (_, false) => c"grouped_linear_f32",
            (_, true) => c"grouped_dx_f32",
        };
        launch!(self, kernel, size, [to, from, address, pieces, list, experts, outputs, inputs])
    }

    /// `dw (+)= …`, where `dw` is the gradient of `dw.rows()` rows of the stacked weights, from row `first` on.
    pub(super) fn grouped_dw(
        &self,
        (dw, first): (View, usize),
        accumulate: bool,
        [dy, x]: [View; 2],
        offsets: Indices,
    ) -> Result<()> {
        let (experts, outputs, rows, inputs) = (offsets.len() - 1, dy.width(), dw.rows(), x.width());
        let ([to], [dy_at, x_at]) = self.addresses([dw], [dy, x])?;
        let list = self.offsets(offsets, dy.rows())?;
        // The experts whose outputs overlap the rows.
        let reached = (first + rows).div_ceil(outputs) - first / outputs;
        let size = self.tiles([inputs.div_ceil(SIDE), outputs.min(rows).div_ceil(SIDE), reached])?;
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

    /// Chooses the experts of rows, and assigns their slots.
    pub(super) fn choose(&mut self, r: Routing, probabilities: View, weights: View) -> Result<Routes> {
        let ([x, to], []) = self.addresses([probabilities, weights], [])?;
        let (rows, experts, per_row) = (probabilities.rows(), probabilities.width(), r.per_row);
        let slots = rows * per_row;
        let new = |len: usize| Allocation::zeros(&self.driver, 4 * len);
        let (slot_rows, offsets) = (new(slots)?, new(experts + 1)?);
        let (chosen, taken, counts) = (self.floats(slots)?, self.floats(slots)?, self.floats(experts)?);
        launch!(
            self,
            c"route_choose",
            Size::rows(rows),
            [x, &chosen, &taken, rows, experts, per_row, r.normalise]
        )?;
        let of_experts = Size::blocks(small(experts)?, 256);
        launch!(self, c"route_count", of_experts, [&counts, &chosen, slots])?;
        launch!(
            self,
            c"route_place",
            of_experts,
            [&slot_rows, &offsets, to, &chosen, &taken, &counts, slots, experts, per_row]
        )?;
        let rows = self.keep_list(slot_rows, slots, rows, None);
        let offsets = self.keep_list(offsets, experts + 1, slots + 1, Some(slots));
        Ok(Routes { rows, offsets })
    }

    /// The gradient of the logits given to [`Cuda::choose`].
    pub(super) fn choose_backward(
        &self,
        r: Routing,
        d_logits: View,
        [probabilities, d_weights]: [View; 2],
        routes: &Routes,
    ) -> Result<()> {
        let ([to], [p, d]) = self.addresses([d_logits], [probabilities, d_weights])?;
        let (slot_rows, offsets) = (self.list(routes.rows())?, self.list(routes.offsets())?);
        let (rows, experts) = (d_logits.rows(), d_logits.width());
        launch!(
            self,
            c"route_backward",
            Size::rows(rows),
            [to, p, d, slot_rows, offsets, rows, experts, r.normalise]
        )
    }
}
