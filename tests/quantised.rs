//! Bases in 4 and 8 bits through the binary.

use crate::adapters::{RUN, golden, loss, model, write_rows};
use crate::util::Dir;
use serde_json::{Value, json};

fn quantised() -> Value {
    golden("", "quantised.json")
}

/// Training, evaluation, comparison and merge: the losses match PEFT with bitsandbytes.
#[test]
fn a_base_in_few_bits_under_an_adapter() {
    let golden = quantised();
    for (kind, keys) in [
        ("nf4", &["--load_in_4bit"][..]),
        ("nf4_nested", &["--load_in_4bit", "--use_bnb_nested_quant", "--bnb_4bit_compute_dtype", "float32"]),
        ("int8", &["--load_in_8bit"]),
    ] {
        let (dir, base) = (Dir::new(), model("llama"));
        write_rows(&dir, "llama", &["a"]);
        let adapter = model("llama/lora_all_linear");
        let adapter = adapter.to_str().unwrap();
        let want = &golden[format!("llama/lora_all_linear/{kind}").as_str()];
        let theirs = want["fp32"]["a"]["loss"].as_f64().unwrap();
        let near = |got: f64, want: f64, what: &str| {
            assert!((got - want).abs() < 2e-5, "{kind}, {what}: {got}, PEFT {want}");
        };
        let with = |args: &[&str]| loss(&dir, &[args, keys].concat(), Some(&base));
        near(with(&["--adapter", adapter]), theirs, "eval");
        near(with(&[]), want["base_loss"].as_f64().unwrap(), "the base alone");
        let plain = loss(&dir, &["--adapter", adapter], Some(&base));
        assert!((plain - theirs).abs() > 1e-4, "{kind}: nothing was packed");
        // `diagnose` measures both models with the packed base.
        let of_eval = |args: &[&str]| {
            let eval = dir.suasion(&["eval", "-D", "rows.jsonl", "--json", "--quiet", "-M"]).arg(&base);
            eval.args(args).args(keys).ok().json()["sections"]["response"]["loss"].as_f64().unwrap()
        };
        let diagnose = ["diagnose", "-D", "rows.jsonl", "--tuned", adapter, "--json", "--quiet", "--base"];
        let diagnosed = dir.suasion(&diagnose).arg(&base).args(keys).ok().json();
        let response = &diagnosed["sections"]["response"];
        near(response["base"].as_f64().unwrap(), of_eval(&[]), "the base of a diagnosis");
        near(response["tuned"].as_f64().unwrap(), of_eval(&["--adapter", adapter]), "the adapter of one");

        let train = |args: &[&str]| {
            let train = dir.suasion(&["train", "-D", "rows.jsonl", "--adapter", adapter, "-M"]).arg(&base);
            let train = train.args(keys).args(args).set(&RUN[..6]).set(&["max_steps=5", "max_grad_norm=0"]);
            train.set(&[
                "lr_scheduler_type=constant",
                "learning_rate=5e-3",
                "weight_decay=0",
                "output_dir=out",
            ])
        };
        let plan = train(&["--dry-run", "--json"]).ok().json()["memory_bytes"].clone();
        let text = train(&["--dry-run"]).run().code(0);
        text.prints(if kind == "int8" { "in 8 bits" } else { "in 4 bits" });
        let elements = 2 * (4 * 32 * 32 - 2 * 16 * 32 + 3 * 32 * 48);
        let (packed, scales) = (
            plan["packed"].as_u64().unwrap(),
            plan["packed"].as_u64().unwrap()
                - match kind {
                    "int8" => elements,
                    _ => elements / 2,
                },
        );
        assert!(packed > 0 && scales < elements / 8, "{kind}: {plan}");
        train(&[]).ok();
        let metrics = dir.lines("out/metrics.jsonl");
        near(metrics[0]["loss"].as_f64().unwrap(), theirs, "the first step");
        let norm = metrics[0]["grad_norm"].as_f64().unwrap();
        let theirs = want["adamw_5"]["grad_norms"][0].as_f64().unwrap();
        assert!((norm / theirs - 1.0).abs() < 1e-4, "{kind}: {norm}, PEFT {theirs}");

        // Merged into the weights of the base's files, as in a merge without the keys.
        dir.suasion(&["merge", "--adapter", "out", "-o", "merged", "--quiet", "-M"]).arg(&base).ok();
        let (merged, over) =
            (loss(&dir, &["-M", "merged"], None), loss(&dir, &["--adapter", "out"], Some(&base)));
        assert!((merged - over).abs() < 1e-5, "{kind}: {merged} and {over}");
        let config: Value = dir.json("out/adapter_config.json");
        assert!(config.get("quantization_config").is_none());
    }
}

#[test]
fn a_resume_keeps_the_bits_of_the_base() {
    let dir = Dir::new();
    write_rows(&dir, "llama", &["a"]);
    let base = model("llama");
    let run = |output: &str| {
        let run = dir.suasion(&["train", "-D", "rows.jsonl", "--load_in_4bit", "-M"]).arg(&base);
        let output = format!("output_dir={output}");
        run.set(&[
            "max_length=null",
            "use_peft=true",
            "max_steps=4",
            "save_steps=2",
            "use_dora=true",
            &output,
        ])
    };
    run("whole").args(&["--threads", "1"]).ok();
    run("killed").args(&["--threads", "2"]).ok();
    std::fs::remove_dir_all(dir.path("killed/checkpoint-4")).unwrap();
    std::fs::remove_file(dir.path("killed/adapter_model.safetensors")).unwrap();
    let other = dir.suasion(&["train", "--resume", "killed", "--load_in_4bit", "false"]).run();
    other.says("load_in_4bit: was true, is false");
    dir.suasion(&["train", "--resume", "killed"]).ok();
    assert_eq!(dir.read("whole/adapter_model.safetensors"), dir.read("killed/adapter_model.safetensors"));
}

#[test]
fn a_folder_that_transformers_has_packed_is_a_base() {
    let golden = quantised();
    for (family, adapter, kind) in [("llama", "lora_all_linear", "nf4_nested"), ("gpt2", "lora", "int8")] {
        let (dir, base) = (Dir::new(), model(family).join(kind));
        write_rows(&dir, family, &["a"]);
        let want = golden[format!("{family}/{adapter}/{kind}").as_str()]["base_loss"].as_f64().unwrap();
        let ours = loss(&dir, &[], Some(&base));
        assert!((ours - want).abs() < 2e-5, "{family}: {ours}, transformers {want}");
        let train = |keys: &[&str]| {
            let train = dir.suasion(&["train", "-D", "rows.jsonl", "-M"]).arg(&base);
            train.set(&RUN[..6]).set(&["max_steps=2", "output_dir=out"]).set(keys)
        };
        train(&[]).run().code(2).says("which cannot be trained").says("use_peft=true");
        let other = if kind == "int8" { "load_in_4bit=true" } else { "load_in_8bit=true" };
        train(&["use_peft=true", other]).run().says("bits already").says("leave it out");
        train(&["use_peft=true"]).ok();
        let adapted = loss(&dir, &["--adapter", "out"], Some(&base));
        assert!(adapted < ours, "{family}: {ours} → {adapted}");
        // A merge of it stores the weights unpacked, and its config.json no longer says that they are packed.
        dir.suasion(&["merge", "--adapter", "out", "-o", "merged", "--quiet", "-M"]).arg(&base).ok();
        let merged = loss(&dir, &["-M", "merged"], None);
        assert!((merged - adapted).abs() < 1e-5, "{family}: {merged} and {adapted}");
        assert!(dir.json("merged/config.json").get("quantization_config").is_none());
    }
}

#[test]
fn keys_that_cannot_be_honoured_are_refused_by_name() {
    let dir = Dir::new().with_weights().with_rows(3);
    let refused = |keys: &[&str], words: &[&str]| {
        let train = dir.train("rows.jsonl").set(&["max_steps=1", "output_dir=out"]).set(keys);
        let ran = train.run().code(2);
        words.iter().fold(ran, |ran, word| ran.says(word));
    };
    refused(&["load_in_4bit=true"], &["4 bits, which cannot be trained", "use_peft=true"]);
    let peft = ["use_peft=true", "lora_target_modules=all-linear"];
    let with = |keys: &[&'static str]| [&peft[..], keys].concat();
    refused(&with(&["load_in_4bit=true", "load_in_8bit=true"]), &["contradict each other"]);
    refused(&with(&["use_bnb_nested_quant=true"]), &["has no effect without load_in_4bit=true"]);
    refused(&with(&["load_in_4bit=true", "bnb_4bit_quant_type=fp4"]), &["bnb_4bit_quant_type", "NF4"]);
    refused(
        &with(&["load_in_4bit=true", "bnb_4bit_compute_dtype=bfloat16"]),
        &["bnb_4bit_compute_dtype=bfloat16: products on the CPU are of float32", "device=cuda"],
    );
    refused(&with(&["load_in_4bit=true", "init=random"]), &["load_in_4bit=true with init=random"]);
    refused(&with(&["bnb_4bit_use_double_quant=true"]), &["use_bnb_nested_quant: true"]);
    let saved = with(&["load_in_4bit=true", "lora_modules_to_save=[down_proj]"]);
    let train = dir.train("rows.jsonl").set(&["max_steps=1", "output_dir=out"]).set(&saved);
    train.run().code(3).says("layers.0.mlp.down_proj, which is in 4 bits and cannot be trained whole");

    let mut config = dir.json("model/config.json");
    for method in ["gptq", "awq"] {
        config["quantization_config"] = json!({"quant_method": method, "bits": 4});
        dir.write("model/config.json", config.to_string());
        let train = dir.train("rows.jsonl").set(&["max_steps=1", "output_dir=out"]).set(&peft);
        train.run().code(3).says(method).says("load_in_4bit=true");
    }
}
