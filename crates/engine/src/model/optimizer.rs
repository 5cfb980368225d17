//! The optimizer's step, and what it keeps between steps: in memory and in files.

use super::{Model, part};
use crate::Result;
use crate::dtype::WeightType;
use crate::kernels::{Adafactor, AdamW, Backend, Buffer, ByteBuffer, QUANTISED_BLOCK as BLOCK, Sgd, View};
use crate::params::{Kind, Layout, Parameter, ParameterMap};
use crate::weights::{self, Lazy};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Parameters with fewer elements have 32-bit states under [`Optimizer::AdamW8bit`] (bitsandbytes' `min_8bit_size`).
const SMALL: usize = 4096;

/// Optimizers, by what they keep.
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
    /// Nothing, or with momentum the last direction.
    Sgd {
        /// There is momentum.
        momentum: bool,
    },
}

/// One step: what all parameters share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// Step number, from 1.
    pub t: u64,
    /// AdamW's decay of the first moment.
    pub beta1: f64,
    /// AdamW's decay of the second moment.
    pub beta2: f64,
    /// AdamW's addition to the root of the second moment.
    pub eps: f64,
    /// Momentum of [`Optimizer::Sgd`].
    pub momentum: f64,
    /// Gradients are multiplied by this first (clipping).
    pub gradient_scale: f32,
}

/// One step: what parameters have of their own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Learning rate.
    pub lr: f64,
    /// Weight decay.
    pub weight_decay: f64,
}

/// Where the state of a parameter is.
#[derive(Clone, Debug)]
enum Place {
    /// In the f32 buffers, from here on.
    Whole(usize),
    /// Codes and scales, from here on in each of their buffers.
    Codes(usize, usize),
    /// Mean squares of this many rows and columns, from here on in the first buffer.
    Factors(usize, [usize; 2]),
}

/// What an optimizer keeps.
#[derive(Debug)]
pub(super) struct State {
    kind: Optimizer,
    /// Of each trained parameter, in their order.
    places: Vec<Place>,
    /// First and second moments in f32, as far as the optimizer has them.
    moments: [Buffer; 2],
    codes: [ByteBuffer; 2],
    scales: [Buffer; 2],
}

/// Sizes of the buffers of a [`State`].
#[derive(Clone, Copy, Default)]
struct Sizes {
    moments: [usize; 2],
    codes: usize,
    scales: usize,
}

impl Optimizer {
    fn lay_out(self, map: &ParameterMap) -> (Vec<Place>, Sizes) {
        let mut sizes = Sizes::default();
        let places = map.trained().map(|(p, range)| {
            let len = range.len();
            match self {
                Optimizer::AdamW8bit if len >= SMALL && p.kind != Kind::Embedding => {
                    let place = Place::Codes(sizes.codes, sizes.scales);
                    sizes.codes = sizes.codes.saturating_add(len);
                    sizes.scales = sizes.scales.saturating_add(len.div_ceil(BLOCK));
                    return place;
                }
                Optimizer::Adafactor if p.shape.len() > 1 => {
                    let [rows, columns] = matrix(p, len);
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
        });
        (places.collect(), sizes)
    }

    /// Bytes that it keeps.
    pub(super) fn bytes(self, map: &ParameterMap) -> u64 {
        let (_, sizes) = self.lay_out(map);
        let floats = [sizes.moments[0], sizes.moments[1], sizes.scales, sizes.scales];
        let floats = floats.iter().fold(0u64, |sum, n| sum.saturating_add(*n as u64));
        floats.saturating_mul(4).saturating_add(2 * sizes.codes as u64)
    }
}

/// The sides of a parameter as the engine has it.
fn matrix(p: &Parameter, len: usize) -> [usize; 2] {
    let outputs = if p.layout == Layout::Transposed { p.shape[1] } else { p.shape[0] };
    [outputs, len / outputs.max(1)]
}

impl State {
    pub(super) fn allocate(kind: Optimizer, map: &ParameterMap, backend: &mut impl Backend) -> Result<State> {
        let (places, sizes) = kind.lay_out(map);
        Ok(State {
            kind,
            places,
            moments: [backend.allocate(sizes.moments[0])?, backend.allocate(sizes.moments[1])?],
            codes: [backend.allocate_bytes(sizes.codes)?, backend.allocate_bytes(sizes.codes)?],
            scales: [backend.allocate(sizes.scales)?, backend.allocate(sizes.scales)?],
        })
    }
}

/// A tensor of the state of a parameter.
enum Kept {
    Floats(View, Vec<usize>),
    /// A parameter's own shape and layout.
    Like(View),
    Codes(crate::kernels::Bytes),
}

impl<B: Backend> Model<B> {
    /// Chooses the optimizer, and forgets what the one before has kept.
    ///
    /// # Errors
    /// [`Error::Memory`] where there is not enough; [`Error::Batch`] when the model does not train.
    pub fn choose_optimizer(&mut self, kind: Optimizer) -> Result<()> {
        let map = Arc::clone(&self.map);
        if self.trained()?.optimizer.kind != kind {
            self.trained_mut()?.optimizer = State::allocate(kind, &map, &mut self.backend)?;
            self.plan = self.plan.optimized(kind, &map);
        }
        Ok(())
    }

    /// One step with the gradients at hand. `rates` says what each parameter has, by its Hugging Face name and its role.
    ///
    /// # Errors
    /// [`Error::Batch`] when the model does not train.
    pub fn update(&mut self, update: &Update, rates: &dyn Fn(&Parameter) -> Rates) -> Result<()> {
        let g = self.settled()?;
        let map = Arc::clone(&self.map);
        let parameters = self.parameters.view();
        let trained: Vec<(&Parameter, Range<usize>, Rates)> =
            map.trained().map(|(p, range)| (p, range, rates(p))).collect();
        let state = &self.trained()?.optimizer;
        let (kind, places) = (state.kind, state.places.clone());
        let (moments, scales) =
            (state.moments.each_ref().map(Buffer::view), state.scales.each_ref().map(Buffer::view));
        let codes = state.codes.each_ref().map(ByteBuffer::view);
        let all: Vec<_> = trained.iter().zip(&places).collect();
        // Parameters that are alike and adjacent in all buffers are one call.
        let together = |a: &(&(&Parameter, Range<usize>, Rates), &Place),
                        b: &(&(&Parameter, Range<usize>, Rates), &Place)| {
            let whole = matches!((a.1, b.1), (Place::Whole(_), Place::Whole(_)));
            let adjacent = a.0.0.range.end == b.0.0.range.start;
            whole && kind != Optimizer::Adafactor && adjacent && a.0.2 == b.0.2
        };
        for run in all.chunk_by(together) {
            let ((first, range, rates), place) = run[0];
            let (last, ends, _) = run[run.len() - 1].0;
            let len = ends.end - range.start;
            let p = part(parameters, &(first.range.start..last.range.end));
            let g = part(g, &(range.start..ends.end));
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

    /// One step of AdamW with the gradients at hand.
    ///
    /// # Errors
    /// [`Error::Batch`] when the model does not train.
    pub fn adamw(&mut self, step: &AdamW) -> Result<()> {
        let AdamW { t, lr, beta1, beta2, eps, gradient_scale, .. } = *step;
        let decay = |p: &Parameter| step.decay_all || p.kind.decays();
        let rates =
            |p: &Parameter| Rates { lr, weight_decay: if decay(p) { step.weight_decay } else { 0.0 } };
        self.update(&Update { t, beta1, beta2, eps, momentum: 0.0, gradient_scale }, &rates)
    }

    /// The tensors of the optimizer's state, by the names that they have in files.
    fn kept(&self) -> Result<Vec<(String, &Parameter, Kept)>> {
        let state = &self.trained()?.optimizer;
        let moments = state.moments.each_ref().map(Buffer::view);
        let mut all = Vec::new();
        for ((p, range), place) in self.map.trained().zip(&state.places) {
            let len = range.len();
            let mut keep = |kind: &str, kept: Kept| all.push((format!("{kind}.{}", p.name), p, kept));
            match (state.kind, place) {
                (_, Place::Codes(at, scale)) => {
                    for (i, name) in ["exp_avg", "exp_avg_sq"].into_iter().enumerate() {
                        let scales = state.scales[i].view().part(*scale, len.div_ceil(BLOCK));
                        keep(&format!("{name}_codes"), Kept::Codes(state.codes[i].view().part(*at, len)));
                        keep(&format!("{name}_scales"), Kept::Floats(scales, vec![scales.len()]));
                    }
                }
                (_, Place::Factors(at, [rows, columns])) => {
                    let kept = moments[0].part(*at, rows + columns);
                    keep("exp_avg_sq_row", Kept::Floats(kept.part(0, *rows), vec![*rows]));
                    keep("exp_avg_sq_col", Kept::Floats(kept.part(*rows, *columns), vec![*columns]));
                }
                (Optimizer::Adafactor, Place::Whole(at)) => {
                    keep("exp_avg_sq", Kept::Like(moments[0].part(*at, len)));
                }
                (Optimizer::Sgd { momentum: false }, _) => {}
                (Optimizer::Sgd { momentum: true }, Place::Whole(at)) => {
                    keep("momentum_buffer", Kept::Like(moments[0].part(*at, len)));
                }
                (_, Place::Whole(at)) => {
                    keep("exp_avg", Kept::Like(moments[0].part(*at, len)));
                    keep("exp_avg_sq", Kept::Like(moments[1].part(*at, len)));
                }
            }
        }
        // All of one kind, then all of the next.
        all.sort_by_key(|(name, ..)| name.split('.').next().map(str::to_string));
        Ok(all)
    }

    /// Writes what the optimizer keeps of the trained parameters, exactly.
    ///
    /// # Errors
    /// [`Error::Io`] with the file; [`Error::Batch`] when the model does not train.
    pub fn save_optimizer(&self, path: &Path) -> Result<()> {
        let tensors: Vec<Lazy> = self
            .kept()?
            .into_iter()
            .map(|(name, p, kept)| match kept {
                Kept::Like(view) => Lazy {
                    name,
                    shape: p.shape.clone(),
                    kind: WeightType::F32,
                    read: Box::new(move || Ok(self.tensor(view, p, &(0..view.len()))?.data)),
                },
                Kept::Floats(view, shape) => Lazy {
                    name,
                    shape,
                    kind: WeightType::F32,
                    read: Box::new(move || {
                        let mut values = vec![0.0; view.len()];
                        self.backend.read(view, &mut values)?;
                        Ok(values)
                    }),
                },
                Kept::Codes(bytes) => Lazy {
                    name,
                    shape: vec![bytes.len()],
                    // Exact: bf16 has all whole numbers up to 256.
                    kind: WeightType::BF16,
                    read: Box::new(move || {
                        let mut codes = vec![0; bytes.len()];
                        self.backend.read_bytes(bytes, &mut codes)?;
                        Ok(codes.into_iter().map(f32::from).collect())
                    }),
                },
            })
            .collect();
        weights::write(path, &tensors.iter().collect::<Vec<_>>())
    }

    /// Reads what the optimizer keeps of the trained parameters back.
    ///
    /// # Errors
    /// [`Error::Weights`] when the file is damaged, or belongs to another model, another optimizer or another choice of
    /// trained parameters.
    pub fn load_optimizer(&mut self, path: &Path) -> Result<()> {
        let map = Arc::clone(&self.map);
        let mut wanted: std::collections::HashMap<String, (&Parameter, Kept)> = self
            .kept()?
            .into_iter()
            .filter_map(|(name, p, kept)| Some((name, (map.find(&p.name)?, kept))))
            .collect();
        let (all, mut fitting, mut others) = (wanted.len(), 0, 0);
        let backend = &mut self.backend;
        weights::read(path, |name, shape, values| {
            let fits = |(p, kept): &(&Parameter, Kept)| match kept {
                Kept::Like(_) => p.shape == shape,
                Kept::Floats(_, of) => of == shape,
                Kept::Codes(bytes) => shape == [bytes.len()],
            };
            let Some((p, kept)) = wanted.remove(name).filter(fits) else {
                others += 1;
                return Ok(());
            };
            fitting += 1;
            match kept {
                Kept::Like(view) => backend.write(view, &weights::from_file(p, &values)),
                Kept::Floats(view, _) => backend.write(view, &values),
                Kept::Codes(bytes) => {
                    backend.write_bytes(bytes, &values.iter().map(|code| *code as u8).collect::<Vec<_>>())
                }
            }
        })?;
        let what = "optimizer tensors fit this model, its optimizer and the parameters that it trains";
        weights::check_fit(path, what, fitting, all, others)
    }
}
