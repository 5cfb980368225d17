//! The load-balancing loss of experts.

mod common;

use common::{Random, floats, golden_batch, json, mean_loss, relative};
use serde_json::Value;
use std::path::{Path, PathBuf};
use suasion_engine::{
    AdamW, Architecture, Backend, Batch, Budget, Cpu, Model, Reference, Regularisation, Trainable,
};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models/qwen3_moe")
}

/// The loss including its share of the load-balancing loss, and the load-balancing loss alone.
fn accumulate<B: Backend>(model: &mut Model<B>, batch: &Batch) -> (f64, f64) {
    let losses = model.accumulate(batch, 1.0 / batch.weight() as f32).unwrap();
    let balance = model.read_balance(&losses).unwrap().unwrap();
    let nll = mean_loss(batch, &model.read_losses(&losses).unwrap());
    (nll + f64::from(model.architecture().balance) * balance, balance)
}

fn golden_model<B: Backend>(coefficient: &Value, backend: B, batch: &Batch) -> Model<B> {
    let mut config = json(&folder().join("config.json"));
    config["output_router_logits"] = true.into();
    config["router_aux_loss_coef"] = coefficient.clone();
    let arch = Architecture::from_json(&config, Path::new("config.json")).unwrap();
    let budget = Budget { tokens: batch.tokens(), targets: batch.tokens(), train: true, recompute: false };
    let mut model = Model::new(arch, backend, budget).unwrap();
    model.load_weights(&folder()).unwrap();
    model
}

fn check<B: Backend>(model: &mut Model<B>, batch: &Batch, want: &Value, what: &str) {
    let number = |key: &str| want[key].as_f64().unwrap();
    let (loss, balance) = accumulate(model, batch);
    assert!((loss - number("loss")).abs() < 2e-5, "{what}: loss {loss}, transformers {}", number("loss"));
    let aux = number("aux_loss");
    assert!((balance - aux).abs() < 1e-5, "{what}: load-balancing loss {balance}, transformers {aux}");
    let norm = model.gradient_norm().unwrap();
    assert!((norm / number("grad_norm_total") - 1.0).abs() < 1e-4, "{what}: {norm}");
    let grads = want["grads"].as_object().unwrap();
    assert_eq!(grads.len(), model.trained_names().len());
    for (name, want) in grads {
        let (got, size) = (model.gradient(name).unwrap().data, want["norm"].as_f64().unwrap());
        let norm = got.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        assert!((norm - size).abs() < 1e-4 * size.max(1e-3), "{what} {name}: {norm}, PyTorch {size}");
        for (i, value) in floats(&want["idx"]).iter().zip(floats(&want["val"])) {
            let got = f64::from(got[*i as usize]);
            assert!(
                (got - value).abs() < 1e-4 * size.max(1e-3),
                "{what} {name}[{i}]: {got}, PyTorch {value}"
            );
        }
    }
}

/// Includes a batch with padding, which transformers excludes by its mask and we do not have.
#[test]
fn loss_gradients_and_steps_are_those_of_transformers() {
    let goldens = json(&folder().join("../training.json"))["balance"]["qwen3_moe"].clone();
    let batches = json(&folder().join("golden.json"))["batches"].clone();
    for (name, want) in goldens.as_object().unwrap() {
        let batch = golden_batch(&batches[name]);
        let mut model = golden_model(&want["coefficient"], Cpu::new(), &batch);
        check(&mut model, &batch, want, name);
        check(&mut golden_model(&want["coefficient"], Reference::<f32>::new(), &batch), &batch, want, name);
        for (t, want) in floats(&want["losses"]).iter().enumerate() {
            model.zero_gradients();
            let (loss, _) = accumulate(&mut model, &batch);
            assert!((loss - want).abs() < 5e-4, "{name} step {t}: {loss}, PyTorch {want}");
            model.adamw(&AdamW { t: t as u64 + 1, ..AdamW::default() }).unwrap();
        }
        // Neither a model without this loss nor a forward-only pass computes it.
        let losses = model.forward(&batch).unwrap();
        let mut off = golden_model(&0.0.into(), Cpu::new(), &batch);
        let pending = off.accumulate(&batch, 1.0).unwrap();
        assert_eq!(off.read_balance(&pending).unwrap(), None);
        assert_eq!(losses.len(), batch.targets.len());
    }
}

/// Three layers, with experts on those not in `dense`.
fn architecture(dense: &[usize], coefficient: f32) -> Architecture {
    let mut config = common::config("qwen3_moe");
    config["mlp_only_layers"] = serde_json::json!(dense);
    config["output_router_logits"] = (coefficient != 0.0).into();
    config["router_aux_loss_coef"] = coefficient.into();
    Architecture::from_json(&config, Path::new("config.json")).unwrap()
}

fn model<B: Backend>(dense: &[usize], backend: B, recompute: bool) -> Model<B> {
    common::model_of(architecture(dense, 0.7), backend, recompute, &Trainable::All)
}

/// Two rows, most of whose tokens are not targets.
fn batch() -> Batch {
    let mut random = Random(5);
    let mut batch = Batch::default();
    for (length, targets) in [(9, vec![(3, 5, 1.0), (8, 2, 0.5)]), (14, vec![(13, 11, 1.0)])] {
        let ids = random.ids(length);
        batch.push(&ids, targets);
    }
    batch
}

const LAYERS: [&[usize]; 4] = [&[], &[1], &[2], &[0, 1]];

/// The loss jumps where a row's choice of experts changes: there the slopes on the two sides differ, and the element is
/// skipped.
#[test]
fn gradients_are_the_slopes_of_the_loss() {
    for dense in [&[][..], &[2]] {
        let (batch, mut model) = (batch(), model(dense, Reference::<f64>::new(), false));
        let (middle, _) = accumulate(&mut model, &batch);
        let (mut checked, names) = (0, model.trained_names());
        for name in &names {
            let (tensor, gradient) = (model.parameter(name).unwrap(), model.gradient(name).unwrap().data);
            let largest =
                (0..gradient.len()).max_by(|a, b| gradient[*a].abs().total_cmp(&gradient[*b].abs()));
            let at = largest.unwrap();
            let mut slope = |shift: f32| {
                let mut moved = tensor.clone();
                moved.data[at] += shift;
                let step = f64::from(moved.data[at]) - f64::from(tensor.data[at]);
                model.set_parameter(name, &moved).unwrap();
                model.zero_gradients();
                (accumulate(&mut model, &batch).0 - middle) / step
            };
            let (up, down) = (slope(1e-3), slope(-1e-3));
            model.set_parameter(name, &tensor).unwrap();
            model.zero_gradients();
            accumulate(&mut model, &batch);
            let (want, got) = ((up + down) / 2.0, f64::from(gradient[at]));
            if (up - down).abs() > 0.02 + 0.05 * want.abs() {
                continue;
            }
            checked += 1;
            assert!(
                (got - want).abs() < 3e-3 * want.abs() + 1e-3,
                "{dense:?} {name}[{at}]: {got}, slope {want}"
            );
        }
        assert!(checked * 10 > names.len() * 8, "{dense:?}: {checked} of {} checked", names.len());
    }
}

#[test]
fn it_is_the_same_on_both_backends_recomputed_and_on_any_number_of_threads() {
    for dense in LAYERS {
        let batch = batch();
        let run = |recompute: bool, threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut model = model(dense, Cpu::new(), recompute);
                (accumulate(&mut model, &batch), common::gradients(&model))
            })
        };
        let plain = run(false, 1);
        assert_eq!(run(true, 1), plain, "{dense:?} recomputed");
        assert_eq!(run(false, 2), plain, "{dense:?} two threads");
        let mut reference = model(dense, Reference::<f64>::new(), false);
        let (loss, balance) = accumulate(&mut reference, &batch);
        let (ours, _) = &plain;
        assert!(
            (ours.0 - loss).abs() < 1e-5 && (ours.1 - balance).abs() < 1e-5,
            "{dense:?}: {ours:?} {loss} {balance}"
        );
        for ((name, got), (_, want)) in plain.1.iter().zip(common::gradients(&reference)) {
            assert!(relative(got, &want) < 1e-4, "{dense:?} {name}: {}", relative(got, &want));
        }
    }
}

#[test]
fn a_shared_prompt_counts_for_each_of_its_rows() {
    let mut random = Random(5);
    let prompt = random.ids(12);
    let replies = [6, 1, 11].map(|n| random.ids(n));
    let (mut separate, mut shared) = (Batch::default(), Batch::default());
    shared.push(&prompt, []);
    for reply in &replies {
        let row: Vec<u32> = prompt.iter().chain(reply).copied().collect();
        separate.push(&row, (prompt.len()..row.len()).map(|j| (j as u32 - 1, row[j], 1.0)));
        let targets = (1..reply.len()).map(|j| (j as u32 - 1, reply[j], 1.0));
        shared.push_after(0..prompt.len() as u32, reply, targets);
        let first = suasion_engine::Target { row: prompt.len() as u32 - 1, id: reply[0], weight: 1.0 };
        shared.targets.push(first);
    }
    for dense in LAYERS {
        let [mut apart, mut together] = [(); 2].map(|()| model(dense, Cpu::new(), false));
        let ((a, balance_a), (b, balance_b)) =
            (accumulate(&mut apart, &separate), accumulate(&mut together, &shared));
        assert!(
            (a - b).abs() < 1e-5 && (balance_a - balance_b).abs() < 1e-5,
            "{dense:?}: {a} {b} {balance_a} {balance_b}"
        );
        for ((name, got), (_, want)) in common::gradients(&together).iter().zip(common::gradients(&apart)) {
            assert!(relative(got, &want) < 2e-5, "{dense:?} {name}");
        }
    }
}

/// A step takes the mean over its passes.
#[test]
fn a_pass_has_its_share() {
    let (batch, mut model) = (batch(), model(&[1], Cpu::new(), false));
    let (_, whole) = accumulate(&mut model, &batch);
    let want = common::gradients(&model);
    model.zero_gradients();
    model.regularise(Regularisation { balance: 0.5, ..Regularisation::default() });
    for _ in 0..2 {
        let losses = model.accumulate(&batch, 0.5 / batch.weight() as f32).unwrap();
        assert_eq!(model.read_balance(&losses).unwrap(), Some(whole));
    }
    for ((name, got), (_, want)) in common::gradients(&model).iter().zip(want) {
        assert!(relative(got, &want) < 1e-5, "{name}");
    }
}
