//! New tokens, special tokens and chat templates that a run adds to its model.

use crate::util::{Dir, root};
use serde_json::{Value, json};
use std::path::PathBuf;

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

const TOKENS: [&str; 3] =
    ["add_special_tokens=[<|im_start|>, <|im_end|>]", "add_tokens=[<thought>]", "eos_token=<|im_end|>"];

fn rows(dir: &Dir) {
    let mut text = String::new();
    for (asked, said) in
        [("One?", "Two."), ("Three?", "<thought>Four."), ("Five?", "Six."), ("Seven?", "Eight.")]
    {
        let messages = json!([{"role": "user", "content": asked}, {"role": "assistant", "content": said}]);
        text += &(json!({"messages": messages}).to_string() + "\n");
    }
    dir.write("chats.jsonl", text);
    dir.write("chatml.jinja", CHATML);
}

fn folder() -> Dir {
    let dir = Dir::new().with_weights();
    rows(&dir);
    dir
}

/// The shape of the embedding in a file.
fn table(dir: &Dir, file: &str) -> [u64; 2] {
    let tensors = suasion_test_support::tensors(&dir.path(file));
    let (_, tensor) = tensors.iter().find(|(name, _)| name.contains("embed_tokens")).unwrap();
    [0, 1].map(|i| tensor["shape"][i].as_u64().unwrap())
}

fn size(dir: &Dir, folder: &str) -> u64 {
    dir.json(&format!("{folder}/config.json"))["vocab_size"].as_u64().unwrap()
}

const RUN: [&str; 6] = [
    "chat_template_path=chatml.jinja",
    "learning_rate=1e-2",
    "logging_steps=1",
    "per_device_train_batch_size=2",
    "max_steps=4",
    "save_steps=2",
];

#[test]
fn a_run_with_new_tokens_leaves_a_model_that_needs_nothing_else() {
    let dir = folder();
    let (rows_before, before) = (size(&dir, "model"), dir.read("model/tokenizer.json"));
    let shape = table(&dir, "model/model.safetensors");
    let run = |output: &str, threads: &str| {
        let output = format!("output_dir={output}");
        dir.train("chats.jsonl").set(&RUN).set(&TOKENS).set(&[&output]).args(&["--threads", threads])
    };
    let plan = dir.train("chats.jsonl").set(&RUN).set(&TOKENS).args(&["--dry-run"]).ok();
    assert_eq!(rows_before, 2048);
    plan.prints("2,051 rows of embedding and head for 2,048 in the files; 3 added");
    run("out", "1").ok();
    assert_eq!(dir.read("model/tokenizer.json"), before, "the base's folder stays");
    assert_eq!(size(&dir, "out"), rows_before + 3);
    assert_eq!(size(&dir, "out/checkpoint-2"), rows_before + 3);
    assert_eq!(table(&dir, "out/model.safetensors"), [shape[0] + 3, shape[1]]);
    // Special tokens first; their ids follow the vocabulary.
    let added: Vec<(u64, String, bool)> = dir.json("out/tokenizer.json")["added_tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|token| {
            let text = token["content"].as_str().unwrap().to_string();
            (token["id"].as_u64().unwrap(), text, token["special"].as_bool().unwrap())
        })
        .collect();
    let last: Vec<(u64, &str, bool)> =
        added[added.len() - 3..].iter().map(|(id, text, special)| (*id, text.as_str(), *special)).collect();
    let first = last[0].0;
    assert_eq!(
        last,
        [(first, "<|im_start|>", true), (first + 1, "<|im_end|>", true), (first + 2, "<thought>", false)]
    );
    assert_eq!(dir.json("out/tokenizer_config.json")["eos_token"], "<|im_end|>");
    let stops = dir.json("out/generation_config.json")["eos_token_id"].to_string();
    assert!(stops.contains(&(first + 1).to_string()), "{stops}");
    assert_eq!(dir.text("out/chat_template.jinja"), CHATML);

    // The finished model needs none of the keys, and accepts them without changing.
    let eval = |model: &str, keys: &[&str]| {
        let command = dir.suasion(&["eval", "-D", "chats.jsonl", "--json", "--quiet", "-M", model]);
        command.set(keys).ok().json()["loss"].as_f64().unwrap()
    };
    let loss = eval("out", &[]);
    assert_eq!(eval("out", &[RUN[0], TOKENS[0], TOKENS[1], TOKENS[2]]), loss);
    dir.suasion(&["generate", "-M", "out", "-p", "One?", "--max_new_tokens", "3", "--quiet"]).run();
    // Prepared rows from both are the same.
    dir.suasion(&["prepare", "-D", "chats.jsonl", "-M", "out", "-o", "after.jsonl"]).ok();
    dir.suasion(&["prepare", "-D", "chats.jsonl", "-M", "model", "-o", "before.jsonl"])
        .set(&[RUN[0]])
        .set(&TOKENS)
        .ok();
    assert_eq!(dir.read("before.jsonl"), dir.read("after.jsonl"));
    let ids: Vec<u64> = dir.lines("after.jsonl")[1]["input_ids"]
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap())
        .collect();
    for id in first..first + 3 {
        assert!(ids.contains(&id), "{id} in {ids:?}");
    }
    dir.train("after.jsonl").set(&RUN).set(&TOKENS).set(&["output_dir=prepared", "max_steps=1"]).ok();

    // A resume ends with the same bytes, whatever has happened to the base.
    run("killed", "2").ok();
    std::fs::remove_dir_all(dir.path("killed/checkpoint-4")).unwrap();
    std::fs::remove_file(dir.path("killed/model.safetensors")).unwrap();
    std::fs::rename(dir.path("model"), dir.path("gone")).unwrap();
    dir.suasion(&["train", "--resume", "killed", "--threads", "1"]).ok();
    for name in ["model.safetensors", "tokenizer.json", "config.json", "checkpoint-4/optimizer.safetensors"] {
        assert_eq!(dir.read(&format!("out/{name}")), dir.read(&format!("killed/{name}")), "{name}");
    }
}

#[test]
fn an_adapter_brings_its_rows() {
    let dir = folder();
    let lora = ["use_peft=true", "lora_target_modules=all-linear", "lora_dropout=0"];
    let train = |output: &str| {
        let output = format!("output_dir={output}");
        dir.train("chats.jsonl").set(&RUN).set(&TOKENS).set(&lora).set(&[&output])
    };
    let refused = train("out").run();
    assert_ne!(refused.code, Some(0));
    refused.says("lora_modules_to_save: [embed_tokens, lm_head]");
    let save = ["lora_modules_to_save=[embed_tokens, lm_head]"];
    train("out").set(&save).ok();
    let loss = |args: &[&str]| {
        dir.suasion(&["eval", "-D", "chats.jsonl", "--json", "--quiet"]).args(args).ok().json()["loss"]
            .as_f64()
            .unwrap()
    };
    // Without the keys: the adapter's file and its tokenizer are sufficient.
    let adapted = loss(&["-M", "model", "--adapter", "out"]);
    dir.suasion(&["merge", "--adapter", "out", "-M", "model", "-o", "merged", "--quiet"]).ok();
    assert!((loss(&["-M", "merged"]) - adapted).abs() < 1e-5);
    assert_eq!(size(&dir, "merged"), size(&dir, "model") + 3);
    assert!(dir.text("merged/Modelfile").contains("FROM .\n"));
    let modelfile = dir.text("out/Modelfile");
    let base = dir.path("model").canonicalize().unwrap();
    assert!(
        modelfile.contains("\nADAPTER .\n") && modelfile.contains("PARAMETER stop \"<|im_end|>\""),
        "{modelfile}"
    );
    assert!(modelfile.contains(base.file_name().unwrap().to_str().unwrap()), "{modelfile}");
    // Its resume ends with the same bytes.
    let whole = dir.read("out/adapter_model.safetensors");
    std::fs::remove_dir_all(dir.path("out/checkpoint-4")).unwrap();
    std::fs::remove_file(dir.path("out/adapter_model.safetensors")).unwrap();
    dir.suasion(&["train", "--resume", "out"]).ok();
    assert_eq!(dir.read("out/adapter_model.safetensors"), whole);
}

#[test]
fn tokenizers_that_are_larger_than_their_model_need_a_word() {
    let dir = folder();
    let rows = size(&dir, "model");
    let mut tokenizer = dir.json("model/tokenizer.json");
    let next = tokenizer["added_tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["id"].as_u64().unwrap())
        .max()
        .unwrap();
    let vocabulary = tokenizer["model"]["vocab"].as_object().unwrap().len() as u64;
    let id = rows.max(next + 1).max(vocabulary);
    let fill: Vec<Value> = (next.max(vocabulary - 1) + 1..=id)
        .map(|id| {
            json!({"id": id, "content": format!("<n{id}>"), "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    tokenizer["added_tokens"].as_array_mut().unwrap().extend(fill);
    dir.write("model/tokenizer.json", tokenizer.to_string());
    let run = |keys: &[&str]| {
        let command = dir.train("chats.jsonl").set(&[
            "chat_template_path=chatml.jinja",
            "max_steps=1",
            "output_dir=out",
            "allow_findings=M002",
        ]);
        command.set(keys).set(&["overwrite_output_dir=true"]).run()
    };
    let refused = run(&[]);
    assert_eq!(refused.code, Some(3));
    // A template alone does not make the model larger than config.json says.
    refused.says("E-VOCAB").says("resize_vocab=true");
    run(&["resize_vocab=true"]).code(0);
    assert_eq!(size(&dir, "out"), id + 1);
    run(&["resize_vocab=true", "resize_to_multiple_of=64"]).code(0);
    assert_eq!(size(&dir, "out"), (id + 1).next_multiple_of(64));
}

#[test]
fn a_template_is_taken_with_the_tokens_that_its_model_added() {
    let dir = folder();
    // Another tokenizer with ChatML's tokens.
    for file in ["tokenizer.json", "tokenizer_config.json", "config.json"] {
        dir.write(&format!("other/{file}"), dir.read(&format!("model/{file}")));
    }
    let keys = ["output_dir=other_run", "max_steps=1", "chat_template_path=chatml.jinja"];
    dir.train("chats.jsonl").set(&keys).set(&TOKENS).ok();
    dir.train("chats.jsonl").set(&["output_dir=out", "max_steps=1", "chat_template_path=other_run"]).ok();
    for file in ["tokenizer.json", "chat_template.jinja"] {
        assert_eq!(dir.read(&format!("out/{file}")), dir.read(&format!("other_run/{file}")), "{file}");
    }
    assert_eq!(dir.json("out/tokenizer_config.json")["eos_token"], "<|im_end|>");
    assert_eq!(size(&dir, "out"), size(&dir, "other_run"));
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let dir = folder();
    let refuse = |keys: &[&str], says: &str| {
        let ran = dir.train("chats.jsonl").set(&["max_steps=1", "output_dir=out"]).set(keys).run();
        assert_ne!(ran.code, Some(0), "{keys:?}");
        ran.says(says);
    };
    refuse(&["eos_token=<|nowhere|>"], "add_special_tokens: [\"<|nowhere|>\"] adds it");
    refuse(&["add_tokens=['']"], "a token to add has no text");
    refuse(&["chat_template_path=model"], "the folder has no chat template");
    refuse(&["chat_template_path=none.jinja"], "none.jinja");
    refuse(&["router_aux_loss_coef=0.1"], "has no experts");
}

/// The loss of a model with new tokens in transformers, which loads it without further settings.
#[test]
fn transformers_loads_a_model_with_new_tokens() {
    let Some(python) = suasion_test_support::peers_python() else { return };
    let dir = folder();
    dir.train("chats.jsonl").set(&RUN).set(&TOKENS).set(&["output_dir=out"]).ok();
    let lora =
        ["use_peft=true", "lora_target_modules=all-linear", "lora_modules_to_save=[embed_tokens, lm_head]"];
    dir.train("chats.jsonl").set(&RUN).set(&TOKENS).set(&lora).set(&["output_dir=adapter"]).ok();
    dir.suasion(&["prepare", "-D", "chats.jsonl", "-M", "out", "-o", "rows.jsonl"]).ok();
    for folder in ["out", "adapter"] {
        let script: PathBuf = root().join("tests/adapters.py");
        let (path, rows) = (dir.path(folder), dir.path("rows.jsonl"));
        let out =
            std::process::Command::new(&python).arg(script).arg("loss").args([path, rows]).output().unwrap();
        let stdout = String::from_utf8_lossy(&out.stdout);
        let result = stdout.lines().find_map(|line| line.strip_prefix("RESULT "));
        let result = result.unwrap_or_else(|| panic!("{}", String::from_utf8_lossy(&out.stderr)));
        let theirs: Value = serde_json::from_str(result).unwrap();
        let ours = dir.suasion(&["eval", "-D", "rows.jsonl", "--json", "--quiet", "-M", folder]).ok().json();
        let (ours, loss) = (ours["loss"].as_f64().unwrap(), theirs["loss"].as_f64().unwrap());
        assert!((ours - loss).abs() < 2e-5, "{folder}: {ours}, transformers {loss}");
        // The tokenizer gives the same ids.
        assert_eq!(theirs["ids"], dir.lines("rows.jsonl")[1]["input_ids"], "{folder}");
    }
}
