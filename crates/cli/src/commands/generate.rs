//! `suasion generate`: replies, printed as they are generated.

use super::ConfigArgs;
use crate::failure::{Exit, Failure};
use crate::inputs::model;
use crate::inputs::opened::Opened;
use crate::inputs::{loading, rows};
use crate::interrupt;
use crate::reply::{Manner, Reply, SamplingArgs, Speech, reference};
use crate::ui::Ui;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use suasion_data::Mode;
use suasion_data::report::printable;
use suasion_data::tokens::Tokenizer;
use suasion_train::generate::{Request, capacity, generate_batch};
use suasion_train::{Generated, prompt_ids};

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct GenerateArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The text to continue; - reads it from stdin
    #[arg(short, long, value_name = "P", conflicts_with = "data")]
    prompt: Option<String>,
    /// With --data: only the first N rows
    #[arg(long, value_name = "N")]
    rows: Option<usize>,
    /// With --data: rows to answer at once; faster, and the replies are the same
    #[arg(long, value_name = "N", default_value = "1")]
    batch_size: NonZeroUsize,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Something to continue.
struct Prompt {
    ids: Vec<u32>,
    /// The number of the row that it comes from, and the row's response.
    row: Option<(u64, String)>,
}

impl Prompt {
    /// The random stream of its samples: a row's own, so that its reply depends on no other row.
    fn stream(&self) -> u64 {
        self.row.as_ref().map_or(0, |(row, _)| *row)
    }
}

/// Runs the command.
pub fn run(args: &GenerateArgs, ui: &Ui) -> anyhow::Result<Exit> {
    let loaded = args.config.load(ui)?;
    let config = &loaded.config;
    let opened = Opened::of(config, ui)?;
    let folder = &opened.folder;
    let tokenizer = model::need_tokenizer(folder)?;
    let policy = config.policy();
    let stop_ids = tokenizer.stop_ids(&policy)?;
    let manner = args.sampling.of(&folder.path, config.train.seed, stop_ids, ui)?;

    let prompts = match (&args.prompt, &config.dataset_name) {
        (Some(text), _) => {
            let text = if text == "-" {
                let mut text = String::new();
                std::io::stdin().read_to_string(&mut text)?;
                text
            } else {
                text.clone()
            };
            vec![Prompt { ids: tokenizer.encode_prompt(&text)?, row: None }]
        }
        (None, Some(data)) => {
            let file = rows::resolve(
                data,
                config.dataset_test_split.as_deref().unwrap_or(&config.dataset_train_split),
                ui,
            )?;
            let data = loading::load(ui, &file, folder, &policy, Mode::Prepare, &[])?;
            data.samples
                .iter()
                .take(args.rows.unwrap_or(usize::MAX))
                .map(|sample| Prompt {
                    ids: prompt_ids(sample).to_vec(),
                    row: Some((sample.id.row, reference(sample, tokenizer))),
                })
                .collect()
        }
        (None, None) => {
            return Err(Failure::usage("no prompt is given", "give --prompt P or --data D").into());
        }
    };

    let longest = prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0);
    let at_once = args.batch_size.get().min(prompts.len()).max(1);
    let budget = suasion_train::generate::budget_of(longest, at_once);
    let mut model = opened.start(ui, config).build(budget)?;
    let room = capacity(&model, longest, manner.sampling.max_new_tokens);
    let mut cache = model.cache_of(at_once, room)?;
    let mut printer = Printer {
        out: ui.out(),
        ui,
        tokenizer,
        prompts: &prompts,
        live: at_once == 1 && !ui.json,
        speeches: HashMap::new(),
        finished: BTreeMap::new(),
        next: 0,
        manner: &manner,
        failed: None,
    };
    let requests: Vec<Request> =
        prompts.iter().map(|prompt| Request { prompt: &prompt.ids, stream: prompt.stream() }).collect();
    let shared = RefCell::new(&mut printer);
    let mut on_token = |index, id| shared.borrow_mut().token(index, id);
    let mut done = |index, generated| shared.borrow_mut().done(index, generated);
    generate_batch(&mut model, &mut cache, &requests, &manner.sampling, &mut on_token, &mut done)?;
    match printer.failed {
        Some(error) => Err(error.into()),
        None => Ok(Exit::Done),
    }
}

/// Prints replies in the order of the prompts, whatever the order in which they are finished.
struct Printer<'a, W: Write> {
    out: W,
    ui: &'a Ui,
    tokenizer: &'a Tokenizer,
    prompts: &'a [Prompt],
    manner: &'a Manner,
    /// Print tokens as they are generated.
    live: bool,
    /// The replies under way, by prompt.
    speeches: HashMap<usize, Speech<'a>>,
    /// Finished replies that wait for one before them.
    finished: BTreeMap<usize, Reply>,
    /// The prompt whose reply is printed next.
    next: usize,
    failed: Option<io::Error>,
}

impl<'a, W: Write> Printer<'a, W> {
    fn speech(&mut self, index: usize) -> &mut Speech<'a> {
        let (tokenizer, prompts, manner) = (self.tokenizer, self.prompts, self.manner);
        let new = || Speech::new(tokenizer, &prompts[index].ids, &manner.stop_strings);
        self.speeches.entry(index).or_insert_with(new)
    }

    fn token(&mut self, index: usize, id: u32) -> ControlFlow<()> {
        if interrupt::raised() {
            return ControlFlow::Break(());
        }
        let first = !self.speeches.contains_key(&index);
        let piece = self.speech(index).take(id);
        if self.live {
            let heading = if first { self.heading(index) } else { Ok(()) };
            let written = heading.and_then(|()| self.piece(piece.as_deref()));
            self.note(written)?;
        }
        if self.speech(index).has_ended() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn done(&mut self, index: usize, generated: Generated) -> ControlFlow<()> {
        let first = !self.speeches.contains_key(&index);
        let rest = self.speech(index).finish();
        if self.live {
            let heading = if first { self.heading(index) } else { Ok(()) };
            let written = heading.and_then(|()| self.piece(rest.as_deref()));
            self.note(written)?;
        }
        let Some(speech) = self.speeches.remove(&index) else { return ControlFlow::Continue(()) };
        self.finished.insert(index, speech.reply(generated.ids, generated.stopped));
        while let Some(reply) = self.finished.remove(&self.next) {
            let index = self.next;
            self.next += 1;
            let written = self.print(index, &reply);
            self.note(written)?;
        }
        if interrupt::raised() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// Ends the generation where the output cannot be written.
    fn note(&mut self, written: io::Result<()>) -> ControlFlow<()> {
        match written {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                self.failed = Some(error);
                ControlFlow::Break(())
            }
        }
    }

    fn heading(&mut self, index: usize) -> io::Result<()> {
        match &self.prompts[index].row {
            Some((row, _)) => writeln!(self.out, "{}--- row {row}", if index > 0 { "\n" } else { "" }),
            None => Ok(()),
        }
    }

    fn piece(&mut self, text: Option<&str>) -> io::Result<()> {
        let Some(text) = text else { return Ok(()) };
        write!(self.out, "{}", printable(text))?;
        self.out.flush()
    }

    fn print(&mut self, index: usize, reply: &Reply) -> io::Result<()> {
        let prompt = &self.prompts[index];
        if !self.ui.json {
            if !self.live {
                self.heading(index)?;
                write!(self.out, "{}", printable(&reply.text))?;
            }
            writeln!(self.out)?;
            self.out.flush()?;
            self.ui.note(format_args!("[{} tokens; {}]", reply.ids.len(), reply.why()));
            return Ok(());
        }
        let mut line = serde_json::json!({
            "prompt": self.tokenizer.decode(&prompt.ids, false),
            "reply": reply.text,
            "stopped": reply.stopped_name(),
            "prompt_tokens": prompt.ids.len(),
            "new_tokens": reply.ids.len(),
            "ids": reply.ids,
        });
        if let (Some((row, reference)), Some(object)) = (&prompt.row, line.as_object_mut()) {
            object.insert("row".into(), (*row).into());
            object.insert("reference".into(), reference.as_str().into());
        }
        // A line per reply, so that replies can be read while others are generated.
        writeln!(self.out, "{line}")?;
        self.out.flush()
    }
}
