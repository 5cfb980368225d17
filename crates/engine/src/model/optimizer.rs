//! The optimizer's step, and its state.
//!
//! The ranks of a run divide the trained parameters among them (ZeRO stage 1, Rajbhandari et al. 2020): each keeps the
//! state of its share, updates that share, and sends the result to the other ranks.

use super::{Model, part};
use crate::Result;
use crate::collective::Collective;
use crate::kernels::{Adafactor, AdamW, Backend, Buffer, ByteBuffer, QUANTISED_BLOCK as BLOCK, Sgd};
use crate::params::{Kind, Layout, Parameter, ParameterMap};
use std::ops::Range;
use std::sync::Arc;

/// Parameters with fewer elements have 32-bit states under [`Optimizer::AdamW8bit`] (bitsandbytes' `min_8bit_size`).
const SMALL: usize = 4096;

/// Optimizers, by the state that they keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Optimizer {
    /// Two moments for each element.
    #[default]
    AdamW,
    /// AdamW with moments of one byte; 32 bits for the embeddings and for small parameters, as the Trainer configures
    /// bitsandbytes.
    AdamW8bit,
    /// A mean square for each row and each column of a matrix, and for each element of a vector.
    Adafactor,
    /// No state, or, with momentum, the last direction.
    Sgd {
        /// Use momentum.
        momentum: bool,
    },
}

/// One step: settings that all parameters share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// Step number, from 1.
    pub t: u64,
    /// AdamW's decay of the first moment.
    pub beta1: f64,
    /// AdamW's decay of the second moment.
    pub beta2: f64,
    /// AdamW's epsilon, added to the root of the second moment.
    pub eps: f64,
    /// Momentum of [`Optimizer::Sgd`].
    pub momentum: f64,
    /// Gradients are multiplied by this first (clipping).
    pub gradient_scale: f32,
}

/// One step: settings of a single parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Learning rate.
    pub lr: f64,
    /// Weight decay.
    pub weight_decay: f64,
}

/// The ranks that divide the optimizer's state, and this model's rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) rank: usize,
    pub(super) ranks: usize,
}

/// Where the state of a parameter is stored, or of the part of it in a rank's share.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// In the f32 buffers, from this element on.
    Whole(usize),
    /// Codes and scales, from these elements of their buffers on.
    Codes(usize, usize),
    /// Mean squares of this many rows and columns, from this element of the first buffer on.
    Factors(usize, [usize; 2]),
}

/// The state of an optimizer.
#[derive(Debug)]
pub(super) struct State {
    pub(super) kind: Optimizer,
    pub(super) share: Share,
    /// Start of each rank's share among the trained elements, and the end of the last.
    pub(super) cuts: Vec<usize>,
    /// For each trained parameter, in order: its elements in this rank's share, and their state.
    pub(super) places: Vec<(Range<usize>, Place)>,
    /// First and second moments in f32, if the optimizer has them.
    pub(super) moments: [Buffer; 2],
    pub(super) codes: [ByteBuffer; 2],
    pub(super) scales: [Buffer; 2],
}

/// Sizes of the buffers of a [`State`].
#[derive(Clone, Copy, Default)]
struct Sizes {
    moments: [usize; 2],
    codes: usize,
    scales: usize,
}

impl Optimizer {
    /// Start of each rank's share among the trained elements, and the end of the last. Shares are as even as whole
    /// blocks of codes allow, and for Adafactor whole parameters.
    fn cuts(self, map: &ParameterMap, ranks: usize) -> Vec<usize> {
        let len = map.trained_len();
        let cut = |rank: usize| {
            let even = (len as u128 * rank as u128 / ranks as u128) as usize;
            let within = map.trained().map(|(_, range)| range).find(|range| range.contains(&even));
            let Some(range) = within else { return len };
            match self {
                Optimizer::Adafactor if even - range.start < range.end - even => range.start,
                Optimizer::Adafactor => range.end,
                _ => range.start + (even - range.start) / BLOCK * BLOCK,
            }
        };
        (0..=ranks).map(cut).collect()
    }

    /// The state of the trained elements of a share.
    fn lay_out(self, map: &ParameterMap, share: &Range<usize>) -> (Vec<(Range<usize>, Place)>, Sizes) {
        let mut sizes = Sizes::default();
        let mut place = |p: &Parameter, whole: usize, len: usize| {
            match self {
                Optimizer::AdamW8bit if whole >= SMALL && p.kind != Kind::Embedding => {
                    let place = Place::Codes(sizes.codes, sizes.scales);
                    sizes.codes = sizes.codes.saturating_add(len);
                    sizes.scales = sizes.scales.saturating_add(len.div_ceil(BLOCK));
                    return place;
                }
                Optimizer::Adafactor if p.shape.len() > 1 => {
                    let [rows, columns] = if len == 0 { [0, 0] } else { matrix(p, len) };
                    let place = Place::Factors(sizes.moments[0], [rows, columns]);
                    sizes.moments[0] = sizes.moments[0].saturating_add(rows.saturating_add(columns));
                    return place;
                }
                _ => {}
            }
            let place = Place::Whole(sizes.moments[0]);
            let kept = match self {
                Optimizer::AdamW | Optimizer::AdamW8bit => [len, len],
                Optimizer::Adafactor => [len, 0],
                Optimizer::Sgd { momentum } => [if momentum { len } else { 0 }, 0],
            };
            sizes.moments = [0, 1].map(|i| sizes.moments[i].saturating_add(kept[i]));
            place
        };
        let places = map.trained().map(|(p, range)| {
            let own = within(share, &range);
            let place = place(p, range.len(), own.len());
            (own, place)
        });
        (places.collect(), sizes)
    }

    /// The most bytes that a rank keeps.
    pub(super) fn bytes(self, map: &ParameterMap, ranks: usize) -> u64 {
        let cuts = self.cuts(map, ranks);
        let of_share = |cuts: &[usize]| {
            let (_, sizes) = self.lay_out(map, &(cuts[0]..cuts[1]));
            let floats = [sizes.moments[0], sizes.moments[1], sizes.scales, sizes.scales];
            let floats = floats.iter().fold(0u64, |sum, n| sum.saturating_add(*n as u64));
            floats.saturating_mul(4).saturating_add(2 * sizes.codes as u64)
        };
        cuts.windows(2).map(of_share).max().unwrap_or(0)
    }
}

/// The elements of a parameter that are in a share, counted from its first.
pub(super) fn within(share: &Range<usize>, parameter: &Range<usize>) -> Range<usize> {
    let place = |at: usize| at.clamp(parameter.start, parameter.end) - parameter.start;
    place(share.start)..place(share.end)
}

/// The two dimensions of a parameter in the engine's layout.
pub(super) fn matrix(p: &Parameter, len: usize) -> [usize; 2] {
    let outputs = if p.layout == Layout::Transposed { p.shape[1] } else { p.shape[0] };
    [outputs, len / outputs.max(1)]
}

impl State {
    pub(super) fn allocate(
        kind: Optimizer,
        share: Share,
        map: &ParameterMap,
        backend: &mut impl Backend,
    ) -> Result<State> {
        let cuts = kind.cuts(map, share.ranks);
        let (places, sizes) = kind.lay_out(map, &(cuts[share.rank]..cuts[share.rank + 1]));
        Ok(State {
            kind,
            share,
            cuts,
            places,
            moments: [backend.allocate(sizes.moments[0])?, backend.allocate(sizes.moments[1])?],
            codes: [backend.allocate_bytes(sizes.codes)?, backend.allocate_bytes(sizes.codes)?],
            scales: [backend.allocate(sizes.scales)?, backend.allocate(sizes.scales)?],
        })
    }

    /// This rank's share of the trained elements.
    pub(super) fn own(&self) -> Range<usize> {
        self.cuts[self.share.rank]..self.cuts[self.share.rank + 1]
    }
}

impl<B: Backend> Model<B> {
    /// Chooses the optimizer and discards the previous one's state.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] if there is not enough memory; [`crate::Error::Batch`] when the model does not train.
    pub fn choose_optimizer(&mut self, kind: Optimizer) -> Result<()> {
        let share = self.trained()?.optimizer.share;
        self.keep(kind, share)
    }

    /// Keeps optimizer state only for this rank's share of the trained parameters, and discards previous state.
    /// [`Model::update`] then changes only that share; see [`Model::reduce_gradients`]. Connects the devices of the
    /// ranks if they have their own transport. All ranks must call it.
    ///
    /// # Errors
    /// As [`Model::choose_optimizer`]; [`crate::Error::Device`] and [`crate::Error::Collective`] if the devices cannot
    /// connect.
    pub fn share_optimizer(&mut self, collective: &dyn Collective) -> Result<()> {
        self.backend.join(collective)?;
        let kind = self.trained()?.optimizer.kind;
        self.keep(kind, Share { rank: collective.rank(), ranks: collective.ranks() })
    }

    pub(super) fn keep(&mut self, kind: Optimizer, share: Share) -> Result<()> {
        let map = Arc::clone(&self.map);
        let kept = &self.trained()?.optimizer;
        if kept.kind != kind || kept.share != share {
            self.trained_mut()?.optimizer = State::allocate(kind, share, &map, &mut self.backend)?;
            self.plan = self.plan.optimized(kind, share.ranks, &map);
        }
        Ok(())
    }

    /// One step with the current gradients. `rates` gives the settings of each parameter, by its Hugging Face name and
    /// its role. If ranks share the optimizer, call [`Model::exchange_parameters`] afterwards.
    ///
    /// # Errors
    /// [`crate::Error::Batch`] when the model does not train.
    pub fn update(&mut self, update: &Update, rates: &dyn Fn(&Parameter) -> Rates) -> Result<()> {
        let g = self.settled()?;
        let map = Arc::clone(&self.map);
        let parameters = self.parameters.view();
        let state = &self.trained()?.optimizer;
        let (kind, places) = (state.kind, state.places.clone());
        let (moments, scales) =
            (state.moments.each_ref().map(Buffer::view), state.scales.each_ref().map(Buffer::view));
        let codes = state.codes.each_ref().map(ByteBuffer::view);
        /// This rank's piece of a parameter: its place among all and among the trained elements, and its state.
        struct Piece<'a> {
            at: Range<usize>,
            trained: Range<usize>,
            rates: Rates,
            place: &'a Place,
        }
        let of = |at: usize, own: &Range<usize>| at + own.start..at + own.end;
        let pieces = map.trained().zip(&places).filter(|(_, (own, _))| !own.is_empty());
        let pieces = pieces.map(|((p, range), (own, place))| Piece {
            at: of(p.range.start, own),
            trained: of(range.start, own),
            rates: rates(p),
            place,
        });
        let pieces: Vec<Piece> = pieces.collect();
        // Parameters with equal settings that are adjacent in all buffers are updated in one call.
        let together = |a: &Piece, b: &Piece| {
            let whole = matches!((a.place, b.place), (Place::Whole(_), Place::Whole(_)));
            let adjacent = a.at.end == b.at.start;
            whole && kind != Optimizer::Adafactor && adjacent && a.rates == b.rates
        };
        for run in pieces.chunk_by(together) {
            let (Piece { at, trained, rates, place }, last) = (&run[0], &run[run.len() - 1]);
            let len = last.trained.end - trained.start;
            let p = part(parameters, &(at.start..last.at.end));
            let g = part(g, &(trained.start..last.trained.end));
            let adamw = AdamW {
                t: update.t,
                lr: rates.lr,
                beta1: update.beta1,
                beta2: update.beta2,
                eps: update.eps,
                weight_decay: rates.weight_decay,
                decay_all: true,
                gradient_scale: update.gradient_scale,
            };
            let adafactor = Adafactor {
                t: update.t,
                lr: rates.lr,
                weight_decay: rates.weight_decay,
                gradient_scale: update.gradient_scale,
            };
            match (kind, place) {
                (_, Place::Codes(at, scale)) => {
                    let codes = codes.map(|codes| codes.part(*at, len));
                    let scales = scales.map(|scales| scales.part(*scale, len.div_ceil(BLOCK)));
                    self.backend.adamw_8bit(adamw, p, g, codes, scales)?;
                }
                (_, Place::Factors(at, [rows, columns])) => {
                    let (p, kept) = (p.matrix(*rows, *columns), moments[0].part(*at, rows + columns));
                    let kept = (kept.part(0, *rows), kept.part(*rows, *columns));
                    self.backend.adafactor(adafactor, p, g, kept.0, Some(kept.1))?;
                }
                (Optimizer::Adafactor, Place::Whole(at)) => {
                    self.backend.adafactor(adafactor, p, g, moments[0].part(*at, len), None)?;
                }
                (Optimizer::Sgd { momentum }, Place::Whole(at)) => {
                    let sgd = Sgd {
                        lr: rates.lr,
                        momentum: update.momentum,
                        weight_decay: rates.weight_decay,
                        gradient_scale: update.gradient_scale,
                    };
                    self.backend.sgd(sgd, p, g, momentum.then(|| moments[0].part(*at, len)))?;
                }
                (_, Place::Whole(at)) => {
                    let [m, v] = moments.map(|moments| moments.part(*at, len));
                    self.backend.adamw(adamw, p, g, m, v)?;
                }
            }
        }
        self.weights_changed();
        Ok(())
    }

    /// One step of AdamW with the current gradients.
    ///
    /// # Errors
    /// [`crate::Error::Batch`] when the model does not train.
    pub fn adamw(&mut self, step: &AdamW) -> Result<()> {
        let AdamW { t, lr, beta1, beta2, eps, gradient_scale, .. } = *step;
        let decay = |p: &Parameter| step.decay_all || p.kind.decays();
        let rates =
            |p: &Parameter| Rates { lr, weight_decay: if decay(p) { step.weight_decay } else { 0.0 } };
        self.update(&Update { t, beta1, beta2, eps, momentum: 0.0, gradient_scale }, &rates)
    }
}
