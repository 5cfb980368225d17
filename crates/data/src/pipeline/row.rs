//! Runs every stage for one row: format, template, tokens, labels, audits, truncation.

use super::duplicates::hash_ids;
use super::foreign::{Against, nothing};
use super::outcome::{Cut, DropReason, Kept, Outcome};
use super::summary::Summary;
use super::{Mode, Pipeline};
use crate::audit::turns::Turns;
use crate::audit::{self, Subject};
use crate::example::chat::held;
use crate::example::{self, Body, Conversation, Example, Tokenised};
use crate::label;
use crate::label::truncate::{self, Cuts, Fit};
use crate::policy::{Objective, Policy, TruncationMode};
use crate::render::{self, Rendered, Stops};
use crate::sample::Run;
use crate::source::{MAX_TEXT_BYTES, RawRow, Row};
use crate::template::{Chat, ChatRenderer, TemplateOptions};
use crate::tokens::{Encoded, Special, Straddle, Tokenizer};
use crate::{Code, Error, Finding, IGNORE, Level, Origin, Result, RowId, Sample, Section};
use serde_json::Value;
use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Turns rows into outcomes ([`Pipeline::processor`]).
#[derive(Debug)]
pub struct RowProcessor {
    pipeline: Pipeline,
    special: Special,
    stops: Stops,
    chats: Option<ChatRenderer>,
    /// The turns of the chat template as ids, or why they cannot be determined. Computed with the first row of
    /// tokens that needs it.
    turns: OnceLock<Result<Turns, String>>,
    /// True once the chat template has rendered a row.
    templated: AtomicBool,
    /// True once instructions were rendered without a chat template, because there is none.
    untemplated: AtomicBool,
}

/// The outcome of a row, with values that the stages computed for its sample; these are empty without a sample.
pub(super) struct Processed {
    pub outcome: Outcome,
    /// The hash of the sample's ids.
    pub hash: u64,
    /// The runs of the sample.
    pub runs: Vec<Run>,
}

impl From<Outcome> for Processed {
    /// An outcome without a sample.
    fn from(outcome: Outcome) -> Processed {
        Processed { outcome, hash: 0, runs: Vec::new() }
    }
}

/// A labelled row before truncation.
struct Whole {
    sample: Sample,
    runs: Vec<Run>,
    findings: Vec<Finding>,
    text: Option<String>,
    bytes: Option<Vec<Range<u32>>>,
}

/// Why a row did not become a sample.
enum Halt {
    /// It is bad: the error, the code of its finding, and other findings.
    Bad(Box<(Error, Code, Vec<Finding>)>),
    /// It is a valid conversation without supervised tokens: why.
    Unlearned(&'static str),
    /// An error that ends the run.
    Run(Error),
}

impl Halt {
    fn bad(code: Code, error: Error, others: Vec<Finding>) -> Halt {
        Halt::Bad(Box::new((error, code, others)))
    }
}

impl From<Error> for Halt {
    fn from(error: Error) -> Halt {
        match error {
            Error::Row { .. } => Halt::bad(Code::Row, error, Vec::new()),
            other => Halt::Run(other),
        }
    }
}

impl RowProcessor {
    pub(super) fn new(pipeline: Pipeline) -> Result<RowProcessor> {
        let Pipeline { folder, policy, .. } = &pipeline;
        let special = folder.special(policy)?;
        let stops = folder.stops(&special);
        let options = TemplateOptions::of(policy);
        let template = folder.template.clone();
        let chats = template.map(|template| ChatRenderer::new(template, policy.clone(), &stops, &options));
        let (templated, untemplated) = (AtomicBool::new(false), AtomicBool::new(false));
        let turns = OnceLock::new();
        Ok(RowProcessor { pipeline, special, stops, chats, turns, templated, untemplated })
    }

    /// The outcome of a row, given by its fields: a JSON object, or names with values. Duplicates are not looked for.
    ///
    /// # Errors
    /// Errors that would end a run over many rows: text without a tokenizer, a conversation without a chat template.
    pub fn row<N: Into<String>>(&self, fields: impl IntoIterator<Item = (N, Value)>) -> Result<Outcome> {
        let id = RowId::new(Path::new("row"), 0, None);
        let fields = fields.into_iter().map(|(name, value)| (name.into(), value)).collect();
        let Policy { format, columns, .. } = &*self.pipeline.policy;
        let row = Example::renamed(Row { id: id.clone(), fields }, columns);
        Ok(self.settle(id, self.through(row.and_then(|row| Example::from_row(row, *format))))?.outcome)
    }

    /// The outcome of a row as it is stored in a source. Duplicates are not looked for.
    ///
    /// # Errors
    /// As [`RowProcessor::row`].
    pub fn raw_row(&self, raw: RawRow) -> Result<Outcome> {
        Ok(self.process(raw)?.outcome)
    }

    /// Processes a row of a source.
    pub(super) fn process(&self, raw: RawRow) -> Result<Processed> {
        let id = raw.id.clone();
        let Policy { format, columns, .. } = &*self.pipeline.policy;
        self.settle(id, self.through(Example::read_renamed(raw, *format, columns)))
    }

    /// Adds to a summary the chat template that the rows used, and its date.
    pub(super) fn describe(&self, summary: &mut Summary) {
        summary.untemplated = self.untemplated.load(Ordering::Relaxed);
        match self.turns.get() {
            Some(Ok(turns)) => {
                let owned = |(user, answer): (&str, &str)| (user.to_string(), answer.to_string());
                summary.headers = turns.headers().map(owned);
            }
            Some(Err(why)) => summary.no_turns = Some(why.clone()),
            None => {}
        }
        if let Some(chats) = self.chats.as_ref().filter(|_| self.templated.load(Ordering::Relaxed)) {
            summary.template = Some(chats.template().fingerprint().to_string());
            summary.template_date = chats.today().map(|date| date.to_string());
        }
    }

    /// True if findings with this code count.
    pub(super) fn accepts(&self, code: Code) -> bool {
        self.pipeline.filter.accepts(code)
    }

    /// The outcome of a row, after the filter.
    fn settle(&self, id: RowId, end: Result<Processed, Halt>) -> Result<Processed> {
        match end {
            Ok(mut processed) => {
                if let Outcome::Kept(Kept { findings, .. }) | Outcome::Dropped { findings, .. } =
                    &mut processed.outcome
                {
                    findings.retain(|f| self.accepts(f.code));
                }
                Ok(processed)
            }
            Err(Halt::Run(error)) => Err(error),
            Err(Halt::Unlearned(why)) => {
                let mut findings = vec![Finding::new(id.row, Code::M001, why)];
                findings.retain(|f| self.accepts(f.code));
                Ok(Outcome::Dropped { id, reason: DropReason::NoTarget, findings }.into())
            }
            Err(Halt::Bad(bad)) => {
                let (error, code, others) = *bad;
                let message = match &error {
                    Error::Row { message, .. } => message.clone(),
                    other => other.to_string(),
                };
                let message = message.strip_prefix(&format!("{code}: ")).unwrap_or(&message).to_string();
                let mut findings =
                    vec![Finding { level: Level::Error, ..Finding::new(id.row, code, message) }];
                findings.extend(others.into_iter().filter(|f| f.code != code));
                findings.retain(|f| self.accepts(f.code));
                Ok(Outcome::Failed { id, error, findings }.into())
            }
        }
    }

    /// Runs every stage for a row.
    fn through(&self, row: Result<Example>) -> Result<Processed, Halt> {
        let policy = &*self.pipeline.policy;
        let Example { id, body } = row?;
        check_length(&id, body.text_bytes())?;
        let mut whole = match body {
            Body::Text { text, prompt_len } => {
                let marker = render::starts_with_response_marker(&text[prompt_len..], policy);
                let findings = marker.then(|| {
                    let message = "the response starts with the marker of the response section: the model learns to write it";
                    Finding::new(id.row, Code::M007, message)
                });
                let rendered = render::render(id.clone(), text, prompt_len, policy, &self.stops);
                self.rendered(rendered, findings.into_iter().collect())?
            }
            Body::Whole(_) if policy.objective != Objective::AllTokens => {
                return Err(Error::row(
                    id,
                    "the row is one \"text\": nothing tells its answer from its prompt",
                    "give them as \"prompt\" and \"completion\", or as \"messages\"; to learn all of the text, set \
                     completion_only_loss=false",
                )
                .into());
            }
            Body::Whole(text) => {
                let rendered = render::render(id.clone(), text, 0, policy, &self.stops);
                self.rendered(rendered, Vec::new())?
            }
            Body::Segments(list) => {
                let rendered = render::render_segments(id.clone(), &list, policy, &self.stops);
                self.rendered(rendered, Vec::new())?
            }
            Body::Alpaca(row) => match self.chats {
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
        if !whole.sample.has_target() {
            let (reason, findings) = (DropReason::NoTarget, whole.findings);
            return Ok(Outcome::Dropped { id, reason, findings }.into());
        }
        self.refuse(&mut whole)?;
        if self.pipeline.mode != Mode::Verify && whole.runs.iter().any(|run| run.origin == Origin::Padding) {
            whole.sample = Cuts::padding(&whole.sample.origins).sample(whole.sample);
            whole.runs = whole.sample.runs();
        }
        self.fit(id, whole)
    }

    /// A conversation, rendered by the model's own chat template.
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
        let answer = |m| held(m, "role").is_some_and(|role| role == "assistant" || role == "model");
        if !conversation.messages[conversation.prompt_messages..].iter().any(answer) {
            return Err(Halt::Unlearned(match conversation.prompt_messages {
                0 => "the conversation has no assistant turn to learn from",
                _ => "nothing after the prompt is an assistant turn to learn from",
            }));
        }
        let Chat { rendered, findings } = chats.spans(id.clone(), conversation)?;
        if rendered.response().all(str::is_empty) {
            if let Some(found) = findings.iter().find(|found| found.code == Code::C002) {
                let error = Error::row(id, format!("C002: {}", found.message), Code::C002.rule().help);
                return Err(Halt::bad(Code::C002, error, Vec::new()));
            }
            let calls =
                conversation.messages.iter().any(|m| m.get("tool_calls").is_some_and(|c| !c.is_null()));
            return Err(Halt::Unlearned(match calls {
                true => {
                    "every answer of the conversation is empty: the chat template leaves out its tool calls"
                }
                false => "every answer of the conversation is empty",
            }));
        }
        self.rendered(rendered, findings)
    }

    fn tokenizer(&self, id: &RowId) -> Result<&Tokenizer, Halt> {
        self.pipeline.folder.tokenizer.as_deref().ok_or_else(|| {
            let folder = &self.pipeline.folder.path;
            let named = !folder.as_os_str().is_empty();
            let (path, message) = match named {
                true => (folder.clone(), format!("the folder has no tokenizer.json, and {id} is text")),
                false => (
                    id.file.to_path_buf(),
                    format!("{id} is text, and there is no tokenizer to read it with"),
                ),
            };
            Halt::Run(Error::Source {
                path,
                message,
                help: "name the model folder that holds tokenizer.json".into(),
            })
        })
    }

    /// Tokenises, labels and audits a text. Findings made here come before `extra`.
    fn rendered(&self, rendered: Rendered, mut extra: Vec<Finding>) -> Result<Whole, Halt> {
        let policy = &*self.pipeline.policy;
        let id = rendered.id.clone();
        let tokenizer = self.tokenizer(&id)?;
        check_length(&id, rendered.text.len())?;
        if rendered.response().all(str::is_empty) {
            let help = "write the response, or remove the row";
            return Err(Halt::bad(
                Code::M001,
                Error::row(id, "M001: the response is empty", help),
                Vec::new(),
            ));
        }
        let Encoded { tokens, straddles, structural_from_content, mixed_weights, double_bos } =
            tokenizer.encode(&rendered, policy)?;
        let row = id.row;
        // A token across the start of a response has mixed weights too; it is reported only once.
        let reported = |i: &usize| straddles.iter().any(|s| s.tokens.contains(i));
        let mixed: Vec<usize> = mixed_weights.into_iter().filter(|i| !reported(i)).collect();
        let straddles = straddle_texts(tokenizer, &straddles).into_iter();
        extra.extend(straddles.map(|text| Finding::new(row, Code::M003, text)));
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
        let bytes = self.pipeline.keep_text.then(|| tokens.bytes.clone());
        let sample = label::label(id, tokens, policy);
        let subject = Subject::new(&sample, None, &self.special, policy).with_positions(self.positions());
        let mut findings = audit::audit(&subject);
        if double_bos && !findings.iter().any(|f| f.code == Code::M006) {
            findings.push(Finding::new(row, Code::M006, "the row starts with the BOS twice"));
        }
        findings.extend(extra);
        let (runs, text) = (subject.runs, self.pipeline.keep_text.then_some(rendered.text));
        Ok(Whole { sample, runs, findings, text, bytes })
    }

    /// Labels and audits a row that came as tokens.
    fn tokenised(&self, id: RowId, row: Tokenised) -> Result<Whole, Halt> {
        let policy = &*self.pipeline.policy;
        if let Some(why) = &row.broken {
            let help = "write the length of each sequence as \"seq_lengths\", or leave the rows unpacked";
            return Err(Halt::bad(Code::P001, Error::row(id, format!("P001: {why}"), help), Vec::new()));
        }
        let mut row = row;
        for (origin, _) in row.origins.iter_mut().flatten().filter(|_| self.pipeline.prepared_chats) {
            if let Origin::Prompt { section: section @ Section::Task, .. } = origin {
                *section = Section::User;
            }
        }
        let unlabelled = row.labels.is_none() && row.mask.is_none();
        if unlabelled && policy.objective != Objective::AllTokens {
            if self.pipeline.mode != Mode::Verify {
                return Err(example::without_labels(&id).into());
            }
            // Collators use all tokens that are not padding.
            let real = |i: usize| row.attention.as_ref().is_none_or(|attention| attention[i]);
            let label = |(i, &id): (usize, &u32)| if real(i) { id as i32 } else { IGNORE };
            row.labels = Some(row.input_ids.iter().enumerate().map(label).collect());
        }
        // Weights of 0 and 1 are a mask (ms-swift's `loss_scale`).
        let is_mask = |weights: &mut Vec<f32>| weights.iter().all(|w| *w == 0.0 || *w == 1.0);
        if self.pipeline.mode == Mode::Verify
            && row.origins.is_none()
            && let Some(labels) = &mut row.labels
            && let Some(weights) = row.weights.take_if(is_mask)
        {
            labels.iter_mut().zip(weights).filter(|(_, w)| *w == 0.0).for_each(|(label, _)| *label = IGNORE);
        }
        let tokenizer = self.pipeline.folder.tokenizer.as_deref();
        let (foreign, origins, differences) = match self.pipeline.mode {
            Mode::Verify if row.origins.is_none() => {
                let reference = self.pipeline.reference.as_deref();
                Against { turns: self.turns(), reference, tokenizer }.read(&id, &row, unlabelled)
            }
            _ => (nothing(tokenizer), None, Vec::new()),
        };
        let text = row.text.take().filter(|_| self.pipeline.keep_text);
        let (mut sample, given) = label::label_tokenised(id, row, &self.special, policy);
        if let Some(origins) = origins {
            sample.origins = origins;
        }
        let policy = self.pipeline.labelled_under.as_deref().unwrap_or(policy);
        let subject = Subject::new(&sample, Some(&given), &self.special, policy)
            .with_positions(self.positions())
            .with_foreign(foreign);
        let mut findings = audit::audit(&subject);
        findings.extend(differences);
        let runs = subject.runs;
        Ok(Whole { sample, runs, findings, text, bytes: None })
    }

    /// The turns of the chat template as ids, if it has one and they can be determined.
    fn turns(&self) -> Option<&Turns> {
        let folder = &self.pipeline.folder;
        let (template, tokenizer) = (folder.template.as_ref()?, folder.tokenizer.as_deref()?);
        let of = || Turns::of(template, tokenizer, &self.pipeline.policy, &self.special, &self.stops);
        self.turns.get_or_init(of).as_ref().ok()
    }

    /// The model's number of positions, if rows can be longer.
    fn positions(&self) -> Option<usize> {
        let reach = self.pipeline.policy.max_length.unwrap_or(usize::MAX);
        self.pipeline.folder.positions.filter(|&positions| reach > positions)
    }

    /// Checks that the model has an embedding for each id.
    fn check_vocabulary(&self, sample: &Sample) -> Result<(), Halt> {
        let Some(limit) = self.pipeline.folder.vocab_size else { return Ok(()) };
        // A branch-free loop, which the compiler vectorises: nearly all rows pass.
        let highest = sample.input_ids.iter().fold(0, |highest, &id| id.max(highest));
        if (highest as usize) < limit {
            return Ok(());
        }
        let Some(at) = sample.input_ids.iter().position(|&id| id as usize >= limit) else { return Ok(()) };
        let token = sample.input_ids[at];
        let tokenizer = match &self.pipeline.folder.tokenizer {
            Some(t) => format!(" and the tokenizer {}", t.vocab_size()),
            None => String::new(),
        };
        let message =
            format!("token {at} has the id {token}, and the model has {limit} embeddings{tokenizer}");
        let help =
            "the tokenizer and the model do not belong together, or the model needs its embeddings resized";
        Err(Error::row(sample.id.clone(), message, help).into())
    }

    /// Checks that a row may be trained on.
    fn refuse(&self, whole: &mut Whole) -> Result<(), Halt> {
        if self.pipeline.mode != Mode::Train {
            return Ok(());
        }
        let refused = |f: &&Finding| {
            f.level == Level::Error
                && f.code.rule().refuses
                && self.accepts(f.code)
                && !self.pipeline.allowed.contains(&f.code)
        };
        let Some(finding) = whole.findings.iter().find(refused).cloned() else { return Ok(()) };
        let message = format!("{}: {}", finding.code, finding.message);
        let error = Error::row(whole.sample.id.clone(), message, finding.code.rule().help);
        Err(Halt::bad(finding.code, error, std::mem::take(&mut whole.findings)))
    }

    /// Truncates a row.
    fn fit(&self, id: RowId, whole: Whole) -> Result<Processed, Halt> {
        let policy = &*self.pipeline.policy;
        let Whole { sample, runs, mut findings, text, bytes } = whole;
        let (n, max) = (sample.len(), policy.max_length.unwrap_or(usize::MAX));
        // A pack may have any length: max_length limits its rows, and none of them is cut.
        if sample.pack.is_some() {
            let longest = sample.longest_row();
            if longest > max && self.pipeline.mode != Mode::Verify {
                let message = format!("a row of the pack has {longest} tokens, max_length is {max}");
                let help = "raise max_length, or prepare the rows again: a pack is not cut";
                let error = Error::row(id, message, help);
                return Err(Halt::bad(Code::T001, error, findings));
            }
            return Ok(kept(Kept { sample, findings, cuts: Vec::new(), text, bytes }, runs));
        }
        let cuts = match truncate::fit(&sample.origins, policy.truncation_mode, policy.max_length) {
            Fit::Whole => {
                return Ok(kept(Kept { sample, findings, cuts: Vec::new(), text, bytes }, runs));
            }
            Fit::Drop => {
                let lost = sample.labels.iter().filter(|l| **l != IGNORE).count();
                let message = format!(
                    "the row has {n} tokens, max_length is {max}: left out, with {lost} supervised tokens"
                );
                findings.push(Finding::new(id.row, Code::T001, message));
                return Ok(Outcome::Dropped { id, reason: DropReason::TooLong, findings }.into());
            }
            Fit::Error => {
                let message = format!("the row has {n} tokens, max_length is {max}");
                let help = "raise max_length, or choose another truncation_mode";
                let error = Error::row(id, message, help);
                return Err(Halt::bad(Code::T001, error, findings));
            }
            Fit::Cut(cuts) => cuts,
        };
        let loss = truncate::loss(&cuts, &sample.origins, |i| sample.labels[i] != IGNORE);
        let protected =
            sample.origins.iter().filter(|o| !o.supervised()).count() - loss.prompt_tokens().min(n);
        let mut shown = Vec::with_capacity(cuts.runs.len());
        let mut gone = 0;
        for cut in &cuts.runs {
            let span = bytes.as_ref().map_or(0..0, |b| b[cut.start].start..b[cut.end - 1].end);
            shown.push(Cut {
                at: cut.start - gone,
                tokens: cut.len(),
                bytes: span,
                origin: sample.origins[cut.start],
            });
            gone += cut.len();
        }
        let bytes = bytes.map(|b| cuts.apply(&b));
        let headless = sample.labels.first() == Some(&IGNORE);
        let sample = cuts.sample(sample);
        let headless = headless && sample.labels.first().is_some_and(|l| *l != IGNORE);
        findings.extend(loss.findings(id.row, max, headless));
        // The parts that are never cut can be too long themselves. Then the whole response was cut, whatever the
        // prompt's weights.
        if !sample.has_target() || sample.len() > max {
            let message = format!(
                "no token of the response is left: the row has {n} tokens, max_length is {max}{}",
                if protected >= max && policy.truncation_mode == TruncationMode::KeepResponse {
                    format!(", and {protected} tokens of the prompt are never cut")
                } else {
                    String::new()
                }
            );
            findings.insert(0, Finding::new(id.row, Code::M001, message));
            return Ok(Outcome::Dropped { id, reason: DropReason::NoTarget, findings }.into());
        }
        let runs = sample.runs();
        Ok(kept(Kept { sample, findings, cuts: shown, text, bytes }, runs))
    }
}

/// The result for a row that became a sample with these runs.
fn kept(kept: Kept, runs: Vec<Run>) -> Processed {
    let hash = hash_ids(&kept.sample.input_ids);
    Processed { outcome: Outcome::Kept(kept), hash, runs }
}

/// Refuses a text whose tokens would take gigabytes.
fn check_length(id: &RowId, bytes: usize) -> Result<(), Halt> {
    if bytes <= MAX_TEXT_BYTES {
        return Ok(());
    }
    let message = format!("the row has {bytes} bytes of text; the limit is {MAX_TEXT_BYTES}");
    Err(Error::row(id.clone(), message, "split it into shorter rows, or leave it out").into())
}

/// The message for each straddling token, with both tokenisations of its text.
fn straddle_texts(tokenizer: &Tokenizer, straddles: &[Straddle]) -> Vec<String> {
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
