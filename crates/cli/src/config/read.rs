//! Configurations from files, from `--set`, and from flags. Everything is read before anything is refused, so
//! that all errors are reported at once.

use super::flags::Typed;
use super::table::{Config, KEYS, Key, find, shown};
use super::{known, synonyms};
use crate::failure::{Failure, Failures};
use crate::paths;
use serde_json::{Map, Value as Json};
use serde_saphyr::UserMessageFormatter;
use std::collections::BTreeMap;
use std::path::Path;

/// A configuration, and where each value that is not a default was set.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The resolved tree.
    pub config: Config,
    /// Key to place: `run.yaml:3`, `--set ..`, `--data`.
    pub places: BTreeMap<&'static str, String>,
    /// Notes for the user: keys that were accepted and change nothing.
    pub notes: Vec<String>,
    /// What could not be read.
    pub(super) errors: Vec<Failure>,
}

impl Loaded {
    /// `base`, with the keys of the file, if any, with `--set` assignments over them, and flags over both.
    /// Reads all of it, whatever is wrong with a part: see [`Loaded::checked`].
    pub fn over(base: Config, file: Option<&Path>, assignments: &[String], flags: &[Typed]) -> Loaded {
        let mut loaded = Loaded { config: base, ..Loaded::default() };
        if let Some(path) = file
            && let Err(failure) = loaded.read(path)
        {
            loaded.errors.push(failure);
        }
        for assignment in assignments {
            loaded.assign(assignment);
        }
        for Typed { name, text } in flags {
            loaded.put(name, text, &format!("--{name} {text}"));
        }
        loaded
    }

    /// Keys of `command` with their values, from a program; `place` names them in errors. Rows and model are the
    /// program's own.
    pub fn of_values(values: &Map<String, Json>, command: &str, place: &str) -> Loaded {
        let mut loaded = Loaded::default();
        for (name, value) in values {
            let head = name.split('.').next().unwrap_or(name);
            match find(head) {
                Some(key) if matches!(key.name, "dataset_name" | "model_name_or_path") => {
                    loaded.errors.push(Failure::config(
                        format!("{place}: {name} is not a keyword here"),
                        "rows and model are arguments of their own",
                    ));
                }
                Some(key) if !key.used_by(command) => loaded.errors.push(Failure::config(
                    format!("{place}: {name} is not used here"),
                    format!("leave it out: it is a key of {}", key.commands().join(", ")),
                )),
                _ => loaded.take(name, value, place),
            }
        }
        loaded
    }

    /// Everything that is wrong: keys that could not be read, and what the others contradict.
    pub fn problems(&mut self) -> Vec<Failure> {
        let mut problems = std::mem::take(&mut self.errors);
        // A key that could not be read has its default, which is not what was meant.
        let of_read_keys = |problem: &Failure| {
            !KEYS.iter().any(|key| {
                problem.message.contains(key.name)
                    && problems.iter().any(|error| error.message.contains(&format!("{}:", key.name)))
            })
        };
        let contradictions: Vec<_> = self.config.problems().into_iter().filter(of_read_keys).collect();
        problems.extend(contradictions);
        problems
    }

    /// The configuration, if nothing is wrong with it.
    ///
    /// # Errors
    /// [`Loaded::problems`], all of them.
    pub fn checked(mut self) -> anyhow::Result<Loaded> {
        Failures::none(self.problems())?;
        Ok(self)
    }

    /// Reads every key of a YAML or TOML file.
    fn read(&mut self, path: &Path) -> Result<(), Failure> {
        let shown = path.display();
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
        if !matches!(extension.as_str(), "yaml" | "yml" | "toml") {
            return Err(Failure::usage(
                format!("{shown}: a CONFIG is a .yaml, .yml or .toml file"),
                "rows are given with --data, a model with --model, single keys with --set key=value",
            ));
        }
        let text = std::fs::read_to_string(path).map_err(|e| {
            let help = match e.kind() {
                std::io::ErrorKind::NotFound => paths::missing(path),
                _ => "name a configuration file that can be read".into(),
            };
            Failure::config(format!("{shown}: {e}"), help)
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
                // The library's own wording names what a Rust program could do.
                let message = e.without_snippet().render_with_formatter(&UserMessageFormatter);
                let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(text, _)| text);
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
                ));
            }
        };
        for (name, value) in &map {
            let place = match line_of(&text, name) {
                Some(line) => format!("{shown}:{line}"),
                None => shown.to_string(),
            };
            self.take(name, value, &place);
        }
        Ok(())
    }

    /// One key of a file.
    fn take(&mut self, name: &str, value: &Json, place: &str) {
        let done = match (name.split_once('.'), find(name), value) {
            // TRL's null, which means its default.
            (_, Some(key), Json::Null) if key.name == "output_dir" => Ok(()),
            (_, Some(key), Json::Object(entries)) => self.entries(key, entries, place),
            (_, Some(key), _) => match (key.set_json)(&mut self.config, value) {
                Ok(()) => self.placed(key, place),
                Err(found) => Err(wrong_value(key, None, &(key.expected)(), &found, place)),
            },
            (Some((head, entry)), None, _) if find(head).is_some() => {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
                self.entry(head, entry, &text, place)
            }
            _ => self.unsupported(name, value, place),
        };
        self.errors.extend(done.err());
    }

    /// The entries of a mapping, one by one: a file that renames one marker keeps the names of the others.
    fn entries(
        &mut self,
        key: &'static Key,
        entries: &Map<String, Json>,
        place: &str,
    ) -> Result<(), Failure> {
        if ["lr_scheduler_kwargs", "template_kwargs"].contains(&key.name) {
            // Its values are of any type, and none has a default.
            return match (key.set_json)(&mut self.config, &Json::Object(entries.clone())) {
                Ok(()) => self.placed(key, place),
                Err(found) => Err(wrong_value(key, None, &(key.expected)(), &found, place)),
            };
        }
        for (entry, value) in entries {
            let text = match value {
                Json::String(text) => text.clone(),
                other => other.to_string(),
            };
            self.entry(key.name, entry, &text, place)?;
        }
        Ok(())
    }

    /// `--set key=value`.
    fn assign(&mut self, assignment: &str) {
        match assignment.split_once('=') {
            Some((name, text)) => self.put(name.trim(), text, &format!("--set {assignment}")),
            None => self.errors.push(Failure::usage(
                format!("--set {assignment}: expected key=value"),
                "for example --set learning_rate=1e-4",
            )),
        }
    }

    /// One key from text: an assignment or a flag, which `place` names in errors.
    fn put(&mut self, name: &str, text: &str, place: &str) {
        let mapping = |key: &Key| {
            (!key.entries().is_empty()).then(|| serde_saphyr::from_str::<Map<String, Json>>(text).ok())?
        };
        let done = match (name.split_once('.'), find(name)) {
            // Nothing but an empty mapping removes the entries that are not named.
            (_, Some(key)) if mapping(key).is_some_and(|entries| !entries.is_empty()) => {
                self.entries(key, &mapping(key).unwrap_or_default(), place)
            }
            (_, Some(key)) => match (key.set_text)(&mut self.config, text) {
                Ok(()) => self.placed(key, place),
                Err(found) => Err(wrong_value(key, None, &(key.expected)(), &found, place)),
            },
            (Some((head, entry)), None) if find(head).is_some() => self.entry(head, entry, text, place),
            _ => {
                let value = serde_saphyr::from_str(text).unwrap_or_else(|_| Json::from(text));
                self.unsupported(name, &value, place)
            }
        };
        self.errors.extend(done.err());
    }

    fn entry(&mut self, name: &str, entry: &str, text: &str, place: &str) -> Result<(), Failure> {
        let Some(key) = find(name) else { return Ok(()) };
        let allowed = key.entries();
        // The section `prompt` had another name.
        let older = (name, entry) == ("loss_weights", "other");
        if !allowed.is_empty() && !allowed.contains(&entry) && !older {
            let message = format!("{place}: {} has no {entry:?}", key.name);
            return Err(Failure::config(message, format!("its names are {}", allowed.join(", "))));
        }
        match (key.set_entry)(&mut self.config, entry, text) {
            Some(Ok(())) => self.placed(key, place),
            Some(Err(expected)) => Err(wrong_value(key, Some(entry), &expected, &format!("{text:?}"), place)),
            None => Err(wrong_value(key, None, &(key.expected)(), "a mapping", place)),
        }
    }

    fn placed(&mut self, key: &'static Key, place: &str) -> Result<(), Failure> {
        self.places.insert(key.name, place.to_string());
        if key.name == "report_to" {
            for service in self.config.report_to.services() {
                let more = match service {
                    "wandb" => {
                        "; TensorBoard event files are written, which `wandb sync --sync-tensorboard` uploads from the \
                         run's folder runs/"
                    }
                    _ => "; metrics are in metrics.jsonl",
                };
                self.notes.push(format!("{place}: report_to: {service} is not contacted{more}"));
            }
        }
        if key.name == "assistant_only_loss" && self.config.assistant_only_loss == Some(false) {
            self.notes.push(format!(
                "{place}: assistant_only_loss=false changes nothing here: every token is learned with completion_only_loss=false"
            ));
        }
        Ok(())
    }

    /// A key that is not supported: inert, refused by name, another program's, or unknown.
    fn unsupported(&mut self, name: &str, value: &Json, place: &str) -> Result<(), Failure> {
        let head = name.split('.').next().unwrap_or(name);
        let Some(key) = known::find(head) else {
            // mlx-lm's keys have dashes.
            return Err(match (synonyms::find(&head.replace('-', "_")), value) {
                (Some(synonym), _) => {
                    Failure::config(format!("{place}: {}", synonym.answer()), synonym.help(value))
                }
                (None, Json::Object(_)) => Failure::config(
                    format!("{place}: unknown key {name:?}"),
                    format!(
                        "keys are not grouped: remove {name:?}, and keep the keys under it at the top level"
                    ),
                ),
                (None, _) => Failure::config(format!("{place}: unknown key {name:?}"), suggestion(name)),
            });
        };
        if head == name && key.is_inert(value) {
            if let (known::Inert::Always, false) = (&key.inert, key.is_default(value)) {
                self.notes.push(format!("{place}: {name} changes nothing here: {}", key.why));
            }
            return Ok(());
        }
        let message = format!("{place}: {name} is not supported: {}", key.why);
        let help = match key.inert_values() {
            Some(values) => format!("leave it out, or set it to {}", values.join(" or ")),
            None => "leave it out".to_string(),
        };
        Err(Failure::config(message, help))
    }
}

/// Help for an unknown key.
pub fn suggestion(name: &str) -> String {
    let listed = "`suasion check --explain` lists every key";
    match nearest(name) {
        Some(near) => format!("did you mean {near:?}? {listed}"),
        None => listed.to_string(),
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
        // Below this similarity it is a different word: `batch` is not `debug`.
        .filter(|(likeness, _)| *likeness >= 0.65)
        .map(|(_, candidate)| candidate)
}

fn wrong_value(key: &Key, entry: Option<&str>, expected: &str, found: &str, place: &str) -> Failure {
    let name = entry.map_or_else(|| key.name.to_string(), |entry| format!("{}.{entry}", key.name));
    Failure::config(
        format!("{place}: {name}: expected {expected}; found {found}"),
        format!(
            "give {expected}; for example {}: {} (suasion check --explain {})",
            key.name, key.example, key.name
        ),
    )
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
