//! A decoder with its gradients and optimizer state, over one arena.
//!
//! `arena` holds the intermediate values of a pass, and `memory` plans all memory of a model; `block`, `adapter` and
//! `head` run forward and backward; `state` reads and writes parameters and gradients; `optimizer` steps, and
//! `optimizer_files` saves and loads its state; `average` and `noise` are used in training only; `decode` generates
//! with a KV cache; `rehearsal` finds how much memory of a card a run needs.

mod adapter;
mod arena;
mod average;
mod balance;
mod block;
mod decode;
mod experts;
mod head;
mod memory;
mod noise;
mod optimizer;
mod optimizer_files;
mod rehearsal;
mod state;

pub use decode::KvCache;
pub use memory::MemoryPlan;
pub use noise::Regularisation;
pub use optimizer::{Optimizer, Rates, Update};
pub use rehearsal::CardRun;

use crate::arch::Architecture;
use crate::batch::{Batch, Prepared};
use crate::dtype::WeightType;
use crate::kernels::device::Device;
use crate::kernels::{Backend, Buffer, FileBuffer, FileTensor, IndexBuffer, Routes, TargetLoss, View};
use crate::lora::Lora;
use crate::params::{Base, ParameterMap, Trainable};
use crate::rope::Rope;
use crate::{Error, Result};
use arena::Arena;
use block::Rows;
use state::Trained;
use std::borrow::Cow;
use std::sync::Arc;

/// The sizes for which the arena is planned: the largest batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Largest number of tokens of a batch.
    pub tokens: usize,
    /// Largest number of targets of a batch.
    pub targets: usize,
    /// Keep gradients and optimizer state.
    pub train: bool,
    /// Save only each layer's input and recompute the rest in the backward pass.
    pub recompute: bool,
}

/// A decoder-only language model on one device.
#[derive(Debug)]
pub struct Model<B: Backend = Device> {
    arch: Arc<Architecture>,
    map: Arc<ParameterMap>,
    backend: B,
    budget: Budget,
    plan: MemoryPlan,
    parameters: Buffer,
    /// The read-only parameters, by number: the buffer that products read, and the tensor of the file.
    files: Vec<Option<(FileBuffer, FileTensor)>>,
    /// The adapter, and the fingerprint of the base under it.
    lora: Option<Lora>,
    base: Option<String>,
    /// The norms and factors of the adapter's layers under DoRA.
    dora: Option<adapter::Dora>,
    /// The type in which the weights are written.
    weight_type: WeightType,
    /// Gradients and moments, of a model that trains.
    trained: Option<Trained>,
    arena: Arena,
    ropes: Vec<RopeTable>,
    /// Which rotation each layer uses.
    block_ropes: Vec<Option<usize>>,
    /// The experts that the last forward pass of each layer chose.
    routes: Vec<Option<Routes>>,
    /// What training adds to passes, and what the current pass adds.
    regularisation: Regularisation,
    pass: Option<Regularisation>,
    /// The load-balancing loss of the current pass.
    balance: Option<balance::Balance>,
    /// An average of the trained parameters.
    average: Option<Buffer>,
}

/// Cosines and sines per position of one kind of rotation.
#[derive(Debug)]
struct RopeTable {
    rope: Rope,
    /// `[variants · positions, rotated]`; grows with the positions and variants of the batches.
    table: Option<Buffer>,
    positions: usize,
    /// The frequency variants in the table, the unscaled one first.
    variants: Vec<usize>,
}

impl RopeTable {
    fn view(&self) -> Option<View> {
        let rows = self.variants.len() * self.positions;
        self.table.as_ref().map(|table| table.matrix(rows, self.rope.rotated()))
    }

    /// The table row of a position, in a sequence of `length` tokens.
    fn row(&self, position: u32, length: usize) -> u32 {
        let variant = self.rope.variant(length);
        let at = self.variants.iter().position(|known| *known == variant).unwrap_or(0);
        (at * self.positions) as u32 + position
    }
}

/// Rows of a [`RopeTable`] for all rows of a batch and for its query rows, if they differ from the positions.
type RopeRows = Option<[IndexBuffer; 2]>;

/// The losses of a batch's targets, still on the device; [`Model::read_losses`] waits for them.
#[derive(Debug)]
pub struct Losses {
    /// A row per target; `None` if the batch has none.
    table: Option<Buffer>,
    /// The target of each row.
    order: Vec<usize>,
    /// The load-balancing loss.
    balance: Option<balance::Balance>,
}

impl<B: Backend> Model<B> {
    /// A model with all weights zero and every buffer that its steps will use. All parameters are trained if the budget
    /// has `train`.
    ///
    /// # Errors
    /// [`Error::Architecture`] for sizes that contradict each other, [`Error::Batch`] for a budget without
    /// tokens, [`Error::Memory`] if the plan does not fit.
    pub fn new(arch: Architecture, backend: B, budget: Budget) -> Result<Self> {
        Model::with_trainable(arch, backend, budget, &Trainable::All)
    }

    /// As [`Model::new`], with gradients and moments for some of the parameters only.
    ///
    /// # Errors
    /// As [`Model::new`], and [`Error::Parameter`] for a choice that does not fit the model.
    pub fn with_trainable(
        arch: Architecture,
        backend: B,
        budget: Budget,
        trainable: &Trainable,
    ) -> Result<Self> {
        Model::with_base(arch, backend, budget, trainable, Base::Resident)
    }

    /// As [`Model::with_trainable`]; under an adapter, `base` says where the base's parameters are kept. Those that
    /// stay in their files are mapped by [`Model::load_weights`].
    ///
    /// # Errors
    /// As [`Model::with_trainable`].
    pub fn with_base(
        arch: Architecture,
        mut backend: B,
        budget: Budget,
        trainable: &Trainable,
        base: Base,
    ) -> Result<Self> {
        if budget.tokens == 0 {
            return Err(Error::Batch { message: "a budget of 0 tokens".into() });
        }
        arch.check().map_err(|message| Error::Architecture { message })?;
        let map = ParameterMap::over(&arch, trainable, base)?;
        if let Some(p) = map.trained().map(|(p, _)| p).find(|p| p.packing.is_some() && budget.train) {
            return Err(Error::Parameter {
                message: format!(
                    "\"{}\" is packed into few bits and cannot be trained; train an adapter over it",
                    p.name
                ),
            });
        }
        let plan =
            MemoryPlan::new(&arch, budget, &map, backend.logits()).copied(|kind| backend.copy_bytes(kind));
        let parameters = backend.allocate(map.len())?;
        for range in map.factors() {
            backend.keep_factor(part(parameters.view(), &range), false)?;
        }
        let trained = match budget.train {
            true => Some(Trained::allocate(&map, &mut backend)?),
            false => None,
        };
        let lora = match trainable {
            Trainable::Adapter(lora) => Some(lora.clone()),
            _ => None,
        };
        let dora = adapter::Dora::allocate(&map, &mut backend)?;
        let files = map.parameters.iter().map(|_| None).collect();
        let arena = Arena::allocate(&arch, budget, map.low(), &mut backend)?;
        let mut ropes: Vec<RopeTable> = Vec::new();
        let mut rope_of = |rope: &Rope| match ropes.iter().position(|known| known.rope == *rope) {
            Some(known) => known,
            None => {
                ropes.push(RopeTable { rope: rope.clone(), table: None, positions: 0, variants: vec![0] });
                ropes.len() - 1
            }
        };
        let block_ropes = arch.blocks.iter().map(|b| b.attention.rope.as_ref().map(&mut rope_of)).collect();
        let routes = arch.blocks.iter().map(|_| None).collect();
        Ok(Model {
            arch: Arc::new(arch),
            map: Arc::new(map),
            backend,
            budget,
            plan,
            parameters,
            files,
            lora,
            base: None,
            dora,
            weight_type: WeightType::default(),
            trained,
            arena,
            ropes,
            block_ropes,
            routes,
            regularisation: Regularisation::default(),
            pass: None,
            balance: None,
            average: None,
        })
    }

    /// The architecture.
    pub fn architecture(&self) -> &Architecture {
        &self.arch
    }

    /// The budget for which the arena was planned.
    pub fn budget(&self) -> Budget {
        self.budget
    }

    /// The memory of the model, by kind.
    pub fn plan(&self) -> &MemoryPlan {
        &self.plan
    }

    /// Bytes that the backend holds for this model and its caches.
    pub fn allocated(&self) -> u64 {
        self.backend.allocated()
    }

    /// The device of the model.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The losses of a batch, in the order of its targets.
    ///
    /// # Errors
    /// [`Error::Batch`] when the batch does not fit the model or its budget.
    pub fn forward(&mut self, batch: &Batch) -> Result<Vec<TargetLoss>> {
        self.admit(batch)?;
        let losses = self.run(&Prepared::new(Cow::Borrowed(batch)), None)?;
        self.read_losses(&losses)
    }

    /// `gradients += d(scale · Σ w·nll)` for the trained parameters. The losses stay on the device, so the next
    /// micro-batch need not wait for them. [`Model::regularise`] sets what is added to the pass.
    ///
    /// `scale` is `1 / Σw` over **all** micro-batches of the step. A batch without targets has no effect.
    ///
    /// # Errors
    /// [`Error::Batch`] when the batch does not fit the model or its budget, or the model does not train.
    pub fn accumulate(&mut self, batch: &Batch, scale: f32) -> Result<Losses> {
        self.accumulate_prepared(&Prepared::new(Cow::Borrowed(batch)), scale)
    }

    /// As [`Model::accumulate`], for a prepared batch.
    ///
    /// # Errors
    /// As [`Model::accumulate`].
    pub fn accumulate_prepared(&mut self, batch: &Prepared<'_>, scale: f32) -> Result<Losses> {
        self.admit(batch.batch())?;
        self.trained()?;
        self.pass = Some(self.regularisation);
        let losses = self.run(batch, Some(scale));
        self.pass = None;
        losses
    }

    /// Reads the losses of a batch, in the order of its targets.
    ///
    /// # Errors
    /// [`Error::Operands`] for losses of another model.
    pub fn read_losses(&self, losses: &Losses) -> Result<Vec<TargetLoss>> {
        let Some(table) = &losses.table else { return Ok(Vec::new()) };
        let mut values = vec![0.0; losses.order.len() * TargetLoss::COLUMNS];
        self.backend.read(table.view(), &mut values)?;
        let mut ordered = vec![TargetLoss::default(); losses.order.len()];
        for (row, &target) in values.as_chunks().0.iter().zip(&losses.order) {
            ordered[target] = TargetLoss::from_columns(*row);
        }
        Ok(ordered)
    }

    /// Runs a checked batch; with `scale`, also its backward pass.
    fn run(&mut self, prepared: &Prepared<'_>, scale: Option<f32>) -> Result<Losses> {
        let batch = prepared.batch();
        if batch.targets.is_empty() {
            return Ok(Losses { table: None, order: Vec::new(), balance: None });
        }
        let first = self.trained.as_ref().is_none_or(Trained::is_empty);
        let sizes = [batch.tokens() as u64, batch.targets.len() as u64];
        self.backend.begin_pass(&[u64::from(scale.is_some()), u64::from(first), sizes[0], sizes[1]])?;
        let losses = self.whole_pass(prepared, scale);
        let ended = self.backend.end_pass();
        losses.and_then(|losses| ended.map(|()| losses))
    }

    /// The operations of a pass.
    ///
    /// Two facts shape the pass. The loss is a list of targets, so in the last layer only the targets' rows have
    /// queries, an MLP and a head; all rows have keys and values there. Cheap values (norms, activations, the inverse
    /// of rotations) are recomputed instead of saved.
    fn whole_pass(&mut self, prepared: &Prepared<'_>, scale: Option<f32>) -> Result<Losses> {
        let Prepared { order, rows, row_positions, plans: [all_plan, query_plan], .. } = prepared;
        let batch = prepared.batch();
        let all_plan = self.backend.upload_plan(all_plan.clone())?;
        let query_plan = self.backend.upload_plan(query_plan.clone())?;
        let [ids, positions, query_rows, query_positions] =
            [&batch.ids, &batch.positions, rows, row_positions].map(|list| self.backend.upload_indices(list));
        let (ids, positions) = (ids?, positions?);
        let (query_rows, query_positions) = (query_rows?, query_positions?);
        let lengths = match self.ropes.iter().any(|rope| rope.rope.beyond.is_some()) {
            true => batch
                .lengths(|a, b| self.ropes.iter().all(|rope| rope.rope.variant(a) == rope.rope.variant(b)))?,
            false => Vec::new(),
        };
        let rope_rows = self.rope_rows(&batch.positions, &lengths, rows)?;
        let full = Rows {
            rope_rows: &rope_rows,
            positions: positions.view(),
            query_rows: None,
            query_positions: positions.view(),
            attention: &all_plan,
        };
        let last = Rows {
            rope_rows: &rope_rows,
            positions: positions.view(),
            query_rows: Some(query_rows.view()),
            query_positions: query_positions.view(),
            attention: &query_plan,
        };

        self.refresh_dora()?;
        let noise = self.noise_sizes(batch)?;
        self.embed(ids.view(), positions.view(), noise.as_ref().map(Buffer::view))?;
        self.balance_begin(batch)?;
        let layers = self.arch.blocks.len();
        // The load-balancing loss is over all rows.
        let whole = self.balance.is_some() && self.arch.balances_last();
        let rows_of = |n: usize| if n + 1 < layers || whole { &full } else { &last };
        for n in 0..layers {
            self.block_forward(n, rows_of(n), self.own_keys(n, rows_of(n)), self.output(n, rows_of(n)))?;
            self.balance_add(n, batch.tokens())?;
        }
        if whole {
            let out = self.output(layers - 1, &full);
            self.backend.gather(self.arena.last.top(rows.len()), out, query_rows.view())?;
        }

        let table = self.head(batch, order, scale)?;
        if scale.is_some() {
            self.balance_factors()?;
            if let (true, Some((d_last, dx, _))) = (whole, self.arena.stream()) {
                let dx = dx.top(batch.tokens());
                self.backend.fill(dx, 0.0)?;
                self.backend.scatter_add(dx, d_last.top(rows.len()), query_rows.view())?;
            }
            let lowest = self.map.lowest_trained();
            for n in (lowest..layers).rev() {
                let rows = rows_of(n);
                if self.budget.recompute && n + 1 < layers {
                    // Only the input was saved. The last layer's values are still in the arena.
                    self.block_forward(n, rows, self.own_keys(n, rows), self.output(n, rows))?;
                }
                self.block_backward(n, rows)?;
            }
            self.embed_backward(ids.view(), positions.view())?;
        }
        Ok(Losses { table: Some(table), order: order.clone(), balance: self.balance.take() })
    }

    /// Rejects a batch that does not fit, and extends the rotation tables for one that does.
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
        let ends = batch.segments.iter().filter_map(|s| batch.positions[..s.own.end as usize].last());
        let lengths: Vec<usize> = ends.map(|p| *p as usize + 1).collect();
        self.cover(batch.positions.iter().max().map_or(0, |p| *p as usize + 1), &lengths)
    }

    /// Extends the rotation tables to at least `positions` positions, and to those of any batch within the budget, for
    /// sequences of these lengths.
    fn cover(&mut self, positions: usize, lengths: &[usize]) -> Result<()> {
        let positions = positions.max(self.budget.tokens);
        for rope in &mut self.ropes {
            let mut variants: Vec<usize> =
                lengths.iter().map(|length| rope.rope.variant(*length)).chain([0]).collect();
            variants.sort_unstable();
            variants.dedup();
            if rope.positions >= positions && variants.iter().all(|v| rope.variants.contains(v)) {
                continue;
            }
            let positions = positions.max(rope.positions);
            let len = positions.saturating_mul(rope.rope.rotated());
            let table = self.backend.allocate(len.saturating_mul(variants.len()))?;
            for (n, variant) in variants.iter().enumerate() {
                self.backend.write(table.view().part(n * len, len), &rope.rope.table(*variant, positions))?;
            }
            (rope.table, rope.positions, rope.variants) = (Some(table), positions, variants);
        }
        Ok(())
    }

    /// The rows of each rotation table for the rows of a batch whose sequences have these lengths.
    fn rope_rows(&mut self, positions: &[u32], lengths: &[usize], queries: &[u32]) -> Result<Vec<RopeRows>> {
        let mut all = Vec::new();
        for rope in &self.ropes {
            all.push(match rope.variants[..] {
                [0] => None,
                _ => {
                    let rows: Vec<u32> =
                        positions.iter().zip(lengths).map(|(p, l)| rope.row(*p, *l)).collect();
                    let queries: Vec<u32> = queries.iter().map(|q| rows[*q as usize]).collect();
                    let [rows, queries] = [rows, queries].map(|list| self.backend.upload_indices(&list));
                    Some([rows?, queries?])
                }
            });
        }
        Ok(all)
    }
}

/// A range of a buffer's view.
fn part(of: View, range: &std::ops::Range<usize>) -> View {
    of.part(range.start, range.len())
}
