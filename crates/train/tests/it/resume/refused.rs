//! What a resume refuses, by name.

use super::*;

#[test]
fn another_objective_is_refused_with_the_reason() {
    let (result, before, after) = resumed(|job| job.identity.objective = Objective::AllTokens);
    let error = result.unwrap_err();
    assert!(matches!(error, Error::ResumeObjective { .. }) && error.tag() == "E-RESUME" && error.is_usage());
    assert_eq!(before, after);

    // The other direction: the checkpoint has learned its prompts.
    let error = Error::ResumeObjective {
        dir: "checkpoint-4".into(),
        was: Objective::AllTokens,
        now: Objective::ResponseOnly,
    };
    assert!(
        error.to_string().contains("all tokens") && error.to_string().contains("responses only"),
        "{error}"
    );
    let help = error.help().unwrap();
    assert!(help.contains("learned its prompts") && help.contains("retrain from the base model"), "{help}");
}

#[test]
fn other_data_is_refused() {
    let (result, ..) = resumed(|job| job.identity.data_fingerprint = "f2".into());
    let error = result.unwrap_err();
    assert!(error.to_string().contains("fingerprint was f1, is f2"), "{error}");
    let (result, ..) = resumed(|job| job.identity.masking_version = 2);
    assert!(matches!(result.unwrap_err(), Error::ResumeData { .. }));
    // The count differs even if the fingerprint is made up.
    let (result, ..) = resumed(|job| job.train = &job.train[..6]);
    assert!(result.unwrap_err().to_string().contains("training rows was 7, is 6"));
}

#[test]
fn settings_that_change_the_result_are_refused_by_name() {
    let (result, ..) = resumed(|job| {
        job.settings.learning_rate = 1e-4;
        job.settings.data_seed = Some(1);
        job.settings.logging_steps = 5.into(); // changes no weight
    });
    let error = result.unwrap_err();
    let Error::ResumeSettings { differences, .. } = &error else { panic!("{error}") };
    assert_eq!(differences, &["learning_rate: was 0.003, is 0.0001", "data_seed: was 42, is 1"]);

    // Under a linear schedule every rate depends on the total; settings that change no weight may differ.
    let (result, ..) = resumed(|job| job.settings.max_steps = Some(6));
    assert!(matches!(result.unwrap_err(), Error::ResumeSettings { .. }));
    let (result, ..) = resumed(|job| {
        job.settings.gradient_checkpointing = true;
        job.settings.logging_steps = 3.into();
        job.settings.save_steps = 1.into();
    });
    result.unwrap();
}

#[test]
fn every_setting_that_the_steps_depend_on_is_refused_by_name() {
    let keys: Vec<&str> =
        KEYS.iter().filter(|key| key.on_resume == OnResume::Same).map(|key| key.name).collect();
    assert_eq!(keys.len(), 25, "{keys:?}");
    // Compared with the number of ranks: see `ranks`.
    let keys = [&keys[..], &["gradient_accumulation_steps"]].concat();
    // The values of the first are those of a schedule: see below. The others change the model: see `extras`.
    let elsewhere = ["lr_scheduler_kwargs", "trainable", "freeze"];
    for key in keys.into_iter().filter(|key| !elsewhere.contains(key)) {
        let (result, ..) = resumed(|job| {
            let mut settings = serde_json::to_value(&job.settings).unwrap();
            settings[key] = match &settings[key] {
                Value::String(_) if key == "optim" => "sgd".into(),
                Value::Null if key == "optim_args" => {
                    settings["optim"] = "sgd".into();
                    "momentum=0.5".into()
                }
                Value::Null => 0.5.into(),
                Value::Array(_) => serde_json::json!([{"match": "*", "weight_decay": 0.1}]),
                Value::Bool(on) => (!on).into(),
                Value::String(name) => if name == "cosine" { "linear" } else { "cosine" }.into(),
                Value::Number(number) if number.is_f64() => (number.as_f64().unwrap() / 2.0 + 0.1).into(),
                number => (number.as_u64().unwrap() + 1).into(),
            };
            job.settings = serde_json::from_value(settings).unwrap();
        });
        let error = result.unwrap_err();
        assert!(matches!(&error, Error::ResumeSettings { .. }), "{key}: {error}");
        assert!(error.to_string().contains(&format!("{key}: was ")), "{key}: {error}");
    }
}

#[test]
fn other_arguments_of_the_schedule_are_refused() {
    let (train, (_dir, out)) = (rows(7, 3), folder());
    let cosine = |kwargs: serde_json::Value| Settings {
        lr_scheduler_type: Scheduler::Cosine,
        lr_scheduler_kwargs: serde_json::from_value(kwargs).unwrap(),
        ..four_steps()
    };
    Job::new(&train, cosine(serde_json::json!({})), &out).run().unwrap();
    let other = cosine(serde_json::json!({"num_cycles": 1}));
    let error = Job::new(&train, other, &out).resume(Resume::Newest).run().unwrap_err();
    assert!(error.to_string().contains(r#"lr_scheduler_kwargs: was {}, is {"num_cycles":1}"#), "{error}");
}

#[test]
fn a_resume_needs_a_checkpoint() {
    let (train, (dir, out)) = (rows(4, 1), folder());
    let mut job = Job::new(&train, quick(), dir.path()).resume(Resume::Newest);
    let error = job.run().unwrap_err();
    assert!(matches!(error, Error::NoCheckpoint { .. }) && error.is_usage(), "{error}");
    std::fs::create_dir(dir.path().join("checkpoint-3")).unwrap();
    job.resume = Resume::From(dir.path().join("checkpoint-3"));
    let error = job.run().unwrap_err();
    assert!(error.to_string().contains("has no suasion_state.json"), "{error}");
    // A checkpoint folder of another program is not counted.
    std::fs::create_dir_all(out.join("checkpoint-1")).unwrap();
    let settings = Settings {
        max_steps: Some(3),
        save_strategy: Strategy::Steps,
        save_steps: 1.into(),
        save_total_limit: Some(1),
        ..quick()
    };
    let mut job = Job::new(&train, settings, &out);
    job.overwrite = true;
    // Step 1 replaces it, because a checkpoint folder holds nothing but its own files.
    job.run().unwrap();
    assert_eq!(checkpoints(&out), [3]);
}

#[test]
fn a_damaged_checkpoint_is_refused_by_file() {
    let (train, (_dir, out)) = (rows(7, 3), folder());
    Job::new(&train, four_steps(), &out).run().unwrap();
    let checkpoint = out.join("checkpoint-4");
    let refused = |expected: &str| {
        let from = Resume::From(checkpoint.clone());
        let error = Job::new(&train, four_steps(), &out).resume(from).run().unwrap_err();
        assert!(matches!(error, Error::Checkpoint { .. }) && error.to_string().contains(expected), "{error}");
    };
    let state = bytes(checkpoint.join("suasion_state.json"));
    let newer = String::from_utf8(state.clone()).unwrap().replace("\"format\": 2", "\"format\": 3");
    std::fs::write(checkpoint.join("suasion_state.json"), newer).unwrap();
    refused("format 3; this program reads format 2");
    std::fs::write(checkpoint.join("suasion_state.json"), &state[..state.len() / 2]).unwrap();
    refused("suasion_state.json: ");
    std::fs::write(checkpoint.join("suasion_state.json"), &state).unwrap();
    // A flipped bit anywhere: in the state, the weights, the moments, a file of the model.
    let written = suasion_train::checkpoint::read(&checkpoint).unwrap();
    for name in written.files.keys().map(String::as_str).chain(["suasion_state.json"]) {
        let whole = bytes(checkpoint.join(name));
        let mut flipped = whole.clone();
        let at = match name {
            // A digit of the state stays a digit: only the checksum can tell.
            "suasion_state.json" => {
                let text = String::from_utf8(whole.clone()).unwrap();
                text.find("\"targets\": ").unwrap() + "\"targets\": ".len()
            }
            _ => whole.len() / 2,
        };
        flipped[at] ^= 1;
        std::fs::write(checkpoint.join(name), flipped).unwrap();
        refused(&format!("{name} is damaged"));
        std::fs::write(checkpoint.join(name), whole).unwrap();
    }
    suasion_train::checkpoint::read(&checkpoint).unwrap();
    std::fs::remove_file(checkpoint.join("optimizer.safetensors")).unwrap();
    refused("optimizer.safetensors is missing");
}
