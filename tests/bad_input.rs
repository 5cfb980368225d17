//! Bad rows, weights, folders and disks: each gives an error that names the place, with the right exit code.

use crate::util::{Dir, Ran, TestCommand, row};

fn prepare(dir: &Dir) -> TestCommand {
    dir.prepare("rows.jsonl", "out.jsonl")
}

/// Prepares good rows with one bad line in the middle: line 3 of 5.
fn prepare_with(bad: impl AsRef<[u8]>) -> (Dir, Ran) {
    let dir = Dir::new().with_model();
    let mut file = Vec::new();
    for i in [0, 1] {
        file.extend_from_slice(row(i).as_bytes());
        file.push(b'\n');
    }
    file.extend_from_slice(bad.as_ref());
    file.push(b'\n');
    for i in [2, 3] {
        file.extend_from_slice(row(i).as_bytes());
        file.push(b'\n');
    }
    dir.write("rows.jsonl", file);
    let ran = prepare(&dir).run();
    (dir, ran)
}

/// The row stops the run with an error that names line 3, and no output is left; under `on_bad_row=skip` it
/// is skipped, counted and listed.
fn bad_row(bad: impl AsRef<[u8]>, message: &str) {
    let (dir, ran) = prepare_with(bad);
    ran.error(3, "E-ROW", "rows.jsonl:3: ").says(message);
    assert!(!dir.exists("out.jsonl"));
    let ran = prepare(&dir).set(&["on_bad_row=skip"]).ok().prints("4 kept").prints("1 failed");
    assert!(ran.stdout.starts_with("5 rows: 4 kept"), "{}", ran.stdout);
    let rows: Vec<_> = dir.lines("out.jsonl").iter().map(|line| line["row"].as_u64().unwrap()).collect();
    assert_eq!(rows, [0, 1, 3, 4]);
    let findings = dir.lines("out.jsonl.findings.jsonl");
    assert!(findings.iter().any(|f| f["row"] == 2 && f["level"] == "error"), "{findings:?}");
}

#[test]
fn full_text_that_does_not_start_with_input_text() {
    bad_row(
        r#"{"input_text": "Why so?", "full_text": "Why not? Because."}"#,
        "\"full_text\" does not start with \"input_text\": first difference at byte 4",
    );
}

#[test]
fn missing_field() {
    bad_row(r#"{"input_text": "Why so?"}"#, "full_text");
}

#[test]
fn null_field() {
    bad_row(r#"{"input_text": "Why so?", "full_text": null}"#, "full_text");
}

#[test]
fn wrong_type() {
    bad_row(r#"{"input_text": "Why so?", "full_text": 7}"#, "full_text");
}

#[test]
fn not_an_object() {
    bad_row(r#"["input_text"]"#, "");
}

#[test]
fn empty_response() {
    bad_row(r#"{"input_text": "Why so?", "full_text": "Why so?"}"#, "M001: the response is empty");
}

#[test]
fn invalid_utf8_in_the_middle() {
    bad_row(b"{\"input_text\": \"a\xff\", \"full_text\": \"a b\"}", "UTF-8");
}

#[test]
fn invalid_json_in_the_middle() {
    bad_row(r#"{"input_text": "a", "full_text": "#, "JSON");
}

#[test]
fn several_bad_rows_are_all_listed() {
    let dir = Dir::new().with_model();
    let bad = r#"{"input_text": "a"}"#;
    dir.write("rows.jsonl", format!("{}\n{bad}\n{}\n{bad}\n", row(0), row(1)));
    prepare(&dir).run().error(3, "E-ROW", "rows.jsonl:2: ").says("rows.jsonl:4: ");
}

#[test]
fn training_stops_at_a_bad_row_unless_on_bad_row_is_skip() {
    let (dir, _) = prepare_with(r#"{"input_text": "a"}"#);
    let train = || dir.train("rows.jsonl").set(&["init=random", "max_steps=1"]);
    train().run().error(3, "E-ROW", "rows.jsonl:3: ");
    train().set(&["on_bad_row=skip"]).ok().says("1 failed").says("rows.jsonl:3: ");
    assert!(dir.text("trainer_output/README.md").contains("skip"));
}

#[test]
fn response_cut_away_by_truncation() {
    let dir = Dir::new().with_model().with_rows(3);
    let cut = prepare(&dir).set(&["truncation_mode=keep_start", "max_length=12"]).ok();
    cut.prints("0 kept").prints("3 dropped (3 without a target)");
    assert!(dir.lines("out.jsonl.findings.jsonl").iter().any(|f| f["code"] == "M001"));
    // Training on no rows is refused before any work.
    dir.train("rows.jsonl")
        .set(&["init=random", "truncation_mode=keep_start", "max_length=12"])
        .run()
        .error(3, "E-DATA", "no");
}

#[test]
fn row_too_long_in_mode_error() {
    let dir = Dir::new().with_model().with_rows(2);
    prepare(&dir)
        .set(&["truncation_mode=error", "max_length=12"])
        .run()
        .error(3, "E-ROW", "rows.jsonl:1: ")
        .says("max_length is 12");
}

#[test]
fn empty_file() {
    let dir = Dir::new().with_model();
    dir.write("rows.jsonl", "");
    prepare(&dir).run().error(3, "E-SOURCE", "rows.jsonl: the file has no rows");
}

#[test]
fn missing_file() {
    let dir = Dir::new().with_model();
    prepare(&dir).run().error(3, "E-IO", "rows.jsonl: ");
}

#[test]
fn tokenizer_larger_than_the_model() {
    let dir = Dir::new().with_model().with_rows(2);
    let config = dir.text("model/config.json").replace("\"vocab_size\":2048", "\"vocab_size\":512");
    assert!(config.contains("512"));
    dir.write("model/config.json", config);
    dir.train("rows.jsonl").set(&["init=random"]).run().error(
        3,
        "E-VOCAB",
        "up to 2047, and config.json has vocab_size 512",
    );
}

#[test]
fn tokenised_rows_beyond_the_vocabulary() {
    let dir = Dir::new().with_model();
    dir.write("rows.jsonl", "{\"input_ids\": [1, 2, 9999], \"labels\": [-100, 2, 9999]}\n");
    dir.train("rows.jsonl").set(&["init=random"]).run().code(3).says("rows.jsonl:1: ").says("9999");
}

#[test]
fn unknown_model_type() {
    let dir = Dir::new().with_model().with_rows(2);
    let config = dir.text("model/config.json").replace("\"llama\"", "\"lama\"");
    dir.write("model/config.json", config);
    dir.train("rows.jsonl").run().error(3, "E-MODEL", "lama");
}

#[test]
fn weights_that_are_missing() {
    let dir = Dir::new().with_model().with_rows(2);
    dir.train("rows.jsonl").run().code(3).says("model.safetensors");
}

fn train_on(dir: &Dir) -> Ran {
    dir.train("rows.jsonl").set(&["max_steps=1"]).run()
}

#[test]
fn weights_with_a_truncated_header() {
    let dir = Dir::new().with_weights();
    let bytes = dir.read("model/model.safetensors");
    for length in [0, 7, 100, bytes.len() - 1] {
        dir.write("model/model.safetensors", &bytes[..length]);
        train_on(&dir).error(3, "E-WEIGHTS", "model.safetensors: ");
    }
}

#[test]
fn weights_with_a_hostile_header() {
    let dir = Dir::new().with_weights();
    let bytes = dir.read("model/model.safetensors");
    // A header that claims to be as long as the address space.
    let mut hostile = bytes.clone();
    hostile[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    dir.write("model/model.safetensors", hostile);
    train_on(&dir).error(3, "E-WEIGHTS", "model.safetensors: ");
    // A tensor that claims bytes beyond the file.
    let header = br#"{"model.norm.weight":{"dtype":"F32","shape":[32],"data_offsets":[0,999999999999]}}"#;
    let mut hostile = (header.len() as u64).to_le_bytes().to_vec();
    hostile.extend_from_slice(header);
    dir.write("model/model.safetensors", hostile);
    train_on(&dir).error(3, "E-WEIGHTS", "model.safetensors: ");
}

#[test]
fn weights_of_another_shape() {
    let dir = Dir::new().with_weights();
    let config =
        dir.text("model/config.json").replace("\"intermediate_size\":48", "\"intermediate_size\":64");
    dir.write("model/config.json", config);
    train_on(&dir).error(3, "E-WEIGHTS", "mlp");
}

#[test]
fn weights_that_are_nan() {
    let dir = Dir::new().with_weights();
    let mut bytes = dir.read("model/model.safetensors");
    let at = bytes.len() - 4;
    bytes[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    dir.write("model/model.safetensors", bytes);
    train_on(&dir).error(3, "E-WEIGHTS", "model.safetensors: ");
}

#[test]
fn loss_that_turns_nan_names_step_and_rows_and_keeps_the_last_checkpoint() {
    let dir = Dir::new().with_model().with_rows(4);
    let ran = dir
        .train("rows.jsonl")
        .set(&[
            "init=random",
            "max_steps=40",
            "save_steps=1",
            "learning_rate=1e20",
            "max_grad_norm=0",
            "lr_scheduler_type=constant",
            "per_device_train_batch_size=2",
        ])
        .run()
        .error(3, "E-NAN", "step ");
    assert!(ran.stderr.contains("rows.jsonl:"), "{}", ran.stderr);
    assert!(ran.stderr.contains("the last good checkpoint is trainer_output/checkpoint-"), "{}", ran.stderr);
    assert!(dir.exists("trainer_output/checkpoint-1/model.safetensors"));
}

#[test]
fn full_disk() {
    // A limit on the file size stands in for a full disk: it needs no privileges. With the signal ignored the write
    // fails, as on a full disk, instead of ending the process.
    let dir = Dir::new().with_model().with_rows(40);
    let ran = dir
        .sh("trap '' XFSZ; ulimit -f 8; exec \"$SUASION\" prepare -M model -D rows.jsonl -o out.jsonl")
        .run()
        .code(3)
        .says("error[E-IO]: out.jsonl: ");
    assert!(ran.stderr.contains("File too large"), "{}", ran.stderr);
    assert!(!dir.exists("out.jsonl"));
    dir.sh("trap '' XFSZ; ulimit -f 8; exec \"$SUASION\" train -M model -D rows.jsonl --set init=random --set max_steps=2")
        .run()
        .code(3)
        .says("error[E-IO]: trainer_output/");
    assert!(!dir.exists("trainer_output/model.safetensors"));
}

#[test]
fn output_that_cannot_be_created() {
    let dir = Dir::new().with_model().with_rows(2);
    dir.write("file", "");
    dir.train("rows.jsonl").set(&["init=random", "output_dir=file/x"]).run().code(3).says("error[E-IO]: ");
}

#[test]
fn output_folder_that_is_not_empty() {
    let dir = Dir::new().with_model().with_rows(2);
    dir.write("out/precious.txt", "keep me");
    let train = || dir.train("rows.jsonl").set(&["init=random", "max_steps=1", "output_dir=out"]);
    train().run().error(2, "E-OUTPUT", "out: the output folder is not empty");
    train().set(&["overwrite_output_dir=true"]).ok();
    assert_eq!(dir.text("out/precious.txt"), "keep me");
}

#[test]
fn key_with_a_typo() {
    let dir = Dir::new().with_model().with_rows(2);
    dir.train("rows.jsonl")
        .set(&["learning_rat=1"])
        .run()
        .error(2, "E-CONFIG", "unknown key \"learning_rat\"")
        .says("did you mean \"learning_rate\"?");
    dir.write("run.yaml", "seed: 1\nmax_lenght: 8\n");
    dir.suasion(&["train", "run.yaml"])
        .run()
        .error(2, "E-CONFIG", "run.yaml:2: unknown key \"max_lenght\"")
        .says("did you mean \"max_length\"?");
}

#[test]
fn text_rows_without_a_tokenizer() {
    let dir = Dir::new().with_model().with_rows(2);
    std::fs::remove_file(dir.path("model/tokenizer.json")).unwrap();
    prepare(&dir).run().error(3, "E-SOURCE", "no tokenizer");
}

#[test]
fn a_model_larger_than_the_memory() {
    let dir = Dir::new().with_model().with_rows(4);
    let mut config: serde_json::Value = serde_json::from_slice(&dir.read("model/config.json")).unwrap();
    config["hidden_size"] = 65_536.into();
    config["vocab_size"] = 2_000_000.into();
    dir.write("model/config.json", config.to_string());
    dir.train("rows.jsonl").set(&["init=random"]).run().error(3, "E-MEMORY", "bytes of memory are needed");
}

#[test]
fn a_negative_loss_weight() {
    let dir = Dir::new().with_model().with_rows(4);
    for set in ["loss_weights.task=-1", "prompt_loss_weight=-0.5"] {
        let train = dir.train("rows.jsonl").set(&["init=random", set]).run();
        train.code(2).says("error[E-CONFIG]");
    }
}

#[test]
fn held_out_rows_are_not_counted_as_trained_on() {
    let dir = Dir::new().with_model().with_rows(10);
    dir.train("rows.jsonl").set(&["init=random", "eval_fraction=0.2", "max_steps=1", "output_dir=out"]).ok();
    let card = String::from_utf8(dir.read("out/README.md")).unwrap();
    assert!(card.contains("10 read, 8 trained on") && card.contains("2 held out"), "{card}");
}

/// The tokenizers library panics on this file, and compilers of templates panic on theirs.
#[test]
fn broken_tokenizers_and_endless_templates_are_errors_that_name_the_file() {
    let dir = Dir::new().with_model();
    dir.write("rows.jsonl", row(0));
    dir.write("model/tokenizer.json", "{\"decoder\":{");
    let ran = prepare(&dir).run();
    assert_eq!(ran.code, Some(3), "{}", ran.stderr);
    let ran = ran.says("error[E-TOKENIZER]: ").says("tokenizer.json: not a tokenizer");
    // Of the panic, only the error is printed.
    assert!(ran.stderr.lines().all(|line| !line.starts_with("thread ") && !line.contains("stack backtrace")));

    let chat = serde_json::json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]});
    for (source, what) in [
        (format!("{{{{ a{} }}}}", " ~ a".repeat(100_000)), "more than 1000 operators in one tag"),
        (format!("{{{{ {}1 }}}}", "-".repeat(100_000)), "more than 1000 operators in one tag"),
        ("a".repeat(2 << 20), "the limit is 1048576"),
    ] {
        let dir = Dir::new().with_model();
        dir.write("rows.jsonl", chat.to_string()).write("model/chat_template.jinja", source);
        let ran = prepare(&dir).run();
        ran.error(3, "E-SOURCE", "no chat template that can be used").says(what).says("chat_template.jinja");
    }
    let dir = Dir::new().with_model();
    let join = "{% set x = 'a' * 16000000 %}{% set l = [x] * 1000 %}{{ l | join }}";
    dir.write("rows.jsonl", chat.to_string()).write("model/chat_template.jinja", join);
    prepare(&dir).run().error(3, "E-ROW", "join: the text would be too long");
}
