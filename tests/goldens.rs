//! Training through the command line against losses, gradient norms and learning rates that PyTorch and
//! transformers computed (`golden.json` of tests/goldens/models, and of the test material), and a run on real
//! text.

use crate::util::{Dir, material, root};
use serde_json::{Value, json};
use std::path::Path;

/// Rows of a golden batch as tokenised rows.
fn rows(batch: &Value) -> String {
    let lists = |name: &str| batch[name].as_array().expect("a list").clone();
    let mut text = String::new();
    for ((ids, labels), mask) in
        lists("input_ids").into_iter().zip(lists("labels")).zip(lists("attention_mask"))
    {
        text += &json!({"input_ids": ids, "labels": labels, "attention_mask": mask}).to_string();
        text.push('\n');
    }
    text
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|v| v.as_f64().expect("a number")).collect()
}

/// The `hf_like_5` trajectory: two micro-batches (2 rows, and 3 rows of different lengths) normalised
/// together.
fn trajectory(folder: &Path) {
    let model = folder.display();
    let golden = std::fs::read(folder.join("golden.json")).unwrap_or_else(|e| panic!("{model}: {e}"));
    let golden: Value = serde_json::from_slice(&golden).unwrap();
    let expected = &golden["hf_like_5"];
    let dir = Dir::new();
    let text = rows(&golden["batches"]["a"]) + &rows(&golden["batches"]["padded"]);
    let n = text.lines().count();
    dir.write("rows.jsonl", text);
    // The same step as one micro-batch, and with one micro-batch per row.
    for (batch, accumulation) in [(n, 1), (1, n)] {
        let out = format!("out-{batch}");
        dir.suasion(&["train", "-D", "rows.jsonl", "--quiet", "-M"])
            .arg(folder)
            .set(&[
                "shuffle_dataset=false",
                "max_steps=5",
                "lr_scheduler_type=linear",
                "warmup_steps=2",
                "weight_decay=0.1",
                "max_grad_norm=1.0",
                "max_length=null",
                "logging_steps=1",
                &format!("learning_rate={}", expected["lr"]),
                &format!("per_device_train_batch_size={batch}"),
                &format!("gradient_accumulation_steps={accumulation}"),
                &format!("output_dir={out}"),
            ])
            .ok();
        let metrics = dir.lines(&format!("{out}/metrics.jsonl"));
        let column =
            |name: &str| -> Vec<f64> { metrics.iter().filter_map(|line| line[name].as_f64()).collect() };
        let (losses, norms, rates) = (column("loss"), column("grad_norm"), column("learning_rate"));
        let golden_losses = floats(&expected["losses"]);
        assert_eq!(losses.len(), 5);
        for step in 0..5 {
            let close = |name: &str, ours: f64, theirs: f64, tolerance: f64| {
                assert!(
                    (ours - theirs).abs() <= tolerance,
                    "{model} step {}: {name} {ours} is not {theirs}",
                    step + 1
                );
            };
            close("loss", losses[step], golden_losses[step], if step < 2 { 2e-5 } else { 5e-4 });
            let norm = floats(&expected["grad_norms_before_clip"])[step];
            close("gradient norm", norms[step], norm, norm * if step < 2 { 1e-4 } else { 1e-3 });
            // The golden rates are rounded to nine digits; the schedule of transformers is known exactly.
            close("learning rate", rates[step], floats(&expected["lrs"])[step], 5e-12);
            let share = (step as f64 / 2.0).min((5 - step) as f64 / 3.0);
            close("learning rate", rates[step], expected["lr"].as_f64().unwrap() * share, 1e-17);
        }
        assert_eq!(metrics[0]["targets"], expected["total_supervised"]);
        // The sixth loss is that of the saved weights.
        let eval = dir.suasion(&["eval", "-D", "rows.jsonl", "--json", "--quiet", "-M", &out]);
        let loss = eval.set(&["max_length=null"]).ok().json()["loss"].as_f64().unwrap();
        assert!((loss - golden_losses[5]).abs() <= 5e-4, "{model}: {loss} is not {}", golden_losses[5]);
    }
}

#[test]
fn trajectories_are_those_of_transformers() {
    for model in suasion_test_support::MODELS {
        trajectory(&root().join("tests/goldens/models").join(model));
    }
}

#[test]
fn trajectories_of_larger_models_are_those_of_transformers() {
    let Some(models) = material("models") else { return };
    for model in ["llama", "qwen2", "gpt2"] {
        trajectory(&models.join(model));
    }
}

/// Uses the rows and the tokenizer of the goldens, and real ones if the test material is available.
#[test]
fn training_on_text_lowers_the_held_out_loss() {
    let ours = root().join("tests/goldens");
    held_out_loss_falls(&ours, "prompt_completion.jsonl", 525, 518);
    if let Some(material) = suasion_test_support::material_folder() {
        held_out_loss_falls(&material, "cmv_prompt_completion.jsonl", 151_936, 151_645);
    }
}

/// A small Qwen2 of random weights learns from prompts and replies.
fn held_out_loss_falls(folder: &Path, data: &str, vocab_size: u32, eos: u32) {
    let tokenizer = folder.join("tokenizers/qwen2_5");
    let data = folder.join("datasets").join(data);
    let dir = Dir::new();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        dir.write(&format!("model/{name}"), std::fs::read(tokenizer.join(name)).unwrap());
    }
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": vocab_size, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": true, "initializer_range": 0.02, "eos_token_id": eos, "attention_dropout": 0.0,
        "use_sliding_window": false,
    });
    dir.write("model/config.json", config.to_string());
    let ran = dir
        .suasion(&["train", "-M", "model", "--quiet", "--json", "-D"])
        .arg(&data)
        .set(&[
            "init=random",
            "max_length=256",
            "eval_fraction=0.1",
            "per_device_train_batch_size=4",
            "max_steps=12",
            "learning_rate=3e-3",
            "lr_scheduler_type=constant",
            "save_strategy=no",
            "output_dir=out",
        ])
        .ok();
    let report = ran.json();
    let loss = |when: &str| report[when]["loss"].as_f64().unwrap();
    assert!(loss("after") < loss("before") - 0.3, "{} → {}", loss("before"), loss("after"));
}
