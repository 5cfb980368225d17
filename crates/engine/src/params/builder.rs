//! Lays out the parameters of an architecture.

use super::{
    Adapter, Base, BlockSlots, Kind, Layout, Linear, LowSizes, NormSlots, Parameter, ParameterMap, Part,
    Slot, Store, Trainable, module_name,
};
use crate::arch::{Architecture, Block, Names};
use crate::kernels::Norm;
use crate::lora::{Module, Rules};
use std::collections::BTreeMap;
use std::ops::Range;

/// The parameters of some file tensors whose outputs are adjacent.
struct Tensors {
    /// For each tensor: name, indices of weight and bias among the parameters, outputs.
    of: Vec<(String, usize, Option<usize>, Range<usize>)>,
    inputs: usize,
}

/// The adapter of a module.
#[derive(Clone)]
struct OfModule {
    /// `A`, which all parts of the module share.
    a: Slot,
    /// The parameter `B`.
    b: usize,
    /// The parameter of magnitudes.
    magnitude: Option<usize>,
    /// Number of modules with an adapter before this one.
    number: usize,
}

pub(super) struct Builder<'a> {
    arch: &'a Architecture,
    trainable: &'a Trainable,
    base: Base,
    rules: Option<Rules<'a>>,
    parameters: Vec<Parameter>,
    len: usize,
    trained: usize,
    slots: usize,
    /// Adapters by the module to which they belong.
    adapters: BTreeMap<String, OfModule>,
    /// The adapter's copies of parameters, by the parameter of the model.
    copies: BTreeMap<usize, usize>,
    low: LowSizes,
}

impl<'a> Builder<'a> {
    pub(super) fn new(
        arch: &'a Architecture,
        trainable: &'a Trainable,
        base: Base,
        rules: Option<Rules<'a>>,
    ) -> Builder<'a> {
        Builder {
            arch,
            trainable,
            base,
            rules,
            parameters: Vec::new(),
            len: 0,
            trained: 0,
            slots: 0,
            adapters: BTreeMap::new(),
            copies: BTreeMap::new(),
            low: LowSizes::default(),
        }
    }

    pub(super) fn finish(mut self) -> ParameterMap {
        let (a, names) = (self.arch, self.arch.names);
        let mut embedding = self.matrix(names.embedding, a.vocab_size, Kind::Embedding);
        let mut positions = a.embedding.positions.map(|n| self.matrix(names.positions, n, Kind::Matrix));
        let mut blocks: Vec<BlockSlots> =
            a.blocks.iter().enumerate().map(|(n, block)| self.block(names, block, n)).collect();
        let mut norm = self.norm(names.norm.to_string(), a.hidden, a.head.norm);
        let weight = match a.head.tied {
            true => embedding.clone(),
            false => self.matrix(names.head, a.vocab_size, Kind::Matrix),
        };
        let part =
            Part { name: names.head.into(), outputs: 0..a.vocab_size, weight, bias: None, adapter: None };
        let mut head = Linear { inputs: a.hidden, parts: vec![part] };
        // After the model's own parameters, so that their places do not depend on an adapter.
        if let Some(rules) = self.rules.take() {
            let follows = self.copy_head(&mut head, &embedding, &rules);
            let outer =
                [Some(&mut embedding), positions.as_mut()].into_iter().flatten().chain(norm.slots_mut());
            outer.for_each(|slot| self.copy(slot, &rules));
            if let (true, Some(part)) = (follows, head.parts.first_mut()) {
                part.weight = embedding.clone();
            }
            for block in &mut blocks {
                block.slots_mut().for_each(|slot| self.copy(slot, &rules));
                // The same layers as in `BlockSlots::linears`.
                let mlp = [&mut block.up, &mut block.down].into_iter().filter(|_| block.router.is_none());
                for linear in [&mut block.q, &mut block.kv, &mut block.out].into_iter().chain(mlp) {
                    self.attach(linear, &rules, false);
                }
            }
            self.attach(&mut head, &rules, true);
        }
        let Builder { parameters, len, trained, slots, low, .. } = self;
        ParameterMap { embedding, positions, blocks, norm, head, parameters, slots, len, trained, low }
    }

    /// One block, in the order norm, q, k, v, norms of q and k, out, norm after it, norm, up, down, norm after it.
    fn block(&mut self, names: Names, block: &Block, n: usize) -> BlockSlots {
        let (hidden, heads, mlp) = (self.arch.hidden, block.attention.heads, block.mlp);
        let [q, kv, _] = Architecture::widths(block);
        let key = heads.key_width();
        let prefix = names.block.replace("{}", &n.to_string());
        let name = |name: &str| format!("{prefix}.{name}");
        let all = |names: &[&str]| names.iter().map(|n| name(n)).collect::<Vec<_>>();
        let norms = block.norms;
        let attention_norm = norms.attention.map(|norm| self.norm(name(names.attention_norm), hidden, norm));
        let widths = if names.qkv.len() == 1 { vec![q.saturating_add(kv)] } else { vec![q, key, key] };
        let qkv = self.tensors(all(names.qkv), &widths, hidden, block.attention.qkv_bias, Kind::Matrix);
        if names.qkv_by_head {
            for (_, weight, bias, _) in &qkv.of {
                for parameter in [Some(*weight), *bias].into_iter().flatten() {
                    self.parameters[parameter].layout = Layout::ByHead { heads: heads.heads };
                }
            }
        }
        let (q_linear, kv_linear) = (self.linear(&qkv, 0..q), self.linear(&qkv, q..q.saturating_add(kv)));
        let qk_norm = block.attention.qk_norm.map(|qk| {
            let widths = if qk.whole { [q, key] } else { [heads.head_dim; 2] };
            [0, 1].map(|i| self.norm(name(names.qk_norm[i]), widths[i], qk.norm))
        });
        let out = self.tensors(vec![name(names.out)], &[hidden], q, block.attention.out_bias, Kind::Residual);
        let out = self.linear(&out, 0..hidden);
        let after_attention = norms.after_attention;
        let after_attention =
            after_attention.map(|norm| self.norm(name(names.after_attention), hidden, norm));
        let mlp_norm = norms.mlp.map(|norm| self.norm(name(names.mlp_norm), hidden, norm));
        let count = mlp.experts.map_or(1, |experts| experts.count);
        let router = mlp.experts.map(|_| {
            let router = self.tensors(vec![name(names.router)], &[count], hidden, false, Kind::Matrix);
            self.linear(&router, 0..count)
        });
        // An expert has its own name in place of the MLP's.
        let each = |module: &'static str| {
            (0..count).map(move |n| match (mlp.experts, module.rsplit_once('.')) {
                (Some(_), Some((_, last))) => {
                    format!("{}.{last}", names.expert.replace("{}", &n.to_string()))
                }
                _ => module.to_string(),
            })
        };
        let ups: Vec<Vec<String>> = names.up.iter().map(|module| each(module).collect()).collect();
        let ups =
            (0..count).flat_map(|n| ups.iter().map(move |of| of[n].clone())).map(|up| name(&up)).collect();
        let wide = mlp.up_width();
        let widths = vec![wide / names.up.len().max(1); names.up.len().saturating_mul(count)];
        let up = self.tensors(ups, &widths, hidden, mlp.bias, Kind::Matrix);
        let up = self.linear(&up, 0..wide.saturating_mul(count));
        let downs = each(names.down).map(|down| name(&down)).collect();
        let down = self.tensors(downs, &vec![hidden; count], mlp.intermediate, mlp.bias, Kind::Residual);
        let down = self.linear(&down, 0..hidden.saturating_mul(count));
        if let Base::Packed(packing) = self.base {
            // The same layers as in `BlockSlots::linears`.
            let mlp = [&up, &down].into_iter().filter(|_| router.is_none());
            for linear in [&q_linear, &kv_linear, &out].into_iter().chain(mlp) {
                for part in &linear.parts {
                    self.parameters[part.weight.parameter].packing = Some(packing);
                }
            }
        }
        let after_mlp = norms.after_mlp.map(|norm| self.norm(name(names.after_mlp), hidden, norm));
        BlockSlots {
            attention_norm,
            q: q_linear,
            kv: kv_linear,
            qk_norm,
            out,
            after_attention,
            mlp_norm,
            router,
            up,
            down,
            after_mlp,
        }
    }

    /// Points a slot to the adapter's copy of its parameter, if there is one: for a module that is trained fully, or a
    /// parameter that the adapter's file replaces.
    fn copy(&mut self, slot: &mut Slot, rules: &Rules) {
        let of = &self.parameters[slot.parameter];
        let module = module_name(of.module()).to_string();
        if !rules.saves(&module) && !rules.replaces(&of.name) {
            return;
        }
        let ending = of.name.rsplit_once('.').map_or("", |(_, ending)| ending);
        let is_head = of.name == format!("{}.weight", self.arch.names.head);
        let module_name = rules.file_module(Module { name: &module, is_head });
        let (name, shape, kind) = (format!("{module_name}.{ending}"), of.shape.clone(), of.kind);
        let (layout, mapped, start) = (of.layout, of.mapped, of.range.start);
        let copy = match self.copies.get(&slot.parameter) {
            Some(copy) => *copy,
            None => {
                let copy = self.add_of_adapter(name, shape, kind, rules.saves(&module));
                self.parameters[copy].layout = layout;
                self.parameters[copy].copy_of = Some(slot.parameter);
                self.copies.insert(slot.parameter, copy);
                copy
            }
        };
        let first = if mapped { slot.range.start } else { slot.range.start - start };
        let index = slot.index;
        *slot = Slot { index, ..self.slot(copy, first, slot.shape) };
    }

    /// As [`Builder::copy`] for a head. As under PEFT's wrappers, a tied head stays the base's embedding if only the
    /// embedding is trained, and gets its own copy if it is trained itself. Returns true if it is still tied.
    fn copy_head(&mut self, head: &mut Linear, embedding: &Slot, rules: &Rules) -> bool {
        let Some(part) = head.parts.first_mut() else { return false };
        if part.weight.index != embedding.index {
            self.copy(&mut part.weight, rules);
            return false;
        }
        let of = &self.parameters[embedding.parameter];
        let (module, shape, layout) = (module_name(&part.name).to_string(), of.shape.clone(), of.layout);
        let embedding_is_saved = rules.saves(of.module());
        if rules.saves(&module) || rules.replaces(&format!("{}.weight", part.name)) {
            let name = format!("{}.weight", rules.file_module(Module { name: &module, is_head: true }));
            let copy = self.add_of_adapter(name, shape, Kind::Matrix, rules.saves(&module));
            self.parameters[copy].layout = layout;
            self.parameters[copy].copy_of = Some(embedding.parameter);
            part.weight = self.slot(copy, 0, embedding.shape);
            return false;
        }
        if embedding_is_saved {
            part.weight = self.slot(embedding.parameter, 0, embedding.shape);
        }
        !embedding_is_saved
    }

    /// Adds an adapter to each part of the layer that is to have one.
    fn attach(&mut self, linear: &mut Linear, rules: &Rules, is_head: bool) {
        for part in &mut linear.parts {
            let (name, inputs) = (module_name(&part.name).to_string(), linear.inputs);
            let Some(low) = rules.adapter(Module { name: &name, is_head }) else { continue };
            let tensor = &self.parameters[part.weight.parameter];
            let start = if tensor.mapped { 0 } else { tensor.range.start };
            let elements = tensor.range.len();
            // The outputs of a tensor by heads are by heads in the adapter too; the adapter of a Conv1D is not
            // transposed.
            let layout = match tensor.layout {
                layout @ Layout::ByHead { .. } => layout,
                _ => Layout::Same,
            };
            let outputs = elements / inputs.max(1);
            if !self.adapters.contains_key(&name) {
                let module = format!("base_model.model.{name}");
                let mut add = |name: &str, shape: Vec<usize>, kind: Kind| {
                    self.add_of_adapter(format!("{module}.{name}"), shape, kind, true)
                };
                let a = add("lora_A.weight", vec![low.rank, inputs], Kind::AdapterIn);
                let b = add("lora_B.weight", vec![outputs, low.rank], Kind::AdapterOut);
                let m = rules.dora().then(|| add("lora_magnitude_vector", vec![outputs], Kind::Magnitude));
                for by_outputs in [Some(b), m].into_iter().flatten() {
                    self.parameters[by_outputs].layout = layout;
                }
                let a = self.slot(a, 0, [low.rank, inputs]);
                let of = OfModule { a, b, magnitude: m, number: self.adapters.len() };
                self.adapters.insert(name.clone(), of);
            }
            let OfModule { a, b, magnitude, number: module } = self.adapters[&name].clone();
            let rows = part.weight.shape[0];
            let skipped = part.weight.range.start.saturating_sub(start) / inputs.max(1);
            let b = self.slot(b, skipped.saturating_mul(low.rank), [rows, low.rank]);
            let magnitude = magnitude.map(|m| {
                let at = self.low.dora;
                self.low.dora = at.saturating_add(rows);
                (self.slot(m, skipped, [1, rows]), at)
            });
            self.low.rank = self.low.rank.max(low.rank);
            match (magnitude.is_some(), is_head) {
                (true, true) => self.low.dora_head = true,
                (true, false) => self.low.dora_width = self.low.dora_width.max(rows),
                _ => {}
            }
            if rules.dropout() > 0.0 {
                self.low.dropout = self.low.dropout.max(inputs);
            }
            part.adapter = Some(Adapter { a, b, scale: low.scale, magnitude, module });
        }
    }

    /// Adds a parameter of the adapter.
    fn add_of_adapter(&mut self, name: String, shape: Vec<usize>, kind: Kind, trained: bool) -> usize {
        self.push(name, shape, kind, trained, false, true)
    }

    /// Adds a parameter and returns its index.
    fn add(&mut self, name: String, shape: Vec<usize>, kind: Kind) -> usize {
        let mapped = self.base != Base::Resident && !matches!(kind, Kind::Bias | Kind::NormWeight);
        let trained = match self.trainable {
            Trainable::All => true,
            Trainable::Named(names) => names.contains(&name),
            Trainable::Adapter(_) => false,
        };
        self.push(name, shape, kind, trained, mapped, false)
    }

    /// Assigns a parameter its places among the values and the gradients, and returns its index. A mapped one has no
    /// place among the values: its elements are counted from 0.
    fn push(
        &mut self,
        name: String,
        shape: Vec<usize>,
        kind: Kind,
        trained: bool,
        mapped: bool,
        of_adapter: bool,
    ) -> usize {
        let len = shape.iter().fold(1usize, |len, size| len.saturating_mul(*size));
        let start = if mapped { 0 } else { self.len };
        let range = start..start.saturating_add(len);
        if !mapped {
            self.len = range.end;
        }
        let store = if trained { Store::Trained(self.trained) } else { Store::Frozen };
        if trained {
            self.trained = self.trained.saturating_add(len);
        }
        let (layout, copy_of) = (Layout::Same, None);
        self.parameters.push(Parameter {
            name,
            shape,
            range,
            store,
            layout,
            kind,
            mapped,
            packing: None,
            of_adapter,
            copy_of,
        });
        self.parameters.len() - 1
    }

    /// A slot of a parameter from element `start` on.
    fn slot(&mut self, parameter: usize, start: usize, shape: [usize; 2]) -> Slot {
        let of = &self.parameters[parameter];
        let store = match of.store {
            Store::Frozen => Store::Frozen,
            Store::Trained(at) => Store::Trained(at.saturating_add(start)),
        };
        let first = of.range.start.saturating_add(start);
        let range = first..first.saturating_add(shape[0].saturating_mul(shape[1]));
        self.slots += 1;
        Slot { index: self.slots - 1, parameter, range, shape, store }
    }

    /// A matrix of `hidden` columns that is not a linear layer.
    fn matrix(&mut self, name: &str, rows: usize, kind: Kind) -> Slot {
        let hidden = self.arch.hidden;
        let parameter = self.add(format!("{name}.weight"), vec![rows, hidden], kind);
        self.slot(parameter, 0, [rows, hidden])
    }

    fn norm(&mut self, name: String, width: usize, norm: Norm) -> NormSlots {
        let mut vector = |ending: &str, kind: Kind| {
            let parameter = self.add(format!("{name}.{ending}"), vec![width], kind);
            self.slot(parameter, 0, [1, width])
        };
        let weight = vector("weight", Kind::NormWeight);
        let bias = matches!(norm, Norm::Layer { .. }).then(|| vector("bias", Kind::Bias));
        NormSlots { weight, bias }
    }

    /// Adds the weights of some tensors, then their biases.
    fn tensors(
        &mut self,
        names: Vec<String>,
        outputs: &[usize],
        inputs: usize,
        bias: bool,
        kind: Kind,
    ) -> Tensors {
        let transposed = self.arch.names.transposed;
        let mut end = 0usize;
        let mut of = Vec::new();
        for (name, &outputs) in names.into_iter().zip(outputs) {
            let shape = if transposed { vec![inputs, outputs] } else { vec![outputs, inputs] };
            let weight = self.add(format!("{name}.weight"), shape, kind);
            if transposed {
                self.parameters[weight].layout = Layout::Transposed;
            }
            let start = end;
            end = start.saturating_add(outputs);
            of.push((name, weight, None, start..end));
        }
        if bias {
            for (name, _, bias, outputs) in &mut of {
                *bias = Some(self.add(format!("{name}.bias"), vec![outputs.len()], Kind::Bias));
            }
        }
        Tensors { of, inputs }
    }

    /// The linear layer for some outputs of the tensors.
    fn linear(&mut self, tensors: &Tensors, outputs: Range<usize>) -> Linear {
        let inputs = tensors.inputs;
        let mut parts = Vec::new();
        for (name, weight, bias, has) in &tensors.of {
            let (start, end) = (outputs.start.max(has.start), outputs.end.min(has.end));
            if start < end {
                let (skipped, rows) = (start - has.start, end - start);
                let weight = self.slot(*weight, skipped.saturating_mul(inputs), [rows, inputs]);
                let bias = bias.map(|bias| self.slot(bias, skipped, [1, rows]));
                let outputs = start - outputs.start..end - outputs.start;
                parts.push(Part { name: name.clone(), outputs, weight, bias, adapter: None });
            }
        }
        Linear { inputs, parts }
    }
}

impl NormSlots {
    fn slots_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        [&mut self.weight].into_iter().chain(&mut self.bias)
    }
}

impl BlockSlots {
    /// The slots of the model's own parameters.
    fn slots_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        let norms =
            [&mut self.attention_norm, &mut self.after_attention, &mut self.mlp_norm, &mut self.after_mlp];
        let norms = norms.into_iter().flatten().chain(self.qk_norm.iter_mut().flatten());
        let norms = norms.flat_map(NormSlots::slots_mut);
        let linears = [&mut self.q, &mut self.kv, &mut self.out, &mut self.up, &mut self.down];
        let linears = linears.into_iter().chain(&mut self.router);
        let parts = linears.flat_map(|linear| &mut linear.parts);
        norms.chain(parts.flat_map(|part| [&mut part.weight].into_iter().chain(&mut part.bias)))
    }
}
