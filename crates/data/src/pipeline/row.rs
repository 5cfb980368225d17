//! One row through every stage: format, template, tokens, labels, audits, truncation.

use super::duplicates::hash_ids;
use super::outcome::{Cut, DropReason, Kept, Outcome};
use super::{Mode, Pipeline};
use crate::audit::{self, Subject};
use crate::chat::Conversation;
use crate::example::{Body, Example, Tokenised};
use crate::label::truncate::{self, Cuts, Fit};
use crate::label::{self, Special};
use crate::policy::TruncationMode;
use crate::render::{self, Rendered, Stops};
use crate::row::Row;
use crate::source::RawRow;
use crate::template::{Chat, ChatRenderer, TemplateOptions};
use crate::tokens::{Encoded, Straddle, Tokenizer};
use crate::{Code, Error, Finding, IGNORE, Level, Origin, Result, RowId, Sample};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// A pipeline with what is looked up once.
pub(super) struct RowProcessor<'a> {
    settings: &'a Pipeline<'a>,
    special: Special,
    stops: Stops,
    pub(super) chats: Option<ChatRenderer<'a>>,
    /// True once a row went through the chat template.
    pub(super) templated: AtomicBool,
    /// True once an instruction was rendered plainly for want of one.
    pub(super) untemplated: AtomicBool,
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

impl<'a> RowProcessor<'a> {
    pub(super) fn new(settings: &'a Pipeline<'a>) -> Result<RowProcessor<'a>> {
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
        Ok(RowProcessor { settings, special, stops, chats, templated, untemplated })
    }

    /// One row to its outcome and the hash of its ids.
    pub(super) fn outcome(&self, raw: RawRow) -> Result<(Outcome, u128)> {
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
        let example = Example::from_row(Row::parse(raw)?, policy.format)?;
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
            whole.sample = Cuts::padding(&whole.sample.origins).sample(whole.sample);
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
        let bytes = self.settings.keep_text.then(|| tokens.bytes.clone());
        let sample = label::label(id, tokens, policy);
        let positions = self.positions();
        let subject = Subject { sample: &sample, given: None, special: &self.special, policy, positions };
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
        let positions = self.positions();
        let subject =
            Subject { sample: &sample, given: Some(&row), special: &self.special, policy: asked, positions };
        let findings = audit::audit(&subject);
        Ok(Whole { sample, findings, text: row.text.filter(|_| self.settings.keep_text), bytes: None })
    }

    /// The model's positions, where rows can be longer.
    fn positions(&self) -> Option<usize> {
        let reach = self.settings.policy.max_length.unwrap_or(usize::MAX);
        self.settings.positions.filter(|&positions| reach > positions)
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
        let cuts = match truncate::fit(&sample.origins, policy.truncation_mode, policy.max_length) {
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
        Ok((Outcome::Kept(Kept { sample, findings, cuts: shown, text, bytes }), hash))
    }
}

/// Both tokenisations of each straddling place, in words.
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
