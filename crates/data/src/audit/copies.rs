//! D001: responses that are copied from their prompt.

use super::subject::{Found, Subject};
use crate::Origin;
use crate::sample::Run;

/// Responses of at most this many tokens may repeat their prompt, as short answers often do.
const COPY_TOKENS: usize = 16;

/// D001, second kind: the tokens of the first response occur in the prompt.
pub(super) fn copied_response(s: &Subject<'_>) -> Vec<Found> {
    let ids = &s.sample.input_ids;
    let is_response = |run: &&Run| matches!(run.origin, Origin::Response { .. });
    let mut runs = s.runs.iter().skip_while(|run| !is_response(run)).take_while(is_response);
    let Some(first) = runs.next() else { return Vec::new() };
    let start = first.tokens.start;
    let length = runs.last().unwrap_or(first).tokens.end - start;
    if length <= COPY_TOKENS || length > start {
        return Vec::new();
    }
    // The first token may differ by a leading space.
    let Some(at) = find(&ids[..start], &ids[start + 1..start + length]) else { return Vec::new() };
    let message = format!("the response ({length} tokens) is copied from the prompt (token {at})");
    vec![Found::within(start..start + length, message)]
}

/// The first position of `needle`, of at least three tokens, in `hay` (Knuth-Morris-Pratt: linear even if tokens
/// repeat).
fn find(hay: &[u32], needle: &[u32]) -> Option<usize> {
    // A branch-free loop, which the compiler vectorises: few prompts contain the first three tokens.
    let begins = |at: &[u32; 3]| (at[0] == needle[0]) & (at[1] == needle[1]) & (at[2] == needle[2]);
    if !hay.array_windows().fold(false, |any, at| any | begins(at)) {
        return None;
    }
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
