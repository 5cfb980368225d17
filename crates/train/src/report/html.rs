//! `report.html`: what training did, whether it worked, and what to do next.

use crate::compare::Arm;
use crate::report::data::{FindingCount, SampleReply};
use crate::report::input::{Input, Losses};
use crate::report::words;
use crate::{Report, StepRecord};
use suasion_data::report::format::{duration, loss, loss_difference, thousands};
use suasion_data::report::page::{
    self, Cell, Html, Line, LineChart, Page, Share, Stroke, Table, block, columns, details, list, paragraph,
};

/// Logged steps from which a mean over steps is drawn.
const SMOOTHED: usize = 20;

/// The whole page.
pub(super) fn page(input: &Input<'_>) -> String {
    let mut page = Page::new("suasion train", &input.title());
    let (tone, sentence) = words::verdict(input);
    page.verdict(tone, &sentence, &words::reasons(input));
    let mut rows = Html::new();
    input.card.rows.iter().for_each(|row| _ = rows.add(&page::preview(row)));
    if !rows.is_empty() {
        page.lead("What it was trained on, in three rows", &rows);
    }
    page.lead("Next", &page::steps(&words::next(input)));
    page.section("loss", "Loss", &curves(input.report));
    page.section("sections", "Loss by section", &sections(input));
    page.section("shares", "Where the loss goes", &shares(input));
    page.section("replies", "Replies", &replies(input));
    page.section("comparison", "Responses only compared with all tokens", &comparison(input));
    page.section("pace", "Learning rate, gradient, throughput", &pace(&input.report.steps));
    page.section("findings", "Findings in the data", &findings(input));
    let facts = input.facts().into_iter().map(|(name, value)| (name.to_string(), value));
    page.section("run", "The run", &Table::facts(facts).html());
    let (_, configuration) = input.configuration();
    page.section(
        "configuration",
        "Configuration",
        &details("The resolved configuration", &block(&configuration)),
    );
    if !input.card.machine.is_empty() {
        page.fact(input.card.machine.as_str());
    }
    page.finish()
}

/// The mean of the last `window` points at each point.
fn smoothed(points: &[(f64, f64)], window: usize) -> Vec<(f64, f64)> {
    let mean = |i: usize| {
        let run = &points[(i + 1).saturating_sub(window)..=i];
        (points[i].0, run.iter().map(|point| point.1).sum::<f64>() / run.len() as f64)
    };
    (0..points.len()).map(mean).collect()
}

fn curves(report: &Report) -> Html {
    let train: Vec<(f64, f64)> = report.steps.iter().filter_map(|s| Some((s.step as f64, s.loss?))).collect();
    let held_out: Vec<(f64, f64)> = report.evals.iter().map(|e| (e.step as f64, e.eval_loss)).collect();
    if train.is_empty() && held_out.is_empty() {
        return paragraph("No step was logged.");
    }
    let mut lines = Vec::new();
    if train.len() >= SMOOTHED {
        let window = (train.len() / 20).max(5);
        lines.push(Line {
            name: "training loss of a step".into(),
            points: train.clone(),
            stroke: Stroke::Faint,
        });
        let name = format!("training loss, mean over {window} logged steps");
        lines.push(Line { name, points: smoothed(&train, window), stroke: Stroke::Main });
    } else if !train.is_empty() {
        lines.push(Line { name: "training loss".into(), points: train, stroke: Stroke::Main });
    }
    if !held_out.is_empty() {
        lines.push(Line { name: "held-out loss".into(), points: held_out, stroke: Stroke::Dots });
    }
    let chart = LineChart {
        title: "Loss over steps.".into(),
        x: "step".into(),
        y: "nats per token".into(),
        lines,
        small: false,
        from_zero: false,
    };
    let mut html = chart.html();
    if !report.evals.is_empty() {
        let row =
            |e: &crate::EvalRecord| vec![Cell::Number(thousands(e.step)), Cell::Number(loss(e.eval_loss))];
        let rows = report.evals.iter().map(row).collect();
        let table = Table { heads: vec!["step", "held-out loss"], rows, ..Table::default() };
        html.add(&details("Held-out losses as a table", &table.html()));
    }
    html
}

fn small(title: &str, y: &str, points: Vec<(f64, f64)>, from_zero: bool) -> Html {
    let stroke = if points.len() > 30 { Stroke::Main } else { Stroke::Dots };
    let line = Line { name: String::new(), points, stroke };
    let (title, x, y) = (title.into(), "step".into(), y.into());
    LineChart { title, x, y, lines: vec![line], small: true, from_zero }.html()
}

fn sections(input: &Input<'_>) -> Html {
    let mut html = Html::new();
    let losses = input.losses();
    if losses.is_empty() {
        return html;
    }
    let change = |before: Option<f64>, after: Option<f64>| match (before, after) {
        (Some(before), Some(after)) => loss_difference(after - before),
        _ => "–".into(),
    };
    let row = |Losses { name, tokens, before, after }: Losses| {
        let numbers = [thousands(tokens), loss(before), loss(after), change(before, after)].map(Cell::Number);
        std::iter::once(Cell::Head(name.replace('_', " "))).chain(numbers).collect()
    };
    let table = Table {
        caption:
            "On held-out rows, before and after training, in nats per token. A section’s loss is over all of \
                  its tokens, learned or not."
                .into(),
        heads: vec!["section", "tokens", "before", "after", "change"],
        rows: losses.into_iter().map(row).collect(),
    };
    html.add(&table.html());
    let evals = &input.report.evals;
    if evals.len() > 2 {
        let chart = |name: &&str| {
            let point = |e: &crate::EvalRecord| Some((e.step as f64, e.eval_sections.get(*name)?.loss));
            small(
                &format!("{}.", name.replace('_', " ")),
                "",
                evals.iter().filter_map(point).collect(),
                false,
            )
        };
        html.add(&columns(&crate::evaluate::SECTIONS.iter().map(chart).collect::<Vec<_>>()));
    }
    html
}

fn shares(input: &Input<'_>) -> Html {
    let sections = &input.card.sections;
    let mut html = Html::new();
    if sections.is_empty() {
        return html;
    }
    let heads = ["section", "tokens", "all tokens", "this run"];
    let by_tokens: Vec<Share> = sections
        .iter()
        .map(|s| Share {
            name: s.name.replace('_', " "),
            tokens: s.tokens,
            before: s.share_before,
            after: s.share_after,
        })
        .collect();
    let caption = "Each section’s share of the loss, by its number of tokens: if all tokens were learned, and in this run.";
    html.add(&page::shares(caption, heads, &by_tokens));
    let Some(measured) = input.report.before.as_ref().or(input.report.after.as_ref()) else { return html };
    // The held-out loss of a section, and of that what its weight in this run leaves.
    let part = |s: &crate::SectionShare| {
        let section = measured.sections.get(&s.name)?;
        let nll = section.targets as f64 * section.loss;
        let weight = if s.share_before > 0.0 { s.share_after / s.share_before } else { 0.0 };
        Some((s.name.replace('_', " "), section.targets, nll, nll * weight))
    };
    let parts: Vec<(String, u64, f64, f64)> = sections.iter().filter_map(part).collect();
    let total = |pick: fn(&(String, u64, f64, f64)) -> f64| parts.iter().map(pick).sum::<f64>();
    let (all, run) = (total(|part| part.2), total(|part| part.3));
    if all > 0.0 && run > 0.0 {
        let share = |(name, tokens, nll, kept): &(String, u64, f64, f64)| Share {
            name: name.clone(),
            tokens: *tokens,
            before: nll / all,
            after: kept / run,
        };
        let when =
            if input.report.before.is_some() { "before the first step" } else { "after the last step" };
        let caption = format!(
            "The same by the model’s loss on held-out rows {when}: a token that the model predicts well counts little."
        );
        html.add(&page::shares(&caption, heads, &parts.iter().map(share).collect::<Vec<_>>()));
    }
    html
}

/// The replies that the command gives, and those of the first and the last evaluation that have some.
fn replies(input: &Input<'_>) -> Html {
    let mut html = Html::new();
    let mut with = input.report.evals.iter().filter(|eval| !eval.eval_samples.is_empty());
    let (first, last) = (with.next(), with.next_back());
    let sampled = first.into_iter().flat_map(|first| {
        first.eval_samples.iter().map(move |sample| {
            let later = last.and_then(|last| last.eval_samples.iter().find(|later| later.row == sample.row));
            SampleReply {
                prompt: sample.prompt.clone(),
                before: later.map(|_| sample.reply.clone()),
                reply: later.unwrap_or(sample).reply.clone(),
                reference: Some(sample.reference.clone()),
                stopped: last.map_or(String::new(), |last| format!("step {}", thousands(last.step))),
            }
        })
    });
    for reply in input.replies.iter().cloned().chain(sampled) {
        html.element("h3", "Prompt").add(&block(&reply.prompt));
        let part = |name: &str, text: &str| {
            let mut html = Html::new();
            html.element("h4", name).add(&block(text));
            html
        };
        let mut parts = Vec::new();
        parts.extend(reply.before.as_ref().map(|text| part("Before training", text)));
        let ended = if reply.stopped.is_empty() { String::new() } else { format!(" ({})", reply.stopped) };
        parts.push(part(&format!("After training{ended}"), &reply.reply));
        parts.extend(reply.reference.as_ref().map(|text| part("In the data", text)));
        html.add(&columns(&parts));
    }
    html
}

fn pace(steps: &[StepRecord]) -> Html {
    if steps.is_empty() {
        return Html::new();
    }
    let points =
        |value: fn(&StepRecord) -> f64| steps.iter().map(|step| (step.step as f64, value(step))).collect();
    let accuracy = steps.iter().filter_map(|s| Some((s.step as f64, s.mean_token_accuracy?))).collect();
    let charts = [
        small("Learning rate.", "", points(|step| step.learning_rate), true),
        small("Gradient norm, before clipping.", "", points(|step| step.grad_norm), true),
        small("Tokens per second.", "", points(|step| step.tokens_per_second), true),
        small("Share of the targets predicted as the likeliest token.", "", accuracy, true),
    ];
    columns(&charts)
}

fn comparison(input: &Input<'_>) -> Html {
    let Some(c) = input.comparison else { return Html::new() };
    let mut html = list(&c.verdict);
    let rows = crate::evaluate::SECTIONS.iter().filter_map(|name| {
        let of = |arm: &Arm| arm.evaluation.sections.get(*name).map(|s| s.loss);
        let tokens = c.before.evaluation.sections.get(*name)?.targets;
        let numbers = [of(&c.before), of(&c.response_only), of(&c.all_tokens)].map(|v| Cell::Number(loss(v)));
        let start = [Cell::Head(name.replace('_', " ")), Cell::Number(thousands(tokens))];
        Some(start.into_iter().chain(numbers).collect())
    });
    let table = Table {
        caption: format!(
            "Held-out loss by section. Training took {} steps: {} on responses only, {} on all tokens.",
            thousands(c.steps),
            duration(c.response_only.seconds),
            duration(c.all_tokens.seconds)
        ),
        heads: vec!["section", "tokens", "before", "responses only", "all tokens"],
        rows: rows.collect(),
    };
    html.add(&table.html());
    html
}

fn findings(input: &Input<'_>) -> Html {
    if input.card.findings.is_empty() {
        return paragraph("There are no findings in the data.");
    }
    let row = |f: &FindingCount| {
        let (code, level) = (Cell::Head(f.code.clone()), Cell::Text(f.level.clone()));
        vec![code, level, Cell::Number(thousands(f.count)), Cell::Text(f.example.clone())]
    };
    let rows = input.card.findings.iter().map(row).collect();
    Table { heads: vec!["code", "level", "count", "example"], rows, ..Table::default() }.html()
}
