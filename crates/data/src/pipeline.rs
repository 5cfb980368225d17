//! The rooms over a whole source: parallel over rows, results in source order, bounded memory.
//!
//! One thread reads and cuts rows out of the stream, rayon's current pool turns chunks of them into outcomes,
//! and the calling thread hands these on in order. A row's outcome depends on the row alone, and chunks are cut
//! where the rows say, so the result is the same for any number of threads; what depends on earlier rows (D001)
//! happens in order.

use crate::audit::{self, Filter, Subject};
use crate::chat::Conversation;
use crate::example::{self, Body, Example, Tokenised};
use crate::label::{self, Special};
use crate::policy::{OnBadRow, Policy, TruncationMode};
use crate::render::{self, Rendered, Stops};
use crate::source::{RawRow, Source, SourceHash};
use crate::template::{Chat, ChatRenderer, ChatTemplate, TemplateOptions};
use crate::tokens::{Encoded, Straddle, Tokenizer};
use crate::truncate::{self, Fit, Plan};
use crate::{Code, Error, Finding, IGNORE, Level, Origin, Result, RowId, Sample};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

pub use crate::duplicates::Duplicates;
pub use crate::split::split;
pub use crate::summary::{CodeCount, ROWS_LISTED, SECTION_ORDER, SectionStats, Summary};

/// Under `on_bad_row = error` the search for further bad rows stops at this many.
pub const BAD_ROWS_LISTED: usize = 20;

/// Rows in one chunk, which is one thread's task: enough that handing it over costs nothing.
const CHUNK_ROWS: usize = 64;

/// Bytes in one chunk, unless one row has more.
const CHUNK_BYTES: usize = 1 << 20;

/// What the run is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// To write or to evaluate: labels are taken as they are, findings are reported, bad rows are subject to
    /// `on_bad_row`, and padding is removed (by attention mask, never by id).
    #[default]
    Prepare,
    /// To train: as `Prepare`, and rows with a finding of [`audit::REFUSED`] are bad rows, too.
    Train,
    /// To look: every row that has tokens is handed on as it is, whatever its findings, and bad rows never stop the run.
    Verify,
}

/// The rooms with their settings.
#[derive(Clone)]
pub struct Pipeline<'a> {
    /// Needed for text rows; for tokenised rows it only serves the audits.
    pub tokenizer: Option<&'a Tokenizer>,
    /// The model's chat template: needed for conversations, and what instructions are rendered by where there is one.
    pub template: Option<&'a ChatTemplate>,
    /// Every choice that decides labels.
    pub policy: &'a Policy,
    /// The policy that the audits hold rows against, where it is not `policy`: prepared rows carry weights that
    /// their own manifest asked for ([`crate::prepared::Manifest::asked`]).
    pub asked: Option<&'a Policy>,
    /// What the run is for.
    pub mode: Mode,
    /// The model's number of embeddings: ids beyond it are an error of their row.
    pub vocab_size: Option<usize>,
    /// Keep texts and byte ranges in [`Kept`], for views and `--with-text`.
    pub keep_text: bool,
    /// Findings that are wanted. One that is ignored does not refuse its row either.
    pub filter: Filter,
}

/// A row that became a sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Kept {
    /// The sample.
    pub sample: Sample,
    /// What is worth knowing about it.
    pub findings: Vec<Finding>,
    /// What truncation cut, in order; empty for a whole row.
    pub cuts: Vec<Cut>,
    /// The whole rendered text (before truncation), where `keep_text` asks for it and the row has one.
    pub text: Option<String>,
    /// The bytes of `text` that each token of `sample` stands for; only for rows that came as text.
    pub bytes: Option<Vec<Range<u32>>>,
}

/// A run of tokens that truncation cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The index in the sample before which they stood.
    pub at: usize,
    /// How many there were.
    pub tokens: usize,
    /// Their bytes in the text; empty where there is none.
    pub bytes: Range<u32>,
    /// The origin of the first of them.
    pub origin: Origin,
}

/// Why a row is left out though nothing is wrong with it as data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// Longer than `max_length`, and the mode is `drop`.
    TooLong,
    /// Truncation left it without a target.
    NoTarget,
}

impl DropReason {
    /// Every reason.
    pub const ALL: [DropReason; 2] = [DropReason::TooLong, DropReason::NoTarget];

    /// In words, for summaries.
    pub fn meaning(self) -> &'static str {
        match self {
            DropReason::TooLong => "longer than max_length",
            DropReason::NoTarget => "without a target",
        }
    }

    /// The key used in JSON.
    pub fn name(self) -> &'static str {
        match self {
            DropReason::TooLong => "too_long",
            DropReason::NoTarget => "no_target",
        }
    }
}

/// What became of a row.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // almost all are Kept
pub enum Outcome {
    /// It is a sample.
    Kept(Kept),
    /// It is left out, and counted.
    Dropped {
        /// Which row.
        id: RowId,
        /// Why.
        reason: DropReason,
        /// The findings that say so.
        findings: Vec<Finding>,
    },
    /// It cannot be a sample.
    Failed {
        /// Which row.
        id: RowId,
        /// Why, with help.
        error: Error,
        /// The same as findings; the first is the reason.
        findings: Vec<Finding>,
    },
}

impl Outcome {
    /// The row that it is about.
    pub fn id(&self) -> &RowId {
        match self {
            Outcome::Kept(kept) => &kept.sample.id,
            Outcome::Dropped { id, .. } | Outcome::Failed { id, .. } => id,
        }
    }

    /// What was found about the row.
    pub fn findings(&self) -> &[Finding] {
        match self {
            Outcome::Kept(Kept { findings, .. })
            | Outcome::Dropped { findings, .. }
            | Outcome::Failed { findings, .. } => findings,
        }
    }
}

/// How far a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Rows handed on.
    pub rows: u64,
    /// Bytes of the source read, as stored.
    pub bytes: u64,
    /// The source's size in bytes, as stored.
    pub size: u64,
    /// Tokens of kept rows.
    pub tokens: u64,
}

/// A chunk of rows that is done.
#[derive(Debug)]
pub struct Done<'a, T> {
    /// Outcomes in source order, with what was made of each.
    pub rows: Vec<(Outcome, T)>,
    /// Every row of the run up to here, in numbers.
    pub summary: &'a Summary,
    /// How far the run is.
    pub progress: Progress,
}

impl<'a> Pipeline<'a> {
    /// A pipeline that prepares, without a vocabulary limit, keeping no texts.
    pub fn new(tokenizer: Option<&'a Tokenizer>, policy: &'a Policy) -> Pipeline<'a> {
        Pipeline {
            tokenizer,
            template: None,
            policy,
            asked: None,
            mode: Mode::default(),
            vocab_size: None,
            keep_text: false,
            filter: Filter::default(),
        }
    }

    /// Runs over a whole source. `each` gets every outcome in source order; an error that it returns ends the run.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Source`] and [`Error::Tokenizer`] end the run. Under `on_bad_row = error`, and not
    /// in [`Mode::Verify`], bad rows end it with [`Error::BadRows`], after all of them, or
    /// [`BAD_ROWS_LISTED`], were found and handed to `each`.
    pub fn run(
        &self,
        path: impl AsRef<Path>,
        progress: impl FnMut(Progress),
        each: impl FnMut(Outcome) -> Result<()>,
    ) -> Result<Summary> {
        self.run_source(Source::open(path)?, progress, each)
    }

    /// [`Pipeline::run`] over a source that is open.
    ///
    /// # Errors
    /// As [`Pipeline::run`].
    pub fn run_source(
        &self,
        source: Source,
        mut progress: impl FnMut(Progress),
        mut each: impl FnMut(Outcome) -> Result<()>,
    ) -> Result<Summary> {
        let mut seen = Duplicates::default();
        self.over(
            source,
            &mut seen,
            |_| (),
            |chunk| {
                chunk.rows.into_iter().try_for_each(|(outcome, ())| each(outcome))?;
                progress(chunk.progress);
                Ok(())
            },
        )
    }

    /// Runs over what is left of an open source; `seen` are the rows before it. `work` makes something of each outcome
    /// on the thread that made it (the bytes to write, say), before anything is known of other rows; `each` then gets
    /// chunks of both, in source order. Where chunks end depends on the rows alone.
    ///
    /// # Errors
    /// As [`Pipeline::run`].
    pub fn over<T: Send>(
        &self,
        mut source: Source,
        seen: &mut Duplicates,
        work: impl Fn(&Outcome) -> T + Sync,
        mut each: impl FnMut(Done<'_, T>) -> Result<()>,
    ) -> Result<Summary> {
        let rooms = Rooms::new(self)?;
        if let Some(projection) = example::projection(self.policy.format, self.keep_text) {
            source.project(projection)?;
        }
        let (read, size) = (source.bytes_read(), source.size());
        let mut summary = Summary::default();
        let mut bad: Vec<Error> = Vec::new();
        let stop_on_bad = self.mode != Mode::Verify && self.policy.on_bad_row == OnBadRow::Error;
        let mut stopped = false;

        let hash = std::thread::scope(|scope| -> Result<Option<SourceHash>> {
            let (sender, receiver) = mpsc::sync_channel::<Vec<RawRow>>(2);
            let reader = scope.spawn(move || read_chunks(source, &sender));
            let (rooms, work) = (&rooms, &work);
            rayon::in_place_scope(|pool| -> Result<()> {
                // Each chunk's result has a channel of its own; the channels are in source order. The pool has
                // two chunks per thread to go on with while this thread hands on the results of another.
                let mut pending: VecDeque<mpsc::Receiver<Result<Chunk<T>>>> = VecDeque::new();
                let most = 2 * rayon::current_num_threads() + 1;
                loop {
                    while pending.len() < most {
                        let next = match pending.is_empty() {
                            true => receiver.recv().ok(),
                            false => receiver.try_recv().ok(),
                        };
                        let Some(rows) = next else { break };
                        let (done, result) = mpsc::sync_channel(1);
                        // Where the run has ended meanwhile, nobody wants the result.
                        pool.spawn(move |_| drop(done.send(rooms.chunk(rows, work))));
                        pending.push_back(result);
                    }
                    // A task that panicked ends the loop; its panic goes on where the pool's scope ends.
                    let Some(chunk) = pending.pop_front().and_then(|result| wait(&result)) else {
                        return Ok(());
                    };
                    let mut chunk = chunk?;
                    let mut rows = Vec::with_capacity(chunk.rows.len());
                    for (mut outcome, hash, made) in std::mem::take(&mut chunk.rows) {
                        if let Some(finding) = self.duplicate(&mut outcome, hash, seen)? {
                            chunk.summary.add_finding(&finding);
                        }
                        if stop_on_bad && let Outcome::Failed { error, .. } = &mut outcome {
                            // The error is needed twice: `each` gets a copy in words.
                            let copy = error.restate();
                            bad.push(std::mem::replace(error, copy));
                        }
                        rows.push((outcome, made));
                        if bad.len() == BAD_ROWS_LISTED {
                            stopped = true;
                            break;
                        }
                    }
                    summary.merge(&chunk.summary);
                    summary.untemplated = rooms.untemplated.load(Ordering::Relaxed);
                    if rooms.templated.load(Ordering::Relaxed) {
                        summary.template = self.template.map(|template| template.fingerprint().to_string());
                        let today = rooms.chats.as_ref().and_then(ChatRenderer::today);
                        summary.template_date = today.map(|date| date.to_string());
                    }
                    let bytes = read.load(Ordering::Relaxed);
                    let progress = Progress { rows: summary.rows, bytes, size, tokens: summary.tokens };
                    each(Done { rows, summary: &summary, progress })?;
                    if stopped {
                        return Ok(());
                    }
                }
            })?;
            // Where the run stopped early, the reader ends at its next chunk, and its source stays unread.
            drop(receiver);
            let hash = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            if stopped { Ok(None) } else { hash }
        })?;
        if !bad.is_empty() {
            let first = Box::new(bad.remove(0));
            let help = match first.help() {
                Some(help) if help.contains('\n') => {
                    format!("{help}\nor leave bad rows out with on_bad_row=skip")
                }
                Some(help) => format!("{help}; or leave bad rows out with on_bad_row=skip"),
                None => "leave bad rows out with on_bad_row=skip".to_string(),
            };
            return Err(Error::BadRows { first, others: bad, stopped, help });
        }
        summary.source = hash;
        Ok(summary)
    }

    /// Runs over a whole source and keeps the samples.
    ///
    /// # Errors
    /// As [`Pipeline::run`].
    pub fn samples(&self, path: impl AsRef<Path>) -> Result<(Vec<Sample>, Summary)> {
        let mut samples = Vec::new();
        let summary = self.run(
            path,
            |_| {},
            |outcome| {
                if let Outcome::Kept(kept) = outcome {
                    samples.push(kept.sample);
                }
                Ok(())
            },
        )?;
        Ok((samples, summary))
    }

    /// One row through all rooms (D001 for duplicates apart, which needs the other rows).
    ///
    /// # Errors
    /// What would end a whole run: a missing tokenizer, a stop token that is none.
    pub fn row(&self, raw: RawRow) -> Result<Outcome> {
        Ok(Rooms::new(self)?.outcome(raw)?.0)
    }

    /// D001, first kind: the row has the same ids as an earlier one.
    fn duplicate(&self, outcome: &mut Outcome, hash: u128, seen: &mut Duplicates) -> Result<Option<Finding>> {
        let Outcome::Kept(kept) = outcome else { return Ok(None) };
        if !self.filter.accepts(Code::D001) {
            return Ok(None);
        }
        let row = kept.sample.id.row;
        let Some(first) = seen.first(hash, row)? else { return Ok(None) };
        let finding = Finding::new(row, Code::D001, format!("the same tokens as row {first}"));
        kept.findings.push(finding.clone());
        Ok(Some(finding))
    }
}

/// Cuts a source into chunks of rows, as long as somebody takes them. The hash of the whole source.
fn read_chunks(mut source: Source, sender: &mpsc::SyncSender<Vec<RawRow>>) -> Result<Option<SourceHash>> {
    let (mut chunk, mut bytes) = (Vec::new(), 0);
    while let Some(row) = source.next_row()? {
        bytes += row.size;
        chunk.push(row);
        if chunk.len() == CHUNK_ROWS || bytes >= CHUNK_BYTES {
            bytes = 0;
            if sender.send(std::mem::take(&mut chunk)).is_err() {
                return Ok(None);
            }
        }
    }
    if !chunk.is_empty() && sender.send(chunk).is_err() {
        return Ok(None);
    }
    source.finish().map(Some)
}

/// A task's result, or `None` where it panicked. A thread of the pool works on other tasks while it waits: it may be
/// the only one.
fn wait<T>(result: &mpsc::Receiver<T>) -> Option<T> {
    use mpsc::RecvTimeoutError::Timeout;
    loop {
        let nap = match rayon::yield_now() {
            None => return result.recv().ok(),
            Some(rayon::Yield::Executed) => std::time::Duration::ZERO,
            Some(rayon::Yield::Idle) => IDLE,
        };
        match result.recv_timeout(nap) {
            Err(Timeout) => {}
            received => return received.ok(),
        }
    }
}

/// How long a thread of the pool sleeps where there is nothing to do but wait.
const IDLE: std::time::Duration = std::time::Duration::from_millis(1);

/// What became of a chunk of rows.
struct Chunk<T> {
    /// Outcomes, with the hash of their ids, and what was made of each.
    rows: Vec<(Outcome, u128, T)>,
    summary: Summary,
}

/// A pipeline with what is looked up once.
struct Rooms<'a> {
    settings: &'a Pipeline<'a>,
    special: Special,
    stops: Stops,
    chats: Option<ChatRenderer<'a>>,
    /// True once a row went through the chat template.
    templated: AtomicBool,
    /// True once an instruction was rendered plainly for want of one.
    untemplated: AtomicBool,
}

/// A row on its way, before truncation.
struct Whole {
    sample: Sample,
    findings: Vec<Finding>,
    text: Option<String>,
    bytes: Option<Vec<Range<u32>>>,
}

/// A row that fails: the error, and the finding that it is.
struct Bad {
    error: Error,
    code: Code,
    others: Vec<Finding>,
}

impl From<Error> for Bad {
    fn from(error: Error) -> Bad {
        Bad { error, code: Code::Row, others: Vec::new() }
    }
}

/// Ends the row, or the whole run.
enum Halt {
    Row(Box<Bad>),
    /// Nothing is wrong with the conversation, and nothing of it is learned.
    Untaught(&'static str),
    Run(Error),
}

impl From<Error> for Halt {
    fn from(error: Error) -> Halt {
        match error {
            Error::Row { .. } => Halt::Row(Box::new(error.into())),
            other => Halt::Run(other),
        }
    }
}

impl<'a> Rooms<'a> {
    fn new(settings: &'a Pipeline<'a>) -> Result<Rooms<'a>> {
        let (mut special, mut stops) = (Special::default(), Stops::default());
        if let Some(tokenizer) = settings.tokenizer {
            special = Special::of(tokenizer, settings.policy)?;
            stops.eos = tokenizer.eos().map(|t| t.content.clone());
            stops.all = special.stops.iter().map(|&id| tokenizer.token_text(id)).collect();
            if let Some(eos) = &stops.eos
                && !stops.all.contains(eos)
            {
                stops.all.push(eos.clone());
            }
        }
        let (templated, untemplated) = (AtomicBool::new(false), AtomicBool::new(false));
        let options = TemplateOptions::of(settings.policy);
        let chats = settings.template.map(|t| ChatRenderer::new(t, settings.policy, &stops, &options));
        Ok(Rooms { settings, special, stops, chats, templated, untemplated })
    }

    /// A chunk of rows, in order.
    fn chunk<T>(&self, rows: Vec<RawRow>, work: impl Fn(&Outcome) -> T) -> Result<Chunk<T>> {
        let mut chunk = Chunk { rows: Vec::with_capacity(rows.len()), summary: Summary::default() };
        for raw in rows {
            let (outcome, hash) = self.outcome(raw)?;
            chunk.summary.add(&outcome);
            let made = work(&outcome);
            chunk.rows.push((outcome, hash, made));
        }
        Ok(chunk)
    }

    /// One row to its outcome and the hash of its ids.
    fn outcome(&self, raw: RawRow) -> Result<(Outcome, u128)> {
        let id = raw.id.clone();
        match self.through(raw) {
            Ok((mut outcome, hash)) => {
                if let Outcome::Kept(Kept { findings, .. }) | Outcome::Dropped { findings, .. } = &mut outcome
                {
                    findings.retain(|f| self.settings.filter.accepts(f.code));
                }
                Ok((outcome, hash))
            }
            Err(Halt::Run(error)) => Err(error),
            Err(Halt::Untaught(why)) => {
                let mut findings = vec![Finding::new(id.row, Code::M001, why)];
                findings.retain(|f| self.settings.filter.accepts(f.code));
                Ok((Outcome::Dropped { id, reason: DropReason::NoTarget, findings }, 0))
            }
            Err(Halt::Row(bad)) => {
                let Bad { error, code, others } = *bad;
                let message = match &error {
                    Error::Row { message, .. } => message.clone(),
                    other => other.to_string(),
                };
                let message = message.strip_prefix(&format!("{code}: ")).unwrap_or(&message).to_string();
                let mut findings = vec![Finding { row: id.row, code, level: Level::Error, message }];
                findings.extend(others.into_iter().filter(|f| f.code != code));
                findings.retain(|f| self.settings.filter.accepts(f.code));
                Ok((Outcome::Failed { id, error, findings }, 0))
            }
        }
    }

    fn through(&self, raw: RawRow) -> Result<(Outcome, u128), Halt> {
        let policy = self.settings.policy;
        let example = Example::read(raw, policy.format)?;
        let id = example.id.clone();
        let mut whole = match example.body {
            Body::Text { text, prompt_len } => {
                let marker = render::starts_with_response_marker(&text[prompt_len..], policy);
                let findings = marker.then(|| {
                    let message = "the response starts with the marker of the response section: the model learns to write it";
                    Finding::new(id.row, Code::M007, message)
                });
                let rendered = render::render(id.clone(), text, prompt_len, policy, &self.stops);
                self.rendered(rendered, findings.into_iter().collect())?
            }
            Body::Segments(list) => {
                let rendered = render::render_segments(id.clone(), &list, policy, &self.stops);
                self.rendered(rendered, Vec::new())?
            }
            Body::Alpaca(row) => match self.settings.template {
                Some(_) => self.chat(id.clone(), &row.conversation())?,
                None => {
                    self.untemplated.store(true, Ordering::Relaxed);
                    let rendered = render::render_alpaca(id.clone(), &row, policy, &self.stops);
                    self.rendered(rendered, Vec::new())?
                }
            },
            Body::Chat(conversation) => self.chat(id.clone(), &conversation)?,
            Body::Tokenised(row) => self.tokenised(id.clone(), *row)?,
        };
        self.check_vocabulary(&whole.sample)?;
        if whole.sample.targets().next().is_none() {
            let (reason, findings) = (DropReason::NoTarget, whole.findings);
            return Ok((Outcome::Dropped { id, reason, findings }, 0));
        }
        self.refuse(&mut whole)?;
        if self.settings.mode != Mode::Verify && whole.sample.origins.contains(&Origin::Padding) {
            let plan = Plan::strip_padding(&whole.sample.origins);
            whole.sample = cut_sample(whole.sample, &plan);
        }
        self.fit(id, whole)
    }

    /// A conversation to text by the model's own chat template, then as any text.
    fn chat(&self, id: RowId, conversation: &Conversation) -> Result<Whole, Halt> {
        self.tokenizer(&id)?;
        let Some(chats) = &self.chats else {
            return Err(Halt::Run(Error::Source {
                path: id.file.to_path_buf(),
                message: format!(
                    "{id} is a conversation, and the model folder has no chat template that can be used"
                ),
                help: "use the instruct model's folder, or put the template into it as chat_template.jinja"
                    .into(),
            }));
        };
        self.templated.store(true, Ordering::Relaxed);
        let said =
            |m: &serde_json::Map<String, serde_json::Value>| m["role"] == "assistant" || m["role"] == "model";
        if !conversation.messages[conversation.prompt_messages..].iter().any(said) {
            return Err(Halt::Untaught(match conversation.prompt_messages {
                0 => "the conversation has no assistant turn to learn from",
                _ => "nothing after the prompt is an assistant turn to learn from",
            }));
        }
        let Chat { rendered, findings } = chats.spans(id, conversation)?;
        if rendered.response().all(str::is_empty) {
            let calls =
                conversation.messages.iter().any(|m| m.get("tool_calls").is_some_and(|c| !c.is_null()));
            return Err(Halt::Untaught(match calls {
                true => {
                    "every answer of the conversation is empty: the chat template leaves out its tool calls"
                }
                false => "every answer of the conversation is empty",
            }));
        }
        self.rendered(rendered, findings)
    }

    fn tokenizer(&self, id: &RowId) -> Result<&'a Tokenizer, Halt> {
        self.settings.tokenizer.ok_or_else(|| {
            Halt::Run(Error::Source {
                path: id.file.to_path_buf(),
                message: format!("{id} is text, and there is no tokenizer to read it with"),
                help: "name the model folder that holds tokenizer.json".into(),
            })
        })
    }

    /// A rendered row to tokens and labels, with its findings after `extra`.
    fn rendered(&self, rendered: Rendered, mut extra: Vec<Finding>) -> Result<Whole, Halt> {
        let policy = self.settings.policy;
        let id = rendered.id.clone();
        let tokenizer = self.tokenizer(&id)?;
        let silent = rendered.response().all(str::is_empty);
        if silent {
            return Err(Halt::Row(Box::new(Bad {
                error: Error::row(id, "M001: the response is empty", "write the response, or remove the row"),
                code: Code::M001,
                others: Vec::new(),
            })));
        }
        let Encoded { tokens, straddles, structural_from_content, mixed_weights, double_bos } =
            tokenizer.encode(&rendered, policy)?;
        let row = id.row;
        // A token across the response's start mixes weights too; it is told once.
        let told = |i: &usize| straddles.iter().any(|s| s.tokens.contains(i));
        let mixed: Vec<usize> = mixed_weights.into_iter().filter(|i| !told(i)).collect();
        extra.extend(audit::m003(row, &self.straddles(tokenizer, &straddles)));
        if let Some(first) = mixed.first() {
            let message = format!(
                "{} across two loss weights; each takes the larger (the first is token {first})",
                if mixed.len() == 1 { "1 token lies".into() } else { format!("{} tokens lie", mixed.len()) }
            );
            extra.push(Finding::new(row, Code::M003, message));
        }
        if let Some(&first) = structural_from_content.first() {
            let id = tokens.ids[first];
            let n = structural_from_content.len();
            let message = format!(
                "content makes {n} structural token{} (the first is token {first}, {:?}, in {})",
                if n == 1 { "" } else { "s" },
                tokenizer.token_text(id),
                tokens.origins[first],
            );
            extra.push(Finding::new(row, Code::S001, message));
        }
        let bytes = self.settings.keep_text.then(|| tokens.bytes.clone());
        let sample = label::label(id, tokens, policy);
        let subject = Subject { sample: &sample, given: None, special: &self.special, policy };
        let mut findings = audit::audit(&subject);
        if double_bos && !findings.iter().any(|f| f.code == Code::M006) {
            findings.push(Finding::new(row, Code::M006, "the row starts with the BOS twice"));
        }
        findings.extend(extra);
        let text = self.settings.keep_text.then(|| {
            let Rendered { text, .. } = rendered;
            text
        });
        Ok(Whole { sample, findings, text, bytes })
    }

    /// Both tokenisations of each straddling place, in words.
    fn straddles(&self, tokenizer: &Tokenizer, straddles: &[Straddle]) -> Vec<String> {
        let show = |ids: &[u32]| {
            let list: Vec<String> =
                ids.iter().map(|&id| format!("{id} {:?}", tokenizer.token_text(id))).collect();
            list.join(", ")
        };
        let one = |s: &Straddle| {
            let (token, at, joint, split) = (s.tokens.start, s.at, show(&s.joint), show(&s.split));
            format!(
                "token {token} straddles the boundary at byte {at}: [{joint}]; cut there it would be [{split}]"
            )
        };
        straddles.iter().map(one).collect()
    }

    /// A tokenised row to labels, with its findings.
    fn tokenised(&self, id: RowId, row: Tokenised) -> Result<Whole, Halt> {
        let policy = self.settings.policy;
        if let Some(why) = &row.broken {
            let help = "write the length of each sequence as \"seq_lengths\", or leave the rows unpacked";
            return Err(Halt::Row(Box::new(Bad {
                error: Error::row(id, format!("P001: {why}"), help),
                code: Code::P001,
                others: Vec::new(),
            })));
        }
        let sample = label::label_tokenised(id, &row, &self.special, policy);
        let asked = self.settings.asked.unwrap_or(policy);
        let subject = Subject { sample: &sample, given: Some(&row), special: &self.special, policy: asked };
        let findings = audit::audit(&subject);
        Ok(Whole { sample, findings, text: row.text.filter(|_| self.settings.keep_text), bytes: None })
    }

    /// Ids that the model has no embedding for.
    fn check_vocabulary(&self, sample: &Sample) -> Result<(), Halt> {
        let Some(limit) = self.settings.vocab_size else { return Ok(()) };
        let Some(at) = sample.input_ids.iter().position(|&id| id as usize >= limit) else { return Ok(()) };
        let token = sample.input_ids[at];
        let tokenizer = match self.settings.tokenizer {
            Some(t) => format!(" and the tokenizer {}", t.vocab_size()),
            None => String::new(),
        };
        let message =
            format!("token {at} has the id {token}, and the model has {limit} embeddings{tokenizer}");
        let help =
            "the tokenizer and the model do not belong together, or the model needs its embeddings resized";
        Err(Error::row(sample.id.clone(), message, help).into())
    }

    /// Rows that must not be trained on as they are.
    fn refuse(&self, whole: &mut Whole) -> Result<(), Halt> {
        if self.settings.mode != Mode::Train {
            return Ok(());
        }
        let refused = |f: &&Finding| {
            f.level == Level::Error
                && audit::REFUSED.contains(&f.code)
                && self.settings.filter.accepts(f.code)
        };
        let Some(finding) = whole.findings.iter().find(refused).cloned() else { return Ok(()) };
        let help = match finding.code {
            Code::M004 | Code::M008 => {
                "correct the labels, or ask for it: completion_only_loss=false, or prompt_loss_weight"
            }
            Code::M005 => "set the labels of padding to -100",
            Code::M006 => "remove the BOS from the text: the tokenizer adds one",
            Code::M009 => {
                "label the stop token with its id: mask padding by position, not by comparing with the pad id"
            }
            Code::L001 => "labels are -100 or the input id at the same place, not shifted",
            _ => "correct the row",
        };
        let message = format!("{}: {}", finding.code, finding.message);
        Err(Halt::Row(Box::new(Bad {
            error: Error::row(whole.sample.id.clone(), message, help),
            code: finding.code,
            others: std::mem::take(&mut whole.findings),
        })))
    }

    /// Truncation, and what is left after it.
    fn fit(&self, id: RowId, whole: Whole) -> Result<(Outcome, u128), Halt> {
        let policy = self.settings.policy;
        let Whole { sample, mut findings, text, bytes } = whole;
        let (n, max) = (sample.len(), policy.max_length.unwrap_or(usize::MAX));
        // A pack is as long as whoever made it wanted: only its rows are held to max_length, and none is cut.
        if sample.pack.is_some() {
            let longest = sample.longest_row();
            if longest > max && self.settings.mode != Mode::Verify {
                let message = format!("a row of the pack has {longest} tokens, max_length is {max}");
                let help = "raise max_length, or prepare the rows again: a pack is not cut";
                let error = Error::row(id, message, help);
                return Err(Halt::Row(Box::new(Bad { error, code: Code::T001, others: findings })));
            }
            let hash = hash_ids(&sample.input_ids);
            return Ok((Outcome::Kept(Kept { sample, findings, cuts: Vec::new(), text, bytes }), hash));
        }
        let plan = match truncate::fit(&sample.origins, policy.truncation_mode, policy.max_length) {
            Fit::Whole => {
                let hash = hash_ids(&sample.input_ids);
                return Ok((Outcome::Kept(Kept { sample, findings, cuts: Vec::new(), text, bytes }), hash));
            }
            Fit::Drop => {
                let lost = sample.labels.iter().filter(|l| **l != IGNORE).count();
                let message = format!(
                    "the row has {n} tokens, max_length is {max}: left out, with {lost} supervised tokens"
                );
                findings.push(Finding::new(id.row, Code::T001, message));
                return Ok((Outcome::Dropped { id, reason: DropReason::TooLong, findings }, 0));
            }
            Fit::Error => {
                let message = format!("the row has {n} tokens, max_length is {max}");
                let help = "raise max_length, or choose another truncation_mode";
                let error = Error::row(id, message, help);
                return Err(Halt::Row(Box::new(Bad { error, code: Code::T001, others: findings })));
            }
            Fit::Cut(plan) => plan,
        };
        let loss = truncate::loss(&plan, &sample.origins, |i| sample.labels[i] != IGNORE);
        let protected =
            sample.origins.iter().filter(|o| !o.supervised()).count() - loss.prompt_tokens().min(n);
        let mut cuts = Vec::with_capacity(plan.cuts.len());
        let mut gone = 0;
        for cut in &plan.cuts {
            let span = bytes.as_ref().map_or(0..0, |b| b[cut.start].start..b[cut.end - 1].end);
            cuts.push(Cut {
                at: cut.start - gone,
                tokens: cut.len(),
                bytes: span,
                origin: sample.origins[cut.start],
            });
            gone += cut.len();
        }
        let bytes = bytes.map(|b| plan.apply(&b));
        let headless = sample.labels.first() == Some(&IGNORE);
        let sample = cut_sample(sample, &plan);
        let headless = headless && sample.labels.first().is_some_and(|l| *l != IGNORE);
        findings.extend(loss.findings(id.row, max, headless));
        // What is never cut can itself be too long. Then the whole response is gone, whatever weight the prompt has.
        if sample.targets().next().is_none() || sample.len() > max {
            let message = format!(
                "no token of the response is left: the row has {n} tokens, max_length is {max}{}",
                if protected >= max && policy.truncation_mode == TruncationMode::KeepResponse {
                    format!(", and {protected} tokens of the prompt are never cut")
                } else {
                    String::new()
                }
            );
            findings.insert(0, Finding::new(id.row, Code::M001, message));
            return Ok((Outcome::Dropped { id, reason: DropReason::NoTarget, findings }, 0));
        }
        let hash = hash_ids(&sample.input_ids);
        Ok((Outcome::Kept(Kept { sample, findings, cuts, text, bytes }), hash))
    }
}

/// A sample without what a plan cuts.
fn cut_sample(sample: Sample, plan: &Plan) -> Sample {
    let weights = sample.weights.as_ref().map(|w| plan.apply(w));
    Sample {
        id: sample.id,
        input_ids: plan.apply(&sample.input_ids),
        labels: plan.apply(&sample.labels),
        origins: plan.apply(&sample.origins),
        weights: weights.filter(|w| w.iter().any(|w| *w != 0.0 && *w != 1.0)),
        pack: sample.pack.map(|pack| Box::new(pack.cut(plan))),
    }
}

/// 128 bits of BLAKE3 over the ids: no two different rows collide by accident.
pub(crate) fn hash_ids(ids: &[u32]) -> u128 {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = [0u8; 4096];
    for chunk in ids.chunks(buffer.len() / 4) {
        for (place, id) in buffer.chunks_exact_mut(4).zip(chunk) {
            place.copy_from_slice(&id.to_le_bytes());
        }
        hasher.update(&buffer[..chunk.len() * 4]);
    }
    let mut short = [0u8; 16];
    short.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    u128::from_le_bytes(short)
}
