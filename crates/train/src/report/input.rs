//! Everything that the reports show.

use crate::evaluate::SECTIONS;
use crate::report::data::{DataCard, SampleReply};
use crate::{Comparison, Evaluation, Identity, Report, Settings};
use suasion_data::Objective;
use suasion_data::report::format::{bytes, duration, percent, thousands};

/// Everything that the reports show.
pub(crate) struct Input<'a> {
    pub report: &'a Report,
    pub settings: &'a Settings,
    pub identity: &'a Identity,
    pub card: &'a DataCard,
    pub replies: &'a [SampleReply],
    pub comparison: Option<&'a Comparison>,
}

impl Input<'_> {
    pub(crate) fn title(&self) -> String {
        match (self.card.title.as_str(), self.card.base_model.rsplit(['/', '\\']).next().unwrap_or("")) {
            ("", "") => "A model trained with suasion".to_string(),
            ("", base) => format!("{base}-suasion"),
            (title, _) => title.to_string(),
        }
    }

    pub(crate) fn objective(&self) -> &'static str {
        match self.identity.objective {
            Objective::ResponseOnly => {
                "responses only: the loss is taken on responses and their stop tokens, never on the prompt"
            }
            Objective::AllTokens => {
                "all tokens: the loss is taken on the prompts too, so the model has learned them"
            }
        }
    }

    /// The run in name and value.
    pub(crate) fn facts(&self) -> Vec<(&'static str, String)> {
        let (report, card) = (self.report, self.card);
        let mut facts = vec![
            ("Objective", self.objective().to_string()),
            ("Base model", card.base_model.clone()),
            ("Parameters", thousands(report.parameters)),
            ("Training data", card.data.join(", ")),
            ("Held-out data", card.eval_data.join(", ")),
            ("Data fingerprint", self.identity.data_fingerprint.clone()),
            ("Labelling rules", format!("version {}", self.identity.masking_version)),
            (
                "Rows",
                format!(
                    "{} read, {} trained on ({} of them cut), {} dropped, {} failed, {} held out",
                    thousands(card.rows_read),
                    thousands(card.rows_kept),
                    thousands(card.rows_cut),
                    thousands(card.rows_dropped),
                    thousands(card.rows_failed),
                    thousands(card.eval_rows)
                ),
            ),
            (
                "Supervised tokens",
                format!(
                    "{} of {}{}",
                    thousands(card.supervised_tokens),
                    thousands(card.tokens),
                    match card.tokens {
                        0 => String::new(),
                        tokens => format!(" ({})", percent(card.supervised_tokens as f64 / tokens as f64)),
                    }
                ),
            ),
            ("Steps", format!("{} ({:.2} epochs)", thousands(report.step), report.epoch)),
            (
                "Learned from",
                format!("{} targets in {} tokens", thousands(report.targets), thousands(report.tokens)),
            ),
            ("Training time", duration(report.seconds)),
        ];
        if report.final_step != report.step {
            facts.push(("Weights", format!("of step {}, the lowest evaluation loss", report.final_step)));
        }
        if let Some(peak) = report.peak_memory_bytes {
            facts.push(("Peak memory", bytes(peak)));
        }
        facts.retain(|(_, value)| !value.is_empty());
        facts
    }

    /// Loss per section before and after training: `(section, tokens, before, after)`.
    pub(crate) fn section_losses(&self) -> Vec<(String, u64, Option<f64>, Option<f64>)> {
        let of = |evaluation: &Option<Evaluation>, name: &str| {
            evaluation.as_ref().and_then(|evaluation| evaluation.sections.get(name).copied())
        };
        SECTIONS
            .iter()
            .filter_map(|name| {
                let (before, after) = (of(&self.report.before, name), of(&self.report.after, name));
                let tokens = after.or(before)?.targets;
                Some((name.to_string(), tokens, before.map(|s| s.loss), after.map(|s| s.loss)))
            })
            .collect()
    }
}
