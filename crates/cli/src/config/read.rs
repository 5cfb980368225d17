//! Configurations from files and from `--set`.

use super::known;
use super::table::{Config, KEYS, Key, find, shown};
use crate::failure::Failure;
use serde_json::{Map, Value as Json};
use std::collections::BTreeMap;
use std::path::Path;
use suasion_data::Section;

/// A configuration, and where each value that is not a default was set.
#[derive(Clone, Debug, Default)]
pub struct Loaded {
    /// The resolved tree.
    pub config: Config,
    /// Key to place: `run.yaml:3`, `--set ..`, `--data`.
    pub places: BTreeMap<&'static str, String>,
    /// Notes for the user: keys that were accepted and change nothing.
    pub notes: Vec<String>,
}

impl Loaded {
    /// The configuration file, if any, with `--set` assignments over it. The caller applies flags over both.
    pub fn new(file: Option<&Path>, assignments: &[String]) -> anyhow::Result<Loaded> {
        let mut loaded = Loaded::default();
        if let Some(path) = file {
            loaded.read(path)?;
        }
        for assignment in assignments {
            loaded.assign(assignment)?;
        }
        Ok(loaded)
    }

    /// `--set` assignments over a configuration that is built in (the demo's).
    pub fn over(config: Config, assignments: &[String]) -> anyhow::Result<Loaded> {
        let mut loaded = Loaded { config, ..Loaded::default() };
        for assignment in assignments {
            loaded.assign(assignment)?;
        }
        loaded.config.check()?;
        Ok(loaded)
    }

    /// Reads every key of a YAML or TOML file.
    fn read(&mut self, path: &Path) -> anyhow::Result<()> {
        let shown = path.display();
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
        if !matches!(extension.as_str(), "yaml" | "yml" | "toml") {
            return Err(Failure::usage(
                format!("{shown}: a CONFIG is a .yaml, .yml or .toml file"),
                "rows are given with --data, a model with --model, single keys with --set key=value",
            )
            .into());
        }
        let text = std::fs::read_to_string(path).map_err(|e| {
            Failure::config(format!("{shown}: {e}"), "name a configuration file that can be read")
        })?;
        let tree: Json = if extension == "toml" {
            toml::from_str(&text).map_err(|e| {
                let line =
                    e.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
                Failure::config(format!("{shown}:{line}: {}", e.message()), "correct the TOML on this line")
            })?
        } else {
            serde_saphyr::from_str(&text).map_err(|e| {
                let line = e.location().map_or(1, |at| at.line());
                let message = e.without_snippet().to_string();
                Failure::config(format!("{shown}:{line}: {message}"), "correct the YAML on this line")
            })?
        };
        let map = match tree {
            Json::Object(map) => map,
            Json::Null => Map::new(),
            other => {
                return Err(Failure::config(
                    format!("{shown}: expected a mapping of keys to values, found {}", self::shown(&other)),
                    "write one `key: value` per line",
                )
                .into());
            }
        };
        for (name, value) in &map {
            let place = match line_of(&text, name) {
                Some(line) => format!("{shown}:{line}"),
                None => shown.to_string(),
            };
            self.take(name, value, &place)?;
        }
        Ok(())
    }

    /// One key of a file.
    fn take(&mut self, name: &str, value: &Json, place: &str) -> anyhow::Result<()> {
        if let (Some(key), Json::Object(entries)) = (find(name), value)
            && key.name != "template_kwargs"
        {
            // Entry by entry: a file that renames one marker keeps the default names of the others.
            for (entry, value) in entries {
                let text = match value {
                    Json::String(text) => text.clone(),
                    other => other.to_string(),
                };
                self.entry(key, entry, &text, place)?;
            }
            return Ok(());
        }
        if let Some(key) = find(name) {
            return match (key.set_json)(&mut self.config, value) {
                Ok(()) => self.placed(key, place),
                Err(found) => Err(wrong_value(key.name, &(key.expected)(), &found, place)),
            };
        }
        match name.split_once('.') {
            Some((head, entry)) if find(head).is_some() => {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
                self.entry(find(head).expect("just found"), entry, &text, place)
            }
            _ => self.unsupported(name, value, place),
        }
    }

    /// `--set key=value`.
    pub fn assign(&mut self, assignment: &str) -> anyhow::Result<()> {
        let Some((name, text)) = assignment.split_once('=') else {
            return Err(Failure::usage(
                format!("--set {assignment}: expected key=value"),
                "for example --set learning_rate=1e-4",
            )
            .into());
        };
        let place = format!("--set {assignment}");
        self.put(name.trim(), text, &place)
    }

    /// One key from text: an assignment or a flag, which `place` names in errors.
    pub fn put(&mut self, name: &str, text: &str, place: &str) -> anyhow::Result<()> {
        if let Some(key) = find(name) {
            return match (key.set_text)(&mut self.config, text) {
                Ok(()) => self.placed(key, place),
                Err(found) => Err(wrong_value(key.name, &(key.expected)(), &found, place)),
            };
        }
        if let Some((head, entry)) = name.split_once('.')
            && let Some(key) = find(head)
        {
            return self.entry(key, entry, text, place);
        }
        let value = serde_saphyr::from_str(text).unwrap_or_else(|_| Json::from(text));
        self.unsupported(name, &value, place)
    }

    fn entry(&mut self, key: &'static Key, entry: &str, text: &str, place: &str) -> anyhow::Result<()> {
        let allowed: Vec<&str> = match key.name {
            "loss_weights" => Section::ALL.iter().map(|s| s.name()).chain(["other"]).collect(),
            "columns" => suasion_data::example::COLUMNS.to_vec(),
            "section_markers" => vec!["SYSTEM", "CONTEXT", "TASK", "RESPONSE"],
            _ => Vec::new(),
        };
        if !allowed.is_empty() && !allowed.contains(&entry) {
            let message = format!("{place}: {} has no {entry:?}", key.name);
            return Err(Failure::config(message, format!("its names are {}", allowed.join(", "))).into());
        }
        match (key.set_entry)(&mut self.config, entry, text) {
            Some(Ok(())) => self.placed(key, place),
            Some(Err(expected)) => {
                Err(wrong_value(&format!("{}.{entry}", key.name), &expected, &format!("{text:?}"), place))
            }
            None => Err(wrong_value(key.name, &(key.expected)(), "a mapping", place)),
        }
    }

    fn placed(&mut self, key: &'static Key, place: &str) -> anyhow::Result<()> {
        self.places.insert(key.name, place.to_string());
        if key.name == "assistant_only_loss" && self.config.assistant_only_loss == Some(false) {
            self.notes.push(format!(
                "{place}: assistant_only_loss=false changes nothing here: every token is learned with completion_only_loss=false"
            ));
        }
        Ok(())
    }

    /// A key that is not supported: inert, refused by name, or unknown.
    fn unsupported(&mut self, name: &str, value: &Json, place: &str) -> anyhow::Result<()> {
        let head = name.split('.').next().unwrap_or(name);
        let Some(key) = known::find(head) else {
            let help = match nearest(name) {
                Some(near) => format!("did you mean {near:?}? `suasion check` lists every key"),
                None => "`suasion check` lists every key".to_string(),
            };
            return Err(Failure::config(format!("{place}: unknown key {name:?}"), help).into());
        };
        if head == name && key.is_inert(value) {
            if let known::Inert::Always = key.inert {
                self.notes.push(format!("{place}: {name} changes nothing here: {}", key.why));
            }
            return Ok(());
        }
        let message = format!("{place}: {name} is not supported: {}", key.why);
        let help = match key.inert_values() {
            Some(values) => format!("leave it out, or set it to {values}"),
            None => "leave it out".to_string(),
        };
        Err(Failure::config(message, help).into())
    }
}

/// The supported or known name that a typo most likely meant.
fn nearest(name: &str) -> Option<&'static str> {
    let lower = name.to_ascii_lowercase().replace('-', "_");
    KEYS.iter()
        .map(|key| key.name)
        .chain(known::KNOWN.iter().map(|key| key.name))
        .map(|candidate| (strsim::normalized_damerau_levenshtein(&lower, candidate), candidate))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(likeness, _)| *likeness >= 0.5)
        .map(|(_, candidate)| candidate)
}

fn wrong_value(name: &str, expected: &str, found: &str, place: &str) -> anyhow::Error {
    Failure::config(
        format!("{place}: {name}: expected {expected}; found {found}"),
        format!("correct the value of {name}"),
    )
    .into()
}

/// The 1-based line of a top-level key; the parsers give no positions for values that are well-formed.
fn line_of(text: &str, name: &str) -> Option<usize> {
    let starts = |line: &str| {
        let line = line.trim_start().trim_start_matches(['"', '\'']);
        let rest = line.strip_prefix(name)?;
        let rest = rest.trim_start_matches(['"', '\'']).trim_start();
        // A TOML table header or a dotted key of that name counts.
        let inside_header = text.contains(&format!("[{name}]"));
        (rest.starts_with([':', '=', '.']) || (inside_header && rest.starts_with(']'))).then_some(())
    };
    text.lines()
        .position(|line| starts(line).is_some() || line.trim() == format!("[{name}]"))
        .map(|index| index + 1)
}
