//! `suasion env`: what this machine has.

use crate::failure::Exit;
use crate::hub;
use crate::ui::{self, Ui};
use serde::Serialize;
use std::io::Write;

#[derive(Serialize)]
struct Env {
    version: &'static str,
    target: String,
    cores: usize,
    instruction_sets: Vec<&'static str>,
    memory_total_bytes: Option<u64>,
    memory_available_bytes: Option<u64>,
    hub_cache: String,
    hub_cache_exists: bool,
}

/// Runs the command.
pub fn run(ui: &Ui) -> anyhow::Result<Exit> {
    let (total, available) = memory();
    let cache = hub::cache();
    let env = Env {
        version: env!("CARGO_PKG_VERSION"),
        target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
        cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
        instruction_sets: instruction_sets(),
        memory_total_bytes: total,
        memory_available_bytes: available,
        hub_cache_exists: cache.is_dir(),
        hub_cache: cache.display().to_string(),
    };
    if ui.json {
        ui.print_json(&env)?;
        return Ok(Exit::Done);
    }
    let shown = |bytes: Option<u64>| bytes.map_or("unknown".to_string(), ui::bytes);
    let mut out = ui.out();
    writeln!(out, "suasion            {}", env.version)?;
    writeln!(out, "target             {}", env.target)?;
    writeln!(out, "cores              {}", env.cores)?;
    writeln!(out, "instruction sets   {}", env.instruction_sets.join(" "))?;
    writeln!(out, "memory             {} ({} available)", shown(total), shown(available))?;
    writeln!(
        out,
        "hub cache          {}{}",
        env.hub_cache,
        if env.hub_cache_exists { "" } else { " (not there)" }
    )?;
    out.flush()?;
    Ok(Exit::Done)
}

/// The instruction sets that matter to the kernels, as found at run time.
fn instruction_sets() -> Vec<&'static str> {
    #[cfg(any(target_arch = "x86_64", target_arch = "x86"))]
    {
        macro_rules! found {
            ($($name:tt),+) => { [$(($name, std::arch::is_x86_feature_detected!($name))),+] };
        }
        let all =
            found!("sse4.2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vnni", "avx512bf16");
        all.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect()
    }
    #[cfg(target_arch = "aarch64")]
    {
        macro_rules! found {
            ($($name:tt),+) => { [$(($name, std::arch::is_aarch64_feature_detected!($name))),+] };
        }
        found!("neon", "fp16", "bf16", "i8mm", "sve")
            .into_iter()
            .filter(|(_, has)| *has)
            .map(|(name, _)| name)
            .collect()
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "x86", target_arch = "aarch64")))]
    {
        Vec::new()
    }
}

/// Total and available memory where the system says (Linux).
pub fn memory() -> (Option<u64>, Option<u64>) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
    };
    (field("MemTotal"), field("MemAvailable"))
}
