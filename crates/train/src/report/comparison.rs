//! The page that `suasion compare` writes.

use crate::compare::{Arm, Comparison};
use crate::repeats::Repeats;
use crate::statistics::ConfidenceInterval;
use suasion_data::report::format::{count, loss, loss_difference, percent, thousands};
use suasion_data::report::page::{self, Cell, Html, Interval, Page, Step, Table, Tone};

/// The page of a comparison from one seed.
pub fn page(comparison: &Comparison, subject: &str, rerun: &str) -> String {
    let c = comparison;
    let d = &c.response_difference;
    let excludes = |i: Option<ConfidenceInterval>| i.is_some_and(|i| i.excludes(0.0));
    let differs = excludes(d.interval) && excludes(d.bootstrap);
    let mut page = begun(subject, differs, d.mean, &c.verdict);
    page.lead("Next", &page::steps(&[Step::run("See whether it holds for other seeds:", rerun)]));
    let rows = [("Student’s t over prompts", d.interval), ("bootstrap over prompts", d.bootstrap)];
    page.section("difference", "The difference on held-out responses", &difference(d.mean, &rows));
    page.section("models", "The models", &arms(&[c]));
    page.fact(format!("seed {}, {}", c.seed, count(c.steps, "step")));
    page.finish()
}

/// The page of a comparison over seeds.
pub fn page_of_repeats(repeats: &Repeats, subject: &str, rerun: &str) -> String {
    let d = &repeats.response_difference;
    let differs = d.interval.excludes(0.0) && d.bootstrap.excludes(0.0);
    let mut page = begun(subject, differs, d.mean, &repeats.verdict);
    page.lead("Next", &page::steps(&[Step::run("Narrow the interval with more seeds:", rerun)]));
    let rows = [
        ("Student’s t over seeds and prompts", Some(d.interval)),
        ("bootstrap over both", Some(d.bootstrap)),
    ];
    page.section("difference", "The difference on held-out responses", &difference(d.mean, &rows));
    page.section("seeds", "Seed by seed", &seeds(repeats));
    page.section("models", "The models, means over seeds", &arms(&repeats.runs.iter().collect::<Vec<_>>()));
    page.fact(format!("{} from {}", count(repeats.seeds.len() as u64, "seed"), repeats.seeds[0]));
    page.finish()
}

fn begun(subject: &str, differs: bool, mean: f64, verdict: &[String]) -> Page {
    let mut page = Page::new("suasion compare", subject);
    let (tone, sentence) = match (differs, mean > 0.0) {
        (true, true) => (Tone::Good, "Training on responses only predicts held-out responses better."),
        (true, false) => (Tone::Check, "Training on all tokens predicts held-out responses better."),
        (false, _) => (Tone::Check, "No difference found between the two objectives on held-out responses."),
    };
    page.verdict(tone, sentence, verdict);
    page
}

fn difference(mean: f64, rows: &[(&str, Option<ConfidenceInterval>)]) -> Html {
    let row = |(name, interval): &(&str, Option<ConfidenceInterval>)| {
        let i = (*interval)?;
        Some(Interval {
            name: name.to_string(),
            bounds: (i.low, mean, i.high),
            text: format!(
                "{} nats per token ({} to {})",
                loss_difference(mean),
                loss_difference(i.low),
                loss_difference(i.high)
            ),
        })
    };
    let rows: Vec<Interval> = rows.iter().filter_map(row).collect();
    let title = "Loss of training on all tokens less that of training on responses only, with 95 % intervals. Right of 0, \
                 responses only is better.";
    page::intervals(title, "nats per token", &rows)
}

fn seeds(repeats: &Repeats) -> Html {
    let row = |((seed, run), difference): ((&u64, &Comparison), &f64)| {
        let numbers = [
            loss(run.before.evaluation.loss),
            loss(run.response_only.evaluation.loss),
            loss(run.all_tokens.evaluation.loss),
            loss_difference(*difference),
        ];
        std::iter::once(Cell::Head(seed.to_string())).chain(numbers.map(Cell::Number)).collect()
    };
    let runs = repeats.seeds.iter().zip(&repeats.runs).zip(&repeats.response_difference.by_seed);
    Table {
        caption: "Held-out response loss in nats per token.".into(),
        heads: vec!["seed", "before", "responses only", "all tokens", "difference"],
        rows: runs.map(row).collect(),
    }
    .html()
}

/// The measurements of the models; over several comparisons, their means.
fn arms(runs: &[&Comparison]) -> Html {
    let row = |name: &str, value: &dyn Fn(&Arm) -> Option<f64>, show: &dyn Fn(f64) -> String| {
        let mean = |pick: fn(&Comparison) -> &Arm| {
            let values: Vec<f64> = runs.iter().filter_map(|run| value(pick(run))).collect();
            let text = match values.is_empty() {
                true => "–".into(),
                false => show(values.iter().sum::<f64>() / values.len() as f64),
            };
            Cell::Number(text)
        };
        vec![
            Cell::Head(name.into()),
            mean(|c| &c.before),
            mean(|c| &c.response_only),
            mean(|c| &c.all_tokens),
        ]
    };
    let shown = |value: f64| loss(value);
    let mut rows = vec![
        row("targets trained on", &|arm| Some(arm.targets_trained as f64), &|n| thousands(n as u64)),
        row("held-out loss: response", &|arm| Some(arm.response.as_ref()?.loss), &shown),
        row("held-out loss: prompt", &|arm| Some(arm.prompt.as_ref()?.loss), &shown),
        row("held-out prompts reproduced", &|arm| arm.reproduction.ngram_share, &percent),
        row("training prompts reproduced", &|arm| arm.reproduction_train.ngram_share, &percent),
    ];
    if let Some(first) = runs.first() {
        for section in first.response_only.evaluation.sections.keys() {
            let loss_of = |arm: &Arm| Some(arm.evaluation.sections.get(section)?.loss);
            rows.push(row(&format!("loss: {}", section.replace('_', " ")), &loss_of, &shown));
        }
    }
    Table {
        caption: "Loss in nats per token; reproduced: share of 4-grams given a section’s first tokens."
            .into(),
        heads: vec!["", "before", "responses only", "all tokens"],
        rows,
    }
    .html()
}
