//! The content of an example.

use super::chat::{Conversation, message};
use crate::{Origin, Pack};
use serde_json::Value;

/// The content of an example.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// A prompt and its completion, one after the other.
    Text {
        /// Prompt and completion.
        text: String,
        /// Length of the prompt in bytes: the offset at which the completion starts.
        prompt_len: usize,
    },
    /// A text without a prompt, for training on all tokens.
    Whole(String),
    /// A conversation, to be rendered by a chat template.
    Chat(Box<Conversation>),
    /// An instruction: rendered as a conversation if the model has a chat template, else as plain text.
    Alpaca(Box<Alpaca>),
    /// Pieces of text, each with its loss weight.
    Segments(Vec<TextPiece>),
    /// Token ids with labels or a mask.
    Tokenised(Box<Tokenised>),
}

impl Body {
    /// The length of its texts in bytes; 0 for tokens.
    pub(crate) fn text_bytes(&self) -> usize {
        fn of(value: &Value) -> usize {
            match value {
                Value::String(text) => text.len(),
                Value::Array(list) => list.iter().map(of).sum(),
                Value::Object(map) => map.values().map(of).sum(),
                _ => 0,
            }
        }
        match self {
            Body::Text { text, .. } | Body::Whole(text) => text.len(),
            Body::Chat(c) => {
                let messages = c.messages.iter().flat_map(|message| message.values());
                messages.chain(c.tools.iter().flatten()).chain(c.kwargs.values()).map(of).sum()
            }
            Body::Alpaca(row) => {
                let history = row.history.iter().map(|(a, b)| a.len() + b.len()).sum::<usize>();
                let optional =
                    [&row.system, &row.input].into_iter().flatten().map(String::len).sum::<usize>();
                history + optional + row.instruction.len() + row.output.len()
            }
            Body::Segments(list) => list.iter().map(|piece| piece.text.len()).sum(),
            Body::Tokenised(_) => 0,
        }
    }
}

/// A piece of text and its loss weight; a piece of weight 0 is prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct TextPiece {
    /// The text.
    pub text: String,
    /// Its loss weight.
    pub weight: f32,
}

/// An instruction with its answer, in the format of Stanford's Alpaca.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Alpaca {
    /// System prompt of the conversation; in plain text it replaces the opening sentence of the Alpaca
    /// prompt.
    pub system: Option<String>,
    /// Earlier turns: instruction and answer.
    pub history: Vec<(String, String)>,
    /// The instruction.
    pub instruction: String,
    /// Input to the instruction, if the row has one.
    pub input: Option<String>,
    /// The answer.
    pub output: String,
}

impl Alpaca {
    /// The instruction as messages; the input follows the instruction on a new line.
    pub fn conversation(&self) -> Conversation {
        let mut messages = Vec::new();
        if let Some(text) = &self.system {
            messages.push(message("system", text.clone()));
        }
        for (instruction, answer) in &self.history {
            messages.push(message("user", instruction.clone()));
            messages.push(message("assistant", answer.clone()));
        }
        let prompt = match &self.input {
            Some(input) => format!("{}\n{input}", self.instruction),
            None => self.instruction.clone(),
        };
        messages.push(message("user", prompt));
        messages.push(message("assistant", self.output.clone()));
        let weights = vec![None; messages.len()];
        Conversation { messages, weights, ..Conversation::default() }
    }
}

/// A tokenised row as given, validated only for types and lengths. All vectors have the length of `input_ids`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tokenised {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// Labels, not shifted and not checked.
    pub labels: Option<Vec<i32>>,
    /// `completion_mask` or `assistant_masks`: true on the response, which both mark.
    pub mask: Option<Vec<bool>>,
    /// `assistant_masks` alone, which also applies if all tokens are supervised.
    pub assistant: Option<Vec<bool>>,
    /// `attention_mask`: false on padding.
    pub attention: Option<Vec<bool>>,
    /// A loss weight per token.
    pub weights: Option<Vec<f32>>,
    /// Origins, which prepared rows have: runs of tokens of one origin, with their lengths.
    pub origins: Option<Vec<(Origin, usize)>>,
    /// The rendered text, which `prepare --with-text` writes.
    pub text: Option<String>,
    /// For a pack, its boundaries (from `seq_lengths`, `position_ids`, or an `attention_mask` that numbers
    /// its sequences).
    pub pack: Option<Pack>,
    /// The index at which padding begins that its `attention_mask` does not mask; `attention` is false there.
    pub counted_padding: Option<usize>,
    /// Why its boundaries are invalid (P001); such a row cannot become a sample.
    pub broken: Option<String>,
}

impl Tokenised {
    /// The row that consists of these tokens of a pack.
    pub(crate) fn part(&self, tokens: &[usize]) -> Tokenised {
        Tokenised {
            input_ids: pick(&self.input_ids, tokens),
            labels: self.labels.as_ref().map(|v| pick(v, tokens)),
            mask: self.mask.as_ref().map(|v| pick(v, tokens)),
            assistant: self.assistant.as_ref().map(|v| pick(v, tokens)),
            attention: self.attention.as_ref().map(|v| pick(v, tokens)),
            weights: self.weights.as_ref().map(|v| pick(v, tokens)),
            ..Tokenised::default()
        }
    }
}

/// The values of these tokens.
pub(crate) fn pick<T: Copy>(values: &[T], tokens: &[usize]) -> Vec<T> {
    tokens.iter().map(|&i| values[i]).collect()
}
