//! Reading and writing parameters and gradients.

use super::memory::held_bytes;
use super::optimizer::{Optimizer, Share, State};
use super::{Model, part};
use crate::collective::Collective;
use crate::dtype::WeightType;
use crate::init;
use crate::kernels::{Backend, Buffer, Dtype, View};
use crate::params::{Layout, Parameter, ParameterMap, Slot};
use crate::peft::ADAPTER_WEIGHTS;
use crate::weights::{self, Lazy, Source, Tensor};
use crate::{Error, Result};
use std::ops::Range;
use std::path::Path;

/// Flat buffers of the trained parameters.
#[derive(Debug)]
pub(super) struct Trained {
    gradients: Buffer,
    /// The optimizer's state.
    pub(super) optimizer: State,
    /// Whether each slot's gradient has been written since gradients were last zeroed. The first backward overwrites
    /// it, later ones add.
    written: Vec<bool>,
}

impl Trained {
    pub(super) fn allocate(map: &ParameterMap, backend: &mut impl Backend) -> Result<Trained> {
        let gradients = backend.allocate(map.trained_len())?;
        let optimizer = State::allocate(Optimizer::default(), Share { rank: 0, ranks: 1 }, map, backend)?;
        Ok(Trained { gradients, optimizer, written: vec![false; map.slots()] })
    }

    /// True if no gradient has been written.
    pub(super) fn is_empty(&self) -> bool {
        !self.written.contains(&true)
    }
}

/// Outputs of a layer that one product computes.
pub(super) struct Piece {
    /// Which outputs.
    pub(super) outputs: Range<usize>,
    /// `[outputs, inputs]`.
    pub(super) weight: View,
    pub(super) bias: Option<View>,
}

impl<B: Backend> Model<B> {
    /// Reads the weights of a Hugging Face folder: `model.safetensors` or shards, in f32, f16 or bf16.
    /// Returns the names of tensors in the files that have no place in this model.
    ///
    /// # Errors
    /// [`Error::Weights`] naming file and tensor when something is missing, misshapen, damaged or not finite.
    pub fn load_weights(&mut self, dir: &Path) -> Result<Vec<String>> {
        let (backend, parameters, files) = (&mut self.backend, self.parameters.view(), &mut self.files);
        let own = self.map.parameters.iter().filter(|p| !p.of_adapter);
        let reads = self.map.read_by_products();
        let (mut mapped, mut packed) = (0, 0);
        let put = |p: &Parameter, source: Source| match source {
            Source::Values(values) => backend.write(part(parameters, &p.range), values),
            Source::File { used, stored } => {
                let place = self.map.parameters.iter().position(|of| std::ptr::eq(of, p));
                if let Some((place, file)) = place.and_then(|place| Some((place, files.get_mut(place)?))) {
                    let buffer = backend.map(used)?;
                    match buffer.view().dtype() {
                        Dtype::Packed(packing) => packed += packing.bytes(p.rows(), p.width()),
                        Dtype::F32 => {}
                        Dtype::File(kind) => {
                            mapped += stored.len() * held_bytes(kind, reads[place], backend.copy_bytes(kind));
                            if let Some(alone) = reads[place] {
                                backend.keep_factor(buffer.view(), alone)?;
                            }
                        }
                    }
                    *file = Some((buffer, stored));
                }
                Ok(())
            }
        };
        let (unknown, stored) = weights::load(dir, &self.arch, own, put)?;
        self.weight_type = stored;
        (self.plan.mapped, self.plan.packed) = (mapped as u64, packed as u64);
        self.weights_changed();
        // Published files contain buffers besides parameters, and the head of a tied model.
        let expected = |name: &str| {
            name.ends_with("rotary_emb.inv_freq")
                || name.ends_with(".attn.bias")
                || name.ends_with(".attn.masked_bias")
                || name.ends_with(".attention.bias")
                || name.ends_with(".attention.masked_bias")
                || (self.arch.head.tied && name == "lm_head.weight")
        };
        Ok(unknown.into_iter().filter(|name| !expected(name)).collect())
    }

    /// The type in which [`Model::save_weights`] writes: that of the loaded files; f32 if they mix types or the weights
    /// are random.
    pub fn weight_type(&self) -> WeightType {
        self.weight_type
    }

    /// Chooses the type in which [`Model::save_weights`] writes.
    pub fn set_weight_type(&mut self, kind: WeightType) {
        self.weight_type = kind;
    }

    /// Random weights, distributed as transformers (and PEFT, for an adapter) initialises them.
    ///
    /// # Errors
    /// A failure of the device; [`Error::Parameter`] if weights are to stay in files.
    pub fn init_random(&mut self, seed: u64) -> Result<()> {
        for (i, p) in self.map.parameters.iter().enumerate().filter(|(_, p)| !p.of_adapter) {
            if p.mapped {
                return Err(Error::Parameter {
                    message: format!("\"{}\" is to be read from a file", p.name),
                });
            }
            let values = init::values(&self.arch, p, i, seed);
            self.backend.write(part(self.parameters.view(), &p.range), &values)?;
        }
        self.weights_changed();
        match self.lora {
            Some(_) => self.init_adapter(seed),
            None => Ok(()),
        }
    }

    /// Zeroes the gradients.
    pub fn zero_gradients(&mut self) {
        // The next backward overwrites them, so no pass over the buffer is needed.
        if let Some(trained) = &mut self.trained {
            trained.written.fill(false);
        }
    }

    /// L2 norm over all gradients, in f64.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn gradient_norm(&mut self) -> Result<f64> {
        match &self.trained {
            Some(trained) if trained.written.contains(&true) => {
                let gradients = self.settled()?;
                Ok(self.backend.sum_squares(gradients)?.sqrt())
            }
            _ => Ok(0.0),
        }
    }

    /// Replaces the gradients by their sums over all ranks; does nothing with one rank.
    ///
    /// # Errors
    /// [`Error::Collective`] if a rank is lost; [`Error::Batch`] when the model does not train.
    pub fn all_reduce(&mut self, collective: &dyn Collective) -> Result<()> {
        if collective.ranks() == 1 {
            return Ok(());
        }
        let gradients = self.settled()?;
        self.backend.all_reduce(gradients, collective)?;
        // Ranks without a target take part too, and have a gradient from here on.
        self.trained_mut()?.written.fill(true);
        Ok(())
    }

    /// Replaces the gradients of this rank's share by their sums over all ranks, and returns the L2 norm over all
    /// shares. With one rank, the norm of the gradients as they are.
    ///
    /// # Errors
    /// As [`Model::all_reduce`]; [`Error::Operands`] if the model does not share its optimizer with these ranks
    /// ([`Model::share_optimizer`]).
    pub fn reduce_gradients(&mut self, collective: &dyn Collective) -> Result<f64> {
        if collective.ranks() == 1 {
            return self.gradient_norm();
        }
        let gradients = self.settled()?;
        let state = &self.trained()?.optimizer;
        let (cuts, own) = (state.cuts.clone(), state.own());
        self.backend.reduce_scatter(gradients, &cuts, collective)?;
        let mut squares = [self.backend.sum_squares(part(gradients, &own))?];
        collective.sum(&mut squares)?;
        Ok(squares[0].sqrt())
    }

    /// Sends the updated parameters of each rank to all others. The gradients are zeroed: their memory is used as the
    /// transfer buffer.
    ///
    /// # Errors
    /// As [`Model::reduce_gradients`].
    pub fn exchange_parameters(&mut self, collective: &dyn Collective) -> Result<()> {
        if collective.ranks() == 1 {
            return Ok(());
        }
        let map = std::sync::Arc::clone(&self.map);
        let gradients = self.settled()?;
        let cuts = self.trained()?.optimizer.cuts.clone();
        for (p, range) in map.trained() {
            self.backend.copy(part(gradients, &range), part(self.parameters.view(), &p.range))?;
        }
        self.backend.all_gather(gradients, &cuts, collective)?;
        for (p, range) in map.trained() {
            self.backend.copy(part(self.parameters.view(), &p.range), part(gradients, &range))?;
        }
        self.zero_gradients();
        self.weights_changed();
        Ok(())
    }

    /// Hugging Face names of all parameters.
    pub fn parameter_names(&self) -> Vec<String> {
        self.map.parameters.iter().map(|p| p.name.clone()).collect()
    }

    /// Hugging Face names of the trained parameters.
    pub fn trained_names(&self) -> Vec<String> {
        match self.trained {
            Some(_) => self.map.trained().map(|(p, _)| p.name.clone()).collect(),
            None => Vec::new(),
        }
    }

    /// A parameter by its Hugging Face name, in the layout of its file.
    ///
    /// # Errors
    /// [`Error::Parameter`] when the model has no parameter of that name.
    pub fn parameter(&self, name: &str) -> Result<Tensor> {
        let p = self.find(name)?;
        let data = p.layout.to_file(self.values_of(p)?, &p.shape);
        Ok(Tensor { shape: p.shape.clone(), data })
    }

    fn values_of(&self, p: &Parameter) -> Result<Vec<f32>> {
        let place = self.map.parameters.iter().position(|of| std::ptr::eq(of, p));
        place.map_or(Ok(Vec::new()), |place| self.values(place))
    }

    /// A trained parameter's gradient by its Hugging Face name, in the layout of its file.
    ///
    /// # Errors
    /// [`Error::Parameter`] when the model has no parameter of that name or it is frozen; [`Error::Batch`] when the
    /// model does not train.
    pub fn gradient(&self, name: &str) -> Result<Tensor> {
        let (trained, p) = (self.trained()?, self.find(name)?);
        let Some((_, range)) = self.map.trained().find(|(trained, _)| trained.name == p.name) else {
            return Err(Error::Parameter { message: format!("\"{name}\" is frozen: it has no gradient") });
        };
        let mut tensor = self.tensor(trained.gradients.view(), p, &range)?;
        if !trained.written.contains(&true) {
            tensor.data.fill(0.0);
        }
        Ok(tensor)
    }

    /// Overwrites a parameter, given in the layout of its file.
    ///
    /// # Errors
    /// [`Error::Parameter`] when the model has no parameter of that name and shape.
    pub fn set_parameter(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        let p = self.find(name)?;
        if p.shape != tensor.shape || p.range.len() != tensor.data.len() {
            let (shape, elements) = (&tensor.shape, tensor.data.len());
            let message = format!("\"{name}\" has shape {:?}, not {shape:?} of {elements} elements", p.shape);
            return Err(Error::Parameter { message });
        }
        if p.mapped {
            return Err(Error::Parameter {
                message: format!("\"{name}\" is in a file, which is not changed"),
            });
        }
        let at = part(self.parameters.view(), &p.range);
        let values = weights::from_file(p, &tensor.data);
        self.backend.write(at, &values)?;
        self.weights_changed();
        Ok(())
    }

    fn find(&self, name: &str) -> Result<&Parameter> {
        self.map
            .find(name)
            .ok_or_else(|| Error::Parameter { message: format!("the model has no parameter \"{name}\"") })
    }

    pub(super) fn tensor(&self, of: View, p: &Parameter, range: &Range<usize>) -> Result<Tensor> {
        let mut data = vec![0.0; range.len()];
        self.backend.read(part(of, range), &mut data)?;
        data = p.layout.to_file(data, &p.shape);
        Ok(Tensor { shape: p.shape.clone(), data })
    }

    /// Writes the model's own weights to `dir/model.safetensors` (shards above 5 GB) in
    /// [`Model::weight_type`]; each file appears complete or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] with the file; [`Error::Weights`] for a value that the type cannot represent.
    pub fn save_weights(&self, dir: &Path) -> Result<()> {
        self.save_as(dir, self.weight_type)
    }

    /// As [`Model::save_weights`] in f32, without rounding.
    ///
    /// # Errors
    /// [`Error::Io`] with the file.
    pub fn save_masters(&self, dir: &Path) -> Result<()> {
        self.save_as(dir, WeightType::F32)
    }

    /// Writes what a run has trained: the adapter if the model has one, else the model. With `exact` everything is in
    /// f32; otherwise as [`Model::save_weights`] and [`Model::save_adapter`] do.
    ///
    /// # Errors
    /// As [`Model::save_weights`] and [`Model::save_adapter`].
    pub fn save_run(&self, dir: &Path, exact: bool) -> Result<()> {
        match (&self.lora, exact) {
            (Some(_), _) => self.save_adapter(&dir.join(ADAPTER_WEIGHTS), exact),
            (None, true) => self.save_masters(dir),
            (None, false) => self.save_weights(dir),
        }
    }

    /// Reads what [`Model::save_run`] has written.
    ///
    /// # Errors
    /// As [`Model::load_weights`] and [`Model::load_adapter`].
    pub fn load_run(&mut self, dir: &Path) -> Result<()> {
        match self.lora {
            Some(_) => self.load_adapter(&dir.join(ADAPTER_WEIGHTS)),
            None => self.load_weights(dir).map(|_| ()),
        }
    }

    /// The fingerprint of the base under an adapter, if it was set.
    pub fn base(&self) -> Option<&str> {
        self.base.as_deref()
    }

    /// Sets the fingerprint of the base under an adapter, by which a resumed run recognises it.
    pub fn set_base(&mut self, fingerprint: String) {
        self.base = Some(fingerprint);
    }

    fn save_as(&self, dir: &Path, kind: WeightType) -> Result<()> {
        let own = |p: &&Parameter| !p.of_adapter;
        let tensors: Vec<Lazy> =
            self.map.parameters.iter().filter(own).map(|p| Lazy { kind, ..self.lazy(p) }).collect();
        weights::save(dir, &tensors)
    }

    /// A parameter in f32 that is read when its file is written.
    pub(super) fn lazy<'a>(&'a self, p: &'a Parameter) -> Lazy<'a> {
        Lazy {
            name: p.name.clone(),
            shape: p.shape.clone(),
            kind: WeightType::F32,
            read: Box::new(|| Ok(p.layout.to_file(self.values_of(p)?, &p.shape))),
        }
    }

    /// The state of a model that trains.
    pub(super) fn trained(&self) -> Result<&Trained> {
        self.trained.as_ref().ok_or_else(untrained)
    }

    pub(super) fn trained_mut(&mut self) -> Result<&mut Trained> {
        self.trained.as_mut().ok_or_else(untrained)
    }

    /// A slot's values. If it is in a file, it must be stored there in one piece.
    pub(super) fn slot_view(&self, slot: &Slot) -> View {
        if let Some((_, view)) = self.file_pieces(slot).into_iter().next() {
            return view;
        }
        part(self.parameters.view(), &slot.range).matrix(slot.shape[0], slot.shape[1])
    }

    /// The rows of a slot that is in a file, in the pieces in which they are stored there; empty if it is in a buffer.
    pub(super) fn file_pieces(&self, slot: &Slot) -> Vec<(Range<usize>, View)> {
        let Some((file, _)) = &self.files[slot.parameter] else { return Vec::new() };
        let p = &self.map.parameters[slot.parameter];
        let ([rows, width], first) = (slot.shape, slot.range.start / slot.shape[1].max(1));
        let whole = |rows: usize, width: usize| file.view().matrix(rows, width);
        match p.layout {
            Layout::Same => vec![(0..rows, whole(p.shape[0], width).row_range(first..first + rows))],
            // Packed matrices are in the engine's layout.
            Layout::Transposed if matches!(file.view().dtype(), Dtype::Packed(_)) => {
                vec![(0..rows, whole(p.shape[1], width).row_range(first..first + rows))]
            }
            Layout::Transposed => {
                vec![(0..rows, whole(width, p.shape[1]).transposed().row_range(first..first + rows))]
            }
            Layout::ByHead { heads } => {
                let size = p.shape[0] / (3 * heads);
                let all = whole(p.shape[0], width);
                let piece = |row: usize| {
                    let (kind, head) = ((first + row) / (heads * size), (first + row) / size % heads);
                    let at = (3 * head + kind) * size;
                    (row..row + size, all.row_range(at..at + size))
                };
                (0..rows).step_by(size).map(piece).collect()
            }
        }
    }

    pub(super) fn parameter_view(&self, range: &Range<usize>) -> View {
        part(self.parameters.view(), range)
    }

    /// The gradients of adjacent slots as one vector, and whether to add to its values; `None` if the slots are frozen
    /// or the model does not train. The caller must write them.
    pub(super) fn gradient_of(&mut self, slots: &[&Slot]) -> Option<(View, bool)> {
        let trained = self.trained.as_mut()?;
        let range = slots.first()?.gradient()?.start..slots.last()?.gradient()?.end;
        let mut accumulate = true;
        for slot in slots {
            accumulate &= std::mem::replace(&mut trained.written[slot.index], true);
        }
        Some((part(trained.gradients.view(), &range), accumulate))
    }

    /// As [`Model::gradient_of`] for one slot, for operations that only add: filled with zeros if nothing was written.
    pub(super) fn gradient_to_add(&mut self, slot: &Slot) -> Result<Option<View>> {
        let Some((view, accumulate)) = self.gradient_of(&[slot]) else { return Ok(None) };
        if !accumulate {
            self.backend.fill(view, 0.0)?;
        }
        Ok(Some(view))
    }

    /// All gradients, with zeros where no backward pass has written.
    pub(super) fn settled(&mut self) -> Result<View> {
        let map = std::sync::Arc::clone(&self.map);
        let trained = self.trained()?;
        let gradients = trained.gradients.view();
        if !trained.written.contains(&true) {
            self.backend.fill(gradients, 0.0)?;
            self.trained_mut()?.written.fill(true);
            return Ok(gradients);
        }
        for slot in map.each_slot() {
            self.gradient_to_add(slot)?;
        }
        Ok(gradients)
    }
}

fn untrained() -> Error {
    Error::Batch { message: "the model was made without `train` in its budget".into() }
}
