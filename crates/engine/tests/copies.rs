//! Weight copies that a card keeps for its products: whatever writes to a weight, products read its current values, and
//! results are the same bytes as without copies.

mod common;

use common::card::{card, emulated};
use common::golden::{adapters, for_each, load};
use common::threads::Threads;
use common::{OPTIMIZERS, Random, STEP, accumulate, architecture, model_of, saved_as, trained_gradients};
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use suasion_engine::kernels::{
    Activation, Adafactor, Attention, AttentionPlan, AttentionRange, Buffer, Draw, Dropout, Heads, Norm,
    PlanBuffer, Routing, Sgd, TargetLoss, View,
};
use suasion_engine::{
    ADAPTER_WEIGHTS, AdapterFolder, Architecture, Backend, Base, Batch, Budget, Collective, Cuda, Device,
    Lora, MemoryPlan, Model, Precision, Rates, SingleRank, Targets, Trainable, Update, WeightType,
};

/// A card, and the buffers of the operation under test.
struct Bench {
    b: Cuda,
    random: Random,
    held: Vec<Buffer>,
}

impl Bench {
    /// A matrix of random numbers.
    fn m(&mut self, rows: usize, width: usize) -> View {
        let buffer = self.b.allocate(rows * width).unwrap();
        let values: Vec<f32> = (0..rows * width).map(|_| self.random.normal() as f32).collect();
        self.b.write(buffer.view(), &values).unwrap();
        self.held.push(buffer);
        self.held[self.held.len() - 1].matrix(rows, width)
    }

    /// The same with non-negative numbers.
    fn positive(&mut self, rows: usize, width: usize) -> View {
        let x = self.m(rows, width);
        let (whole, mut values) = (x.part(0, x.len()), vec![0.0; x.len()]);
        self.b.read(whole, &mut values).unwrap();
        values.iter_mut().for_each(|x| *x = x.abs() + 0.1);
        self.b.write(whole, &values).unwrap();
        x
    }
}

const ROWS: usize = 6;
const WIDTH: usize = 8;

/// Reads `w` by using it as the weights of a product.
fn product(b: &mut Cuda, w: View) -> Vec<u32> {
    let (x, y) = (b.allocate(3 * 32).unwrap(), b.allocate(3 * w.len() / 32).unwrap());
    let values: Vec<f32> = (0..3 * 32).map(|i| (i as f32 * 0.37).sin()).collect();
    b.write(x.view(), &values).unwrap();
    let w = w.matrix(w.len() / 32, 32);
    b.linear(y.matrix(3, w.rows()), false, x.matrix(3, 32), w, None).unwrap();
    let mut values = vec![0.0; y.view().len()];
    b.read(y.view(), &mut values).unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// Reads `x[32, 32]` by using it as the input of a product.
fn product_of(b: &mut Cuda, x: View) -> Vec<u32> {
    let (w, y) = (b.allocate(3 * 32).unwrap(), b.allocate(3 * 32).unwrap());
    let values: Vec<f32> = (0..3 * 32).map(|i| (i as f32 * 0.37).sin()).collect();
    b.write(w.view(), &values).unwrap();
    b.linear(y.matrix(32, 3), false, x, w.matrix(3, 32), None).unwrap();
    let mut values = vec![0.0; 3 * 32];
    b.read(y.view(), &mut values).unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// Runs every operation that writes f32 values, with each of its results in turn placed in weights that have a copy:
/// inside the copied range, and across its start and end.
#[test]
fn a_product_reads_what_was_written_last() {
    let rms = Norm::Rms { eps: 1e-5, offset: 0.0 };
    let draw = Draw { key: 3, site: 1 };
    let dropout = Dropout { draw, rate: 0.4 };
    let plan = || AttentionPlan {
        rows: (0..6).collect(),
        ranges: vec![AttentionRange { prefix: 0..0, own: 0..6, queries: 0..6 }],
        groups: vec![vec![0]],
    };
    fn attention(plan: &PlanBuffer) -> Attention<'_> {
        let heads = Heads { heads: 2, kv_heads: 1, head_dim: 4, scale: 1.0, softcap: None, window: None };
        Attention { heads, plan, dropout: None }
    }
    let routing = Routing { per_row: 1, normalise: false };
    let adafactor = Adafactor { t: 2, lr: 0.1, weight_decay: 0.1, gradient_scale: 1.0 };
    let sgd = Sgd { lr: 0.1, momentum: 0.9, weight_decay: 0.1, gradient_scale: 1.0 };
    let whole = |y: View| y.part(0, y.len());
    let row = |y: View, len: usize| y.part(0, len);
    type Operation<'a> = (&'static str, Box<dyn Fn(&mut Bench, View) + 'a>);
    macro_rules! operations {
        ($($name:literal: |$o:ident, $y:ident| $body:expr;)*) => {
            [$(($name, Box::new(|$o: &mut Bench, $y: View| { $body; }) as Box<dyn Fn(&mut Bench, View)>)),*]
        };
    }
    let operations: Vec<Operation> = operations! {
        "write": |o, y| o.b.write(whole(y), &[0.7; ROWS * WIDTH]).unwrap();
        "fill": |o, y| o.b.fill(y, 0.3).unwrap();
        "scale": |o, y| o.b.scale(y, -0.3).unwrap();
        "copy": |o, y| { let x = o.m(ROWS, WIDTH); o.b.copy(y, x).unwrap() };
        "copy of columns": |o, y| { let x = o.m(ROWS, 3); o.b.copy(y.columns(2..5), x).unwrap() };
        "blend": |o, y| { let x = o.m(ROWS, WIDTH); o.b.blend(y, x, 0.3).unwrap() };
        "swap, first": |o, y| { let x = o.m(ROWS, WIDTH); o.b.swap(y, x).unwrap() };
        "swap, second": |o, y| { let x = o.m(ROWS, WIDTH); o.b.swap(x, y).unwrap() };
        "add": |o, y| { let x = o.m(ROWS, WIDTH); o.b.add(y, x).unwrap() };
        "gather": |o, y| {
            let (x, rows) = (o.m(ROWS, WIDTH), o.b.upload_indices(&[0, 5, 2, 2, 1, 4]).unwrap());
            o.b.gather(y, x, rows.view()).unwrap()
        };
        "scatter": |o, y| {
            let (x, rows) = (o.m(3, WIDTH), o.b.upload_indices(&[1, 5, 1]).unwrap());
            o.b.scatter_add(y, x, rows.view()).unwrap()
        };
        "norm": |o, y| {
            let (x, w, stats) = (o.m(ROWS, WIDTH), o.m(1, WIDTH), o.m(ROWS, 1));
            o.b.norm(rms, y, stats, x, w, None).unwrap()
        };
        "norm, statistics": |o, y| {
            let (x, w, to) = (o.m(ROWS, WIDTH), o.m(1, WIDTH), o.m(ROWS, WIDTH));
            o.b.norm(rms, to, row(y, ROWS), x, w, None).unwrap()
        };
        "norm again": |o, y| {
            let (x, w, stats) = (o.m(ROWS, WIDTH), o.m(1, WIDTH), o.m(ROWS, 1));
            o.b.norm_again(rms, y, stats, x, w, None).unwrap()
        };
        "norm backward": |o, y| {
            let (x, dy, w, stats) = (o.m(ROWS, WIDTH), o.m(ROWS, WIDTH), o.m(1, WIDTH), o.m(ROWS, 1));
            o.b.norm_backward(rms, y, None, None, dy, stats, x, w).unwrap()
        };
        "norm backward, weight": |o, y| {
            let (x, dy, w, stats) = (o.m(ROWS, WIDTH), o.m(ROWS, WIDTH), o.m(1, WIDTH), o.m(ROWS, 1));
            let dx = o.m(ROWS, WIDTH);
            o.b.norm_backward(rms, dx, Some(row(y, WIDTH)), None, dy, stats, x, w).unwrap()
        };
        "norm backward, bias": |o, y| {
            let (x, dy, w, stats) = (o.m(ROWS, WIDTH), o.m(ROWS, WIDTH), o.m(1, WIDTH), o.m(ROWS, 2));
            let (dx, layer) = (o.m(ROWS, WIDTH), Norm::Layer { eps: 1e-5 });
            o.b.norm_backward(layer, dx, None, Some(row(y, WIDTH)), dy, stats, x, w).unwrap()
        };
        "linear": |o, y| { let (x, w) = (o.m(ROWS, 5), o.m(WIDTH, 5)); o.b.linear(y, false, x, w, None).unwrap() };
        "linear dx": |o, y| { let (dy, w) = (o.m(ROWS, 5), o.m(5, WIDTH)); o.b.linear_dx(y, true, dy, w).unwrap() };
        "linear dw": |o, y| { let (dy, x) = (o.m(4, ROWS), o.m(4, WIDTH)); o.b.linear_dw(y, true, dy, x).unwrap() };
        "linear dw of no rows": |o, y| {
            let x = o.m(1, WIDTH);
            o.b.linear_dw(y, false, x.columns(0..ROWS).top(0), x.top(0)).unwrap()
        };
        "linear db": |o, y| { let dy = o.m(4, WIDTH); o.b.linear_db(row(y, WIDTH), false, dy).unwrap() };
        "row norms": |o, y| {
            let (w, b, a) = (o.m(ROWS, 9), o.m(ROWS, 2), o.m(2, 9));
            o.b.row_norms(row(y, ROWS), w, b, a, 0.5).unwrap()
        };
        "divide": |o, y| { let (a, b) = (o.m(ROWS, WIDTH), o.positive(ROWS, WIDTH)); o.b.divide(y, a, b).unwrap() };
        "scale columns": |o, y| {
            let (x, f) = (o.m(ROWS, WIDTH), o.m(1, WIDTH));
            o.b.scale_columns(y, false, x, f, None).unwrap()
        };
        "column dots": |o, y| {
            let (a, b, d) = (o.m(5, WIDTH), o.m(5, WIDTH), o.positive(1, WIDTH));
            o.b.column_dots(row(y, WIDTH), false, a, b, d).unwrap()
        };
        "rotate": |o, y| {
            let (table, rows) = (o.m(9, 4), o.b.upload_indices(&[3, 1, 2, 8, 4, 5]).unwrap());
            o.b.rotate(y, 4, table, rows.view(), false).unwrap()
        };
        "dropout": |o, y| o.b.dropout(y, dropout).unwrap();
        "noise": |o, y| { let sizes = o.m(ROWS, 1); o.b.add_noise(y, sizes, draw).unwrap() };
        "attention": |o, y| {
            let (q, kv, lse) = (o.m(6, 8), o.m(6, 8), o.m(6, 2));
            let plan = o.b.upload_plan(plan()).unwrap();
            o.b.attention(attention(&plan), y, lse, q, kv).unwrap()
        };
        "attention, scores": |o, y| {
            let (q, kv, to) = (o.m(6, 8), o.m(6, 8), o.m(6, 8));
            let plan = o.b.upload_plan(plan()).unwrap();
            o.b.attention(attention(&plan), to, row(y, 12), q, kv).unwrap()
        };
        "attention backward": |o, y| {
            let (q, kv, lse, out, d, dkv) = (o.m(6, 8), o.m(6, 8), o.m(6, 2), o.m(6, 8), o.m(6, 8), o.m(6, 8));
            let plan = o.b.upload_plan(plan()).unwrap();
            o.b.attention_backward(attention(&plan), y, dkv, d, out, lse, q, kv).unwrap()
        };
        "attention backward, keys": |o, y| {
            let (q, kv, lse, out, d, dq) = (o.m(6, 8), o.m(6, 8), o.m(6, 2), o.m(6, 8), o.m(6, 8), o.m(6, 8));
            let plan = o.b.upload_plan(plan()).unwrap();
            o.b.attention_backward(attention(&plan), dq, y, d, out, lse, q, kv).unwrap()
        };
        "activate": |o, y| { let up = o.m(ROWS, 16); o.b.activate(Activation::SwiGlu, y, up).unwrap() };
        "activate backward": |o, y| {
            let (da, up) = (o.m(ROWS, WIDTH), o.m(ROWS, WIDTH));
            o.b.activate_backward(Activation::Gelu, y, da, up).unwrap()
        };
        "scale rows": |o, y| { let f = o.m(ROWS, 1); o.b.scale_rows(y, f).unwrap() };
        "row dots": |o, y| { let (a, b) = (o.m(ROWS, 5), o.m(ROWS, 5)); o.b.row_dots(row(y, ROWS), a, b).unwrap() };
        "route": |o, y| { let w = o.m(ROWS, 1); o.b.route(routing, y, w).map(drop).unwrap() };
        "route, weights": |o, y| { let p = o.m(ROWS, 4); o.b.route(routing, p, row(y, ROWS)).map(drop).unwrap() };
        "route backward": |o, y| {
            let (p, w, d) = (o.m(ROWS, WIDTH), o.m(ROWS, 1), o.m(ROWS, 1));
            let routes = o.b.route(routing, p, w).unwrap();
            o.b.route_backward(routing, y, p, d, &routes).unwrap()
        };
        "experts": |o, y| {
            let (x, w) = (o.m(ROWS, 5), o.m(2 * WIDTH, 5));
            let offsets = o.b.upload_indices(&[0, 4, 6]).unwrap();
            o.b.grouped_linear(y, x, &[w], offsets.view()).unwrap()
        };
        "experts dx": |o, y| {
            let (dy, w) = (o.m(ROWS, 5), o.m(10, WIDTH));
            let offsets = o.b.upload_indices(&[0, 4, 6]).unwrap();
            o.b.grouped_linear_dx(y, dy, &[w], offsets.view()).unwrap()
        };
        "experts dw": |o, y| {
            let (dy, x) = (o.m(5, 3), o.m(5, WIDTH));
            let offsets = o.b.upload_indices(&[0, 4, 5]).unwrap();
            o.b.grouped_linear_dw(y, 0, false, dy, x, offsets.view()).unwrap()
        };
        "loss": |o, y| {
            let (logits, ids) = (o.m(6, 9), o.b.upload_indices(&[0, 8, 2, 2, 1, 4]).unwrap());
            o.b.cross_entropy(row(y, 6 * TargetLoss::COLUMNS), logits, ids.view(), None, None, 0.0).unwrap()
        };
        "loss, logits": |o, y| {
            let (losses, w) = (o.m(ROWS, TargetLoss::COLUMNS), o.m(ROWS, 1));
            let ids = o.b.upload_indices(&[0, 7, 2, 2, 1, 4]).unwrap();
            o.b.cross_entropy(losses, y, ids.view(), Some(w), None, 0.0).unwrap()
        };
        "adamw": |o, y| {
            let (g, m, v) = (o.m(1, 48), o.m(1, 48), o.positive(1, 48));
            o.b.adamw(STEP, whole(y), g, m, v).unwrap()
        };
        "adamw, moments": |o, y| {
            let (p, g, v) = (o.m(1, 24), o.m(1, 24), o.positive(1, 24));
            o.b.adamw(STEP, p, g, row(y, 24), v).unwrap()
        };
        "adamw, squares": |o, y| {
            let (p, g, m) = (o.m(1, 24), o.m(1, 24), o.m(1, 24));
            o.b.fill(y, 0.5).unwrap();
            product(&mut o.b, y.part(0, 32));
            o.b.adamw(STEP, p, g, m, row(y, 24)).unwrap()
        };
        "adamw in 8 bits": |o, y| {
            let (g, scales) = (o.m(1, 48), [o.positive(1, 1), o.positive(1, 1)]);
            let codes = [o.b.allocate_bytes(48).unwrap(), o.b.allocate_bytes(48).unwrap()];
            o.b.adamw_8bit(STEP, whole(y), g, codes.each_ref().map(|c| c.view()), scales).unwrap()
        };
        "adamw in 8 bits, scales": |o, y| {
            let (p, g) = (o.m(1, 48), o.m(1, 48));
            let codes = [o.b.allocate_bytes(48).unwrap(), o.b.allocate_bytes(48).unwrap()];
            let scales = [y.part(0, 1), y.part(1, 1)];
            o.b.adamw_8bit(STEP, p, g, codes.each_ref().map(|c| c.view()), scales).unwrap()
        };
        "adafactor": |o, y| {
            let (g, rows, columns) = (o.m(1, 48), o.positive(1, ROWS), o.positive(1, WIDTH));
            o.b.adafactor(adafactor, y, g, rows, Some(columns)).unwrap()
        };
        "adafactor, rows and columns": |o, y| {
            let (p, g) = (o.m(ROWS, WIDTH), o.m(1, 48));
            o.b.fill(y, 0.5).unwrap();
            product(&mut o.b, y.part(0, 32));
            o.b.adafactor(adafactor, p, g, y.part(0, ROWS), Some(y.part(ROWS, WIDTH))).unwrap()
        };
        "adafactor of a vector": |o, y| {
            let (g, v) = (o.m(1, 48), o.positive(1, 48));
            o.b.adafactor(adafactor, whole(y), g, v, None).unwrap()
        };
        "sgd": |o, y| { let g = o.m(1, 48); o.b.sgd(sgd, whole(y), g, None).unwrap() };
        "sgd with momentum": |o, y| { let (g, m) = (o.m(1, 48), o.m(1, 48)); o.b.sgd(sgd, whole(y), g, Some(m)).unwrap() };
        "sgd, momentum": |o, y| { let (p, g) = (o.m(1, 48), o.m(1, 48)); o.b.sgd(sgd, p, g, Some(whole(y))).unwrap() };
    }
    .into();
    // 40 elements before those with a copy, and as many after.
    for (name, operation) in &operations {
        for start in [100, 20, 1040] {
            let Some(b) = card(Precision::Bf16, 1) else { return };
            let mut o = Bench { b, random: Random(5), held: Vec::new() };
            let all = o.m(1, 1104);
            let kept = all.part(40, 1024);
            o.b.keep_factor(kept, false).unwrap();
            let before = product(&mut o.b, kept);
            operation(&mut o, all.part(start, ROWS * WIDTH).matrix(ROWS, WIDTH));
            let after = product(&mut o.b, kept);
            let mut values = vec![0.0; 1024];
            o.b.read(kept, &mut values).unwrap();
            let plain = o.b.allocate(1024).unwrap();
            o.b.write(plain.view(), &values).unwrap();
            assert!(after == product(&mut o.b, plain.view()), "{name} at {start}: an old copy was read");
            // A result of a few elements may lie before the copied range.
            assert!(start != 100 || before != after, "{name} wrote nothing");
            // The same in an activation shared by several products.
            let shared = o.m(1, 1104).part(40, 1024).matrix(32, 32);
            let whole = o.held[o.held.len() - 1].view();
            o.b.share_factor(shared).unwrap();
            let before = product_of(&mut o.b, shared);
            operation(&mut o, whole.part(start, ROWS * WIDTH).matrix(ROWS, WIDTH));
            let after = product_of(&mut o.b, shared);
            o.b.release_factor(shared);
            assert!(after == product_of(&mut o.b, shared), "{name} at {start}: an old activation was read");
            assert!(start != 100 || before != after, "{name} wrote nothing");
        }
    }
}

/// A product that writes into weights of the same buffer, and sums over ranks.
#[test]
fn sums_over_ranks_and_products_into_weights_are_seen() {
    let check = |name: &str, write: &dyn Fn(&mut Cuda, View)| {
        let Some(mut b) = card(Precision::Bf16, 1) else { return };
        let buffer = b.allocate(1024).unwrap();
        let values: Vec<f32> = (0..1024).map(|i| (i as f32).cos()).collect();
        b.write(buffer.view(), &values).unwrap();
        b.keep_factor(buffer.view(), false).unwrap();
        let before = product(&mut b, buffer.view());
        write(&mut b, buffer.view());
        let after = product(&mut b, buffer.view());
        let (mut values, plain) = (vec![0.0; 1024], b.allocate(1024).unwrap());
        b.read(buffer.view(), &mut values).unwrap();
        b.write(plain.view(), &values).unwrap();
        assert!(after == product(&mut b, plain.view()), "{name}: an old copy was read");
        assert!(before != after, "{name} wrote nothing");
    };
    check("a product within the weights", &|b, w| {
        let part = |at: usize, rows: usize| w.part(at, 16 * rows).matrix(rows, 16);
        b.linear(part(0, 8), true, part(256, 8), part(512, 16), None).unwrap();
    });
    if common::card::real().is_some() {
        return suasion_test_support::skipped("ranks need a card each: tests/cards.rs");
    }
    for (n, name) in ["all-reduce", "reduce-scatter", "all-gather"].into_iter().enumerate() {
        let sum = |b: &mut Cuda, x: View, collective: &dyn Collective| {
            let cuts = [0, 400, 1024];
            match n {
                0 => b.all_reduce(x, collective),
                1 => b.reduce_scatter(x, &cuts, collective),
                _ => b.all_gather(x, &cuts, collective),
            }
            .unwrap();
        };
        Threads::run(2, |rank, collective| {
            if rank == 0 {
                return check(name, &|b, w| sum(b, w, collective));
            }
            let Some(mut b) = card(Precision::Bf16, 2) else { return };
            let x = b.allocate(1024).unwrap();
            b.fill(x.view(), 0.5).unwrap();
            sum(&mut b, x.view(), collective);
            // Its share is complete once its card has finished.
            b.sync().unwrap();
        });
    }
}

/// A card with copies and one without compute the same results.
fn both<T: PartialEq>(what: &str, mut run: impl FnMut(Cuda) -> T) -> Option<T> {
    let with = run(card(Precision::Bf16, 1)?);
    assert!(with == run(card(Precision::Bf16, 2)?.without_copies()), "{what}");
    Some(with)
}

type Bits = Vec<Vec<u32>>;

/// The gradients and the weights of a model.
fn bits<B: Backend>(model: &Model<B>) -> Bits {
    let weights = model.parameter_names().into_iter().map(|name| model.parameter(&name).unwrap().data);
    let all = trained_gradients(model).into_iter().map(|(_, values)| values).chain(weights);
    all.map(|values| values.into_iter().map(f32::to_bits).collect()).collect()
}

/// A pass and a step, then the losses under the new weights.
fn step_and_losses<B: Backend>(model: &mut Model<B>, batch: &Batch) -> (Bits, Vec<u32>) {
    accumulate(model, batch, 1.0 / batch.weight() as f32);
    model.adamw(&STEP).unwrap();
    let losses = model.forward(batch).unwrap();
    (bits(model), losses.iter().map(|loss| loss.nll.to_bits()).collect())
}

#[test]
fn goldens_have_the_same_bytes_with_copies_and_without() {
    // Models with the same parameters have the same products.
    let mut seen = BTreeSet::new();
    let batch = rows(4);
    for_each(|family, dir, arch, _| {
        if !seen.insert((arch.model_type.clone(), arch.parameter_names())) {
            return;
        }
        both(family, |card| step_and_losses(&mut load(arch.clone(), dir, card, &[&batch], true), &batch));
        // DoRA if the family has it: it reads its weights in two ways.
        let dora = |adapter: &AdapterFolder| adapter.lora_for(&arch).unwrap().dora;
        if let Some(adapter) = adapters(dir).into_iter().max_by_key(dora) {
            let lora = Trainable::Adapter(adapter.lora_for(&arch).unwrap());
            both(&format!("{family} {}", adapter.path.display()), |card| {
                let tokens = batch.tokens();
                let budget = Budget { tokens, targets: tokens, train: true, recompute: false };
                let mut model = Model::with_base(arch.clone(), card, budget, &lora, Base::Mapped).unwrap();
                model.load_weights(dir).unwrap();
                model.load_adapter(&adapter.path.join(ADAPTER_WEIGHTS)).unwrap();
                step_and_losses(&mut model, &batch)
            });
        }
    });
}

fn rows(seed: u64) -> Batch {
    let mut batch = Batch::default();
    for row in 0..2 {
        let len = 4 + 3 * row;
        let ids = Random(seed + row).ids(len as usize);
        batch.push(&ids, (1..len as u32).map(|i| (i - 1, ids[i as usize], 1.0)));
    }
    batch
}

/// Everything that changes the weights of a run: the steps of every optimizer, alone and with shares of ranks,
/// exchanged averages, files, single parameters.
#[test]
fn whatever_happens_to_weights_computes_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let mut arch = architecture("qwen2");
    // Matrices large enough for 8-bit states.
    arch.blocks.truncate(1);
    arch.blocks.iter_mut().for_each(|block| block.mlp.intermediate = 172);
    let rates = |p: &suasion_engine::params::Parameter| {
        let biased = p.name.ends_with("bias");
        Rates { lr: 1e-2, weight_decay: if biased { 0.0 } else { 0.1 } }
    };
    let step = |model: &mut Model<Cuda>, t: u64, collective: &dyn Collective| {
        model.zero_gradients();
        accumulate(model, &rows(t + 10 * collective.rank() as u64), 0.05);
        model.reduce_gradients(collective).unwrap();
        let update = Update { t, beta1: 0.9, beta2: 0.99, eps: 1e-8, momentum: 0.9, gradient_scale: 0.5 };
        model.update(&update, &rates).unwrap();
        model.exchange_parameters(collective).unwrap();
    };
    for kind in OPTIMIZERS {
        let what = format!("{kind:?}");
        both(&what, |card| {
            let mut model = model_of(arch.clone(), card, true, &Trainable::All);
            model.choose_optimizer(kind).unwrap();
            (1..=2).for_each(|t| step(&mut model, t, &SingleRank));
            bits(&model)
        });
        // A real card runs alone here; ranks on several cards are in tests/cards.rs.
        if common::card::real().is_some() {
            continue;
        }
        Threads::run(2, |rank, collective| {
            both(&format!("{what}, rank {rank} of 2"), |card| {
                let mut model = model_of(arch.clone(), card, false, &Trainable::All);
                model.choose_optimizer(kind).unwrap();
                model.share_optimizer(collective).unwrap();
                (1..=2).for_each(|t| step(&mut model, t, collective));
                bits(&model)
            })
        });
    }
    both("averages, files and parameters", |card| {
        let mut model = model_of(arch.clone(), card, false, &Trainable::All);
        let mut seen = Vec::new();
        let mut see = |model: &mut Model<Cuda>| {
            model.zero_gradients();
            accumulate(model, &rows(3), 0.05);
            seen.push(bits(model));
        };
        see(&mut model);
        model.save_masters(dir.path()).unwrap();
        model.update_average(0.5).unwrap();
        step(&mut model, 1, &SingleRank);
        model.update_average(0.5).unwrap();
        see(&mut model);
        model.exchange_average().unwrap();
        see(&mut model);
        model.exchange_average().unwrap();
        see(&mut model);
        for name in model.parameter_names().iter().filter(|name| name.ends_with("k_proj.weight")) {
            let mut tensor = model.parameter(name).unwrap();
            tensor.data.iter_mut().for_each(|x| *x += 0.01);
            model.set_parameter(name, &tensor).unwrap();
        }
        see(&mut model);
        model.init_random(9).unwrap();
        see(&mut model);
        model.load_weights(dir.path()).unwrap();
        see(&mut model);
        assert!(seen.windows(2).all(|pair| pair[0] != pair[1]), "nothing happened");
        assert!(seen[0] == seen[seen.len() - 1] && seen[1] == seen[3], "the weights came back");
        seen
    });
}

/// Weights are rounded once per step, when they change: no product of a pass rounds them.
#[test]
fn no_pass_rounds_a_weight() {
    for family in ["llama", "qwen2", "gpt2", "qwen3_moe"] {
        let count = |card: Cuda| {
            let rounded = card.rounded();
            let mut model = model_of(architecture(family), card, false, &Trainable::All);
            let pass = |model: &mut Model<Cuda>| {
                let before = rounded.load(Ordering::Relaxed);
                accumulate(model, &rows(1), 0.1);
                rounded.load(Ordering::Relaxed) - before
            };
            let first = pass(&mut model);
            model.adamw(&STEP).unwrap();
            let others = [(); 2].map(|()| pass(&mut model));
            assert_eq!(others[0], others[1]);
            (first, others[0], model.plan().copies / 2)
        };
        let (Some(with), Some(without)) = (card(Precision::Bf16, 1), card(Precision::Bf16, 1)) else {
            return;
        };
        let ((first, each, copied), (_, converted, none)) = (count(with), count(without.without_copies()));
        assert_eq!((first - each, none), (copied, 0), "{family}: the copies are made once");
        let model = model_of(architecture(family), suasion_engine::Cpu::new(), false, &Trainable::All);
        let matrices = |name: &String| model.parameter(name).unwrap().shape.len() > 1;
        let tied = model.architecture().head.tied;
        let products = |name: &String| {
            matrices(name) && (tied || !name.contains("embed_tokens")) && !name.contains("wpe")
        };
        let names = model.parameter_names();
        let weights: usize =
            names.iter().filter(|n| products(n)).map(|n| model.parameter(n).unwrap().data.len()).sum();
        // Each is a factor of a forward product and of a backward product; of experts, only those with rows.
        if family != "qwen3_moe" {
            assert!(converted - each > 2 * weights as u64, "{family}");
        }
        if family == "llama" {
            assert_eq!(each, activations(&architecture(family), &rows(1)));
        }
        assert!(copied >= weights as u64 && (copied as usize) < weights + weights / 5, "{family}");
    }
}

/// Elements of activations and their gradients that products of a pass read, counted once each even if several products
/// read them.
fn activations(arch: &Architecture, batch: &Batch) -> u64 {
    let (tokens, targets) = (batch.tokens(), batch.targets.len());
    let mut sum = 0;
    for (n, block) in arch.blocks.iter().enumerate() {
        let (hidden, inner, heads) = (arch.hidden, block.mlp.intermediate, block.attention.heads);
        let (q, kv, up) = (heads.query_width(), heads.kv_width(), 2 * inner);
        // The last layer has queries only for the targets, whose normalised rows are gathered.
        let last = n + 1 == arch.blocks.len();
        let (queries, gathered) = if last { (targets, 2 * targets * hidden) } else { (tokens, 0) };
        let forward = tokens * hidden + queries * (q + hidden + inner);
        let of_mlp = hidden + inner + up + hidden;
        let of_attention = hidden + q + q;
        sum += forward + queries * (of_mlp + of_attention) + tokens * (kv + hidden) + gathered;
    }
    (sum + targets * (arch.hidden + arch.vocab_size + arch.hidden)) as u64
}

/// Of a base in f32 or f16, a card holds in bf16 the tensors that only products read, and unchanged those that other
/// operations read.
#[test]
fn a_base_that_products_alone_read_is_held_in_bf16() {
    for (family, dora) in
        [("llama", false), ("llama", true), ("qwen2", false), ("gpt2", false), ("qwen3_moe", false)]
    {
        let arch = architecture(family);
        let mut plain = model_of(arch.clone(), suasion_engine::Cpu::new(), false, &Trainable::All);
        let module = if family == "gpt2" { "c_attn" } else { "q_proj" };
        let targets = Targets::Names(vec![module.into()]);
        let trainable = Trainable::Adapter(Lora { rank: 2, dora, targets, ..Lora::default() });
        let budget = Budget { tokens: 64, targets: 64, train: true, recompute: false };
        let planned = MemoryPlan::over(&arch, budget, &trainable, Base::Mapped).unwrap();
        for kind in [WeightType::F32, WeightType::F16, WeightType::BF16] {
            let dir = saved_as(&mut plain, kind);
            let plan = planned.over_files(dir.path());
            let what = format!("{family} {kind:?} DoRA {dora}");
            let run = |device: Device| {
                let mut model = Model::with_base(arch.clone(), device, budget, &trainable, Base::Mapped)?;
                model.load_weights(dir.path())?;
                model.init_adapter(4)?;
                let held = model.allocated();
                accumulate(&mut model, &rows(3), 0.1);
                Ok::<_, suasion_engine::Error>((bits(&model), *model.plan(), held))
            };
            let (Some(with), Some(without)) = (card(Precision::Bf16, 1), card(Precision::Bf16, 1)) else {
                return;
            };
            let (with, without) = (run(with.into()).unwrap(), run(without.without_copies().into()).unwrap());
            assert!(with.0 == without.0, "{what}: other bytes");
            let on_card = plan.in_precision(Precision::Bf16);
            assert_eq!((with.1.mapped, with.1.copies), (on_card.mapped, on_card.copies), "{what}");
            assert_eq!((with.2, without.1.mapped), (with.1.own(), plan.mapped), "{what}");
            let names = plain.parameter_names();
            let len = |name: &str| plain.parameter(name).unwrap().data.len() as u64;
            let mapped: u64 =
                names.iter().filter(|n| plain.parameter(n).unwrap().shape.len() > 1).map(|n| len(n)).sum();
            let own = match kind {
                WeightType::BF16 => 0,
                // A tied embedding is gathered and multiplied; DoRA computes norms of its weights; positions are added.
                _ if family == "qwen2" => len("model.embed_tokens.weight") * bytes(kind),
                _ if family == "gpt2" => {
                    len("transformer.wte.weight") * bytes(kind)
                        + len("transformer.wpe.weight") * (bytes(kind) - 2)
                }
                _ => {
                    let measured: u64 =
                        names.iter().filter(|n| dora && n.ends_with("q_proj.weight")).map(|n| len(n)).sum();
                    len("model.embed_tokens.weight") * (bytes(kind) - 2) + measured * bytes(kind)
                }
            };
            assert_eq!(with.1.mapped, 2 * mapped + own, "{what}");
        }
    }
}

fn bytes(kind: WeightType) -> u64 {
    if kind == WeightType::F32 { 4 } else { 2 }
}

/// A card without room for a base in f32 can train with it, as planned.
#[test]
fn a_base_in_f32_fits_where_its_bf16_does() {
    let mut arch: Architecture = architecture("llama");
    arch.blocks.iter_mut().for_each(|block| block.mlp.intermediate = 4000);
    let dir = tempfile::tempdir().unwrap();
    model_of(arch.clone(), suasion_engine::Cpu::new(), false, &Trainable::All)
        .save_masters(dir.path())
        .unwrap();
    let trainable = Trainable::Adapter(Lora {
        rank: 2,
        targets: Targets::Names(vec!["q_proj".into()]),
        ..Lora::default()
    });
    let budget = Budget { tokens: 4, targets: 4, train: true, recompute: false };
    let plan = MemoryPlan::over(&arch, budget, &trainable, Base::Mapped).unwrap().over_files(dir.path());
    let held = plan.in_precision(Precision::Bf16).total() as usize;
    assert!(held < plan.total() as usize * 3 / 5);
    let run = |memory: usize| {
        let card = emulated(Precision::Bf16, 1, memory)?;
        let mut model = Model::with_base(arch.clone(), card, budget, &trainable, Base::Mapped).unwrap();
        Some(model.load_weights(dir.path()))
    };
    // One tensor at a time is there in f32 too.
    let largest = 4 * 4000 * arch.hidden * 2;
    let Some(fits) = run(held + largest) else { return };
    fits.unwrap();
    assert_eq!(run(held - 1000).unwrap().unwrap_err().tag(), "E-MEMORY");
}

#[test]
fn a_range_has_one_copy() {
    let Some(mut b) = card(Precision::Bf16, 1) else { return };
    let buffer = b.allocate(64).unwrap();
    b.keep_factor(buffer.view().part(0, 32), false).unwrap();
    let error = b.keep_factor(buffer.view().part(16, 32), false).unwrap_err();
    assert!(error.to_string().contains("kept already"), "{error}");
    assert!(b.keep_factor(buffer.matrix(4, 16).columns(0..8), false).is_err());
}
