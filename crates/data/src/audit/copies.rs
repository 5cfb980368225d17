//! D001: responses that are copied from their prompt.

use super::subject::Subject;
use crate::{Code, Finding, Origin};

/// Rows that repeat at least this many tokens of their prompt as the response are reported.
const COPY_TOKENS: usize = 16;

/// D001, second kind: the response stands in the prompt, token by token.
pub fn d001_copy(s: &Subject<'_>) -> Option<Finding> {
    let origins = &s.sample.origins;
    let is_response = |o: &Origin| matches!(o, Origin::Response { .. });
    let start = origins.iter().position(is_response)?;
    let length = origins[start..].iter().take_while(|o| is_response(o)).count();
    if length <= COPY_TOKENS || length > start {
        return None;
    }
    let ids = &s.sample.input_ids;
    // The first token may differ by the space in front of it.
    let at = find(&ids[..start], &ids[start + 1..start + length])?;
    s.finding(Code::D001, format!("the response ({length} tokens) is copied from the prompt (token {at})"))
}

/// The first place of `needle` in `hay` (Knuth, Morris, Pratt: linear also where tokens repeat).
fn find(hay: &[u32], needle: &[u32]) -> Option<usize> {
    let mut fail = vec![0usize; needle.len()];
    let mut k = 0;
    for i in 1..needle.len() {
        while k > 0 && needle[i] != needle[k] {
            k = fail[k - 1];
        }
        k += usize::from(needle[i] == needle[k]);
        fail[i] = k;
    }
    let mut matched = 0;
    for (i, id) in hay.iter().enumerate() {
        while matched > 0 && *id != needle[matched] {
            matched = fail[matched - 1];
        }
        matched += usize::from(*id == needle[matched]);
        if matched == needle.len() {
            return Some(i + 1 - matched);
        }
    }
    None
}
