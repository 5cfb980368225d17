use super::*;
use crate::failure::{Failure, Failures};
use suasion_data::{Format, Objective, Supervise};

fn load(file: Option<&std::path::Path>, assignments: &[String]) -> anyhow::Result<Loaded> {
    let mut loaded = Loaded::over(Config::default(), file, assignments, &[]);
    Failures::none(std::mem::take(&mut loaded.errors))?;
    Ok(loaded)
}

fn set(assignments: &[&str]) -> Result<Config, String> {
    let owned: Vec<String> = assignments.iter().map(|s| s.to_string()).collect();
    let loaded = load(None, &owned).map_err(|e| {
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
        "section_markers={TASK: '[ASK]'}",
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
    assert!(!set(&["gewicht=1"]).unwrap_err().contains("did you mean"));
}

#[test]
fn wrong_values_list_what_is_accepted() {
    let error = set(&["truncation_mode=keep_middle"]).unwrap_err();
    assert!(error.contains("keep_response, keep_start, keep_end, drop, error"), "{error}");
    assert!(set(&["per_device_train_batch_size=0"]).unwrap_err().contains("at least 1"));
    assert!(set(&["adam_beta1=1"]).unwrap_err().contains("below 1"));
    // The training loop's bounds, and the command line's own for -1.
    assert!(set(&["warmup_steps=2.5"]).unwrap_err().contains("at least 0, and whole or below 1"));
    assert!(set(&["max_steps=0"]).unwrap_err().contains("at least 1, or -1"));
    assert_eq!(set(&["max_steps=-1", "warmup_steps=0.25"]).unwrap().settings().warmup_steps, 0.25);
    assert!(set(&["loss_weights.sytem=1"]).unwrap_err().contains("system, context"));
    assert!(set(&["seed.x=1"]).unwrap_err().contains("expected"));
}

#[test]
fn known_keys_are_refused_by_name_and_accepted_where_inert() {
    assert!(set(&["packing=false", "bf16=false", "use_peft=false", "report_to=none"]).is_ok());
    for key in ["bf16=true", "bnb_4bit_quant_type=fp4", "lora_bias=all", "torch_compile=true"] {
        let error = set(&[key]).unwrap_err();
        let name = key.split('=').next().unwrap();
        assert!(error.contains(&format!("{name} is not supported")), "{error}");
    }
    assert!(set(&["loss_type=dft"]).unwrap_err().contains("mean negative log-likelihood"));
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
    let both = load(None, &["assistant_only_loss=true".into(), "completion_only_loss=false".into()]);
    assert!(!both.unwrap().config.problems().is_empty());
    let off = load(None, &["assistant_only_loss=false".into()]).unwrap();
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
        Failures::none(load(None, &keys).unwrap().config.problems())
    };
    assert!(check(&["packing=true", "share_prefix=true"]).is_ok());
    assert!(check(&["share_prefix=true"]).unwrap_err().to_string().contains("without packing"));
    assert!(check(&["packing=true", "max_length=null"]).unwrap_err().to_string().contains("needs a size"));
    let noted = load(None, &["eval_packing=true".into()]).unwrap().notes;
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
    assert_eq!(load(Some(&path), &[]).unwrap().config, config);
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
    let error = load(Some(&path), &[]).unwrap_err();
    assert!(error.to_string().contains("run.yaml:3: unknown key \"max_lenght\""), "{error}");

    std::fs::write(&path, "seed: 7\nsection_markers:\n  TASK: \"[ASK]\"\n").unwrap();
    let loaded = load(Some(&path), &["seed=8".into()]).unwrap();
    assert_eq!((loaded.config.train.seed, loaded.config.data.section_markers["TASK"].as_str()), (8, "[ASK]"));
    assert_eq!(loaded.config.data.section_markers.len(), 4);

    let toml = folder.path().join("run.toml");
    std::fs::write(&toml, "seed = 7\nmax_length = 16\n[loss_weights]\nsystem = 0.5\n").unwrap();
    let loaded = load(Some(&toml), &[]).unwrap();
    assert_eq!((loaded.config.data.max_length, loaded.config.data.loss_weights["system"]), (Some(16), 0.5));

    std::fs::write(&toml, "seed = \n").unwrap();
    let error = load(Some(&toml), &[]).unwrap_err();
    assert!(error.to_string().contains("run.toml:1:"), "{error}");
}

/// Every key of TRL 1.16's SFTConfig with its default, as `dataclasses.fields` gives them.
const TRL: &str = include_str!("trl_defaults.yaml");

#[test]
fn every_key_of_trl_is_accepted_at_its_default() {
    let defaults: serde_json::Map<String, serde_json::Value> = serde_saphyr::from_str(TRL).unwrap();
    assert_eq!(defaults.len(), 135);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trl.yaml");
    std::fs::write(&path, TRL).unwrap();
    let loaded = Loaded::over(Config::default(), Some(&path), &[], &[]).checked().unwrap();
    // The one default that means something else here.
    assert!(loaded.notes.iter().all(|note| note.contains("assistant_only_loss")), "{:?}", loaded.notes);
    assert_eq!(loaded.config.output_dir, std::path::Path::new("trainer_output"));
    for (name, value) in &defaults {
        if let Some(key) = known::find(name) {
            assert!(key.is_default(value), "{name}: TRL has {value}, the table {}", key.default);
        } else {
            assert!(KEYS.iter().any(|key| key.name == name), "{name}");
        }
    }
}

#[test]
fn keys_of_other_trainers_are_answered_with_ours() {
    for (assignment, answer, help) in [
        (
            "micro_batch_size=4",
            "axolotl's micro_batch_size is per_device_train_batch_size here",
            "write per_device_train_batch_size: 4",
        ),
        ("cutoff_len=2048", "LLaMA-Factory's cutoff_len is max_length here", "write max_length: 2048"),
        (
            "batch_size=2",
            "mlx-lm's batch_size is per_device_train_batch_size here",
            "write per_device_train_batch_size: 2",
        ),
        ("max_seq_length=512", "older TRL's max_seq_length is max_length here", "write max_length: 512"),
        (
            "train_on_inputs=false",
            "axolotl's train_on_inputs is completion_only_loss here",
            "completion_only_loss: true (the opposite",
        ),
        (
            "mask_prompt=true",
            "mlx-lm's mask_prompt is completion_only_loss here",
            "write completion_only_loss: true",
        ),
        ("lr=1e-4", "lr is learning_rate here", "write learning_rate: "),
        (
            "base_model=Qwen/Qwen3-0.6B",
            "axolotl's base_model is model_name_or_path here",
            "write model_name_or_path: Qwen/Qwen3-0.6B",
        ),
        ("val_set_size=0.05", "eval_fraction", "a share of the rows"),
        ("lora_rank=8", "LLaMA-Factory's lora_rank is lora_r here", "write lora_r: 8"),
    ] {
        let error = set(&[assignment]).unwrap_err();
        assert!(error.contains(answer) && error.contains(help), "{assignment}: {error}");
    }
    for synonym in synonyms::SYNONYMS {
        let supported = KEYS.iter().any(|key| key.name == synonym.ours);
        assert!(supported || known::find(synonym.ours).is_some(), "{} is nothing here", synonym.ours);
        assert!(KEYS.iter().all(|key| key.name != synonym.theirs), "{}", synonym.theirs);
        assert!(known::find(synonym.theirs).is_none(), "{}", synonym.theirs);
    }
}

#[test]
fn every_error_is_found_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.yaml");
    std::fs::write(
        &path,
        "lr: 1e-4\nseed: -1\nmax_lenght: 8\nbf16: true\npacking: true\nshare_prefix: true\n",
    )
    .unwrap();
    let assignments = ["max_length=null".to_string(), "adam_beta1=2".into(), "seed".into()];
    let mut loaded = Loaded::over(Config::default(), Some(&path), &assignments, &[]);
    let problems: Vec<String> = loaded.problems().into_iter().map(|failure| failure.message).collect();
    for part in [
        "run.yaml:1: lr is",
        "run.yaml:2: seed: expected",
        "run.yaml:3: unknown key",
        "run.yaml:4: bf16",
        "adam_beta1: expected a number, at least 0 and below 1; found \"2\"",
        "--set seed: expected key=value",
        "a pack needs a size",
    ] {
        assert!(problems.iter().any(|problem| problem.contains(part)), "{part}: {problems:#?}");
    }
    assert_eq!(problems.len(), 7, "{problems:#?}");
    // What contradicts a key that could not be read is not an error of its own.
    let mut loaded = load_all(&["packing=maybe", "share_prefix=true"]);
    assert_eq!(loaded.problems().len(), 1);
}

fn load_all(assignments: &[&str]) -> Loaded {
    let assignments: Vec<String> = assignments.iter().map(|text| text.to_string()).collect();
    Loaded::over(Config::default(), None, &assignments, &[])
}

#[test]
fn examples_are_values_of_their_keys_and_not_the_defaults() {
    for key in KEYS {
        let config = set(&[&format!("{}={}", key.name, key.example)]).unwrap_or_else(|e| panic!("{e}"));
        // packing_strategy has one value only.
        assert!(
            (key.get)(&config) != (key.get)(&Config::default()) || key.name == "packing_strategy",
            "{}",
            key.name
        );
    }
    let error = set(&["learning_rate=-1"]).unwrap_err();
    assert!(error.contains("give a number, at least 0; for example learning_rate: 1e-4"), "{error}");
}

#[test]
fn groups_are_complete_and_in_the_tables_order() {
    let position = |group| table::Group::ALL.iter().position(|known| *known == group).expect("a group");
    assert!(KEYS.windows(2).all(|two| position(two[0].group) <= position(two[1].group)));
}

/// Checks a value against the keywords that the schema uses; any other keyword is a bug of this test.
fn valid(schema: &serde_json::Value, value: &serde_json::Value) -> bool {
    use serde_json::Value as Json;
    let is = |name: &str| match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("type {other}"),
    };
    let Json::Object(keywords) = schema else { return schema == true };
    keywords.iter().all(|(keyword, operand)| match keyword.as_str() {
        "$schema" | "title" | "description" | "default" | "format" | "properties" | "patternProperties" => {
            true
        }
        "type" => match operand {
            Json::Array(names) => names.iter().any(|name| is(name.as_str().unwrap())),
            name => is(name.as_str().unwrap()),
        },
        // 0 and 0.0 are one number.
        "enum" => operand
            .as_array()
            .unwrap()
            .iter()
            .any(|allowed| allowed == value || (value.is_number() && allowed.as_f64() == value.as_f64())),
        "const" => value.as_f64() == operand.as_f64(),
        "anyOf" => operand.as_array().unwrap().iter().any(|schema| valid(schema, value)),
        "minimum" => value.as_f64().is_none_or(|n| n >= operand.as_f64().unwrap()),
        "maximum" => value.as_f64().is_none_or(|n| n <= operand.as_f64().unwrap()),
        "exclusiveMinimum" => value.as_f64().is_none_or(|n| n > operand.as_f64().unwrap()),
        "exclusiveMaximum" => value.as_f64().is_none_or(|n| n < operand.as_f64().unwrap()),
        "minLength" => value.as_str().is_none_or(|text| !text.is_empty()),
        "minItems" => value.as_array().is_none_or(|items| !items.is_empty()),
        "required" => value.as_object().is_none_or(|map| {
            operand.as_array().unwrap().iter().all(|name| map.contains_key(name.as_str().unwrap()))
        }),
        "items" => value.as_array().is_none_or(|items| items.iter().all(|item| valid(operand, item))),
        "pattern" => value.as_str().is_none_or(|text| {
            fancy_regex::Regex::new(operand.as_str().unwrap()).unwrap().is_match(text).unwrap()
        }),
        "additionalProperties" => value.as_object().is_none_or(|map| {
            map.iter().all(|(name, value)| {
                let own = keywords.get("properties").and_then(|properties| properties.get(name));
                let dotted = keywords.get("patternProperties").and_then(|patterns| {
                    let (head, _) = name.split_once('.')?;
                    patterns
                        .as_object()?
                        .iter()
                        .find(|(pattern, _)| pattern.starts_with(&format!("^{head}\\.")))
                });
                valid(own.or(dotted.map(|(_, schema)| schema)).unwrap_or(operand), value)
            })
        }),
        other => panic!("keyword {other}"),
    })
}

#[test]
fn the_schema_accepts_sample_configurations_and_refuses_wrong_ones() {
    let schema = docs::schema();
    let accepts = |yaml: &str| valid(&schema, &serde_saphyr::from_str::<serde_json::Value>(yaml).unwrap());
    let resolved =
        set(&["dataset_name=[a.jsonl, b.csv]", "loss_weights.task=0.3", "stop_tokens=[<|im_end|>]"]).unwrap();
    assert!(accepts(&resolved.to_yaml()) && accepts(&Config::default().to_yaml()));
    assert!(accepts("learning_rate: 1e-4\nnum_train_epochs: 2\neval_strategy: steps\nmax_length: null\n"));
    assert!(accepts(
        "loss_weights.system: 0.1\nsection_markers: {TASK: '[ASK]'}\ntemplate_kwargs: {a: [1]}\n"
    ));
    for wrong in [
        "learning_rat: 1",
        "learning_rate: fast",
        "learning_rate: -1",
        "eval_fraction: 1",
        "max_steps: 0",
        "max_length: 1",
        "truncation_mode: keep_middle",
        "loss_weights: {sytem: 1}",
        "loss_weights: {system: much}",
        "packing: 3",
        "template_date: yesterday",
        "bf16: true",
        "report_to: 3",
        "lr: 1e-4",
        "dataset_name: []",
        "seed: -1",
    ] {
        assert!(!accepts(wrong), "{wrong}");
    }
    // TRL's defaults, except for the null that means one.
    assert!(accepts(&TRL.replace("output_dir: null\n", "")));
}

#[test]
fn schema_and_reader_agree_on_every_key() {
    let schema = docs::schema();
    let values: Vec<serde_json::Value> = serde_saphyr::from_str(
        "[null, true, false, -2, -1, -0.5, 0, 0.5, 1, 1.5, 2, 1000, '', x, 'no', steps, best, all, '2026-01-31', [], [a], {}]",
    )
    .unwrap();
    for key in KEYS {
        for value in &values {
            let accepted = valid(&schema["properties"][key.name], value);
            let read = (key.set_json)(&mut Config::default(), value).is_ok();
            assert!(!accepted || read, "{}: the schema accepts {value}, the reader does not", key.name);
            if value.is_number()
                && (key.schema)()
                    .get("type")
                    .is_some_and(|of| of.to_string().contains("number") || of.to_string().contains("integer"))
            {
                assert_eq!(accepted, read, "{}: {value}", key.name);
            }
        }
    }
}
