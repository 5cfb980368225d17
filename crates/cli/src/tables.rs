//! Results as tables of text.

use std::fmt::Write;
use suasion_data::prepared::Counts;
use suasion_data::report::format::{count, loss, loss_difference, percent, perplexity, thousands};
use suasion_data::{DropReason, Objective};
use suasion_train::compare::{Arm, Comparison};
use suasion_train::evaluate::{Calibration, Evaluation, SectionLoss};
use suasion_train::repeats::Repeats;

/// Printed in place of a missing number, as by [`loss`].
const NONE: &str = "–";

/// `160 rows: 158 kept (3 of them cut), 2 dropped (2 longer than max_length), 0 failed`.
pub fn rows(counts: &Counts) -> String {
    let mut line = format!("{}: {} kept", count(counts.rows, "row"), thousands(counts.kept));
    if counts.cut > 0 {
        line += &format!(" ({} of them cut)", thousands(counts.cut));
    }
    let dropped: u64 = counts.dropped.values().sum();
    line += &format!(", {} dropped", thousands(dropped));
    if dropped > 0 {
        let meaning =
            |name: &str| DropReason::ALL.iter().find(|r| r.name() == name).map_or("", |r| r.meaning());
        let reasons: Vec<String> =
            counts.dropped.iter().map(|(name, n)| format!("{} {}", thousands(*n), meaning(name))).collect();
        line += &format!(" ({})", reasons.join(", "));
    }
    line += &format!(", {} failed", thousands(counts.failed));
    line
}

/// An objective's name in tables and progress lines.
pub fn objective(objective: Objective) -> &'static str {
    match objective {
        Objective::ResponseOnly => "response only",
        Objective::AllTokens => "all tokens",
    }
}

/// An evaluation: loss, loss per section, calibration by position.
pub fn evaluation(evaluation: &Evaluation) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{}, {}: loss {} nats, perplexity {}",
        count(evaluation.rows, "row"),
        count(evaluation.targets, "target"),
        loss(evaluation.loss),
        perplexity(evaluation.perplexity)
    );
    let _ = writeln!(out, "\n{:<14} {:>10} {:>9} {:>7}", "section", "targets", "loss", "top-1");
    for (name, section) in &evaluation.sections {
        let _ = writeln!(
            out,
            "{name:<14} {:>10} {:>9} {:>7}",
            thousands(section.targets),
            loss(section.loss),
            percent(section.top1)
        );
    }
    let _ = writeln!(
        out,
        "\n{:<14} {:>10} {:>9} {:>12} {:>7}",
        "calibration", "targets", "loss", "probability", "top-1"
    );
    let mut line = |name: &str, c: &Calibration| {
        let _ = writeln!(
            out,
            "{name:<14} {:>10} {:>9} {:>12} {:>7}",
            thousands(c.targets),
            loss(c.loss),
            c.probability.map_or(NONE.into(), |p| format!("{p:.4}")),
            c.top1.map_or(NONE.into(), percent)
        );
    };
    line("first token", &evaluation.first_token);
    line("stop", &evaluation.stop);
    for bucket in &evaluation.positions {
        let name = match bucket.to {
            Some(to) if to == bucket.from + 1 => format!("token {}", bucket.from),
            Some(to) => format!("tokens {}-{}", bucket.from, to - 1),
            None => format!("tokens {}+", bucket.from),
        };
        line(&name, &bucket.calibration);
    }
    out
}

/// A comparison of both objectives, with its verdict in lines of at most `width` columns.
pub fn comparison(comparison: &Comparison, width: usize) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{} steps each from the same weights, seed {}; measured on {} that neither has seen",
        thousands(comparison.steps),
        comparison.seed,
        count(comparison.held_out_rows, "row"),
    );
    let arms = [&comparison.before, &comparison.response_only, &comparison.all_tokens];
    let _ = writeln!(
        out,
        "\n{:<34} {:>12} {:>14} {:>12}",
        "",
        "before",
        objective(Objective::ResponseOnly),
        objective(Objective::AllTokens)
    );
    let mut line = |what: &str, value: &dyn Fn(&Arm) -> String| {
        let values = arms.map(value);
        let _ = writeln!(out, "{what:<34} {:>12} {:>14} {:>12}", values[0], values[1], values[2]);
    };
    let loss = |section: Option<&SectionLoss>| loss(section.map(|s| s.loss));
    let share = |value: Option<f64>| value.map_or(NONE.into(), percent);
    line("targets trained on", &|arm| thousands(arm.targets_trained));
    line("held-out loss: response", &|arm| loss(arm.response.as_ref()));
    line("held-out loss: prompt", &|arm| loss(arm.prompt.as_ref()));
    line("prompt reproduced (n-grams)", &|arm| share(arm.reproduction.ngram_share));
    line("training prompts reproduced", &|arm| share(arm.reproduction_train.ngram_share));
    line("seconds", &|arm| format!("{:.1}", arm.seconds));
    let sections: Vec<String> = comparison.response_only.evaluation.sections.keys().cloned().collect();
    for section in sections {
        line(&format!("  {section}"), &|arm| loss(arm.evaluation.sections.get(&section)));
    }
    out.push('\n');
    for sentence in &comparison.verdict {
        let _ = writeln!(out, "{}", crate::ui::wrap(sentence, width));
    }
    out
}

/// Comparisons from several seeds, with their verdict in lines of at most `width` columns.
pub fn repeats(repeats: &Repeats, width: usize) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{:<10} {:>14} {:>14} {:>14} {:>14}",
        "seed", "before", "response only", "all tokens", "difference"
    );
    for ((seed, run), difference) in
        repeats.seeds.iter().zip(&repeats.runs).zip(&repeats.response_difference.by_seed)
    {
        let arms = [&run.before, &run.response_only, &run.all_tokens].map(|arm| loss(arm.evaluation.loss));
        let _ = writeln!(
            out,
            "{seed:<10} {:>14} {:>14} {:>14} {:>14}",
            arms[0],
            arms[1],
            arms[2],
            loss_difference(*difference)
        );
    }
    out.push('\n');
    for sentence in &repeats.verdict {
        let _ = writeln!(out, "{}", crate::ui::wrap(sentence, width));
    }
    out
}
