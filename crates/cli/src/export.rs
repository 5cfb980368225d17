//! What a server needs beside a model: an Ollama Modelfile, and the exact prompts that it must send.

use serde_json::{Map, Value, json};
use std::path::Path;
use suasion_data::example::Conversation;
use suasion_data::template::{ChatTemplate, TemplateOptions};
use suasion_data::tokens::Tokenizer;
use suasion_data::{ModelFolder, Policy};
use suasion_files::write_bytes;

/// Names of the files.
const MODELFILE: &str = "Modelfile";
const PROMPTS: &str = "prompt_check.json";

/// The first line of a Modelfile of ours.
const SIGNATURE: &str = "# Written by suasion.";

/// Writes what a server needs beside the model, or the adapter over `base`, in the output folder `dir`; nothing
/// without a tokenizer.
///
/// # Errors
/// If a file cannot be written, or a stop token of the policy is unknown.
pub fn of_model(
    dir: &Path,
    folder: &ModelFolder,
    policy: &Policy,
    base: Option<&Path>,
) -> anyhow::Result<()> {
    let Some(tokenizer) = folder.tokenizer.as_deref() else { return Ok(()) };
    let (options, stops) = (TemplateOptions::of(policy), folder.special(policy)?.stops);
    let bos = tokenizer.bos().map(|bos| bos.content.as_str());
    Ok(write(dir, tokenizer, folder.template.as_deref(), &options, &stops, bos, base)?)
}

/// Writes both files into the folder of a finished model, or of an adapter over the model in `base`. A Modelfile that
/// the user wrote is kept.
///
/// # Errors
/// If a file cannot be written.
fn write(
    dir: &Path,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    options: &TemplateOptions,
    stops: &[u32],
    bos: Option<&str>,
    base: Option<&Path>,
) -> suasion_files::Result<()> {
    let place = dir.join(MODELFILE);
    let ours = |path: &Path| std::fs::read_to_string(path).is_ok_and(|text| text.starts_with(SIGNATURE));
    if !place.exists() || ours(&place) {
        let stops: Vec<String> = stops.iter().map(|id| tokenizer.decode(&[*id], false)).collect();
        write_bytes(&place, modelfile(template, options, &stops, bos, base).as_bytes())?;
    }
    let Some(template) = template else { return Ok(()) };
    let prompts: Vec<Value> = EXAMPLES
        .iter()
        .filter_map(|turns| {
            let conversation = conversation(turns);
            let text = template.render(&conversation, true, options).ok()?;
            let ids = tokenizer.encode_text(&text).ok()?;
            Some(json!({
                "messages": conversation.messages, "add_generation_prompt": true, "text": text, "ids": ids,
            }))
        })
        .collect();
    let text = serde_json::to_string_pretty(&prompts).unwrap_or_default() + "\n";
    write_bytes(dir.join(PROMPTS), text.as_bytes())
}

/// Conversations that a server's prompts are compared on, as (role, content).
const EXAMPLES: [&[(&str, &str)]; 4] = [
    &[("user", "Buses are slow.")],
    &[("system", "Be brief."), ("user", "Buses are slow.")],
    &[("user", "One?"), ("assistant", "Two."), ("user", "Three?")],
    &[("system", "Be brief."), ("user", "One?"), ("assistant", "Two.\nAnd a half."), ("user", "Three?")],
];

fn conversation(turns: &[(&str, &str)]) -> Conversation {
    let message = |(role, content): &(&str, &str)| {
        Map::from_iter([("role".into(), Value::from(*role)), ("content".into(), Value::from(*content))])
    };
    Conversation {
        messages: turns.iter().map(message).collect(),
        weights: vec![None; turns.len()],
        ..Conversation::default()
    }
}

fn modelfile(
    template: Option<&ChatTemplate>,
    options: &TemplateOptions,
    stops: &[String],
    bos: Option<&str>,
    base: Option<&Path>,
) -> String {
    let mut text = format!("{SIGNATURE} Use it with: ollama create NAME -f {MODELFILE}\n");
    match base {
        None => text.push_str("FROM .\n"),
        Some(base) => {
            text.push_str(
                "# Ollama takes adapters of Llama, Mistral and Gemma without DoRA and modules to save; for others: suasion \
                 merge.\n",
            );
            text.push_str(&format!("FROM {}\nADAPTER .\n", Value::from(base.display().to_string())));
        }
    }
    match template.map(|template| Parts::of(template, options).map(|parts| parts.go(bos))) {
        None => text.push_str("TEMPLATE \"\"\"{{ .Prompt }}\"\"\"\n"),
        Some(Some(go)) => {
            text.push_str(
                "# Renders what the model's chat template renders (checked on the conversations of ",
            );
            text.push_str(PROMPTS);
            text.push_str(").\n");
            text.push_str(&format!("TEMPLATE \"\"\"{go}\"\"\"\n"));
        }
        Some(None) => {
            text.push_str(
                "# The chat template cannot be written as a template of Ollama that renders the same: send raw prompts, \
                 as\n# in ",
            );
            text.push_str(PROMPTS);
            text.push_str(".\nTEMPLATE \"\"\"{{ .Prompt }}\"\"\"\n");
        }
    }
    for stop in stops {
        text.push_str(&format!("PARAMETER stop {}\n", Value::from(stop.as_str())));
    }
    text
}

/// A chat template that writes fixed text around each message.
#[derive(Debug, PartialEq)]
struct Parts {
    /// Before a conversation without a system message.
    without_system: String,
    /// Around the content of a system message, which can only be the first.
    system: (String, String),
    user: (String, String),
    assistant: (String, String),
    /// Where the answer begins.
    generation: String,
}

impl Parts {
    /// The parts, derived from renderings of marked contents; `None` if the parts do not reproduce the template's
    /// renderings.
    fn of(template: &ChatTemplate, options: &TemplateOptions) -> Option<Parts> {
        if template.writes_date() {
            return None;
        }
        let render = |turns: &[(&str, &str)], ask| template.render(&conversation(turns), ask, options).ok();
        let cut = |text: &str, marks: &[&str]| -> Option<Vec<String>> {
            let (mut rest, mut parts) = (text, Vec::new());
            for mark in marks {
                let (before, after) = rest.split_once(mark)?;
                parts.push(before.to_string());
                rest = after;
            }
            parts.push(rest.to_string());
            Some(parts)
        };
        let strip = |text: &str, start: &str| text.strip_prefix(start).map(str::to_string);
        let strip_end = |text: &str, end: &str| text.strip_suffix(end).map(str::to_string);
        let (s, u, a, v) = ("sYSTEMq", "uSERq", "aNSWERq", "vIEWq");
        let whole = [("system", s), ("user", u), ("assistant", a), ("user", v)];
        let asked = cut(&render(&whole, true)?, &[s, u, a, v])?;
        let silent = cut(&render(&whole, false)?, &[s, u, a, v])?;
        let answered = cut(&render(&whole[1..3], false)?, &[u, a])?;
        let user_end = silent[4].clone();
        let answer_end = answered[2].clone();
        let user_start = strip(&asked[3], &answer_end)?;
        let parts = Parts {
            without_system: strip_end(&answered[0], &user_start)?,
            system: (asked[0].clone(), strip_end(&asked[1], &user_start)?),
            assistant: (strip(&asked[2], &user_end)?, answer_end),
            generation: strip(&asked[4], &user_end)?,
            user: (user_start, user_end),
        };
        let same =
            EXAMPLES.iter().all(|turns| render(turns, true).is_some_and(|text| text == parts.render(turns)));
        let texts = [&parts.without_system, &parts.system.0, &parts.generation];
        let plain = texts.iter().all(|text| !text.contains("{{") && !text.contains("\"\"\""));
        (same && plain).then_some(parts)
    }

    /// What the template of Ollama renders.
    fn render(&self, turns: &[(&str, &str)]) -> String {
        let mut text = String::new();
        if turns.first().is_none_or(|(role, _)| *role != "system") {
            text.push_str(&self.without_system);
        }
        for (role, content) in turns {
            let (start, end) = match *role {
                "system" => &self.system,
                "user" => &self.user,
                _ => &self.assistant,
            };
            text.extend([start.as_str(), content, end]);
        }
        text + &self.generation
    }

    /// As a template of Go. The BOS is left out: the server writes it itself.
    fn go(&self, bos: Option<&str>) -> String {
        let bos = bos.filter(|bos| !bos.is_empty());
        let bare = |text: &str| bos.and_then(|bos| text.strip_prefix(bos)).unwrap_or(text).to_string();
        format!(
            "{{{{ if .Messages }}}}{{{{ if ne (index .Messages 0).Role \"system\" }}}}{}{{{{ end }}}}{{{{ range .Messages }}}}\
             {{{{ if eq .Role \"system\" }}}}{}{{{{ .Content }}}}{}{{{{ else if eq .Role \"user\" }}}}{}{{{{ .Content }}}}{}\
             {{{{ else if eq .Role \"assistant\" }}}}{}{{{{ .Content }}}}{}{{{{ end }}}}{{{{ end }}}}{}{{{{ end }}}}",
            bare(&self.without_system),
            bare(&self.system.0),
            self.system.1,
            self.user.0,
            self.user.1,
            self.assistant.0,
            self.assistant.1,
            self.generation,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}\
        {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

    fn parts(source: &str) -> Option<Parts> {
        let template = ChatTemplate::new(source, Some("<s>"), Some("</s>")).unwrap();
        Parts::of(&template, &TemplateOptions::default())
    }

    #[test]
    fn a_template_of_fixed_parts_is_translated() {
        let found = parts(CHATML).unwrap();
        let pair = |role: &str| (format!("<|im_start|>{role}\n"), "<|im_end|>\n".to_string());
        assert_eq!((&found.system, &found.user), (&pair("system"), &pair("user")));
        assert_eq!(
            (&found.assistant, found.generation.as_str()),
            (&pair("assistant"), "<|im_start|>assistant\n")
        );
        assert_eq!(
            found.go(None),
            "{{ if .Messages }}{{ if ne (index .Messages 0).Role \"system\" }}{{ end }}{{ range .Messages }}\
             {{ if eq .Role \"system\" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n\
             {{ else if eq .Role \"user\" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n\
             {{ else if eq .Role \"assistant\" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n\
             {{ end }}{{ end }}<|im_start|>assistant\n{{ end }}"
        );
    }

    /// A default system message is text before a conversation without one; a BOS is left to the server.
    #[test]
    fn text_before_the_first_message_depends_on_the_system_message() {
        let source = "{{ bos_token }}{% if messages[0]['role'] != 'system' %}{{ '[S]Be kind.' }}{% endif %}\
            {% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}\
            {% endif %}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}";
        let found = parts(source).unwrap();
        assert_eq!(found.without_system, "<s>[S]Be kind.");
        assert!(found.go(Some("<s>")).contains("\"system\" }}[S]Be kind.{{ end }}"));
        assert_eq!(found.assistant, ("[assistant]".into(), "</s>".into()));
    }

    #[test]
    fn other_templates_are_not_translated() {
        // The system message is part of the first user's turn.
        let inside = "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if loop.index0 == 1 and \
            messages[0]['role'] == 'system' %}<<{{ messages[0]['content'] }}>>{% endif %}{{ m['content'] }} [/INST]\
            {% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% endif %}{% endfor %}";
        let counted =
            "{% for m in messages %}{{ loop.index }}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}";
        for source in [counted, "{{ messages[-1]['content'] }}"] {
            assert_eq!(parts(source), None, "{source}");
        }
        // Whatever renders as fixed text around contents is accepted.
        if let Some(found) = parts(inside) {
            let template = ChatTemplate::new(inside, None, None).unwrap();
            for turns in EXAMPLES {
                let text = template.render(&conversation(turns), true, &TemplateOptions::default()).unwrap();
                assert_eq!(found.render(turns), text);
            }
        }
    }
}
