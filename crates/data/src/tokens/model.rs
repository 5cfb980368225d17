//! The library's tokenizer with our BPE model, if that supports the vocabulary, else with its own model.

use super::bpe::Bpe;
use super::cache;
use super::raw::TokenizerError;
use serde::{Deserialize, Deserializer};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::{
    DecoderWrapper, Model as _, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    Token, TokenizerBuilder, TokenizerImpl,
};

/// The library's tokenizer (added tokens, normalizer, pre-tokenizer, post-processor and decoder) around
/// [`Model`].
pub(super) type Inner =
    TokenizerImpl<Model, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// The model that turns pieces into ids.
pub(super) enum Model {
    /// Our own.
    Bpe(Box<Bpe>),
    /// The library's, within the tokenizer it was loaded in.
    Library(Box<tokenizers::Tokenizer>),
}

/// Reads a `tokenizer.json`; truncation, padding and dropout are switched off.
pub(super) fn load(json: &[u8]) -> Result<Inner, TokenizerError> {
    let ours = std::str::from_utf8(json).ok().and_then(|json| serde_json::from_str::<Inner>(json).ok());
    let mut inner = match ours {
        Some(inner) => inner,
        // Other files are read by the library from the start, which also reports errors.
        None => load_library(json)?,
    };
    inner.with_truncation(None)?;
    inner.with_padding(None);
    Ok(inner)
}

/// As [`load`], with the library's model.
pub(super) fn load_library(json: &[u8]) -> Result<Inner, TokenizerError> {
    let mut library = tokenizers::Tokenizer::from_bytes(json)?;
    if let ModelWrapper::BPE(bpe) = library.get_model()
        && bpe.dropout.is_some()
    {
        let mut bpe = bpe.clone();
        bpe.dropout = None;
        library.with_model(bpe);
    }
    TokenizerBuilder::new()
        .with_normalizer(library.get_normalizer().cloned())
        .with_pre_tokenizer(library.get_pre_tokenizer().cloned())
        .with_post_processor(library.get_post_processor().cloned())
        .with_decoder(library.get_decoder().cloned())
        .with_added_vocabulary(library.get_added_vocabulary().clone())
        .with_model(Model::Library(Box::new(library)))
        .build()
}

impl Model {
    /// The highest id.
    pub fn highest_id(&self) -> Option<u32> {
        match self {
            Model::Bpe(bpe) => bpe.tokens().map(|(_, id)| id).max(),
            Model::Library(library) => library.get_model().get_vocab().into_values().max(),
        }
    }
}

impl<'de> Deserialize<'de> for Model {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Model, D::Error> {
        Bpe::deserialize(deserializer).map(|bpe| Model::Bpe(Box::new(bpe)))
    }
}

impl tokenizers::Model for Model {
    type Trainer = TrainerWrapper;

    fn tokenize(&self, piece: &str) -> tokenizers::Result<Vec<Token>> {
        match self {
            Model::Library(library) => library.get_model().tokenize(piece),
            Model::Bpe(bpe) => {
                let mut start = 0;
                let token = |(id, length): (u32, usize)| {
                    let offsets = (start, start + length);
                    start += length;
                    Token::new(id, bpe.token(id).unwrap_or_default().to_string(), offsets)
                };
                Ok(tokenize_written(bpe, piece).into_iter().map(token).collect())
            }
        }
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        match self {
            Model::Bpe(bpe) => bpe.id(token),
            Model::Library(library) => library.get_model().token_to_id(token),
        }
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        match self {
            Model::Bpe(bpe) => bpe.token(id).map(str::to_string),
            Model::Library(library) => library.get_model().id_to_token(id),
        }
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        match self {
            Model::Bpe(bpe) => bpe.tokens().map(|(token, id)| (token.to_string(), id)).collect(),
            Model::Library(library) => library.get_model().get_vocab(),
        }
    }

    fn get_vocab_size(&self) -> usize {
        match self {
            Model::Bpe(bpe) => bpe.size(),
            Model::Library(library) => library.get_model().get_vocab_size(),
        }
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        match self {
            Model::Bpe(_) => Err("this model is for tokenising only and cannot be saved".into()),
            Model::Library(library) => library.get_model().save(folder, prefix),
        }
    }

    fn get_trainer(&self) -> TrainerWrapper {
        match self {
            Model::Bpe(_) => BpeTrainer::default().into(),
            Model::Library(library) => library.get_model().get_trainer(),
        }
    }
}

/// The tokens that the library's model gives for a string in GPT-2's alphabet: ids, and their lengths in
/// bytes of that string.
fn tokenize_written(bpe: &Bpe, written: &str) -> Vec<(u32, usize)> {
    let Some(bytes) = bpe.bytes_of(written).filter(|bytes| !bytes.is_empty()) else {
        return bpe.merge_written(written);
    };
    let mut tokens = Vec::new();
    let (mut lengths, mut start) = (written.chars().map(char::len_utf8), 0);
    cache::with(bpe, |pieces| {
        pieces.tokens(&bytes, 0..bytes.len(), |id, end| {
            tokens.push((id, lengths.by_ref().take(end - start).sum()));
            start = end;
        });
    });
    tokens
}
