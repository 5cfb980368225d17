//! Loading a tokenizer; its vocabulary and special tokens.

use super::alphabet::{Alphabet, readable};
use super::files::FolderFiles;
use super::model;
use super::raw::RawTokens;
use super::settings::{Settings, declare_added_tokens, post_processor_ends};
use super::stages::{Stages, Start, Vocabulary};
use crate::guard::guard;
use crate::{Error, Policy, Result};
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// A special token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecialToken {
    /// Its id.
    pub id: u32,
    /// Its text.
    pub content: String,
}

/// A tokenizer with its special tokens. It is immutable and can be used from many threads at once.
pub struct Tokenizer {
    pub(super) stages: Stages,
    alphabet: Alphabet,
    /// The ids that the post-processor puts before and after a text.
    pub(super) front: Vec<u32>,
    pub(super) back: Vec<u32>,
    pub(super) bos: Option<SpecialToken>,
    pub(super) eos: Option<SpecialToken>,
    pad: Option<SpecialToken>,
    named: BTreeMap<String, String>,
    /// The EOS and the ids of `generation_config.json`.
    stops: Vec<u32>,
    vocab_size: usize,
    fingerprint: String,
    pub(super) path: PathBuf,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, vocab_size) = (&self.path, self.vocab_size);
        f.debug_struct("Tokenizer")
            .field("path", path)
            .field("vocab_size", &vocab_size)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Loads the tokenizer of a model folder: `tokenizer.json` and, if they exist, `tokenizer_config.json`,
    /// `special_tokens_map.json` and `added_tokens.json` (special tokens) and `generation_config.json` or `config.json`
    /// (stop ids).
    ///
    /// Truncation, padding and BPE dropout of `tokenizer.json` are switched off: the policy truncates and
    /// pads, and the ids of a row are never random.
    pub fn from_dir(dir: &Path) -> Result<Tokenizer> {
        Tokenizer::of(&FolderFiles::of(dir))
    }

    /// As [`Tokenizer::from_dir`], for files that may be changed.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if there is no tokenizer, or if it cannot be used.
    pub(crate) fn of(files: &FolderFiles) -> Result<Tokenizer> {
        let path = files.path("tokenizer.json");
        let Some(json) = files.read("tokenizer.json")? else {
            return Err(Error::Tokenizer {
                path,
                message: "no such file; a model folder needs the fast tokenizer's file (for an old model, \
                          save it with transformers: AutoTokenizer.from_pretrained(..).save_pretrained(..))"
                    .to_string(),
            });
        };
        Tokenizer::new(&json, Settings::of(files)?, path)
    }

    /// Loads a tokenizer from the text of a `tokenizer.json` and, optionally, of a `tokenizer_config.json`.
    pub fn from_bytes(json: &[u8], config: Option<&[u8]>) -> Result<Tokenizer> {
        let settings = match config {
            Some(config) => Settings::from_config_bytes(config, Path::new("tokenizer_config.json"))?,
            None => Settings { path: "tokenizer_config.json".into(), ..Settings::default() },
        };
        Tokenizer::new(json, settings, "tokenizer.json".into())
    }

    fn new(json: &[u8], settings: Settings, path: PathBuf) -> Result<Tokenizer> {
        let broken = |message: String| Error::Tokenizer { path: path.clone(), message };
        let mut inner = guard(|| model::load(json)).map_err(|error| {
            broken(format!("not a tokenizer ({error}); copy the file again from where the model came"))
        })?;
        declare_added_tokens(&mut inner, &settings)?;

        let find = |content: &Option<String>| {
            let content = content.as_ref()?;
            inner.token_to_id(content).map(|id| SpecialToken { id, content: content.clone() })
        };
        let (bos, pad) = (find(&settings.bos), find(&settings.pad));
        let mut eos = find(&settings.eos);
        if let (None, Some(content)) = (&eos, &settings.eos) {
            return Err(Error::Tokenizer {
                path: settings.path.clone(),
                message: format!(
                    "\"eos_token\" is {content:?}, which is not in {}; name a token of the vocabulary",
                    path.display()
                ),
            });
        }
        let added = inner.get_added_vocabulary().get_vocab().values().copied().max();
        let vocab_size = inner.get_model().highest_id().max(added).map_or(0, |id| id as usize + 1);
        if eos.is_none() {
            let named = settings.eos_ids.first().copied();
            eos = named.and_then(|id| inner.id_to_token(id).map(|content| SpecialToken { id, content }));
        }
        let mut stops: Vec<u32> = Vec::new();
        for id in eos.iter().map(|eos| eos.id).chain(settings.eos_ids.iter().copied()) {
            if !stops.contains(&id) {
                stops.push(id);
            }
        }

        let (front, back) = post_processor_ends(&inner).map_err(broken)?;
        let named: Vec<u32> = [&bos, &eos, &pad]
            .into_iter()
            .flatten()
            .map(|token| token.id)
            .chain(stops.iter().copied())
            // Files may give any id; one outside the vocabulary occurs in no text.
            .filter(|&id| (id as usize) < vocab_size)
            .collect();
        let mut hasher = blake3::Hasher::new();
        hasher.update(json);
        // Everything outside of tokenizer.json that affects ids, serialised so that different values never
        // hash the same.
        let declared: Vec<_> = (settings.added.iter())
            .map(|(id, t)| (id, &t.content, t.single_word, t.lstrip, t.rstrip, t.normalized, t.special))
            .collect();
        let special = (&settings.bos, &settings.eos, &settings.pad, &settings.eos_ids, declared);
        hasher.update(serde_json::to_string(&special).unwrap_or_default().as_bytes());
        Ok(Tokenizer {
            alphabet: Alphabet::of(inner.get_decoder(), inner.get_pre_tokenizer()),
            stages: Stages::new(inner, &named),
            front,
            back,
            bos,
            eos,
            pad,
            named: settings.named,
            stops,
            vocab_size,
            fingerprint: hasher.finalize().to_hex().to_string(),
            path,
        })
    }

    /// The highest id plus one, including added tokens: the minimum number of embeddings.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that starts a text, BOS.
    pub fn bos(&self) -> Option<&SpecialToken> {
        self.bos.as_ref()
    }

    /// The token that ends a text or a turn, EOS: `eos_token`, else the first `eos_token_id`.
    pub fn eos(&self) -> Option<&SpecialToken> {
        self.eos.as_ref()
    }

    /// The padding token.
    pub fn pad(&self) -> Option<&SpecialToken> {
        self.pad.as_ref()
    }

    /// The texts of the special tokens in the folder's files, by their names (`pad_token`, `image_token`).
    pub fn named_tokens(&self) -> &BTreeMap<String, String> {
        &self.named
    }

    /// The added tokens in the order of their ids: text, and whether it is a special token.
    pub fn added_tokens(&self) -> Vec<(&str, bool)> {
        let mut all: Vec<_> = self.stages.added.iter().collect();
        all.sort_by_key(|(id, _)| **id);
        all.into_iter().map(|(_, token)| (token.content.as_str(), token.special)).collect()
    }

    /// The id of a token of the vocabulary, by its exact text.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.stages.inner.token_to_id(token)
    }

    /// True for an added token that structures a text: a special token, BOS, EOS, pad or a stop token.
    pub fn is_structural(&self, id: u32) -> bool {
        self.stages.is_structural(id)
    }

    /// The ids that end a response: the EOS, the ids of `generation_config.json` (or `config.json`) and the
    /// `stop_tokens` of the policy, without duplicates.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if a stop token of the policy is not in the vocabulary.
    pub fn stop_ids(&self, policy: &Policy) -> Result<Vec<u32>> {
        let mut ids = self.stops.clone();
        for token in &policy.stop_tokens {
            let id = self.token_to_id(token).ok_or_else(|| Error::Tokenizer {
                path: self.path.clone(),
                message: format!(
                    "\"stop_tokens\" names {token:?}, which is not a token of this vocabulary; write it as in \
                     \"added_tokens\""
                ),
            })?;
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        Ok(ids)
    }

    /// The text of ids. Unknown ids have no text; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let inner = &self.stages.inner;
        guard(|| inner.decode(ids, skip_special)).unwrap_or_else(|_| {
            // If the decoder fails on these tokens, which none of the usual ones does, their texts are
            // joined.
            ids.iter()
                .filter(|id| !skip_special || !self.stages.added.get(id).is_some_and(|token| token.special))
                .map(|&id| self.token_text(id))
                .collect()
        })
    }

    /// One token as readable text, for display: `▁` and `Ġ` are spaces, and bytes that are not valid UTF-8 on
    /// their own are `<0xNN>`. An unknown id is `<id N>`.
    pub fn token_text(&self, id: u32) -> String {
        match (self.stages.added.get(&id), self.stages.inner.id_to_token(id)) {
            (Some(added), _) => added.content.clone(),
            (None, Some(token)) => readable(&self.alphabet.bytes(&token)),
            (None, None) => format!("<id {id}>"),
        }
    }

    /// The ids of a prompt as the model sees it at inference: those that the post-processor puts before a
    /// text, then the text, and nothing after it.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.front.clone();
        ids.extend(self.encode_text(text)?);
        Ok(ids)
    }

    /// The ids of a text without anything before or after it, such as a rendered chat, which contains its own
    /// BOS.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>> {
        let mut raw = RawTokens::for_text(text);
        self.stages
            .tokenize(text, 0, Start::Text, Vocabulary::Full, &mut raw)
            .map_err(|error| Error::Tokenizer { path: self.path.clone(), message: error.to_string() })?;
        Ok(raw.ids)
    }

    /// BLAKE3, in hex, of `tokenizer.json` and of the special tokens that other files declare.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}
