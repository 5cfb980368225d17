//! What training adds to passes and steps: it is the same after a resume and with any number of threads.

use crate::common::*;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use suasion_data::Sample;
use suasion_engine::{Architecture, Device, Model};
use suasion_train::{
    Error, Optim, ParamGroup, Patterns, Plan, Report, Resume, Scheduler, Settings, Strategy,
};

/// A run of a model of its own.
struct Extra<'a> {
    settings: Settings,
    build: &'a (dyn Fn(Architecture) -> Architecture + Sync),
}

impl Extra<'_> {
    fn run(&self, rows: &[Sample], dir: &Path, resume: Resume, stop: Option<u64>) -> (Report, Vec<Vec<u32>>) {
        let flag = AtomicBool::new(false);
        let mut job = Job::new(rows, self.settings.clone(), dir).resume(resume);
        if let Some(step) = stop {
            job = job.stop_after(step, &flag);
        }
        let budget = Plan::new(rows, &[], &self.settings).unwrap().budget;
        let mut model = Model::new((self.build)(architecture()), Device::cpu(), budget).unwrap();
        model.init_random(7).unwrap();
        let report = job.run_with(&mut model).unwrap();
        (report, bits(&model))
    }

    /// The weights after a run; the same with two threads, with layers computed again, and after a resume.
    fn check(&self, what: &str) -> Vec<Vec<u32>> {
        let rows = rows(9, 3);
        let (_dir, out) = folder();
        let whole = self.run(&rows, &out, Resume::No, None);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let (_dir, other) = folder();
        let two = pool.install(|| self.run(&rows, &other, Resume::No, None));
        assert!(two.1 == whole.1, "{what}: two threads");
        let again =
            Extra { settings: Settings { gradient_checkpointing: true, ..self.settings.clone() }, ..*self };
        let (_dir, other) = folder();
        assert!(again.run(&rows, &other, Resume::No, None).1 == whole.1, "{what}: computed again");
        let (_dir, parts) = folder();
        assert!(self.run(&rows, &parts, Resume::No, Some(3)).0.interrupted);
        assert!(self.run(&rows, &parts, Resume::Newest, None).1 == whole.1, "{what}: resumed");
        assert_eq!(metrics(&out), metrics(&parts), "{what}");
        let last = format!("checkpoint-{}/optimizer.safetensors", whole.0.step);
        assert!(bytes(out.join(&last)) == bytes(parts.join(&last)), "{what}: {last}");
        whole.1
    }
}

fn settings() -> Settings {
    Settings { gradient_accumulation_steps: 2, max_steps: Some(7), save_strategy: Strategy::Steps, ..quick() }
}

#[test]
fn dropout_draws_the_same_after_a_resume() {
    let rate = |rate: f32| {
        move |mut arch: Architecture| {
            arch.embedding.dropout = rate;
            for block in &mut arch.blocks {
                (block.attention.dropout, block.residual_dropout) = (rate, rate);
            }
            arch
        }
    };
    let plain = Extra { settings: settings(), build: &rate(0.0) }.check("no dropout");
    let dropped = Extra { settings: settings(), build: &rate(0.2) }.check("dropout");
    assert!(dropped != plain);
    let other =
        Extra { settings: Settings { seed: 43, data_seed: Some(42), ..settings() }, build: &rate(0.2) };
    assert!(other.check("another seed") != dropped);
    let off = Extra { settings: Settings { disable_dropout: true, ..settings() }, build: &rate(0.2) };
    assert!(off.check("disabled") == plain);
}

/// What a run with other settings ends with, the same after a resume and with two threads.
fn with(settings: Settings) -> Vec<Vec<u32>> {
    let what = format!("{settings:?}");
    Extra { settings, build: &|arch| arch }.check(&what)
}

#[test]
fn noise_and_smoothed_labels_resume_to_the_same_bytes() {
    let plain = with(settings());
    let noisy = with(Settings { neftune_noise_alpha: Some(5.0), ..settings() });
    let smoothed = with(Settings { label_smoothing_factor: 0.1, ..settings() });
    assert!(noisy != plain && smoothed != plain && noisy != smoothed);
    assert!(with(Settings { neftune_noise_alpha: Some(0.0), ..settings() }) == plain);
}

#[test]
fn every_optimizer_resumes_to_the_same_bytes() {
    let args = Some("momentum=0.9".to_string());
    let runs = [
        settings(),
        Settings { optim: Optim::Adamw8bit, ..settings() },
        Settings { optim: Optim::Adafactor, ..settings() },
        Settings { optim: Optim::Sgd, learning_rate: 0.1, ..settings() },
        Settings { optim: Optim::Sgd, learning_rate: 0.1, optim_args: args, ..settings() },
    ];
    let ends: Vec<_> = runs.into_iter().map(with).collect();
    for (n, end) in ends.iter().enumerate() {
        assert!(ends[..n].iter().all(|other| other != end), "run {n} is another's");
    }
}

/// The average of PyTorch's `AveragedModel` with `get_ema_multi_avg_fn(decay)`: the weights after the first update, then
/// `average + (1 − decay) · (weights − average)`.
#[test]
fn the_average_follows_its_formula_and_is_the_final_model() {
    let settings =
        |steps| Settings { max_steps: Some(steps), lr_scheduler_type: Scheduler::Constant, ..settings() };
    let floats =
        |bits: Vec<Vec<u32>>| -> Vec<f32> { bits.into_iter().flatten().map(f32::from_bits).collect() };
    let mut average: Vec<f32> = Vec::new();
    for steps in 1..=5 {
        let rows = rows(9, 3);
        let (_dir, out) = folder();
        let run = Extra { settings: settings(steps), build: &|arch| arch };
        let weights = floats(run.run(&rows, &out, Resume::No, None).1);
        match average.is_empty() {
            true => average = weights,
            false => {
                average.iter_mut().zip(&weights).for_each(|(average, w)| *average += 0.25 * (w - *average))
            }
        }
    }
    let averaged = Settings { ema_decay: Some(0.75), ..settings(5) };
    let ends = floats(with(averaged.clone()));
    let worst = ends.iter().zip(&average).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-6, "{worst}");
    // Evaluations are of the average, and so is a checkpoint of the model alone.
    let (rows, held_out) = (rows(9, 3), rows(5, 8));
    let (_dir, out) = folder();
    let only = Settings { save_only_model: true, ..averaged };
    let mut job = Job::new(&rows, only, &out).eval(&held_out);
    let mut model = job.model().unwrap();
    let report = job.run_with(&mut model).unwrap();
    let again = suasion_train::evaluate(&mut model, &held_out, 3, None, &mut |_| {}).unwrap();
    assert_eq!(report.after.unwrap().loss, again.loss);
    for name in ["model.safetensors", "checkpoint-5/model.safetensors"] {
        assert!(bytes(out.join(name)) == bytes(out.join("model.safetensors")), "{name}");
    }
    assert!(!out.join("checkpoint-5/average.safetensors").exists());
}

fn patterns(all: &[&str]) -> Patterns {
    Patterns(all.iter().map(|text| text.to_string()).collect())
}

#[test]
fn frozen_parameters_stay_and_groups_have_their_own_rates() {
    let rows = rows(9, 3);
    let names = architecture().parameter_names();
    let start = {
        let plan = Plan::new(&rows, &[], &settings()).unwrap();
        bits(&model(plan.budget))
    };
    let run = |settings: Settings| {
        let (_dir, out) = folder();
        let budget = Plan::new(&rows, &[], &settings).unwrap().budget;
        let trainable = settings.choose(&names).unwrap();
        let mut model = Model::with_trainable(architecture(), Device::cpu(), budget, &trainable).unwrap();
        model.init_random(7).unwrap();
        Job::new(&rows, settings, &out).run_with(&mut model).unwrap();
        bits(&model)
    };
    let changed = |end: &[Vec<u32>]| -> Vec<&str> {
        names.iter().enumerate().filter(|(n, _)| end[*n] != start[*n]).map(|(_, name)| &name[..]).collect()
    };
    let all = run(settings());
    assert_eq!(changed(&all).len(), names.len());
    let frozen = run(Settings { freeze: patterns(&["embed_tokens", "layers.0", "*norm*"]), ..settings() });
    let left = changed(&frozen);
    assert!(
        !left.is_empty()
            && left.iter().all(|name| {
                !name.contains("embed_tokens") && !name.contains("layers.0.") && !name.contains("norm")
            }),
        "{left:?}"
    );
    // A resume must train the same.
    let (_dir, out) = folder();
    let frozen = Settings { freeze: patterns(&["lm_head"]), save_strategy: Strategy::Steps, ..settings() };
    let run_in = |settings: &Settings, resume: Resume| {
        let budget = Plan::new(&rows, &[], settings).unwrap().budget;
        let trainable = settings.choose(&names).unwrap();
        let mut model = Model::with_trainable(architecture(), Device::cpu(), budget, &trainable).unwrap();
        model.init_random(7).unwrap();
        Job::new(&rows, settings.clone(), &out).resume(resume).run_with(&mut model)
    };
    run_in(&frozen, Resume::No).unwrap();
    let error = run_in(&settings(), Resume::Newest).unwrap_err();
    assert!(error.to_string().contains("freeze: was "), "{error}");
    // And a model that trains something else is no model for these settings.
    let (_dir, out) = folder();
    let error = Job::new(&rows, frozen, &out).run().unwrap_err();
    assert!(matches!(error, Error::Setting { key: "freeze", .. }), "{error}");
    let only = Settings {
        trainable: patterns(&["layers.[1-9].mlp.*_proj", "lm_head"]),
        freeze: patterns(&["down_proj"]),
        ..settings()
    };
    let expected =
        ["model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"];
    let mut left = changed(&run(only.clone()));
    left.sort_unstable();
    let mut sorted = expected;
    sorted.sort_unstable();
    assert_eq!(left, sorted);
    // A rate of 0 for a group is what freezing it is, where nothing decays; the first group that matches counts.
    let group = |text: &str, learning_rate: Option<f64>, weight_decay: Option<f64>| ParamGroup {
        patterns: patterns(&[text]),
        learning_rate,
        weight_decay,
    };
    let grouped = Settings {
        param_groups: vec![group("embed_tokens", Some(0.0), None), group("*", None, None)],
        ..settings()
    };
    assert!(grouped.validate(false).is_err(), "the second group says nothing");
    let grouped = Settings {
        param_groups: vec![group("embed_tokens", Some(0.0), None), group("embed_tokens", Some(1.0), None)],
        ..settings()
    };
    let left = changed(&run(grouped));
    assert_eq!(left.len(), names.len() - 1);
    assert!(!left.contains(&"model.embed_tokens.weight"));
    // The usual rate by name, and a decay that vectors have too.
    let usual =
        Settings { param_groups: vec![group("*", Some(settings().learning_rate), None)], ..settings() };
    assert!(run(usual) == all);
    let decayed = Settings { param_groups: vec![group("*", None, Some(0.1))], ..settings() };
    assert!(run(decayed) == run(Settings { weight_decay: 0.1, decay_all: true, ..settings() }));
}

#[test]
fn patterns_that_match_nothing_are_refused_with_the_nearest_name() {
    let names = architecture().parameter_names();
    let refuse = |settings: Settings, key: &str, words: &[&str]| match settings.choose(&names) {
        Err(Error::Setting { key: named, value, help, .. }) => {
            assert_eq!(named, key);
            let text = format!("{value} {help}");
            words.iter().for_each(|word| assert!(text.contains(word), "{text}"));
        }
        other => panic!("{key}: {other:?}"),
    };
    let d = Settings::default;
    refuse(
        Settings { freeze: patterns(&["embed_token"]), ..d() },
        "freeze",
        &["embed_token", "nearest name is embed_tokens"],
    );
    refuse(Settings { trainable: patterns(&["layers.7"]), ..d() }, "trainable", &["layers.7", "layers."]);
    refuse(Settings { freeze: patterns(&["layers.[0-"]), ..d() }, "freeze", &["layers.[0-"]);
    refuse(Settings { freeze: patterns(&["*"]), ..d() }, "freeze", &["freeze fewer"]);
    let of_frozen =
        ParamGroup { patterns: patterns(&["lm_head"]), learning_rate: Some(1.0), weight_decay: None };
    let settings = Settings { freeze: patterns(&["lm_head"]), param_groups: vec![of_frozen], ..d() };
    refuse(settings, "param_groups", &["lm_head"]);
    // Parts of names are whole: layers.1 is not layers.10, and norm is not layernorm.
    let long =
        ["model.layers.1.mlp.up_proj.weight", "model.layers.10.input_layernorm.weight"].map(String::from);
    let one = patterns(&["layers.1"]);
    assert!(one.matches(&long[0]) && !one.matches(&long[1]) && !patterns(&["norm"]).matches(&long[1]));
    assert!(patterns(&["weight"]).matches(&long[0]) && patterns(&[&long[0]]).matches(&long[0]));
}

#[test]
fn arguments_of_optimizers_are_checked() {
    let refused = |optim: Optim, args: &str| {
        let settings = Settings { optim, optim_args: Some(args.into()), ..Settings::default() };
        matches!(settings.validate(false), Err(Error::Setting { key: "optim_args", .. }))
    };
    assert!(refused(Optim::AdamwTorchFused, "momentum=0.9") && refused(Optim::Adafactor, "eps=1"));
    for args in ["momentum", "momentum=1", "momentum=-0.1", "nesterov=true", "momentum=x"] {
        assert!(refused(Optim::Sgd, args), "{args}");
    }
    assert!(!refused(Optim::Sgd, " momentum = 0.9 "));
    for name in ["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit", "adafactor", "sgd"] {
        serde_json::from_value::<Optim>(name.into()).unwrap();
    }
}
