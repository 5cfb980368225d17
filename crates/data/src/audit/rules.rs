//! The registry of rules: the meaning of each code, its remedy and its check. docs/findings.md is generated from it.

use super::copies::copied_response;
use super::labels::wrong_labels;
use super::length::beyond_positions;
use super::mask::{
    answer_in_part, double_bos, everything_supervised, no_stop, no_target, padding_supervised,
    prompt_supervised, scaffold_supervised, stop_masked,
};
use super::packs::{self, sees_across};
use super::subject::{Found, Subject};
use crate::{Code, Finding};

/// A rule: everything about one code.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Rule {
    /// The code.
    pub code: Code,
    /// Its meaning in one line.
    pub meaning: &'static str,
    /// Its page, in Markdown: when it is found, and why that matters.
    pub doc: &'static str,
    /// What to do about it.
    pub help: &'static str,
    /// Minimal rows in which it is found.
    pub example: Example,
    /// True if it means that a wrong token would be supervised, or a right one would not: rows with such an error
    /// are not trained on ([`Mode::Train`](crate::Mode::Train)) unless the code is ignored by name.
    pub refuses: bool,
    /// How it is checked on a row's tokens.
    pub check: Check,
}

/// Rows in which a rule finds something. In their ids 0 is padding, 1 BOS, 2 the stop token, 3 the header of a
/// user's message and 4 that of an answer; any other id is text.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Example {
    /// The rows, one JSON object per line.
    pub rows: &'static str,
    /// An additional setting, as `key=value`; empty if none is needed.
    pub set: &'static str,
}

/// An example without a setting.
const fn rows(rows: &'static str) -> Example {
    Example { rows, set: "" }
}

/// How a rule is checked.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Check {
    /// On each row separately, also on those of a pack.
    Row(fn(&Subject<'_>) -> Vec<Found>),
    /// On each row separately (the first), and on a whole pack (the second).
    RowAndPack(fn(&Subject<'_>) -> Vec<Found>, fn(&Subject<'_>) -> Vec<Found>),
    /// Not on tokens: it is found when rows are read, rendered, tokenised, truncated or compared.
    Elsewhere,
}

impl Code {
    /// The rule of this code.
    pub fn rule(self) -> &'static Rule {
        &RULES[self as usize]
    }
}

/// All findings in a row, in the order of the rules. The rows of a pack are checked one by one; the message gives
/// the sequence, counted from 0.
pub fn audit(subject: &Subject<'_>) -> Vec<Finding> {
    let row = subject.sample.id.row;
    let finding = |rule: &Rule, found: Found| Finding {
        level: found.level.unwrap_or(rule.code.level()),
        tokens: Some(found.tokens),
        ..Finding::new(row, rule.code, found.message)
    };
    let mut findings = Vec::new();
    let Some(pack) = &subject.sample.pack else {
        for rule in RULES {
            if let Check::Row(check) | Check::RowAndPack(check, _) = rule.check {
                findings.extend(check(subject).into_iter().map(|found| finding(rule, found)));
            }
        }
        return findings;
    };
    for (i, (sample, tokens)) in subject.sample.unpack().iter().zip(pack.row_tokens()).enumerate() {
        let given = subject.given.map(|given| {
            let mut part = given.part(&tokens);
            // The weight of a shared token is the sum over its rows, not the row's own.
            part.weights &= sample.weights.is_some();
            part
        });
        let mut subject = Subject::new(sample, given.as_ref(), subject.special, subject.policy)
            .with_positions(subject.positions)
            .with_foreign(subject.foreign.clone());
        subject.sequence = i;
        let in_pack = |i: u32| tokens.get(i as usize).map_or(0, |&i| i as u32);
        for rule in RULES {
            let (Check::Row(check) | Check::RowAndPack(check, _)) = rule.check else { continue };
            for mut found in check(&subject) {
                found.message = format!("sequence {i}: {}", found.message);
                found.tokens = in_pack(found.tokens.start)..in_pack(found.tokens.end.saturating_sub(1)) + 1;
                findings.push(finding(rule, found));
            }
        }
    }
    for rule in RULES {
        if let Check::RowAndPack(_, check) = rule.check {
            findings.extend(check(subject).into_iter().map(|found| finding(rule, found)));
        }
    }
    findings
}

/// Every rule, in the order of [`Code::ALL`].
pub const RULES: &[Rule] = &[
    Rule {
        code: Code::Row,
        meaning: "the row cannot become a sample",
        doc: "Invalid JSON or UTF-8, a field that is missing, null or of the wrong type, or a `full_text` that does \
              not start with `input_text`. The message names file, line and byte.",
        help: "repair the row, or leave such rows out with on_bad_row=skip",
        example: rows(r#"{"input_text": "Say hi. ", "full_text": "say hi. Hi."}"#),
        refuses: false,
        check: Check::Elsewhere,
    },
    Rule {
        code: Code::M001,
        meaning: "no supervised token",
        doc: "Nothing of the row would be learned: its response is empty, truncation has cut all of it, or every \
              label is -100. A row whose answer is empty or missing is a bad row and stops the run, unless \
              `on_bad_row=skip`. A row left without a target by truncation, weights or `supervise` is left out and \
              counted.",
        help: "raise max_length, use truncation_mode=keep_response, or repair the row",
        example: rows(r#"{"input_ids": [1, 8, 9, 2], "labels": [-100, -100, -100, -100]}"#),
        refuses: false,
        check: Check::Row(no_target),
    },
    Rule {
        code: Code::M002,
        meaning: "a response without a supervised stop token",
        doc: "A model that never learns its stop token does not stop. Truncation has cut the response, or no EOS was \
              appended. Under `append_eos=false` this is a warning.\n\n\
              A template whose stop token opens the next message (GLM's `<|user|>`) leaves the last answer without \
              one; the answers before it have theirs ([templates.md](templates.md)).",
        help: "raise max_length, or name the token that ends a response in stop_tokens",
        example: rows(r#"{"input_ids": [1, 7, 8, 9], "labels": [-100, -100, 8, 9]}"#),
        refuses: false,
        check: Check::Row(no_stop),
    },
    Rule {
        code: Code::M003,
        meaning: "a token straddles the boundary",
        doc: "Under `boundary=joint` one token can hold the last characters of the prompt and the first of the \
              response. It is supervised, because part of it is response; the message shows how `boundary=split` \
              would cut it. A token across two loss weights has this code too, under either boundary: it takes the \
              larger weight.",
        help: "use boundary=split, the default",
        example: Example { rows: r#"{"prompt": "xa", "completion": "bc"}"#, set: "boundary=joint" },
        refuses: false,
        check: Check::Elsewhere,
    },
    Rule {
        code: Code::M004,
        meaning: "a token wholly inside the prompt is supervised",
        doc: "Found in rows that another tool has tokenised: the model would learn to recite its prompt.",
        help: "correct the labels, or ask for it with completion_only_loss=false or prompt_loss_weight",
        example: rows(
            r#"{"input_ids": [1, 8, 9, 2], "labels": [-100, 8, 9, 2], "completion_mask": [0, 0, 1, 1]}"#,
        ),
        refuses: true,
        check: Check::Row(prompt_supervised),
    },
    Rule {
        code: Code::M005,
        meaning: "a padding token is supervised",
        doc: "A label stands where `attention_mask` is 0. Padding is known by position, never by id.",
        help: "set the labels of padding to -100",
        example: rows(
            r#"{"input_ids": [1, 8, 9, 2, 0], "labels": [-100, -100, 9, 2, 0], "attention_mask": [1, 1, 1, 1, 0]}"#,
        ),
        refuses: true,
        check: Check::Row(padding_supervised),
    },
    Rule {
        code: Code::M006,
        meaning: "double BOS",
        doc: "The text carries its BOS and the tokenizer has added another. The model would be trained on a beginning \
              that it never meets.",
        help: "remove the BOS from the text: the tokenizer adds one",
        example: rows(r#"{"input_ids": [1, 1, 8, 9, 2], "labels": [-100, -100, -100, 9, 2]}"#),
        refuses: true,
        check: Check::Row(double_bos),
    },
    Rule {
        code: Code::M007,
        meaning: "role header or text after the stop token is supervised",
        doc: "The model would learn to write the header of the next turn.",
        help: "mask what is not the response or its stop token",
        example: rows(r#"{"input_ids": [1, 8, 9, 2, 7], "labels": [-100, -100, 9, 2, 7]}"#),
        refuses: false,
        check: Check::Row(scaffold_supervised),
    },
    Rule {
        code: Code::M008,
        meaning: "everything is supervised: labels equal input_ids",
        doc: "The bug that this tool exists for. Nothing was masked; the loss is mostly about the prompt.",
        help: "correct the labels, or ask for it with completion_only_loss=false or prompt_loss_weight",
        example: rows(r#"{"input_ids": [1, 3, 8, 2, 4, 9, 2], "labels": [1, 3, 8, 2, 4, 9, 2]}"#),
        refuses: true,
        check: Check::Row(everything_supervised),
    },
    Rule {
        code: Code::M009,
        meaning: "a real EOS at the end of a response is masked",
        doc: "It happens where pad and EOS are one id and padding was masked by id: the model never learns to stop.",
        help: "label the stop token with its id: mask padding by position, not by comparing with the pad id",
        example: rows(r#"{"input_ids": [1, 8, 9, 2], "labels": [-100, -100, 9, -100]}"#),
        refuses: true,
        check: Check::Row(stop_masked),
    },
    Rule {
        code: Code::M010,
        meaning: "an answer is learned in part: its mask starts late, ends early or has a hole",
        doc: "The first tokens of an answer are masked, or its last ones, or some between. A mask that starts a token late is made \
              by tokenising prompt and answer apart and counting; one with a hole by masking every token that has the pad id. It \
              needs a row whose answers are known apart from its labels: from the chat template, or from the source rows. An \
              answer of which nothing is learned is no fault, nor is a masked thought before an answer that is learned.",
        help: "label every token of the answer with its id, from the first after the role header to the stop token",
        example: rows(
            r#"{"input_ids": [1, 3, 10, 11, 2, 4, 12, 13, 2], "labels": [-100, -100, -100, -100, -100, -100, -100, 13, 2]}"#,
        ),
        refuses: true,
        check: Check::Row(answer_in_part),
    },
    Rule {
        code: Code::L001,
        meaning: "a label that is neither -100 nor the input id at its place",
        doc: "Labels are -100 or the input id at the same place. They are not shifted in advance: the model shifts \
              them.",
        help: "write labels that are -100 or the input id at the same place, not shifted",
        example: rows(r#"{"input_ids": [1, 8, 9, 2], "labels": [-100, 9, 2, -100]}"#),
        refuses: true,
        check: Check::Row(wrong_labels),
    },
    Rule {
        code: Code::L002,
        meaning: "the row is not what its source row gives",
        doc: "`verify --source ROWS` tokenises the source rows again, with the model's tokenizer and template, and holds each row \
              of tokens against its own: the one with the same ids, else the one in the same place (a sequence of a pack: the \
              one with the same ids). This is found where no source row has these ids, or where the ids of the row's pair differ: the message \
              shows the first difference. Another template, a default system prompt, a date or a cut row are the usual reasons. \
              Labels that differ where the ids agree have their own codes (M004, M007, M009, M010).",
        help: "tokenise with the template that the model is given at inference, or name the one that was used with --template",
        example: Example {
            rows: r#"{"input_ids": [1, 3, 10, 2, 4, 12, 2], "labels": [-100, -100, -100, -100, -100, 12, 2]}"#,
            set: "--source: a row with another text",
        },
        refuses: false,
        check: Check::Elsewhere,
    },
    Rule {
        code: Code::T001,
        meaning: "supervised tokens lost by truncation",
        doc: "The end of the response was cut. No EOS is invented for it.",
        help: "raise max_length, or leave such rows out with truncation_mode=drop",
        example: Example { rows: r#"{"prompt": "abc", "completion": "defghi"}"#, set: "max_length=6" },
        refuses: false,
        check: Check::Elsewhere,
    },
    Rule {
        code: Code::T002,
        meaning: "prompt cut by truncation",
        doc: "The oldest context was cut first; system, task, the last user turn and scaffold stay.",
        help: "raise max_length where the context matters",
        example: Example { rows: r#"{"prompt": "abcdef", "completion": "gh"}"#, set: "max_length=6" },
        refuses: false,
        check: Check::Elsewhere,
    },
    Rule {
        code: Code::T003,
        meaning: "a row longer than the model's positions",
        doc: "The row has more tokens than `max_position_embeddings` (`n_positions`), and RoPE is not scaled to reach them: \
              the model has never seen such positions. `max_length` cuts rows; a model with scaled RoPE (`rope_scaling`) \
              reaches further. Where positions are a learned table, `train` and `eval` refuse the row.",
        help: "set max_length to at most the model's positions",
        example: Example {
            rows: r#"{"input_ids": [1, 8, 9, 10, 2], "labels": [-100, -100, 9, 10, 2]}"#,
            set: "max_position_embeddings=4",
        },
        refuses: false,
        check: Check::Row(beyond_positions),
    },
    Rule {
        code: Code::S001,
        meaning: "a structural token came from content",
        doc: "The text of a message contains the text of a special token, and the tokenizer has made that token of it. \
              Where a template changes what users say, so that the place of their text is not proved, its own headers \
              around them are counted too.",
        help: "set content_special_tokens=text: content then cannot make special tokens",
        example: rows(r#"{"prompt": "a</s>b", "completion": "c"}"#),
        refuses: false,
        check: Check::Elsewhere,
    },
    Rule {
        code: Code::C001,
        meaning: "the template altered the content",
        doc: "The chat template trimmed or replaced what the assistant said. Where the answer stands was proved; \
              learned is what the template wrote.",
        help: "write the content as the template renders it, or accept the change",
        example: rows(
            r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " hello "}]}"#,
        ),
        refuses: false,
        check: Check::Elsewhere,
    },
    Rule {
        code: Code::C002,
        meaning: "a message that no token stands for",
        doc: "The chat template writes nothing of a message: its role is one that the template does not know (`gpt4`, \
              or `tool` in a template without tools), or the template drops its tool calls. The model would answer \
              what it never reads, or never learn what the row says. It is proved: the rendering with another \
              content in the message's place is the same. Names of roles are taken in any case, and the usual other \
              names (`human`, `gpt`, `tool_call`, `observation` ..) are known; a developer's message is the system's \
              where the template does not know developers.",
        help: "name the role as the template does, put the text into another message, or remove the message; or use a \
               template that writes it",
        example: rows(
            r#"{"messages": [{"role": "narrator", "content": "once"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}"#,
        ),
        refuses: true,
        check: Check::Elsewhere,
    },
    Rule {
        code: Code::G001,
        meaning: "the generation prompt is no prefix of the rendering",
        doc: "The messages before an answer, rendered with the generation prompt, are what the model is given at \
              inference. Here they are not byte for byte the start of the conversation that is learned: the template \
              rejects them, or renders them otherwise than inside the whole (it drops earlier thoughts, or opens a \
              thought that the history does not have). The answer's start is proved in another way, and the answer is \
              learned after other tokens than it will be given.",
        help: "use a template that renders a conversation and its beginning alike, or split the conversation into rows \
               that end in one answer each, with supervise=last",
        example: Example {
            rows: r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}"#,
            set: "template_kwargs.thinks=true",
        },
        refuses: false,
        check: Check::Elsewhere,
    },
    Rule {
        code: Code::D001,
        meaning: "duplicate of another row, or response copied from its prompt",
        doc: "A duplicate counts twice in the loss, and can leak from training into held-out rows.",
        help: "remove the duplicate",
        example: rows(
            r#"{"input_ids": [1, 8, 9, 2], "labels": [-100, -100, 9, 2]}
{"input_ids": [1, 8, 9, 2], "labels": [-100, -100, 9, 2]}"#,
        ),
        refuses: false,
        check: Check::Row(copied_response),
    },
    Rule {
        code: Code::P001,
        meaning: "a pack without boundaries, or a target across one",
        doc: "The samples of a pack would see each other.\n\n\
              A row is a pack where it has `seq_lengths` (as TRL writes them), `position_ids` that start again from 0, \
              or an `attention_mask` that numbers its sequences (1, 1, 2, 2, 2). Each sequence is then a row of its \
              own: attention and positions are confined to it, and nothing before its first token could predict it. \
              Our own packs add `rows`, and `prefix_ranges` where sequences share a prompt. P001 is found where\n\n\
              - the boundaries are missing or impossible: several `rows` and nothing that says where they begin, \
              `seq_lengths` that do not sum to the number of tokens, positions or masks that contradict them, a prefix \
              that is not an earlier sequence. Such a row cannot become a sample, whatever the command;\n\
              - a label stands on the first token of a sequence that no shared prompt stands before. It is never a \
              target here, so training goes on; a trainer that shifts the labels of the whole pack would learn it \
              from the sequence before.\n\n\
              The other rules check each sequence by itself, and say which one, counted from 0.\n\n\
              A pack that names no boundaries in any of these ways is one long row to the model: each of its samples \
              sees those before it. With the tokenizer and the chat template this is found where a row begins a \
              conversation anew: with a second BOS where the template writes none between turns, or with the system \
              message that it began with. A row or a sequence that begins inside a message was cut by its packer; that \
              is a warning.\n\n\
              Positions that start again under an `attention_mask` that is 1 throughout, on the padding too, as \
              LLaMA-Factory packs without `neat_packing`, are a warning: some attention kernels follow positions, others \
              the mask.",
        help: "write the length of each sequence as seq_lengths; set the label of its first token to -100",
        example: rows(
            r#"{"input_ids": [1, 8, 2, 1, 9, 2], "labels": [-100, 8, 2, 1, 9, 2], "seq_lengths": [3, 3]}"#,
        ),
        refuses: false,
        check: Check::RowAndPack(sees_across, packs::pack),
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_has_its_rule() {
        assert!(Code::ALL.iter().all(|code| code.rule().code == *code));
        assert_eq!(RULES.len(), Code::ALL.len());
    }
}
