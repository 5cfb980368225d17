//! What is known of rows that other programs have tokenised, apart from their own fields: the positions of their
//! turns, and the program that probably wrote them.

use crate::Code;
use crate::tokens::Tokenizer;
use std::sync::Arc;

/// What is known of a row that came as tokens.
#[derive(Clone, Debug, Default)]
pub struct Foreign<'a> {
    /// What was found in the row, or in each sequence of a pack; empty if nothing was searched for.
    pub parts: Arc<Vec<Part>>,
    /// The row has neither labels nor a mask: a trainer trains on all of it.
    pub unlabelled: bool,
    /// The origins are those of the source row, whose answers should all be supervised.
    pub expected: bool,
    /// Which stop tokens the chat template writes.
    pub stops: WrittenStops,
    /// Decodes tokens for messages.
    pub tokenizer: Option<&'a Tokenizer>,
}

/// What was found in the ids of a row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// The origins of its tokens are known apart from its labels.
    pub known: bool,
    /// Positions where a conversation restarts.
    pub restarts: Vec<Restart>,
    /// The row begins inside a message.
    pub inside: bool,
}

/// A position where a conversation restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restart {
    /// The index of the token.
    pub at: usize,
    /// It cannot be the next turn of the same conversation.
    pub sure: bool,
}

/// Which stop tokens a chat template writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrittenStops {
    /// After at least some answers.
    pub any: bool,
    /// After the last answer of a conversation.
    pub last: bool,
}

impl Default for WrittenStops {
    fn default() -> Self {
        WrittenStops { any: true, last: true }
    }
}

impl Foreign<'_> {
    /// True for a masked start of an answer that is probably intended: white space, or a thought with its closing tag.
    pub(super) fn is_given_or_thought(&self, ids: &[u32]) -> bool {
        let Some(tokenizer) = self.tokenizer else { return false };
        let text = tokenizer.decode(ids, false);
        let text = text.trim();
        let tag = |open: &str, close: char| {
            text.ends_with(close) && text.rfind(open).is_some_and(|at| at + 40 > text.len())
        };
        text.is_empty() || tag("</", '>') || tag("<|", '>') || tag("[/", ']')
    }
}

/// A program that tokenises rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maker {
    /// Hugging Face TRL.
    Trl,
    /// axolotl.
    Axolotl,
    /// LLaMA-Factory.
    LlamaFactory,
    /// ms-swift.
    Swift,
    /// Unknown.
    Unknown,
}

impl Maker {
    /// The program that writes rows with these columns, if only one does.
    pub fn of<S: AsRef<str>>(columns: &[S]) -> Maker {
        let has = |name: &str| columns.iter().any(|column| column.as_ref() == name);
        let (ids, labels) = (has("input_ids"), has("labels"));
        match () {
            () if !ids => Maker::Unknown,
            () if has("completion_mask") || has("assistant_masks") || has("seq_lengths") => Maker::Trl,
            // axolotl keeps the columns that it has read, and writes no attention mask.
            () if labels && !has("attention_mask") && (has("messages") || has("prompt") || has("text")) => {
                Maker::Trl
            }
            () if labels && (has("images") || has("videos") || has("audios")) => Maker::LlamaFactory,
            () if labels && (has("loss_scale") || has("lengths")) => Maker::Swift,
            () if labels && has("attention_mask") && (has("position_ids") || has("length")) => Maker::Axolotl,
            () => Maker::Unknown,
        }
    }

    /// The program's name.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Maker::Trl => Some("TRL"),
            Maker::Axolotl => Some("axolotl"),
            Maker::LlamaFactory => Some("LLaMA-Factory"),
            Maker::Swift => Some("ms-swift"),
            Maker::Unknown => None,
        }
    }
}

/// The settings that decide what a finding is about, by program; `{user}` and `{answer}` are replaced by role headers.
const REMEDIES: &[(&[Code], Maker, &str)] = &[
    (
        &[Code::M004, Code::M008],
        Maker::Trl,
        "give rows as prompt and completion (completion_only_loss is then true by default), or set assistant_only_loss=True \
         with a template that has {% generation %} blocks; never a text column",
    ),
    (
        &[Code::M004, Code::M008],
        Maker::Axolotl,
        "train_on_inputs: false; for chat_template data sets roles_to_train: [\"assistant\"] and train_on_eos: turn",
    ),
    (
        &[Code::M004, Code::M008],
        Maker::LlamaFactory,
        "train_on_prompt: false, stage: sft; mask_history: true to learn the last answer alone",
    ),
    (
        &[Code::M004, Code::M008],
        Maker::Swift,
        "loss_scale: default, and no pretraining task (swift pt, --task_type)",
    ),
    (
        &[Code::M004, Code::M008],
        Maker::Unknown,
        "Unsloth: train_on_responses_only(trainer, instruction_part={user}, response_part={answer})",
    ),
    (
        &[Code::M007],
        Maker::Trl,
        "let {% generation %} begin after the role header and end with the stop token in the training template",
    ),
    (
        &[Code::M007, Code::M010],
        Maker::Unknown,
        "Unsloth: response_part must be the whole header with its line end, {answer}",
    ),
    (&[Code::M007], Maker::Axolotl, "train_on_eos: turn (not all)"),
    (
        &[Code::M002, Code::M009],
        Maker::Trl,
        "set eos_token in SFTConfig to the template's stop token, and a pad_token that is another token",
    ),
    (
        &[Code::M002, Code::M009],
        Maker::Axolotl,
        "train_on_eos: turn, with eot_tokens naming the template's stop token; special_tokens: pad_token that is not the EOS",
    ),
    (
        &[Code::M002, Code::M009],
        Maker::LlamaFactory,
        "the template of the model (template: qwen, llama3 ..), whose stop word is then learned; efficient_eos: false",
    ),
    (
        &[Code::M009],
        Maker::Unknown,
        "tokenizer.pad_token = another token than the EOS, before the collator masks labels equal to pad_token_id",
    ),
    (&[Code::M006], Maker::Unknown, "tokenise rendered chat text with add_special_tokens=False"),
    (
        &[Code::P001],
        Maker::Trl,
        "packing_strategy: \"bfd\" (not \"wrapped\") with padding_free and FlashAttention",
    ),
    (&[Code::P001], Maker::Axolotl, "sample_packing: true with flash_attention: true"),
    (&[Code::P001], Maker::LlamaFactory, "neat_packing: true"),
    (&[Code::P001], Maker::Swift, "--packing true with --attn_impl flash_attn"),
];

/// The settings to check for a code: those of the program that wrote the rows, else of each known program.
/// `headers`: the role headers of a user's message and of an answer.
pub fn remedies(code: Code, maker: Maker, headers: Option<(&str, &str)>) -> Vec<String> {
    let of = |known: Maker| {
        REMEDIES.iter().filter(move |(codes, other, _)| codes.contains(&code) && *other == known)
    };
    let all = REMEDIES.iter().filter(|(codes, ..)| codes.contains(&code));
    let chosen: Vec<_> = match maker {
        Maker::Unknown => all.collect(),
        known => of(known).collect(),
    };
    let (user, answer) = headers.unwrap_or(("..", ".."));
    let text = |(_, maker, text): &&(&[Code], Maker, &str)| {
        let text = text.replace("{user}", &format!("{user:?}")).replace("{answer}", &format!("{answer:?}"));
        maker.name().map_or(text.clone(), |name| format!("{name}: {text}"))
    };
    chosen.iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_known_by_their_columns() {
        let of = |columns: &str| Maker::of(&columns.split(' ').collect::<Vec<_>>());
        assert_eq!(of("input_ids labels completion_mask"), Maker::Trl);
        assert_eq!(of("input_ids seq_lengths labels"), Maker::Trl);
        assert_eq!(of("messages input_ids labels"), Maker::Trl);
        assert_eq!(of("input_ids attention_mask labels images videos audios"), Maker::LlamaFactory);
        assert_eq!(of("input_ids attention_mask labels position_ids length"), Maker::Axolotl);
        assert_eq!(of("input_ids labels loss_scale lengths"), Maker::Swift);
        assert_eq!(of("input_ids attention_mask labels"), Maker::Unknown);
        assert_eq!(of("images labels"), Maker::Unknown);
    }

    #[test]
    fn headers_stand_in_the_remedy() {
        let [text] =
            remedies(Code::M007, Maker::Unknown, Some(("<u>", "<a>\n"))).try_into().unwrap_or_else(|all| {
                let all: Vec<String> = all;
                [all.into_iter().find(|text| text.contains("Unsloth")).unwrap()]
            });
        assert!(text.contains("\"<a>\\n\""), "{text}");
        assert!(remedies(Code::M008, Maker::Axolotl, None).iter().all(|text| text.starts_with("axolotl: ")));
    }
}
