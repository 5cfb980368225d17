//! Compares each operation of the CPU backend, and of the CUDA backend on an emulated card, with the reference, and the
//! reference with central differences. Sizes are odd: 1, and just below, at and just above the sizes into which kernels
//! cut their work.

mod common;

use common::{Random, STEP, relative};
use std::sync::atomic::{AtomicU32, Ordering};
use suasion_engine::kernels::{
    Activation, Adafactor, Attention, AttentionPlan, AttentionRange, Draw, Dropout, Heads, Indices, Norm,
    PlanBuffer, Routing, Sgd, View,
};
use suasion_engine::{AdamW, Backend, Cpu, Cuda, Precision, Reference, TargetLoss};

/// For f32 sums of up to a few hundred terms.
const TOLERANCE: f64 = 2e-6;

fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut random = Random(seed);
    (0..n).map(|_| random.normal() as f32).collect()
}

/// A buffer that lives as long as its backend: these tests free nothing.
fn space<B: Backend>(b: &mut B, rows: usize, width: usize) -> View {
    let buffer = b.allocate(rows * width).unwrap();
    let view = buffer.matrix(rows, width);
    std::mem::forget(buffer);
    view
}

/// Uploads random values; the seed makes operands different.
fn put<B: Backend>(b: &mut B, rows: usize, width: usize, seed: u64) -> View {
    let view = space(b, rows, width);
    b.write(view, &values(rows * width, seed)).unwrap();
    view
}

/// Uploads indices that live as long as their backend.
fn list<B: Backend>(b: &mut B, numbers: &[u32]) -> Indices {
    let buffer = b.upload_indices(numbers).unwrap();
    let view = buffer.view();
    std::mem::forget(buffer);
    view
}

fn get<B: Backend>(b: &B, view: View) -> Vec<f32> {
    let mut out = vec![0.0; view.len()];
    b.read(view, &mut out).unwrap();
    out
}

/// The card of a test; an emulated one runs threads in a different order each time. `None` if it is not available.
fn card(precision: Precision) -> Option<Cuda> {
    static SEED: AtomicU32 = AtomicU32::new(0);
    common::card::card(precision, SEED.fetch_add(1, Ordering::Relaxed) % 8)
}

fn compare(what: &str, backend: &str, fast: &[Vec<f32>], plain: &[Vec<f32>], tolerance: f64) {
    assert_eq!(fast.len(), plain.len());
    for (i, (fast, plain)) in fast.iter().zip(plain).enumerate() {
        let error = relative(fast, plain);
        assert!(error < tolerance, "{what}, result {i} on the {backend}: {error:e}");
    }
}

/// Runs an operation on the CPU, on the emulated card and on the reference, and compares all results.
macro_rules! agree {
    ($what:expr, $b:ident => $run:expr) => {{
        let what = $what;
        let plain = {
            let $b = &mut Reference::<f32>::new();
            $run
        };
        let fast = {
            let $b = &mut Cpu::new();
            $run
        };
        compare(&what, "CPU", &fast, &plain, TOLERANCE);
        if let Some(mut card) = card(Precision::F32) {
            let $b = &mut card;
            let of_card = $run;
            compare(&what, "card", &of_card, &plain, TOLERANCE);
        }
    }};
}

#[test]
fn linear_layers() {
    type Sizes = (usize, usize, usize);
    fn run<B: Backend>(
        b: &mut B,
        (rows, inputs, outputs): Sizes,
        accumulate: bool,
        bias: bool,
    ) -> Vec<Vec<f32>> {
        let (x, w) = (put(b, rows, inputs, 1), put(b, outputs, inputs, 2));
        let (dy, y) = (put(b, rows, outputs, 3), put(b, rows, outputs, 4));
        let (dx, dw) = (put(b, rows, inputs, 5), put(b, outputs, inputs, 6));
        let (bias, db) = (bias.then(|| put(b, 1, outputs, 7)), bias.then(|| put(b, 1, outputs, 8)));
        b.linear(y, accumulate, x, w, bias).unwrap();
        b.linear_dx(dx, accumulate, dy, w).unwrap();
        b.linear_dw(dw, accumulate, dy, x).unwrap();
        db.into_iter().for_each(|db| b.linear_db(db, accumulate, dy).unwrap());
        [Some(y), Some(dx), Some(dw), db].into_iter().flatten().map(|v| get(b, v)).collect()
    }
    let sizes =
        [(1, 1, 1), (3, 17, 65), (255, 33, 7), (256, 5, 512), (257, 9, 513), (1, 300, 515), (64, 511, 3)];
    for s in sizes {
        for (accumulate, bias) in [(false, false), (true, false), (false, true), (true, true)] {
            let what = format!("{s:?}, accumulate {accumulate}, bias {bias}");
            agree!(what, b => run(b, s, accumulate, bias));
        }
    }
}

/// Operations that take views with gaps give the same results on columns of wider matrices as on separate matrices, and
/// leave the other columns unchanged.
#[test]
fn columns_of_wider_rows() {
    fn run<B: Backend>(b: &mut B, wide: bool) -> Vec<Vec<f32>> {
        let (rows, inputs, outputs, before) = (70, 12, 6, if wide { 5 } else { 0 });
        let after = if wide { 3 } else { 0 };
        let mut place = |width: usize, seed: u64| {
            let all = space(b, rows, before + width + after);
            let columns = all.columns(before..before + width);
            let from = put(b, rows, width, seed);
            b.fill(all, 7.0).unwrap();
            b.copy(columns, from).unwrap();
            (all, columns)
        };
        let ((x_all, x), (y_all, y), (d_all, d)) = (place(inputs, 1), place(outputs, 2), place(inputs, 3));
        let (w, bias, dw, db) = (
            put(b, outputs, inputs, 4),
            put(b, 1, outputs, 5),
            space(b, outputs, inputs),
            space(b, 1, outputs),
        );
        b.linear(y, true, x, w, Some(bias)).unwrap();
        b.linear_dw(dw, false, y, x).unwrap();
        b.linear_db(db, false, y).unwrap();
        b.linear_dx(d, true, y, w).unwrap();
        let (table, positions) = (put(b, 9, 2, 6), list(b, &[3; 70]));
        b.rotate(x, 4, table, positions, false).unwrap();
        // Three heads of four columns.
        let norm = Norm::Layer { eps: 1e-5 };
        let (w, bias, stats) = (put(b, 1, 4, 7), put(b, 1, 4, 8), space(b, rows, 6));
        b.norm(norm, d, stats, x, w, Some(bias)).unwrap();
        b.norm_again(norm, d, stats, x, w, Some(bias)).unwrap();
        let (dx, dnw, dnb) = (space(b, rows, inputs), space(b, 1, 4), space(b, 1, 4));
        b.norm_backward(norm, x, Some(dnw), Some(dnb), d, stats, dx, w).unwrap();
        if wide {
            for (all, width) in [(x_all, inputs), (y_all, outputs), (d_all, inputs)] {
                let rows = get(b, all);
                let outside = rows.chunks(all.width()).flat_map(|r| r[..5].iter().chain(&r[5 + width..]));
                assert!(outside.into_iter().all(|v| *v == 7.0), "a column outside the view has changed");
            }
        }
        let mut dense = |view: View| {
            let to = space(b, view.rows(), view.width());
            b.copy(to, view).unwrap();
            get(b, to)
        };
        [x, y, d, dw, db, stats, dnw, dnb].map(&mut dense).to_vec()
    }
    let (wide, own) = (run(&mut Cpu::new(), true), run(&mut Cpu::new(), false));
    for (i, (wide, own)) in wide.iter().zip(&own).enumerate() {
        assert!(relative(wide, own) < 1e-6, "result {i}");
    }
    agree!("columns".to_string(), b => run(b, true));
}

const NORMS: [Norm; 3] =
    [Norm::Rms { eps: 1e-5, offset: 0.0 }, Norm::Rms { eps: 1e-5, offset: 1.0 }, Norm::Layer { eps: 1e-5 }];

const ACTIVATIONS: [Activation; 4] =
    [Activation::SwiGlu, Activation::GeGluTanh, Activation::GeluTanh, Activation::Gelu];

fn norms<B: Backend>(b: &mut B, norm: Norm, rows: usize, width: usize) -> Vec<View> {
    let (x, w, bias) = (put(b, rows, width, 1), put(b, 1, width, 2), put(b, 1, width, 3));
    let bias = matches!(norm, Norm::Layer { .. }).then_some(bias);
    let (y, again) = (space(b, rows, width), space(b, rows, width));
    let stats = space(b, rows, norm.statistics());
    b.norm(norm, y, stats, x, w, bias).unwrap();
    b.norm_again(norm, again, stats, x, w, bias).unwrap();
    assert_eq!(get(b, y), get(b, again));
    let (dy, dx, dw, db) =
        (put(b, rows, width, 4), put(b, rows, width, 5), put(b, 1, width, 6), put(b, 1, width, 7));
    b.norm_backward(norm, dx, Some(dw), bias.map(|_| db), dy, stats, x, w).unwrap();
    // Frozen weights: the gradient of the rows is unchanged.
    let frozen = put(b, rows, width, 5);
    b.norm_backward(norm, frozen, None, None, dy, stats, x, w).unwrap();
    assert_eq!(get(b, frozen), get(b, dx));
    vec![y, stats, dx, dw, db]
}

#[test]
fn both_norms() {
    for norm in NORMS {
        for (rows, width) in [(1, 3), (1, 31), (2, 32), (63, 33), (64, 5), (65, 64), (130, 257)] {
            let what = format!("{norm:?} [{rows}, {width}]");
            agree!(what, b => norms(b, norm, rows, width)
                        .into_iter()
                        .map(|v| get(b, v))
                        .collect::<Vec<_>>());
        }
    }
}

#[test]
fn activations() {
    fn run<B: Backend>(b: &mut B, f: Activation, rows: usize, width: usize) -> Vec<Vec<f32>> {
        let up = put(b, rows, width * f.gate_width(), 1);
        let (a, da, dup) =
            (space(b, rows, width), put(b, rows, width, 2), space(b, rows, width * f.gate_width()));
        b.activate(f, a, up).unwrap();
        b.activate_backward(f, dup, da, up).unwrap();
        [a, dup].map(|v| get(b, v)).to_vec()
    }
    for f in ACTIVATIONS {
        for (rows, width) in [(1, 1), (3, 31), (64, 33), (65, 128)] {
            agree!(format!("{f:?} [{rows}, {width}]"), b => run(b, f, rows, width));
        }
    }
}

/// Three segments; the last two share the first as their prefix. `every` takes each n-th row as a query, twice.
fn attention_plan(trunk: usize, branches: [usize; 2], every: usize) -> (AttentionPlan, usize) {
    let (a, b) = (trunk, trunk + branches[0]);
    let end = b + branches[1];
    let mut plan = AttentionPlan::default();
    for (own, prefix) in [(0..a, 0..0), (a..b, 0..trunk), (b..end, 0..trunk)] {
        let first = plan.rows.len();
        for row in own.clone().filter(|r| (r + 1) % every == 0) {
            plan.rows.extend(vec![row as u32; if every > 1 { 2 } else { 1 }]);
        }
        if plan.rows.len() > first {
            plan.ranges.push(AttentionRange { prefix, own, queries: first..plan.rows.len() });
        }
    }
    plan.groups = vec![(0..plan.ranges.len()).collect()];
    (plan, end)
}

/// Drops a third of the elements.
const DROPOUT: Dropout = Dropout { draw: Draw { key: 5 << 40 | 9, site: 3 }, rate: 1.0 / 3.0 };

const HEADS: Heads = Heads { heads: 4, kv_heads: 2, head_dim: 6, scale: 0.4, softcap: None, window: None };

/// `[o, lse, dq, dkv]`, then the operands `[q, kv, do]`.
fn attention<B: Backend>(
    b: &mut B,
    h: Heads,
    plan: &PlanBuffer,
    dropout: Option<Dropout>,
    keys: usize,
) -> Vec<View> {
    let (queries, wide, kv_wide) = (plan.queries(), h.query_width(), h.kv_width());
    let (q, kv) = (put(b, queries, wide, 1), put(b, keys, kv_wide, 2));
    let (o, lse) = (space(b, queries, wide), space(b, queries, h.heads));
    let (do_, dq, dkv) = (put(b, queries, wide, 3), space(b, queries, wide), put(b, keys, kv_wide, 4));
    let a = Attention { heads: h, plan, dropout };
    b.attention(a, o, lse, q, kv).unwrap();
    b.attention_backward(a, dq, dkv, do_, o, lse, q, kv).unwrap();
    vec![o, lse, dq, dkv, q, kv, do_]
}

fn planned_attention<B: Backend>(
    b: &mut B,
    h: Heads,
    plan: &AttentionPlan,
    dropout: Option<Dropout>,
    keys: usize,
) -> Vec<Vec<f32>> {
    let plan = b.upload_plan(plan.clone()).unwrap();
    attention(b, h, &plan, dropout, keys)[..4].iter().map(|v| get(b, *v)).collect()
}

#[test]
fn attention_with_segments_and_shared_prefixes() {
    for (trunk, branches) in [(1, [1, 1]), (5, [3, 9]), (127, [1, 2]), (128, [129, 3]), (130, [40, 260])] {
        for every in [1, 3] {
            let (plan, keys) = attention_plan(trunk, branches, every);
            if plan.rows.is_empty() {
                continue;
            }
            // Windows of two keys, within a branch, across the border of trunk and branch, and across a block of
            // queries.
            let windows = [None, Some(2), Some(3), Some(64), Some(127), Some(128), Some(129), Some(1 << 60)];
            for (n, (window, softcap)) in
                windows.into_iter().zip([None, Some(1.5)].into_iter().cycle()).enumerate()
            {
                let dropout = (n % 3 == 2).then_some(DROPOUT);
                let h = Heads { window, softcap, ..HEADS };
                let what = format!("trunk {trunk}, branches {branches:?}, every {every}, {h:?}, {dropout:?}");
                agree!(what, b => planned_attention(b, h, &plan, dropout, keys));
            }
        }
    }
}

/// Heads of every size for which a card's kernels are made, in both precisions. Results are the same bytes whatever the
/// order of threads.
#[test]
fn attention_on_cards_by_size_of_a_head() {
    let (plan, keys) = attention_plan(66, [20, 35], 1);
    let cases = [
        (None, None, None),
        (Some(50), Some(1.5), None),
        (Some(17), None, Some(DROPOUT)),
        (None, Some(2.0), Some(DROPOUT)),
    ];
    for (size, head_dim) in [7, 32, 33, 64, 80, 128, 200, 256].into_iter().enumerate() {
        // Every case uses both kernels of each size.
        for n in [size % 2, size % 2 + 2] {
            let (window, softcap, dropout) = cases[n];
            let (heads, kv_heads) = if n % 2 == 0 { (2, 1) } else { (2, 2) };
            let h =
                Heads { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt(), softcap, window };
            let plain = planned_attention(&mut Reference::<f32>::new(), h, &plan, dropout, keys);
            for (precision, tolerance) in [(Precision::F32, TOLERANCE), (Precision::Bf16, 6e-3)] {
                let Some(mut first) = card(precision) else { return };
                let of_card = planned_attention(&mut first, h, &plan, dropout, keys);
                compare(&format!("{h:?}, {dropout:?}, {precision:?}"), "card", &of_card, &plain, tolerance);
                let Some(mut second) = card(precision) else { return };
                assert_eq!(planned_attention(&mut second, h, &plan, dropout, keys), of_card);
            }
        }
    }
}

/// Every device drops the same elements and adds the same noise.
#[test]
fn random_numbers_are_those_of_the_cpu() {
    fn run<B: Backend>(b: &mut B, rows: usize, width: usize) -> [Vec<f32>; 2] {
        let (x, y, sizes) = (put(b, rows, width, 1), put(b, rows, width, 2), put(b, rows, 1, 3));
        b.dropout(x, DROPOUT).unwrap();
        b.add_noise(y, sizes, Draw { key: u64::MAX - 5, site: 77 }).unwrap();
        [get(b, x), get(b, y)]
    }
    for (rows, width) in [(1, 1), (3, 31), (9, 33), (17, 128), (2, 1030)] {
        let Some(mut card) = card(Precision::Bf16) else { return };
        let ([dropped, noisy], [expected, noise]) =
            (run(&mut card, rows, width), run(&mut Cpu::new(), rows, width));
        assert_eq!(dropped, expected, "[{rows}, {width}]");
        assert!(relative(&noisy, &noise) < 1e-7, "[{rows}, {width}]");
    }
}

fn losses<B: Backend>(
    b: &mut B,
    logits: View,
    ids: &[u32],
    weights: Option<&[f32]>,
    softcap: Option<f32>,
    smoothing: f32,
) -> Vec<TargetLoss> {
    let (table, ids) = (space(b, ids.len(), TargetLoss::COLUMNS), list(b, ids));
    let weights = weights.map(|values| {
        let view = space(b, 1, values.len());
        b.write(view, values).unwrap();
        view
    });
    b.cross_entropy(table, logits, ids, weights, softcap, smoothing).unwrap();
    get(b, table).as_chunks().0.iter().map(|row| TargetLoss::from_columns(*row)).collect()
}

#[test]
fn cross_entropy() {
    fn run<B: Backend>(
        b: &mut B,
        rows: usize,
        vocab: usize,
        softcap: Option<f32>,
        smoothing: f32,
    ) -> Vec<Vec<f32>> {
        let logits = put(b, rows, vocab, 1);
        let mut random = Random(2);
        let ids: Vec<u32> = (0..rows).map(|_| random.below(vocab) as u32).collect();
        let weights = values(rows, 3);
        let plain = losses(b, logits, &ids, None, softcap, smoothing);
        assert_eq!(get(b, logits), values(rows * vocab, 1), "without weights the logits stay");
        let weighted = losses(b, logits, &ids, Some(&weights), softcap, smoothing);
        let nll = |losses: &[TargetLoss]| losses.iter().map(|loss| loss.nll).collect::<Vec<_>>();
        let top = plain.iter().map(|loss| f32::from(loss.top1)).collect();
        let entropies = |losses: &[TargetLoss]| losses.iter().map(|loss| loss.entropy).collect::<Vec<_>>();
        let uniform = plain.iter().map(|loss| loss.uniform).collect();
        vec![
            nll(&plain),
            nll(&weighted),
            get(b, logits),
            top,
            entropies(&plain),
            entropies(&weighted),
            uniform,
        ]
    }
    for (rows, vocab) in [(1, 1), (3, 2), (5, 31), (7, 33), (2, 1000)] {
        // With one token all results are zero.
        for (softcap, smoothing) in [(None, 0.0), (Some(1.5), 0.0), (None, 0.2), (Some(1.5), 0.2)] {
            if vocab == 1 {
                continue;
            }
            agree!(format!("[{rows}, {vocab}], {softcap:?}, {smoothing}"), b => run(b, rows, vocab, softcap, smoothing));
        }
    }
}

#[test]
fn the_first_of_equal_logits_is_on_top() {
    let mut cpu = Cpu::new();
    let logits = space(&mut cpu, 1, 3);
    cpu.write(logits, &[1.0, 1.0, 0.0]).unwrap();
    for (id, top1) in [(0, true), (1, false), (2, false)] {
        for softcap in [None, Some(2.0)] {
            assert_eq!(losses(&mut cpu, logits, &[id], None, softcap, 0.0)[0].top1, top1);
        }
    }
}

#[test]
fn a_nan_anywhere_in_the_logits_reaches_the_loss() {
    let mut cpu = Cpu::new();
    for vocab in [3, 40] {
        let logits = space(&mut cpu, 1, vocab);
        let mut x = vec![0.5; vocab];
        x[2] = f32::NAN;
        cpu.write(logits, &x).unwrap();
        for softcap in [None, Some(2.0)] {
            assert!(losses(&mut cpu, logits, &[0], None, softcap, 0.0)[0].nll.is_nan());
        }
    }
}

#[test]
fn rows_and_sums() {
    fn run<B: Backend>(b: &mut B, width: usize) -> Vec<Vec<f32>> {
        let (table, x, y) = (put(b, 9, width, 1), put(b, 6, width, 2), space(b, 6, width));
        let rows = list(b, &[3, 0, 8, 3, 3, 1]);
        b.gather(y, table, rows).unwrap();
        b.scatter_add(table, x, rows).unwrap();
        b.add(y, x).unwrap();
        let squares = b.sum_squares(table).unwrap() as f32;
        b.scale(x, -1.5).unwrap();
        vec![get(b, y), get(b, table), vec![squares], get(b, x)]
    }
    for width in [1, 31, 33, 20_000] {
        agree!(format!("width {width}"), b => run(b, width));
    }
}

#[test]
fn columns_are_scaled_and_measured() {
    fn run<B: Backend>(b: &mut B, rows: usize, width: usize, rank: usize) -> Vec<Vec<f32>> {
        let (w, low, a) = (put(b, width, rows, 1), put(b, width, rank, 2), put(b, rank, rows, 3));
        let (n, quotient) = (space(b, 1, width), space(b, 1, width));
        b.row_norms(n, w, low, a, 0.7).unwrap();
        let ones = put(b, 1, width, 4);
        b.divide(quotient, ones, n).unwrap();
        // Both have gaps.
        let (x, y) =
            (put(b, rows, width + 3, 5).columns(1..width + 1), put(b, rows, width + 2, 6).columns(0..width));
        b.scale_columns(y, true, x, quotient, Some(ones)).unwrap();
        let dense = space(b, rows, width);
        b.scale_columns(dense, false, y, quotient, None).unwrap();
        let dots = put(b, 1, width, 7);
        b.column_dots(dots, true, x, y, n).unwrap();
        let fresh = space(b, 1, width);
        b.column_dots(fresh, false, x, dense, n).unwrap();
        [n, quotient, dense, dots, fresh].iter().map(|view| get(b, *view)).collect()
    }
    for (rows, width, rank) in [(1, 1, 1), (3, 65, 2), (66, 63, 5), (130, 200, 16)] {
        agree!(format!("{rows} × {width}, rank {rank}"), b => run(b, rows, width, rank));
    }
}

/// Routing and the linear layers of experts; some experts get no rows.
fn experts<B: Backend>(
    b: &mut B,
    r: Routing,
    [rows, count]: [usize; 2],
    [inputs, outputs]: [usize; 2],
) -> Vec<View> {
    let slots = rows * r.per_row;
    let (p, weights) = (put(b, rows, count, 1), space(b, rows, r.per_row));
    let routes = b.route(r, p, weights).unwrap();
    let (x, w) = (put(b, slots, inputs, 2), put(b, count * outputs, inputs, 3));
    let (y, dy) = (space(b, slots, outputs), put(b, slots, outputs, 4));
    let (dx, dw) = (space(b, slots, inputs), put(b, count * outputs, inputs, 5));
    // The gradient of some rows only: the end of one expert's and the start of the next one's.
    let part = space(b, outputs + 1, inputs);
    // The same weights as several views with boundaries inside an expert.
    let cut = (count * outputs).min(outputs + 2);
    let pieces = [w.row_range(0..cut), w.row_range(cut..count * outputs)];
    let cuts = if rows % 2 == 0 { &pieces[..] } else { &[w] };
    b.grouped_linear(y, x, cuts, routes.offsets()).unwrap();
    b.grouped_linear_dx(dx, dy, cuts, routes.offsets()).unwrap();
    b.grouped_linear_dw(dw, 0, true, dy, x, routes.offsets()).unwrap();
    b.grouped_linear_dw(part, outputs - 1, false, dy, x, routes.offsets()).unwrap();
    let (d_weights, d_logits) = (put(b, rows, r.per_row, 6), space(b, rows, count));
    b.route_backward(r, d_logits, p, d_weights, &routes).unwrap();
    let dots = space(b, slots, 1);
    b.row_dots(dots, y, dy).unwrap();
    b.scale_rows(y, weights).unwrap();
    let rows = space(b, rows, inputs);
    b.scatter_add(rows, x, routes.rows()).unwrap();
    vec![p, weights, y, dx, dw, part, d_logits, dots, rows]
}

#[test]
fn experts_and_their_routes() {
    for ([rows, count, per_row], sides) in [
        ([1, 2, 1], [5, 3]),
        ([3, 4, 2], [5, 3]),
        ([65, 7, 3], [5, 3]),
        ([130, 4, 4], [5, 3]),
        ([2, 33, 1], [5, 3]),
        ([2, 65, 2], [33, 2]),
        ([80, 2, 1], [35, 66]),
    ] {
        for normalise in [false, true] {
            let r = Routing { per_row, normalise };
            fn run<B: Backend>(b: &mut B, r: Routing, rows: [usize; 2], sides: [usize; 2]) -> Vec<Vec<f32>> {
                experts(b, r, rows, sides).into_iter().map(|view| get(b, view)).collect()
            }
            // With one normalised weight per row, it is always 1: there is no gradient to compare.
            if per_row == 1 && normalise {
                continue;
            }
            agree!(format!("{rows} rows, {count} experts, {r:?}"), b => run(b, r, [rows, count], sides));
        }
    }
}

#[test]
fn rotation_and_its_inverse() {
    // Whole heads, and the first 6 of 10 columns.
    fn run<B: Backend>(b: &mut B, rotated: usize) -> Vec<Vec<f32>> {
        let (x, table) = (put(b, 5, 40, 1), space(b, 7, rotated));
        let angles = values(7 * rotated / 2, 2);
        let rows = angles.chunks(rotated / 2);
        let rows = rows.flat_map(|a| a.iter().map(|a| a.cos()).chain(a.iter().map(|a| a.sin())));
        b.write(table, &rows.collect::<Vec<_>>()).unwrap();
        let (heads, positions) = (x.columns(0..30), list(b, &[6, 0, 2, 2, 5]));
        b.rotate(heads, 10, table, positions, false).unwrap();
        let there = get(b, x);
        b.rotate(heads, 10, table, positions, true).unwrap();
        vec![there, get(b, x)]
    }
    for rotated in [10, 6] {
        agree!("rotate".to_string(), b => run(b, rotated));
        let (back, start) = (run(&mut Cpu::new(), rotated), values(5 * 40, 1));
        assert!(relative(&back[1], &start) < 1e-6, "the inverse undoes the rotation");
        assert!(relative(&back[0], &start) > 0.1, "the rotation does something");
        for (row, (there, start)) in back[0].chunks(40).zip(start.chunks(40)).enumerate() {
            let stays = |column: usize| column >= 30 || column % 10 >= rotated;
            assert!((0..40).filter(|c| stays(*c)).all(|c| there[c] == start[c]), "row {row}");
        }
    }
}

#[test]
fn adamw_steps() {
    fn run<B: Backend>(b: &mut B) -> Vec<Vec<f32>> {
        let n = 70_000;
        let (p, g) = (put(b, 1, n, 1), put(b, 1, n, 2));
        let (m, v) = (space(b, 1, n), space(b, 1, n));
        for t in 1..4 {
            b.adamw(AdamW { t, gradient_scale: 0.5, ..STEP }, p, g, m, v).unwrap();
        }
        [p, m, v].map(|x| get(b, x)).to_vec()
    }
    agree!("adamw".to_string(), b => run(b));
}

#[test]
fn adafactor_and_gradient_descent() {
    fn run<B: Backend>(b: &mut B, rows: usize, width: usize) -> Vec<Vec<f32>> {
        let n = rows * width;
        let (g, p, vector, plain, heavy) = (
            put(b, rows, width, 1),
            put(b, rows, width, 2),
            put(b, 1, n, 3),
            put(b, 1, n, 4),
            put(b, 1, n, 5),
        );
        let (of_rows, of_columns, of_all, m) =
            (space(b, 1, rows), space(b, 1, width), space(b, 1, n), space(b, 1, n));
        for t in 1..4 {
            let step = Adafactor { t, lr: 0.01, weight_decay: 0.1, gradient_scale: 0.5 };
            b.adafactor(step, p, g, of_rows, Some(of_columns)).unwrap();
            b.adafactor(step, vector, g, of_all, None).unwrap();
            let step = Sgd { lr: 0.01, momentum: 0.9, weight_decay: 0.1, gradient_scale: 0.5 };
            b.sgd(step, heavy, g, Some(m)).unwrap();
            b.sgd(Sgd { momentum: 0.0, ..step }, plain, g, None).unwrap();
        }
        [p, of_rows, of_columns, vector, of_all, heavy, m, plain].map(|x| get(b, x)).to_vec()
    }
    for (rows, width) in [(1, 1), (3, 33), (130, 65), (2, 1030)] {
        agree!(format!("[{rows}, {width}]"), b => run(b, rows, width));
    }
}

/// Moments of one byte: parameters agree, and so do codes, except where a value is half-way between two.
#[test]
fn adamw_with_moments_of_a_byte() {
    fn run<B: Backend>(b: &mut B, n: usize) -> (Vec<Vec<f32>>, [Vec<u8>; 2]) {
        let (p, g, blocks) = (put(b, 1, n, 1), put(b, 1, n, 2), n.div_ceil(256));
        let scales = [space(b, 1, blocks), space(b, 1, blocks)];
        let buffers = [b.allocate_bytes(n).unwrap(), b.allocate_bytes(n).unwrap()];
        let codes = [buffers[0].view(), buffers[1].view()];
        let step = AdamW { gradient_scale: 0.5, ..STEP };
        b.adamw_8bit(step, p, g, codes, scales).unwrap();
        b.adamw_8bit(AdamW { t: 2, ..step }, p, g, codes, scales).unwrap();
        let values = [p, scales[0], scales[1]].map(|x| get(b, x)).to_vec();
        (
            values,
            codes.map(|codes| {
                let mut bytes = vec![0; n];
                b.read_bytes(codes, &mut bytes).unwrap();
                bytes
            }),
        )
    }
    for n in [1, 255, 256, 257, 5000] {
        let Some(mut card) = card(Precision::Bf16) else { return };
        let ((values, codes), (expected, expected_codes)) =
            (run(&mut card, n), run(&mut Reference::<f32>::new(), n));
        compare(&format!("{n} elements"), "card", &values, &expected, 1e-5);
        for (codes, expected) in codes.iter().zip(&expected_codes) {
            let different = codes.iter().zip(expected).filter(|(a, b)| a != b).count();
            assert!(different * 500 <= n, "{different} of {n} codes differ");
        }
    }
}

/// Checks `gradient` against central differences of `objective` in f64, at a few elements of `x`.
fn slopes(
    b: &mut Reference<f64>,
    x: View,
    gradient: View,
    mut objective: impl FnMut(&mut Reference<f64>) -> f64,
) {
    let (start, g) = (b.get(x).unwrap(), b.get(gradient).unwrap());
    let mut random = Random(23);
    for _ in 0..8 {
        let i = random.below(start.len());
        let mut at = |change: f64| {
            let mut moved = start.clone();
            moved[i] += change;
            b.set(x, &moved).unwrap();
            objective(b)
        };
        let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
        assert!((slope - g[i]).abs() < 1e-7 * (1.0 + slope.abs()), "element {i}: {} and slope {slope}", g[i]);
        b.set(x, &start).unwrap();
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[test]
fn the_references_gradients_are_slopes() {
    let b = &mut Reference::<f64>::new();
    // Whole rows, and three heads of seven columns.
    for (norm, groups) in NORMS.into_iter().flat_map(|norm| [(norm, 1), (norm, 3)]) {
        let (rows, width) = (3, 7);
        let (x, w) = (put(b, rows, groups * width, 1), put(b, 1, width, 2));
        let (bias, dy) = (put(b, 1, width, 3), put(b, rows, groups * width, 4));
        let used_bias = matches!(norm, Norm::Layer { .. }).then_some(bias);
        let (y, stats) = (space(b, rows, groups * width), space(b, rows, groups * norm.statistics()));
        let (dx, dw, db) = (space(b, rows, groups * width), space(b, 1, width), space(b, 1, width));
        b.norm(norm, y, stats, x, w, used_bias).unwrap();
        b.norm_backward(norm, dx, Some(dw), Some(db), dy, stats, x, w).unwrap();
        let weights = b.get(dy).unwrap();
        let mut pairs = vec![(x, dx), (w, dw)];
        pairs.extend(used_bias.map(|bias| (bias, db)));
        for (operand, gradient) in pairs {
            slopes(b, operand, gradient, |b| {
                b.norm(norm, y, stats, x, w, used_bias).unwrap();
                dot(&b.get(y).unwrap(), &weights)
            });
        }
    }
    for f in ACTIVATIONS {
        let (up, da) = (put(b, 2, 5 * f.gate_width(), 1), put(b, 2, 5, 2));
        let (a, dup) = (space(b, 2, 5), space(b, 2, 5 * f.gate_width()));
        b.activate_backward(f, dup, da, up).unwrap();
        let weights = b.get(da).unwrap();
        slopes(b, up, dup, |b| {
            b.activate(f, a, up).unwrap();
            dot(&b.get(a).unwrap(), &weights)
        });
    }
    for normalise in [false, true] {
        // The two most likely of five experts, with enough margin that the choice does not change.
        let r = Routing { per_row: 2, normalise };
        let (logits, p, weights) = (space(b, 2, 5), space(b, 2, 5), space(b, 2, 2));
        b.set(logits, &[0.3, 2.0, -1.0, 1.1, 0.0, 1.0, -0.5, 0.2, 0.1, 2.2]).unwrap();
        b.copy(p, logits).unwrap();
        let routes = b.route(r, p, weights).unwrap();
        let (d_weights, d_logits) = (put(b, 2, 2, 7), space(b, 2, 5));
        b.route_backward(r, d_logits, p, d_weights, &routes).unwrap();
        let d_weights = b.get(d_weights).unwrap();
        slopes(b, logits, d_logits, |b| {
            b.copy(p, logits).unwrap();
            b.route(r, p, weights).unwrap();
            dot(&b.get(weights).unwrap(), &d_weights)
        });
    }
    let (plan, keys) = attention_plan(4, [3, 5], 1);
    let plan = b.upload_plan(plan).unwrap();
    for (window, softcap, dropout) in [
        (None, None, None),
        (Some(3), None, None),
        (None, Some(0.75), None),
        (Some(5), Some(2.0), Some(DROPOUT)),
        (None, None, Some(DROPOUT)),
    ] {
        let h = Heads { window, softcap, ..HEADS };
        let v = attention(b, h, &plan, dropout, keys);
        let [o, lse, dq, dkv, q, kv, do_] = v[..] else { unreachable!() };
        let weights = b.get(do_).unwrap();
        for (operand, gradient) in [(q, dq), (kv, dkv)] {
            slopes(b, operand, gradient, |b| {
                b.attention(Attention { heads: h, plan: &plan, dropout }, o, lse, q, kv).unwrap();
                dot(&b.get(o).unwrap(), &weights)
            });
        }
    }
    // The loss: its gradient overwrites the logits, so the slope is computed on a copy.
    for (softcap, smoothing) in [(None, 0.0), (Some(0.75), 0.0), (None, 0.25), (Some(0.75), 0.25)] {
        let (logits, gradient) = (put(b, 2, 9, 1), space(b, 2, 9));
        let (ids, weights) = ([4u32, 0], [0.5f32, -2.0]);
        b.copy(gradient, logits).unwrap();
        losses(b, gradient, &ids, Some(&weights), softcap, smoothing as f32);
        slopes(b, logits, gradient, |b| {
            let cap = |x: &f64| softcap.map_or(*x, |cap| f64::from(cap) * (x / f64::from(cap)).tanh());
            let x: Vec<f64> = b.get(logits).unwrap().iter().map(cap).collect();
            let nll = |i: usize| {
                let row = &x[i * 9..][..9];
                let (label, mean) = (row[ids[i] as usize], row.iter().sum::<f64>() / 9.0);
                row.iter().map(|v| v.exp()).sum::<f64>().ln() - (1.0 - smoothing) * label - smoothing * mean
            };
            0.5 * nll(0) - 2.0 * nll(1)
        });
    }
}
