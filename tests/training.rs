//! Schedules, early stopping, event files, exports and samples through the binary; and a short fault campaign.

use crate::util::{Dir, root};
use serde_json::json;
use std::process::Command;

const QUICK: [&str; 4] = ["init=random", "max_steps=4", "output_dir=out", "learning_rate=1e-2"];

/// The event file in a run's folder.
fn event_file(dir: &Dir, folder: &str) -> std::path::PathBuf {
    let mut files = std::fs::read_dir(dir.path(folder)).unwrap().map(|entry| entry.unwrap().path());
    let file = files.next().expect("an event file");
    assert!(file.file_name().unwrap().to_str().unwrap().starts_with("events.out.tfevents."), "{file:?}");
    assert!(files.next().is_none(), "one file");
    file
}

#[test]
fn a_configuration_of_a_schedule_and_of_shares_runs() {
    let dir = Dir::new().with_model().with_rows(8);
    dir.write(
        "run.yaml",
        "model_name_or_path: model\ndataset_name: rows.jsonl\ninit: random\noutput_dir: out\nmax_steps: 20\n\
         lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1, num_cycles: 0.5}\n\
         warmup_steps: 0.1\nlogging_steps: 0.25\nsave_steps: 0.5\neval_strategy: steps\neval_steps: 0.2\n\
         eval_fraction: 0.25\nearly_stopping_patience: 9\nload_best_model_at_end: true\n\
         metric_for_best_model: eval_mean_token_accuracy\nreport_to: wandb\nrun_name: ../../first try\n\
         eval_on_start: true\neval_accumulation_steps: 2\n",
    );
    dir.suasion(&["train", "run.yaml"]).ok().says("report_to: wandb is not contacted");
    let lines = dir.lines("out/metrics.jsonl");
    let steps: Vec<_> = lines.iter().filter(|l| l.get("loss").is_some()).map(|l| l["step"].clone()).collect();
    assert_eq!(steps, [1, 5, 10, 15, 20]);
    let last = lines.iter().rfind(|l| l.get("loss").is_some()).unwrap()["learning_rate"].as_f64().unwrap();
    assert!(last > 0.1 * 2e-5 && last < 0.12 * 2e-5, "{last}");
    assert!(dir.exists("out/checkpoint-10") && dir.exists("out/checkpoint-20"));
    // The name of a run must not lead outside its folder.
    event_file(&dir, "out/runs/.._.._first_try");

    let refused = |line: &str, text: &str| {
        let set = ["train", "run.yaml", "--set", "output_dir=other", "--set", line];
        dir.suasion(&set).run().error(2, "E-CONFIG", text);
    };
    refused("lr_scheduler_kwargs={power: 2}", "unknown field `power`");
    refused("lr_scheduler_type=warmup_stable_decay", "lr_scheduler_kwargs");
    refused("metric_for_best_model=bleu", "metric_for_best_model: bleu is not a metric");
    refused("save_steps=1.5", "save_steps");
    refused("report_to=tensorbord", "report_to");
    refused("save_strategy=no", "load_best_model_at_end");
}

/// As transformers 5's `AutoModelForCausalLM.from_config` creates them and `save_pretrained` writes them.
#[test]
fn a_model_from_random_weights_has_the_dtype_of_config_json() {
    let dir = Dir::new().with_model().with_rows(2);
    let config = dir.json("model/config.json");
    for (key, name, stored) in
        [("dtype", None, "F32"), ("dtype", Some("bfloat16"), "BF16"), ("torch_dtype", Some("float16"), "F16")]
    {
        let mut config = config.clone();
        config.as_object_mut().unwrap().remove("dtype");
        if let Some(name) = name {
            config[key] = name.into();
        }
        dir.write("model/config.json", config.to_string());
        let out = format!("output_dir={stored}");
        dir.train("rows.jsonl")
            .set(&["init=random", "max_steps=1", "save_steps=1", &out])
            .arg("--quiet")
            .ok();
        let types = |file: &str| suasion_test_support::tensor_types(&dir.path(&format!("{stored}/{file}")));
        assert_eq!(types("model.safetensors"), [stored]);
        assert_eq!(types("checkpoint-1/model.safetensors"), ["F32"]);
        if let Some(name) = name {
            assert_eq!(dir.json(&format!("{stored}/config.json"))[key], name);
            assert_eq!(dir.json(&format!("{stored}/checkpoint-1/config.json"))[key], "float32");
        }
    }
}

/// TensorBoard's own reader, if it is installed.
#[test]
fn tensorboard_opens_the_event_files() {
    let dir = Dir::new().with_model().with_rows(8);
    let settings = ["eval_fraction=0.25", "num_samples=1", "sample_max_new_tokens=4", "save_steps=2"];
    dir.train("rows.jsonl").set(&QUICK).set(&settings).ok();
    event_file(&dir, "out/runs/suasion");
    // A resumed run writes a new file, and TensorBoard drops the steps of the other file that it repeats.
    std::fs::remove_dir_all(dir.path("out/checkpoint-4")).unwrap();
    dir.suasion(&["train", "--resume", "out"]).ok();
    let lines = dir.lines("out/metrics.jsonl");
    let samples = lines.iter().find(|line| line.get("eval_loss").is_some()).unwrap()["eval_samples"].clone();
    assert_eq!(samples.as_array().unwrap().len(), 1);
    assert!(samples[0]["prompt"].as_str().unwrap().contains("[TASK]"), "{samples}");
    // A run that replaces the folder leaves no event file of the previous run.
    let Some(python) = std::env::var_os("SUASION_TENSORBOARD_PYTHON") else {
        suasion_test_support::skipped("no Python with TensorBoard (SUASION_TENSORBOARD_PYTHON)");
        dir.train("rows.jsonl").set(&QUICK).set(&["overwrite_output_dir=true", "report_to=none"]).ok();
        assert!(!dir.exists("out/runs"));
        return;
    };
    let script = "import sys, json\n\
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n\
        events = EventAccumulator(sys.argv[1], purge_orphaned_data=True).Reload()\n\
        tags = events.Tags()\n\
        scalars = {tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in tags['scalars']}\n\
        print(json.dumps({'scalars': scalars, 'tensors': tags['tensors']}))\n";
    let ran = Command::new(python).args(["-c", script]).arg(dir.path("out/runs/suasion")).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let read: serde_json::Value = serde_json::from_slice(&ran.stdout).unwrap();
    let all = |key: &str| -> Vec<(u64, f64)> {
        let lines = lines.iter().filter(|line| line.get(key).is_some_and(|value| value.is_number()));
        lines.map(|line| (line["step"].as_u64().unwrap(), line[key].as_f64().unwrap())).collect()
    };
    for (tag, key) in [
        ("train/loss", "loss"),
        ("train/learning_rate", "learning_rate"),
        ("train/grad_norm", "grad_norm"),
        ("train/entropy", "entropy"),
        ("eval/loss", "eval_loss"),
        ("eval/mean_token_accuracy", "eval_mean_token_accuracy"),
    ] {
        let got: Vec<(u64, f64)> = serde_json::from_value(read["scalars"][tag].clone()).unwrap();
        let ours = all(key);
        assert_eq!(got.len(), ours.len(), "{tag}: {got:?} and {ours:?}");
        for ((step, value), (our_step, our_value)) in got.iter().zip(&ours) {
            assert!(step == our_step && *value as f32 == *our_value as f32, "{tag}: {got:?} and {ours:?}");
        }
    }
    assert!(read["scalars"].get("eval_sections/response").is_some(), "{read}");
    assert!(
        read["tensors"].as_array().unwrap().iter().any(|tag| tag.as_str().unwrap().contains("eval_samples"))
    );
}

#[test]
fn replies_do_not_depend_on_the_batch_and_end_where_they_are_told() {
    let dir = Dir::new().with_weights().with_rows(7);
    let generate = |more: &[&str]| {
        let base = ["generate", "-M", "model", "-D", "rows.jsonl", "--json", "--max-new-tokens", "12"];
        dir.suasion(&base).args(more).ok().stdout
    };
    let alone = generate(&["--temperature", "1.2"]);
    assert_eq!(alone.lines().count(), 7);
    for size in ["2", "3", "16"] {
        assert_eq!(generate(&["--temperature", "1.2", "--batch-size", size]), alone, "{size} at once");
    }
    // Only row 3 has the same text: each row has its own random stream.
    let line = |text: &str, row: usize| -> serde_json::Value {
        serde_json::from_str(text.lines().nth(row).unwrap()).unwrap()
    };
    let replies: std::collections::BTreeSet<String> = alone
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["ids"].to_string())
        .collect();
    assert!(replies.len() > 1, "{alone}");

    // A stop string ends the free text; up to there the text is the same.
    let free = line(&generate(&[]), 0);
    let text = free["reply"].as_str().unwrap();
    let chars: Vec<char> = text.chars().collect();
    let stop: String = chars[chars.len() / 2..].iter().take(3).collect();
    let cut = line(&generate(&["--stop-strings", &stop]), 0);
    assert_eq!(cut["stopped"], "stop_string", "{stop:?} in {text:?}");
    let reply = cut["reply"].as_str().unwrap();
    // As in transformers, the stop string may begin in the prompt.
    let whole = format!("{}{reply}", cut["prompt"].as_str().unwrap());
    assert!(text.starts_with(reply) && whole.ends_with(&stop), "{whole:?}");

    // Settings of generation_config.json apply unless a flag overrides them.
    let config = json!({"do_sample": true, "temperature": 1.2, "num_beams": 4, "repetition_penalty": 1.0});
    dir.write("model/generation_config.json", config.to_string());
    assert_eq!(generate(&[]), alone);
    assert_eq!(line(&generate(&["--greedy"]), 0)["ids"], free["ids"]);
    dir.suasion(&["generate", "-M", "model", "-p", "Tea", "--max-new-tokens", "2"])
        .ok()
        .says("sampling as generation_config.json says")
        .says("num_beams=4 is not applied");
    dir.suasion(&["generate", "-M", "model", "-p", "Tea", "--repetition-penalty", "0"]).run().error(
        2,
        "E-CONFIG",
        "repetition_penalty",
    );
}

#[test]
fn a_finished_model_has_a_modelfile_and_its_prompts() {
    let dir = Dir::new().with_model().with_rows(4);
    let chatml = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}\
                  <|assistant|>{% endif %}";
    dir.write("model/chat_template.jinja", chatml);
    dir.train("rows.jsonl").set(&QUICK).ok();
    let modelfile = dir.text("out/Modelfile");
    assert!(
        modelfile.starts_with("# Written by suasion.") && modelfile.contains("\nFROM .\n"),
        "{modelfile}"
    );
    assert!(modelfile.contains("{{ else if eq .Role \"user\" }}<|user|>{{ .Content }}</s>"), "{modelfile}");
    assert!(modelfile.contains("PARAMETER stop \""), "{modelfile}");
    let prompts = dir.json("out/prompt_check.json");
    assert_eq!(prompts[0]["text"], "<|user|>Buses are slow.</s><|assistant|>");
    assert!(prompts[0]["ids"].as_array().unwrap().len() > 3);
    // A Modelfile that the run did not write is kept.
    dir.write("out/Modelfile", "FROM elsewhere\n");
    dir.train("rows.jsonl").set(&QUICK).set(&["overwrite_output_dir=true"]).ok();
    assert_eq!(dir.text("out/Modelfile"), "FROM elsewhere\n");
}

/// A short version of the campaign in docs/reliability.md: kills, damaged inputs of every kind, clock jumps.
#[test]
fn a_slice_of_the_fault_campaign_finds_nothing() {
    let script = root().join("tests/faults/campaign.py");
    let mut command = Command::new("python3");
    command.arg(script).args([
        "--binary",
        env!("CARGO_BIN_EXE_suasion"),
        "kills=3",
        "disks=0",
        "inputs=56",
        "clocks=2",
    ]);
    let Ok(ran) = command.output() else {
        suasion_test_support::skipped("no python3");
        return;
    };
    let out = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success(), "{out}\n{}", String::from_utf8_lossy(&ran.stderr));
    let counts: serde_json::Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    assert!(
        counts["kills"].as_u64() == Some(3)
            && counts["clocks"].as_u64() == Some(2)
            && counts["findings"] == 0,
        "{counts}"
    );
}
