//! `suasion env`: this machine's cores, instruction sets, memory and hub cache.

use crate::failure::Exit;
use crate::inputs::hub;
use crate::machine;
use crate::ui::Ui;
use serde::Serialize;
use std::io::Write;
use suasion_data::report::format;

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
    let (total, available) = machine::memory();
    let cache = hub::cache();
    let env = Env {
        version: env!("CARGO_PKG_VERSION"),
        target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
        cores: machine::cores(),
        instruction_sets: machine::instruction_sets(),
        memory_total_bytes: total,
        memory_available_bytes: available,
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
    writeln!(
        out,
        "hub cache          {}{}",
        env.hub_cache,
        if env.hub_cache_exists { "" } else { " (does not exist)" }
    )?;
    out.flush()?;
    Ok(Exit::Done)
}
