//! What an example is made of.

use super::chat::{Conversation, message};
use crate::{Origin, Pack};

/// The content of an example.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// A prompt and its completion, one after the other.
    Text {
        /// Prompt and completion.
        text: String,
        /// Where the completion starts, in bytes.
        prompt_len: usize,
    },
    /// A conversation, which needs a chat template to become text.
    Chat(Box<Conversation>),
    /// An instruction: a conversation where there is a chat template, text where there is none.
    Alpaca(Box<Alpaca>),
    /// Text in pieces that say of themselves whether they are learned.
    Segments(Vec<TextPiece>),
    /// Already tokens.
    Tokenised(Box<Tokenised>),
}

/// A piece of text and its loss weight; 0 makes it prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct TextPiece {
    /// The text.
    pub text: String,
    /// Its loss weight.
    pub weight: f32,
}

/// An instruction with its answer (the format of Stanford's Alpaca). It becomes a conversation where the model has a
/// chat template, and text around the headings of the Alpaca prompt where it has none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Alpaca {
    /// The conversation's system prompt; in plain text it takes the place of the opening sentence.
    pub system: Option<String>,
    /// Earlier instructions, each with its answer.
    pub history: Vec<(String, String)>,
    /// What is asked.
    pub instruction: String,
    /// What it is asked of; `None` where the row has none.
    pub input: Option<String>,
    /// The answer.
    pub output: String,
}

impl Alpaca {
    /// The same as messages: the input follows the instruction on a line of its own.
    pub fn conversation(&self) -> Conversation {
        let mut messages = Vec::new();
        if let Some(text) = &self.system {
            messages.push(message("system", text.clone()));
        }
        for (asked, answered) in &self.history {
            messages.push(message("user", asked.clone()));
            messages.push(message("assistant", answered.clone()));
        }
        let asked = match &self.input {
            Some(input) => format!("{}\n{input}", self.instruction),
            None => self.instruction.clone(),
        };
        messages.push(message("user", asked));
        messages.push(message("assistant", self.output.clone()));
        let weights = vec![None; messages.len()];
        Conversation { messages, weights, ..Conversation::default() }
    }
}

/// A tokenised row, as it was given. All vectors have the length of `input_ids`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tokenised {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// Labels as given: any value, right or wrong.
    pub labels: Option<Vec<i32>>,
    /// `completion_mask` or `assistant_masks`: true on the response.
    pub mask: Option<Vec<bool>>,
    /// `attention_mask`: false on padding.
    pub attention: Option<Vec<bool>>,
    /// A loss weight per token.
    pub weights: Option<Vec<f32>>,
    /// Origins, as our own prepared rows carry them.
    pub origins: Option<Vec<Origin>>,
    /// The rendered text, as `--with-text` writes it.
    pub text: Option<String>,
    /// For a pack, its boundaries (`seq_lengths`, `position_ids`, an `attention_mask` that numbers its sequences).
    pub pack: Option<Pack>,
    /// Why the boundaries that it names cannot be: it cannot become a sample (P001).
    pub broken: Option<String>,
}

impl Tokenised {
    /// The row of these tokens of a pack.
    pub(crate) fn part(&self, tokens: &[usize]) -> Tokenised {
        fn pick<T: Copy>(values: &[T], tokens: &[usize]) -> Vec<T> {
            tokens.iter().map(|&i| values[i]).collect()
        }
        Tokenised {
            input_ids: pick(&self.input_ids, tokens),
            labels: self.labels.as_ref().map(|v| pick(v, tokens)),
            mask: self.mask.as_ref().map(|v| pick(v, tokens)),
            attention: self.attention.as_ref().map(|v| pick(v, tokens)),
            weights: self.weights.as_ref().map(|v| pick(v, tokens)),
            origins: self.origins.as_ref().map(|v| pick(v, tokens)),
            ..Tokenised::default()
        }
    }
}
