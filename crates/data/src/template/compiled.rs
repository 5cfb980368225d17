//! Compiled templates and plain rendering.

use super::context::{self, Variables};
use super::options::{TemplateOptions, is_reserved};
use super::rewrite::rewrite_generation;
use super::watch::{Active, RenderingWatch};
use super::{blind, engine, limits};
use crate::example::Conversation;
use crate::source::MAX_TEXT_BYTES;
use crate::{Error, Result};
use minijinja::Environment;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[cfg(test)]
thread_local! {
    /// The number of renderings on this thread.
    pub(super) static RENDERINGS: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
    /// The number of messages in them.
    pub(super) static MESSAGES_RENDERED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// Maximum length of a rendering, in bytes: more than the text of any row, since marks around its texts make it
/// longer.
const OUTPUT: usize = 4 * MAX_TEXT_BYTES;

/// Why a template did not compile or render, including the template's own `raise_exception`.
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
            text = "the template does not end, or builds too much text".into();
        }
        if let Some(line) = error.line() {
            text.push_str(&format!(" (line {line})"));
        }
        TemplateError(text)
    }
}

impl From<io::Error> for TemplateError {
    fn from(error: io::Error) -> TemplateError {
        TemplateError(error.to_string())
    }
}

/// A compiled template.
#[derive(Debug)]
pub(super) struct Compiled {
    pub env: Environment<'static>,
    /// True if it marks the assistant's text with `{% generation %}`.
    pub generation: bool,
    /// True if it might read the output of these blocks, including the marks around them.
    pub captures: bool,
    /// True if the text of messages affects it only by being present or absent.
    pub blind: bool,
    /// True if it uses the date.
    pub date: bool,
    /// True if it may support content in parts.
    pub parts: bool,
}

impl Compiled {
    fn new(source: &str) -> Result<Compiled, TemplateError> {
        let (date, parts) = (source.contains("strftime_now"), names_parts(source));
        let compiled = |count: bool| -> Result<Compiled, TemplateError> {
            let (source, generation, captures) = rewrite_generation(source, count);
            let blind = engine::syntax().is_ok_and(|syntax| blind::is_blind(&source, syntax));
            Ok(Compiled { env: engine::environment(source)?, generation, captures, blind, date, parts })
        };
        // If it does not compile, the error is that of the original source.
        compiled(true).or_else(|_: TemplateError| compiled(false))
    }
}

/// A compiled chat template with the texts of its special tokens.
#[derive(Debug)]
pub struct ChatTemplate {
    pub(super) main: Compiled,
    /// A separate template for conversations with tools, if there is one.
    tool_use: Option<Compiled>,
    /// The special tokens, by the names of their variables.
    tokens: Vec<(String, String)>,
    fingerprint: String,
    /// Its running renderings.
    active: Arc<Active>,
}

/// The source texts of a folder's templates.
pub(crate) struct Sources {
    /// The file of the main template.
    pub(crate) path: PathBuf,
    pub(crate) default: String,
    /// The template for rows with tools, if it is a different one.
    pub(crate) tool_use: Option<String>,
}

impl Sources {
    /// Reads them as [`ChatTemplate::from_dir`] describes.
    pub(crate) fn of(dir: &Path) -> Result<Option<Sources>> {
        let read = |path: &Path| match std::fs::read_to_string(path) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(path, e)),
        };
        let more = |name: &str| read(&dir.join("additional_chat_templates").join(name));
        let path = dir.join("chat_template.jinja");
        let (default, tool_use) = (read(&path)?, more("tool_use.jinja")?);
        if let Some(source) = default.map_or_else(|| more("default.jinja"), |source| Ok(Some(source)))? {
            return Ok(Some(Sources { path, default: source, tool_use }));
        }
        for name in ["tokenizer_config.json", "chat_template.json"] {
            let path = dir.join(name);
            let Some(text) = read(&path)? else { continue };
            let broken = |message: String| Error::Tokenizer { path: path.clone(), message };
            let config: Value = serde_json::from_str(&text).map_err(|e| broken(e.to_string()))?;
            match config.get("chat_template") {
                None | Some(Value::Null) => {}
                Some(Value::String(source)) => {
                    let default = source.clone();
                    return Ok(Some(Sources { path, default, tool_use }));
                }
                Some(Value::Array(list)) => {
                    let named = |name: &str| {
                        let entry = list.iter().find(|entry| entry["name"] == name);
                        entry.and_then(|entry| entry["template"].as_str())
                    };
                    let default = named("default")
                        .ok_or_else(|| broken("chat_template is a list without \"default\"".into()))?;
                    let tool_use = tool_use.or_else(|| named("tool_use").map(str::to_string));
                    return Ok(Some(Sources { default: default.to_string(), tool_use, path: path.clone() }));
                }
                Some(_) => return Err(broken("chat_template is neither a string nor a list".into())),
            }
        }
        match tool_use {
            None => Ok(None),
            Some(_) => Err(Error::Tokenizer {
                path,
                message: "no such file, and there is a template for rows with tools; add the one for all other rows".into(),
            }),
        }
    }
}

impl ChatTemplate {
    /// Loads the template of a model folder, and the one for rows with tools if there is a separate one. `None` if
    /// the folder has none.
    ///
    /// As in transformers: `chat_template.jinja` and `additional_chat_templates/tool_use.jinja`, else `chat_template` in
    /// `tokenizer_config.json`, which is a template or a list of named ones (`default`, `tool_use`), else
    /// `chat_template.json`, the file of multimodal processors.
    pub fn from_dir(dir: &Path, bos: Option<&str>, eos: Option<&str>) -> Result<Option<ChatTemplate>> {
        let Some(Sources { path, default, tool_use }) = Sources::of(dir)? else { return Ok(None) };
        Self::compile(&path, &default, tool_use.as_deref(), bos, eos).map(Some)
    }

    /// Compiles a template from its source.
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
            let broken = |error: TemplateError| Error::Source {
                path: PathBuf::from(path),
                message: format!("the chat template does not compile: {error}"),
                help: "compare it with the template of the model's repository".into(),
            };
            limits::check(source).map_err(|what| broken(TemplateError(what)))?;
            limits::with_deep_stack(|| Compiled::new(source)).map_err(broken)
        };
        let mut hash = blake3::Hasher::new();
        for part in [Some(source), tool_use, bos, eos] {
            // Presence and length come first, so that different parts never hash the same bytes.
            hash.update(&part.map_or(u64::MAX, |p| p.len() as u64).to_le_bytes());
            hash.update(part.unwrap_or_default().as_bytes());
        }
        Ok(ChatTemplate {
            main: one(source)?,
            tool_use: tool_use.map(one).transpose()?,
            tokens: [("bos_token", bos), ("eos_token", eos)]
                .into_iter()
                .filter_map(|(name, token)| Some((name.to_string(), token?.to_string())))
                .collect(),
            fingerprint: hash.finalize().to_hex().to_string(),
            active: Active::new(),
        })
    }

    /// The same template with more special tokens as variables. BOS and EOS are unchanged.
    #[must_use]
    pub fn with_tokens(mut self, tokens: &BTreeMap<String, String>) -> ChatTemplate {
        let ours = ["bos_token", "eos_token"];
        let used = |name: &str| {
            let all = [Some(&self.main), self.tool_use.as_ref()];
            all.into_iter().flatten().any(|template| {
                template.env.get_template(engine::NAME).is_ok_and(|t| t.source().contains(name))
            })
        };
        let more: Vec<(String, String)> = tokens
            .iter()
            .filter(|(name, _)| !ours.contains(&name.as_str()) && used(name))
            .map(|(n, t)| (n.clone(), t.clone()))
            .collect();
        if !more.is_empty() {
            let all = serde_json::to_string(&(&self.fingerprint, &more)).unwrap_or_default();
            self.fingerprint = blake3::hash(all.as_bytes()).to_hex().to_string();
            self.tokens.extend(more);
        }
        self
    }

    /// BLAKE3, in hex, of the template and its special tokens.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// True if the template uses the current date.
    pub fn writes_date(&self) -> bool {
        self.main.date || self.tool_use.as_ref().is_some_and(|template| template.date)
    }

    /// Watches the duration of its renderings.
    pub fn watch(&self) -> RenderingWatch {
        RenderingWatch::of(self.active.clone())
    }

    pub(super) fn compiled(&self, c: &Conversation) -> &Compiled {
        match &self.tool_use {
            Some(tool_use) if c.tools.is_some() => tool_use,
            _ => &self.main,
        }
    }

    pub(super) fn variables(&self, options: &TemplateOptions) -> Variables {
        Variables::new(&self.tokens, options)
    }

    /// Renders a conversation: the text of transformers' `apply_chat_template(tokenize=False)`.
    pub fn render(
        &self,
        c: &Conversation,
        add_generation_prompt: bool,
        options: &TemplateOptions,
    ) -> Result<String, TemplateError> {
        if let Some(name) = c.kwargs.keys().find(|name| is_reserved(name)) {
            return Err(TemplateError(format!("{name:?} is reserved and cannot be set")));
        }
        let messages: Vec<minijinja::Value> = c.messages.iter().map(context::message).collect();
        self.render_with(&self.variables(options), c, &messages, add_generation_prompt, None)
    }

    /// Renders some messages. If two marks are given, they are put around each `{% generation %}` block.
    pub(super) fn render_with(
        &self,
        variables: &Variables,
        c: &Conversation,
        messages: &[minijinja::Value],
        add_generation_prompt: bool,
        marks: Option<(char, char)>,
    ) -> Result<String, TemplateError> {
        #[cfg(test)]
        {
            RENDERINGS.with(|n| n.set(n.get() + 1));
            MESSAGES_RENDERED.with(|n| n.set(n.get() + messages.len()));
        }
        let context = variables.context(c, messages, add_generation_prompt, marks);
        let compiled = self.compiled(c);
        let roomy = engine::roomy(&compiled.env, messages.len());
        let template = roomy.as_ref().unwrap_or(&compiled.env).get_template(engine::NAME)?;
        let mut out = Limited(Vec::with_capacity(1024));
        let _watched = self.active.begin();
        template.render_captured_to(context, &mut out)?;
        String::from_utf8(out.0).map_err(|e| TemplateError(e.to_string()))
    }
}

/// True for a template that may support parts: it contains the key of their text.
fn names_parts(source: &str) -> bool {
    ["'text'", "\"text\"", ".text"].iter().any(|key| source.contains(key))
}

/// A buffer that does not grow beyond [`OUTPUT`].
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
