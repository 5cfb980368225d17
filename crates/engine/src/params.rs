//! Where each parameter is in the flat buffers, its name in files, and whether it is trained.
//!
//! In the engine, every linear layer is `[outputs, inputs]`, and projections that read the same input are adjacent
//! (queries, keys, values; gate, up), so that one product computes them. Files keep the family's names and layout: a
//! named parameter is a range here, and, for Conv1D, a transpose.
//!
//! There are two kinds of flat buffers: one holds all parameters, the others (gradients and both moments) hold only the
//! trained ones, in the same order. Under an adapter the base's matrices may stay in their files ([`Base::Mapped`]);
//! then they are in no buffer.

mod builder;
mod layout;
mod slots;

use crate::arch::Architecture;
use crate::dtype::Packing;
use crate::lora::{Lora, Module, Rules, Targets};
use crate::{Error, Result};
use builder::Builder;
pub use layout::Layout;
pub use slots::{Adapter, BlockSlots, Linear, NormSlots, Part, Slot};
use std::collections::BTreeSet;
use std::ops::Range;

/// A parameter, as stored in its file.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Hugging Face name.
    pub name: String,
    /// Hugging Face shape.
    pub shape: Vec<usize>,
    /// Its range in the buffer of parameters; for a mapped one, all its elements.
    pub range: Range<usize>,
    /// Whether it is trained, and if so the place of its gradient and moments.
    pub store: Store,
    /// Its layout in the file.
    pub layout: Layout,
    /// Its role, which determines initialisation and weight decay.
    pub kind: Kind,
    /// True if it is read-only: in place in its file, or packed.
    pub mapped: bool,
    /// How it is packed into fewer bits. A packed parameter has the engine's layout, except for rows by head.
    pub packing: Option<Packing>,
    /// True if it belongs to an adapter, not to the model itself.
    pub of_adapter: bool,
    /// The parameter of the model that it replaces.
    pub copy_of: Option<usize>,
}

impl Parameter {
    /// Rows and columns of a matrix in the engine's layout.
    pub(crate) fn rows(&self) -> usize {
        self.shape.get(usize::from(self.layout == Layout::Transposed)).copied().unwrap_or(1)
    }

    /// As [`Parameter::rows`].
    pub(crate) fn width(&self) -> usize {
        self.shape.get(usize::from(self.layout != Layout::Transposed)).copied().unwrap_or(1)
    }

    /// Name of the module that it belongs to.
    pub(crate) fn module(&self) -> &str {
        self.name.rsplit_once('.').map_or(&self.name, |(module, _)| module)
    }
}

/// Where the base's parameters are kept under an adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Base {
    /// In a buffer, in f32.
    #[default]
    Resident,
    /// Matrices in their files, in their stored type; vectors in a buffer, in f32.
    Mapped,
    /// As [`Base::Mapped`], with the linear layers of the blocks packed into fewer bits. Experts, their router and the
    /// head are not packed: transformers stores experts as parameters, which bitsandbytes leaves unchanged.
    Packed(Packing),
}

/// Whether a parameter is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// No gradient and no moments.
    Frozen,
    /// Its gradient and moments start at this element of their buffers.
    Trained(usize),
}

/// The role of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A matrix, or the position table.
    Matrix,
    /// The token embedding.
    Embedding,
    /// A matrix whose output is added to the residual stream.
    Residual,
    /// A bias.
    Bias,
    /// A norm's weight.
    NormWeight,
    /// The matrix of an adapter that reads the layer's input.
    AdapterIn,
    /// The matrix of an adapter that writes the layer's output.
    AdapterOut,
    /// The magnitudes of the rows of a layer's weights under DoRA.
    Magnitude,
}

impl Kind {
    /// True unless weight decay skips it: the Trainer skips biases and norms.
    pub fn decays(self) -> bool {
        !matches!(self, Kind::Bias | Kind::NormWeight)
    }
}

/// Which parameters a model trains.
#[derive(Clone, Debug, Default, PartialEq)]
// There is one per model, so its size does not matter.
#[allow(clippy::large_enum_variant)]
pub enum Trainable {
    /// All of them.
    #[default]
    All,
    /// Those with these Hugging Face names; the others are frozen.
    Named(BTreeSet<String>),
    /// Those of a low-rank adapter added to the model, whose own parameters are frozen.
    Adapter(Lora),
}

/// The map of the flat buffers.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterMap {
    /// Token embedding, `[vocab, hidden]`.
    pub embedding: Slot,
    /// Position table, `[positions, hidden]`.
    pub positions: Option<Slot>,
    /// Blocks, in order.
    pub blocks: Vec<BlockSlots>,
    /// Norm before the head.
    pub norm: NormSlots,
    /// The head, `[vocab, hidden]`: the embedding's slot if tied.
    pub head: Linear,
    /// Every parameter once, in the order of the buffers.
    pub parameters: Vec<Parameter>,
    slots: usize,
    len: usize,
    trained: usize,
    low: LowSizes,
}

/// Sizes that determine the scratch memory of adapters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LowSizes {
    /// The largest rank; 0 without an adapter.
    pub(crate) rank: usize,
    /// The total number of outputs of layers under DoRA, and the largest number of one layer in a block.
    pub(crate) dora: usize,
    pub(crate) dora_width: usize,
    /// True if the head is under DoRA.
    pub(crate) dora_head: bool,
    /// The widest input of a layer whose adapter has dropout.
    pub(crate) dropout: usize,
}

impl ParameterMap {
    /// Lays out the parameters of an architecture, all of them trained. Sizes that overflow become
    /// `usize::MAX`.
    pub fn of(a: &Architecture) -> ParameterMap {
        Builder::new(a, &Trainable::All, Base::Resident, None).finish()
    }

    /// Lays out the parameters of an architecture with a choice of trained parameters.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a name that matches no parameter, and for an empty choice.
    pub fn with(a: &Architecture, trainable: &Trainable) -> Result<ParameterMap> {
        ParameterMap::over(a, trainable, Base::Resident)
    }

    /// As [`ParameterMap::with`]; under an adapter, `base` says where the base's parameters are kept. Without an
    /// adapter only a packed model is not resident, and it cannot be trained.
    ///
    /// # Errors
    /// As [`ParameterMap::with`].
    pub fn over(a: &Architecture, trainable: &Trainable, base: Base) -> Result<ParameterMap> {
        let fail = |message: String| Err(Error::Parameter { message });
        let base = match (a.packed, base) {
            (Some(packing), _) => Base::Packed(packing),
            (None, base) => base,
        };
        let (rules, base) = match (trainable, base) {
            (Trainable::Adapter(lora), _) => (Some(Rules::of(lora)?), base),
            (_, Base::Packed(_)) => (None, base),
            _ => (None, Base::Resident),
        };
        let map = Builder::new(a, trainable, base, rules).finish();
        match trainable {
            Trainable::Named(names) => {
                if let Some(name) = names.iter().find(|name| map.find(name).is_none()) {
                    return fail(format!(
                        "\"{name}\" is not a parameter of this model, so it cannot be trained"
                    ));
                }
            }
            Trainable::Adapter(lora) => {
                map.check_adapter(lora)?;
                map.check_added_rows(a)?;
            }
            Trainable::All => {}
        }
        if map.trained == 0 {
            return fail("no parameter is chosen to be trained".into());
        }
        Ok(map)
    }

    /// Rejects adapter settings that do not fit the model's modules.
    fn check_adapter(&self, lora: &Lora) -> Result<()> {
        let fail = |message: String| Err(Error::Parameter { message });
        let linears: Vec<&str> = self.linears().map(|(_, part)| module_name(&part.name)).collect();
        if let Some(target) = lora.unknown(&linears).first() {
            let others: Vec<&str> =
                self.parameters.iter().filter(|p| !p.of_adapter).map(Parameter::module).collect();
            let one = Lora { targets: Targets::Names(vec![target.to_string()]), ..Lora::default() };
            let Some(module) = others.iter().find(|name| one.unknown(&[name]).is_empty()) else {
                let mut ends: Vec<&str> = linears.iter().filter_map(|name| name.rsplit('.').next()).collect();
                ends.sort_unstable();
                ends.dedup();
                let ends = ends.join(", ");
                return fail(format!("no linear layer of this model is named \"{target}\"; it has {ends}"));
            };
            return fail(format!(
                "{module} cannot have an adapter: only linear layers outside of experts can, as in PEFT with \
                 transformers 5; name it in modules_to_save to train it whole"
            ));
        }
        let rules = Rules::of(lora)?;
        let experts = self.blocks.iter().filter_map(|block| Some((block.router.as_ref()?, block)));
        let mut experts =
            experts.flat_map(|(router, block)| [router, &block.up, &block.down]).flat_map(|l| &l.parts);
        let targeted = |part: &&Part| rules.adapter(Module { name: &part.name, is_head: false }).is_some();
        if let Some(part) = experts.find(targeted) {
            return fail(format!(
                "target_modules reaches {}: PEFT adapts experts and their router as parameters (target_parameters), \
                 which is not computed; name the attention's layers: q_proj, k_proj, v_proj, o_proj",
                part.name
            ));
        }
        let saved = |end: &String| {
            let one = Lora { save: vec![end.clone()], ..Lora::default() };
            Rules::of(&one).is_ok_and(|rules| {
                let own = self.parameters.iter().filter(|p| !p.of_adapter);
                own.map(|p| module_name(p.module()))
                    .chain(linears.iter().copied())
                    .any(|name| rules.saves(name))
            })
        };
        if let Some(end) = lora.save.iter().find(|end| !saved(end)) {
            return fail(format!("modules_to_save: no module of this model is named \"{end}\""));
        }
        let copied = self.parameters.iter().filter_map(|p| p.copy_of).map(|of| &self.parameters[of]);
        if let Some((p, packing)) = copied.filter_map(|p| Some((p, p.packing?))).next() {
            return fail(format!(
                "modules_to_save names {}, which is in {} bits and cannot be trained whole; give it an adapter \
                 (target_modules), or load the base in its own type",
                p.module(),
                packing.bits()
            ));
        }
        let adapted = self.parameters.iter().any(|p| p.of_adapter && p.copy_of.is_none());
        if !adapted {
            return fail(
                "no parameter is chosen to be trained: no linear layer of this model matches target_modules"
                    .into(),
            );
        }
        Ok(())
    }

    /// Rejects an adapter that does not hold the added rows of embedding and head: no file of the base has them.
    fn check_added_rows(&self, a: &Architecture) -> Result<()> {
        let head = self.head.parts.iter().map(|part| &part.weight);
        let held = |slot: &Slot| self.parameters[slot.parameter].of_adapter;
        match a.added {
            Some(added) if ![&self.embedding].into_iter().chain(head).all(held) => Err(Error::Parameter {
                message: format!(
                    "the model has {} rows of embedding and head for {} in the base's files, and an adapter must hold \
                     and train them itself: lora_modules_to_save: [{}, {}]",
                    a.vocab_size,
                    added.base,
                    a.names.embedding.rsplit('.').next().unwrap_or(a.names.embedding),
                    module_name(a.names.head),
                ),
            }),
            _ => Ok(()),
        }
    }

    /// The layers that may have an adapter, in the order of the model, each with its parts; the head is the last.
    pub(crate) fn linears(&self) -> impl Iterator<Item = (&Linear, &Part)> {
        let all = self.blocks.iter().flat_map(BlockSlots::linears).chain([&self.head]);
        all.flat_map(|linear| linear.parts.iter().map(move |part| (linear, part)))
    }

    /// Number of elements of the buffer of parameters.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Number of elements of the buffers of gradients and moments: only of the trained parameters.
    pub fn trained_len(&self) -> usize {
        self.trained
    }

    /// Sizes that determine the scratch memory of adapters.
    pub(crate) fn low(&self) -> LowSizes {
        self.low
    }

    /// True if the head shares the embedding's weights.
    pub(crate) fn is_tied(&self) -> bool {
        self.head.parts.iter().any(|part| part.weight.index == self.embedding.index)
    }

    /// For each parameter, by number: `None` if no product reads it, else whether products are its only readers.
    pub(crate) fn read_by_products(&self) -> Vec<Option<bool>> {
        let mut reads = vec![None; self.parameters.len()];
        let linears = self.blocks.iter().flat_map(BlockSlots::all_linears).chain([&self.head]);
        for part in linears.flat_map(|linear| &linear.parts) {
            let read = &mut reads[part.weight.parameter];
            // DoRA also reads the weights to compute the norms of their rows.
            *read = Some(*read != Some(false) && !part.is_dora());
            for slot in part.adapter.iter().flat_map(|adapter| [&adapter.a, &adapter.b]) {
                reads[slot.parameter] = Some(!part.is_dora());
            }
        }
        for table in [Some(&self.embedding), self.positions.as_ref()].into_iter().flatten() {
            reads[table.parameter] = reads[table.parameter].map(|_| false);
        }
        reads
    }

    /// Ranges of the buffer of parameters that together contain every matrix that products read, with the vectors
    /// between them.
    pub(crate) fn factors(&self) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        // The end of the current run, including vectors, after which another matrix may follow.
        let mut end = None;
        for (p, read) in self.parameters.iter().zip(self.read_by_products()).filter(|(p, _)| !p.mapped) {
            let follows = end == Some(p.range.start);
            if read.is_some() {
                match ranges.last_mut().filter(|_| follows) {
                    Some(last) => last.end = p.range.end,
                    None => ranges.push(p.range.clone()),
                }
                end = Some(p.range.end);
            } else if follows && matches!(p.kind, Kind::Bias | Kind::NormWeight | Kind::Magnitude) {
                end = Some(p.range.end);
            }
        }
        ranges
    }

    /// Bytes of the packed parameters.
    pub(crate) fn packed_bytes(&self) -> usize {
        let bytes = |p: &Parameter| p.packing.map(|packing| packing.bytes(p.rows(), p.width()));
        self.parameters.iter().filter_map(bytes).fold(0, usize::saturating_add)
    }

    /// Number of slots.
    pub(crate) fn slots(&self) -> usize {
        self.slots
    }

    /// The parameter of a Hugging Face name.
    pub fn find(&self, name: &str) -> Option<&Parameter> {
        self.parameters.iter().find(|p| p.name == name)
    }

    /// The trained parameters, with the ranges of their gradients.
    pub(crate) fn trained(&self) -> impl Iterator<Item = (&Parameter, Range<usize>)> {
        self.parameters.iter().filter_map(|p| match p.store {
            Store::Frozen => None,
            Store::Trained(start) => Some((p, start..start + p.range.len())),
        })
    }
}

impl ParameterMap {
    /// Every slot once; a tied head shares the embedding's slot.
    pub(crate) fn each_slot(&self) -> impl Iterator<Item = &Slot> {
        let outer = [Some(&self.embedding), self.positions.as_ref()].into_iter().flatten();
        let head = self.head.slots().filter(|slot| slot.index != self.embedding.index);
        outer.chain(head).chain(self.norm.slots()).chain(self.blocks.iter().flat_map(BlockSlots::slots))
    }

    /// The lowest layer whose backward pass a trained parameter needs; the number of layers if only the head and its
    /// norm are trained.
    pub(crate) fn lowest_trained(&self) -> usize {
        let trained = |slot: &Slot| slot.store != Store::Frozen;
        if trained(&self.embedding) || self.positions.as_ref().is_some_and(trained) {
            return 0;
        }
        self.blocks.iter().position(|block| block.slots().any(trained)).unwrap_or(self.blocks.len())
    }
}

/// The name of a module in transformers, from its name in files.
pub(crate) fn module_name(name: &str) -> &str {
    if name == "embed_out" { "lm_head" } else { name }
}

impl Architecture {
    /// Number of parameters, counting a tied head once.
    pub fn parameter_count(&self) -> u64 {
        ParameterMap::of(self).len() as u64
    }

    /// Hugging Face names of all parameters, in the order of the flat buffer.
    pub fn parameter_names(&self) -> Vec<String> {
        ParameterMap::of(self).parameters.into_iter().map(|p| p.name).collect()
    }
}
