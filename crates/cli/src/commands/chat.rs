//! `suasion chat`: a conversation with a model, rendered by its chat template.

use super::ConfigArgs;
use crate::config::flags::KeyFlags;
use crate::failure::{Exit, Failure};
use crate::inputs::model;
use crate::inputs::opened::Opened;
use crate::interrupt;
use crate::paths;
use crate::reply::{Ended, Manner, Reply, SamplingArgs, reply};
use crate::ui::Ui;
use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;
use suasion_data::ModelFolder;
use suasion_data::example::Conversation;
use suasion_data::report::printable;
use suasion_data::template::{ChatTemplate, TemplateOptions};
use suasion_data::tokens::Tokenizer;
use suasion_engine::{KvCache, Model};
use suasion_train::generate::Stopped;
use suasion_train::generate::{budget, capacity};

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct ChatArgs {
    /// Configuration file (.yaml, .yml or .toml)
    #[arg(value_parser = paths::parser())]
    config: Option<PathBuf>,
    /// Set one key; overrides CONFIG (repeatable): --set template_kwargs.enable_thinking=false
    #[arg(long, value_name = "KEY=VALUE", allow_hyphen_values = true)]
    set: Vec<String>,
    /// Model: a folder in the Hugging Face layout, or a hub id [key: model_name_or_path]
    #[arg(short = 'M', long, value_name = "M", value_parser = paths::parser())]
    model: Option<PathBuf>,
    /// Adapter over the model: a folder in PEFT's layout [key: adapter_name_or_path]
    #[arg(long, value_name = "A", value_parser = paths::parser())]
    adapter: Option<PathBuf>,
    #[command(flatten)]
    keys: KeyFlags,
    /// The system message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// What a user can type besides messages.
const HELP: &str = "/reset begins a new conversation, /exit or Ctrl-D ends the chat, Ctrl-C stops";

/// Tokens of a prompt that are computed at once, and by which the cache grows.
const CHUNK: usize = 512;

/// Runs the command.
pub fn run(args: &ChatArgs, ui: &Ui) -> anyhow::Result<Exit> {
    let config = ConfigArgs {
        config: args.config.clone(),
        set: args.set.clone(),
        model: args.model.clone(),
        adapter: args.adapter.clone(),
        data: Vec::new(),
        keys: args.keys.clone(),
    };
    let config = config.load(ui)?.config;
    let opened = Opened::of(&config, ui)?;
    let folder = &opened.folder;
    let tokenizer = model::need_tokenizer(folder)?;
    let template = need_template(folder)?;
    let policy = config.policy();
    let stop_ids = tokenizer.stop_ids(&policy)?;
    let manner = args.sampling.of(&folder.path, config.train.seed, stop_ids, ui)?;
    let model = opened.start(ui, &config).build(budget(CHUNK))?;
    let options = TemplateOptions::of(&policy);
    let mut chat = Chat { template, options, tokenizer, manner, model, cache: None, cached: Vec::new() };

    let begin = || -> Conversation {
        let mut conversation = Conversation::default();
        args.system.iter().for_each(|text| say(&mut conversation, "system", text));
        conversation
    };
    let mut conversation = begin();
    let person = std::io::stdin().is_terminal() && !ui.json;
    let mut out = ui.out();
    if person {
        ui.log(format_args!("{}: {HELP}", folder.path.display()));
    }
    while let Some(line) = read_line(person, ui)? {
        match line.trim() {
            "" => continue,
            "/exit" | "/quit" => break,
            "/reset" => {
                conversation = begin();
                continue;
            }
            "/help" => {
                ui.log(HELP);
                continue;
            }
            _ => say(&mut conversation, "user", &line),
        }
        let reply = chat.answer(&conversation, &mut |piece| match ui.json {
            true => Ok(()),
            false => {
                write!(out, "{}", printable(piece))?;
                out.flush()
            }
        })?;
        if ui.json {
            let line = serde_json::json!({
                "prompt": line, "reply": reply.text, "stopped": reply.stopped_name(), "new_tokens": reply.ids.len(),
            });
            writeln!(out, "{line}")?;
        } else {
            writeln!(out)?;
        }
        out.flush()?;
        if interrupt::raised() {
            break;
        }
        if !matches!(reply.ended, Ended::By(Stopped::Stop(_)) | Ended::StopString) {
            ui.note(format_args!("[{} tokens; {}]", reply.ids.len(), reply.why()));
        }
        if person {
            ui.log("");
        }
        say(&mut conversation, "assistant", &reply.text);
    }
    Ok(Exit::Done)
}

/// The chat template of a model.
fn need_template(folder: &ModelFolder) -> anyhow::Result<&ChatTemplate> {
    folder.template.as_deref().ok_or_else(|| {
        Failure::run_time(
            "E-TEMPLATE",
            format!("{}: the model has no chat template that can be used", folder.path.display()),
            "add the base model's chat_template.jinja to the folder; text is continued with suasion generate --prompt",
        )
        .into()
    })
}

/// Appends a message.
fn say(conversation: &mut Conversation, role: &str, text: &str) {
    let message = [("role".to_string(), role.into()), ("content".to_string(), text.into())];
    conversation.messages.push(message.into_iter().collect());
    conversation.weights.push(None);
}

/// The next line, without its end; `None` at the end of the input.
fn read_line(person: bool, ui: &Ui) -> anyhow::Result<Option<String>> {
    if person {
        let mut stderr = std::io::stderr().lock();
        let _ = write!(stderr, "{} ", ui.paint_err("1;36", ">"));
        let _ = stderr.flush();
    }
    let mut line = String::new();
    let read = interrupt::idle(|| std::io::stdin().lock().read_line(&mut line))?;
    if read == 0 {
        if person {
            ui.log("");
        }
        return Ok(None);
    }
    Ok(Some(line.trim_end_matches(['\n', '\r']).to_string()))
}

/// A model in a conversation.
struct Chat<'a> {
    template: &'a ChatTemplate,
    options: TemplateOptions,
    tokenizer: &'a Tokenizer,
    manner: Manner,
    model: Model,
    cache: Option<KvCache>,
    /// The tokens in the cache.
    cached: Vec<u32>,
}

impl Chat<'_> {
    /// The reply to a conversation.
    fn answer(
        &mut self,
        conversation: &Conversation,
        piece: &mut dyn FnMut(&str) -> std::io::Result<()>,
    ) -> anyhow::Result<Reply> {
        let text = self.template.render(conversation, true, &self.options).map_err(|error| {
            Failure::run_time(
                "E-TEMPLATE",
                format!("the chat template refuses the conversation: {error}"),
                "templates differ in the roles that they take; leave --system out where there is none",
            )
        })?;
        let prompt = self.tokenizer.encode_text(&text)?;
        let needed = capacity(&self.model, prompt.len(), self.manner.sampling.max_new_tokens);
        let (cache, known) = match &mut self.cache {
            Some(cache) if cache.capacity() >= needed => {
                let same = prompt.iter().zip(&self.cached).take_while(|(new, old)| new == old).count();
                (cache, same)
            }
            // Room for a few turns, so that few of them compute the conversation again.
            cache => {
                let room =
                    capacity(&self.model, prompt.len(), self.manner.sampling.max_new_tokens + 4 * CHUNK);
                (cache.insert(self.model.cache(room)?), 0)
            }
        };
        let reply = reply(&mut self.model, cache, known, self.tokenizer, &prompt, &self.manner, piece)?;
        self.cached = prompt;
        self.cached.extend(&reply.ids);
        self.cached.truncate(cache.len());
        Ok(reply)
    }
}
