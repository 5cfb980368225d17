//! A decoder with its gradients and optimizer state, over one arena.
//!
//! `arena` plans memory, `pass` runs forward and backward, `decode` generates with a KV cache.

mod arena;
mod decode;
mod pass;

pub use arena::MemoryPlan;
pub use decode::KvCache;

use crate::arch::{Architecture, Position};
use crate::kernels::{AdamW, Backend, Outcome, View, cpu::Cpu};
use crate::params::{Layout, Parameter};
use crate::weights::{self, Lazy, Tensor};
use crate::{Batch, Error, Result, init};
use arena::Arena;
use std::path::Path;

/// What the arena is planned for: the most that one batch may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Tokens of a batch.
    pub tokens: usize,
    /// Targets of a batch.
    pub targets: usize,
    /// Gradients and optimizer state are kept.
    pub train: bool,
    /// Keep each layer's input only and compute the rest again in the backward pass.
    pub recompute: bool,
}

/// A decoder-only language model on one device.
#[derive(Debug)]
pub struct Model<B: Backend = Cpu> {
    arch: Architecture,
    backend: B,
    layout: Layout,
    budget: Budget,
    plan: MemoryPlan,
    parameters: View,
    gradients: Option<View>,
    /// First and second moments.
    moments: Option<(View, View)>,
    arena: Arena,
    /// Cosines and sines per position, and how many positions they cover.
    rope: Option<(View, usize)>,
    /// The gradient buffer holds nothing yet: the next backward overwrites it.
    fresh: bool,
}

impl<B: Backend> Model<B> {
    /// A model with all weights zero, and every buffer that its steps will use.
    ///
    /// # Errors
    /// [`Error::Batch`] for a budget without tokens, [`Error::Memory`] where the plan does not fit.
    pub fn new(arch: Architecture, mut backend: B, budget: Budget) -> Result<Self> {
        if budget.tokens == 0 {
            return Err(Error::Batch { message: "a budget of 0 tokens".into() });
        }
        let layout = Layout::of(&arch);
        let plan = MemoryPlan::of(&arch, budget);
        let parameters = backend.allocate(layout.len())?;
        let mut state = || budget.train.then(|| backend.allocate(layout.len())).transpose();
        let (gradients, m, v) = (state()?, state()?, state()?);
        let arena = Arena::allocate(&arch, budget, &mut backend)?;
        Ok(Model {
            arch,
            backend,
            layout,
            budget,
            plan,
            parameters,
            gradients,
            moments: m.zip(v),
            arena,
            rope: None,
            fresh: true,
        })
    }

    /// Reads the weights of a Hugging Face folder: `model.safetensors` or shards, in f32, f16 or bf16.
    /// Returns the names of tensors in the files that this model has no place for.
    ///
    /// # Errors
    /// [`Error::Weights`] naming file and tensor when something is missing, misshapen, damaged or not finite.
    pub fn load_weights(&mut self, dir: &Path) -> Result<Vec<String>> {
        let (backend, parameters) = (&mut self.backend, self.parameters);
        let unknown = weights::load(dir, &self.layout.parameters, |p, values| {
            backend.write(parameters.part(p.range.start, p.range.len()), values);
        })?;
        // Published files carry buffers beside parameters, and the head of a tied model.
        let expected = |name: &str| {
            name.ends_with("rotary_emb.inv_freq")
                || name.ends_with(".attn.bias")
                || name.ends_with(".attn.masked_bias")
                || (self.arch.tied && name == "lm_head.weight")
        };
        Ok(unknown.into_iter().filter(|name| !expected(name)).collect())
    }

    /// Random weights, distributed as transformers initialises them.
    pub fn init_random(&mut self, seed: u64) {
        for (i, p) in self.layout.parameters.iter().enumerate() {
            let values = init::values(&self.arch, p, i, seed);
            self.backend.write(self.parameters.part(p.range.start, p.range.len()), &values);
        }
    }

    /// The architecture.
    pub fn architecture(&self) -> &Architecture {
        &self.arch
    }

    /// What the arena was planned for.
    pub fn budget(&self) -> Budget {
        self.budget
    }

    /// What each kind of memory takes.
    pub fn plan(&self) -> &MemoryPlan {
        &self.plan
    }

    /// The loss terms of a batch, in the order of its targets.
    ///
    /// # Errors
    /// [`Error::Batch`] when the batch does not fit the model or its budget.
    pub fn forward(&mut self, batch: &Batch) -> Result<Vec<Outcome>> {
        self.admit(batch)?;
        Ok(self.run(batch, None))
    }

    /// `gradients += d(scale · Σ w·nll)`; the loss terms, in the order of the batch's targets.
    ///
    /// `scale` is `1 / Σw` over **all** micro-batches of the step. A batch without targets changes nothing.
    ///
    /// # Errors
    /// [`Error::Batch`] when the batch does not fit the model or its budget, or the model does not train.
    pub fn accumulate(&mut self, batch: &Batch, scale: f32) -> Result<Vec<Outcome>> {
        self.admit(batch)?;
        self.trained()?;
        Ok(self.run(batch, Some(scale)))
    }

    /// Forgets the gradients.
    pub fn zero_gradients(&mut self) {
        // The next backward overwrites: no pass over the buffer.
        self.fresh = true;
    }

    /// L2 norm over all gradients, in f64.
    pub fn gradient_norm(&self) -> f64 {
        match self.gradients {
            Some(g) if !self.fresh => self.backend.sum_squares(g).sqrt(),
            _ => 0.0,
        }
    }

    /// One optimizer step with the gradients at hand.
    ///
    /// # Errors
    /// [`Error::Batch`] when the model does not train.
    pub fn adamw(&mut self, step: &AdamW) -> Result<()> {
        let (g, m, v) = self.trained()?;
        if std::mem::take(&mut self.fresh) {
            self.backend.fill(g, 0.0);
        }
        // Parameters that decay alike and lie side by side are one call.
        let decays = |p: &Parameter| step.decay_all || p.kind.decays();
        for run in self.layout.parameters.chunk_by(|a, b| decays(a) == decays(b)) {
            let (start, end) = (run[0].range.start, run[run.len() - 1].range.end);
            let part = |view: View| view.part(start, end - start);
            let weight_decay = if decays(&run[0]) { step.weight_decay } else { 0.0 };
            let step = AdamW { weight_decay, ..*step };
            self.backend.adamw(step, part(self.parameters), part(g), part(m), part(v));
        }
        Ok(())
    }

    /// Hugging Face names of all parameters.
    pub fn parameter_names(&self) -> Vec<String> {
        self.layout.parameters.iter().map(|p| p.name.clone()).collect()
    }

    /// A parameter by its Hugging Face name, in the layout of its file.
    pub fn parameter(&self, name: &str) -> Option<Tensor> {
        self.layout.find(name).map(|p| self.tensor(self.parameters, p))
    }

    /// A parameter's gradient by its Hugging Face name, in the layout of its file.
    pub fn gradient(&self, name: &str) -> Option<Tensor> {
        let p = self.layout.find(name)?;
        let mut tensor = self.tensor(self.gradients?, p);
        if self.fresh {
            tensor.data.fill(0.0);
        }
        Some(tensor)
    }

    /// Overwrites a parameter, given in the layout of its file. Returns false when there is none of that name
    /// and shape.
    pub fn set_parameter(&mut self, name: &str, tensor: &Tensor) -> bool {
        let Some(p) =
            self.layout.find(name).filter(|p| p.shape == tensor.shape && p.range.len() == tensor.data.len())
        else {
            return false;
        };
        let at = self.parameters.part(p.range.start, p.range.len());
        match p.transposed {
            true => self.backend.write(at, &weights::transpose(&tensor.data, p.shape[0], p.shape[1])),
            false => self.backend.write(at, &tensor.data),
        }
        true
    }

    fn tensor(&self, of: View, p: &Parameter) -> Tensor {
        let mut data = vec![0.0; p.range.len()];
        self.backend.read(of.part(p.range.start, p.range.len()), &mut data);
        if p.transposed {
            data = weights::transpose(&data, p.shape[1], p.shape[0]);
        }
        Tensor { shape: p.shape.clone(), data }
    }

    /// Writes `dir/model.safetensors` (shards above 5 GB) in f32; each file appears complete or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] with the file.
    pub fn save_weights(&self, dir: &Path) -> Result<()> {
        let tensors: Vec<Lazy> = self
            .layout
            .parameters
            .iter()
            .map(|p| Lazy {
                name: p.name.clone(),
                shape: p.shape.clone(),
                read: Box::new(|| self.tensor(self.parameters, p).data),
            })
            .collect();
        weights::save(dir, &tensors)
    }

    /// Writes the optimizer's moments, exactly.
    ///
    /// # Errors
    /// [`Error::Io`] with the file; [`Error::Batch`] when the model does not train.
    pub fn save_optimizer(&self, path: &Path) -> Result<()> {
        let (_, m, v) = self.trained()?;
        let tensors: Vec<Lazy> = [("exp_avg", m), ("exp_avg_sq", v)]
            .into_iter()
            .flat_map(|(kind, of)| self.layout.parameters.iter().map(move |p| (kind, of, p)))
            .map(|(kind, of, p)| Lazy {
                name: format!("{kind}.{}", p.name),
                shape: p.shape.clone(),
                read: Box::new(move || self.tensor(of, p).data),
            })
            .collect();
        weights::write(path, &tensors.iter().collect::<Vec<_>>())
    }

    /// Reads the optimizer's moments back.
    ///
    /// # Errors
    /// [`Error::Weights`] when the file is damaged or belongs to another model.
    pub fn load_optimizer(&mut self, path: &Path) -> Result<()> {
        let (_, m, v) = self.trained()?;
        let mut count = 0;
        let (layout, backend) = (&self.layout, &mut self.backend);
        weights::read(path, |name, values| {
            let found = [("exp_avg.", m), ("exp_avg_sq.", v)].into_iter().find_map(|(prefix, of)| {
                let p = layout.find(name.strip_prefix(prefix)?)?;
                (p.range.len() == values.len()).then_some((of, p))
            });
            if let Some((of, p)) = found {
                let values =
                    if p.transposed { weights::transpose(&values, p.shape[0], p.shape[1]) } else { values };
                backend.write(of.part(p.range.start, p.range.len()), &values);
                count += 1;
            }
        })?;
        if count == 2 * layout.parameters.len() {
            return Ok(());
        }
        Err(Error::Weights {
            path: path.to_path_buf(),
            message: format!("{count} of {} optimizer tensors fit this model", 2 * layout.parameters.len()),
            help: "resume with the model that the checkpoint was made with".into(),
        })
    }

    /// Gradients and moments, of a model that trains.
    fn trained(&self) -> Result<(View, View, View)> {
        match (self.gradients, self.moments) {
            (Some(g), Some((m, v))) => Ok((g, m, v)),
            _ => Err(Error::Batch { message: "the model was made without `train` in its budget".into() }),
        }
    }

    /// Refuses a batch that does not fit, and makes the rotation table fit one that does.
    fn admit(&mut self, batch: &Batch) -> Result<()> {
        batch.check(self.arch.vocab_size, self.arch.position_limit())?;
        let (tokens, targets) = (batch.tokens(), batch.targets.len());
        if tokens > self.budget.tokens || targets > self.budget.targets {
            return Err(Error::Batch {
                message: format!(
                    "a batch of {tokens} tokens and {targets} targets exceeds the budget of {} and {}",
                    self.budget.tokens, self.budget.targets
                ),
            });
        }
        self.cover(batch.positions.iter().max().map_or(0, |p| *p as usize + 1))
    }

    /// Makes the rotation table cover at least `positions` positions, and those of a batch within budget.
    fn cover(&mut self, positions: usize) -> Result<()> {
        let Position::Rope(frequencies) = &self.arch.position else { return Ok(()) };
        let positions = positions.max(self.budget.tokens);
        if self.rope.is_some_and(|(_, covered)| covered >= positions) {
            return Ok(());
        }
        // Angles are f32 products, as transformers computes them; only their cosine is taken in f64.
        let angle = |p: usize, f: &f32| (p as f32 * f) as f64;
        let values: Vec<f32> = (0..positions)
            .flat_map(|p| {
                let cos = frequencies.iter().map(move |f| angle(p, f).cos() as f32);
                cos.chain(frequencies.iter().map(move |f| angle(p, f).sin() as f32))
            })
            .collect();
        let table = self.backend.allocate(values.len())?;
        self.backend.write(table, &values);
        self.rope = Some((table, positions));
        Ok(())
    }
}
