//! The optimizer's state in files: the state of all ranks in one file, independent of their number.

use super::Model;
use super::optimizer::{Optimizer, Place, matrix, within};
use crate::Result;
use crate::collective::{Collective, SingleRank, to_bytes, to_floats};
use crate::dtype::WeightType;
use crate::kernels::{Backend, Buffer, Bytes, QUANTISED_BLOCK as BLOCK, View};
use crate::params::Parameter;
use crate::weights::{self, Lazy};
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// A tensor of a parameter's state, as stored in files.
struct Kept<'a> {
    name: String,
    parameter: &'a Parameter,
    /// The parameter's place among the trained elements.
    range: Range<usize>,
    /// The shape in the file; `None` if shape and layout are the parameter's.
    shape: Option<usize>,
    unit: Unit,
    /// This model's piece of it.
    own: Own,
}

/// The unit for which a state tensor has one element.
#[derive(Clone, Copy)]
enum Unit {
    /// Each element of the parameter.
    Element,
    /// Each block of elements.
    Block,
    /// This many elements for the whole parameter, which is in one share.
    Parameter(usize),
}

enum Own {
    Floats(View),
    Codes(Bytes),
}

impl Unit {
    /// The elements of the tensor that belong to these elements of the parameter.
    fn of(self, elements: Range<usize>) -> Range<usize> {
        match self {
            _ if elements.is_empty() => 0..0,
            Unit::Element => elements,
            Unit::Block => elements.start / BLOCK..elements.end.div_ceil(BLOCK),
            Unit::Parameter(len) => 0..len,
        }
    }
}

impl Kept<'_> {
    fn len(&self) -> usize {
        self.unit.of(0..self.range.len()).len()
    }

    /// The tensor's elements in a rank's share.
    fn of_rank(&self, rank: usize, cuts: &[usize]) -> Range<usize> {
        self.unit.of(within(&(cuts[rank]..cuts[rank + 1]), &self.range))
    }
}

impl<B: Backend> Model<B> {
    /// The tensors of the optimizer's state, including those of other ranks, in file order.
    fn kept(&self) -> Result<Vec<Kept<'_>>> {
        let state = &self.trained()?.optimizer;
        let moments = state.moments.each_ref().map(Buffer::view);
        let mut all = Vec::new();
        for ((parameter, range), (own, place)) in self.map.trained().zip(&state.places) {
            let (whole, len) = (range.len(), own.len());
            let mut keep = |kind: &str, shape: Option<usize>, unit: Unit, own: Own| {
                let name = format!("{kind}.{}", parameter.name);
                all.push(Kept { name, parameter, range: range.clone(), shape, unit, own });
            };
            match (state.kind, place) {
                (_, Place::Codes(at, scale)) => {
                    for (i, name) in ["exp_avg", "exp_avg_sq"].into_iter().enumerate() {
                        let scales = state.scales[i].view().part(*scale, len.div_ceil(BLOCK));
                        let codes = Own::Codes(state.codes[i].view().part(*at, len));
                        keep(&format!("{name}_codes"), Some(whole), Unit::Element, codes);
                        let blocks = whole.div_ceil(BLOCK);
                        keep(&format!("{name}_scales"), Some(blocks), Unit::Block, Own::Floats(scales));
                    }
                }
                (_, Place::Factors(at, [rows, columns])) => {
                    let kept = moments[0].part(*at, rows + columns);
                    let ends = [("exp_avg_sq_row", 0, *rows), ("exp_avg_sq_col", *rows, *columns)];
                    for ((kind, start, own), len) in ends.into_iter().zip(matrix(parameter, whole)) {
                        keep(kind, Some(len), Unit::Parameter(len), Own::Floats(kept.part(start, own)));
                    }
                }
                (Optimizer::Adafactor, Place::Whole(at)) => {
                    keep("exp_avg_sq", None, Unit::Element, Own::Floats(moments[0].part(*at, len)));
                }
                (Optimizer::Sgd { momentum: false }, _) => {}
                (Optimizer::Sgd { momentum: true }, Place::Whole(at)) => {
                    keep("momentum_buffer", None, Unit::Element, Own::Floats(moments[0].part(*at, len)));
                }
                (_, Place::Whole(at)) => {
                    keep("exp_avg", None, Unit::Element, Own::Floats(moments[0].part(*at, len)));
                    keep("exp_avg_sq", None, Unit::Element, Own::Floats(moments[1].part(*at, len)));
                }
            }
        }
        // Grouped by kind.
        all.sort_by_key(|kept| kept.name.split('.').next().map(str::to_string));
        Ok(all)
    }

    /// This model's piece of a tensor.
    fn own(&self, kept: &Kept) -> Result<Vec<f32>> {
        match kept.own {
            Own::Floats(view) => {
                let mut values = vec![0.0; view.len()];
                self.backend.read(view, &mut values)?;
                Ok(values)
            }
            Own::Codes(bytes) => {
                let mut codes = vec![0; bytes.len()];
                self.backend.read_bytes(bytes, &mut codes)?;
                Ok(codes.into_iter().map(f32::from).collect())
            }
        }
    }

    /// A whole tensor, including the pieces of other ranks.
    fn gathered(&self, number: usize, kept: &Kept, collective: &dyn Collective) -> Result<Vec<f32>> {
        let state = &self.trained()?.optimizer;
        let mut values = vec![0.0; kept.len()];
        for rank in 0..state.share.ranks {
            let place = kept.of_rank(rank, &state.cuts);
            if place.is_empty() {
                continue;
            }
            let theirs = if rank == state.share.rank {
                self.own(kept)?
            } else {
                collective.send(rank, &(number as u64).to_le_bytes())?;
                to_floats(rank, &collective.receive(rank)?, place.len())?
            };
            values[place].copy_from_slice(&theirs);
        }
        Ok(match kept.shape {
            None => kept.parameter.layout.to_file(values, &kept.parameter.shape),
            Some(_) => values,
        })
    }

    /// Writes the optimizer's state of the trained parameters, without rounding.
    ///
    /// # Errors
    /// [`crate::Error::Io`] with the file; [`crate::Error::Batch`] when the model does not train.
    pub fn save_optimizer(&self, path: &Path) -> Result<()> {
        self.gather_optimizer(path, &SingleRank)
    }

    /// As [`Model::save_optimizer`], for all ranks. The other ranks call [`Model::serve_optimizer`] meanwhile. A tensor
    /// is fetched when it is written. The file does not depend on the number of ranks.
    ///
    /// # Errors
    /// As [`Model::save_optimizer`], and [`crate::Error::Collective`] if a rank is lost.
    pub fn gather_optimizer(&self, path: &Path, collective: &dyn Collective) -> Result<()> {
        let kept = self.kept()?;
        let tensors: Vec<Lazy> = kept
            .iter()
            .enumerate()
            .map(|(number, kept)| Lazy {
                name: kept.name.clone(),
                shape: kept.shape.map_or_else(|| kept.parameter.shape.clone(), |len| vec![len]),
                kind: match kept.own {
                    Own::Floats(_) => WeightType::F32,
                    // Exact: bf16 represents all integers up to 256.
                    Own::Codes(_) => WeightType::BF16,
                },
                read: Box::new(move || self.gathered(number, kept, collective)),
            })
            .collect();
        weights::write(path, &tensors.iter().collect::<Vec<_>>())
    }

    /// Answers the requests of the rank that writes the optimizer's state, and returns its first message of another
    /// kind.
    ///
    /// # Errors
    /// [`crate::Error::Collective`] if a rank is lost; [`crate::Error::Batch`] when the model does not train.
    pub fn serve_optimizer(&self, to: usize, collective: &dyn Collective) -> Result<Vec<u8>> {
        let kept = self.kept()?;
        loop {
            let message = collective.receive(to)?;
            let number = <[u8; 8]>::try_from(message.as_slice()).map(u64::from_le_bytes);
            match number.ok().and_then(|number| kept.get(number as usize)) {
                Some(kept) => collective.send(to, &to_bytes(&self.own(kept)?))?,
                None => return Ok(message),
            }
        }
    }

    /// Reads the optimizer's state of the trained parameters; ranks that share it read their own part.
    ///
    /// # Errors
    /// [`crate::Error::Weights`] when the file is damaged, or belongs to another model, another optimizer or another choice of
    /// trained parameters.
    pub fn load_optimizer(&mut self, path: &Path) -> Result<()> {
        let (map, state) = (Arc::clone(&self.map), &self.trained()?.optimizer);
        let (rank, cuts) = (state.share.rank, state.cuts.clone());
        let mut wanted: HashMap<String, (&Parameter, Option<usize>, Range<usize>, Own)> = HashMap::new();
        for kept in self.kept()? {
            let Some(p) = map.find(&kept.parameter.name) else { continue };
            let own = kept.of_rank(rank, &cuts);
            wanted.insert(kept.name, (p, kept.shape, own, kept.own));
        }
        let (all, mut fitting, mut others) = (wanted.len(), 0, 0);
        let backend = &mut self.backend;
        weights::read(path, |name, shape, values| {
            let fits = |(p, of, ..): &(&Parameter, Option<usize>, Range<usize>, Own)| match of {
                None => p.shape == shape,
                Some(len) => shape == [*len],
            };
            let Some((p, of, place, own)) = wanted.remove(name).filter(fits) else {
                others += 1;
                return Ok(());
            };
            fitting += 1;
            if place.is_empty() {
                return Ok(());
            }
            let values = match of {
                None => weights::from_file(p, &values),
                Some(_) => values.as_slice().into(),
            };
            match own {
                Own::Floats(view) => backend.write(view, &values[place]),
                Own::Codes(bytes) => {
                    let codes = values[place].iter().map(|code| *code as u8);
                    backend.write_bytes(bytes, &codes.collect::<Vec<_>>())
                }
            }
        })?;
        let what = "optimizer tensors fit this model, its optimizer and the parameters that it trains";
        weights::check_fit(path, what, fitting, all, others)
    }
}
