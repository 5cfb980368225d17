//! Conversations through the binary: a chat template in the model folder, and rows of messages.

use crate::util::{Dir, runs};
use serde_json::{Value, json};

/// A template like ChatML's, with the demo tokenizer's EOS as the stop token.
const TEMPLATE: &str = "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}\
    {% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}\
    {% if add_generation_prompt %}<|assistant|>{{ '\\n' }}{% endif %}";

fn rows() -> String {
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    [
        json!({"messages": [message("system", "Be brief."), message("user", "Are buses slow?"),
                            message("assistant", "At rush hour."), message("user", "And trams?"),
                            message("assistant", "Less so."), message("user", "Thanks.")]}),
        json!({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]}),
        json!({"prompt": [message("user", "Why not?"), message("assistant", "Perhaps."), message("user", "Say!")],
               "completion": [message("assistant", "No reason.")]}),
        json!({"instruction": "Name a tree.", "input": "", "output": "An oak."}),
    ]
    .map(|row| format!("{row}\n"))
    .concat()
}

fn folder() -> Dir {
    let dir = Dir::new().with_model();
    dir.write("model/chat_template.jinja", TEMPLATE).write("rows.jsonl", rows());
    dir
}

fn prepared(dir: &Dir, settings: &[&str]) -> Vec<Value> {
    dir.prepare("rows.jsonl", "out.jsonl").arg("--with-text").set(settings).ok();
    dir.lines("out.jsonl")
}

/// Number of supervised tokens of a line. Labels must equal the ids on responses and stop tokens, and be masked
/// elsewhere.
fn learned(line: &Value) -> usize {
    let (ids, labels) = (line["input_ids"].as_array().unwrap(), line["labels"].as_array().unwrap());
    let origins: Vec<char> = line["origins"].as_str().unwrap().chars().collect();
    let mut n = 0;
    for i in 0..ids.len() {
        if labels[i] == -100 {
            continue;
        }
        assert_eq!(labels[i], ids[i]);
        assert!(matches!(origins[i], 'R' | 'E'), "{}", origins[i]);
        n += 1;
    }
    n
}

#[test]
fn prepare_renders_with_the_models_template() {
    let dir = folder();
    let lines = prepared(&dir, &[]);
    assert_eq!(lines.len(), 4);
    assert_eq!(
        lines[0]["text"],
        "<|system|>\nBe brief.\n<|user|>\nAre buses slow?\n<|assistant|>\nAt rush hour.<|endoftext|>\n<|user|>\nAnd \
         trams?\n<|assistant|>\nLess so.<|endoftext|>\n<|user|>\nThanks.\n"
    );
    // Two answers with their stop tokens; a user turn after the last answer is prompt, not an error.
    assert_eq!(runs(&lines[0]).matches("RE").count(), 2, "{}", runs(&lines[0]));
    assert!(!runs(&lines[0]).ends_with("RE") && runs(&lines[0]).contains('S'));
    assert_eq!(lines[1]["text"], "<|user|>\nWhy?\n<|assistant|>\nBecause.<|endoftext|>\n");
    // The prompt of a completion is not supervised, even its assistant turns.
    assert_eq!(runs(&lines[2]).matches("RE").count(), 1);
    // With a template, an instruction is rendered as a conversation.
    assert_eq!(lines[3]["text"], "<|user|>\nName a tree.\n<|assistant|>\nAn oak.<|endoftext|>\n");
    assert!(lines.iter().all(|line| learned(line) > 0));
    let manifest: Value = serde_json::from_str(&dir.text("out.jsonl.manifest.json")).unwrap();
    assert!(manifest["template"].is_string());

    // Only the last answer is supervised; another template has another fingerprint.
    let last = prepared(&dir, &["supervise=last"]);
    assert!(learned(&last[0]) < learned(&lines[0]));
    dir.write("model/chat_template.jinja", TEMPLATE.replace("<|user|>", "<|u|>") + " ");
    prepared(&dir, &[]);
    let other: Value = serde_json::from_str(&dir.text("out.jsonl.manifest.json")).unwrap();
    assert_ne!(
        (&manifest["template"], &manifest["fingerprint"]),
        (&other["template"], &other["fingerprint"])
    );
}

#[test]
fn verify_explains_a_conversation() {
    let dir = folder();
    let ran = dir.verify("rows.jsonl").args(&["--row", "1"]).ok();
    assert!(ran.stdout.contains("LEARNED response") && ran.stdout.contains("Because."), "{}", ran.stdout);
    let json = dir.verify("rows.jsonl").arg("--json").ok().json();
    assert_eq!((&json["rows"], &json["trainable_rows"]), (&json!(4), &json!(4)));
}

#[test]
fn conversations_without_a_chat_template_are_an_error() {
    let dir = Dir::new().with_model();
    dir.write("rows.jsonl", rows());
    for command in [dir.verify("rows.jsonl"), dir.prepare("rows.jsonl", "out.jsonl")] {
        command.run().error(3, "E-SOURCE", "the model folder has no chat template");
    }
    // Instructions need no template.
    dir.write("rows.jsonl", rows().lines().last().unwrap());
    assert!(prepared(&dir, &[])[0]["text"].as_str().unwrap().contains("### Instruction:\nName a tree."));
}

#[test]
fn conversations_train_and_evaluate() {
    let dir = folder();
    dir.train("rows.jsonl").set(&["init=random", "max_steps=2", "output_dir=made"]).arg("--quiet").ok();
    assert!(dir.exists("made/chat_template.jinja"), "the template goes with the model");
    let evaluation = dir.suasion(&["eval", "-M", "made", "-D", "rows.jsonl", "--json"]).ok().json();
    assert_eq!(evaluation["rows"], 4);

    // Rows that were prepared with another template are refused.
    prepared(&dir, &[]);
    dir.write("model/chat_template.jinja", format!("{TEMPLATE} "));
    dir.train("out.jsonl").arg("--dry-run").run().error(3, "E-FINGERPRINT", "another chat template");
}

/// A run over midnight, and a resume on another day.
#[test]
fn a_run_keeps_the_day_on_which_it_began() {
    let dir = Dir::new().with_model();
    dir.write("model/chat_template.jinja", format!("{{{{ strftime_now('%Y-%m-%d') }}}}{TEMPLATE}"));
    let row = |i: usize| json!({"messages": [{"role": "user", "content": format!("View {i}?")}, {"role": "assistant", "content": "Yes."}]});
    dir.write("rows.jsonl", (0..6).map(|i| row(i).to_string() + "\n").collect::<String>());
    let run = |more: &[&str]| {
        dir.train("rows.jsonl")
            .set(&["init=random", "max_steps=2", "save_steps=1", "output_dir=out"])
            .set(more)
    };
    // The day in the rows is the one in the run's configuration.
    dir.prepare("rows.jsonl", "x.jsonl").arg("--with-text").ok();
    run(&[]).ok();
    let day = &dir.lines("x.jsonl")[0]["text"].as_str().unwrap()[..10].to_string();
    assert!(dir.text("out/suasion.yaml").contains(&format!("template_date: \"{day}\"\n")), "{day}");
    // A day other than today.
    run(&["template_date=2001-02-03", "overwrite_output_dir=true"]).ok();
    let whole = dir.read("out/model.safetensors");
    let unfinished = || {
        std::fs::remove_dir_all(dir.path("out/checkpoint-2")).unwrap();
        std::fs::remove_file(dir.path("out/model.safetensors")).unwrap();
    };
    unfinished();
    run(&[]).arg("--resume").ok();
    assert_eq!(dir.read("out/model.safetensors"), whole);
    unfinished();
    dir.suasion(&["train", "--resume", "out"]).ok();
    assert_eq!(dir.read("out/model.safetensors"), whole);
    unfinished();
    run(&["template_date=2001-02-04"]).arg("--resume").run().error(2, "E-RESUME", "trained on other data");
}

#[test]
fn a_template_that_uses_todays_date_warns_and_reserved_names_are_refused() {
    let dir = folder();
    dir.write("model/chat_template.jinja", format!("{{{{ strftime_now('%Y-%m-%d') }}}}{TEMPLATE}"));
    let prepare = || dir.prepare("rows.jsonl", "out.jsonl");
    let ran = prepare().ok();
    let manifest = dir.json("out.jsonl.manifest.json");
    let today = manifest["policy"]["template_date"].as_str().expect("the day is in the manifest").to_string();
    assert!(ran.stderr.contains(&format!("template_date={today}")), "{}", ran.stderr);
    // Pinned to that day the data is the same, without a warning.
    let ran = prepare().set(&[&format!("template_date={today}")]).ok();
    assert!(!ran.stderr.contains("template_date"), "{}", ran.stderr);
    assert_eq!(dir.json("out.jsonl.manifest.json")["fingerprint"], manifest["fingerprint"]);
    prepare().set(&["template_date=2024-02-29"]).ok();
    assert_ne!(dir.json("out.jsonl.manifest.json")["fingerprint"], manifest["fingerprint"]);

    let ran = prepare().set(&["template_kwargs.messages=x"]).run();
    ran.error(2, "E-CONFIG", "template_kwargs");
}

/// MiniJinja copies a list in one instruction, however long it is, so its fuel does not stop this template.
#[test]
fn a_template_that_doubles_a_list_is_ended() {
    let dir = folder();
    dir.write(
        "model/chat_template.jinja",
        "{% set ns = namespace(x=[1]) %}{% for i in range(90) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
    );
    dir.prepare("rows.jsonl", "out.jsonl").run().error(3, "E-TEMPLATE", "the template does not end");
}
