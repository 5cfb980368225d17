//! The ids that mean something to labels and audits.

use super::tokenizer::Tokenizer;
use crate::{Policy, Result};

/// The ids that mean something to labels and audits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Special {
    /// The start of a text.
    pub bos: Option<u32>,
    /// The end of a text.
    pub eos: Option<u32>,
    /// Padding. Used to explain foreign rows, never to decide a label.
    pub pad: Option<u32>,
    /// Every id that ends a response, the EOS among them.
    pub stops: Vec<u32>,
}

impl Special {
    /// The ids of a tokenizer under a policy.
    ///
    /// # Errors
    /// [`crate::Error::Tokenizer`] where a stop token of the policy is no token.
    pub fn of(tokenizer: &Tokenizer, policy: &Policy) -> Result<Special> {
        Ok(Special {
            bos: tokenizer.bos().map(|t| t.id),
            eos: tokenizer.eos().map(|t| t.id),
            pad: tokenizer.pad().map(|t| t.id),
            stops: tokenizer.stop_ids(policy)?,
        })
    }
}
