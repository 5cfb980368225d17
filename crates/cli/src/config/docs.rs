//! Documentation of the keys, from the table: `check --explain`, docs/configuration.md, and the JSON
//! Schema.

use super::table::{Config, Group, KEYS, Key, find};
use super::{known, synonyms};
use serde_json::{Map, Value as Json, json};
use std::fmt::Write as _;

impl Group {
    /// Every group, in the table's order.
    pub const ALL: [Group; 8] = [
        Group::Model,
        Group::Adapter,
        Group::Rows,
        Group::Labels,
        Group::Training,
        Group::Evaluation,
        Group::Output,
        Group::Seeds,
    ];

    /// Its heading.
    pub fn heading(self) -> &'static str {
        match self {
            Group::Model => "Model",
            Group::Adapter => "Adapters",
            Group::Rows => "Rows",
            Group::Labels => "Labels, long rows and packs",
            Group::Training => "Training",
            Group::Evaluation => "Evaluation",
            Group::Output => "Output",
            Group::Seeds => "Seeds",
        }
    }
}

impl Key {
    /// Its value in a tree, as YAML.
    pub fn yaml(&self, config: &Config) -> String {
        let value = (self.get)(config);
        // 2e-5, not serde_json's 0.00002.
        value
            .as_f64()
            .filter(|_| value.is_f64())
            .map_or_else(|| value.to_string(), |number| format!("{number:?}"))
    }

    /// The default as YAML.
    pub fn default(&self) -> String {
        let value = (self.get)(&Config::default());
        // 2e-5, not serde_json's 0.00002.
        value
            .as_f64()
            .filter(|_| value.is_f64())
            .map_or_else(|| value.to_string(), |number| format!("{number:?}"))
    }

    /// What the key takes, as JSON.
    pub fn to_json(&self) -> Json {
        json!({
            "key": self.name,
            "meaning": self.doc.trim(),
            "values": (self.expected)(),
            "default": (self.get)(&Config::default()),
            "example": self.example,
            "commands": self.commands(),
        })
    }

    /// What the key takes, as text of several lines.
    pub fn explain(&self) -> String {
        format!(
            "{}\n  {}\n  values    {}\n  default   {}\n  example   {}: {}\n  commands  {} (--{})\n",
            self.name,
            self.doc.trim(),
            (self.expected)(),
            self.default(),
            self.name,
            self.example,
            self.commands().join(", "),
            self.name
        )
    }
}

/// What a name means: a key, a key of TRL that is not supported, or a key of another program.
pub fn explain(name: &str) -> Option<String> {
    if let Some(key) = find(name) {
        return Some(key.explain());
    }
    if let Some(key) = known::find(name) {
        let accepted = match key.inert_values() {
            Some(values) => values.join(" or "),
            None => "any value; it changes nothing".into(),
        };
        return Some(format!("{name}\n  not supported: {}\n  accepted  {accepted}\n", key.why));
    }
    let synonym = synonyms::find(name)?;
    let ours = explain(synonym.ours).unwrap_or_default();
    Some(format!("{}\n\n{ours}", synonym.answer()))
}

/// docs/configuration.md.
pub fn markdown() -> String {
    let mut page = String::from(
        "# Configuration\n\n\
         <!-- suasion check --explain --markdown > docs/configuration.md -->\n\n\
         A configuration is a YAML or TOML file of `key: value` lines. Every key is also a flag of the commands that\n\
         use it (`--learning_rate 1e-4`, `--learning-rate=1e-4`), and `--set key=value` sets it on any of them. Flags\n\
         override `--set`, which overrides the file. Names are TRL's where TRL has the key.\n\n\
         `suasion check run.yaml` prints the resolved configuration and every error in it; `suasion check --explain KEY`\n\
         describes a key; `suasion check --schema` prints a JSON Schema for editors.\n",
    );
    for group in Group::ALL {
        let _ = writeln!(page, "\n## {}\n\n| key | meaning | values | default | example |", group.heading());
        let _ = writeln!(page, "|---|---|---|---|---|");
        for key in KEYS.iter().filter(|key| key.group == group) {
            let meaning = key.doc.trim().replace("<|im_end|>", "`<|im_end|>`");
            let cells = [
                format!("`{}`", key.name),
                meaning,
                (key.expected)(),
                format!("`{}`", key.default()),
                format!("`{}`", key.example),
            ];
            let _ = writeln!(page, "| {} |", cells.map(|cell| cell.replace('|', "\\|")).join(" | "));
        }
    }
    page += "\n## Keys of other trainers\n\n\
             They are answered with the key here, and never taken for it.\n\n\
             | program | key there | key here |\n|---|---|---|\n";
    for synonym in synonyms::SYNONYMS {
        let from = if synonym.from.is_empty() { "several" } else { synonym.from };
        let opposite = match synonym.values {
            synonyms::Values::Opposite => ", with the opposite value",
            _ => "",
        };
        let _ = writeln!(page, "| {from} | `{}` | `{}`{opposite} |", synonym.theirs, synonym.ours);
    }
    page += "\n## Keys of TRL that are not supported\n\n\
             The first value is TRL's default. Any other is an error that says why, or, where every value is accepted, a\n\
             note.\n\n| key | accepted | why |\n|---|---|---|\n";
    for key in known::KNOWN {
        let accepted = match key.inert_values() {
            Some(values) => values.iter().map(|value| code(value)).collect::<Vec<_>>().join(", "),
            None => format!("{}, and any other", code(key.default)),
        };
        let _ = writeln!(page, "| `{}` | {accepted} | {} |", key.name, key.why);
    }
    page
}

/// A value as code; the empty text has its quotes.
fn code(value: &str) -> String {
    if value.is_empty() { "`\"\"`".into() } else { format!("`{value}`") }
}

/// The JSON Schema (draft 7, which editors read) of a configuration.
pub fn schema() -> Json {
    let mut properties = Map::new();
    let mut patterns = Map::new();
    for key in KEYS {
        let mut schema = (key.schema)();
        let mut entry = schema.get("additionalProperties").cloned();
        if let (Some(object), names @ [_, ..]) = (schema.as_object_mut(), key.entries().as_slice()) {
            let each = object.remove("additionalProperties").unwrap_or_default();
            let named = names.iter().map(|name| (name.to_string(), each.clone())).collect();
            object.insert("properties".into(), Json::Object(named));
            object.insert("additionalProperties".into(), false.into());
        }
        if let Some(entry) = entry.take() {
            let names = match key.entries().as_slice() {
                [] => ".+".to_string(),
                names => format!("({})", names.join("|")),
            };
            patterns.insert(format!("^{}\\.{names}$", key.name), entry);
        }
        if let Some(object) = schema.as_object_mut() {
            object.insert("description".into(), key.doc.trim().into());
            object.insert("default".into(), (key.get)(&Config::default()));
        }
        properties.insert(key.name.into(), schema);
    }
    for key in known::KNOWN {
        let mut schema = json!({ "description": format!("Not supported: {}.", key.why) });
        if let Some(values) = key.inert_values() {
            let values: Vec<Json> = values
                .iter()
                .map(|text| serde_saphyr::from_str(text).unwrap_or_else(|_| Json::from(*text)))
                .chain(values.contains(&"").then(|| Json::from("")))
                .collect();
            schema["enum"] = values.into();
        }
        properties.insert(key.name.into(), schema);
    }
    json!({
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "suasion",
        "type": "object",
        "properties": properties,
        "patternProperties": patterns,
        "additionalProperties": false,
    })
}
