//! Each operation of the CPU backend against the reference, and the reference against central differences,
//! at odd sizes: 1, just below, at and just above the sizes into which kernels cut their work.

mod common;

use common::{Random, relative};
use suasion_engine::kernels::{Activation, AdamW, Attention, Heads, Linear, Norm, Outcome, Span, View};
use suasion_engine::{Backend, Cpu, Reference};

/// f32 sums of up to a few hundred terms.
const TOLERANCE: f64 = 2e-6;

fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut random = Random(seed);
    (0..n).map(|_| random.normal() as f32).collect()
}

/// Uploads; the seed keeps operands different.
fn put<B: Backend>(b: &mut B, n: usize, seed: u64) -> View {
    let view = b.allocate(n).unwrap();
    b.write(view, &values(n, seed));
    view
}

fn get<B: Backend>(b: &B, view: View) -> Vec<f32> {
    let mut out = vec![0.0; view.len()];
    b.read(view, &mut out);
    out
}

/// Runs `op` on both backends and compares everything it returns.
macro_rules! agree {
    ($what:expr, $op:expr) => {{
        let (mut cpu, mut reference) = (Cpu::new(), Reference::<f32>::new());
        let op = $op;
        let (fast, plain) = (op.0(&mut cpu), op.1(&mut reference));
        for (i, (fast, plain)) in fast.iter().zip(&plain).enumerate() {
            let error = relative(fast, plain);
            assert!(error < TOLERANCE, "{}, result {i}: {error:e}", $what);
        }
    }};
}

#[test]
fn linear_layers() {
    fn run<B: Backend>(b: &mut B, s: Linear, accumulate: bool, bias: bool) -> Vec<Vec<f32>> {
        let (x, w) = (put(b, s.rows * s.inputs, 1), put(b, s.outputs * s.inputs, 2));
        let (dy, y) = (put(b, s.rows * s.outputs, 3), put(b, s.rows * s.outputs, 4));
        let (dx, dw) = (put(b, s.rows * s.inputs, 5), put(b, s.outputs * s.inputs, 6));
        let (bias, db) = (bias.then(|| put(b, s.outputs, 7)), bias.then(|| put(b, s.outputs, 8)));
        b.linear(s, y, accumulate, x, w, bias);
        b.linear_dx(s, dx, accumulate, dy, w);
        b.linear_dw(s, dw, db, accumulate, dy, x);
        [Some(y), Some(dx), Some(dw), db].into_iter().flatten().map(|v| get(b, v)).collect()
    }
    let sizes =
        [(1, 1, 1), (3, 17, 65), (255, 33, 7), (256, 5, 512), (257, 9, 513), (1, 300, 515), (64, 511, 3)];
    for (rows, inputs, outputs) in sizes {
        let s = Linear { rows, inputs, outputs };
        for (accumulate, bias) in [(false, false), (true, false), (false, true), (true, true)] {
            let what = format!("{s:?}, accumulate {accumulate}, bias {bias}");
            agree!(
                what,
                (
                    |b: &mut Cpu| run(b, s, accumulate, bias),
                    |b: &mut Reference<f32>| run(b, s, accumulate, bias)
                )
            );
        }
    }
}

const NORMS: [Norm; 2] = [Norm::Rms { eps: 1e-5 }, Norm::Layer { eps: 1e-5 }];

fn norms<B: Backend>(b: &mut B, norm: Norm, rows: usize, width: usize) -> Vec<View> {
    let (x, w, bias) = (put(b, rows * width, 1), put(b, width, 2), put(b, width, 3));
    let bias = matches!(norm, Norm::Layer { .. }).then_some(bias);
    let (y, stats, again) = (
        b.allocate(rows * width).unwrap(),
        b.allocate(rows * norm.statistics()).unwrap(),
        b.allocate(rows * width).unwrap(),
    );
    b.norm(norm, y, stats, x, w, bias);
    b.norm_again(norm, again, stats, x, w, bias);
    assert_eq!(get(b, y), get(b, again));
    let (dy, dx, dw, db) =
        (put(b, rows * width, 4), put(b, rows * width, 5), put(b, width, 6), put(b, width, 7));
    let db_asked = bias.map(|_| db);
    b.norm_backward(norm, dx, dw, db_asked, dy, stats, x, w);
    vec![y, stats, dx, dw, db]
}

#[test]
fn both_norms() {
    for norm in NORMS {
        for (rows, width) in [(1, 3), (1, 31), (2, 32), (63, 33), (64, 5), (65, 64), (130, 257)] {
            let what = format!("{norm:?} [{rows}, {width}]");
            agree!(
                what,
                (
                    |b: &mut Cpu| norms(b, norm, rows, width)
                        .into_iter()
                        .map(|v| get(b, v))
                        .collect::<Vec<_>>(),
                    |b: &mut Reference<f32>| norms(b, norm, rows, width)
                        .into_iter()
                        .map(|v| get(b, v))
                        .collect::<Vec<_>>()
                )
            );
        }
    }
}

#[test]
fn activations() {
    fn run<B: Backend>(b: &mut B, f: Activation, rows: usize, width: usize) -> Vec<Vec<f32>> {
        let up = put(b, rows * width * f.fan(), 1);
        let (a, da, dup) = (
            b.allocate(rows * width).unwrap(),
            put(b, rows * width, 2),
            b.allocate(rows * width * f.fan()).unwrap(),
        );
        b.activate(f, a, up, width);
        b.activate_backward(f, dup, da, up, width);
        [a, dup].map(|v| get(b, v)).to_vec()
    }
    for f in [Activation::SwiGlu, Activation::GeluTanh] {
        for (rows, width) in [(1, 1), (3, 31), (64, 33), (65, 128)] {
            agree!(
                format!("{f:?} [{rows}, {width}]"),
                (|b: &mut Cpu| run(b, f, rows, width), |b: &mut Reference<f32>| run(b, f, rows, width))
            );
        }
    }
}

/// Three segments; the last two share the first as their prefix. `every` takes each n-th row as a query, twice.
fn attention_plan(trunk: usize, branches: [usize; 2], every: usize) -> (Attention, usize) {
    let (a, b) = (trunk, trunk + branches[0]);
    let end = b + branches[1];
    let mut plan = Attention::default();
    for (own, prefix) in [(0..a, 0..0), (a..b, 0..trunk), (b..end, 0..trunk)] {
        let first = plan.rows.len();
        for row in own.clone().filter(|r| (r + 1) % every == 0) {
            plan.rows.extend(vec![row as u32; if every > 1 { 2 } else { 1 }]);
        }
        if plan.rows.len() > first {
            plan.spans.push(Span { prefix, own, queries: first..plan.rows.len() });
        }
    }
    plan.groups = vec![(0..plan.spans.len()).collect()];
    (plan, end)
}

const HEADS: Heads = Heads { heads: 4, kv_heads: 2, head_dim: 6, scale: 0.4 };

/// `[o, lse, dq, dkv]`, then the operands `[q, kv, do]`.
fn attention<B: Backend>(b: &mut B, plan: &Attention, keys: usize) -> Vec<View> {
    let queries = plan.rows.len();
    let (q, kv) = (put(b, queries * HEADS.query_width(), 1), put(b, keys * HEADS.kv_width(), 2));
    let (o, lse) = (b.allocate(q.len()).unwrap(), b.allocate(queries * HEADS.heads).unwrap());
    let (do_, dq, dkv) = (put(b, q.len(), 3), b.allocate(q.len()).unwrap(), put(b, kv.len(), 4));
    b.attention(HEADS, plan, o, lse, q, kv);
    b.attention_backward(HEADS, plan, dq, dkv, do_, o, lse, q, kv);
    vec![o, lse, dq, dkv, q, kv, do_]
}

#[test]
fn attention_with_segments_and_shared_prefixes() {
    for (trunk, branches) in [(1, [1, 1]), (5, [3, 9]), (127, [1, 2]), (128, [129, 3]), (130, [40, 260])] {
        for every in [1, 3] {
            let (plan, keys) = attention_plan(trunk, branches, every);
            if plan.rows.is_empty() {
                continue;
            }
            let what = format!("trunk {trunk}, branches {branches:?}, every {every}");
            agree!(
                what,
                (
                    |b: &mut Cpu| attention(b, &plan, keys)[..4]
                        .iter()
                        .map(|v| get(b, *v))
                        .collect::<Vec<_>>(),
                    |b: &mut Reference<f32>| attention(b, &plan, keys)[..4]
                        .iter()
                        .map(|v| get(b, *v))
                        .collect::<Vec<_>>()
                )
            );
        }
    }
}

#[test]
fn cross_entropy() {
    fn run<B: Backend>(b: &mut B, rows: usize, vocab: usize) -> Vec<Vec<f32>> {
        let logits = put(b, rows * vocab, 1);
        let mut random = Random(2);
        let ids: Vec<u32> = (0..rows).map(|_| random.below(vocab) as u32).collect();
        let weights = values(rows, 3);
        let mut outcomes = [vec![Outcome::default(); rows], vec![Outcome::default(); rows]];
        b.cross_entropy(logits, vocab, &ids, None, &mut outcomes[0]);
        assert_eq!(get(b, logits), values(rows * vocab, 1), "without weights the logits stay");
        b.cross_entropy(logits, vocab, &ids, Some(&weights), &mut outcomes[1]);
        let nll = |o: &Vec<Outcome>| o.iter().map(|o| o.nll).collect::<Vec<_>>();
        let top = outcomes[0].iter().map(|o| f32::from(o.top1)).collect();
        vec![nll(&outcomes[0]), nll(&outcomes[1]), get(b, logits), top]
    }
    for (rows, vocab) in [(1, 1), (3, 2), (5, 31), (7, 33), (2, 1000)] {
        // With one token there is nothing to learn and nothing but zeros to compare.
        if vocab > 1 {
            agree!(
                format!("[{rows}, {vocab}]"),
                (|b: &mut Cpu| run(b, rows, vocab), |b: &mut Reference<f32>| run(b, rows, vocab))
            );
        }
    }
}

#[test]
fn the_first_of_equal_logits_is_on_top() {
    let mut cpu = Cpu::new();
    let logits = cpu.allocate(3).unwrap();
    cpu.write(logits, &[1.0, 1.0, 0.0]);
    for (id, top1) in [(0, true), (1, false), (2, false)] {
        let mut out = [Outcome::default()];
        cpu.cross_entropy(logits, 3, &[id], None, &mut out);
        assert_eq!(out[0].top1, top1);
    }
}

#[test]
fn a_nan_anywhere_in_the_logits_reaches_the_loss() {
    let mut cpu = Cpu::new();
    for vocab in [3, 40] {
        let logits = cpu.allocate(vocab).unwrap();
        let mut x = vec![0.5; vocab];
        x[2] = f32::NAN;
        cpu.write(logits, &x);
        let mut out = [Outcome::default()];
        cpu.cross_entropy(logits, vocab, &[0], None, &mut out);
        assert!(out[0].nll.is_nan());
    }
}

#[test]
fn rows_and_sums() {
    fn run<B: Backend>(b: &mut B, width: usize) -> Vec<Vec<f32>> {
        let (table, x, y) = (put(b, 9 * width, 1), put(b, 6 * width, 2), b.allocate(6 * width).unwrap());
        let rows = [3, 0, 8, 3, 3, 1];
        b.gather(y, table, &rows, width);
        b.scatter_add(table, x, &rows, width);
        b.add(y, x);
        let squares = b.sum_squares(table) as f32;
        vec![get(b, y), get(b, table), vec![squares]]
    }
    for width in [1, 31, 33, 20_000] {
        agree!(
            format!("width {width}"),
            (|b: &mut Cpu| run(b, width), |b: &mut Reference<f32>| run(b, width))
        );
    }
}

#[test]
fn rotation_and_its_inverse() {
    fn run<B: Backend>(b: &mut B) -> Vec<Vec<f32>> {
        let (x, table) = (put(b, 5 * 40, 1), b.allocate(7 * 10).unwrap());
        let angles = values(7 * 5, 2);
        let rows = angles.chunks(5).flat_map(|a| a.iter().map(|a| a.cos()).chain(a.iter().map(|a| a.sin())));
        b.write(table, &rows.collect::<Vec<_>>());
        b.rotate(x, 40, 3, 10, table, &[6, 0, 2, 2, 5], false);
        let there = get(b, x);
        b.rotate(x, 40, 3, 10, table, &[6, 0, 2, 2, 5], true);
        vec![there, get(b, x)]
    }
    agree!("rotate", (|b: &mut Cpu| run(b), |b: &mut Reference<f32>| run(b)));
    let back = run(&mut Cpu::new());
    assert!(relative(&back[1], &values(5 * 40, 1)) < 1e-6, "the inverse undoes the rotation");
    assert!(relative(&back[0], &values(5 * 40, 1)) > 0.1, "the rotation does something");
}

#[test]
fn adamw_steps() {
    fn run<B: Backend>(b: &mut B) -> Vec<Vec<f32>> {
        let n = 70_000;
        let (p, g) = (put(b, n, 1), put(b, n, 2));
        let (m, v) = (b.allocate(n).unwrap(), b.allocate(n).unwrap());
        for t in 1..4 {
            let step = AdamW {
                t,
                lr: 0.01,
                beta1: 0.9,
                beta2: 0.99,
                eps: 1e-8,
                weight_decay: 0.1,
                decay_all: false,
                gradient_scale: 0.5,
            };
            b.adamw(step, p, g, m, v);
        }
        [p, m, v].map(|x| get(b, x)).to_vec()
    }
    agree!("adamw", (|b: &mut Cpu| run(b), |b: &mut Reference<f32>| run(b)));
}

/// Checks `gradient` against central differences of `objective` in f64, at a few places of `x`.
fn slopes(
    b: &mut Reference<f64>,
    x: View,
    gradient: View,
    mut objective: impl FnMut(&mut Reference<f64>) -> f64,
) {
    let (start, g) = (b.get(x), b.get(gradient));
    let mut random = Random(23);
    for _ in 0..8 {
        let i = random.below(start.len());
        let mut at = |change: f64| {
            let mut moved = start.clone();
            moved[i] += change;
            b.set(x, &moved);
            objective(b)
        };
        let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
        assert!((slope - g[i]).abs() < 1e-7 * (1.0 + slope.abs()), "element {i}: {} and slope {slope}", g[i]);
        b.set(x, &start);
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[test]
fn the_references_gradients_are_slopes() {
    let b = &mut Reference::<f64>::new();
    for norm in NORMS {
        let (rows, width) = (3, 7);
        let (x, w, bias, dy) =
            (put(b, rows * width, 1), put(b, width, 2), put(b, width, 3), put(b, rows * width, 4));
        let bias_asked = matches!(norm, Norm::Layer { .. }).then_some(bias);
        let (y, stats) = (b.allocate(rows * width).unwrap(), b.allocate(rows * norm.statistics()).unwrap());
        let (dx, dw, db) =
            (b.allocate(rows * width).unwrap(), b.allocate(width).unwrap(), b.allocate(width).unwrap());
        b.norm(norm, y, stats, x, w, bias_asked);
        b.norm_backward(norm, dx, dw, Some(db), dy, stats, x, w);
        let weights = b.get(dy);
        let mut pairs = vec![(x, dx), (w, dw)];
        pairs.extend(bias_asked.map(|bias| (bias, db)));
        for (operand, gradient) in pairs {
            slopes(b, operand, gradient, |b| {
                b.norm(norm, y, stats, x, w, bias_asked);
                dot(&b.get(y), &weights)
            });
        }
    }
    for f in [Activation::SwiGlu, Activation::GeluTanh] {
        let (up, da) = (put(b, 10 * f.fan(), 1), put(b, 10, 2));
        let (a, dup) = (b.allocate(10).unwrap(), b.allocate(10 * f.fan()).unwrap());
        b.activate_backward(f, dup, da, up, 5);
        let weights = b.get(da);
        slopes(b, up, dup, |b| {
            b.activate(f, a, up, 5);
            dot(&b.get(a), &weights)
        });
    }
    let (plan, keys) = attention_plan(4, [3, 5], 1);
    let v = attention(b, &plan, keys);
    let [o, lse, dq, dkv, q, kv, do_] = v[..] else { unreachable!() };
    let weights = b.get(do_);
    for (operand, gradient) in [(q, dq), (kv, dkv)] {
        slopes(b, operand, gradient, |b| {
            b.attention(HEADS, &plan, o, lse, q, kv);
            dot(&b.get(o), &weights)
        });
    }
    // The loss: its gradient overwrites the logits, so the slope is taken of a copy.
    let (logits, gradient) = (put(b, 2 * 9, 1), b.allocate(2 * 9).unwrap());
    let (ids, weights) = ([4u32, 0], [0.5f32, -2.0]);
    let mut out = [Outcome::default(); 2];
    b.copy(gradient, logits);
    b.cross_entropy(gradient, 9, &ids, Some(&weights), &mut out);
    slopes(b, logits, gradient, |b| {
        let x = b.get(logits);
        let nll = |i: usize| {
            let row = &x[i * 9..][..9];
            row.iter().map(|v| v.exp()).sum::<f64>().ln() - row[ids[i] as usize]
        };
        0.5 * nll(0) - 2.0 * nll(1)
    });
}

#[test]
#[should_panic(expected = "a written view overlaps another")]
fn a_written_view_must_not_overlap() {
    let mut cpu = Cpu::new();
    let x = cpu.allocate(10).unwrap();
    cpu.add(x.part(0, 5), x.part(4, 5));
}

fn run_plan(change: impl FnOnce(&mut Attention)) {
    let (mut plan, keys) = attention_plan(5, [3, 9], 1);
    change(&mut plan);
    attention(&mut Cpu::new(), &plan, keys);
}

#[test]
#[should_panic(expected = "is in two groups' reach")]
fn a_key_belongs_to_one_group() {
    run_plan(|plan| plan.groups = vec![vec![0, 1], vec![2]]);
}

#[test]
#[should_panic(expected = "queries do not tile")]
fn a_query_belongs_to_one_span() {
    run_plan(|plan| plan.spans[1].queries = plan.spans[0].queries.clone());
}

#[test]
#[should_panic(expected = "of a view of 10")]
fn a_part_lies_inside_its_view() {
    Cpu::new().allocate(10).unwrap().part(2, usize::MAX - 1);
}
