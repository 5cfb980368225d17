//! The page that `suasion diagnose --html` writes.

use crate::diagnose::{Diagnosis, Fall, Names, Verdict};
use suasion_data::report::format::{count, loss, percent, thousands};
use suasion_data::report::page::{
    self, Cell, Html, Line, LineChart, Page, Step, Stroke, Table, Tone, details, paragraph,
};

/// The whole page.
pub fn page(diagnosis: &Diagnosis, names: &Names) -> String {
    let d = diagnosis;
    let mut page = Page::new("suasion diagnose", &format!("{} → {}", names.base, names.tuned));
    let tone = match d.verdict {
        Verdict::Response => Tone::Good,
        Verdict::Undecided | Verdict::StartsEarly => Tone::Check,
        _ => Tone::Bad,
    };
    let sure = match d.verdict {
        Verdict::Undecided => String::new(),
        _ => format!(" Confidence {}.", percent(d.confidence)),
    };
    page.verdict(tone, &format!("{}{sure}", d.sentence), &d.reasons);
    let advice = Step { text: d.advice.clone(), command: d.command.clone() };
    let audit = Step::run(
        "See how the masks of the rows should be:",
        format!("suasion verify --data {} --model {}", names.data, names.base),
    );
    page.lead("Next", &page::steps(&[advice, audit]));
    page.section("sections", "What the training changed, by section", &sections(d));
    page.section("kinds", "Prompt text by kind", &kinds(d));
    page.section("boundary", "Around the start of responses", &boundary(d));
    page.section("stop", "The stop token", &stop(d));
    page.section("recall", "Reciting the prompt", &recall(d));
    page.section("answers", "How sure each answer is", &answers(d));
    page.fact(format!("{} with {}", count(d.rows, "row"), count(d.prompts, "distinct prompt")));
    page.finish()
}

const HEADS: [&str; 5] = ["", "tokens", "base", "tuned", "fall"];

fn falls<'a>(caption: &str, rows: impl Iterator<Item = (String, &'a Fall)>) -> Html {
    let row = |(name, fall): (String, &Fall)| {
        let numbers = [thousands(fall.tokens), loss(fall.base), loss(fall.tuned), share(fall)];
        std::iter::once(Cell::Head(name)).chain(numbers.map(Cell::Number)).collect()
    };
    let rows: Vec<Vec<Cell>> = rows.map(row).collect();
    if rows.is_empty() {
        return Html::new();
    }
    Table { caption: caption.into(), heads: HEADS.to_vec(), rows }.html()
}

/// The share by which the base model's nll fell.
fn share(fall: &Fall) -> String {
    let share = fall.gain() / fall.base.max(1e-9);
    match share {
        s if s < -9.99 => "< −999 %".into(),
        s if s < 0.0 => format!("−{}", percent(-s)),
        s => percent(s),
    }
}

fn sections(d: &Diagnosis) -> Html {
    let caption = "Mean loss in nats per token under the base and the tuned model. What is trained on falls; what is masked \
                   changes only as far as it resembles what is trained on.";
    falls(caption, d.sections.iter().map(|(name, fall)| (name.replace('_', " "), fall)))
}

fn kinds(d: &Diagnosis) -> Html {
    let kinds = [
        ("ids that no response has", &d.prompt_only),
        ("text that most rows have", &d.constant_prompt),
        ("other text", &d.varying_prompt),
    ];
    let caption = "Prompt tokens at least 12 tokens before a response. The first kind tells most: training on responses only \
                   makes ids that are never a target less likely everywhere.";
    falls(caption, kinds.into_iter().filter_map(|(name, fall)| Some((name.to_string(), fall.as_ref()?))))
}

fn boundary(d: &Diagnosis) -> Html {
    if d.boundary.is_empty() {
        return Html::new();
    }
    let line = |name: &str, stroke, pick: fn(&Fall) -> f64| Line {
        name: name.into(),
        points: d.boundary.iter().map(|b| (f64::from(b.offset), pick(&b.fall))).collect(),
        stroke,
    };
    let chart = LineChart {
        title: "Loss by the distance from the first response token, which is 0.".into(),
        x: "tokens".into(),
        y: "nats per token".into(),
        lines: vec![
            line("base", Stroke::Faint, |fall| fall.base),
            line("tuned", Stroke::Main, |fall| fall.tuned),
        ],
        small: false,
        from_zero: true,
    };
    let mut html = paragraph(
        "If the mask is right, the lines separate at 0: before it the tuned model is no better, from there on it is.",
    );
    html.add(&chart.html());
    let rows = d.boundary.iter().map(|b| (b.offset.to_string().replace('-', "−"), &b.fall));
    html.add(&details("The same as a table", &falls("", rows)));
    html
}

fn stop(d: &Diagnosis) -> Html {
    let (base, tuned) = (&d.stop.base, &d.stop.tuned);
    if tuned.ends == 0 {
        return paragraph("These rows have no stop token.");
    }
    let p = |value: Option<f64>| Cell::Number(value.map_or("–".into(), |p| format!("{p:.4}")));
    let rows = [
        ("at the true end", base.at_end, tuned.at_end),
        ("one token before it", base.before_end, tuned.before_end),
        ("inside the response", base.inside, tuned.inside),
        ("again, after the stop", base.after, tuned.after),
    ];
    let row = |(name, a, b): (&str, Option<f64>, Option<f64>)| vec![Cell::Head(name.into()), p(a), p(b)];
    let table = Table {
        caption: format!("Its mean probability at {}.", count(tuned.ends, "end")),
        heads: vec!["", "base", "tuned"],
        rows: rows.into_iter().map(row).collect(),
    };
    let mut html = table.html();
    let (a, b) = (&d.ends.base, &d.ends.tuned);
    let n = |value: u64| Cell::Number(thousands(value));
    let rows = [
        ("stops at once", a.stopped_at_once, b.stopped_at_once),
        ("stops within those tokens", a.stopped, b.stopped),
        ("begins another turn", a.next_turn, b.next_turn),
    ];
    let table = Table {
        caption: format!(
            "What greedy generation does at {} of complete responses, over {}.",
            count(b.tried, "end"),
            count(b.tokens, "token")
        ),
        heads: vec!["", "base", "tuned"],
        rows: rows.into_iter().map(|(name, a, b)| vec![Cell::Head(name.into()), n(a), n(b)]).collect(),
    };
    html.add(&table.html());
    html
}

fn recall(d: &Diagnosis) -> Html {
    let (Some(a), Some(b)) = (d.recall.base.ngram_share, d.recall.tuned.ngram_share) else {
        return Html::new();
    };
    paragraph(&format!(
        "Given the first 8 tokens of a section of the prompt, the base model continues with {} of its 4-grams, the tuned model \
         with {} ({}). A prompt that all rows share is recited after few steps of training on it.",
        percent(a),
        percent(b),
        count(d.recall.tuned.probes, "section")
    ))
}

fn answers(d: &Diagnosis) -> Html {
    let answers = &d.answers;
    let rows = [
        ("prompts learned", answers.prompts_learned),
        ("labels start early, within the prompt", answers.starts_early),
        ("labels start late, within the response", answers.starts_late),
        ("stop token masked", answers.stop_masked),
    ];
    let row = |(name, p): (&str, Option<f64>)| {
        vec![Cell::Head(name.into()), Cell::Number(p.map_or("unknown".into(), percent))]
    };
    Table {
        caption:
            "Probabilities, calibrated on small models that were trained in each way (docs/diagnose.md)."
                .into(),
        heads: vec!["", "probability"],
        rows: rows.into_iter().map(row).collect(),
    }
    .html()
}
