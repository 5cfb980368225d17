//! Unusual model folders, through the binary.

use crate::util::{Dir, root};
use serde_json::{Map, Value, json};

/// The tensors of a safetensors file: name, header entry and bytes.
fn tensors(file: &[u8]) -> Vec<(String, Value, Vec<u8>)> {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: Map<String, Value> = serde_json::from_slice(&file[8..8 + length]).unwrap();
    let tensors = header.into_iter().filter(|(name, _)| name != "__metadata__");
    let offset = |entry: &Value, i: usize| 8 + length + entry["data_offsets"][i].as_u64().unwrap() as usize;
    tensors
        .map(|(name, entry)| {
            let bytes = file[offset(&entry, 0)..offset(&entry, 1)].to_vec();
            (name, entry, bytes)
        })
        .collect()
}

/// `model/`: a golden model with a tied head, in bf16, whose file has a separate head; and `rows.jsonl`.
fn tied_with_a_head() -> Dir {
    let dir = Dir::new();
    let golden = root().join("tests/goldens/models/llama_tied");
    let config = std::fs::read_to_string(golden.join("config.json")).unwrap();
    dir.write("model/config.json", config.replace("\"float32\"", "\"bfloat16\""));
    let mut all = tensors(&std::fs::read(golden.join("model.safetensors")).unwrap());
    let (_, entry, bytes) = all.iter().find(|(name, ..)| name.ends_with("embed_tokens.weight")).unwrap();
    let row = 4 * entry["shape"][1].as_u64().unwrap() as usize;
    let reversed = bytes.chunks(row).rev().flatten().copied().collect();
    all.push(("lm_head.weight".into(), entry.clone(), reversed));
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, entry, bytes) in all {
        let start = data.len();
        data.extend(bytes.as_chunks::<4>().0.iter().flat_map(|word| [word[2], word[3]]));
        header.insert(
            name,
            json!({"dtype": "BF16", "shape": entry["shape"], "data_offsets": [start, data.len()]}),
        );
    }
    let header = Value::from(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    dir.write("model/model.safetensors", file);
    dir.write("rows.jsonl", r#"{"input_ids": [9, 5, 11, 7, 13, 2], "labels": [-100, -100, 11, 7, 13, 2]}"#);
    dir
}

#[test]
fn a_head_beside_a_tied_configuration_is_used_and_kept_in_the_type_of_its_base() {
    let dir = tied_with_a_head();
    let warning = "\"lm_head.weight\" differs from the embedding";
    dir.suasion(&["eval", "-M", "model", "-D", "rows.jsonl"]).ok().says(warning);
    let train = dir.train("rows.jsonl").set(&["max_steps=1", "learning_rate=1e-30", "output_dir=out"]);
    train.ok().says(warning);
    // A step with a negligible learning rate: the output equals the input byte for byte.
    let sorted = |file: &str| {
        let mut all: Vec<_> =
            tensors(&dir.read(file)).into_iter().map(|(name, _, bytes)| (name, bytes)).collect();
        all.sort();
        all
    };
    assert!(sorted("out/model.safetensors") == sorted("model/model.safetensors"));
    let config = dir.json("out/config.json");
    assert_eq!((&config["tie_word_embeddings"], &config["dtype"]), (&json!(false), &json!("bfloat16")));
    let checkpoint = dir.json("out/checkpoint-1/config.json");
    assert_eq!(
        (&checkpoint["tie_word_embeddings"], &checkpoint["dtype"]),
        (&json!(false), &json!("float32"))
    );
    let entries = tensors(&dir.read("out/checkpoint-1/model.safetensors"));
    assert!(entries.iter().all(|(_, entry, _)| entry["dtype"] == "F32"));
    // Its own output is read without a warning.
    let again = dir.suasion(&["eval", "-M", "out", "-D", "rows.jsonl"]).ok();
    assert!(!again.stderr.contains("lm_head"), "{}", again.stderr);
}

#[test]
fn rows_longer_than_the_models_positions_are_a_warning() {
    let dir = tied_with_a_head();
    let ids: Vec<u32> = (0..70).map(|i| 3 + i % 100).chain([2]).collect();
    let labels: Vec<i64> =
        ids.iter().enumerate().map(|(i, &id)| if i < 60 { -100 } else { id.into() }).collect();
    dir.write("rows.jsonl", json!({"input_ids": ids, "labels": labels}).to_string());
    // 64 positions, which RoPE of type llama3 stretches by 8.
    let scaled = dir.verify("rows.jsonl").run();
    assert!(!scaled.stdout.contains("T003"), "{}", scaled.stdout);
    let mut config = dir.json("model/config.json");
    config["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 10000.0});
    dir.write("model/config.json", config.to_string());
    let plain = dir.verify("rows.jsonl").run();
    assert!(plain.stdout.contains("T003") && plain.stdout.contains("71 tokens"), "{}", plain.stdout);
    let cut = dir.verify("rows.jsonl").set(&["max_length=64"]).run();
    assert!(!cut.stdout.contains("T003"), "{}", cut.stdout);
}
