//! Chat templates: a conversation to text as transformers 5 renders it, and to spans by proof (MASKING.md).
//!
//! A template is compiled once and used from many threads. It is untrusted: it has no files, bounded fuel and
//! bounded output.

mod engine;
mod python;
mod spans;

use crate::chat::Conversation;
use crate::finding::Finding;
use crate::policy::Policy;
use crate::render::Rendered;
use crate::{Error, Result};
use minijinja::Environment;
use serde_json::{Map, Value};
use std::io;
use std::path::{Path, PathBuf};

/// Longest rendering, in bytes.
const OUTPUT: usize = 64 << 20;

/// Why a template did not compile or render; the template's own word (`raise_exception`) among them.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TemplateError(String);

impl From<minijinja::Error> for TemplateError {
    fn from(error: minijinja::Error) -> TemplateError {
        let mut text = match error.detail() {
            Some(detail) => detail.to_string(),
            None => error.kind().to_string(),
        };
        if error.kind() == minijinja::ErrorKind::OutOfFuel {
            text = "the template does not come to an end, or builds too much text".into();
        }
        if let Some(line) = error.line() {
            text.push_str(&format!(" (line {line})"));
        }
        TemplateError(text)
    }
}

/// What a rendering depends on beside the conversation.
#[derive(Clone, Debug, Default)]
pub struct TemplateOptions {
    /// The date that `strftime_now` gives (at noon); today where there is none.
    pub date: Option<jiff::civil::Date>,
    /// Template variables of the config (`template_kwargs`); a row's own go over them.
    pub kwargs: Map<String, Value>,
}

impl TemplateOptions {
    /// What a policy says. A date that is none is left out: the configuration has checked it.
    pub fn of(policy: &Policy) -> TemplateOptions {
        TemplateOptions {
            date: policy.template_date.as_deref().and_then(|date| date.parse().ok()),
            kwargs: policy.template_kwargs.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
        }
    }
}

/// A conversation as text with spans, and what is worth knowing about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Chat {
    /// The text and the spans that tile it; it carries its own special tokens.
    pub rendered: Rendered,
    /// C001, M002, M007.
    pub findings: Vec<Finding>,
}

/// A template, compiled.
#[derive(Debug)]
struct Compiled {
    env: Environment<'static>,
    /// True where it marks what the assistant says with `{% generation %}`.
    generation: bool,
}

/// A compiled chat template with the texts of its special tokens.
#[derive(Debug)]
pub struct ChatTemplate {
    main: Compiled,
    /// The template for conversations with tools, where there is another one.
    tool_use: Option<Compiled>,
    bos: Option<String>,
    eos: Option<String>,
    fingerprint: String,
}

impl ChatTemplate {
    /// The template of a model folder: `chat_template.jinja`, else `chat_template` in `tokenizer_config.json`,
    /// which is one template or a list of named ones (`default`, and `tool_use` for rows with tools). None where
    /// the folder has none.
    pub fn from_dir(dir: &Path, bos: Option<&str>, eos: Option<&str>) -> Result<Option<ChatTemplate>> {
        let read = |path: &Path| match std::fs::read_to_string(path) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(path, e)),
        };
        let path = dir.join("chat_template.jinja");
        if let Some(source) = read(&path)? {
            return Self::compile(&path, &source, None, bos, eos).map(Some);
        }
        let path = dir.join("tokenizer_config.json");
        let Some(text) = read(&path)? else { return Ok(None) };
        let broken = |message: String| Error::Tokenizer { path: path.clone(), message };
        let config: Value = serde_json::from_str(&text).map_err(|e| broken(e.to_string()))?;
        match config.get("chat_template") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(source)) => Self::compile(&path, source, None, bos, eos).map(Some),
            Some(Value::Array(list)) => {
                let named = |name: &str| {
                    let entry = list.iter().find(|entry| entry["name"] == name);
                    entry.and_then(|entry| entry["template"].as_str())
                };
                let default = named("default")
                    .ok_or_else(|| broken("chat_template is a list without \"default\"".into()))?;
                Self::compile(&path, default, named("tool_use"), bos, eos).map(Some)
            }
            Some(_) => Err(broken("chat_template is neither a string nor a list".into())),
        }
    }

    /// A template from its source.
    pub fn new(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<ChatTemplate> {
        Self::compile(Path::new("chat_template"), source, None, bos, eos)
    }

    fn compile(
        path: &Path,
        source: &str,
        tool_use: Option<&str>,
        bos: Option<&str>,
        eos: Option<&str>,
    ) -> Result<ChatTemplate> {
        let one = |source: &str| {
            let (source, generation) = engine::rewrite_generation(source);
            let env = engine::environment(source).map_err(|e| Error::Source {
                path: PathBuf::from(path),
                message: format!("the chat template does not compile: {}", TemplateError::from(e)),
                help: "compare it with the template of the model's repository".into(),
            })?;
            Ok::<_, Error>(Compiled { env, generation })
        };
        let mut hash = blake3::Hasher::new();
        for part in [Some(source), tool_use, bos, eos] {
            // Presence and length first: no two sets of parts hash the same bytes.
            hash.update(&part.map_or(u64::MAX, |p| p.len() as u64).to_le_bytes());
            hash.update(part.unwrap_or_default().as_bytes());
        }
        Ok(ChatTemplate {
            main: one(source)?,
            tool_use: tool_use.map(one).transpose()?,
            bos: bos.map(str::to_string),
            eos: eos.map(str::to_string),
            fingerprint: hash.finalize().to_hex().to_string(),
        })
    }

    /// A hash of the template and its special tokens.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn compiled(&self, c: &Conversation) -> &Compiled {
        match &self.tool_use {
            Some(tool_use) if c.tools.is_some() => tool_use,
            _ => &self.main,
        }
    }

    /// The text that transformers' `apply_chat_template(tokenize=False)` gives.
    pub fn render(
        &self,
        c: &Conversation,
        add_generation_prompt: bool,
        options: &TemplateOptions,
    ) -> Result<String, TemplateError> {
        self.render_with(c, &normalise(&c.messages), add_generation_prompt, options, None)
    }

    /// A rendering of some messages (normalised), `{% generation %}` blocks between the two marks if given.
    fn render_with(
        &self,
        c: &Conversation,
        messages: &[Value],
        add_generation_prompt: bool,
        options: &TemplateOptions,
        marks: Option<(char, char)>,
    ) -> Result<String, TemplateError> {
        let mut context = Map::new();
        context.insert("messages".into(), messages.into());
        context.insert("tools".into(), c.tools.clone().map_or(Value::Null, Value::Array));
        context.insert("documents".into(), Value::Null);
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        for (key, token) in [("bos_token", &self.bos), ("eos_token", &self.eos)] {
            if let Some(token) = token {
                context.insert(key.into(), token.as_str().into());
            }
        }
        for (key, value) in options.kwargs.iter().chain(&c.kwargs) {
            context.insert(key.clone(), value.clone());
        }
        let date = options.date.unwrap_or_else(|| jiff::Zoned::now().date());
        context.insert(engine::NOW.into(), date.at(12, 0, 0, 0).to_string().into());
        if let Some((open, close)) = marks {
            context.insert(engine::OPEN.into(), open.to_string().into());
            context.insert(engine::CLOSE.into(), close.to_string().into());
        }
        let template = self.compiled(c).env.get_template(engine::NAME)?;
        let mut out = Limited(Vec::new());
        template.render_captured_to(jinja(&Value::Object(context)), &mut out)?;
        String::from_utf8(out.0).map_err(|e| TemplateError(e.to_string()))
    }
}

/// A JSON value as the template sees it, with its keys in their order.
fn jinja(value: &Value) -> minijinja::Value {
    match value {
        Value::Null => minijinja::Value::from(()),
        Value::Bool(x) => (*x).into(),
        Value::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(x), _) => x.into(),
            (None, Some(x)) => x.into(),
            _ => n.as_f64().unwrap_or(f64::NAN).into(),
        },
        Value::String(text) => text.as_str().into(),
        Value::Array(list) => list.iter().map(jinja).collect(),
        Value::Object(map) => minijinja::Value::from_pairs(map.iter().map(|(k, v)| (k.as_str(), jinja(v)))),
    }
}

/// Messages as transformers hands them to the template: null keys dropped, the names of the reasoning aliased.
fn normalise(messages: &[Map<String, Value>]) -> Vec<Value> {
    let one = |message: &Map<String, Value>| {
        let mut message: Map<String, Value> =
            message.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())).collect();
        let reasoning = ["reasoning_content", "thinking", "reasoning"].iter().find_map(|k| message.get(*k));
        if let Some(reasoning) = reasoning.cloned() {
            for key in ["reasoning_content", "thinking"] {
                message.entry(key).or_insert_with(|| reasoning.clone());
            }
        }
        Value::Object(message)
    };
    messages.iter().map(one).collect()
}

/// A buffer that refuses to grow beyond [`OUTPUT`].
struct Limited(Vec<u8>);

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT {
            return Err(io::Error::other("the template's output is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
