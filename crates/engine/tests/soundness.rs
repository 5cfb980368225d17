//! Safe code must not be able to reach memory that an operand does not own.

mod common;

use common::card::card;
use common::{Random, model};
use std::panic::{AssertUnwindSafe, catch_unwind};
use suasion_engine::kernels::{
    Activation, Attention, AttentionPlan, AttentionRange, Buffer, Draw, Dropout, Heads, Norm, Routing,
    TargetLoss, View,
};
use suasion_engine::{AdamW, Backend, Cpu, Device, Error, Precision, Reference, Result};

/// The message of an operation that must be refused.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>) -> String {
    match result {
        Err(error @ Error::Operands { .. }) => error.to_string(),
        other => panic!("must be refused, was {other:?}"),
    }
}

/// The message of a panic.
fn panics<T>(f: impl FnOnce() -> T) -> String {
    let payload = catch_unwind(AssertUnwindSafe(f)).err().expect("must panic");
    payload.downcast_ref::<String>().cloned().unwrap_or_default()
}

#[test]
fn sizes_whose_product_wraps_name_no_memory() {
    // The former bug: `linear` with 2 rows of 2^63 inputs passed its length checks, which wrapped to 0, and crashed.
    let mut cpu = Cpu::new();
    let buffer = cpu.allocate(4).unwrap();
    for (rows, width) in [(2, 1 << 63), (1 << 63, 2), (usize::MAX, usize::MAX), (1 << 32, 1 << 32), (5, 1)] {
        let message = panics(|| buffer.matrix(rows, width));
        assert!(message.contains("in a view of 4"), "{message}");
    }
    let whole = buffer.view();
    for (start, len) in [(2, usize::MAX - 1), (5, 0), (usize::MAX, 1), (0, 5)] {
        assert!(panics(|| whole.part(start, len)).contains("of a view of 4"), "{start}+{len}");
    }
    assert!(panics(|| buffer.matrix(4, 1).row_range(3..5)).contains("rows 3..5 of 4"));
    assert!(panics(|| buffer.matrix(4, 1).row_range(usize::MAX - 1..usize::MAX)).contains("of 4"));
    assert!(panics(|| buffer.matrix(2, 2).columns(1..3)).contains("columns 1..3 of 2"));
    let wide = Heads {
        heads: 1 << 40,
        kv_heads: 1 << 40,
        head_dim: 1 << 40,
        scale: 1.0,
        softcap: None,
        window: None,
    };
    assert_eq!((wide.query_width(), wide.kv_width()), (usize::MAX, usize::MAX), "widths never wrap");
    for len in [usize::MAX, usize::MAX - 10, 1 << 62] {
        assert_eq!(cpu.allocate(len).unwrap_err().tag(), "E-MEMORY");
        assert_eq!(Reference::<f64>::new().allocate(len).unwrap_err().tag(), "E-MEMORY");
    }
}

#[test]
fn a_plan_of_sizes_whose_product_wraps_is_no_small_plan() {
    let arch = common::architecture("llama");
    let budget =
        suasion_engine::Budget { tokens: usize::MAX / 2, targets: 1 << 40, train: true, recompute: false };
    assert_eq!(suasion_engine::MemoryPlan::of(&arch, budget).activations, u64::MAX);
    assert_eq!(suasion_engine::Model::new(arch.clone(), Cpu::new(), budget).unwrap_err().tag(), "E-MEMORY");
    let mut hostile = arch;
    hostile.blocks[1].attention.heads.heads = 1 << 62;
    let error = suasion_engine::Model::new(hostile, Cpu::new(), budget).unwrap_err();
    assert!(error.to_string().contains("not plausible"), "{error}");
}

/// Every operation with each operand in turn one element, row or column too short.
fn wrong_sizes<B: Backend>(b: &mut B) {
    let mut buffers: Vec<Buffer> = Vec::new();
    let mut m = |rows: usize, width: usize| -> View {
        buffers.push(b.allocate(rows * width).unwrap());
        buffers[buffers.len() - 1].matrix(rows, width)
    };
    let (x, y, z) = (m(6, 4), m(6, 4), m(6, 4));
    let (short, narrow) = (m(5, 4), m(6, 3));
    let (w, v, v3) = (m(1, 4), m(1, 4), m(1, 3));
    let (stats, stats5) = (m(6, 1), m(5, 1));
    let (matrix, matrix3) = (m(3, 4), m(3, 3));
    let (table, losses, losses5) = (m(9, 4), m(6, TargetLoss::COLUMNS), m(5, TargetLoss::COLUMNS));
    let (q, kv, o, lse, kv_short) = (m(6, 8), m(6, 8), m(6, 8), m(6, 2), m(5, 8));
    let (dq, dkv, do_) = (m(6, 8), m(6, 8), m(6, 8));
    let (up, dup) = (m(6, 8), m(6, 8));
    let rows = b.upload_indices(&[0, 5, 2, 3, 1, 4]).unwrap();
    let (few, large) = (b.upload_indices(&[0; 5]).unwrap(), b.upload_indices(&[0, 0, 0, 0, 0, 9]).unwrap());
    let (rows, few, large) = (rows.view(), few.view(), large.view());
    let rms = Norm::Rms { eps: 1e-5, offset: 0.0 };
    for other in [short, narrow] {
        refused(b.copy(y, other));
        refused(b.add(y, other));
        refused(b.norm(rms, y, stats, other, w, None));
        refused(b.norm_again(rms, other, stats, x, w, None));
        refused(b.norm_backward(rms, other, Some(v), None, z, stats, x, w));
        refused(b.norm_backward(rms, y, Some(v), None, other, stats, x, w));
        refused(b.norm_backward(rms, y, Some(v), None, z, stats, other, w));
        refused(b.linear(narrow, false, other, matrix, None));
        refused(b.linear_dx(other, false, narrow, matrix));
        refused(b.linear_dw(matrix, false, narrow, other));
        refused(b.activate(Activation::SwiGlu, other, up));
        refused(b.activate(Activation::GeluTanh, x, other));
        refused(b.activate_backward(Activation::SwiGlu, dup, other, up));
        refused(b.activate_backward(Activation::GeluTanh, other, x, y));
        refused(b.gather(y, other, large));
    }
    for stats in [stats5, m_like(stats, 4)] {
        refused(b.norm(rms, y, stats, x, w, None));
        refused(b.norm_again(rms, y, stats, x, w, None));
        refused(b.norm_backward(rms, y, Some(v), None, z, stats, x, w));
    }
    refused(b.norm(Norm::Layer { eps: 1e-5 }, y, stats, x, w, Some(v)));
    refused(b.norm(rms, y, stats, x, v3, None));
    refused(b.norm(rms, y, stats, x, w, Some(v3)));
    refused(b.norm_backward(rms, y, Some(v3), None, z, stats, x, w));
    refused(b.norm_backward(rms, y, Some(v), Some(v3), z, stats, x, w));
    refused(b.linear(narrow, false, x, matrix3, None));
    refused(b.linear(narrow, false, x, matrix, Some(v)));
    refused(b.linear_db(v, false, narrow));
    refused(b.activate_backward(Activation::SwiGlu, x, z, up));
    for bad in [few, large] {
        refused(b.gather(y, x, bad));
        refused(b.scatter_add(y, x, bad));
    }
    refused(b.rotate(x, 4, table, few, false));
    refused(b.rotate(x, 3, table, rows, false));
    refused(b.rotate(x, 2, table, rows, false));
    refused(b.rotate(x, 4, m_like(table, 4), rows, false));
    let routing = |per_row| Routing { per_row, normalise: false };
    refused(b.route(routing(0), x, w));
    refused(b.route(routing(1 << 60), x, w));
    refused(b.grouped_linear(y, x, &[w], few));
    refused(b.grouped_linear_dx(x, y, &[w], few));
    refused(b.grouped_linear_dw(w, 0, false, y, x, few));
    refused(b.scale_rows(x, narrow));
    refused(b.row_dots(x, y, z));
    refused(b.cross_entropy(losses5, x, rows, None, None, 0.0));
    refused(b.cross_entropy(losses, x, few, None, None, 0.0));
    refused(b.cross_entropy(losses, x, large, None, None, 0.0));
    refused(b.cross_entropy(losses, x, rows, None, None, 1.5));
    refused(b.cross_entropy(losses, x, rows, Some(w), None, 0.0));
    let step = AdamW::default();
    let (p, g, m1) = (x.part(0, 24), y.part(0, 24), z.part(0, 24));
    refused(b.adamw(step, p, g, m1, narrow));
    refused(b.adamw(step, p, narrow, m1, table.part(0, 24)));
    let heads = Heads { heads: 2, kv_heads: 1, head_dim: 4, scale: 1.0, softcap: None, window: None };
    let plan = |rows: usize| AttentionPlan {
        rows: (0..rows as u32).collect(),
        ranges: vec![AttentionRange { prefix: 0..0, own: 0..rows, queries: 0..rows }],
        groups: vec![vec![0]],
    };
    let (good, few) = (b.upload_plan(plan(6)).unwrap(), b.upload_plan(plan(5)).unwrap());
    for (h, plan, o, lse, q, kv) in [
        (heads, &few, o, lse, q, kv),
        (heads, &good, o, lse, q, kv_short),
        (heads, &good, x, lse, q, kv),
        (heads, &good, o, stats, q, kv),
        (Heads { kv_heads: 0, ..heads }, &good, o, lse, q, kv),
        (Heads { head_dim: 2, ..heads }, &good, o, lse, q, kv),
        (Heads { heads: 3, kv_heads: 2, ..heads }, &good, o, lse, q, kv),
        (Heads { head_dim: 1 << 63, ..heads }, &good, o, lse, q, kv),
    ] {
        let a = Attention { heads: h, plan, dropout: None };
        refused(b.attention(a, o, lse, q, kv));
        refused(b.attention_backward(a, dq, dkv, do_, o, lse, q, kv));
    }
    let a = Attention { heads, plan: &good, dropout: None };
    b.attention(a, o, lse, q, kv).unwrap();
    for rate in [-0.1, 1.1, f32::NAN] {
        let dropout = Dropout { draw: Draw { key: 1, site: 1 }, rate };
        refused(b.attention(Attention { dropout: Some(dropout), ..a }, o, lse, q, kv));
        refused(b.dropout(x, dropout));
    }
    refused(b.add_noise(x, table.part(0, 3), Draw { key: 1, site: 1 }));
    refused(b.attention_backward(a, x, dkv, do_, o, lse, q, kv));
    refused(b.attention_backward(a, dq, kv_short, do_, o, lse, q, kv));
    refused(b.attention_backward(a, dq, dkv, x, o, lse, q, kv));
    refused(b.write(x, &[0.0; 23]));
    refused(b.read(x, &mut [0.0; 25]));
    // Empty operands: nothing to compute, and no division by their width.
    let empty = x.part(0, 0);
    refused(b.norm(rms, empty, empty, empty, w, None));
    refused(b.norm(rms, empty, empty, empty, empty, None));
    refused(b.linear(empty, false, empty, empty, None));
    refused(b.rotate(empty, 4, table, rows, false));
    b.copy(empty, y.part(0, 0)).unwrap();
}

/// The first rows of a view.
fn m_like(view: View, rows: usize) -> View {
    view.top(rows)
}

#[test]
fn operands_of_other_sizes_are_refused() {
    wrong_sizes(&mut Cpu::new());
    wrong_sizes(&mut Reference::<f32>::new());
    wrong_sizes(&mut Device::cpu());
    card(Precision::F32, 1).iter_mut().for_each(wrong_sizes);
}

#[test]
fn operands_without_rows_compute_nothing() {
    fn check<B: Backend>(b: &mut B) {
        let (wide, vector) = (b.allocate(64).unwrap(), b.allocate(4).unwrap());
        let none = |width: usize| wide.matrix(0, width);
        let v = vector.view();
        let ids = b.upload_indices(&[]).unwrap();
        let rms = Norm::Rms { eps: 1e-5, offset: 0.0 };
        let value = |b: &B| {
            let mut values = [0.0; 4];
            b.read(v, &mut values).unwrap();
            values
        };
        for (accumulate, left) in [(true, 3.0), (false, 0.0)] {
            b.fill(v, 3.0).unwrap();
            b.linear_db(v, accumulate, none(4)).unwrap();
            assert_eq!(value(b), [left; 4], "a sum of no rows");
            b.fill(v, 3.0).unwrap();
            let divisors = b.allocate(4).unwrap();
            b.fill(divisors.view(), 2.0).unwrap();
            b.column_dots(v, accumulate, none(4), none(4), divisors.view()).unwrap();
            assert_eq!(value(b), [left; 4], "dots of no rows");
        }
        b.fill(v, 3.0).unwrap();
        let stats = wide.view().part(0, 0);
        b.norm_backward(rms, none(4), Some(v), None, none(4), stats, none(4), wide.view().part(8, 4))
            .unwrap();
        b.norm(rms, none(4), stats, none(4), v, None).unwrap();
        b.linear(none(4), false, none(4), wide.matrix(4, 4), None).unwrap();
        b.activate(Activation::SwiGlu, none(4), none(8)).unwrap();
        b.gather(none(4), wide.matrix(4, 4), ids.view()).unwrap();
        b.scatter_add(wide.matrix(4, 4), none(4), ids.view()).unwrap();
        b.fill(stats, 1.0).unwrap();
        b.copy(none(4), none(4)).unwrap();
        assert_eq!(value(b), [3.0; 4]);
        assert_eq!(b.sum_squares(stats).unwrap(), 0.0);
        let routes = b.route(Routing { per_row: 2, normalise: true }, none(4), stats).unwrap();
        assert_eq!((routes.rows().len(), routes.offsets().len()), (0, 5));
        b.grouped_linear(none(1), none(4), &[wide.matrix(4, 4)], routes.offsets()).unwrap();
    }
    check(&mut Cpu::new());
    check(&mut Reference::<f32>::new());
    card(Precision::F32, 1).iter_mut().for_each(check);
}

#[test]
fn a_written_view_must_not_overlap_another() {
    fn check<B: Backend>(b: &mut B) {
        let buffer = b.allocate(20).unwrap();
        let x = buffer.view();
        assert!(refused(b.add(x.part(0, 5), x.part(4, 5))).contains("a written view overlaps another"));
        assert!(refused(b.copy(x.part(0, 5), x.part(4, 5))).contains("overlaps"));
        let rows = buffer.matrix(4, 5);
        refused(b.linear(rows.columns(0..2), false, rows.columns(2..5), x.part(0, 6).matrix(2, 3), None));
        b.add(x.part(0, 5), x.part(5, 5)).unwrap();
    }
    check(&mut Cpu::new());
    check(&mut Reference::<f32>::new());
    card(Precision::F32, 1).iter_mut().for_each(check);
}

#[test]
fn views_of_another_backend_and_of_freed_buffers_are_refused() {
    fn check<B: Backend>(mut a: B, mut b: B) {
        let (ours, theirs) = (a.allocate(8).unwrap(), b.allocate(8).unwrap());
        a.fill(ours.view(), 3.0).unwrap();
        let message = refused(b.fill(ours.view(), 1.0));
        assert!(message.contains("another backend"), "{message}");
        assert!(refused(b.copy(theirs.view(), ours.view())).contains("another backend"));
        refused(b.read(ours.view(), &mut [0.0; 8]));
        let mut values = [0.0; 8];
        a.read(ours.view(), &mut values).unwrap();
        assert_eq!(values, [3.0; 8], "nothing was written");

        let (stale, held) = (ours.view(), a.allocated());
        drop(ours);
        a.sync().unwrap();
        assert!(a.allocated() < held, "{} of {held} bytes are held", a.allocated());
        assert!(refused(a.fill(stale, 1.0)).contains("freed"));
        // The same memory may be allocated again; the old handle does not reach it.
        let again = a.allocate(8).unwrap();
        assert_ne!(again.view(), stale);
        refused(a.fill(stale, 1.0));

        let list = a.upload_indices(&[0, 1]).unwrap();
        let (x, y) = (again.matrix(4, 2), a.allocate(4).unwrap());
        let foreign = b.upload_indices(&[0, 1]).unwrap();
        assert!(refused(a.gather(y.matrix(2, 2), x, foreign.view())).contains("another backend"));
        let stale = list.view();
        drop(list);
        a.sync().unwrap();
        assert!(refused(a.gather(y.matrix(2, 2), x, stale)).contains("freed"));
    }
    check(Cpu::new(), Cpu::new());
    check(Reference::<f32>::new(), Reference::<f32>::new());
    check(Device::cpu(), Device::Reference(Reference::new()));
    if let (Some(a), Some(b)) = (card(Precision::F32, 1), card(Precision::F32, 2)) {
        check(a, b);
    }
}

#[test]
fn a_cache_of_one_model_cannot_reach_another() {
    // The former bug: a cache was a range of buffer numbers, and in another model these belonged to the optimizer's
    // state.
    let (mut a, mut b) = (model("llama", Cpu::new(), false), model("llama", Cpu::new(), false));
    let ids = Random(3).ids(5);
    let mut cache = a.cache(8).unwrap();
    let weights = |model: &suasion_engine::Model<Cpu>| -> Vec<_> {
        model.parameter_names().iter().map(|name| model.parameter(name).unwrap()).collect()
    };
    let before = weights(&b);
    let error = b.decode(&mut cache, &ids).unwrap_err();
    assert!(error.to_string().contains("the cache belongs to another model"), "{error}");
    assert_eq!(before, weights(&b));
    assert_eq!(cache.len(), 0);
    a.decode(&mut cache, &ids).unwrap();
    // A cache that outlives its model reaches nothing.
    drop(a);
    assert!(b.decode(&mut cache, &ids).is_err());
}

#[test]
fn caches_give_their_memory_back() {
    let mut model = model("llama", Cpu::new(), false);
    drop(model.cache(64).unwrap());
    let held = model.allocated();
    for _ in 0..10 {
        let mut cache = model.cache(64).unwrap();
        model.decode(&mut cache, &[1, 2, 3]).unwrap();
        assert!(model.allocated() <= held, "{} bytes after {held}", model.allocated());
    }
}

fn plan_error(change: impl FnOnce(&mut AttentionPlan)) -> String {
    let range = |prefix, own, queries| AttentionRange { prefix, own, queries };
    let mut plan = AttentionPlan {
        rows: (0..17).collect(),
        ranges: vec![range(0..0, 0..5, 0..5), range(0..5, 5..8, 5..8), range(0..5, 8..17, 8..17)],
        groups: vec![vec![0, 1, 2]],
    };
    plan.check().unwrap();
    change(&mut plan);
    refused(Cpu::new().upload_plan(plan))
}

#[test]
fn plans_that_kernels_cannot_rely_on_are_refused() {
    let error = plan_error(|plan| plan.groups = vec![vec![0, 1], vec![2]]);
    assert!(error.contains("belongs to two groups"), "{error}");
    let error = plan_error(|plan| plan.groups = vec![vec![0, 1, 2, 2]]);
    assert!(error.contains("range 2 is in two groups"), "{error}");
    let error = plan_error(|plan| plan.groups = vec![vec![0, 1]]);
    assert!(error.contains("range 2 is in no group"), "{error}");
    let error = plan_error(|plan| plan.groups[0].push(9));
    assert!(error.contains("range 9 of 3"), "{error}");
    let error = plan_error(|plan| plan.ranges[1].queries = 0..5);
    assert!(error.contains("queries do not tile"), "{error}");
    let error = plan_error(|plan| plan.ranges[2].queries = 8..usize::MAX);
    assert!(error.contains("queries do not tile"), "{error}");
    let error = plan_error(|plan| plan.rows.push(16));
    assert!(error.contains("17 of 18 queries are planned"), "{error}");
    let error = plan_error(|plan| plan.rows.swap(9, 10));
    assert!(error.contains("do not ascend"), "{error}");
    let error = plan_error(|plan| plan.rows[16] = 17);
    assert!(error.contains("do not ascend"), "{error}");
}
