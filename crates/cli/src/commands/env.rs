//! `suasion env`: this machine's cores, instruction sets, memory, cards and hub cache.

use crate::failure::Exit;
use crate::inputs::{device, hub};
use crate::machine;
use crate::ui::Ui;
use serde::Serialize;
use std::io::Write;
use suasion_data::report::format;
use suasion_engine::kernels::cuda::found::Card;
use suasion_engine::kernels::cuda::nccl;

#[derive(Serialize)]
struct Env {
    version: &'static str,
    target: String,
    cores: usize,
    instruction_sets: Vec<&'static str>,
    memory_total_bytes: Option<u64>,
    memory_available_bytes: Option<u64>,
    cuda: Cuda,
    hub_cache: String,
    hub_cache_exists: bool,
}

/// NVIDIA's cards and libraries.
#[derive(Serialize)]
struct Cuda {
    /// The newest CUDA version that the driver supports.
    driver: Option<String>,
    cublas: bool,
    /// The version of NCCL, which ranks on cards need.
    nccl: Option<String>,
    /// Why there is none.
    nccl_problem: Option<String>,
    cards: Vec<Shown>,
    /// Why `device=cuda` is refused, and what to do about it.
    problem: Option<String>,
    help: Option<String>,
}

/// A card.
#[derive(Serialize)]
struct Shown {
    device: String,
    name: String,
    compute_capability: String,
    memory_total_bytes: u64,
    memory_free_bytes: Option<u64>,
    problem: Option<String>,
}

impl Cuda {
    fn look() -> Cuda {
        let found = device::found();
        let version = |(major, minor): (u32, u32)| format!("{major}.{minor}");
        let shown = |card: &Card| {
            let free = card.problem.is_none().then(|| card.free_memory()).transpose();
            let refused = free.as_ref().err().map(ToString::to_string);
            Shown {
                device: format!("cuda:{}", card.number),
                name: card.name.clone(),
                compute_capability: version(card.compute),
                memory_total_bytes: card.memory,
                problem: card.problem.as_ref().map(|problem| problem.message.clone()).or(refused),
                memory_free_bytes: free.ok().flatten(),
            }
        };
        let error = found.card(None).err();
        let nccl = nccl::version();
        Cuda {
            nccl: nccl.as_ref().ok().map(ToString::to_string),
            nccl_problem: nccl.err().map(|problem| problem.message),
            driver: found.driver.map(version),
            cublas: found.cublas,
            cards: found.cards.iter().map(shown).collect(),
            problem: error.as_ref().map(ToString::to_string),
            help: error.as_ref().and_then(|error| error.help()).map(str::to_string),
        }
    }

    /// Lines below each other.
    fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if let Some(driver) = &self.driver {
            let cublas = if self.cublas { "found" } else { "not found" };
            lines.push(format!("driver for CUDA {driver}, cuBLASLt {cublas}"));
        }
        for card in &self.cards {
            let free = card
                .memory_free_bytes
                .map_or(String::new(), |free| format!(" ({} free)", format::bytes(free)));
            let problem = card.problem.as_ref().map_or(String::new(), |problem| format!(": {problem}"));
            lines.push(format!(
                "{} {}, compute capability {}, {}{free}{problem}",
                card.device,
                card.name,
                card.compute_capability,
                format::bytes(card.memory_total_bytes),
            ));
        }
        lines.extend(self.problem.iter().map(|problem| format!("not usable: {problem}")));
        lines.extend(self.help.iter().map(|help| format!("help: {help}")));
        match (&self.nccl, &self.nccl_problem) {
            (Some(version), _) => lines.push(format!("NCCL {version}, for ranks on cards")),
            (None, Some(problem)) if self.driver.is_some() => {
                lines.push(format!("no ranks on cards: {problem}"))
            }
            _ => {}
        }
        lines
    }
}

/// Runs the command.
pub fn run(ui: &Ui) -> anyhow::Result<Exit> {
    let (total, available) = machine::memory();
    let cache = hub::cache();
    let env = Env {
        version: env!("CARGO_PKG_VERSION"),
        target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
        cores: machine::cores(),
        instruction_sets: machine::instruction_sets(),
        memory_total_bytes: total,
        memory_available_bytes: available,
        cuda: Cuda::look(),
        hub_cache_exists: cache.is_dir(),
        hub_cache: cache.display().to_string(),
    };
    if ui.json {
        ui.print_json(&env)?;
        return Ok(Exit::Done);
    }
    let shown = |bytes: Option<u64>| bytes.map_or("unknown".to_string(), format::bytes);
    let mut out = ui.out();
    writeln!(out, "suasion            {}", env.version)?;
    writeln!(out, "target             {}", env.target)?;
    writeln!(out, "cores              {}", env.cores)?;
    writeln!(out, "instruction sets   {}", env.instruction_sets.join(" "))?;
    writeln!(out, "memory             {} ({} available)", shown(total), shown(available))?;
    for (n, line) in env.cuda.lines().iter().enumerate() {
        writeln!(out, "{:<18} {line}", if n == 0 { "NVIDIA cards" } else { "" })?;
    }
    writeln!(
        out,
        "hub cache          {}{}",
        env.hub_cache,
        if env.hub_cache_exists { "" } else { " (does not exist)" }
    )?;
    out.flush()?;
    Ok(Exit::Done)
}
