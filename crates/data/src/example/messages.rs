//! Messages in the formats found in datasets, normalised to a [`Conversation`].
//!
//! | given | becomes |
//! |---|---|
//! | `from`/`value`; other role names, in any case | `role`/`content` with `system`, `user`, `assistant`, `tool` |
//! | content as a list of typed parts | its texts as parts `{type: text, text}`; reasoning goes to `reasoning_content`, tool calls to `tool_calls` |
//! | `function_call` (as a role or a key), a bare `{name, arguments}` | `tool_calls` of `{type, function}` |
//! | no arguments, or blank ones | an empty object |
//! | keys whose value is null | dropped |
//! | masks ([`super::masks`]) | weights of the message and of parts of its text |

mod weights;

use super::chat::{Conversation, held, message};
use super::masks::Mask;
use super::reader::{Reader, shown_keys};
use crate::source::parse;
use crate::source::row::type_name;
use crate::{Error, Result};
use serde_json::{Map, Value, json};

/// Columns that hold a whole conversation.
pub(super) const LISTS: [&str; 3] = ["messages", "conversations", "conversation"];

/// Keys of a message's reasoning; aliases of each other.
pub(super) const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Messages with their masks.
type Messages = Vec<(Map<String, Value>, Mask)>;

impl Reader<'_> {
    /// A row with the whole conversation under the first of `keys` that it has.
    pub(super) fn chat(mut self, keys: &[&str]) -> Result<Conversation> {
        let Some(key) = keys.iter().copied().find(|key| self.fields.contains_key(*key)) else {
            return Err(self.missing(keys[0]));
        };
        let messages = self.messages(key)?;
        self.conversation(messages, 0, key)
    }

    /// The conversation of these messages, the first `prompt` of which are prompt, with the tools, system prompt
    /// and template variables of the row.
    pub(super) fn conversation(
        &mut self,
        mut messages: Messages,
        mut prompt: usize,
        key: &str,
    ) -> Result<Conversation> {
        if messages.is_empty() {
            return Err(
                self.error(format!("\"{key}\" has no messages"), "fill the conversation, or remove the row")
            );
        }
        let system = self.optional_string("system")?.filter(|text| !text.is_empty());
        if let Some(text) = system
            && messages[0].0["role"] != "system"
        {
            messages.insert(0, (message("system", text), Mask::default()));
            prompt += usize::from(prompt > 0);
        }
        let tools = self.tools(key.starts_with("conversation"))?;
        let kwargs = match self.fields.swap_remove("chat_template_kwargs") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(map)) => map,
            Some(Value::String(text)) if text.trim().is_empty() => Map::new(),
            Some(other) => match other.as_str().map(parse) {
                Some(Ok(Value::Object(map))) => map,
                _ => {
                    let found = type_name(&other);
                    return Err(self.error(
                        format!("\"chat_template_kwargs\" is {found}, not an object"),
                        "write the template's variables as an object",
                    ));
                }
            },
        };
        let learned =
            |(_, mask): &(_, Mask)| mask.weight.is_some_and(|w| w > 0.0) || !mask.details.is_empty();
        if let Some(at) = messages[..prompt].iter().position(learned) {
            return Err(self.error(
                format!("message {at} is prompt, and is to be learned"),
                "leave its \"train\", \"loss\" or \"weight\" out, or give the whole conversation as \"messages\"",
            ));
        }
        let (messages, masks): (_, Vec<Mask>) = messages.into_iter().unzip();
        let weights = masks.iter().map(|mask| mask.weight).collect();
        let details = masks.into_iter().enumerate().filter(|(_, mask)| !mask.details.is_empty());
        let details = details.map(|(at, mask)| (at, mask.details)).collect();
        Ok(Conversation { messages, weights, details, prompt_messages: prompt, tools, kwargs })
    }

    /// The messages of a column: a list, a single message, or JSON text of either.
    pub(super) fn messages(&mut self, key: &str) -> Result<Messages> {
        let Some(value) = self.fields.swap_remove(key) else { return Err(self.missing(key)) };
        let list = match value {
            Value::Array(list) => list,
            one @ Value::Object(_) => vec![one],
            Value::String(text) => match parse(&text) {
                Ok(Value::Array(list)) => list,
                Ok(one @ Value::Object(_)) => vec![one],
                _ => return Err(self.no_messages(key, "a string")),
            },
            other => return Err(self.no_messages(key, type_name(&other))),
        };
        let mut messages: Messages = Vec::with_capacity(list.len());
        let mut after_call = false;
        for (at, value) in list.into_iter().enumerate() {
            let (mut message, mask, call) = At { reader: self, column: key, at }.message(value)?;
            // Consecutive calls belong to one answer.
            if call
                && after_call
                && let Some((before, same)) = messages.last_mut()
                && same.weight == mask.weight
                && let Some(Value::Array(calls)) = before.get_mut("tool_calls")
                && let Some(Value::Array(more)) = message.get_mut("tool_calls")
            {
                calls.append(more);
                continue;
            }
            after_call = call;
            messages.push((message, mask));
        }
        Ok(messages)
    }

    fn no_messages(&self, key: &str, found: &str) -> Error {
        self.error(
            format!("\"{key}\" is {found}, not a list of messages"),
            "a message is an object such as {\"role\": \"user\", \"content\": \"..\"}",
        )
    }

    /// The `tools` column, or `functions`, OpenAI's older name: a list, or JSON text of one. `wrap`: in ShareGPT
    /// files the functions lack the wrapping object.
    fn tools(&mut self, wrap: bool) -> Result<Option<Vec<Value>>> {
        let help = "tools are a list of objects, or JSON text of one";
        let parsed = |reader: &Self, text: &str, place: &str| {
            parse(text)
                .map_err(|(_, e)| reader.error(format!("{place} is a string that is not JSON: {e}"), help))
        };
        let functions = |value: &&Value| match value {
            Value::Array(list) => list.iter().all(|f| f["name"].is_string() && f.get("parameters").is_some()),
            _ => false,
        };
        let older = self.fields.get("tools").is_none_or(Value::is_null)
            && self.fields.get("functions").as_ref().is_some_and(functions);
        let (key, wrap) = if older { ("functions", true) } else { ("tools", wrap) };
        let value = match self.fields.swap_remove(key) {
            Some(Value::String(text)) if text.trim().is_empty() => Value::Null,
            Some(Value::String(text)) => parsed(self, &text, "\"tools\"")?,
            other => other.unwrap_or(Value::Null),
        };
        let list = match value {
            Value::Null => return Ok(None),
            Value::Array(list) => list,
            one @ Value::Object(_) => vec![one],
            other => {
                let found = type_name(&other);
                return Err(self.error(format!("\"tools\" is {found}, not a list"), help));
            }
        };
        let mut tools = Vec::with_capacity(list.len());
        for (at, tool) in list.into_iter().enumerate() {
            let tool = match tool {
                Value::String(text) => parsed(self, &text, &format!("tools[{at}]"))?,
                other => other,
            };
            match tool {
                Value::Object(tool)
                    if wrap && tool.contains_key("name") && !tool.contains_key("function") =>
                {
                    tools.push(json!({"type": "function", "function": tool}));
                }
                Value::Object(tool) => tools.push(Value::Object(tool)),
                other => {
                    let found = type_name(&other);
                    return Err(self.error(format!("tools[{at}] is {found}, not an object"), help));
                }
            }
        }
        Ok(if tools.is_empty() { None } else { Some(tools) })
    }

    /// One side of a pair as messages: a list, a single message, or text, which becomes one message of
    /// `role`.
    pub(super) fn side(&mut self, key: &str, role: &str) -> Result<Messages> {
        match self.fields.get(key) {
            Some(Value::String(text)) if !text.trim_start().starts_with(['[', '{']) => {
                Ok(vec![(message(role, self.string(key)?), Mask::default())])
            }
            Some(Value::Null) => self.string(key).map(|_| Vec::new()),
            Some(Value::String(_)) => {
                let text = self.string(key)?;
                // Text may start with a bracket by chance.
                match parse(&text) {
                    Ok(value) if looks_like_messages(&value) => {
                        self.fields.insert(key.to_string(), value);
                        self.messages(key)
                    }
                    _ => Ok(vec![(message(role, text), Mask::default())]),
                }
            }
            _ => self.messages(key),
        }
    }

    /// The conversation of a preference pair: the prompt and the chosen side.
    pub(super) fn preferred(mut self) -> Result<Conversation> {
        for key in LISTS {
            // If `chosen` is a whole conversation itself, this column only repeats its prompt.
            let whole = self.fields.contains_key("prompt") || is_list(self.fields.get("chosen"));
            if self.fields.contains_key(key) && !whole {
                let mut messages = self.messages(key)?;
                let prompt = messages.len();
                messages.extend(self.side("chosen", "assistant")?);
                return self.conversation(messages, prompt, key);
            }
        }
        let chosen = self.side("chosen", "assistant")?;
        if chosen.is_empty() {
            return Err(self.error("\"chosen\" has no messages".into(), "fill it, or remove the row"));
        }
        let opens = |messages: &Messages| {
            messages
                .iter()
                .map(|(m, _)| &m["role"])
                .find(|role| *role != "system")
                .is_some_and(|r| r == "user")
        };
        if opens(&chosen) || !self.fields.contains_key("prompt") {
            // The prompt is the common start of both sides.
            let rejected = match self.fields.contains_key("rejected") {
                true => self.side("rejected", "assistant")?,
                false => Vec::new(),
            };
            let same = chosen.iter().zip(&rejected).take_while(|(a, b)| a.0 == b.0).count();
            let prompt = if rejected.is_empty() { chosen.len() - 1 } else { same.min(chosen.len() - 1) };
            return self.conversation(chosen, prompt, "chosen");
        }
        self.pair_of(chosen, "chosen")
    }

    /// `prompt` followed by the messages or text under `key`.
    pub(super) fn pair(mut self, key: &str) -> Result<Conversation> {
        let after = self.side(key, "assistant")?;
        self.pair_of(after, key)
    }

    fn pair_of(&mut self, after: Messages, key: &str) -> Result<Conversation> {
        if after.is_empty() {
            return Err(self.error(format!("\"{key}\" has no messages"), "fill it, or remove the row"));
        }
        let mut messages = self.side("prompt", "user")?;
        let prompt = messages.len();
        messages.extend(after);
        self.conversation(messages, prompt, key)
    }
}

fn is_list(value: Option<&Value>) -> bool {
    value.is_some_and(|v| v.as_array().is_some_and(|list| list.len() > 1))
}

/// True for an object with a role, or a list of such objects.
fn looks_like_messages(value: &Value) -> bool {
    let one = |v: &Value| v.get("role").or(v.get("from")).is_some_and(Value::is_string);
    match value {
        Value::Array(list) => !list.is_empty() && list.iter().all(one),
        other => one(other),
    }
}

/// The role for a name in a file, in any case; other names are unchanged, and left to the templates that know
/// them. `function_call` is a call by the assistant.
fn role_of(name: &str) -> &str {
    if matches!(name, "user" | "assistant" | "system") {
        return name;
    }
    match name.trim().to_lowercase().as_str() {
        "human" | "user" | "prompter" | "instruction" => "user",
        "gpt" | "assistant" | "chatgpt" | "bing" | "bard" | "model" | "bot" | "ai" | "chatbot" => "assistant",
        "system" | "system_prompt" => "system",
        "developer" => "developer",
        "function_call" | "tool_call" => "function_call",
        "observation" | "tool" | "function_response" | "tool_response" | "function" | "ipython" => "tool",
        _ => name,
    }
}

/// The type of a part, and its text or call.
pub(super) fn part_text(part: &Map<String, Value>) -> (&str, Option<&Value>) {
    let kind = part.get("type").and_then(Value::as_str).unwrap_or("text");
    let keys = [kind, "text", "value", "content", "function"];
    (kind, keys.iter().find_map(|key| part.get(*key).filter(|v| !v.is_null())))
}

/// Removes the keys whose value is null.
fn remove_nulls(map: &mut Map<String, Value>) {
    if map.values().any(Value::is_null) {
        map.retain(|_, value| !value.is_null());
    }
}

/// A message being read, and its position in the row.
pub(super) struct At<'a, 'b> {
    reader: &'a Reader<'b>,
    column: &'a str,
    at: usize,
}

impl At<'_, '_> {
    pub(super) fn error(&self, what: impl std::fmt::Display, help: &str) -> Error {
        self.reader.error(format!("{}[{}] {what}", self.column, self.at), help)
    }

    /// A message with its mask, and whether its role is `function_call`.
    fn message(&self, value: Value) -> Result<(Map<String, Value>, Mask, bool)> {
        let Value::Object(mut out) = value else {
            return Err(self.error(
                format_args!("is {}, not an object", type_name(&value)),
                "a message is an object such as {\"role\": \"user\", \"content\": \"..\"}",
            ));
        };
        let given = |key: &str| held(&out, key).filter(|value| !value.is_null());
        let role_key = if given("role").is_some() { "role" } else { "from" };
        let content_key = if given("content").is_some() { "content" } else { "value" };
        let role = match given(role_key) {
            Some(Value::String(name)) => role_of(name).to_string(),
            Some(other) => {
                let found = type_name(other);
                return Err(self.error(format_args!("has a role that is {found}"), "a role is a string"));
            }
            None => {
                let keys = shown_keys(&out);
                return Err(self.error(
                    format_args!("has neither \"role\" nor \"from\"; it has {keys}"),
                    "give each message a role: {\"role\": \"user\", \"content\": \"..\"}",
                ));
            }
        };
        // The keys are only needed if the content is missing.
        let keys = given(content_key).is_none().then(|| shown_keys(&out));
        remove_nulls(&mut out);
        let call = role == "function_call";
        let answer = call || role == "assistant";
        let mask = self.masks(&mut out, content_key, answer)?;
        if role_key != "role" || content_key != "content" {
            let renamed = |(key, value): (String, Value)| match key {
                key if key == role_key => ("role".into(), value),
                key if key == content_key => ("content".into(), value),
                key => (key, value),
            };
            out = out.into_iter().map(renamed).collect();
        }
        let mut reasoning = String::new();
        let mut calls = Vec::new();
        let mut moved = false;
        for (key, value) in &mut out {
            match (key.as_str(), &mut *value) {
                ("role", Value::String(name)) => {
                    let role = if call { "assistant" } else { role.as_str() };
                    if name != role {
                        *value = role.into();
                    }
                }
                ("content", Value::String(text)) if call => {
                    calls.extend(self.calls_of_text(text)?);
                    *value = "".into();
                }
                ("content", Value::Object(_)) if call => {
                    calls.push(self.call(value.take())?);
                    *value = "".into();
                }
                ("content", Value::String(_)) => {}
                ("content", Value::Array(parts)) => {
                    *value = self.parts(std::mem::take(parts), &mut reasoning, &mut calls)?;
                }
                ("content", other) => {
                    let found = type_name(other);
                    return Err(self.error(
                        format_args!("has a {content_key:?} that is {found}"),
                        "content is a string or a list of parts; write what a tool returned as JSON text",
                    ));
                }
                ("tool_calls", Value::Array(list)) => {
                    for one in list {
                        *one = self.call(one.take())?;
                    }
                }
                ("tool_calls", one) => {
                    match one.take() {
                        Value::String(text) if text.trim().is_empty() => {}
                        Value::String(text) => calls.extend(self.calls_of_text(&text)?),
                        one => calls.push(self.call(one)?),
                    }
                    moved = true;
                }
                ("function_call", one) if role == "assistant" => {
                    calls.push(self.call(one.take())?);
                    moved = true;
                }
                _ => {}
            }
        }
        if moved {
            remove_nulls(&mut out);
        }
        if !calls.is_empty() {
            match out.get_mut("tool_calls") {
                Some(Value::Array(list)) => list.append(&mut calls),
                _ => {
                    out.insert("tool_calls".into(), Value::Array(calls));
                }
            }
        }
        if !reasoning.is_empty() && !REASONING.iter().any(|key| out.contains_key(*key)) {
            out.insert("reasoning_content".into(), reasoning.into());
        }
        let called = || {
            let has = |key: &str| held(&out, key).is_some();
            has("tool_calls") || REASONING.iter().any(|key| has(key))
        };
        if let Some(keys) = keys
            && !(called() && (call || role == "assistant"))
        {
            return Err(self.error(
                format_args!("has no content; it has {keys}"),
                "fill the content; only an assistant that calls a tool may leave it out",
            ));
        }
        Ok((out, mask, call))
    }

    /// The text parts of content that is a list of parts; an empty text if there are none. Appends reasoning and tool
    /// calls to `reasoning` and `calls`.
    fn parts(&self, parts: Vec<Value>, reasoning: &mut String, calls: &mut Vec<Value>) -> Result<Value> {
        let mut content = Vec::new();
        for (n, part) in parts.into_iter().enumerate() {
            let part = match part {
                Value::String(text) => {
                    content.push(json!({"type": "text", "text": text}));
                    continue;
                }
                Value::Object(part) => part,
                other => {
                    let found = type_name(&other);
                    return Err(self.error(
                        format_args!("has a part {n} that is {found}"),
                        "a part is an object such as {\"type\": \"text\", \"text\": \"..\"}",
                    ));
                }
            };
            let (kind, inner) = part_text(&part);
            let (kind, inner) = (kind.to_string(), inner.cloned());
            let text = || match &inner {
                Some(Value::String(text)) => Ok(text.as_str()),
                _ => Err(self.error(
                    format_args!(
                        "has a part {n} of type {kind:?} without text; it has {}",
                        shown_keys(&part)
                    ),
                    "write the part's text under \"text\"",
                )),
            };
            match kind.as_str() {
                "text" | "input_text" | "output_text" => {
                    content.push(json!({"type": "text", "text": text()?}));
                }
                "reasoning" | "thinking" => reasoning.push_str(text()?),
                "tool_call" | "function_call" | "function" => match inner {
                    Some(Value::String(text)) => calls.extend(self.calls_of_text(&text)?),
                    Some(Value::Object(_)) => calls.push(self.call(inner.unwrap_or_default())?),
                    _ => calls.push(self.call(Value::Object(part))?),
                },
                other => {
                    return Err(self.error(
                        format_args!("has a part {n} of type {other:?}"),
                        "a part has the type text, reasoning or tool_call: images, audio and video cannot be trained on \
                         here; remove the part, or leave the row out",
                    ));
                }
            }
        }
        Ok(if content.is_empty() { "".into() } else { Value::Array(content) })
    }

    /// Tool calls in JSON text: a single call or a list.
    fn calls_of_text(&self, text: &str) -> Result<Vec<Value>> {
        match parse(text) {
            Ok(Value::Array(list)) => list.into_iter().map(|call| self.call(call)).collect(),
            Ok(call @ Value::Object(_)) => Ok(vec![self.call(call)?]),
            Ok(other) => Err(self.bad_call(format_args!("is {}, not an object", type_name(&other)))),
            Err((_, e)) => Err(self.bad_call(format_args!("is not JSON: {e}"))),
        }
    }

    fn bad_call(&self, what: impl std::fmt::Display) -> Error {
        self.error(
            format_args!("has a tool call that {what}"),
            "a call is {\"name\": \"..\", \"arguments\": {..}}, by itself or under \"function\"",
        )
    }

    /// One tool call as `{type, function: {name, arguments}}`; other keys are kept.
    fn call(&self, value: Value) -> Result<Value> {
        let Value::Object(mut call) = value else {
            return Err(self.bad_call(format_args!("is {}, not an object", type_name(&value))));
        };
        remove_nulls(&mut call);
        self.refuse_mask_of_call(&call)?;
        if !call.contains_key("function") {
            let Some(name) = call.shift_remove("name") else {
                return Err(self.bad_call(format_args!("has no name; it has {}", shown_keys(&call))));
            };
            let arguments = call.shift_remove("arguments").or(call.shift_remove("parameters"));
            let mut wrapped = Map::new();
            if let Some(id) = call.shift_remove("id") {
                wrapped.insert("id".into(), id);
            }
            wrapped.insert("type".into(), "function".into());
            let mut function = Map::new();
            function.insert("name".into(), name);
            function.insert("arguments".into(), arguments.unwrap_or(Value::Null));
            wrapped.insert("function".into(), Value::Object(function));
            call = wrapped;
        }
        let Some(Value::Object(function)) = call.get_mut("function") else {
            return Err(self.bad_call("has a \"function\" that is not an object"));
        };
        if !function.get("name").is_some_and(Value::is_string) {
            return Err(self.bad_call("has no name"));
        }
        let arguments = function.entry("arguments").or_insert(Value::Null);
        match arguments {
            Value::Object(_) => {}
            Value::Null => *arguments = Value::Object(Map::new()),
            Value::String(text) if text.trim().is_empty() => *arguments = Value::Object(Map::new()),
            Value::String(text) => match parse(text) {
                // Whether the template gets the text is decided later (`template/given.rs`).
                Ok(Value::Object(_)) => {}
                Ok(other) => {
                    let found = type_name(&other);
                    return Err(self.bad_call(format_args!("has arguments that are {found}, not an object")));
                }
                Err((_, e)) => {
                    return Err(self.bad_call(format_args!("has arguments that are not JSON: {e}")));
                }
            },
            other => {
                let found = type_name(other);
                return Err(self.bad_call(format_args!("has arguments that are {found}, not an object")));
            }
        }
        Ok(Value::Object(call))
    }
}
