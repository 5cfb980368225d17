//! A job's printed plan and, after training, its result.

use super::Job;
use crate::config::Init;
use crate::inputs::loading;
use crate::machine;
use crate::tables;
use crate::ui::Ui;
use std::collections::BTreeMap;
use std::fmt::Display;
use suasion_data::Objective;
use suasion_data::prepared::Counts;
use suasion_data::report::format::{bytes, count, duration, percent, thousands};
use suasion_train::Report;

/// Width in columns of the names in the plan.
const INDENT: usize = 12;

/// Prints one line of the plan.
pub fn line(ui: &Ui, name: &str, text: impl Display) {
    ui.hang(INDENT + 1, format_args!("{name:<INDENT$} {text}"));
}

impl Job {
    /// Prints what the run will do.
    pub fn announce(&self, ui: &Ui) {
        let plan = &self.plan;
        let (config, settings) = (&self.config, &self.settings);
        let line = |name: &str, text: String| line(ui, name, text);
        let weights = match config.init {
            Init::Weights => "weights from the folder",
            Init::Random => "random weights",
        };
        line(
            "model",
            format!(
                "{}: {}, {} parameters, {weights}",
                self.folder.path.display(),
                self.arch.model_type,
                thousands(self.arch.parameter_count())
            ),
        );
        line(
            "data",
            format!(
                "{}: {}",
                self.train_rows.name.display(),
                tables::rows(&Counts::of(&self.train_rows.summary))
            ),
        );
        loading::print_findings(ui, &self.train_rows, INDENT);
        match &self.eval_rows {
            Some(rows) => {
                line(
                    "evaluation",
                    format!("{}: {}", rows.name.display(), tables::rows(&Counts::of(&rows.summary))),
                );
                loading::print_findings(ui, rows, INDENT);
            }
            None if !self.eval.is_empty() => line(
                "evaluation",
                format!(
                    "{} held out of the training rows, {} left",
                    count(plan.eval_rows, "row"),
                    thousands(plan.rows)
                ),
            ),
            None => line("evaluation", "none: no rows are held out".into()),
        }
        let objective = match self.identity.objective {
            Objective::ResponseOnly => "responses only",
            Objective::AllTokens => "ALL tokens, prompts included (completion_only_loss is false)",
        };
        line("objective", objective.into());
        line(
            "tokens",
            format!(
                "{} in {}; supervised: {} ({}); longest row {}",
                thousands(plan.tokens_per_epoch),
                count(plan.rows, "row"),
                thousands(plan.targets_per_epoch),
                percent(plan.supervised_share),
                thousands(plan.longest_row),
            ),
        );
        let unit = match (plan.packs, &self.fill) {
            (Some(packs), Some(fill)) => {
                let (packs, capacity) = (count(packs, "pack"), thousands(fill.capacity));
                line("packs", format!("{packs} of at most {capacity} tokens, {} full", percent(fill.rate())));
                "packs"
            }
            (Some(packs), None) => {
                line("packs", format!("{}, as the file has them", count(packs, "pack")));
                "packs"
            }
            _ => "rows",
        };
        let accumulation = match settings.gradient_accumulation_steps {
            1 => String::new(),
            n => format!(" × {n} micro-batches"),
        };
        line(
            "steps",
            format!(
                "{} ({:.2} epochs of {}; {} {unit}{accumulation} a step); learning rate {:e}, {}, {} of warm-up",
                thousands(plan.total_steps),
                plan.epochs,
                thousands(plan.steps_per_epoch),
                settings.per_device_train_batch_size,
                settings.learning_rate,
                settings.lr_scheduler_type,
                count(plan.warmup_steps, "step"),
            ),
        );
        let memory = self.memory();
        line(
            "memory",
            format!(
                "{} planned: parameters {}, gradients {}, optimizer {}, activations {}, scratch {}",
                bytes(memory.total()),
                bytes(memory.parameters),
                bytes(memory.gradients),
                bytes(memory.optimizer),
                bytes(memory.activations),
                bytes(memory.scratch),
            ),
        );
        if let (_, Some(available)) = machine::memory()
            && memory.total() > available
        {
            ui.warn(format_args!(
                "{} are planned and {} are available: lower per_device_train_batch_size or max_length, or set gradient_checkpointing",
                bytes(memory.total()),
                bytes(available)
            ));
        }
        let changed = config.changed();
        if !changed.is_empty() {
            let list: Vec<String> =
                changed.iter().map(|(name, value)| format!("{name}={}", plain(value))).collect();
            line("set", list.join(" "));
        }
    }

    /// The plan as JSON (`--dry-run --json`).
    pub fn to_json(&self) -> serde_json::Value {
        let memory = self.memory();
        let summary = &self.train_rows.summary;
        let dropped: BTreeMap<&str, u64> =
            summary.dropped.iter().map(|(reason, n)| (reason.name(), *n)).collect();
        serde_json::json!({
            "model_type": self.arch.model_type,
            "parameters": self.arch.parameter_count(),
            "objective": self.identity.objective,
            "rows": { "read": summary.rows, "kept": summary.kept, "cut": summary.cut, "dropped": dropped, "failed": summary.failed },
            "tokens": self.plan.tokens_per_epoch,
            "supervised_tokens": self.plan.targets_per_epoch,
            "supervised_share": self.plan.supervised_share,
            "steps": self.plan.total_steps,
            "plan": self.plan,
            "packing": self.fill.map(|fill| serde_json::json!({
                "packs": fill.packs, "capacity": fill.capacity, "fill": fill.rate(),
            })),
            "memory_bytes": {
                "total": memory.total(), "parameters": memory.parameters, "gradients": memory.gradients,
                "optimizer": memory.optimizer, "activations": memory.activations, "scratch": memory.scratch,
            },
            "output_dir": self.config.output_dir,
            "config": self.config.to_json(),
        })
    }

    /// Prints the result of the run.
    pub fn farewell(&self, report: &Report, ui: &Ui) -> anyhow::Result<()> {
        if ui.json {
            return ui.print_json(report);
        }
        let dir = report.output_dir.display();
        if report.interrupted {
            ui.log(format_args!(
                "interrupted after step {} of {}; continue with: suasion train --resume {dir}",
                report.step, report.total_steps
            ));
            return Ok(());
        }
        if let (Some(before), Some(after)) = (&report.before, &report.after) {
            ui.log(format_args!(
                "held-out loss: {:.4} before training, {:.4} after (perplexity {:.2} → {:.2}, {} targets)",
                before.loss,
                after.loss,
                before.perplexity,
                after.perplexity,
                thousands(after.targets)
            ));
        }
        let memory =
            report.peak_memory_bytes.map(|b| format!(", peak memory {}", bytes(b))).unwrap_or_default();
        ui.log(format_args!(
            "done: {} in {}, {} targets of {} tokens{memory}",
            count(report.step, "step"),
            duration(report.seconds),
            thousands(report.targets),
            thousands(report.tokens),
        ));
        ui.log(format_args!("model and report: {dir} (report.html, README.md, metrics.jsonl)"));
        Ok(())
    }
}

/// A value as `--set` takes it.
fn plain(value: &serde_json::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}
