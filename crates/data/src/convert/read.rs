//! Reads the corpora: ConvoKit's folders, files of r/changemyview threads, PersuasionForGood's dialogues.

use super::clean::awards_delta;
use super::thread::{Comment, Parent, Result as Outcome, Thread};
use crate::error::source_error;
use crate::source::row::type_name;
use crate::source::{Row, Source};
use crate::{Error, Result, RowId};
use indexmap::IndexMap;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// A corpus, and the files that it was read from.
pub struct Corpus {
    /// Its threads, in the order of the files.
    pub threads: Vec<Thread>,
    /// The files.
    pub files: Vec<PathBuf>,
    /// True for dialogues: they have no post.
    pub dialogues: bool,
    /// Number of comments.
    pub comments: u64,
}

impl Corpus {
    fn new(threads: Vec<Thread>, files: Vec<PathBuf>, dialogues: bool) -> Corpus {
        let comments = threads.iter().map(|thread| thread.comments.len() as u64).sum();
        Corpus { threads, files, dialogues, comments }
    }
}

/// Calls `each` with the rows of a file.
fn rows(path: &Path, mut each: impl FnMut(&Row) -> Result<()>) -> Result<()> {
    let mut source = Source::open(path)?;
    while let Some(raw) = source.next_row()? {
        each(&Row::parse(raw)?)?;
    }
    Ok(())
}

/// The text of a field under one of its names.
fn text<'a>(row: &'a Row, names: &[&str], example: &str) -> Result<&'a str> {
    match names.iter().find_map(|name| row.fields.get(*name)) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(Error::row(
            row.id.clone(),
            format!("{:?} is {}, not text", names[0], type_name(other)),
            example,
        )),
        None => {
            let has: Vec<&str> = row.fields.keys().map(String::as_str).take(12).collect();
            let message = format!("there is no {:?}; the row has {}", names[0], has.join(", "));
            Err(Error::row(row.id.clone(), message, example))
        }
    }
}

const UTTERANCE: &str = "an utterance is {\"id\": \"c1\", \"speaker\": \"u1\", \"conversation_id\": \"t3_1\", \"reply_to\": \"t3_1\", \
                         \"text\": \"..\", \"meta\": {\"success\": 1}}";

/// Reads a ConvoKit corpus: its folder, or its `utterances.jsonl`.
///
/// # Errors
/// [`Error::Row`] for an utterance without its fields; [`Error::Source`] for a folder without utterances, or a
/// `conversations.json` that is not JSON.
pub fn convokit(path: &Path) -> Result<Corpus> {
    let utterances = if path.is_dir() { path.join("utterances.jsonl") } else { path.to_path_buf() };
    if !utterances.exists() && path.is_dir() {
        let help =
            "a ConvoKit corpus is a folder with utterances.jsonl, speakers.json and conversations.json";
        return Err(source_error(path, "the folder has no utterances.jsonl", help));
    }
    let mut files = vec![utterances.clone()];
    let beside = utterances.with_file_name("conversations.json");
    let conversations = match beside.exists() {
        true => {
            files.push(beside.clone());
            metadata(&beside)?
        }
        false => HashMap::new(),
    };
    struct Utterance {
        id: String,
        speaker: String,
        reply_to: Option<String>,
        text: String,
        result: Option<bool>,
        pairs: Vec<String>,
    }
    let mut groups: IndexMap<String, Vec<Utterance>> = IndexMap::new();
    let mut places: HashMap<String, RowId> = HashMap::new();
    rows(&utterances, |row| {
        let id = text(row, &["id"], UTTERANCE)?.to_string();
        if let Some(first) = places.insert(id.clone(), row.id.clone()) {
            let message = format!("the id {id:?} is also that of {first}");
            return Err(Error::row(row.id.clone(), message, "ids of utterances are unique"));
        }
        let conversation = text(row, &["conversation_id", "root"], UTTERANCE)?.to_string();
        let meta = row.fields.get("meta").and_then(Value::as_object);
        let success = meta.and_then(|meta| meta.get("success"));
        let result = match success {
            None | Some(Value::Null) => None,
            Some(Value::Bool(won)) => Some(*won),
            Some(value) if value.as_f64() == Some(1.0) => Some(true),
            Some(value) if value.as_f64() == Some(0.0) => Some(false),
            Some(other) => {
                let message = format!("\"success\" is {other}, not 1, 0 or null");
                return Err(Error::row(row.id.clone(), message, UTTERANCE));
            }
        };
        let reply_to = row.fields.get("reply_to").or_else(|| row.fields.get("reply-to"));
        let pairs = meta.and_then(|meta| meta.get("pair_ids")).and_then(Value::as_array);
        groups.entry(conversation).or_default().push(Utterance {
            id,
            speaker: text(row, &["speaker", "user"], UTTERANCE)?.to_string(),
            reply_to: reply_to.and_then(Value::as_str).map(String::from),
            // A null text is that of a deleted comment.
            text: match row.fields.get("text") {
                Some(Value::Null) => String::new(),
                _ => text(row, &["text"], UTTERANCE)?.to_string(),
            },
            result,
            pairs: pairs
                .into_iter()
                .flatten()
                .map(|id| id.as_str().map_or(id.to_string(), String::from))
                .collect(),
        });
        Ok(())
    })?;
    let mut threads = Vec::new();
    for (id, group) in groups {
        let meta = conversations.get(&id);
        let field = |names: &[&str]| {
            names.iter().find_map(|name| meta?.get(*name)?.as_str()).unwrap_or_default().to_string()
        };
        let root = group.iter().position(|u| u.id == id || u.reply_to.is_none());
        let mut thread = Thread {
            id: id.clone(),
            title: field(&["op-title", "title"]),
            post: root.map_or_else(|| field(&["op-text-body"]), |root| group[root].text.clone()),
            op: root.map_or_else(|| field(&["op-userID"]), |root| group[root].speaker.clone()),
            comments: Vec::new(),
        };
        let root_id = root.map_or(id, |root| group[root].id.clone());
        let kept = group.into_iter().enumerate().filter(|(i, _)| Some(*i) != root).map(|(_, u)| u);
        let kept: Vec<Utterance> = kept.collect();
        let index: HashMap<&str, usize> = kept.iter().enumerate().map(|(i, u)| (u.id.as_str(), i)).collect();
        let parents: Vec<Parent> = kept
            .iter()
            .map(|u| match &u.reply_to {
                None => Parent::Post,
                Some(to) if *to == root_id || *to == thread.id => Parent::Post,
                Some(to) => index.get(to.as_str()).map_or(Parent::Missing, |i| Parent::Comment(*i)),
            })
            .collect();
        // If the corpus does not mark winners, a comment won if the post's author answered it with a delta.
        let marked = kept.iter().any(|u| u.result.is_some());
        let mut earned = vec![false; kept.len()];
        for (u, parent) in kept.iter().zip(&parents) {
            if let Parent::Comment(parent) = parent
                && u.speaker == thread.op
                && awards_delta(&u.text)
            {
                earned[*parent] = true;
            }
        }
        let comment = |((u, parent), earned): ((Utterance, Parent), bool)| Comment {
            result: match u.result {
                Some(true) => Outcome::Won,
                Some(false) => Outcome::Lost,
                None if !marked && earned => Outcome::Won,
                None => Outcome::Unknown,
            },
            id: u.id,
            author: u.speaker,
            text: u.text,
            parent,
            pairs: u.pairs,
        };
        thread.comments = kept.into_iter().zip(parents).zip(earned).map(comment).collect();
        thread.narrow_to_deltas();
        threads.push(thread);
    }
    Ok(Corpus::new(threads, files, false))
}

/// The metadata of conversations: `{"id": {"meta": {..}}}`, or the fields themselves in corpora from before
/// ConvoKit 2.
fn metadata(path: &Path) -> Result<HashMap<String, Map<String, Value>>> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let help = "it maps the id of each conversation to its metadata; download the corpus again";
    let all: Map<String, Value> = serde_json::from_slice(&bytes).map_err(|e| {
        let message = format!("line {}: {e}", e.line());
        source_error(path, &message, help)
    })?;
    let mut found = HashMap::new();
    for (id, value) in all {
        let Value::Object(mut fields) = value else {
            return Err(source_error(path, &format!("{id:?} is {}, not an object", type_name(&value)), help));
        };
        let meta = match fields.get_mut("meta") {
            Some(Value::Object(meta)) => std::mem::take(meta),
            _ => fields,
        };
        found.insert(id, meta);
    }
    Ok(found)
}

const THREAD: &str = "a line is {\"id\": \"t3_1\", \"outcome\": \"positive\", \"title\": \"CMV: ..\", \"op\": \"..\", \"replies\": \
                      [{\"author\": \"u1\", \"text\": \"..\"}, {\"author\": \"op\", \"text\": \"..\"}]}";

/// Reads a file of r/changemyview threads: a post and a chain of replies per line.
///
/// # Errors
/// [`Error::Row`] for a line without its fields.
pub fn cmv(path: &Path) -> Result<Corpus> {
    let mut threads = Vec::new();
    rows(path, |row| {
        let won = match text(row, &["outcome"], THREAD)? {
            "positive" => Outcome::Won,
            "negative" => Outcome::Lost,
            other => {
                let message = format!("\"outcome\" is {other:?}, not \"positive\" or \"negative\"");
                return Err(Error::row(row.id.clone(), message, THREAD));
            }
        };
        let Some(Value::Array(replies)) = row.fields.get("replies") else {
            return Err(Error::row(row.id.clone(), "there is no list \"replies\"", THREAD));
        };
        let id = text(row, &["id"], THREAD)?.to_string();
        let mut comments: Vec<Comment> = Vec::new();
        for (n, reply) in replies.iter().enumerate() {
            let field = |name: &str| match reply.get(name) {
                Some(Value::String(text)) => Ok(text.clone()),
                _ => Err(Error::row(row.id.clone(), format!("replies[{n}] has no text {name:?}"), THREAD)),
            };
            comments.push(Comment {
                id: format!("{id}/{}", n + 1),
                author: field("author")?,
                text: field("text")?,
                parent: n.checked_sub(1).map_or(Parent::Post, Parent::Comment),
                ..Comment::default()
            });
        }
        let challenger = comments.iter().find(|c| c.author != "op").map(|c| c.author.clone());
        for comment in &mut comments {
            if Some(&comment.author) == challenger.as_ref() {
                comment.result = won;
            }
        }
        let mut thread = Thread {
            id,
            title: text(row, &["title"], THREAD)?.to_string(),
            post: text(row, &["op"], THREAD)?.to_string(),
            op: "op".into(),
            comments,
        };
        thread.narrow_to_deltas();
        threads.push(thread);
        Ok(())
    })?;
    Ok(Corpus::new(threads, vec![path.to_path_buf()], false))
}

const UNIT: &str =
    "the columns are Unit (the text), Turn, B4 (0: the persuader, 1: the persuadee) and B2 (the dialogue)";

/// Reads PersuasionForGood's `full_dialog.csv`, and the donations of its `full_info.csv` if given.
///
/// # Errors
/// [`Error::Row`] for a line without its columns; [`Error::Source`] if the information names no dialogue of the file.
pub fn p4g(path: &Path, information: Option<&Path>) -> Result<Corpus> {
    let mut dialogues: IndexMap<String, Vec<(String, String)>> = IndexMap::new();
    let cell = |row: &Row, name: &str| -> Result<String> {
        match row.fields.get(name) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(Value::Number(number)) => Ok(number.to_string()),
            _ => text(row, &[name], UNIT).map(String::from),
        }
    };
    rows(path, |row| {
        let role = cell(row, "B4")?;
        if !matches!(role.trim(), "0" | "1") {
            return Err(Error::row(row.id.clone(), format!("\"B4\" is {role:?}, not 0 or 1"), UNIT));
        }
        let turns = dialogues.entry(cell(row, "B2")?).or_default();
        let unit = cell(row, "Unit")?.trim().to_string();
        match turns.last_mut() {
            // A turn is written in several units.
            Some((last, text)) if *last == role.trim() => {
                *text = format!("{text} {unit}").trim().to_string();
            }
            _ => turns.push((role.trim().to_string(), unit)),
        }
        Ok(())
    })?;
    let mut files = vec![path.to_path_buf()];
    let mut donated: HashMap<String, bool> = HashMap::new();
    if let Some(information) = information {
        files.push(information.to_path_buf());
        rows(information, |row| {
            // The outcome of a dialogue is the persuadee's donation.
            if cell(row, "B4")?.trim() == "1" {
                let amount = cell(row, "B6")?;
                let amount: f64 = amount.trim().parse().map_err(|_| {
                    let message = format!("\"B6\" is {amount:?}, not an amount");
                    Error::row(row.id.clone(), message, "B6 is the donation in dollars")
                })?;
                donated.insert(cell(row, "B2")?, amount > 0.0);
            }
            Ok(())
        })?;
        if !dialogues.keys().any(|id| donated.contains_key(id)) {
            let help = "give the full_info.csv of the same release";
            return Err(source_error(information, "it names no dialogue of the rows", help));
        }
    }
    let thread = |(id, turns): (String, Vec<(String, String)>)| {
        let result = match donated.get(&id) {
            Some(true) => Outcome::Won,
            Some(false) => Outcome::Lost,
            None => Outcome::Unknown,
        };
        let comment = |(n, (role, text)): (usize, (String, String))| Comment {
            id: format!("{id}/{}", n + 1),
            author: role,
            text,
            parent: n.checked_sub(1).map_or(Parent::Post, Parent::Comment),
            result,
            pairs: Vec::new(),
        };
        let comments = turns.into_iter().enumerate().map(comment).collect();
        Thread { op: "1".into(), comments, id, ..Thread::default() }
    };
    Ok(Corpus::new(dialogues.into_iter().map(thread).collect(), files, true))
}
