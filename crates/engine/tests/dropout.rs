//! Dropout: its distribution, its gradient, and that it does not depend on where and when it is computed.

mod common;

use common::{
    Random, accumulate, architecture, config, golden_batch, gradients, json, mean_loss, model_of, smooth,
};
use serde_json::{Value, json};
use std::path::Path;
use suasion_engine::kernels::{Attention, AttentionPlan, AttentionRange, Draw, Dropout, Heads, View};
use suasion_engine::{
    Architecture, Backend, Batch, Budget, Cpu, Model, Reference, Regularisation, Trainable,
};

/// A family with this rate at every place with dropout.
fn dropping(family: &str, rate: f32) -> Architecture {
    let mut arch = smooth(family);
    arch.embedding.dropout = rate;
    for block in &mut arch.blocks {
        (block.attention.dropout, block.residual_dropout) = (rate, rate);
    }
    arch
}

fn drawn(seed: u64) -> Regularisation {
    Regularisation { seed: Some(seed), dropout: true, ..Regularisation::default() }
}

/// Two rows, the second continuing a shared prefix, with two targets on one row.
fn batch() -> Batch {
    let mut random = Random(5);
    let mut batch = Batch::default();
    batch.push(&random.ids(9), [(3, 5, 1.0), (7, 9, 0.5)]);
    batch.push(&random.ids(14), [(2, 1, 1.0), (12, 3, 2.0)]);
    batch
}

#[test]
fn elements_are_dropped_as_often_as_asked_and_the_mean_stays() {
    let mut backend = Cpu::new();
    let (rows, width) = (700, 90);
    let x = backend.allocate(rows * width).unwrap();
    for rate in [0.1f32, 0.5, 0.9] {
        backend.fill(x.view(), 1.0).unwrap();
        backend.dropout(x.matrix(rows, width), Dropout { draw: Draw { key: 3, site: 9 }, rate }).unwrap();
        let mut values = vec![0.0; rows * width];
        backend.read(x.view(), &mut values).unwrap();
        let (n, p) = (values.len() as f64, f64::from(rate));
        let kept = 1.0 / (1.0 - p);
        assert!(values.iter().all(|v| *v == 0.0 || (f64::from(*v) / kept - 1.0).abs() < 1e-6));
        // A binomial count, within five standard deviations.
        let dropped = values.iter().filter(|v| **v == 0.0).count() as f64;
        assert!((dropped - n * p).abs() < 5.0 * (n * p * (1.0 - p)).sqrt(), "{rate}: {dropped} of {n}");
        // Columns and rows are independent: the standard deviation of a row's count is binomial.
        for (count, of, counts) in [
            (rows, width, values.chunks(width).map(|row| zeros(row.iter())).collect::<Vec<_>>()),
            (width, rows, (0..width).map(|j| zeros(values[j..].iter().step_by(width))).collect()),
        ] {
            let (of, mean) = (of as f64, counts.iter().sum::<f64>() / count as f64);
            let variance = counts.iter().map(|c| (c - mean).powi(2)).sum::<f64>() / count as f64;
            let ratio = variance / (of * p * (1.0 - p));
            assert!((ratio - 1.0).abs() < 5.0 * (2.0 / count as f64).sqrt(), "{rate}: {ratio}");
        }
    }
    backend.fill(x.view(), 1.0).unwrap();
    backend.dropout(x.matrix(rows, width), Dropout { draw: Draw { key: 3, site: 9 }, rate: 1.0 }).unwrap();
    let mut values = vec![1.0; rows * width];
    backend.read(x.view(), &mut values).unwrap();
    assert!(values.iter().all(|v| *v == 0.0));
}

fn zeros<'a>(values: impl Iterator<Item = &'a f32>) -> f64 {
    values.filter(|v| **v == 0.0).count() as f64
}

/// With probabilities `p` and values `v`, the output's mean is `Σ p·v` and its variance `Σ p²·v² · rate/(1−rate)`.
#[test]
fn attention_has_the_mean_and_the_variance_of_dropped_probabilities() {
    let h = Heads { heads: 2, kv_heads: 1, head_dim: 4, scale: 0.5, softcap: None, window: None };
    let keys = 150;
    let mut b = Cpu::new();
    let plan = AttentionPlan {
        rows: vec![keys as u32 - 1],
        ranges: vec![AttentionRange { prefix: 0..0, own: 0..keys, queries: 0..1 }],
        groups: vec![vec![0]],
    };
    let plan = b.upload_plan(plan).unwrap();
    let mut random = Random(11);
    let mut put = |b: &mut Cpu, rows: usize, width: usize| {
        let buffer = b.allocate(rows * width).unwrap();
        let values: Vec<f32> = (0..rows * width).map(|_| random.normal() as f32).collect();
        b.write(buffer.view(), &values).unwrap();
        (buffer, values)
    };
    let ((q_buffer, q), (kv_buffer, kv)) = (put(&mut b, 1, 8), put(&mut b, keys, 8));
    let (o, lse) = (b.allocate(8).unwrap(), b.allocate(2).unwrap());
    let views: [View; 4] =
        [o.matrix(1, 8), lse.matrix(1, 2), q_buffer.matrix(1, 8), kv_buffer.matrix(keys, 8)];
    let (rate, draws) = (0.25f64, 6000);
    let (mut sums, mut squares) = ([0f64; 8], [0f64; 8]);
    for key in 0..draws {
        let dropout = Dropout { draw: Draw { key, site: 2 }, rate: rate as f32 };
        let a = Attention { heads: h, plan: &plan, dropout: Some(dropout) };
        b.attention(a, views[0], views[1], views[2], views[3]).unwrap();
        let mut out = [0f32; 8];
        b.read(o.view(), &mut out).unwrap();
        for (i, x) in out.iter().enumerate() {
            sums[i] += f64::from(*x);
            squares[i] += f64::from(*x).powi(2);
        }
    }
    for head in 0..2 {
        let score = |k: usize| (0..4).map(|d| f64::from(q[head * 4 + d] * kv[k * 8 + d])).sum::<f64>() * 0.5;
        let total: f64 = (0..keys).map(|k| score(k).exp()).sum();
        for d in 0..4 {
            let terms: Vec<f64> =
                (0..keys).map(|k| score(k).exp() / total * f64::from(kv[k * 8 + 4 + d])).collect();
            let mean: f64 = terms.iter().sum();
            let variance = terms.iter().map(|t| t * t).sum::<f64>() * rate / (1.0 - rate);
            let (i, n) = (head * 4 + d, draws as f64);
            let found = (sums[i] / n, squares[i] / n - (sums[i] / n).powi(2));
            assert!((found.0 - mean).abs() < 5.0 * (variance / n).sqrt(), "{i}: {found:?} and {mean}");
            assert!((found.1 / variance - 1.0).abs() < 0.12, "{i}: {found:?} and variance {variance}");
        }
    }
}

/// Mean and standard deviation of the loss over many masks match transformers, for each dropout separately.
#[test]
fn the_loss_is_distributed_as_in_transformers() {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models");
    let golden = json(&models.join("training.json"));
    for (name, keys) in golden["dropout"].as_object().unwrap() {
        let dir = models.join(name);
        let row = golden_batch(&json(&dir.join("golden.json"))["batches"]["a"]);
        let row = first(&row);
        for (key, expected) in keys.as_object().unwrap() {
            let mut config = json(&dir.join("config.json"));
            config[key] = expected["rate"].clone();
            let arch = Architecture::from_json(&config, &dir).unwrap();
            let mut many = Batch::default();
            let copies = 50;
            (0..copies).for_each(|_| push(&mut many, &row));
            let budget =
                Budget { tokens: many.tokens(), targets: many.targets.len(), train: true, recompute: false };
            let mut model = Model::new(arch, Cpu::new(), budget).unwrap();
            model.load_weights(&dir).unwrap();
            let mut losses = Vec::new();
            for seed in 0..40 {
                model.regularise(drawn(seed));
                let each = accumulate(&mut model, &many, 1.0);
                let rows = each.chunks(row.targets.len());
                losses.extend(
                    rows.map(|row| {
                        row.iter().map(|loss| f64::from(loss.nll)).sum::<f64>() / row.len() as f64
                    }),
                );
            }
            let n = losses.len() as f64;
            let mean = losses.iter().sum::<f64>() / n;
            let std = (losses.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
            let of = |field: &str| expected[field].as_f64().unwrap();
            let what = format!("{name} {key}: {mean} ± {std}, expected {expected}");
            if of("std") < 1e-6 {
                // Phi-3's embd_pdrop: transformers reads it but drops nothing.
                assert!(std < 1e-6 && (mean - of("mean")).abs() < 2e-5, "{what}");
                continue;
            }
            let deviation = of("std") * (1.0 / n + 1.0 / of("draws")).sqrt();
            assert!((mean - of("mean")).abs() < 4.0 * deviation, "{what}");
            assert!((std / of("std") - 1.0).abs() < 0.08, "{what}");
        }
    }
}

/// The first row of a batch.
fn first(batch: &Batch) -> Batch {
    let end = batch.segments[0].own.end;
    let mut one = Batch::default();
    let targets = batch.targets.iter().filter(|target| target.row < end);
    one.push(&batch.ids[..end as usize], targets.map(|target| (target.row, target.id, target.weight)));
    one
}

fn push(to: &mut Batch, row: &Batch) {
    to.push(&row.ids, row.targets.iter().map(|target| (target.row, target.id, target.weight)));
}

#[test]
fn gradients_are_slopes_under_a_fixed_mask() {
    for family in ["gpt2", "gpt_neox", "gemma2", "qwen3_moe", "granite"] {
        let mut model = model_of(dropping(family, 0.3), Reference::<f64>::new(), false, &Trainable::All);
        let mut fast = model_of(dropping(family, 0.3), Cpu::new(), false, &Trainable::All);
        let batch = batch();
        let scale = 1.0 / batch.weight() as f32;
        model.regularise(drawn(4));
        fast.regularise(drawn(4));
        let plain = mean_loss(&batch, &model.forward(&batch).unwrap());
        let dropped = mean_loss(&batch, &accumulate(&mut model, &batch, scale));
        assert!((dropped - plain).abs() > 1e-3, "{family}: {dropped} and {plain}");
        accumulate(&mut fast, &batch, scale);
        let (exact, fast) = (gradients(&model), gradients(&fast));
        let mut random = Random(3);
        for ((name, exact), (_, fast)) in exact.iter().zip(&fast) {
            let i = random.below(exact.len());
            let mut at = |change: f32| {
                let mut tensor = model.parameter(name).unwrap();
                let old = tensor.data[i];
                tensor.data[i] += change;
                let moved = f64::from(tensor.data[i] - old);
                model.set_parameter(name, &tensor).unwrap();
                let losses = accumulate(&mut model, &batch, scale);
                tensor.data[i] = old;
                model.set_parameter(name, &tensor).unwrap();
                (mean_loss(&batch, &losses), moved)
            };
            let ((up, a), (down, b)) = (at(4e-3), at(-4e-3));
            let slope = (up - down) / (a - b);
            for (what, g) in [("f64 reference", exact[i]), ("cpu", fast[i])] {
                let g = f64::from(g);
                assert!(
                    (g - slope).abs() < 3e-4 + 3e-3 * slope.abs(),
                    "{family} {name}[{i}], {what}: {g}, slope {slope}"
                );
            }
        }
    }
}

/// The same bits with and without recomputation, with any number of threads, and for the same seed.
#[test]
fn masks_follow_from_the_seed_alone() {
    for family in ["gpt2", "gpt_neox", "phi3", "gemma2"] {
        let run = |recompute: bool, threads: usize, seed: u64| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut model = model_of(dropping(family, 0.2), Cpu::new(), recompute, &Trainable::All);
                model.regularise(drawn(seed));
                let losses = accumulate(&mut model, &batch(), 0.3);
                (losses, gradients(&model))
            })
        };
        let first = run(false, 1, 8);
        assert_eq!(first, run(true, 1, 8), "{family}, recomputed");
        assert_eq!(first, run(false, 2, 8), "{family}, two threads");
        assert_ne!(first.0, run(false, 1, 9).0, "{family}, another seed");
    }
}

#[test]
fn without_a_rate_or_a_seed_no_bit_changes() {
    let run = |rate: f32, with: Regularisation| {
        let mut model = model_of(dropping("gpt2", rate), Cpu::new(), false, &Trainable::All);
        let plain = model.forward(&batch()).unwrap();
        model.regularise(with);
        assert_eq!(model.forward(&batch()).unwrap(), plain, "an evaluation drops nothing");
        (accumulate(&mut model, &batch(), 0.3), gradients(&model))
    };
    let plain = run(0.0, Regularisation::default());
    assert_eq!(run(0.0, drawn(1)), plain);
    assert_eq!(run(0.3, Regularisation { seed: Some(1), ..Regularisation::default() }), plain);
    assert_eq!(run(0.3, Regularisation { dropout: true, ..Regularisation::default() }), plain);
    assert_ne!(run(0.3, drawn(1)), plain);
}

/// The keys of each family, and GPT-2's defaults.
#[test]
fn configurations_say_what_is_dropped() {
    let rates = |config: &Value| {
        let arch = Architecture::from_json(config, Path::new("c")).unwrap();
        assert!(!arch.not_applied.join(" ").contains("drop"), "{:?}", arch.not_applied);
        (arch.embedding.dropout, arch.blocks[0].attention.dropout, arch.blocks[0].residual_dropout)
    };
    let of = |family: &str, keys: Value| {
        let mut config = config(family);
        keys.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
        rates(&config)
    };
    assert_eq!(of("gpt2", json!({})), (0.1, 0.1, 0.1));
    let own = json!({"embd_pdrop": 0.2, "attn_pdrop": 0.0, "resid_pdrop": 0.4});
    assert_eq!(of("gpt2", own), (0.2, 0.0, 0.4));
    let own = json!({"attention_dropout": 0.25, "hidden_dropout": 0.5});
    assert_eq!(of("gpt_neox", own), (0.5, 0.25, 0.5));
    let own = json!({"attention_dropout": 0.25, "resid_pdrop": 0.5, "embd_pdrop": 0.75});
    assert_eq!(of("phi3", own), (0.0, 0.25, 0.5));
    for family in [
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "olmo2",
        "granite",
        "smollm3",
        "gemma2",
        "gemma3_text",
        "qwen3_moe",
    ] {
        assert_eq!(of(family, json!({"attention_dropout": 0.25})), (0.0, 0.25, 0.0), "{family}");
        assert!(!architecture(family).has_dropout(), "{family}");
    }
}
