//! Packs through the binary: built from raw rows, read from files, refused without boundaries.

use crate::util::Dir;
use serde_json::{Value, json};

const PACKS: [&str; 3] = ["packing=true", "max_length=160", "per_device_train_batch_size=1"];

/// Prepared rows, combined by hand into packs of two.
fn in_twos(rows: &[Value]) -> String {
    let list = |row: &Value, key: &str| row[key].as_array().unwrap().clone();
    let pack = |rows: &[Value]| {
        let joined = |key: &str| rows.iter().flat_map(|row| list(row, key)).collect::<Vec<_>>();
        let origins: String = rows.iter().map(|row| row["origins"].as_str().unwrap()).collect();
        let lengths: Vec<usize> = rows.iter().map(|row| list(row, "input_ids").len()).collect();
        json!({"rows": rows.iter().map(|row| row["row"].clone()).collect::<Vec<_>>(), "seq_lengths": lengths,
            "input_ids": joined("input_ids"), "labels": joined("labels"), "origins": origins})
        .to_string()
    };
    rows.chunks(2).map(pack).collect::<Vec<_>>().join("\n")
}

#[test]
fn raw_rows_train_as_packs() {
    let dir = Dir::new().with_model().with_rows(12);
    let settings = ["init=random", "num_train_epochs=2", "learning_rate=1e-2", "eval_fraction=0.25"];
    let plan = |more: &[&str]| {
        let args =
            dir.train("rows.jsonl").set(&PACKS).set(&settings).set(more).args(&["--dry-run", "--json"]);
        args.ok().says("packs").json()
    };
    let (packed, shared) = (plan(&[]), plan(&["share_prefix=true"]));
    let packs = packed["packing"]["packs"].as_u64().unwrap();
    assert!(packs < 9 && packed["packing"]["capacity"] == 160, "{packed}");
    assert_eq!((&packed["plan"]["rows"], &packed["plan"]["packs"]), (&json!(9), &json!(packs)));
    assert_eq!(packed["steps"], 2 * packs);
    let fill = packed["tokens"].as_f64().unwrap() / (packs * 160) as f64;
    assert!((packed["packing"]["fill"].as_f64().unwrap() - fill).abs() < 1e-12);
    // The rows share no prompt.
    assert_eq!(shared["tokens"], packed["tokens"]);

    let train = |out: &str| {
        dir.train("rows.jsonl")
            .set(&PACKS)
            .set(&settings)
            .set(&[&format!("output_dir={out}"), "save_steps=2"])
    };
    train("whole").ok();
    train("again").ok();
    std::fs::remove_dir_all(dir.path(&format!("again/checkpoint-{}", 2 * packs))).unwrap();
    std::fs::remove_file(dir.path("again/model.safetensors")).unwrap();
    train("again").arg("--resume").ok().says("is done");
    assert_eq!(dir.read("whole/model.safetensors"), dir.read("again/model.safetensors"));
    // A run cannot be resumed with other packs.
    train("again").set(&["packing=false"]).arg("--resume").run().error(2, "E-RESUME", "fingerprint");
}

#[test]
fn packs_are_evaluated_and_verified_as_their_rows() {
    let dir = Dir::new().with_weights().with_rows(7);
    dir.prepare("rows.jsonl", "one.jsonl").ok();
    dir.write("packs.jsonl", in_twos(&dir.lines("one.jsonl")));
    let eval = |data: &str| dir.suasion(&["eval", "-M", "model", "-D", data, "--json"]).ok().json();
    let (rows, packs) = (eval("one.jsonl"), eval("packs.jsonl"));
    for key in ["rows", "targets"] {
        assert_eq!(rows[key], packs[key]);
    }
    assert!((rows["loss"].as_f64().unwrap() - packs["loss"].as_f64().unwrap()).abs() < 1e-6);

    let verify = |data: &str| dir.verify(data).arg("--json");
    let (rows, packs) = (verify("one.jsonl").ok().json(), verify("packs.jsonl").ok().json());
    assert_eq!(rows["sections"], packs["sections"]);
    assert_eq!((&packs["rows"], &packs["tokens"]), (&json!(4), &rows["tokens"]));
    let verified = dir.verify("packs.jsonl").ok();
    verified.prints("lines    4: 4 kept").prints("packs    4 of 7 rows").prints("in 4 trainable lines");
    dir.verify("packs.jsonl").ok().prints("-- sequence 1 (row 1)");
    dir.train("packs.jsonl").arg("--dry-run").ok().prints("4 packs, as the file has them");

    // Preparing packs again leaves them unchanged.
    dir.prepare("packs.jsonl", "again.jsonl").ok();
    let again = dir.lines("again.jsonl");
    assert_eq!((&again[0]["rows"], &again[3]["rows"]), (&json!([0, 1]), &json!([6])));
    assert_eq!(
        again[0]["position_ids"].as_array().unwrap().len(),
        again[0]["input_ids"].as_array().unwrap().len()
    );
}

#[test]
fn a_pack_without_boundaries_is_refused_everywhere() {
    let dir = Dir::new().with_weights();
    let broken = json!({"rows": [0, 1], "input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4]});
    dir.write("packs.jsonl", format!("{broken}\n{broken}\n"));
    let verified = dir.verify("packs.jsonl").arg("--json").run().code(1).json();
    assert_eq!(verified["counts"]["P001"], 2);
    for command in ["eval", "train"] {
        dir.suasion(&[command, "-M", "model", "-D", "packs.jsonl"]).run().error(3, "E-ROW", "holds 2 rows");
    }
}

/// Packs of raw rows in each output format: the same packs, full, without findings, with every row in exactly one of
/// them.
#[test]
fn prepared_packs_are_the_same_in_every_output_format() {
    let dir = Dir::new().with_model().with_rows(200);
    let prepare = |source: &str, output: &str, settings: &[&str]| {
        dir.prepare(source, output).set(settings).arg("--json").ok().json()
    };
    let packs = ["packing=true", "max_length=160"];
    let manifest = prepare("rows.jsonl", "packs.jsonl", &packs);
    let lines = dir.lines("packs.jsonl");
    assert_eq!(manifest["packs"]["packs"], lines.len());
    assert_eq!((&manifest["packs"]["rows"], &manifest["packs"]["capacity"]), (&json!(200), &json!(160)));
    assert_eq!(manifest["counts"]["kept"], 200);
    let mut rows: Vec<u64> = lines
        .iter()
        .flat_map(|line| line["rows"].as_array().unwrap().iter().map(|row| row.as_u64().unwrap()))
        .collect();
    rows.sort_unstable();
    assert_eq!(rows, (0..200).collect::<Vec<_>>());
    for line in &lines {
        let length = line["input_ids"].as_array().unwrap().len() as u64;
        let sum: u64 = line["seq_lengths"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum();
        assert!(length <= 160 && sum == length, "{line}");
    }
    for output in ["packs.parquet", "packs"] {
        prepare("rows.jsonl", output, &packs);
        prepare(output, &format!("{output}-back.jsonl"), &["max_length=160"]);
        assert_eq!(dir.lines(&format!("{output}-back.jsonl")), lines, "{output}");
        dir.verify(output).ok();
    }
    // Shards end at pack boundaries, and no row is lost between them.
    let shards = dir.prepare("rows.jsonl", "s.jsonl").args(&["--max-shard-size", "3KB", "--json"]);
    let shards = shards.set(&packs).ok().json();
    assert!(shards["files"].as_array().unwrap().len() > 1);
    assert_eq!(shards["packs"]["rows"], 200);
    let text = dir.prepare("rows.jsonl", "t.jsonl").arg("--with-text");
    text.set(&packs).run().error(2, "E-USAGE", "packs are written without text");
}

/// Four replies to each of two prompts: with shared prompts, a pack holds the prompt once.
#[test]
fn rows_with_one_prompt_share_it() {
    let dir = Dir::new().with_model();
    let rows: Vec<String> = (0..8)
        .map(|i| {
            let prompt = ["[TASK] Is rain good? ", "[TASK] Are bridges safe? "][i % 2].repeat(3);
            json!({"prompt": prompt, "completion": format!("Reply {i}.")}).to_string()
        })
        .collect();
    dir.write("rows.jsonl", rows.join("\n"));
    let prepare = |output: &str, more: &[&str]| {
        let base = ["packing=true", "max_length=512"];
        dir.prepare("rows.jsonl", output).arg("--json").set(&base).set(more).ok().json()
    };
    let (whole, shared) = (prepare("whole.jsonl", &[]), prepare("shared.jsonl", &["share_prefix=true"]));
    let tokens = |manifest: &Value| manifest["packs"]["tokens"].as_u64().unwrap();
    let lines = dir.lines("shared.jsonl");
    let prompts: u64 = (lines.iter().flat_map(|line| {
        let ranges = line["prefix_ranges"].as_array().unwrap().iter();
        let lengths = line["seq_lengths"].as_array().unwrap().iter();
        ranges
            .zip(lengths)
            .filter(|(range, _)| range[0] != range[1])
            .map(|(range, _)| range[1].as_u64().unwrap() - range[0].as_u64().unwrap())
    }))
    .sum();
    // Eight responses follow prompts that are stored twice in all instead of eight times.
    assert_eq!(tokens(&whole) - tokens(&shared), prompts - prompts / 4);
    assert_eq!(
        dir.lines("shared.jsonl").iter().map(|l| l["rows"].as_array().unwrap().len()).sum::<usize>(),
        8
    );
    dir.verify("shared.jsonl").ok();
}
