//! The policy: the options that determine labels. It is part of the fingerprint of prepared data.

use crate::Section;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Which tokens are supervised. A checkpoint records it, and can only be resumed with the same one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// Responses and their stop tokens (`completion_only_loss = true`).
    #[default]
    ResponseOnly,
    /// Every token, prompt included (`completion_only_loss = false`): for comparisons.
    AllTokens,
}

/// How the text is tokenised at the start of a response.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Boundary {
    /// The text is cut at the start of each response before pre-tokenisation: no token straddles it.
    #[default]
    Split,
    /// The whole text is tokenised at once; a token that straddles the start of a response is supervised.
    Joint,
}

/// What happens to a row of more than `max_length` tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TruncationMode {
    /// Cut the prompt, oldest context first; the end of the response only if it alone is too long.
    #[default]
    KeepResponse,
    /// Keep the first `max_length` tokens.
    KeepStart,
    /// Keep the last `max_length` tokens.
    KeepEnd,
    /// Leave the row out.
    Drop,
    /// Make the row an error.
    Error,
}

/// What happens when a row cannot become a sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnBadRow {
    /// Stop, after listing the bad rows found.
    #[default]
    Error,
    /// List it and continue.
    Skip,
}

/// Whether the text of a special token in content (a user who types `<|im_end|>`) becomes that token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContentSpecialTokens {
    /// It does, as in transformers; reported as S001.
    #[default]
    Special,
    /// It does not: content is plain text.
    Text,
}

/// Which assistant turns of a conversation are supervised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Supervise {
    /// All of them, except those masked by their own `train` or `weight`.
    #[default]
    All,
    /// The last one.
    Last,
    /// Those selected by their own `train` or `weight`.
    #[serde(alias = "per_message")]
    PerMessage,
}

/// The format of rows, by their fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, strum::IntoStaticStr)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
#[non_exhaustive]
pub enum Format {
    /// Detected for each row.
    #[default]
    Auto,
    /// `input_text` and `full_text`.
    InputFull,
    /// `prompt` and `completion`: both strings, or lists of messages.
    PromptCompletion,
    /// `input_ids` with `labels`, `completion_mask` or `assistant_masks`.
    #[serde(alias = "tokenized")]
    Tokenised,
    /// `messages` in OpenAI's format.
    Messages,
    /// `conversations` of `from` and `value`.
    Sharegpt,
    /// `instruction`, `input` and `output`, perhaps with `history` and `system`.
    Alpaca,
    /// `segments` of `text` with `train` or `weight`.
    Segments,
    /// `text`, all of which is supervised.
    Text,
    /// `chosen` and `rejected`: the chosen side is supervised.
    Preference,
}

impl Format {
    /// The name, which is the value of the `format` key.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// The policy. With the source, the tokenizer and the chat template it determines every label.
///
/// More fields will be added: create one as `Policy { max_length: Some(512), ..Policy::default() }`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    /// The format of the rows.
    pub format: Format,
    /// For rows whose fields have other names: maps our names ([`COLUMNS`](crate::example::COLUMNS)) to paths in
    /// the row.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub columns: BTreeMap<String, String>,
    /// Which tokens are supervised.
    pub objective: Objective,
    /// How the text is tokenised at the start of a response.
    pub boundary: Boundary,
    /// What happens to rows of more than `max_length` tokens.
    pub truncation_mode: TruncationMode,
    /// The maximal number of tokens of a row or a pack; `None` for no limit.
    pub max_length: Option<usize>,
    /// Append the EOS to a plain completion that does not end in it.
    pub append_eos: bool,
    /// What happens when a row cannot become a sample.
    pub on_bad_row: OnBadRow,
    /// Whether the text of a special token in content becomes that token.
    pub content_special_tokens: ContentSpecialTokens,
    /// The loss weight of prompt tokens, except scaffold; 0 masks them.
    pub prompt_loss_weight: f32,
    /// The loss weight of each section's prompt tokens, in place of `prompt_loss_weight`.
    pub loss_weights: BTreeMap<String, f32>,
    /// The marker text of each section (`SYSTEM`, `CONTEXT`, `TASK`, `RESPONSE`), for example `[SYSTEM]`.
    pub section_markers: BTreeMap<String, String>,
    /// Stop tokens in addition to `eos_token` and those of `generation_config.json`.
    pub stop_tokens: Vec<String>,
    /// Which assistant turns are supervised.
    #[serde(default, skip_serializing_if = "is_default")]
    pub supervise: Supervise,
    /// The date that a chat template uses as today, as YYYY-MM-DD; `None` for the day of the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template_date: Option<String>,
    /// Variables for the chat template. A row's own `chat_template_kwargs` take precedence.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub template_kwargs: BTreeMap<String, serde_json::Value>,
    /// Pack rows, with at most `max_length` tokens per pack.
    #[serde(default, skip_serializing_if = "is_default")]
    pub packing: bool,
    /// In a pack, let rows with the same prompt share it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub share_prefix: bool,
}

/// True for a value that is not serialised: data that was prepared before the field existed keeps its fingerprint.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Default for Policy {
    fn default() -> Self {
        let section_markers = ["SYSTEM", "CONTEXT", "TASK", "RESPONSE"]
            .map(|name| (name.to_string(), format!("[{name}]")))
            .into_iter()
            .collect();
        Policy {
            format: Format::Auto,
            columns: BTreeMap::new(),
            objective: Objective::ResponseOnly,
            boundary: Boundary::Split,
            truncation_mode: TruncationMode::KeepResponse,
            max_length: Some(1024),
            append_eos: true,
            on_bad_row: OnBadRow::Error,
            content_special_tokens: ContentSpecialTokens::Special,
            prompt_loss_weight: 0.0,
            loss_weights: BTreeMap::new(),
            section_markers,
            stop_tokens: Vec::new(),
            supervise: Supervise::All,
            template_date: None,
            template_kwargs: BTreeMap::new(),
            packing: false,
            share_prefix: false,
        }
    }
}

impl Policy {
    /// The loss weight of a prompt section: its own, else `prompt_loss_weight`. The last user turn also counts as
    /// a task, and `other` is an older name of the section `prompt`.
    pub fn section_weight(&self, section: Section) -> f32 {
        let older = match section {
            Section::User => Some("task"),
            Section::Other => Some("other"),
            _ => None,
        };
        let named = |name: &str| self.loss_weights.get(name).copied();
        named(section.name()).or(older.and_then(named)).unwrap_or(self.prompt_loss_weight)
    }
}
