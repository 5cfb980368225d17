//! The first steps of a new user: `init`, `chat`, completions and manual pages, and helpful errors for mistakes.

use crate::util::{Dir, root};

/// A model with the ChatML template.
fn with_template() -> Dir {
    let dir = Dir::new().with_model();
    let template = std::fs::read(root().join("tests/goldens/templates/chatml.jinja")).unwrap();
    dir.write("model/chat_template.jinja", template);
    dir
}

#[test]
fn init_writes_a_configuration_of_what_it_finds() {
    let dir = Dir::new().with_model().with_rows(60);
    dir.suasion(&["init", "-M", "model", "-D", "rows.jsonl", "--learning_rate", "1e-3"])
        .ok()
        .says("suasion check suasion.yaml");
    let written = dir.text("suasion.yaml");
    let json = dir.suasion(&["check", "suasion.yaml", "--json"]).ok().json();
    let config = &json["config"];
    // The same counts as verify's.
    let verified = dir.verify("rows.jsonl").args(&["--json", "--max_length", "null"]).run().json();
    let lengths: Vec<u64> = {
        dir.prepare("rows.jsonl", "all.jsonl").args(&["--max_length", "null"]).ok();
        let mut lengths: Vec<u64> = dir
            .lines("all.jsonl")
            .iter()
            .map(|row| row["input_ids"].as_array().unwrap().len() as u64)
            .collect();
        lengths.sort_unstable();
        lengths
    };
    let longest = lengths[59];
    for text in [
        "60 rows: 60 kept",
        "input_full in 60 rows",
        "Responses end with <|endoftext|> (id 0)",
        "no weights",
        &format!("the median is {}, 99 % have at most {longest}, the longest has {longest}.", lengths[29]),
        &format!(" {} tokens of the ", verified["supervised_tokens"]),
    ] {
        assert!(
            written.replace("\n# ", " ").replace(',', "").contains(&text.replace(',', "")),
            "{text}\n{written}"
        );
    }
    assert_eq!((&config["format"], &config["init"]), (&"input_full".into(), &"random".into()));
    assert_eq!((&config["learning_rate"], &config["eval_fraction"]), (&1e-3.into(), &0.1.into()));
    let max_length = config["max_length"].as_u64().unwrap();
    assert!((longest..2 * longest).contains(&max_length), "{longest} {max_length}");
    // Every key is present, set or as a comment, and the written configuration runs.
    for key in config.as_object().unwrap().keys() {
        assert!(
            written.lines().any(|line| line.trim_start_matches("# ").starts_with(&format!("{key}: "))),
            "{key}"
        );
    }
    dir.suasion(&["train", "suasion.yaml", "--max_steps", "1", "-q"]).ok();
    // An existing file is not replaced.
    dir.suasion(&["init", "-M", "model", "-D", "rows.jsonl"]).run().error(2, "E-USAGE", "not replaced");
    assert_eq!(dir.text("suasion.yaml"), written);
    let printed = dir.suasion(&["init", "-M", "model", "-D", "rows.jsonl", "-o", "-"]).ok().stdout;
    assert!(printed.contains("max_length: ") && printed.contains("learning_rate: 2e-5"), "{printed}");
}

#[test]
fn init_says_what_is_wrong_with_rows_and_writes_nothing_for_rows_it_cannot_read() {
    let dir = Dir::new().with_model();
    dir.write("rows.jsonl", "{\"a\": \"x\"}\n");
    dir.suasion(&["init", "-M", "model", "-D", "rows.jsonl"]).run().error(
        3,
        "E-ROW",
        "not in a known format",
    );
    assert!(!dir.exists("suasion.yaml"));
    dir.suasion(&["init", "-D", "rows.jsonl"]).run().error(2, "E-USAGE", "no model is named");
    // Without an EOS no response ends.
    dir.write("model/tokenizer_config.json", "{}");
    let mut config = dir.json("model/config.json");
    config["eos_token_id"] = serde_json::Value::Null;
    dir.write("model/config.json", config.to_string());
    dir.write(
        "mixed.jsonl",
        "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"instruction\": \"a\", \"output\": \"b\"}\n",
    );
    let ran = dir.suasion(&["init", "-M", "model", "-D", "mixed.jsonl"]).ok();
    ran.says("error: M002 2 ×");
    let written = dir.text("suasion.yaml");
    assert!(written.contains("name one in stop_tokens") && written.contains("error: M002 2 ×"), "{written}");
    assert!(
        written.contains("alpaca in 1 row, prompt_completion in 1 row")
            && written.contains("format: \"auto\"")
    );
    assert!(written.contains("none are held out"), "{written}");
}

#[test]
fn init_maps_columns_of_other_names() {
    let rows =
        "{\"question\": \"Why?\", \"answer\": \"So.\"}\n{\"question\": \"Who?\", \"answer\": \"I.\"}\n";
    let stopping = with_template();
    let template = stopping.text("model/chat_template.jinja").replace("<|im_end|>", "<|endoftext|>");
    stopping.write("model/chat_template.jinja", template);
    for (dir, mapping, format) in [
        (Dir::new().with_model(), ("prompt", "completion"), "prompt_completion"),
        // Under a chat template it is a conversation. The template ends an answer with the tokenizer's own stop token.
        (stopping, ("instruction", "output"), "alpaca"),
    ] {
        dir.write("rows.jsonl", rows);
        dir.suasion(&["init", "-M", "model", "-D", "rows.jsonl"]).ok();
        let config = dir.suasion(&["check", "suasion.yaml", "--json"]).ok().json()["config"].clone();
        assert_eq!(config["columns"], serde_json::json!({ mapping.0: "question", mapping.1: "answer" }));
        assert_eq!(config["format"], format);
        let verified = dir.suasion(&["verify", "suasion.yaml", "--json"]).ok().json();
        assert_eq!(verified["trainable_rows"], 2);
    }
}

#[test]
fn a_chat_keeps_the_conversation_and_renders_it_with_the_template() {
    let dir = with_template();
    let chat = |input: &str, args: &[&str]| {
        let flags = ["--init", "random", "--max-new-tokens", "6"];
        dir.suasion(&["chat", "-M", "model"]).args(&flags).args(args).stdin(input).code(0)
    };
    let ran = chat("Hello.\n\nAnd you?\n", &["--json", "--system", "Be kind."]);
    let turns: Vec<serde_json::Value> =
        ran.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(turns.len(), 2);
    // The template's text for three messages and the start of an answer, continued without a cache.
    let prompt = format!(
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n{}\
         <|im_end|>\n<|im_start|>user\nAnd you?<|im_end|>\n<|im_start|>assistant\n",
        turns[0]["reply"].as_str().unwrap()
    );
    let args = [
        "generate",
        "-M",
        "model",
        "--init",
        "random",
        "--max-new-tokens",
        "6",
        "--json",
        "--prompt",
        &prompt,
    ];
    let expected = dir.suasion(&args).ok().json();
    assert_eq!(turns[1]["reply"], expected["reply"]);
    assert_eq!(turns[1]["stopped"], "max_new_tokens");
    // /reset begins a new conversation, /exit ends; the notes are not part of the replies.
    let ran = chat("Hello.\n/reset\nHello.\n/exit\nHello.\n", &[]);
    let (first, second) = ran.stdout.split_at(ran.stdout.len() / 2);
    assert!(!first.is_empty() && first == second, "{:?}", ran.stdout);
    assert_eq!(ran.stderr.matches("[6 tokens; cut off by max_new_tokens]").count(), 2, "{}", ran.stderr);
    assert!(chat("", &[]).stdout.is_empty());
    let plain = Dir::new().with_model();
    plain.suasion(&["chat", "-M", "model"]).run().error(3, "E-TEMPLATE", "no chat template");
}

#[test]
fn completions_know_keys_and_their_values_and_man_writes_a_page_per_command() {
    let dir = Dir::new();
    let bash = dir.suasion(&["completions", "bash"]).ok().stdout;
    for text in ["--learning_rate", "keep_response keep_start keep_end drop error", "linear cosine constant"]
    {
        assert!(bash.contains(text), "{text}");
    }
    // After --set: keys, and the values of keys with named values; bash treats `=` as a separate word.
    dir.write("suasion.bash", &bash);
    let complete = |words: &str| {
        let script = format!(
            "source ./suasion.bash; COMP_WORDS=(suasion {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             _suasion_assignments suasion \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD - 1]}}\"; \
             echo \"${{COMPREPLY[*]}}\""
        );
        dir.write("complete.bash", script);
        dir.sh("bash complete.bash").ok().stdout.trim_end().to_string()
    };
    assert_eq!(complete("train --set learning_r"), "learning_rate=");
    assert_eq!(complete("train --set pack"), "packing=true packing=false packing_strategy=bfd");
    assert_eq!(complete("train --set lr_scheduler_type = li"), "linear");
    assert_eq!(complete("prepare --set packing ="), "true false");
    assert_eq!(complete("train --set learning_rate = 1"), "");
    assert!(!complete("prepare --set \"\"").contains("learning_rate"));
    let zsh = dir.suasion(&["completions", "zsh"]).ok().stdout;
    assert!(zsh.contains(":KEY=VALUE:{_suasion_assignments ") && zsh.contains(" learning_rate= "), "{zsh}");
    let fish = dir.suasion(&["completions", "fish"]).ok().stdout;
    assert!(fish.contains("learning_rate=") && fish.contains("packing=true"), "{fish}");
    dir.suasion(&["man", "man/man1"]).ok();
    let help = dir.suasion(&["--help"]).ok().stdout;
    let listed = help.split("Commands:").nth(1).unwrap().split("\n\n").next().unwrap();
    let commands: Vec<&str> = listed
        .lines()
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert!(commands.len() > 10, "{help}");
    for command in commands.into_iter().filter(|command| *command != "help") {
        let page = dir.text(&format!("man/man1/suasion-{command}.1"));
        assert!(page.contains(".SH OPTIONS") && page.contains("\\-\\-color"), "{command}");
    }
    assert!(dir.text("man/man1/suasion-train.1").contains("learning_rate"));
}

#[test]
fn names_that_are_nearly_right_are_answered() {
    let dir = Dir::new().with_model().with_rows(3);
    let wrong = |args: &[&str], code: i32, tag: &str, message: &str, help: &str| {
        dir.suasion(args).run().error(code, tag, message).says(&format!("help: {help}"));
    };
    dir.write("run.yaml", "seed: 1\n");
    wrong(
        &["verify", "-M", "model", "-D", "rwos.jsonl"],
        3,
        "E-IO",
        "rwos.jsonl",
        "did you mean rows.jsonl?",
    );
    wrong(&["verify", "-M", "modle", "-D", "rows.jsonl"], 3, "E-MODEL", "modle", "did you mean model?");
    wrong(&["check", "run.yml"], 2, "E-CONFIG", "run.yml", "did you mean run.yaml?");
    let ran = dir.prepare("rows.jsonl", "none/x.jsonl").run().error(3, "E-IO", "none/x.jsonl: No such file");
    let ran = ran.says("help: there is no folder none");
    assert!(!ran.stderr.contains(".suasion-tmp"), "{}", ran.stderr);
}

#[test]
fn a_folder_that_is_no_model_or_no_run_is_named() {
    let dir = Dir::new().with_model().with_rows(3);
    std::fs::create_dir(dir.path("empty")).unwrap();
    let rows = ["-D", "rows.jsonl"];
    dir.suasion(&["verify", "-M", "empty"]).args(&rows).run().error(
        3,
        "E-MODEL",
        "empty: the folder has neither",
    );
    dir.write("half/config.json", dir.read("model/config.json"));
    let half = dir.suasion(&["train", "-M", "half", "--init", "random"]).args(&rows).run();
    half.error(3, "E-SOURCE", "half: the folder has no tokenizer.json, and rows.jsonl:1 is text");
    dir.suasion(&["train", "--resume", "model"]).run().error(
        2,
        "E-USAGE",
        "no run of suasion wrote this folder",
    );
}

#[test]
fn a_share_that_holds_out_no_row_is_refused() {
    let dir = Dir::new().with_model().with_rows(1);
    let train = dir.train("rows.jsonl").set(&["init=random", "eval_fraction=0.1", "max_steps=1"]).run();
    train.error(2, "E-CONFIG", "eval_fraction=0.1: of 1 row it holds out none");
    assert!(!dir.exists("trainer_output"));
}

#[test]
fn errors_of_libraries_speak_to_users() {
    let dir = Dir::new();
    for (name, text, message) in [
        ("twice.yaml", "seed: 1\nseed: 2\n", "twice.yaml:2: duplicate mapping key `seed`"),
        ("two.yaml", "seed: 1\n---\nseed: 2\n", "only single YAML document expected"),
        ("open.yaml", "seed: [1\n", "open.yaml:1: unclosed bracket"),
        ("null.yaml", "!!binary x\n", "null.yaml:1: "),
    ] {
        dir.write(name, text);
        let ran = dir.suasion(&["check", name]).run().error(2, "E-CONFIG", message);
        for jargon in ["Options", "from_str", "Policy", "Option<", "deserialize"] {
            assert!(!ran.stderr.contains(jargon), "{}", ran.stderr);
        }
    }
}

#[test]
fn control_characters_are_never_printed_raw() {
    let dir = Dir::new().with_model();
    let name = "rows\u{1b}[31m.jsonl";
    dir.write(name, "{\"a\": 1}\n");
    for ran in [
        dir.verify(name).run(),
        dir.prepare(name, "out.jsonl").run(),
        dir.verify("none\u{1b}[2J.jsonl").run(),
        dir.suasion(&["check", "--set", "\u{1b}[2J=1"]).run(),
    ] {
        assert!(ran.stderr.contains('␛') || ran.stdout.contains('␛'), "{}", ran.stderr);
        assert!(!ran.stderr.contains('\u{1b}') && !ran.stdout.contains('\u{1b}'), "{:?}", ran.stderr);
    }
}
