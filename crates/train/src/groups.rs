//! Parameters by name: which are trained, and which have a learning rate or a weight decay of their own.

use crate::{Error, Result};
use glob::Pattern;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use suasion_engine::Trainable;

/// Patterns of parameter names. Each matches consecutive whole parts of a dotted name: `norm`,
/// `layers.0`, `mlp.*_proj`, `layers.[0-3].self_attn`. `*` and `?` also match dots.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "OneOrMore", into = "Vec<String>")]
pub struct Patterns(pub Vec<String>);

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

impl From<OneOrMore> for Patterns {
    fn from(patterns: OneOrMore) -> Patterns {
        Patterns(match patterns {
            OneOrMore::One(pattern) => vec![pattern],
            OneOrMore::More(patterns) => patterns,
        })
    }
}

impl From<Patterns> for Vec<String> {
    fn from(patterns: Patterns) -> Vec<String> {
        patterns.0
    }
}

/// Parameters with a learning rate or a weight decay of their own.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParamGroup {
    /// The parameters; one that several groups match belongs to the first of them.
    #[serde(rename = "match")]
    pub patterns: Patterns,
    /// Their highest learning rate, in place of `learning_rate`; the schedule is the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// Their weight decay, in place of `weight_decay`: of all of them, biases and norms too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
}

impl Patterns {
    /// True for a name that one of them matches.
    pub fn matches(&self, name: &str) -> bool {
        self.0.iter().any(|pattern| Pattern::new(pattern).is_ok_and(|pattern| matches(&pattern, name)))
    }

    /// Refuses patterns that are none, and those that match no name.
    fn check<'a>(&self, key: &'static str, names: impl Iterator<Item = &'a String> + Clone) -> Result<()> {
        for text in &self.0 {
            let pattern = Pattern::new(text).map_err(|error| {
                let help = "a name or a part of one, such as layers.0 or mlp.*_proj; [0-3] is one of 0 to 3";
                Error::setting(key, text, format!("is not a pattern: {}", error.msg), help)
            })?;
            if !names.clone().any(|name| matches(&pattern, name)) {
                let help = match nearest(text, names.clone()) {
                    Some(name) => format!("the nearest name is {name}"),
                    None => "name parameters as the model's safetensors files do".into(),
                };
                return Err(Error::setting(
                    key,
                    text,
                    "matches no parameter of this model that is trained",
                    help,
                ));
            }
        }
        Ok(())
    }
}

fn matches(pattern: &Pattern, name: &str) -> bool {
    let starts = || std::iter::once(0).chain(name.match_indices('.').map(|(at, _)| at + 1));
    let ends = || name.match_indices('.').map(|(at, _)| at).chain(std::iter::once(name.len()));
    starts().any(|start| ends().any(|end| start < end && pattern.matches(&name[start..end])))
}

/// The part of a name that is most like a pattern.
fn nearest<'a>(pattern: &str, names: impl Iterator<Item = &'a String>) -> Option<String> {
    let parts = pattern.split('.').count();
    let mut candidates = BTreeSet::new();
    for name in names {
        candidates.insert(name.clone());
        let words: Vec<&str> = name.split('.').collect();
        candidates.extend(words.windows(parts.min(words.len())).map(|words| words.join(".")));
    }
    let alike = |name: &String| strsim::normalized_damerau_levenshtein(pattern, name);
    candidates.into_iter().max_by(|a, b| alike(a).total_cmp(&alike(b)))
}

/// Which parameters are trained, of those of these names: all or what `trainable` matches, without what `freeze`
/// matches.
///
/// # Errors
/// [`Error::Setting`] for a pattern that matches nothing, and where nothing is left to train.
pub(crate) fn choose(
    trainable: &Patterns,
    freeze: &Patterns,
    groups: &[ParamGroup],
    names: &[String],
) -> Result<Trainable> {
    trainable.check("trainable", names.iter())?;
    freeze.check("freeze", names.iter())?;
    let chosen =
        |name: &&String| (trainable.0.is_empty() || trainable.matches(name)) && !freeze.matches(name);
    let chosen: BTreeSet<String> = names.iter().filter(chosen).cloned().collect();
    if chosen.is_empty() {
        let value = freeze.0.join(", ");
        return Err(Error::setting(
            "freeze",
            value,
            "leaves no parameter to train",
            "freeze fewer parameters",
        ));
    }
    groups.iter().try_for_each(|group| group.patterns.check("param_groups", chosen.iter()))?;
    Ok(if chosen.len() == names.len() { Trainable::All } else { Trainable::Named(chosen) })
}
