//! Every choice that decides labels, in one value that is part of the fingerprint.

use crate::Section;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Which tokens a run learns from. Recorded in every checkpoint; a run resumes only under its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// Responses and their stop tokens (`completion_only_loss = true`).
    #[default]
    ResponseOnly,
    /// Every token, prompt included (`completion_only_loss = false`): the bug, kept for comparisons.
    AllTokens,
}

/// How prompt and response meet in token space (MASKING.md, "The boundary").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Boundary {
    /// Cut at the start of each response before pre-tokenisation.
    #[default]
    Split,
    /// One tokenisation of the whole text.
    Joint,
}

/// What happens to a row of more than `max_length` tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TruncationMode {
    /// Cut the prompt, oldest context first; the response's end only where it alone is too long.
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
    /// List it and go on.
    Skip,
}

/// Whether content can produce structural ids (a user who types `<|im_end|>`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContentSpecialTokens {
    /// As transformers does; reported as S001.
    #[default]
    Special,
    /// Content is always plain text.
    Text,
}

/// Which assistant turns of a conversation are learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Supervise {
    /// All of them; a message's own `train` or `weight` still counts.
    #[default]
    All,
    /// The last one.
    Last,
    /// Those whose `train` or `weight` says so.
    #[serde(alias = "per_message")]
    PerMessage,
}

/// The shape of the rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Found from the fields of each row.
    #[default]
    Auto,
    /// `input_text` and `full_text`.
    InputFull,
    /// `prompt` and `completion`: both strings, or lists of messages.
    PromptCompletion,
    /// `input_ids` with `labels`, `completion_mask` or `assistant_masks`.
    #[serde(alias = "tokenized")]
    Tokenised,
    /// `messages` in OpenAI's shape.
    Messages,
    /// `conversations` of `from` and `value`.
    Sharegpt,
    /// `instruction`, `input` and `output`, perhaps with `history` and `system`.
    Alpaca,
    /// `segments` of `text` with `train` or `weight`.
    Segments,
    /// `chosen` and `rejected`: the chosen side.
    Preference,
}

impl Format {
    /// Every format, with the name that the `format` key has for it.
    pub const NAMES: [(&'static str, Format); 9] = [
        ("auto", Format::Auto),
        ("input_full", Format::InputFull),
        ("prompt_completion", Format::PromptCompletion),
        ("tokenised", Format::Tokenised),
        ("messages", Format::Messages),
        ("sharegpt", Format::Sharegpt),
        ("alpaca", Format::Alpaca),
        ("segments", Format::Segments),
        ("preference", Format::Preference),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        Format::NAMES.iter().find(|(_, format)| *format == self).map_or("auto", |(name, _)| name)
    }
}

/// The policy: with the tokenizer and the source it determines every label.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    /// Shape of the rows.
    pub format: Format,
    /// Which tokens are learned.
    pub objective: Objective,
    /// How prompt and response meet.
    pub boundary: Boundary,
    /// What happens to long rows.
    pub truncation_mode: TruncationMode,
    /// Longest row in tokens; `None` = no limit.
    pub max_length: Option<usize>,
    /// Append the EOS to a plain completion that does not end in it.
    pub append_eos: bool,
    /// What happens to rows that fail.
    pub on_bad_row: OnBadRow,
    /// Whether content can produce structural ids.
    pub content_special_tokens: ContentSpecialTokens,
    /// Weight of prompt tokens (not scaffold); 0 masks them.
    pub prompt_loss_weight: f32,
    /// Weight per section, over `prompt_loss_weight`.
    pub loss_weights: BTreeMap<String, f32>,
    /// Marker text per section (`SYSTEM`, `CONTEXT`, `TASK`, `RESPONSE`), e.g. `[SYSTEM]`.
    pub section_markers: BTreeMap<String, String>,
    /// Stop tokens beyond `eos_token` and `generation_config.json`.
    pub stop_tokens: Vec<String>,
    /// Which assistant turns are learned.
    #[serde(default, skip_serializing_if = "is_default")]
    pub supervise: Supervise,
    /// The day, as YYYY-MM-DD, that a chat template is told is today; `None` where none is pinned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template_date: Option<String>,
    /// Variables for the chat template, under those of a row's own `chat_template_kwargs`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub template_kwargs: BTreeMap<String, serde_json::Value>,
    /// Put rows together into packs of at most `max_length` tokens.
    #[serde(default, skip_serializing_if = "is_default")]
    pub packing: bool,
    /// In a pack, compute a prompt that several rows have once.
    #[serde(default, skip_serializing_if = "is_default")]
    pub share_prefix: bool,
}

/// True for a value that a policy need not write down: data prepared before there was such a choice keeps its fingerprint.
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
    /// The loss weight of a prompt section: its own, else `prompt_loss_weight`.
    pub fn section_weight(&self, section: Section) -> f32 {
        self.loss_weights.get(section.name()).copied().unwrap_or(self.prompt_loss_weight)
    }
}
