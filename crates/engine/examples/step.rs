//! One training step of the spike's model, timed: 12 layers of 576, vocabulary 49152, 2 × 512 tokens with
//! the last 20 % supervised. Prints one JSON line, as `../shared/spike/step.py` does for PyTorch.
//!
//! usage: step STEPS [all|supervised] [recompute]

use std::time::Instant;
use suasion_engine::{AdamW, Architecture, Batch, Budget, Cpu, Model};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let steps: usize = arguments.first().map_or(Ok(5), |s| s.parse())?;
    let all = arguments.iter().any(|a| a == "all");
    let recompute = arguments.iter().any(|a| a == "recompute");
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 12,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
        "tie_word_embeddings": true, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu"
    });
    let arch = Architecture::from_json(&config, std::path::Path::new("config.json"))?;

    let mut state = 12345u32;
    let mut id = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state % 49152
    };
    let (rows, length) = (2, 512usize);
    let mut batch = Batch::default();
    for _ in 0..rows {
        let ids: Vec<u32> = (0..length).map(|_| id()).collect();
        let first = if all { 1 } else { length * 8 / 10 };
        batch.push(&ids, (first..length).map(|i| (i as u32 - 1, ids[i], 1.0)));
    }
    let budget = Budget { tokens: rows * length, targets: batch.targets.len(), train: true, recompute };
    let mut model = Model::new(arch, Cpu::new(), budget)?;
    model.init_random(0)?;

    let scale = (1.0 / batch.weight()) as f32;
    let (mut forward, mut total) = (Vec::new(), Vec::new());
    let mut loss = 0.0;
    for t in 0..=steps as u64 {
        let start = Instant::now();
        model.zero_gradients();
        let losses = model.accumulate(&batch, scale)?;
        let outcomes = model.read_losses(&losses)?;
        let computed = start.elapsed().as_secs_f64();
        model.adamw(&AdamW { t: t + 1, lr: 1e-4, ..AdamW::default() })?;
        if t > 0 {
            forward.push(computed);
            total.push(start.elapsed().as_secs_f64());
        }
        loss = outcomes.iter().map(|o| o.nll as f64).sum::<f64>() / outcomes.len() as f64;
    }
    let name = if all { "suasion-all" } else { "suasion-supervised" };
    println!(
        "{}",
        serde_json::json!({
            "impl": name, "recompute": recompute, "fwd_bwd": forward, "tot": total, "loss": loss,
            "targets": batch.targets.len(), "planned_mb": model.plan().total() >> 20, "rss_mb": peak_rss_mb(),
        })
    );
    Ok(())
}

/// Peak resident size reported by the kernel, in MiB; 0 if unavailable.
fn peak_rss_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) >> 10
}
