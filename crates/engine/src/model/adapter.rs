//! Low-rank adapters on linear layers (Hu et al. 2021): their passes, and loading and saving their weights.
//!
//! The output of a part gets `t · Bᵀ` added, with `t = scale · (x · Aᵀ)`. Backward: `dB = dyᵀ · t`, and, with `dt =
//! scale · (dy · B)`, `dA = dtᵀ · x` and `dx += dt · A`. Both `t` and `dt` are only as wide as the rank, so they are
//! recomputed where they are needed.
//!
//! Under DoRA (Liu et al. 2024) the output is `g ∘ z + bias` with `z = x · wᵀ + t · Bᵀ` and `g = m / n`. `m` is
//! trained; `n = ‖w + scale · B · A‖`, row by row, is treated as a constant in the backward pass, as in PEFT. So `dm =
//! Σ dy ∘ z / n`, and all earlier gradients use `g ∘ dy` instead of `dy`. `n` and `g` change when the weights change,
//! once a step.
//!
//! With dropout the adapter reads `x' = dropout(x)`, under DoRA `z` too: the output is then
//! `g ∘ z(x') + bias + (x − x') · wᵀ`.

use super::Model;
use super::noise::Site;
use super::state::Piece;
use crate::dtype::WeightType;
use crate::kernels::{Backend, Buffer, Dropout, View};
use crate::lora::LoraInit;
use crate::params::{Adapter, Linear, Parameter, ParameterMap, Part};
use crate::weights::{self, Lazy};
use crate::{Error, Result, init};
use rayon::prelude::*;
use std::path::Path;
use std::sync::Arc;

/// Row norms of the weights under DoRA, and the factors on their outputs.
#[derive(Debug)]
pub(super) struct Dora {
    norms: Buffer,
    factors: Buffer,
    /// True if both match the current weights.
    fresh: bool,
}

impl Dora {
    /// `None` for a model without such layers.
    pub(super) fn allocate(map: &ParameterMap, backend: &mut impl Backend) -> Result<Option<Dora>> {
        match map.low().dora {
            0 => Ok(None),
            len => {
                let (norms, factors) = (backend.allocate(len)?, backend.allocate(len)?);
                Ok(Some(Dora { norms, factors, fresh: false }))
            }
        }
    }
}

/// Views for a part under DoRA: trained magnitudes, row norms, and the factors on its outputs.
struct Scaling {
    magnitude: View,
    norms: View,
    factors: View,
}

impl<B: Backend> Model<B> {
    /// `y (+)= …`, in the columns of each part that has an adapter; without DoRA `y` already holds the layer's own
    /// product.
    pub(super) fn adapters_forward(&mut self, at: &Linear, y: View, accumulate: bool, x: View) -> Result<()> {
        for part in &at.parts {
            let Some(adapter) = &part.adapter else { continue };
            let y = y.columns(part.outputs.clone());
            let dropout = self.adapter_dropout(adapter);
            let input = self.dropped(x, dropout)?;
            let Some(scaling) = self.scaling(adapter) else {
                self.add_low(adapter, y, input)?;
                continue;
            };
            let z = self.unscaled(part, adapter, input)?;
            let bias = part.bias.as_ref().map(|bias| self.parameter_view(&bias.range));
            self.backend.scale_columns(y, accumulate, z, scaling.factors, bias)?;
            if dropout.is_some() {
                let rest = input;
                self.backend.scale(rest, -1.0)?;
                self.backend.add(rest, x)?;
                for piece in self.own_pieces(part) {
                    self.backend.linear(y.columns(piece.outputs), true, rest, piece.weight, None)?;
                }
            }
        }
        Ok(())
    }

    /// The gradients of an adapter's matrices and magnitudes.
    pub(super) fn adapters_dw(&mut self, at: &Linear, dy: View, x: View) -> Result<()> {
        for part in &at.parts {
            let Some(adapter) = &part.adapter else { continue };
            let mut dy = dy.columns(part.outputs.clone());
            let dropout = self.adapter_dropout(adapter);
            let x = self.dropped(x, dropout)?;
            if let (Some((magnitude, _)), Some(scaling)) = (&adapter.magnitude, self.scaling(adapter)) {
                if let Some((dm, accumulate)) = self.gradient_of(&[magnitude]) {
                    let z = self.unscaled(part, adapter, x)?;
                    self.backend.column_dots(dm, accumulate, dy, z, scaling.norms)?;
                }
                dy = self.scaled_gradient(&scaling, dy)?;
            }
            if let Some((db, accumulate)) = self.gradient_of(&[&adapter.b]) {
                let t = self.adapter_rows(adapter, x)?;
                let [rows, rank] = adapter.b.shape;
                self.backend.linear_dw(db.matrix(rows, rank), accumulate, dy, t)?;
            }
            if let Some((da, accumulate)) = self.gradient_of(&[&adapter.a]) {
                let dt = self.adapter_gradient(adapter, dy)?;
                let [rank, inputs] = adapter.a.shape;
                self.backend.linear_dw(da.matrix(rank, inputs), accumulate, dt, x)?;
            }
        }
        Ok(())
    }

    /// `dx (+)= …`; without DoRA `dx` already holds the layer's own product.
    pub(super) fn adapters_dx(&mut self, at: &Linear, dx: View, accumulate: bool, dy: View) -> Result<()> {
        let mut accumulate = accumulate;
        for part in &at.parts {
            let Some(adapter) = &part.adapter else { continue };
            let (dropout, scaling) = (self.adapter_dropout(adapter), self.scaling(adapter));
            let dy = dy.columns(part.outputs.clone());
            let through = match &scaling {
                Some(scaling) => self.scaled_gradient(scaling, dy)?,
                None => dy,
            };
            let dt = self.adapter_gradient(adapter, through)?;
            let a = self.slot_view(&adapter.a);
            let pieces = if scaling.is_some() { self.own_pieces(part) } else { Vec::new() };
            let Some(dropout) = dropout else {
                for piece in pieces {
                    self.backend.linear_dx(dx, accumulate, through.columns(piece.outputs), piece.weight)?;
                    accumulate = true;
                }
                self.backend.linear_dx(dx, true, dt, a)?;
                continue;
            };
            // The gradient through the dropped input: `dt · A`, and under DoRA `(g ∘ dy − dy) · w`.
            let inside = self.arena.dropped(dx.rows(), dx.width());
            self.backend.linear_dx(inside, false, dt, a)?;
            for piece in &pieces {
                let (through, dy) =
                    (through.columns(piece.outputs.clone()), dy.columns(piece.outputs.clone()));
                self.backend.linear_dx(inside, true, through, piece.weight)?;
                self.backend.linear_dx(dx, accumulate, dy, piece.weight)?;
                accumulate = true;
                self.backend.scale(inside, -1.0)?;
                self.backend.linear_dx(inside, true, dy, piece.weight)?;
                self.backend.scale(inside, -1.0)?;
            }
            self.backend.dropout(inside, dropout)?;
            self.backend.add(dx, inside)?;
        }
        Ok(())
    }

    /// The dropout of an adapter's input in the current pass.
    fn adapter_dropout(&self, adapter: &Adapter) -> Option<Dropout> {
        let rate = self.lora.as_ref()?.dropout;
        self.dropout(Site::Adapter(adapter.module), rate as f32)
    }

    /// `x` if nothing is dropped, else a copy of it with the dropout applied.
    fn dropped(&mut self, x: View, dropout: Option<Dropout>) -> Result<View> {
        let Some(dropout) = dropout else { return Ok(x) };
        let copy = self.arena.dropped(x.rows(), x.width());
        self.backend.copy(copy, x)?;
        self.backend.dropout(copy, dropout)?;
        Ok(copy)
    }

    /// `y += t · Bᵀ`.
    fn add_low(&mut self, adapter: &Adapter, y: View, x: View) -> Result<()> {
        let t = self.adapter_rows(adapter, x)?;
        self.backend.linear(y, true, t, self.slot_view(&adapter.b), None)
    }

    /// `z = x · wᵀ + t · Bᵀ` of a part under DoRA.
    fn unscaled(&mut self, part: &Part, adapter: &Adapter, x: View) -> Result<View> {
        let [z, _] = self.arena.wide(x.rows(), part.outputs.len());
        for piece in self.own_pieces(part) {
            self.backend.linear(z.columns(piece.outputs), false, x, piece.weight, None)?;
        }
        self.add_low(adapter, z, x)?;
        Ok(z)
    }

    /// `g ∘ dy`.
    fn scaled_gradient(&mut self, scaling: &Scaling, dy: View) -> Result<View> {
        let [_, dz] = self.arena.wide(dy.rows(), dy.width());
        self.backend.scale_columns(dz, false, dy, scaling.factors, None)?;
        Ok(dz)
    }

    /// The products of one part, with outputs counted from the part's first output.
    fn own_pieces(&self, part: &Part) -> Vec<Piece> {
        let mut pieces = self.pieces([part].into_iter());
        for piece in &mut pieces {
            let first = part.outputs.start;
            piece.outputs = piece.outputs.start - first..piece.outputs.end - first;
        }
        pieces
    }

    /// `t = scale · (x · Aᵀ)`.
    fn adapter_rows(&mut self, adapter: &Adapter, x: View) -> Result<View> {
        let [t, _] = self.arena.low(x.rows(), adapter.a.shape[0]);
        self.backend.linear(t, false, x, self.slot_view(&adapter.a), None)?;
        self.backend.scale(t, adapter.scale)?;
        Ok(t)
    }

    /// `dt = scale · (dy · B)`.
    fn adapter_gradient(&mut self, adapter: &Adapter, dy: View) -> Result<View> {
        let [_, dt] = self.arena.low(dy.rows(), adapter.a.shape[0]);
        self.backend.linear_dx(dt, false, dy, self.slot_view(&adapter.b))?;
        self.backend.scale(dt, adapter.scale)?;
        Ok(dt)
    }

    fn scaling(&self, adapter: &Adapter) -> Option<Scaling> {
        let ((magnitude, at), dora) = (adapter.magnitude.as_ref()?, self.dora.as_ref()?);
        let of = |buffer: &Buffer| buffer.view().part(*at, magnitude.shape[1]);
        Some(Scaling {
            magnitude: self.parameter_view(&magnitude.range),
            norms: of(&dora.norms),
            factors: of(&dora.factors),
        })
    }

    /// Recomputes the norms and factors of DoRA if the weights have changed.
    pub(super) fn refresh_dora(&mut self) -> Result<()> {
        if self.dora.as_ref().is_none_or(|dora| dora.fresh) {
            return Ok(());
        }
        let map = Arc::clone(&self.map);
        for (_, part) in map.linears() {
            let Some((adapter, scaling)) = part.adapter.as_ref().and_then(|a| Some((a, self.scaling(a)?)))
            else {
                continue;
            };
            self.row_norms(part, adapter, scaling.norms)?;
            self.backend.divide(scaling.factors, scaling.magnitude, scaling.norms)?;
        }
        if let Some(dora) = &mut self.dora {
            dora.fresh = true;
        }
        Ok(())
    }

    /// Marks the norms and factors as stale, so that the next pass recomputes them.
    pub(super) fn weights_changed(&mut self) {
        if let Some(dora) = &mut self.dora {
            dora.fresh = false;
        }
    }

    fn row_norms(&mut self, part: &Part, adapter: &Adapter, to: View) -> Result<()> {
        let (a, b) = (self.slot_view(&adapter.a), self.slot_view(&adapter.b));
        for piece in self.own_pieces(part) {
            let (to, rows) = (to.part(piece.outputs.start, piece.outputs.len()), b.row_range(piece.outputs));
            self.backend.row_norms(to, piece.weight, rows, a, adapter.scale)?;
        }
        Ok(())
    }

    /// The settings of the adapter, if the model has one.
    pub fn adapter(&self) -> Option<&crate::Lora> {
        self.lora.as_ref()
    }

    /// Initialises the adapter as PEFT does: `A` and `B` by [`LoraInit`], magnitudes to the norms of the weights' rows,
    /// and copied modules to the values of their originals.
    ///
    /// # Errors
    /// [`Error::Parameter`] when the model has no adapter.
    pub fn init_adapter(&mut self, seed: u64) -> Result<()> {
        let init = self.need_adapter()?;
        let map = Arc::clone(&self.map);
        for (i, p) in map.parameters.iter().enumerate().filter(|(_, p)| p.of_adapter) {
            let values = match p.copy_of {
                Some(of) => self.values(of)?,
                None => init::adapter(p, i, init, seed),
            };
            self.backend.write(self.parameter_view(&p.range), &values)?;
        }
        self.weights_changed();
        for (_, part) in map.linears() {
            if let Some((adapter, (magnitude, _))) =
                part.adapter.as_ref().and_then(|a| Some((a, a.magnitude.as_ref()?)))
            {
                self.row_norms(part, adapter, self.parameter_view(&magnitude.range))?;
            }
        }
        Ok(())
    }

    /// Writes the adapter under PEFT's names (`adapter_model.safetensors`): its own matrices in f32, copies of the
    /// model's parameters in the model's type, as PEFT does; with `exact`, all of it in f32.
    ///
    /// # Errors
    /// [`Error::Io`] with the file; [`Error::Parameter`] when the model has no adapter.
    pub fn save_adapter(&self, path: &Path, exact: bool) -> Result<()> {
        self.need_adapter()?;
        let kind = |p: &Parameter| match p.copy_of {
            Some(_) if !exact => self.weight_type,
            _ => WeightType::F32,
        };
        let of_adapter = |p: &&Parameter| p.of_adapter;
        let tensors: Vec<Lazy> = self
            .map
            .parameters
            .iter()
            .filter(of_adapter)
            .map(|p| Lazy { kind: kind(p), ..self.lazy(p) })
            .collect();
        weights::write(path, &tensors.iter().collect::<Vec<_>>())
    }

    /// Reads the adapter's weights.
    ///
    /// # Errors
    /// [`Error::Weights`] when the file is damaged or belongs to another adapter; [`Error::Parameter`] when
    /// the model has none.
    pub fn load_adapter(&mut self, path: &Path) -> Result<()> {
        self.need_adapter()?;
        let (mut missing, mut others) = (Vec::new(), Vec::new());
        let map = Arc::clone(&self.map);
        let parameters = self.parameters.view();
        let fail = |message: String, help: &str| {
            Err(Error::Weights { path: path.to_path_buf(), message, help: help.into() })
        };
        let mut read = std::collections::BTreeSet::new();
        weights::read(path, |name, shape, values| {
            let Some(p) = map.find(name).filter(|p| p.of_adapter && p.shape == shape) else {
                others.push(format!("{name} {shape:?}"));
                return Ok(());
            };
            if let Some(i) = values.iter().position(|x| !x.is_finite()) {
                let message = format!("tensor \"{name}\" holds {} at element {i}", values[i]);
                return fail(message, "the adapter is damaged or comes from a run that diverged");
            }
            read.insert(p.name.clone());
            let values = weights::from_file(p, &values);
            self.backend.write(parameters.part(p.range.start, p.range.len()), &values)
        })?;
        self.weights_changed();
        let wanted = map.parameters.iter().filter(|p| p.of_adapter);
        missing
            .extend(wanted.filter(|p| !read.contains(&p.name)).map(|p| format!("{} {:?}", p.name, p.shape)));
        if missing.is_empty() && others.is_empty() {
            return Ok(());
        }
        let list = |what: &str, names: &[String]| match names {
            [] => String::new(),
            [one] => format!("; {what}: {one}"),
            [one, rest @ ..] => format!("; {what}: {one} and {} more", rest.len()),
        };
        let (missing, others) = (list("missing", &missing), list("in the file only", &others));
        fail(
            format!("{} adapter tensors fit this model{missing}{others}", read.len()),
            "load it with the model, the rank and the target modules that it was made with",
        )
    }

    /// Writes the model with its adapter merged into its weights, as [`Model::save_weights`] does; PEFT's
    /// `merge_and_unload` computes the same. Returns true if a head is written too that was tied to the embedding in
    /// the base and no longer is.
    ///
    /// # Errors
    /// As [`Model::save_weights`]; [`Error::Parameter`] when the model has no adapter.
    pub fn save_merged(&self, dir: &Path, kind: WeightType) -> Result<bool> {
        self.need_adapter()?;
        let own = self.map.parameters.iter().enumerate().filter(|(_, p)| !p.of_adapter);
        let mut tensors: Vec<Lazy> =
            own.map(|(i, p)| Lazy { kind, read: Box::new(move || self.merged(i)), ..self.lazy(p) }).collect();
        let untied = self.arch.head.tied
            && (!self.map.is_tied() || self.map.head.parts.iter().any(|part| part.adapter.is_some()));
        if untied {
            tensors.push(Lazy {
                name: format!("{}.weight", self.arch.names.head),
                shape: vec![self.arch.vocab_size, self.arch.hidden],
                kind,
                read: Box::new(|| self.merged_head()),
            });
        }
        weights::save(dir, &tensors)?;
        Ok(untied)
    }

    /// A parameter of the model with the adapter added to it, in the layout of its file.
    fn merged(&self, parameter: usize) -> Result<Vec<f32>> {
        let map = &self.map;
        let tied_head = self.arch.head.tied;
        let blocks = map.blocks.iter().flat_map(|block| block.linears());
        let linears = blocks.chain((!tied_head).then_some(&map.head));
        let parts = linears.flat_map(|linear| linear.parts.iter().map(move |part| (linear.inputs, part)));
        // The trained copy of a tied head differs from the embedding.
        let head = map.head.parts.iter().map(|part| part.weight.parameter).find(|_| tied_head);
        let copies = map.parameters.iter().enumerate().filter(|(_, p)| p.copy_of == Some(parameter));
        let embedding = map.embedding.parameter;
        let copy = copies.map(|(i, _)| i).find(|i| *i == embedding || head != Some(*i));
        let source = copy.unwrap_or(parameter);
        let mut values = self.values(source)?;
        let p = &map.parameters[parameter];
        let start = if map.parameters[source].mapped { 0 } else { map.parameters[source].range.start };
        for (inputs, part) in parts.filter(|(_, part)| part.weight.parameter == source) {
            let Some(adapter) = &part.adapter else { continue };
            let first = part.weight.range.start - start;
            self.merge_part(adapter, inputs, &mut values[first..first + part.weight.range.len()])?;
        }
        Ok(p.layout.to_file(values, &p.shape))
    }

    /// The head of a tied model, with the adapter's changes to it.
    fn merged_head(&self) -> Result<Vec<f32>> {
        let Some(part) = self.map.head.parts.first() else { return Ok(Vec::new()) };
        let mut values = self.values(part.weight.parameter)?;
        if let Some(adapter) = &part.adapter {
            self.merge_part(adapter, self.arch.hidden, &mut values)?;
        }
        Ok(values)
    }

    /// `w += scale · B · A`, and under DoRA each row rescaled to its magnitude.
    fn merge_part(&self, adapter: &Adapter, inputs: usize, w: &mut [f32]) -> Result<()> {
        let read = |view: View| {
            let mut values = vec![0.0; view.len()];
            self.backend.read(view, &mut values).map(|()| values)
        };
        let rank = adapter.a.shape[0];
        let (a, b) = (read(self.slot_view(&adapter.a))?, read(self.slot_view(&adapter.b))?);
        let magnitude = match &adapter.magnitude {
            Some((slot, _)) => Some(read(self.parameter_view(&slot.range))?),
            None => None,
        };
        w.par_chunks_mut(inputs).zip(b.par_chunks(rank)).enumerate().for_each(|(i, (w, b))| {
            let mut delta = vec![0f32; inputs];
            for (b, a) in b.iter().zip(a.chunks(inputs)) {
                delta.iter_mut().zip(a).for_each(|(delta, a)| *delta += b * a);
            }
            w.iter_mut().zip(&delta).for_each(|(w, delta)| *w += adapter.scale * delta);
            if let Some(magnitude) = &magnitude {
                let squares: f64 = w.iter().map(|w| f64::from(*w) * f64::from(*w)).sum();
                let factor = magnitude[i] / squares.sqrt() as f32;
                w.iter_mut().for_each(|w| *w *= factor);
            }
        });
        Ok(())
    }

    /// The initialisation of the adapter; an error if there is none.
    fn need_adapter(&self) -> Result<LoraInit> {
        match &self.lora {
            None => Err(Error::Parameter { message: "the model was made without an adapter".into() }),
            Some(lora) => Ok(lora.init),
        }
    }

    /// A parameter's values in the engine's layout, from wherever they are stored.
    pub(super) fn values(&self, parameter: usize) -> Result<Vec<f32>> {
        let p = &self.map.parameters[parameter];
        if let Some((_, tensor)) = &self.files[parameter] {
            let values = weights::from_tensor(p, tensor);
            return Ok(weights::with_added_rows(&self.arch, p, values.into()).into_owned());
        }
        if p.mapped {
            return Err(Error::Parameter { message: format!("\"{}\" is not loaded", p.name) });
        }
        let mut values = vec![0.0; p.range.len()];
        self.backend.read(self.parameter_view(&p.range), &mut values)?;
        Ok(values)
    }
}
