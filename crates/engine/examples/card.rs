//! Training steps of a model of a published shape with random weights, timed on a card. Prints one JSON line, as
//! `benches/gpu_torch.py` does for PyTorch; `benches/gpu.sh` runs both.
//!
//! usage: card SHAPE MODE ROWS [STEPS] [FOLDER]
//!   SHAPE   tiny, qwen2.5-0.5b, qwen2.5-1.5b, qwen3-8b
//!   MODE    full or lora, then -all, -20 (per cent of each row supervised) or -shared (8 replies to one prompt)
//!   ROWS    sequences of 1024 tokens in a step
//!   FOLDER  where a base for lora is written (default: the system's folder for temporary files)
//!
//! `SUASION_PRECISION` is bf16 (default), tf32 or f32; `SUASION_RECOMPUTE` recomputes activations, and
//! `SUASION_NO_GRAPHS` runs passes without CUDA graphs. `used_bytes` is reported by the driver and includes its own
//! memory; `peak_bytes` is the peak allocation, and `planned_bytes` its planned value.

use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;
use suasion_engine::kernels::cuda::found::Found;
use suasion_engine::params::ParameterMap;
use suasion_engine::{
    AdamW, Architecture, Base, Batch, Budget, CardRun, Cuda, Lora, Model, Precision, Targets, Trainable,
};

type Error = Box<dyn std::error::Error>;

const LENGTH: usize = 1024;

fn shape(name: &str) -> Result<Value, Error> {
    let (kind, hidden, inside, layers, heads, kv_heads, head_dim, vocab, tied) = match name {
        "tiny" => ("qwen2", 128, 256, 2, 4, 2, 32, 512, true),
        "qwen2.5-0.5b" => ("qwen2", 896, 4864, 24, 14, 2, 64, 151_936, true),
        "qwen2.5-1.5b" => ("qwen2", 1536, 8960, 28, 12, 2, 128, 151_936, true),
        "qwen3-8b" => ("qwen3", 4096, 12_288, 36, 32, 8, 128, 151_936, false),
        _ => return Err(format!("no shape {name}").into()),
    };
    Ok(json!({
        "model_type": kind, "hidden_size": hidden, "intermediate_size": inside, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab,
        "tie_word_embeddings": tied, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "rope_theta": 1e6
    }))
}

/// Pseudo-random numbers (xorshift).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Writes the weights in bf16: uniform within ±0.035, norms 1.
fn write_base(arch: &Architecture, folder: &Path) -> Result<PathBuf, Error> {
    let dir = folder.join(format!("suasion-card-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let parameters = ParameterMap::of(arch).parameters;
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for p in &parameters {
        let start = end;
        end += 2 * p.shape.iter().product::<usize>();
        let entry = json!({"dtype": "BF16", "shape": p.shape, "data_offsets": [start, end]});
        header.insert(p.name.clone(), entry);
    }
    let header = serde_json::to_vec(&header)?;
    let mut file =
        std::io::BufWriter::with_capacity(8 << 20, std::fs::File::create(dir.join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for p in &parameters {
        let norm = p.shape.len() == 1 && p.name.ends_with("norm.weight");
        for _ in 0..p.shape.iter().product::<usize>() {
            // Exponents of 2⁻⁵ to 2⁻⁸, either sign.
            let word = numbers.next();
            let bits =
                if norm { 0x3f80 } else { (word as u16 & 0x807f) | ((0x77 + (word >> 32 & 3)) as u16) << 7 };
            file.write_all(&bits.to_le_bytes())?;
        }
    }
    file.flush()?;
    Ok(dir)
}

/// Rows of [`LENGTH`] tokens, with the last share supervised; or groups of eight replies to one prompt.
fn batch(vocab: u64, rows: usize, kind: &str) -> Result<Batch, Error> {
    let mut numbers = Numbers(1);
    let mut ids = |n: usize| -> Vec<u32> { (0..n).map(|_| (numbers.next() % vocab) as u32).collect() };
    let mut batch = Batch::default();
    let first = match kind {
        "all" => 1,
        "20" | "shared" => LENGTH * 8 / 10,
        _ => return Err(format!("no mode -{kind}").into()),
    };
    let mut prompt = 0..0;
    for row in 0..rows {
        if kind != "shared" || row % 8 == 0 {
            let start = batch.tokens() as u32;
            let all = ids(if kind == "shared" { first } else { LENGTH });
            let targets = if kind == "shared" { 0..0 } else { first..LENGTH };
            batch.push(&all, targets.map(|i| (i as u32 - 1, all[i], 1.0)));
            prompt = start..batch.tokens() as u32;
        }
        if kind == "shared" {
            let (start, reply) = (batch.tokens() as u32, ids(LENGTH - first));
            batch.push_after(prompt.clone(), &reply, (1..reply.len()).map(|i| (i as u32 - 1, reply[i], 1.0)));
            let row = prompt.end - 1;
            batch.targets.push(suasion_engine::Target { row, id: batch.ids[start as usize], weight: 1.0 });
        }
    }
    Ok(batch)
}

fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, mode, rows, rest @ ..] = &arguments[..] else {
        return Err("usage: card SHAPE MODE ROWS [STEPS] [FOLDER]".into());
    };
    let (way, kind) = mode.split_once('-').ok_or("MODE is full-… or lora-…")?;
    let steps: u64 = rest.first().map_or(Ok(8), |steps| steps.parse())?;
    let folder = rest.get(1).map_or_else(std::env::temp_dir, PathBuf::from);
    let arch = Architecture::from_json(&shape(name)?, Path::new("config.json"))?;
    let batch = batch(arch.vocab_size as u64, rows.parse()?, kind)?;

    let found = Found::look();
    let card = found.card(None)?;
    let precision = match std::env::var("SUASION_PRECISION").as_deref() {
        Ok("f32") => Precision::F32,
        Ok("tf32") => Precision::Tf32,
        _ => Precision::Bf16,
    };
    let before = card.free_memory()?;
    let recompute = std::env::var_os("SUASION_RECOMPUTE").is_some();
    let budget = Budget { tokens: batch.tokens(), targets: batch.targets.len(), train: true, recompute };
    let graphs = std::env::var_os("SUASION_NO_GRAPHS").is_none();
    let cuda = Cuda::open(card, precision)?.with_graphs(graphs);
    fn of(trainable: &Trainable, precision: Precision, graphs: bool) -> CardRun<'_> {
        CardRun { graphs, ..CardRun::new(trainable, Base::Mapped, precision) }
    }
    let (mut model, planned) = match way {
        "full" => {
            let mut model = Model::new(arch.clone(), cuda, budget)?;
            model.init_random(0)?;
            (model, of(&Trainable::All, precision, graphs).memory(&arch, budget)?)
        }
        "lora" => {
            let names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
            let targets = Targets::Names(names.map(String::from).into());
            let lora = Trainable::Adapter(Lora { rank: 16, alpha: 32.0, targets, ..Lora::default() });
            let mut model = Model::with_base(arch.clone(), cuda, budget, &lora, Base::Mapped)?;
            let dir = write_base(&arch, &folder)?;
            let loaded = model.load_weights(&dir);
            std::fs::remove_dir_all(&dir)?;
            loaded?;
            model.init_adapter(0)?;
            (model, of(&lora, precision, graphs).memory(&arch, budget)?)
        }
        _ => return Err(format!("no mode {way}-").into()),
    };
    let scale = (1.0 / batch.weight()) as f32;
    let (mut seconds, mut losses) = (Vec::new(), Vec::new());
    for t in 0..steps + 2 {
        let start = Instant::now();
        model.zero_gradients();
        let pending = model.accumulate(&batch, scale)?;
        let norm = model.gradient_norm()?;
        let gradient_scale = (1.0 / (norm + 1e-6)).min(1.0) as f32;
        model.adamw(&AdamW { t: t + 1, lr: 1e-4, decay_all: false, gradient_scale, ..AdamW::default() })?;
        let outcomes = model.read_losses(&pending)?;
        losses.push(outcomes.iter().map(|o| f64::from(o.nll)).sum::<f64>() / outcomes.len() as f64);
        if t >= 2 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    let used = before.saturating_sub(card.free_memory()?);
    let usage = model.backend().usage();
    seconds.sort_by(f64::total_cmp);
    let median = seconds[seconds.len() / 2];
    println!(
        "{}",
        json!({
            "impl": format!("suasion {precision:?}"), "card": card.name, "shape": name, "mode": mode, "tokens": batch.tokens(),
            "targets": batch.targets.len(), "recompute": recompute, "seconds": seconds, "median": median,
            "tokens_per_second": batch.tokens() as f64 / median, "losses": losses,
            "graphs": graphs, "replays": usage.replays, "changes": usage.changes, "waits": usage.waits,
            "used_bytes": used, "peak_bytes": usage.peak, "planned_bytes": planned,
        })
    );
    Ok(())
}
