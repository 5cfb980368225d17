//! The special ids that labels and audits depend on.

use super::tokenizer::Tokenizer;
use crate::{Policy, Result};

/// The special ids that labels and audits depend on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Special {
    /// The BOS, which starts a text.
    pub bos: Option<u32>,
    /// The EOS, which ends a text.
    pub eos: Option<u32>,
    /// The padding id. It is used to explain rows that came as tokens, never to decide a label.
    pub pad: Option<u32>,
    /// Every id that ends a response, including the EOS.
    pub stops: Vec<u32>,
}

impl Special {
    /// The ids of a tokenizer under a policy.
    ///
    /// # Errors
    /// [`crate::Error::Tokenizer`] if a stop token of the policy is not in the vocabulary.
    pub fn of(tokenizer: &Tokenizer, policy: &Policy) -> Result<Special> {
        Ok(Special {
            bos: tokenizer.bos().map(|t| t.id),
            eos: tokenizer.eos().map(|t| t.id),
            pad: tokenizer.pad().map(|t| t.id),
            stops: tokenizer.stop_ids(policy)?,
        })
    }
}
