//! Lays the parameters of an architecture out.

use super::{
    Adapter, BlockSlots, Kind, Layout, Linear, Lora, NormSlots, Parameter, ParameterMap, Part, Slot, Store,
    Trainable,
};
use crate::arch::{Architecture, Block, Names};
use crate::kernels::Norm;
use std::collections::BTreeMap;
use std::ops::Range;

/// The parameters of some file tensors whose outputs are adjacent.
struct Tensors {
    /// Name, index of weight and bias among the parameters, outputs.
    of: Vec<(String, usize, Option<usize>, Range<usize>)>,
    inputs: usize,
}

pub(super) struct Builder<'a> {
    arch: &'a Architecture,
    trainable: &'a Trainable,
    parameters: Vec<Parameter>,
    len: usize,
    trained: usize,
    slots: usize,
    /// Adapters by the module that they belong to: `A`, and which parameter `B` is.
    adapters: BTreeMap<String, (Slot, usize)>,
}

impl<'a> Builder<'a> {
    pub(super) fn new(arch: &'a Architecture, trainable: &'a Trainable) -> Builder<'a> {
        Builder {
            arch,
            trainable,
            parameters: Vec::new(),
            len: 0,
            trained: 0,
            slots: 0,
            adapters: BTreeMap::new(),
        }
    }

    pub(super) fn finish(mut self) -> ParameterMap {
        let (a, names) = (self.arch, self.arch.names);
        let embedding = self.matrix(names.embedding, a.vocab_size, Kind::Embedding);
        let positions = a.embedding.positions.map(|n| self.matrix(names.positions, n, Kind::Matrix));
        let mut blocks: Vec<BlockSlots> =
            a.blocks.iter().enumerate().map(|(n, block)| self.block(names, block, n)).collect();
        let norm = self.norm(names.norm.to_string(), a.hidden, a.head.norm);
        let head = match a.head.tied {
            true => embedding.clone(),
            false => self.matrix(names.head, a.vocab_size, Kind::Matrix),
        };
        // After the model's own parameters, whose places do not depend on an adapter.
        let rank = match self.trainable {
            Trainable::Adapter(lora) => {
                blocks.iter_mut().for_each(|block| self.attach(block, lora));
                lora.rank
            }
            _ => 0,
        };
        let Builder { parameters, len, trained, slots, .. } = self;
        ParameterMap { embedding, positions, blocks, norm, head, parameters, slots, len, trained, rank }
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
        // An expert's name instead of the MLP's.
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

    /// Adds an adapter to each part of the block that has one.
    fn attach(&mut self, block: &mut BlockSlots, lora: &Lora) {
        // As in `BlockSlots::linears`.
        let mlp = [&mut block.up, &mut block.down].into_iter().filter(|_| block.router.is_none());
        for linear in [&mut block.q, &mut block.kv, &mut block.out].into_iter().chain(mlp) {
            for part in linear.parts.iter_mut().filter(|part| lora.targets(&part.name)) {
                let (rank, inputs, name) = (lora.rank, linear.inputs, &part.name);
                let tensor = self.parameters.iter().find(|p| p.name == format!("{name}.weight"));
                let (start, elements) = tensor.map_or((0, 0), |p| (p.range.start, p.range.len()));
                // The outputs of a tensor by heads are by heads in the adapter too; Conv1D's adapter is not transposed.
                let layout = match tensor.map(|p| p.layout) {
                    Some(Layout::ByHead { heads }) => Layout::ByHead { heads },
                    _ => Layout::Same,
                };
                if !self.adapters.contains_key(name) {
                    let module = format!("base_model.model.{name}");
                    let shape = vec![rank, inputs];
                    let a = self.add(format!("{module}.lora_A.weight"), shape, Kind::AdapterIn);
                    let shape = vec![elements / inputs.max(1), rank];
                    let b = self.add(format!("{module}.lora_B.weight"), shape, Kind::AdapterOut);
                    self.parameters[b].layout = layout;
                    let a = self.slot(a, 0, [rank, inputs]);
                    self.adapters.insert(name.clone(), (a, b));
                }
                let (a, b) = self.adapters[name].clone();
                let rows = part.weight.shape[0];
                let skipped = part.weight.range.start.saturating_sub(start) / inputs.max(1);
                let b = self.slot(b, skipped.saturating_mul(rank), [rows, rank]);
                part.adapter = Some(Adapter { a, b, scale: lora.alpha / rank as f32 });
            }
        }
    }

    /// Adds a parameter; its index.
    fn add(&mut self, name: String, shape: Vec<usize>, kind: Kind) -> usize {
        let len = shape.iter().fold(1usize, |len, size| len.saturating_mul(*size));
        let range = self.len..self.len.saturating_add(len);
        self.len = range.end;
        let chosen = match self.trainable {
            Trainable::All => true,
            Trainable::Named(names) => names.contains(&name),
            Trainable::Adapter(_) => kind.is_adapter(),
        };
        let store = if chosen { Store::Trained(self.trained) } else { Store::Frozen };
        if chosen {
            self.trained = self.trained.saturating_add(len);
        }
        self.parameters.push(Parameter { name, shape, range, store, layout: Layout::Same, kind });
        self.parameters.len() - 1
    }

    /// A slot of a parameter from element `start` on.
    fn slot(&mut self, parameter: usize, start: usize, shape: [usize; 2]) -> Slot {
        let parameter = &self.parameters[parameter];
        let store = match parameter.store {
            Store::Frozen => Store::Frozen,
            Store::Trained(at) => Store::Trained(at.saturating_add(start)),
        };
        let first = parameter.range.start.saturating_add(start);
        let range = first..first.saturating_add(shape[0].saturating_mul(shape[1]));
        self.slots += 1;
        Slot { index: self.slots - 1, range, shape, store }
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

    /// The linear layer of some outputs of the tensors.
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
