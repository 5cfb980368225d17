use super::*;
use crate::failure::Failure;
use suasion_data::{Format, Objective, Supervise};

fn set(assignments: &[&str]) -> Result<Config, String> {
    let owned: Vec<String> = assignments.iter().map(|s| s.to_string()).collect();
    let loaded = Loaded::new(None, &owned).map_err(|e| {
        let failure = e.downcast_ref::<Failure>().expect("a failure");
        assert_eq!(failure.exit, crate::failure::Exit::Usage);
        format!("{} | {}", failure.message, failure.help.as_deref().unwrap_or(""))
    })?;
    Ok(loaded.config)
}

#[test]
fn assignments_reach_typed_fields() {
    let config = set(&[
        "learning_rate=1e-3",
        "max_length=null",
        "loss_weights.system=0.1",
        "section_markers.TASK=[ASK]",
        "eval_strategy=no",
        "stop_tokens=[<|a|>, '<|b|>']",
        "completion_only_loss=False",
    ])
    .unwrap();
    assert_eq!(config.train.learning_rate, 1e-3);
    assert_eq!(config.data.max_length, None);
    assert_eq!(config.data.loss_weights["system"], 0.1);
    assert_eq!(config.data.section_markers["TASK"], "[ASK]");
    assert_eq!(config.data.section_markers["SYSTEM"], "[SYSTEM]");
    assert_eq!(config.data.stop_tokens, ["<|a|>", "<|b|>"]);
    assert_eq!(config.policy().objective, Objective::AllTokens);
}

#[test]
fn typos_name_the_nearest_key() {
    let error = set(&["learning_rat=1"]).unwrap_err();
    assert!(error.contains("unknown key \"learning_rat\""), "{error}");
    assert!(error.contains("did you mean \"learning_rate\""), "{error}");
    assert!(set(&["zzzz=1"]).unwrap_err().contains("lists every key"));
}

#[test]
fn wrong_values_list_what_is_accepted() {
    let error = set(&["truncation_mode=keep_middle"]).unwrap_err();
    assert!(error.contains("keep_response, keep_start, keep_end, drop, error"), "{error}");
    assert!(set(&["per_device_train_batch_size=0"]).unwrap_err().contains("at least 1"));
    assert!(set(&["adam_beta1=1"]).unwrap_err().contains("below 1"));
    // The training loop's bounds, and the command line's own for -1.
    assert!(set(&["warmup_steps=2.5"]).unwrap_err().contains("a whole number, or a share below 1"));
    assert!(set(&["max_steps=0"]).unwrap_err().contains("at least 1, or -1"));
    assert_eq!(set(&["max_steps=-1", "warmup_steps=0.25"]).unwrap().settings().warmup_steps, 0.25);
    assert!(set(&["loss_weights.sytem=1"]).unwrap_err().contains("system, context"));
    assert!(set(&["seed.x=1"]).unwrap_err().contains("expected"));
}

#[test]
fn known_keys_are_refused_by_name_and_accepted_where_inert() {
    assert!(set(&["packing=false", "bf16=false", "use_peft=false", "report_to=none"]).is_ok());
    for key in ["bf16=true", "use_peft=true", "report_to=wandb", "neftune_noise_alpha=5"] {
        let error = set(&[key]).unwrap_err();
        let name = key.split('=').next().unwrap();
        assert!(error.contains(&format!("{name} is not supported")), "{error}");
    }
    assert!(set(&["chat_template_path=x.jinja"]).unwrap_err().contains("chat_template.jinja"));
}

#[test]
fn conversations_have_their_keys() {
    let config = set(&[
        "format=sharegpt",
        "supervise=per-message",
        "template_date=2024-02-29",
        "template_kwargs.enable_thinking=false",
        "template_kwargs.persona=a pirate",
        "assistant_only_loss=true",
    ])
    .unwrap();
    let policy = config.policy();
    assert_eq!((policy.format, policy.supervise), (Format::Sharegpt, Supervise::PerMessage));
    assert_eq!(policy.template_date.as_deref(), Some("2024-02-29"));
    assert_eq!(policy.template_kwargs["enable_thinking"], false);
    assert_eq!(policy.template_kwargs["persona"], "a pirate");
    for name in ["auto", "input_full", "prompt_completion", "messages", "alpaca", "segments", "preference"] {
        assert_eq!(set(&[&format!("format={name}")]).unwrap().to_json()["format"], name);
    }
    for date in ["2024-2-29", "2023-02-29", "2024-13-01", "yesterday", "2024-00-10", "20240229", "0000-01-01"]
    {
        assert!(set(&[&format!("template_date={date}")]).unwrap_err().contains("YYYY-MM-DD"), "{date}");
    }
    assert!(set(&["supervise=first"]).unwrap_err().contains("all, last, per-message"));
    let both = Loaded::new(None, &["assistant_only_loss=true".into(), "completion_only_loss=false".into()]);
    assert!(both.unwrap().config.check().is_err());
    let off = Loaded::new(None, &["assistant_only_loss=false".into()]).unwrap();
    assert_eq!(off.notes.len(), 1);
}

#[test]
fn packs_have_their_keys() {
    let config = set(&["packing=true", "packing_strategy=bfd", "share_prefix=true"]).unwrap();
    assert!(config.policy().packing && config.policy().share_prefix);
    for strategy in ["wrapped", "bfd_split"] {
        let error = set(&[&format!("packing_strategy={strategy}")]).unwrap_err();
        assert!(error.contains("expected one of: bfd, which cuts no row (TRL's wrapped"), "{error}");
        assert!(error.contains(&format!("found {strategy:?}")), "{error}");
    }
    let check = |keys: &[&str]| {
        let keys: Vec<String> = keys.iter().map(|key| key.to_string()).collect();
        Loaded::new(None, &keys).unwrap().config.check()
    };
    assert!(check(&["packing=true", "share_prefix=true"]).is_ok());
    assert!(check(&["share_prefix=true"]).unwrap_err().to_string().contains("without packing"));
    assert!(check(&["packing=true", "max_length=null"]).unwrap_err().to_string().contains("needs a size"));
    let noted = Loaded::new(None, &["eval_packing=true".into()]).unwrap().notes;
    assert!(noted[0].contains("eval_packing changes nothing"), "{noted:?}");
}

#[test]
fn names_are_unique_and_documented() {
    let mut names: Vec<_> = KEYS.iter().map(|k| k.name).chain(known::KNOWN.iter().map(|k| k.name)).collect();
    names.sort_unstable();
    let before = names.len();
    names.dedup();
    assert_eq!(names.len(), before);
    assert!(KEYS.iter().all(|key| !key.doc.is_empty() && !(key.expected)().is_empty()));
}

#[test]
fn yaml_reads_back_to_the_same_tree() {
    let config = set(&[
        "max_length=None",
        "loss_weights.task=0.3",
        "prompt_loss_weight=0.1",
        "completion_only_loss=null",
        "output_dir=a: b",
        "seed=18446744073709551615",
        "template_kwargs.names=[a, '1']",
        "template_date=2025-01-15",
    ])
    .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("saved.yaml");
    std::fs::write(&path, config.to_yaml()).unwrap();
    assert_eq!(Loaded::new(Some(&path), &[]).unwrap().config, config);
    assert!(
        config.to_yaml().contains("\nprompt_loss_weight: 0.1\nloss_weights: {\"task\":0.3}\n"),
        "{}",
        config.to_yaml()
    );
    assert!(config.to_yaml().contains("\ncompletion_only_loss: true\n"));
    assert_eq!(config.policy().prompt_loss_weight, 0.1);
}

#[test]
fn files_name_the_line_and_yield_to_assignments() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.yaml");
    std::fs::write(&path, "seed: 7\nlearning_rate: 1e-4\nmax_lenght: 8\n").unwrap();
    let error = Loaded::new(Some(&path), &[]).unwrap_err();
    assert!(error.to_string().contains("run.yaml:3: unknown key \"max_lenght\""), "{error}");

    std::fs::write(&path, "seed: 7\nsection_markers:\n  TASK: \"[ASK]\"\n").unwrap();
    let loaded = Loaded::new(Some(&path), &["seed=8".into()]).unwrap();
    assert_eq!((loaded.config.train.seed, loaded.config.data.section_markers["TASK"].as_str()), (8, "[ASK]"));
    assert_eq!(loaded.config.data.section_markers.len(), 4);

    let toml = folder.path().join("run.toml");
    std::fs::write(&toml, "seed = 7\nmax_length = 16\n[loss_weights]\nsystem = 0.5\n").unwrap();
    let loaded = Loaded::new(Some(&toml), &[]).unwrap();
    assert_eq!((loaded.config.data.max_length, loaded.config.data.loss_weights["system"]), (Some(16), 0.5));

    std::fs::write(&toml, "seed = \n").unwrap();
    let error = Loaded::new(Some(&toml), &[]).unwrap_err();
    assert!(error.to_string().contains("run.toml:1:"), "{error}");
}
