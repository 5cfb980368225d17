//! Corpora of persuasion as rows: who argued with whom, about what, and whether it changed someone's mind.
//!
//! A corpus is read into threads ([`read`]), whose texts are cleaned ([`clean()`]); [`rows`] makes a four-section
//! row from each reply, and [`pairs`] a pair from each winning reply and a losing one to the same post. Omitted
//! comments are counted by reason.

pub mod clean;
pub mod output;
pub mod read;
pub mod thread;

pub use read::{Corpus, cmv, convokit, p4g};
pub use thread::{Comment, Parent, Thread};

use clean::{Removed, clean, is_deleted, is_service};
use indexmap::IndexMap;
use serde::Serialize;
use std::collections::{BTreeMap, HashSet};
use thread::Result as Outcome;

/// The speaker who takes the part of the persuader.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Persuader {
    /// Everyone except the author of the post; in PersuasionForGood the persuader.
    #[default]
    Challenger,
    /// The author of the post; in PersuasionForGood the persuadee.
    Op,
    /// One speaker, by id.
    Speaker(String),
}

/// Which replies become rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keep {
    /// Those that earned a delta, or a donation.
    #[default]
    Won,
    /// All, with their outcome if known.
    All,
}

/// The options of a conversion.
#[derive(Clone, Debug)]
pub struct Options {
    /// Who speaks as the persuader.
    pub persuader: Persuader,
    /// Which replies become rows.
    pub keep: Keep,
    /// The number of turns before a reply that its context contains besides the post; `None` for all.
    pub context_depth: Option<usize>,
    /// The text of the section `[SYSTEM]`.
    pub system: String,
    /// The text of the section `[TASK]`.
    pub task: String,
    /// The share of the threads to hold out.
    pub split: f64,
    /// The seed of the split.
    pub seed: u64,
}

impl Options {
    /// The default texts for threads, or for dialogues.
    pub fn new(dialogues: bool) -> Options {
        let (system, task) = match dialogues {
            false => (
                "You write honest, respectful replies that may change a reader's mind.",
                "Reply to the author's view.",
            ),
            true => (
                "You persuade your partner, honestly and respectfully, to give to a children's charity.",
                "Write your next turn.",
            ),
        };
        Options {
            persuader: Persuader::default(),
            keep: Keep::default(),
            context_depth: None,
            system: system.into(),
            task: task.into(),
            split: 0.0,
            seed: 42,
        }
    }

    /// True if a thread is held out. It only depends on the thread's id and the seed.
    pub fn held_out(&self, thread: &str) -> bool {
        let hash = blake3::hash(format!("{} {thread}", self.seed).as_bytes());
        let word = hash.as_bytes()[..8].try_into().map_or(0, u64::from_le_bytes);
        (word as f64 / 2f64.powi(64)) < self.split
    }
}

/// A row made from a reply.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReplyRow {
    /// The prompt.
    pub input_text: String,
    /// The prompt and the reply.
    pub full_text: String,
    /// The id of the post, or of the dialogue.
    pub thread: String,
    /// The id of the reply.
    pub id: String,
    /// `won`, `lost` or `unknown`.
    pub outcome: &'static str,
}

/// A winning and a losing reply to the same post.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PairRow {
    /// The prompt.
    pub prompt: String,
    /// The winning reply, with the space before it.
    pub chosen: String,
    /// The losing reply.
    pub rejected: String,
    /// The id of the post.
    pub thread: String,
}

/// Counts of what was converted, and of what was left out, with reasons.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Counts {
    /// Threads read.
    pub threads: u64,
    /// Comments read.
    pub comments: u64,
    /// Rows or pairs to train on.
    pub rows: u64,
    /// Rows or pairs held out.
    pub held_out: u64,
    /// Comments left out, by reason.
    pub dropped: IndexMap<&'static str, u64>,
    /// Counts of what was removed from texts.
    pub removed: BTreeMap<&'static str, u64>,
}

impl Counts {
    fn of(corpus: &Corpus) -> Counts {
        // A file of chains has one line per chain of a post.
        let threads: HashSet<&str> = corpus.threads.iter().map(|thread| thread.id.as_str()).collect();
        Counts { threads: threads.len() as u64, comments: corpus.comments, ..Counts::default() }
    }

    fn drop(&mut self, reason: &'static str) {
        *self.dropped.entry(reason).or_default() += 1;
    }

    fn add(&mut self, removed: Removed) {
        for (what, n) in [
            ("quoted lines", removed.quotes),
            ("moderators' footnotes", removed.footnotes),
            ("edits", removed.edits),
            ("section markers in texts", removed.markers),
        ] {
            if n > 0 {
                *self.removed.entry(what).or_default() += n;
            }
        }
    }

    fn count(&mut self, held_out: bool) {
        match held_out {
            true => self.held_out += 1,
            false => self.rows += 1,
        }
    }
}

/// Why a comment does not become a row.
const NOT_PERSUADER: &str = "by somebody other than the persuader";
const DELETED: &str = "deleted or removed";
const SERVICE: &str = "by a bot or a moderator";
const NO_PARENT: &str = "answers a comment that is deleted or missing";
const NO_DELTA: &str = "without a delta or a donation";
const EMPTY: &str = "nothing left after cleaning";
const AGAIN: &str = "the same reply again";
const NOT_ROOT: &str = "not a first reply to the post";
const NO_PARTNER: &str = "no reply of the other outcome to the same post";

/// A converted text with its prompt.
struct Reply<'a> {
    thread: &'a Thread,
    comment: &'a Comment,
    prompt: String,
    text: String,
}

/// Calls `each` with a row for every reply that is kept, and with whether it is held out.
///
/// # Errors
/// Those of `each`.
pub fn rows<E>(
    corpus: &Corpus,
    options: &Options,
    mut each: impl FnMut(&ReplyRow, bool) -> Result<(), E>,
) -> Result<Counts, E> {
    let mut counts = Counts::of(corpus);
    let mut seen = HashSet::new();
    for thread in &corpus.threads {
        for index in 0..thread.comments.len() {
            let reply = match reply(corpus, thread, index, options, &mut counts) {
                Ok(reply) => reply,
                Err(reason) => {
                    counts.drop(reason);
                    continue;
                }
            };
            let row = ReplyRow {
                full_text: format!("{} {}", reply.prompt, reply.text),
                input_text: reply.prompt,
                thread: thread.id.clone(),
                id: reply.comment.id.clone(),
                outcome: reply.comment.result.name(),
            };
            // Chains of a post share their first replies.
            if !seen.insert(blake3::hash(format!("{}\n{}", row.thread, row.full_text).as_bytes())) {
                counts.drop(AGAIN);
                continue;
            }
            let held_out = options.held_out(&thread.id);
            counts.count(held_out);
            each(&row, held_out)?;
        }
    }
    Ok(counts)
}

/// Calls `each` with pairs of a winning and a losing first reply to the same post, and with whether they are held out.
///
/// If the corpus has pairs, these are used; otherwise each winning reply is paired with the losing one that shares
/// the largest part of its words (Jaccard, as in Tan et al. 2016); each losing reply is used once.
///
/// # Errors
/// Those of `each`.
pub fn pairs<E>(
    corpus: &Corpus,
    options: &Options,
    mut each: impl FnMut(&PairRow, bool) -> Result<(), E>,
) -> Result<Counts, E> {
    let options = &Options { keep: Keep::All, ..options.clone() };
    let mut counts = Counts::of(corpus);
    let mut posts: IndexMap<&str, Vec<Reply<'_>>> = IndexMap::new();
    let mut seen = HashSet::new();
    for thread in &corpus.threads {
        for index in 0..thread.comments.len() {
            let reason = match reply(corpus, thread, index, options, &mut counts) {
                Ok(reply) if reply.comment.parent != Parent::Post => NOT_ROOT,
                Ok(reply) if !seen.insert((thread.id.as_str(), reply.text.clone())) => AGAIN,
                Ok(reply) => {
                    posts.entry(&thread.id).or_default().push(reply);
                    continue;
                }
                Err(reason) => reason,
            };
            counts.drop(reason);
        }
    }
    for (post, replies) in &posts {
        // The first reply of a winning chain represents the chain, though a later one may have earned the delta.
        let side = |wanted: Outcome| -> Vec<&Reply<'_>> {
            replies.iter().filter(|reply| chain_result(reply.thread, reply.comment) == wanted).collect()
        };
        let (won, lost) = (side(Outcome::Won), side(Outcome::Lost));
        let mut used = vec![false; lost.len()];
        let mut paired = 0;
        for winner in &won {
            let free = (0..lost.len()).filter(|i| !used[*i]);
            let own =
                |i: &usize| winner.comment.pairs.iter().any(|pair| lost[*i].comment.pairs.contains(pair));
            let best = if winner.comment.pairs.is_empty() {
                free.map(|i| (i, similarity(&winner.text, &lost[i].text)))
                    .reduce(|best, next| if next.1 > best.1 { next } else { best })
                    .map(|(i, _)| i)
            } else {
                { free }.find(own)
            };
            let Some(loser) = best else { continue };
            used[loser] = true;
            paired += 1;
            let row = PairRow {
                prompt: winner.prompt.clone(),
                chosen: format!(" {}", winner.text),
                rejected: format!(" {}", lost[loser].text),
                thread: post.to_string(),
            };
            let held_out = options.held_out(post);
            counts.count(held_out);
            each(&row, held_out)?;
        }
        (0..replies.len() - 2 * paired).for_each(|_| counts.drop(NO_PARTNER));
    }
    Ok(counts)
}

/// Whether the chain that starts with a first reply won: the replies of its author in the chain.
fn chain_result(thread: &Thread, first: &Comment) -> Outcome {
    let own = |index: &usize| {
        let comment = &thread.comments[*index];
        let root = thread.root(*index).map(|root| thread.comments[root].id.as_str());
        comment.author == first.author && root == Some(first.id.as_str())
    };
    let results: Vec<Outcome> =
        (0..thread.comments.len()).filter(own).map(|index| thread.comments[index].result).collect();
    [Outcome::Won, Outcome::Lost].into_iter().find(|wanted| results.contains(wanted)).unwrap_or_default()
}

/// The share of the words of two texts that both contain.
fn similarity(a: &str, b: &str) -> f64 {
    let words = |text: &str| -> HashSet<String> {
        text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).map(str::to_lowercase).collect()
    };
    let (a, b) = (words(a), words(b));
    let common = a.intersection(&b).count();
    common as f64 / (a.len() + b.len() - common).max(1) as f64
}

/// Whether a comment may become a row, as far as is known before cleaning.
fn kept(thread: &Thread, index: usize, options: &Options) -> Result<(), &'static str> {
    let comment = &thread.comments[index];
    let persuades = match &options.persuader {
        Persuader::Challenger => comment.author != thread.op,
        Persuader::Op => comment.author == thread.op,
        Persuader::Speaker(id) => comment.author == *id,
    };
    if is_deleted(&comment.text) {
        Err(DELETED)
    } else if is_service(&comment.author, &comment.text) {
        Err(SERVICE)
    } else if !persuades {
        Err(NOT_PERSUADER)
    } else if options.keep == Keep::Won && comment.result != Outcome::Won {
        Err(NO_DELTA)
    } else {
        Ok(())
    }
}

/// The prompt and the text of a reply, or why it does not become a row.
fn reply<'a>(
    corpus: &Corpus,
    thread: &'a Thread,
    index: usize,
    options: &Options,
    counts: &mut Counts,
) -> Result<Reply<'a>, &'static str> {
    kept(thread, index, options)?;
    let comment = &thread.comments[index];
    let above = thread.above(index).ok_or(NO_PARENT)?;
    let mut removed = Removed::default();
    let text = clean(&comment.text, &mut removed);
    if text.is_empty() {
        return Err(EMPTY);
    }
    counts.add(removed);
    // Removals from the context are not counted: it is repeated in many rows.
    let mut ignored = Removed::default();
    let mut parts = Vec::new();
    for part in [&thread.title, &thread.post] {
        let part = if is_deleted(part) { String::new() } else { clean(part, &mut ignored) };
        if !part.is_empty() {
            parts.push(part);
        }
    }
    let shown = options.context_depth.map_or(0, |depth| above.len().saturating_sub(depth));
    for turn in &above[shown..] {
        let turn = &thread.comments[*turn];
        let said = clean(&turn.text, &mut ignored);
        if said.is_empty() || is_service(&turn.author, &turn.text) {
            continue;
        }
        let name = match () {
            () if turn.author == comment.author => "You",
            () if corpus.dialogues => "Partner",
            () if turn.author == thread.op => "Author",
            () => "Another reader",
        };
        parts.push(format!("{name}: {said}"));
    }
    if parts.is_empty() {
        parts.push("The conversation begins.".into());
    }
    let prompt = format!(
        "[SYSTEM] {}\n[CONTEXT] {}\n[TASK] {}\n[RESPONSE]",
        options.system,
        parts.join("\n\n"),
        options.task
    );
    Ok(Reply { thread, comment, prompt, text })
}
