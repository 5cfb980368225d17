//! A tokenizer together with the library's, and the two promises of `boundary: split`.

use crate::{PROMPT, RESPONSE, ids_of, split};
use serde_json::Value;
use std::ops::Range;
use suasion_data::tokens::{Encoded, Tokenizer};

/// A tokenizer of ours and the library's own, the oracle.
pub struct Pair {
    pub name: String,
    pub ours: Tokenizer,
    pub library: tokenizers::Tokenizer,
    /// The number of ids that the post-processor puts after a text.
    pub back: usize,
}

impl Pair {
    pub fn from_json(name: &str, json: &Value, config: Option<Value>) -> Pair {
        let bytes = serde_json::to_vec(json).unwrap();
        let config = config.map(|config| serde_json::to_vec(&config).unwrap());
        let ours = Tokenizer::from_bytes(&bytes, config.as_deref()).unwrap();
        Pair::new(name, ours, tokenizers::Tokenizer::from_bytes(&bytes).unwrap())
    }

    pub fn new(name: &str, ours: Tokenizer, library: tokenizers::Tokenizer) -> Pair {
        let special = library.encode("", true).unwrap().len();
        let front = ours.encode_prompt("").unwrap().len();
        Pair { name: name.to_string(), ours, library, back: special - front }
    }

    /// The library's ids for a whole text.
    pub fn whole(&self, text: &str) -> Vec<u32> {
        self.library.encode(text, false).unwrap().get_ids().to_vec()
    }

    pub fn decode(&self, ids: &[u32]) -> String {
        self.library.decode(ids, false).unwrap()
    }

    pub fn token(&self, id: u32) -> String {
        self.library.id_to_token(id).unwrap()
    }

    pub fn words(&self, ids: &[u32]) -> Vec<String> {
        ids.iter().map(|id| self.token(*id)).collect()
    }

    /// Asserts both promises of `boundary: split` for one prompt and response; returns the encoding.
    ///
    /// 1. The ids before the cut equal the library's ids of the prompt alone.
    /// 2. The ids after it decode, after any text, to the decoding of the library's ids of the response after such a
    ///    text. (For a lossless tokenizer that is the response itself; [`Pair::lossless`] asserts it.)
    ///
    /// Also, no token has bytes on both sides, every prompt token is masked, and every response token is supervised.
    pub fn promises(&self, prompt: &str, response: &str) -> Encoded {
        let encoded = split(&self.ours, &[(prompt, PROMPT), (response, RESPONSE)]);
        let context = || format!("{}: {prompt:?} | {response:?}", self.name);
        let tokens = &encoded.tokens;
        assert!(encoded.straddles.is_empty(), "{}", context());
        let mut alone = self.library.encode(prompt, true).unwrap().get_ids().to_vec();
        alone.truncate(alone.len() - self.back);
        assert_eq!(self.ours.encode_prompt(prompt).unwrap(), alone, "{}", context());
        assert_eq!(tokens.ids[..alone.len()], alone, "ids of the prompt: {}", context());
        let end = tokens.len() - self.back;
        let cut = prompt.len() as u32;
        for (index, bytes) in tokens.bytes.iter().enumerate() {
            let of_response = (alone.len()..end).contains(&index);
            assert_eq!(tokens.origins[index].supervised(), of_response, "token {index}: {}", context());
            assert!(!of_response || bytes.start >= cut, "token {index} at {bytes:?}: {}", context());
            assert!(index >= alone.len() || bytes.end <= cut, "token {index} at {bytes:?}: {}", context());
        }
        let response_ids = &tokens.ids[alone.len()..end];
        if let Some((before, ids)) = self.before(prompt, response, &tokens.bytes, &alone) {
            // T5's normalizer works by grapheme, and drops the rest of one whose start it knows: the result for a
            // response that starts inside a grapheme then depends on the letter before it.
            let apart = self.normalized(&before) + &self.normalized(response);
            if self.name == "t5_small" && self.normalized(&format!("{before}{response}")) != apart {
                return encoded;
            }
            let mut behind = ids;
            behind.extend(response_ids);
            let expected = self.decode(&self.whole(&format!("{before}{response}")));
            assert_eq!(self.decode(&behind), expected, "response behind {before:?}: {}", context());
        }
        encoded
    }

    pub fn normalized(&self, text: &str) -> String {
        use tokenizers::{NormalizedString, Normalizer};
        let mut normalized = NormalizedString::from(text);
        if let Some(normalizer) = self.library.get_normalizer() {
            normalizer.normalize(&mut normalized).unwrap();
        }
        normalized.get().to_string()
    }

    /// A short text that affects a response in the same way as the prompt does, and its ids. `q` composes with
    /// nothing in Unicode, so no normalizer merges it with the text after it.
    fn before(
        &self,
        prompt: &str,
        response: &str,
        bytes: &[Range<u32>],
        alone: &[u32],
    ) -> Option<(String, Vec<u32>)> {
        let last = (0..alone.len()).rev().find(|&i| !bytes[i].is_empty());
        let Some(last) = last else {
            // Nothing of the prompt became a token: the response starts the text.
            let drops_space = !prompt.is_empty() && prompt.trim().is_empty();
            return (prompt.is_empty() || drops_space).then(|| (String::new(), Vec::new()));
        };
        let added = self.library.get_added_tokens_decoder();
        let end = bytes[last].end as usize;
        if let Some(token) = added.get(&alone[last])
            && end == prompt.len()
            && prompt[bytes[last].start as usize..].trim() == token.content.trim()
        {
            // A token that strips the text after it would swallow the response's white space here.
            let stripped = token.rstrip && response.starts_with(char::is_whitespace);
            return (!stripped).then(|| (token.content.clone(), vec![alone[last]]));
        }
        // White space after the prompt's last token has no id: the response's first token represents it.
        let dropped = self.normalized(&prompt[end..]).contains(char::is_whitespace);
        let before = if dropped { "q " } else { "q" };
        let ids = self.whole(before);
        Some((before.to_string(), ids))
    }

    /// Asserts that the response's ids alone decode to the response, except for one leading space that some
    /// decoders strip from any text.
    pub fn lossless(&self, prompt: &str, response: &str) {
        let encoded = self.promises(prompt, response);
        let text = self.decode(&ids_of(&encoded, RESPONSE));
        let stripped = response.strip_prefix(' ').unwrap_or(response);
        assert!(text == response || text == stripped, "{}: {prompt:?} | {response:?}: {text:?}", self.name);
    }
}
