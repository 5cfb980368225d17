//! k steps, a resume and N − k steps give the bytes of N steps.

mod refused;

use crate::common::*;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use suasion_data::{Objective, Sample};
use suasion_engine::WeightType;
use suasion_train::settings::{KEYS, OnResume};
use suasion_train::{Error, Report, Result, Resume, Scheduler, Settings, Strategy};
use tempfile::TempDir;

/// 7 rows in batches of 2, two batches a step: 2 steps an epoch, so 9 steps cross four epochs' ends.
fn settings() -> Settings {
    Settings {
        gradient_accumulation_steps: 2,
        max_steps: Some(9),
        warmup_steps: 2.0,
        logging_steps: 2.into(),
        eval_strategy: Strategy::Steps,
        eval_steps: Some(3.into()),
        save_strategy: Strategy::Steps,
        save_steps: 4.into(),
        ..quick()
    }
}

/// A run of [`settings`] without an interruption.
struct Whole {
    train: Vec<Sample>,
    held_out: Vec<Sample>,
    dir: TempDir,
    whole: PathBuf,
}

impl Whole {
    fn run() -> Whole {
        let (train, held_out, (dir, whole)) = (rows(7, 3), rows(5, 8), folder());
        Job::new(&train, settings(), &whole).eval(&held_out).run().unwrap();
        Whole { train, held_out, dir, whole }
    }
}

/// `checkpoint-9` holds weights and moments; both runs must have left the same.
fn same(whole: &Path, parts: &Path) {
    for name in ["model.safetensors", "checkpoint-9/model.safetensors", "checkpoint-9/optimizer.safetensors"]
    {
        assert!(bytes(whole.join(name)) == bytes(parts.join(name)), "{name} differs");
    }
    assert_eq!(metrics(whole), metrics(parts));
    let state = |dir: &Path| {
        let mut state = json(dir.join("trainer_state.json"));
        state["best_model_checkpoint"] = serde_json::Value::Null; // a path
        state
    };
    assert_eq!(state(whole), state(parts));
}

#[test]
fn an_interrupted_run_resumes_to_the_same_bytes() {
    let Whole { train, held_out, dir, whole } = Whole::run();

    // After 1: in an epoch. After 2: at an epoch's end. After 3: an evaluation is due. After 4: a checkpoint
    // is.
    for k in [1, 2, 3, 4, 8] {
        let out = dir.path().join(format!("stopped-{k}"));
        let flag = AtomicBool::new(false);
        let mut job = Job::new(&train, settings(), &out).eval(&held_out).stop_after(k, &flag);
        let report = job.run().unwrap();
        assert!(report.interrupted && report.step == k, "{report:?}");
        assert_eq!(report.checkpoint.as_deref(), Some(out.join(format!("checkpoint-{k}")).as_path()));
        assert!(!out.join("model.safetensors").exists(), "an interrupted run has no final model");
        assert_eq!(job.listener.names.last().unwrap(), &format!("interrupted {k}"));

        let mut job = Job::new(&train, settings(), &out).eval(&held_out).resume(Resume::Newest);
        let report = job.run().unwrap();
        assert!(!report.interrupted);
        assert!(job.listener.heard(&format!("step {}", k + 1)) && !job.listener.heard(&format!("step {k}")));
        same(&whole, &out);
    }
}

/// Steps that a killed process took after its last checkpoint are computed again.
#[test]
fn a_killed_run_resumes_to_the_same_bytes() {
    let Whole { train, held_out, dir, whole } = Whole::run();

    let killed = dir.path().join("killed");
    std::fs::create_dir(&killed).unwrap();
    let copy = |name: &str| {
        std::fs::create_dir_all(killed.join(name)).unwrap();
        for entry in std::fs::read_dir(whole.join(name)).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), killed.join(name).join(entry.file_name())).unwrap();
        }
    };
    copy("checkpoint-4");
    // An incomplete newer checkpoint is skipped, and half a line of metrics does no harm.
    copy("checkpoint-8");
    std::fs::write(killed.join("checkpoint-8/model.safetensors"), b"half").unwrap();
    let mut lines = bytes(whole.join("metrics.jsonl"));
    lines.truncate(lines.len() - 40);
    std::fs::write(killed.join("metrics.jsonl"), lines).unwrap();
    std::fs::create_dir(killed.join(".suasion-tmp-1-checkpoint-8")).unwrap();

    let mut job = Job::new(&train, settings(), &killed).eval(&held_out).resume(Resume::Newest);
    job.run().unwrap();
    assert!(
        job.listener.warnings.iter().any(|w| w.contains("model.safetensors has 4 bytes")),
        "{:?}",
        job.listener.warnings
    );
    assert!(job.listener.heard("step 5") && !job.listener.heard("step 4"));
    assert!(!killed.join(".suasion-tmp-1-checkpoint-8").exists());
    same(&whole, &killed);

    // From a named checkpoint into a new folder; the last one was written after its evaluation.
    for step in [4, 9] {
        let elsewhere = dir.path().join(format!("elsewhere-{step}"));
        let from = Resume::From(whole.join(format!("checkpoint-{step}")));
        Job::new(&train, settings(), &elsewhere).eval(&held_out).resume(from).run().unwrap();
        assert_eq!(metrics(&whole), metrics(&elsewhere));
        if step == 4 {
            same(&whole, &elsewhere);
        }
    }
}

#[test]
fn stopping_before_the_first_step_resumes_too() {
    let Whole { train, held_out, dir, whole } = Whole::run();
    let (out, flag) = (dir.path().join("out"), AtomicBool::new(false));
    let report = Job::new(&train, settings(), &out).eval(&held_out).stop_after(0, &flag).run().unwrap();
    assert!(report.interrupted && report.step == 0 && report.before.is_none());
    Job::new(&train, settings(), &out).eval(&held_out).resume(Resume::Newest).run().unwrap();
    same(&whole, &out);
}

fn four_steps() -> Settings {
    Settings { max_steps: Some(4), eval_strategy: Strategy::No, ..settings() }
}

/// A run of 4 steps, then a resume of it as changed: its result, and the checkpoint's weights before and
/// after it.
fn resumed(change: impl FnOnce(&mut Job)) -> (Result<Report>, Vec<u8>, Vec<u8>) {
    let (train, (_dir, out)) = (rows(7, 3), folder());
    Job::new(&train, four_steps(), &out).run().unwrap();
    let before = bytes(out.join("checkpoint-4/model.safetensors"));
    let mut job = Job::new(&train, four_steps(), &out).resume(Resume::Newest);
    change(&mut job);
    let result = job.run();
    (result, before, bytes(out.join("checkpoint-4/model.safetensors")))
}

#[test]
fn a_constant_schedule_can_be_extended() {
    let (train, (dir, whole)) = (rows(7, 3), folder());
    let constant = |steps| Settings {
        max_steps: Some(steps),
        lr_scheduler_type: Scheduler::ConstantWithWarmup,
        eval_strategy: Strategy::No,
        ..settings()
    };
    let out = dir.path().join("out");
    Job::new(&train, constant(9), &whole).run().unwrap();
    Job::new(&train, constant(5), &out).run().unwrap();
    let mut job = Job::new(&train, constant(9), &out).resume(Resume::Newest);
    job.run().unwrap();
    for name in ["model.safetensors", "checkpoint-9/optimizer.safetensors"] {
        assert!(bytes(whole.join(name)) == bytes(out.join(name)), "{name} differs");
    }
    // Fewer steps than were made is not a continuation.
    job.settings.max_steps = Some(7);
    let error = job.run().unwrap_err();
    assert!(error.to_string().contains("the run has 7 steps, but 9 are finished"), "{error}");
}

/// No partial checkpoint is left, and the earlier ones stay.
#[test]
fn a_checkpoint_that_cannot_be_written_leaves_nothing() {
    let (train, (_dir, out)) = (rows(7, 3), folder());
    let settings = Settings { eval_strategy: Strategy::No, save_steps: 2.into(), ..settings() };
    Job::new(&train, settings.clone(), &out).stop_after(2, &AtomicBool::new(false)).run().unwrap();

    let mut job = Job::new(&train, settings, &out).resume(Resume::Newest);
    job.more_files = vec![("no/such/folder.json", b"{}".to_vec())];
    let error = job.run().unwrap_err();
    assert!(matches!(error, Error::Io { .. }) && error.tag() == "E-IO" && !error.is_usage(), "{error}");
    assert!(error.to_string().contains("folder.json"), "{error}");
    assert_eq!(checkpoints(&out), [2]);
    suasion_train::checkpoint::read(&out.join("checkpoint-2")).unwrap();
    let hidden = |name: std::ffi::OsString| name.to_string_lossy().starts_with('.');
    assert!(!std::fs::read_dir(&out).unwrap().any(|entry| hidden(entry.unwrap().file_name())));

    // Without the obstacle the run continues from there.
    job.more_files.clear();
    job.listener = Listener::default();
    job.run().unwrap();
    assert!(job.listener.heard("step 3") && !job.listener.heard("step 2"));
}

#[test]
fn the_final_model_has_the_type_of_its_base_and_checkpoints_are_f32() {
    let train = rows(7, 3);
    let dir = tempfile::tempdir().unwrap();
    let run = |out: &Path, resume: Resume, flag: Option<(u64, &AtomicBool)>| {
        let mut job = Job::new(&train, Settings { eval_strategy: Strategy::No, ..settings() }, out);
        job.resume = resume.clone();
        let plan = suasion_train::Plan::new(&train, &[], &job.settings).unwrap();
        let mut model = model(plan.budget);
        // What loading a base in bf16 leaves behind; a resume loads none.
        if let Resume::No = resume {
            model.set_weight_type(WeightType::BF16);
        }
        (job.listener.stop_after, job.stop) = (flag, flag.map_or(&NEVER, |(_, flag)| flag));
        job.run_with(&mut model).unwrap();
        bits(&model)
    };
    let config = |folder: &Path| -> serde_json::Value {
        serde_json::from_slice(&bytes(folder.join("config.json"))).unwrap()
    };
    let types = |folder: &Path| suasion_test_support::tensor_types(&folder.join("model.safetensors"));
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    let last = run(&whole, Resume::No, None);
    let flag = AtomicBool::new(false);
    run(&parts, Resume::No, Some((5, &flag)));
    let resumed = run(&parts, Resume::Newest, None);
    assert!(last == resumed, "the masters are the same to the bit");
    same(&whole, &parts);
    for out in [&whole, &parts] {
        assert_eq!((types(out), config(out)["dtype"].as_str()), (vec!["BF16".into()], Some("bfloat16")));
        let checkpoint = out.join("checkpoint-9");
        assert_eq!(types(&checkpoint), ["F32"]);
        assert_eq!(config(&checkpoint)["dtype"], "float32");
    }
}

#[test]
fn the_checkpoint_before_a_damaged_one_is_offered_or_taken() {
    let (train, (_dir, out)) = (rows(7, 3), folder());
    let settings = Settings { save_steps: 2.into(), ..four_steps() };
    Job::new(&train, settings.clone(), &out).run().unwrap();
    let weights = out.join("checkpoint-4/model.safetensors");
    let mut damaged = bytes(&weights);
    let last = damaged.len() - 1;
    damaged[last] ^= 4;
    std::fs::write(&weights, damaged).unwrap();
    let from = Resume::From(out.join("checkpoint-4"));
    let error = Job::new(&train, settings.clone(), &out).resume(from).run().unwrap_err();
    let help = error.help().unwrap();
    assert!(help.contains("--resume") && help.contains("checkpoint-2"), "{help}");
    // Where the run is named, the one before is taken, and the damaged one is named.
    let mut job = Job::new(&train, settings, &out).resume(Resume::From(out.clone()));
    job.run().unwrap();
    let told = |w: &String| w.contains("checkpoint-4: model.safetensors is damaged");
    assert!(job.listener.warnings.iter().any(told), "{:?}", job.listener.warnings);
    assert!(job.listener.heard("step 3") && !job.listener.heard("step 2"));
}

/// What a process leaves that is killed before its first checkpoint.
#[test]
fn a_run_without_a_checkpoint_starts_again() {
    let (train, (dir, out)) = (rows(7, 3), folder());
    let whole = dir.path().join("whole");
    Job::new(&train, four_steps(), &whole).run().unwrap();
    for name in ["suasion.yaml", "metrics.jsonl"] {
        let out = out.with_file_name(format!("killed-{name}"));
        std::fs::create_dir(&out).unwrap();
        std::fs::write(out.join(name), "").unwrap();
        let mut job = Job::new(&train, four_steps(), &out).resume(Resume::From(out.clone()));
        job.run().unwrap();
        assert!(
            job.listener.warnings.iter().any(|w| w.contains("it starts again")),
            "{:?}",
            job.listener.warnings
        );
        assert_eq!(bytes(whole.join("model.safetensors")), bytes(out.join("model.safetensors")));
    }
    // A finished run without checkpoints is not trained again by a resume.
    let settings = Settings { save_strategy: Strategy::No, ..four_steps() };
    Job::new(&train, settings.clone(), &out).run().unwrap();
    let error = Job::new(&train, settings, &out).resume(Resume::Newest).run().unwrap_err();
    assert!(matches!(error, Error::NoCheckpoint { .. }), "{error}");
}

#[test]
fn an_extended_run_goes_on_and_says_what_differs() {
    let (result, before, _) = resumed(|job| {
        job.extend = true;
        job.settings.max_steps = Some(8);
        job.settings.learning_rate = 1e-3;
        job.identity.data_fingerprint = "f2".into();
    });
    let report = result.unwrap();
    assert_eq!((report.step, report.steps.len()), (8, 5));
    let told = |what: &str| {
        report.warnings.iter().any(|w| w.contains("not an exact continuation") && w.contains(what))
    };
    for what in [
        "the data's fingerprint: was f1, is f2",
        "learning_rate: was 0.003, is 0.001",
        "total steps: was 4, is 8",
    ] {
        assert!(told(what), "{what}: {:?}", report.warnings);
    }
    // The rates of the steps after the fourth are those of the new schedule: (8 − step) / (8 − 2) of the peak.
    let record = report.steps.iter().find(|record| record.step == 6).unwrap();
    assert!((record.learning_rate - 1e-3 * 3.0 / 6.0).abs() < 1e-12, "{record:?}");
    drop(before);
    // Neither another objective nor fewer steps than are finished.
    let (result, ..) = resumed(|job| {
        job.extend = true;
        job.identity.objective = Objective::AllTokens;
    });
    assert!(matches!(result.unwrap_err(), Error::ResumeObjective { .. }));
    let (result, ..) = resumed(|job| {
        job.extend = true;
        job.settings.max_steps = Some(3);
    });
    assert!(result.unwrap_err().to_string().contains("the run has 3 steps, but 4 are finished"));
}

/// 4 steps of two batches of 2 are two epochs of 7 rows; batches of 7 then make one step an epoch.
#[test]
fn an_extended_run_goes_on_where_it_was_in_its_data() {
    let (train, (_dir, out)) = (rows(7, 3), folder());
    Job::new(&train, four_steps(), &out).run().unwrap();
    let longer = Settings {
        max_steps: None,
        num_train_epochs: 5.0,
        per_device_train_batch_size: 7,
        gradient_accumulation_steps: 1,
        ..four_steps()
    };
    let mut job = Job::new(&train, longer.clone(), &out).resume(Resume::Newest);
    job.extend = true;
    job.settings.save_steps = 1.into();
    let report = job.run().unwrap();
    // Three more epochs, a step each.
    assert_eq!((report.step, report.total_steps), (7, 7));
    assert!((report.epoch - 5.0).abs() < 1e-12, "{}", report.epoch);
    // Stopped in between, it is continued without a flag, to the same bytes.
    std::fs::remove_dir_all(out.join("checkpoint-7")).unwrap();
    let before = bytes(out.join("model.safetensors"));
    let mut again = Job::new(&train, longer, &out).resume(Resume::Newest);
    again.settings.save_steps = 1.into();
    assert_eq!(again.run().unwrap().step, 7);
    assert_eq!(before, bytes(out.join("model.safetensors")));
}
