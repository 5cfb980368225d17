//! Where each parameter stands in the flat buffer, and what it is called in files.
//!
//! Inside, every linear layer is `[outputs, inputs]` and projections that read the same input are adjacent
//! (queries, keys, values; gate, up), so that one product serves them. Files keep the family's names and
//! layout: a named parameter is a range here, and, for Conv1D, a transpose.

use crate::arch::{self, Architecture, Position};
use std::ops::Range;

/// A parameter as its file knows it.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Hugging Face name.
    pub name: String,
    /// Hugging Face shape.
    pub shape: Vec<usize>,
    /// Where it is in the flat buffer.
    pub range: Range<usize>,
    /// Stored here as the transpose of the file's (Conv1D keeps `[inputs, outputs]`).
    pub transposed: bool,
    /// What it is, which decides initialisation and weight decay.
    pub kind: Kind,
}

/// What a parameter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A matrix, or the position table.
    Matrix,
    /// The token embedding.
    Embedding,
    /// A matrix that writes to the residual stream.
    Residual,
    /// A bias.
    Bias,
    /// A norm's weight.
    NormWeight,
}

impl Kind {
    /// Weight decay skips biases and norms, as the Trainer does.
    pub fn decays(self) -> bool {
        !matches!(self, Kind::Bias | Kind::NormWeight)
    }
}

/// Ranges of a norm.
#[derive(Clone, Debug)]
pub struct NormAt {
    /// Weight, `[hidden]`.
    pub w: Range<usize>,
    /// Bias, `[hidden]`.
    pub b: Option<Range<usize>>,
}

/// Ranges of a linear layer.
#[derive(Clone, Debug)]
pub struct LinearAt {
    /// Weight, `[outputs, inputs]`.
    pub w: Range<usize>,
    /// Bias, `[outputs]`.
    pub b: Option<Range<usize>>,
}

/// Ranges of one block.
#[derive(Clone, Debug)]
pub struct LayerAt {
    /// Norm before attention.
    pub norm1: NormAt,
    /// Queries.
    pub q: LinearAt,
    /// Keys, then values.
    pub kv: LinearAt,
    /// The attention's output.
    pub out: LinearAt,
    /// Norm before the MLP.
    pub norm2: NormAt,
    /// Gate and up, or up alone.
    pub up: LinearAt,
    /// Down.
    pub down: LinearAt,
}

/// The flat buffer's map.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Token embedding, `[vocab, hidden]`.
    pub embedding: Range<usize>,
    /// Position table, `[positions, hidden]`.
    pub positions: Option<Range<usize>>,
    /// Blocks, in order.
    pub layers: Vec<LayerAt>,
    /// Norm before the head.
    pub norm: NormAt,
    /// The head, `[vocab, hidden]`: the embedding's range where tied.
    pub head: Range<usize>,
    /// Every parameter once, in the order of the buffer.
    pub parameters: Vec<Parameter>,
    len: usize,
}

impl Layout {
    /// Lays out the parameters of an architecture.
    pub fn of(a: &Architecture) -> Layout {
        let mut at = Builder { parameters: Vec::new(), len: 0, conv: a.layout == arch::Layout::Gpt2 };
        let names = Names(a.layout);
        let embedding = at.add(names.embedding(), vec![a.vocab_size, a.hidden], Kind::Embedding);
        let positions = matches!(a.position, Position::Learned)
            .then(|| at.add("transformer.wpe.weight".into(), vec![a.max_positions, a.hidden], Kind::Matrix));
        let layers = (0..a.layers).map(|n| layer(&mut at, &names, a, n)).collect();
        let norm = at.norm(names.final_norm(), a);
        let head = match a.tied {
            true => embedding.clone(),
            false => at.add("lm_head.weight".into(), vec![a.vocab_size, a.hidden], Kind::Matrix),
        };
        Layout { embedding, positions, layers, norm, head, len: at.len, parameters: at.parameters }
    }

    /// Elements of the flat buffer.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The parameter of a Hugging Face name.
    pub fn find(&self, name: &str) -> Option<&Parameter> {
        self.parameters.iter().find(|p| p.name == name)
    }
}

/// One block, in the order norm, q, k, v, out, norm, up, down.
fn layer(at: &mut Builder, names: &Names, a: &Architecture, n: usize) -> LayerAt {
    let (q, kv) = (a.heads.query_width(), a.heads.kv_width());
    let (norm1, norm2) = names.norms(n);
    let norm1 = at.norm(norm1, a);
    let (q, kv) = match a.layout {
        arch::Layout::Llama => {
            let name = |p: &str| format!("model.layers.{n}.self_attn.{p}_proj");
            let [wq, wk, wv] = [("q", q), ("k", kv / 2), ("v", kv / 2)]
                .map(|(p, out)| at.weight(&name(p), out, a.hidden, Kind::Matrix));
            let bias = a
                .bias
                .qkv
                .then(|| [("q", q), ("k", kv / 2), ("v", kv / 2)].map(|(p, out)| at.bias(&name(p), out)));
            let (bq, bkv) = bias.map(|[bq, bk, bv]| (bq, bk.start..bv.end)).unzip();
            (LinearAt { w: wq, b: bq }, LinearAt { w: wk.start..wv.end, b: bkv })
        }
        arch::Layout::Gpt2 => {
            // One file tensor holds all three; it is split here into ranges of the same memory.
            let name = format!("transformer.h.{n}.attn.c_attn");
            let w = at.weight(&name, q + kv, a.hidden, Kind::Matrix);
            let b = at.bias(&name, q + kv);
            let (w_cut, b_cut) = (w.start + q * a.hidden, b.start + q);
            (
                LinearAt { w: w.start..w_cut, b: Some(b.start..b_cut) },
                LinearAt { w: w_cut..w.end, b: Some(b_cut..b.end) },
            )
        }
    };
    let out = at.linear(&names.out(n), a.hidden, a.heads.query_width(), a.bias.out, Kind::Residual);
    let norm2 = at.norm(norm2, a);
    let (up, down) = match a.layout {
        arch::Layout::Llama => {
            let name = |p: &str| format!("model.layers.{n}.mlp.{p}_proj");
            let [wg, wu] =
                ["gate", "up"].map(|p| at.weight(&name(p), a.intermediate, a.hidden, Kind::Matrix));
            let bias = a.bias.mlp.then(|| ["gate", "up"].map(|p| at.bias(&name(p), a.intermediate)));
            let up = LinearAt { w: wg.start..wu.end, b: bias.map(|[bg, bu]| bg.start..bu.end) };
            (up, at.linear(&name("down"), a.hidden, a.intermediate, a.bias.mlp, Kind::Residual))
        }
        arch::Layout::Gpt2 => {
            let name = |p: &str| format!("transformer.h.{n}.mlp.{p}");
            (
                at.linear(&name("c_fc"), a.intermediate, a.hidden, a.bias.mlp, Kind::Matrix),
                at.linear(&name("c_proj"), a.hidden, a.intermediate, a.bias.mlp, Kind::Residual),
            )
        }
    };
    LayerAt { norm1, q, kv, out, norm2, up, down }
}

/// Names that differ between layouts.
struct Names(arch::Layout);

impl Names {
    fn embedding(&self) -> String {
        match self.0 {
            arch::Layout::Llama => "model.embed_tokens.weight".into(),
            arch::Layout::Gpt2 => "transformer.wte.weight".into(),
        }
    }

    fn final_norm(&self) -> String {
        match self.0 {
            arch::Layout::Llama => "model.norm".into(),
            arch::Layout::Gpt2 => "transformer.ln_f".into(),
        }
    }

    fn norms(&self, n: usize) -> (String, String) {
        match self.0 {
            arch::Layout::Llama => (
                format!("model.layers.{n}.input_layernorm"),
                format!("model.layers.{n}.post_attention_layernorm"),
            ),
            arch::Layout::Gpt2 => (format!("transformer.h.{n}.ln_1"), format!("transformer.h.{n}.ln_2")),
        }
    }

    fn out(&self, n: usize) -> String {
        match self.0 {
            arch::Layout::Llama => format!("model.layers.{n}.self_attn.o_proj"),
            arch::Layout::Gpt2 => format!("transformer.h.{n}.attn.c_proj"),
        }
    }
}

struct Builder {
    parameters: Vec<Parameter>,
    len: usize,
    /// Linear layers are Conv1D in files.
    conv: bool,
}

impl Builder {
    fn add(&mut self, name: String, shape: Vec<usize>, kind: Kind) -> Range<usize> {
        let range = self.len..self.len + shape.iter().product::<usize>();
        self.len = range.end;
        self.parameters.push(Parameter { name, shape, range: range.clone(), transposed: false, kind });
        range
    }

    fn weight(&mut self, name: &str, outputs: usize, inputs: usize, kind: Kind) -> Range<usize> {
        let shape = if self.conv { vec![inputs, outputs] } else { vec![outputs, inputs] };
        let range = self.add(format!("{name}.weight"), shape, kind);
        if let Some(last) = self.parameters.last_mut() {
            last.transposed = self.conv;
        }
        range
    }

    fn bias(&mut self, name: &str, outputs: usize) -> Range<usize> {
        self.add(format!("{name}.bias"), vec![outputs], Kind::Bias)
    }

    fn linear(&mut self, name: &str, outputs: usize, inputs: usize, bias: bool, kind: Kind) -> LinearAt {
        let w = self.weight(name, outputs, inputs, kind);
        LinearAt { w, b: bias.then(|| self.bias(name, outputs)) }
    }

    fn norm(&mut self, name: String, a: &Architecture) -> NormAt {
        let w = self.add(format!("{name}.weight"), vec![a.hidden], Kind::NormWeight);
        let layer = matches!(a.norm, crate::kernels::Norm::Layer { .. });
        NormAt { w, b: layer.then(|| self.bias(&name, a.hidden)) }
    }
}
