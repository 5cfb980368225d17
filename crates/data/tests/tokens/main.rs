//! The tokenizer against values of other programs (goldens made with transformers and llama.cpp), and against the
//! two promises of `boundary: split`, on real tokenizers and on small ones made here.
//!
//! The goldens are those of the repository, and the internal material if this machine has it.

#[path = "../common/mod.rs"]
mod common;
mod goldens;
mod made;
mod pair;
mod small;

use std::path::Path;
use suasion_data::render::{Rendered, Span};
use suasion_data::tokens::{Encoded, Tokenizer};
use suasion_data::{Boundary, Origin, Policy, RowId, Section};

const PROMPT: Origin = Origin::Prompt { turn: 0, section: Section::Other };
const RESPONSE: Origin = Origin::Response { turn: 0 };
const STOP: Origin = Origin::EndOfTurn { turn: 0 };

/// Text made of `(text, origin)` parts; prompts have weight 0, everything supervised 1.
fn rendered(parts: &[(&str, Origin)], add_special_tokens: bool) -> Rendered {
    let mut text = String::new();
    let mut spans = Vec::new();
    for (part, origin) in parts {
        let start = text.len();
        text.push_str(part);
        let weight = if origin.supervised() { 1.0 } else { 0.0 };
        spans.push(Span { range: start..text.len(), origin: *origin, weight });
    }
    let id = RowId::new(Path::new("test.jsonl"), 0, Some(1));
    Rendered { id, text, spans, add_special_tokens }
}

fn policy(boundary: Boundary) -> Policy {
    Policy { boundary, ..Policy::default() }
}

fn split(tokenizer: &Tokenizer, parts: &[(&str, Origin)]) -> Encoded {
    tokenizer.encode(&rendered(parts, true), &policy(Boundary::Split)).unwrap()
}

fn joint(tokenizer: &Tokenizer, parts: &[(&str, Origin)]) -> Encoded {
    tokenizer.encode(&rendered(parts, true), &policy(Boundary::Joint)).unwrap()
}

/// Indices of the supervised tokens.
fn supervised(encoded: &Encoded) -> Vec<usize> {
    (0..encoded.tokens.len()).filter(|&i| encoded.tokens.origins[i].supervised()).collect()
}

/// Ids of the tokens of one origin.
fn ids_of(encoded: &Encoded, origin: Origin) -> Vec<u32> {
    let tokens = &encoded.tokens;
    (0..tokens.len()).filter(|&i| tokens.origins[i] == origin).map(|i| tokens.ids[i]).collect()
}

fn nfc(text: &str) -> String {
    use tokenizers::{NormalizedString, Normalizer};
    let mut normalized = NormalizedString::from(text);
    tokenizers::normalizers::NFC.normalize(&mut normalized).unwrap();
    normalized.get().to_string()
}
