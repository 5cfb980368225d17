//! The model card.

use crate::report::data::DataCard;
use crate::report::input::{Input, Losses};
use std::fmt::Write;
use suasion_data::report::format::{loss, percent, thousands};

/// Text for a line or a table cell, without the bars, line breaks and markup that would break it.
fn cell(text: &str) -> String {
    text.trim().replace('|', "\\|").replace('<', "&lt;").replace(char::is_control, " ")
}

/// A fenced block whose fence is longer than any in the text.
fn fenced(language: &str, text: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    format!("{fence}{language}\n{}\n{fence}\n", text.trim_end())
}

/// True for a possible name of a model or a data set that is not a path on this machine.
fn is_name(text: &str) -> bool {
    !text.is_empty() && !text.starts_with(['/', '.', '~']) && !text.contains(['\\', ' '])
}

/// A YAML scalar: plain where every reader takes it for a text, else in quotes.
fn scalar(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    match text.starts_with(|c: char| c.is_ascii_alphabetic()) && text.chars().all(plain) {
        true => text.to_string(),
        false => serde_json::Value::from(text).to_string(),
    }
}

fn capitalised(text: &str) -> String {
    let mut characters = text.chars();
    characters.next().map(|first| first.to_uppercase().chain(characters).collect()).unwrap_or_default()
}

/// How the model is used, in Python and here.
fn usage(name: &str, card: &DataCard) -> String {
    let name = scalar(name).trim_matches('"').to_string();
    let (library, class) = match card.adapter {
        true => ("peft", "AutoPeftModelForCausalLM"),
        false => ("transformers", "AutoModelForCausalLM"),
    };
    let import = match card.adapter {
        true => {
            "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer".to_string()
        }
        false => format!("from {library} import {class}, AutoTokenizer"),
    };
    let inputs = match card.chat {
        true => {
            "messages = [{\"role\": \"user\", \"content\": \"Hello!\"}]\n\
             inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors=\"pt\", \
             return_dict=True)"
        }
        false => "inputs = tokenizer(\"Hello!\", return_tensors=\"pt\")",
    };
    let python = format!(
        "{import}\n\n\
         name = {name:?}  # this folder, or its id on the hub\n\
         tokenizer = AutoTokenizer.from_pretrained(name)\n\
         model = {class}.from_pretrained(name)\n{inputs}\n\
         output = model.generate(**inputs, max_new_tokens=200)\n\
         print(tokenizer.decode(output[0, inputs[\"input_ids\"].shape[1]:], skip_special_tokens=True))"
    );
    let shell = format!("suasion generate --model {name:?} --prompt 'Hello!'");
    format!("{}\n{}", fenced("python", &python), fenced("sh", &shell))
}

/// What every card has, and by which one is known.
pub(super) const SIGNATURE: &str = "\nTrained with suasion ";

pub(super) fn model_card(input: &Input<'_>) -> String {
    let Input { report, card, replies, comparison, .. } = input;
    let library = if card.adapter { "peft" } else { "transformers" };
    let mut text = format!("---\nlibrary_name: {library}\npipeline_tag: text-generation\n");
    if is_name(&card.base_model) {
        let _ = writeln!(text, "base_model: {}", scalar(&card.base_model));
    }
    let data: Vec<&String> = card.data.iter().filter(|name| is_name(name)).collect();
    if !data.is_empty() {
        let _ = writeln!(text, "datasets:");
        for name in data {
            let _ = writeln!(text, "- {}", scalar(name));
        }
    }
    let title = input.title();
    let lora = if card.adapter { "- lora\n" } else { "" };
    let _ = writeln!(text, "tags:\n- suasion\n- sft\n{lora}---\n\n# {}", cell(&title));
    let _ = writeln!(text, "{SIGNATURE}{} on {}.\n", env!("CARGO_PKG_VERSION"), input.objective());
    if let Some(divergence) = &report.diverged {
        let _ = writeln!(text, "**{}**\n", cell(&capitalised(&divergence.to_string())));
    }
    if report.diverged.is_none_or(|divergence| !divergence.stopped) {
        let _ = writeln!(text, "## Usage\n\n{}", usage(&title, card));
    }

    let _ = writeln!(text, "## Run\n\n| | |\n|---|---|");
    for (name, value) in input.facts() {
        let _ = writeln!(text, "| {name} | {} |", cell(&value));
    }
    if !card.sections.is_empty() {
        let _ = writeln!(
            text,
            "\n## Training signal by section\n\n| section | tokens | share if all tokens are learned | share in this run |\n|---|---:|---:|---:|"
        );
        for s in &card.sections {
            let (before, after) = (percent(s.share_before), percent(s.share_after));
            let _ = writeln!(text, "| {} | {} | {before} | {after} |", cell(&s.name), thousands(s.tokens));
        }
    }
    let losses = input.losses();
    if !losses.is_empty() {
        let _ = writeln!(text, "\n## Held-out loss\n\nMean negative log-likelihood in nats per token.\n");
        let _ = writeln!(text, "| section | tokens | before | after |\n|---|---:|---:|---:|");
    }
    for Losses { name, tokens, before, after } in losses {
        let _ = writeln!(text, "| {name} | {} | {} | {} |", thousands(tokens), loss(before), loss(after));
    }
    if let Some(comparison) = comparison {
        let _ = writeln!(text, "\n## Responses only compared with all tokens\n");
        for line in &comparison.verdict {
            let _ = writeln!(text, "- {line}");
        }
    }
    if !card.findings.is_empty() {
        let _ = writeln!(text, "\n## Findings\n\n| code | level | count | example |\n|---|---|---:|---|");
        for f in &card.findings {
            let (count, example) = (thousands(f.count), cell(&f.example));
            let _ = writeln!(text, "| {} | {} | {count} | {example} |", cell(&f.code), cell(&f.level));
        }
    }
    if !report.warnings.is_empty() {
        let _ = writeln!(text, "\n## Warnings\n");
        for warning in &report.warnings {
            let _ = writeln!(text, "- {}", cell(warning));
        }
    }
    for (i, reply) in replies.iter().enumerate() {
        let heading = if i == 0 { "\n## Generated replies\n\n" } else { "\n" };
        let (prompt, text_of_reply) = (fenced("text", &reply.prompt), fenced("text", &reply.reply));
        let ended = cell(&reply.stopped);
        let _ = writeln!(text, "{heading}Prompt:\n\n{prompt}\nReply ({ended}):\n\n{text_of_reply}");
    }
    let (language, configuration) = input.configuration();
    let _ = writeln!(text, "\n## Configuration\n\n{}", fenced(language, &configuration));
    text
}
