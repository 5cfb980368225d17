//! A job's printed plan and, after training, its result.

use super::Job;
use super::estimate::Needs;
use crate::config::Init;
use crate::failure::Failure;
use crate::inputs::loading;
use crate::inputs::weights::needed;
use crate::machine;
use crate::tables;
use crate::ui::Ui;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::Write as _;
use suasion_data::Objective;
use suasion_data::prepared::Counts;
use suasion_data::report::format::{bytes, count, duration, loss, percent, perplexity, thousands};
use suasion_data::report::printable;
use suasion_train::Report;

/// Width in columns of the names in the plan.
const INDENT: usize = 12;

/// A line of the plan.
fn line(name: &str, text: impl Display) -> String {
    format!("{name:<INDENT$} {text}")
}

impl Job {
    /// Prints what the run will do. Findings are warned of, also when quiet.
    pub fn announce(&self, ui: &Ui) {
        for line in self.lines() {
            ui.hang(INDENT + 1, line);
        }
        self.warn(ui);
    }

    /// Prints the plan of a dry run, a result.
    pub fn print(&self, ui: &Ui) -> anyhow::Result<()> {
        let needs = Needs::of(self);
        if ui.json {
            self.lines().into_iter().for_each(|line| ui.hang(INDENT + 1, line));
            ui.print_json(&self.to_json(&needs))?;
        } else {
            let mut out = ui.out();
            for line in self.lines() {
                writeln!(out, "{}", printable(&line))?;
            }
            let disk = match needs.checkpoints {
                0 => "the final model, no checkpoint".into(),
                n => {
                    format!("the final model, and {} of {}", count(n, "checkpoint"), bytes(needs.checkpoint))
                }
            };
            writeln!(out, "{}", line("disk", format!("{}: {disk}", bytes(needs.disk))))?;
            let time = match needs.seconds {
                Some(seconds) => {
                    format!("about {} for the steps, by the speed of a small model here", duration(seconds))
                }
                None => "not known".into(),
            };
            writeln!(out, "{}", line("time", time))?;
            out.flush()?;
        }
        self.warn(ui);
        // A run that is not dry prints these itself.
        for warning in self.plan.warnings.iter().chain(&self.arch.not_applied) {
            ui.warn(warning);
        }
        Ok(())
    }

    /// Warns of what the plan's lines do not show, or must be seen even if they are not printed.
    fn warn(&self, ui: &Ui) {
        for rows in std::iter::once(&self.train_rows).chain(&self.eval_rows) {
            loading::print_findings(ui, rows, INDENT);
        }
        let bytes_needed = needed(&self.arch, &self.memory()).saturating_mul(self.begin.team.local as u64);
        if let (None, (_, Some(available))) = (self.on, machine::memory())
            && bytes_needed > available
        {
            ui.warn(format_args!(
                "{} are needed and {} are available: lower per_device_train_batch_size or max_length, or set gradient_checkpointing",
                bytes(bytes_needed),
                bytes(available)
            ));
        }
    }

    /// The plan, line by line.
    fn lines(&self) -> Vec<String> {
        let plan = &self.plan;
        let (config, settings) = (&self.config, &self.settings);
        let lines = std::cell::RefCell::new(Vec::new());
        let line = |name: &str, text: String| lines.borrow_mut().push(line(name, text));
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
        if let Some(added) = self.arch.added {
            line(
                "vocabulary",
                format!(
                    "{} rows of embedding and head for {} in the files; {} added around their mean",
                    thousands(self.arch.vocab_size as u64),
                    thousands(added.base as u64),
                    thousands((self.arch.vocab_size - added.base) as u64),
                ),
            );
        }
        if let Some(trained) = self.trained() {
            line("trained", format!("{} of these parameters; the others are frozen", thousands(trained)));
        }
        line(
            "data",
            format!(
                "{}: {}",
                self.train_rows.name.display(),
                tables::rows(&Counts::of(&self.train_rows.summary))
            ),
        );
        match &self.eval_rows {
            Some(rows) => {
                line(
                    "evaluation",
                    format!("{}: {}", rows.name.display(), tables::rows(&Counts::of(&rows.summary))),
                );
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
        if let Some(adapter) = &self.opened.adapter {
            let (lora, trained) = (&adapter.lora, self.memory().gradients / 4);
            let name = if lora.dora { "DoRA" } else { "LoRA" };
            let from = match &adapter.from {
                Some(from) => format!("that of {}", from.display()),
                None => "a new one".into(),
            };
            let share = trained as f64 / self.arch.parameter_count() as f64;
            line(
                "adapter",
                format!(
                    "{name}, {from}: rank {}, alpha {}, dropout {}; {} trained parameters ({} of the model's)",
                    lora.rank,
                    lora.alpha,
                    lora.dropout,
                    thousands(trained),
                    percent(share),
                ),
            );
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
        let ranks = match plan.ranks {
            1 => String::new(),
            n => format!(" × {n} ranks"),
        };
        line(
            "steps",
            format!(
                "{} ({:.2} epochs of {}; {} {unit}{accumulation}{ranks} a step); learning rate {:e}, {}, {} of warm-up",
                thousands(plan.total_steps),
                plan.epochs,
                thousands(plan.steps_per_epoch),
                settings.per_device_train_batch_size,
                settings.learning_rate,
                settings.lr_scheduler_type,
                count(plan.warmup_steps, "step"),
            ),
        );
        if let Some(card) = self.on {
            line("device", format!("cuda:{}, {} (experimental)", card.number, card.name));
        }
        let memory = self.memory();
        let each = if plan.ranks > 1 { " on each rank" } else { "" };
        let mapped = match (memory.mapped, self.on) {
            (0, _) => String::new(),
            (mapped, None) => format!(" and {} read in the base's files", bytes(mapped)),
            (mapped, Some(_)) => format!(" and {} of the base's files", bytes(mapped)),
        };
        let copies = match memory.copies {
            0 => String::new(),
            copies => format!(" (and {} of bf16 copies)", bytes(copies)),
        };
        let packed = match (memory.packed, self.arch.packed.or(settings.packing())) {
            (packed, Some(packing)) => format!(", {} in {} bits", bytes(packed), packing.bits()),
            _ => String::new(),
        };
        line(
            "memory",
            format!(
                "{} planned{each}: parameters {}{copies}{packed}{mapped}, gradients {}, optimizer {}, activations {}, scratch {}",
                bytes(self.on_card.unwrap_or_else(|| memory.total())),
                bytes(memory.parameters),
                bytes(memory.gradients),
                bytes(memory.optimizer),
                bytes(memory.activations),
                bytes(memory.scratch),
            ),
        );
        let changed = config.changed();
        if !changed.is_empty() {
            let list: Vec<String> =
                changed.iter().map(|(name, value)| format!("{name}={}", plain(value))).collect();
            line("set", list.join(" "));
        }
        line("output", config.output_dir.display().to_string());
        if let Some(checkpoint) = &self.checkpoint {
            line("continues", checkpoint.display().to_string());
        }
        lines.into_inner()
    }

    /// The plan as JSON (`--dry-run --json`).
    fn to_json(&self, needs: &Needs) -> serde_json::Value {
        let memory = self.memory();
        let summary = &self.train_rows.summary;
        let dropped: BTreeMap<&str, u64> =
            summary.dropped.iter().map(|(reason, n)| (reason.name(), *n)).collect();
        serde_json::json!({
            "model_type": self.arch.model_type,
            "parameters": self.arch.parameter_count(),
            "trained_parameters": memory.gradients / 4,
            "device": self.on.map_or("cpu".to_string(), |card| format!("cuda:{}", card.number)),
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
                "total": memory.total(), "parameters": memory.parameters, "copies": memory.copies, "packed": memory.packed,
                "mapped": memory.mapped, "gradients": memory.gradients,
                "optimizer": memory.optimizer, "activations": memory.activations, "scratch": memory.scratch,
            },
            "disk_bytes": {
                "total": needs.disk, "checkpoint": needs.checkpoint, "checkpoints": needs.checkpoints,
            },
            "seconds": needs.seconds,
            "output_dir": self.config.output_dir,
            "config": self.config.to_json(),
        })
    }

    /// Prints the result of the run.
    ///
    /// # Errors
    /// If it was stopped because it diverged.
    pub fn farewell(&self, report: &Report, ui: &Ui) -> anyhow::Result<()> {
        if ui.json {
            ui.print_json(report)?;
        }
        if let Some(divergence) = report.diverged.filter(|divergence| divergence.stopped) {
            let kept = report
                .checkpoint
                .as_deref()
                .map(|path| format!("; the newest checkpoint is {}", path.display()));
            return Err(Failure::run_time(
                "E-DIVERGED",
                divergence.to_string(),
                format!(
                    "lower learning_rate, warm up (warmup_ratio=0.03), or clip with max_grad_norm; \
                     stop_on_divergence=false trains on{}",
                    kept.unwrap_or_default()
                ),
            )
            .into());
        }
        if ui.json {
            return Ok(());
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
                "held-out loss: {} before training, {} after (perplexity {} → {}, {} targets)",
                loss(before.loss),
                loss(after.loss),
                perplexity(before.perplexity),
                perplexity(after.perplexity),
                thousands(after.targets)
            ));
        }
        if report.stopped_early {
            ui.log(format_args!(
                "ended early, after step {} of {}: {} in a row were not better (early_stopping_patience)",
                report.step,
                report.total_steps,
                count(self.settings.early_stopping_patience.unwrap_or(0), "evaluation"),
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
