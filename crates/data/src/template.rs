//! Chat templates: a conversation to text as transformers 5 renders it, and to spans by proof (MASKING.md).
//!
//! A template is compiled once and used from many threads. It is untrusted: it has no files, bounded fuel and
//! bounded output.

mod blind;
mod context;
mod engine;
mod python;
mod shape;
mod spans;
mod watch;

pub use watch::RenderingWatch;

use crate::chat::Conversation;
use crate::finding::Finding;
use crate::policy::Policy;
use crate::render::{Rendered, Stops};
use crate::{Error, Result, RowId};
use context::Variables;
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

/// True for the names that are no variables of a template's own: neither the configuration (`template_kwargs`) nor a
/// row (`chat_template_kwargs`) may set them.
///
/// transformers takes messages, tools and the generation prompt as arguments of their own and refuses them twice. It
/// lets a call override the special tokens; but here the tokenizer says what these are, and a text with others
/// would have no stop token and no BOS that anybody knows. `documents` may be set, as there.
pub fn is_reserved(name: &str) -> bool {
    let ours = ["messages", "tools", "add_generation_prompt", "bos_token", "eos_token"];
    ours.contains(&name) || name.starts_with("__suasion")
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
    /// C001 and M007. Whether a response has its stop token (M002) is for its tokens to say.
    pub findings: Vec<Finding>,
}

/// A template, compiled.
#[derive(Debug)]
struct Compiled {
    env: Environment<'static>,
    /// True where it marks what the assistant says with `{% generation %}`.
    generation: bool,
    /// True where it might see what is in these blocks, and so the marks around them.
    captures: bool,
    /// True where it looks at no text of a message, but for whether it is there.
    blind: bool,
    /// True where it asks for the date.
    date: bool,
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
            let date = source.contains("strftime_now");
            let (source, generation, captures) = engine::rewrite_generation(source);
            let blind = engine::syntax().is_ok_and(|syntax| blind::is_blind(&source, syntax));
            let env = engine::environment(source).map_err(|e| Error::Source {
                path: PathBuf::from(path),
                message: format!("the chat template does not compile: {}", TemplateError::from(e)),
                help: "compare it with the template of the model's repository".into(),
            })?;
            Ok::<_, Error>(Compiled { env, generation, captures, blind, date })
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

    /// True where it asks for the day's date: what it renders then depends on it.
    pub fn writes_date(&self) -> bool {
        self.main.date || self.tool_use.as_ref().is_some_and(|template| template.date)
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
        if let Some(name) = c.kwargs.keys().find(|name| is_reserved(name)) {
            return Err(TemplateError(format!("{name:?} is no variable of the template's own")));
        }
        let messages: Vec<minijinja::Value> = c.messages.iter().map(context::message).collect();
        self.render_with(&Variables::new(self, options), c, &messages, add_generation_prompt, None)
    }

    /// A conversation as text with spans, as [`Chats::spans`]. To be used for single conversations: nothing that is
    /// learned of one serves the next.
    pub fn spans(
        &self,
        id: RowId,
        c: &Conversation,
        policy: &Policy,
        stops: &Stops,
        options: &TemplateOptions,
    ) -> Result<Chat> {
        Chats::new(self, policy, stops, options).spans(id, c)
    }

    /// A rendering of some messages, `{% generation %}` blocks between the two marks if given.
    fn render_with(
        &self,
        variables: &Variables,
        c: &Conversation,
        messages: &[minijinja::Value],
        add_generation_prompt: bool,
        marks: Option<(char, char)>,
    ) -> Result<String, TemplateError> {
        #[cfg(test)]
        tests::RENDERINGS.with(|n| n.set(n.get() + 1));
        let context = variables.context(c, messages, add_generation_prompt, marks);
        let template = self.compiled(c).env.get_template(engine::NAME)?;
        let mut out = Limited(Vec::with_capacity(1024));
        let _watched = watch::Watched::begin();
        template.render_captured_to(context, &mut out)?;
        String::from_utf8(out.0).map_err(|e| TemplateError(e.to_string()))
    }
}

/// A chat template at work on a whole source: with the policy, the stop texts and the options that hold for all of
/// its rows, and what their shapes taught about the template. May be used from many threads; what becomes of
/// a row does not depend on the rows before it.
#[derive(Debug)]
pub struct Chats<'a> {
    template: &'a ChatTemplate,
    policy: &'a Policy,
    stops: Stops,
    variables: Variables,
    /// Today, where the template writes the date and the options name none.
    today: Option<jiff::civil::Date>,
    plans: shape::Plans,
}

impl<'a> Chats<'a> {
    /// A template at work. Where the options name no date, it is today's, for all rows.
    pub fn new(
        template: &'a ChatTemplate,
        policy: &'a Policy,
        stops: &Stops,
        options: &TemplateOptions,
    ) -> Chats<'a> {
        let today = (options.date.is_none() && template.writes_date()).then(|| jiff::Zoned::now().date());
        let options = TemplateOptions { date: options.date.or(today), kwargs: options.kwargs.clone() };
        let variables = Variables::new(template, &options);
        Chats { template, policy, stops: stops.clone(), variables, today, plans: shape::Plans::default() }
    }

    /// The day that the template is told, where it asks and the options name none: it decides what the rows
    /// become, as if it had been pinned.
    pub fn today(&self) -> Option<jiff::civil::Date> {
        self.today
    }

    /// A conversation as text with spans, by proof.
    ///
    /// # Errors
    /// [`Error::Row`] where the template refuses the conversation, and where there is no proof.
    pub fn spans(&self, id: RowId, c: &Conversation) -> Result<Chat> {
        let plan = self.plan(c);
        // A rendering with the marks of the blocks has the plain one in it: one rendering for both.
        if !self.template.compiled(c).captures
            && let Some(plan) = plan.as_ref().filter(|plan| plan.is_marked())
        {
            let messages: Vec<minijinja::Value> = c.messages.iter().map(context::message).collect();
            if let Some(chat) = plan.apply(self, &id, c, &messages, None) {
                return Ok(chat);
            }
            return self.prove(id, c);
        }
        let (messages, text) = self.plain(&id, c)?;
        match plan.and_then(|plan| plan.apply(self, &id, c, &messages, Some(&text))) {
            Some(chat) => Ok(chat),
            None => spans::prove(self, id, c, messages, text),
        }
    }

    /// As [`Chats::spans`], from this conversation alone, without a look at its shape: slower, and the same wherever
    /// both have a proof.
    ///
    /// # Errors
    /// As [`Chats::spans`].
    pub fn prove(&self, id: RowId, c: &Conversation) -> Result<Chat> {
        let (messages, text) = self.plain(&id, c)?;
        spans::prove(self, id, c, messages, text)
    }

    /// The messages as the template sees them, and the rendering.
    fn plain(&self, id: &RowId, c: &Conversation) -> Result<(Vec<minijinja::Value>, String)> {
        if let Some(name) = c.kwargs.keys().find(|name| is_reserved(name)) {
            return Err(Error::row(
                id.clone(),
                format!("\"chat_template_kwargs\" sets {name:?}, which is no variable of the template's own"),
                "remove it: messages and tools have columns of their own, the generation prompt is for inference, and \
                 the special tokens are the tokenizer's",
            ));
        }
        let messages: Vec<minijinja::Value> = c.messages.iter().map(context::message).collect();
        let text = self.template.render_with(&self.variables, c, &messages, false, None).map_err(|e| {
            Error::row(
                id.clone(),
                format!("the chat template refuses the conversation: {e}"),
                "look at the roles, their order and the fields that the template asks for",
            )
        })?;
        Ok((messages, text))
    }
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

#[cfg(test)]
mod tests;
