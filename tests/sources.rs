//! Sources for `--data`: every kind of source of the same rows gives the same prepared rows, byte for byte.

use crate::util::{Dir, root};
use serde_json::{Value, json};
use std::io::Write;
use std::path::PathBuf;

/// Rows with every character that formats quote or escape.
fn rows() -> Vec<Value> {
    let texts = [
        ("Why?", "Because."),
        ("Two\nlines, a comma; and \"quotes\"\t", "A tab\tand\r\na line end \\ and more\n"),
        ("Zwölf Boxkämpfer 電車 🚋 ", "\u{a0}jagen Viktor"),
        (" leading and trailing ", " spaces "),
        ("", "only a completion"),
    ];
    texts.iter().map(|(prompt, completion)| json!({"prompt": prompt, "completion": completion})).collect()
}

fn lines(rows: &[Value]) -> String {
    rows.iter().map(|row| format!("{row}\n")).collect()
}

/// Quoted cells, with names from the first row; lists and objects as JSON.
fn delimited(rows: &[Value], delimiter: &str) -> String {
    let quote = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let cell = |value: &Value| quote(&value.as_str().map_or_else(|| value.to_string(), str::to_string));
    let names: Vec<&String> = rows[0].as_object().unwrap().keys().collect();
    let header: Vec<String> = names.iter().map(|name| quote(name)).collect();
    let mut out = header.join(delimiter) + "\n";
    for row in rows {
        let cells: Vec<String> = names.iter().map(|name| cell(&row[name.as_str()])).collect();
        out += &(cells.join(delimiter) + "\r\n");
    }
    out
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut w = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    w.write_all(bytes).unwrap();
    w.finish().unwrap()
}

/// The lines that `prepare` writes for a source.
fn prepared(dir: &Dir, data: &[&str]) -> String {
    let mut command = dir.suasion(&["prepare", "-M", "model", "-o", "out.jsonl"]);
    for name in data {
        command = command.args(&["-D", name]);
    }
    command.ok();
    dir.text("out.jsonl")
}

#[test]
fn every_kind_of_source_gives_the_same_prepared_rows() {
    let dir = Dir::new().with_model();
    let rows = rows();
    let text = lines(&rows);
    dir.write("rows.jsonl", &text);
    let expected = prepared(&dir, &["rows.jsonl"]);
    assert_eq!(expected.lines().count(), rows.len());

    dir.write("array.json", serde_json::to_string_pretty(&rows).unwrap());
    dir.write("object.json", json!({"version": 1, "data": rows}).to_string());
    dir.write("rows.csv", delimited(&rows, ","));
    dir.write("semicolons.csv", delimited(&rows, ";"));
    dir.write("rows.tsv", delimited(&rows, "\t"));
    dir.write("bom.csv", format!("\u{feff}{}", delimited(&rows, ",")));
    dir.write("rows.jsonl.gz", gzip(text.as_bytes()));
    dir.write("rows.csv.gz", gzip(delimited(&rows, ",").as_bytes()));
    dir.write("rows.jsonl.zst", zstd::encode_all(text.as_bytes(), 3).unwrap());
    for name in [
        "array.json",
        "object.json",
        "rows.csv",
        "semicolons.csv",
        "rows.tsv",
        "bom.csv",
        "rows.jsonl.gz",
        "rows.csv.gz",
        "rows.jsonl.zst",
    ] {
        assert_eq!(prepared(&dir, &[name]), expected, "{name}");
    }

    // Two files whose names sort in the order of their rows: as a glob, as a list, as shards of a split, and as a
    // split's folder.
    let (first, second) = (lines(&rows[..2]), delimited(&rows[2..], ","));
    dir.write("shards/part-0.jsonl", &first).write("shards/part-1.csv", &second);
    let shards = [lines(&rows[..2]), lines(&rows[2..])];
    dir.write("split/train-00000-of-00002.jsonl", &shards[0])
        .write("split/train-00001-of-00002.jsonl", &shards[1]);
    dir.write("split/test.jsonl", "{}\n");
    dir.write("hub/data/train-00000-of-00001.jsonl", &text);
    dir.write("folders/train/a.jsonl", &first).write("folders/train/b.csv", &second);
    dir.write("whole/train.csv", delimited(&rows, ","));
    for data in [
        &["shards/part-*"][..],
        &["shards/*.[jc]s*"],
        &["shards/part-0.jsonl", "shards/part-1.csv"],
        &["split"],
        &["hub"],
        &["folders"],
        &["whole"],
    ] {
        assert_eq!(prepared(&dir, data), expected, "{data:?}");
    }
    // A folder that mixes raw rows and the prepared data made from them is refused.
    dir.write("split/train-00000-of-00001.parquet", "");
    let both = dir.prepare("split", "out.jsonl").run();
    let names = "as train-00000-of-00001.parquet and as train-00000-of-00002.jsonl";
    both.error(3, "E-SOURCE", names).says("a glob such as");
    dir.write("run.yaml", "dataset_name: [shards/part-0.jsonl, shards/part-1.csv]\n");
    dir.suasion(&["prepare", "run.yaml", "-M", "model", "-o", "out.jsonl"]).ok();
    assert_eq!(dir.text("out.jsonl"), expected);
}

#[test]
fn cells_may_hold_conversations_and_tokens() {
    let dir = Dir::new().with_model();
    let ids =
        json!([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]);
    let alpaca = json!([
        {"instruction": "Name a fruit.", "input": "", "output": "A pear."},
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
    ]);
    for rows in [ids, alpaca] {
        let rows = rows.as_array().unwrap();
        dir.write("rows.jsonl", lines(rows)).write("rows.csv", delimited(rows, ","));
        assert_eq!(prepared(&dir, &["rows.csv"]), prepared(&dir, &["rows.jsonl"]));
        assert_eq!(dir.lines("out.jsonl").len(), 2);
    }
}

/// Files written by `datasets`, compared with the JSON Lines that it wrote for the same rows.
#[test]
fn parquet_arrow_and_saved_datasets_give_the_rows_of_their_json_lines() {
    let dir = Dir::new().with_model();
    dir.write(
        "model/chat_template.jinja",
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content or '' }}\
         {% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
    );
    let fixtures = root().join("crates/data/tests/columnar");
    let copy = |from: &str, to: &str| _ = dir.write(to, std::fs::read(fixtures.join(from)).unwrap());
    let kept = |data: &[&str]| {
        let mut command = dir.suasion(&["prepare", "-M", "model", "-o", "out.jsonl"]);
        for name in data {
            command = command.args(&["-D", name]);
        }
        command.set(&["on_bad_row=skip"]).ok();
        (dir.text("out.jsonl"), dir.text("out.jsonl.findings.jsonl"))
    };
    for name in ["conversations", "tokens"] {
        copy(&format!("{name}.jsonl"), "rows.jsonl");
        copy(&format!("{name}.parquet"), "rows.parquet");
        copy(&format!("{name}.parquet"), "hub/data/train-00000-of-00001.parquet");
        let expected = kept(&["rows.jsonl"]);
        assert!(!expected.0.is_empty(), "{name}: {}", expected.1);
        assert_eq!(kept(&["rows.parquet"]), expected, "{name}");
        assert_eq!(kept(&["hub"]), expected, "{name}");
        assert_eq!(kept(&["rows.jsonl", "rows.parquet"]).0.lines().count(), 2 * expected.0.lines().count());
    }
    let saved = fixtures.join("tokens_saved");
    assert_eq!(kept(&[saved.to_str().unwrap()]), kept(&["rows.jsonl"]), "two Arrow files of a Dataset");

    // A DatasetDict: its train split has the rows of the JSON Lines, its test split the second of them.
    copy("conversations.jsonl", "rows.jsonl");
    let expected = kept(&["rows.jsonl"]).0;
    let dict = fixtures.join("conversations_saved");
    let dict = dict.to_str().unwrap();
    assert_eq!(kept(&[dict]).0, expected);
    let prepare = dir.prepare(dict, "out.jsonl");
    prepare.set(&["on_bad_row=skip", "dataset_train_split=test"]).ok();
    let second = expected.lines().find_map(|line| line.strip_prefix("{\"row\": 1, ")).unwrap();
    assert_eq!(dir.text("out.jsonl"), format!("{{\"row\": 0, {second}\n"));
    let prepare = dir.prepare(dict, "out.jsonl");
    prepare.set(&["dataset_train_split=none"]).run().error(3, "E-SOURCE", "no none.jsonl");
}

#[test]
fn the_manifest_of_several_files_has_each_of_them() {
    let dir = Dir::new().with_model();
    let rows = rows();
    dir.write("a.jsonl", lines(&rows[..3])).write("b.jsonl", lines(&rows[3..]));
    prepared(&dir, &["[ab].jsonl"]);
    let manifest = dir.json("out.jsonl.manifest.json");
    let source = &manifest["source"];
    assert_eq!(source["path"], "[ab].jsonl");
    assert_eq!(source["bytes"], lines(&rows).len());
    let hash = |name: &str| blake3::hash(&dir.read(name)).to_hex().to_string();
    let files = json!([
        {"path": "a.jsonl", "blake3": hash("a.jsonl"), "bytes": dir.read("a.jsonl").len()},
        {"path": "b.jsonl", "blake3": hash("b.jsonl"), "bytes": dir.read("b.jsonl").len()},
    ]);
    assert_eq!(source["files"], files);
    prepared(&dir, &["a.jsonl"]);
    let manifest = dir.json("out.jsonl.manifest.json");
    assert_eq!(
        manifest["source"],
        json!({"path": "a.jsonl", "blake3": hash("a.jsonl"), "bytes": dir.read("a.jsonl").len()})
    );
}

#[test]
fn bad_rows_of_several_files_are_named_by_their_own_lines() {
    let dir = Dir::new().with_model();
    dir.write("a.jsonl", lines(&rows()[..2])).write("b.csv", "prompt,completion\n1,2\n1,2,3\n");
    let run = dir.prepare("*.*", "out.jsonl").run();
    run.error(3, "E-ROW", "b.csv:3: the record has 3 cells, the header has 2 columns");
    let skipped = dir.prepare("*.*", "out.jsonl");
    skipped.set(&["on_bad_row=skip"]).ok();
    let rows: Vec<_> = dir.lines("out.jsonl").iter().map(|line| line["row"].as_u64().unwrap()).collect();
    assert_eq!(rows, [0, 1, 2], "counted over both files");
    assert_eq!(dir.lines("out.jsonl.findings.jsonl").last().unwrap()["row"], 3);
}

#[test]
fn missing_sources_are_errors_that_list_what_exists() {
    let dir = Dir::new().with_model();
    let run = |data: &str| dir.prepare(data, "out.jsonl").run();
    run("shards/*.jsonl").error(3, "E-SOURCE", "shards/*.jsonl: no file matches");
    run("rows.csv").error(3, "E-IO", "rows.csv: ");
    dir.write("data/valid.csv", "").write("data/notes.txt", "");
    run("data").error(3, "E-SOURCE", "the folder has no train.jsonl").says("it has valid.csv\n");
    dir.write("part/train-00001-of-00003.jsonl", lines(&rows()));
    run("part").error(3, "E-SOURCE", "1 of 3 shards of train are there");
    dir.write("same/a.jsonl", lines(&rows()));
    dir.prepare("same/*.jsonl", "same/a.jsonl").run().error(2, "E-USAGE", "both the source and the output");
}

#[test]
fn a_data_set_of_the_hub_is_found_in_the_local_cache() {
    let dir = Dir::new().with_model();
    let rows = rows();
    let snapshot = "cache/datasets--some--data/snapshots/abc123";
    dir.write("cache/datasets--some--data/refs/main", "abc123");
    dir.write(&format!("{snapshot}/data/train-00000-of-00002.jsonl"), lines(&rows[..3]));
    dir.write(&format!("{snapshot}/data/train-00001-of-00002.jsonl"), lines(&rows[3..]));
    dir.write(&format!("{snapshot}/data/test-00000-of-00001.jsonl"), lines(&rows[..1]));
    dir.write(&format!("{snapshot}/other/train.jsonl"), lines(&rows[..2]));
    let prepare =
        |data: &str| dir.prepare(data, "out.jsonl").env("HF_HUB_CACHE", "cache").env("HF_HUB_OFFLINE", "1");
    prepare("some/data").ok();
    assert_eq!(dir.lines("out.jsonl").len(), 5);
    let manifest = dir.json("out.jsonl.manifest.json");
    assert_eq!(manifest["source"]["path"], "some/data/train");
    prepare("some/data/other").ok();
    assert_eq!(dir.lines("out.jsonl").len(), 2);
    prepare("some/data").set(&["dataset_train_split=extra"]).run().error(3, "E-SOURCE", "no extra.jsonl");
    let ran = prepare("some/none").run();
    ran.error(3, "E-SOURCE", "cache/datasets--some--none").says("HF_HUB_OFFLINE");

    let train = dir.train("some/data").set(&["init=random"]).arg("--dry-run");
    let ran = train.env("HF_HUB_CACHE", "cache").env("HF_HUB_OFFLINE", "1").ok();
    ran.prints("some/data/train: 5 rows").prints("some/data/test: 1 row:");
}

#[test]
fn rows_of_unknown_format_list_what_each_format_lacks() {
    let ours = root().join("tests/goldens/datasets");
    let mut files: Vec<(PathBuf, &str)> = [
        ("trees.jsonl", "prompt_completion lacks \"completion\""),
        ("threads.jsonl", "messages lacks \"messages\""),
        ("dialogue.csv", "messages lacks \"messages\""),
        ("seed_tasks.jsonl", "alpaca lacks \"output\""),
    ]
    .map(|(name, nearest)| (ours.join(name), nearest))
    .into();
    let material = [
        ("oasst_en_100_trees.jsonl", "prompt_completion lacks \"completion\""),
        ("cmv_threads.jsonl", "messages lacks \"messages\""),
        ("p4g_full_dialog.csv", "messages lacks \"messages\""),
        ("stanford_seed_tasks.jsonl", "alpaca lacks \"output\""),
    ];
    if let Some(folder) = suasion_test_support::material_folder() {
        files.extend(material.map(|(name, nearest)| (folder.join("datasets").join(name), nearest)));
    }
    let dir = Dir::new().with_model();
    for (data, nearest) in &files {
        let data = data.to_str().unwrap();
        let ran = dir.prepare(data, "out.jsonl").run();
        let ran = ran.error(3, "E-ROW", "the row is not in a known format; it has ");
        let lines: Vec<&str> = ran.stderr.lines().collect();
        let help = lines.iter().position(|line| line.starts_with("help: the row is {\"")).unwrap();
        assert_eq!(lines[help + 2], format!("  {nearest}"), "{}", ran.stderr);
        assert_eq!(lines.last(), Some(&"or leave bad rows out with on_bad_row=skip"));
        assert!(lines.len() < 20, "one reason for all rows:\n{}", ran.stderr);
        // The first rows fail for the same reason: its help is printed once.
        let ran = dir.suasion(&["verify", "-D", data]).run().code(1);
        // Line wrapping depends on the length of the material's path.
        let words = ran.stdout.split_whitespace().collect::<Vec<_>>().join(" ");
        // Once for each of three rows, and once more where the first row's help is printed.
        assert_eq!(words.matches("the row is not in a known format").count(), 4, "{}", ran.stdout);
        assert_eq!(ran.stdout.matches(nearest).count(), 1, "{}", ran.stdout);
    }
}

/// The mapping of names is a key like any other: a flag, an assignment, or an entry in a file.
#[test]
fn rows_of_other_names_are_mapped_and_texts_learned_whole() {
    let dir = Dir::new().with_model();
    let rows: Vec<Value> = rows();
    let other =
        |row: &Value| json!({"qa": {"question": row["prompt"], "answers": [row["completion"]]}, "id": "x"});
    dir.write("rows.jsonl", lines(&rows));
    dir.write("other.jsonl", lines(&rows.iter().map(other).collect::<Vec<_>>()));
    let expected = prepared(&dir, &["rows.jsonl"]);
    let columns = ["columns.prompt=qa.question", "columns.completion=qa.answers.0"];
    dir.prepare("other.jsonl", "set.jsonl").set(&columns).ok();
    assert_eq!(dir.text("set.jsonl"), expected);
    let flags = ["--columns.prompt", "qa.question", "--columns.completion=qa.answers.0"];
    dir.prepare("other.jsonl", "flags.jsonl").args(&flags).ok();
    assert_eq!(dir.text("flags.jsonl"), expected);
    dir.prepare("other.jsonl", "no.jsonl").set(&["columns.promt=x"]).run().error(
        2,
        "E-CONFIG",
        "columns has no \"promt\"",
    );
    let ran = dir.prepare("other.jsonl", "no.jsonl").set(&["columns.prompt=question"]).run();
    ran.error(3, "E-ROW", "there is no \"question\", which columns.prompt names");

    dir.write("texts.jsonl", "{\"text\": \"Once upon a time.\"}\n");
    let ran = dir.prepare("texts.jsonl", "no.jsonl").run();
    ran.error(3, "E-ROW", "the row is one \"text\": nothing tells its answer from its prompt");
    dir.prepare("texts.jsonl", "texts_out.jsonl").set(&["completion_only_loss=false"]).ok();
    let row = &dir.lines("texts_out.jsonl")[0];
    assert_eq!(row["labels"], row["input_ids"]);
}
