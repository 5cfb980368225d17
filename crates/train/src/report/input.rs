//! What the reports show, independent of their format.

use crate::evaluate::SECTIONS;
use crate::json::pretty;
use crate::report::data::{DataCard, SampleReply};
use crate::{Comparison, Evaluation, Identity, Report, Settings};
use std::borrow::Cow;
use suasion_data::Objective;
use suasion_data::report::format::{bytes, duration, percent, thousands};

/// The inputs of the reports.
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
                "responses only: the loss covers responses and their stop tokens, never the prompts"
            }
            Objective::AllTokens => {
                "all tokens: the loss covers the prompts too, so the model has learned them"
            }
        }
    }

    /// The facts of the run, as names and values.
    pub(crate) fn facts(&self) -> Vec<(&'static str, String)> {
        let (report, card) = (self.report, self.card);
        let mut facts = vec![
            ("Objective", self.objective().to_string()),
            ("Base model", card.base_model.clone()),
            ("Start", card.start.clone()),
            ("Parameters", thousands(report.parameters)),
            ("Training data", card.data.join(", ")),
            ("Held-out data", card.eval_data.join(", ")),
            ("Data fingerprint", self.identity.data_fingerprint.clone()),
            ("Labelling rules", format!("version {}", self.identity.masking_version)),
            (
                "Rows",
                format!(
                    "{} read, {} trained on ({} of them truncated), {} dropped, {} failed, {} held out",
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
                "Learned",
                format!("{} targets in {} tokens", thousands(report.targets), thousands(report.tokens)),
            ),
            ("Training time", duration(report.seconds)),
        ];
        if report.final_step != report.step {
            facts
                .push(("Weights", format!("of step {}, with the lowest evaluation loss", report.final_step)));
        }
        if let Some(peak) = report.peak_memory_bytes {
            facts.push(("Peak memory", bytes(peak)));
        }
        facts.retain(|(_, value)| !value.is_empty());
        facts
    }

    /// Held-out losses before and after training: of all targets, then per section; empty without
    /// evaluations.
    pub(crate) fn losses(&self) -> Vec<Losses> {
        let Report { before, after, .. } = self.report;
        let Some(measured) = after.as_ref().or(before.as_ref()) else { return Vec::new() };
        let of = |evaluation: &Option<Evaluation>| evaluation.as_ref().map(|evaluation| evaluation.loss);
        let mut losses = vec![Losses {
            name: "all targets",
            tokens: measured.targets,
            before: of(before),
            after: of(after),
        }];
        losses.extend(SECTIONS.into_iter().filter_map(|name| {
            let of = |evaluation: &Option<Evaluation>| evaluation.as_ref()?.sections.get(name).copied();
            let (before, after) = (of(before), of(after));
            let tokens = after.or(before)?.targets;
            Some(Losses { name, tokens, before: before.map(|s| s.loss), after: after.map(|s| s.loss) })
        }));
        losses
    }

    /// The configuration, and the language it is written in.
    pub(crate) fn configuration(&self) -> (&'static str, Cow<'_, str>) {
        match self.card.configuration.as_str() {
            "" => ("json", String::from_utf8_lossy(&pretty(self.settings)).into_owned().into()),
            yaml => ("yaml", yaml.into()),
        }
    }
}

/// Held-out losses of some tokens.
pub(crate) struct Losses {
    pub name: &'static str,
    pub tokens: u64,
    pub before: Option<f64>,
    pub after: Option<f64>,
}
