//! Replies of a model, generated token by token, and their flags.

use crate::failure::Failure;
use crate::interrupt;
use crate::ui::Ui;
use serde_json::Value as Json;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::Ordering;
use suasion_data::tokens::{DecodeStream, Tokenizer};
use suasion_data::{Origin, Sample};
use suasion_engine::{KvCache, Model};
use suasion_train::Sampling;
use suasion_train::generate::{Stopped, generate_after};

/// How tokens are chosen. Flags override `generation_config.json`.
#[derive(clap::Args, Debug)]
pub struct SamplingArgs {
    /// The longest reply, in tokens (256, or as generation_config.json has it)
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<usize>,
    /// Sample, with logits divided by T
    #[arg(long, value_name = "T", conflicts_with = "greedy")]
    temperature: Option<f64>,
    /// Sample from the K most likely tokens
    #[arg(long, value_name = "K", conflicts_with = "greedy")]
    top_k: Option<usize>,
    /// Sample from the most likely tokens whose probabilities add up to P
    #[arg(long, value_name = "P", conflicts_with = "greedy")]
    top_p: Option<f64>,
    /// Sample from the tokens with at least P times the probability of the most likely one
    #[arg(long, value_name = "P", conflicts_with = "greedy")]
    min_p: Option<f64>,
    /// Always take the most likely token (the default where neither a flag nor generation_config.json says otherwise)
    #[arg(long)]
    greedy: bool,
    /// Make tokens that are there already less likely; 1 changes nothing
    #[arg(long, value_name = "P")]
    repetition_penalty: Option<f64>,
    /// Let no run of N tokens occur twice; 0 changes nothing
    #[arg(long, value_name = "N")]
    no_repeat_ngram_size: Option<usize>,
    /// End a reply after this text; may be given more than once
    #[arg(long = "stop-strings", alias = "stop-string", value_name = "TEXT")]
    stop_strings: Vec<String>,
}

/// How tokens are chosen, and which texts end a reply.
pub struct Manner {
    pub sampling: Sampling,
    pub stop_strings: Vec<String>,
}

/// Keys of `generation_config.json` that would change a reply and are not applied, with the values at which they
/// change nothing.
const NOT_APPLIED: [(&str, &[&str]); 12] = [
    ("num_beams", &["1"]),
    ("penalty_alpha", &["0"]),
    ("typical_p", &["1", "1.0"]),
    ("epsilon_cutoff", &["0", "0.0"]),
    ("eta_cutoff", &["0", "0.0"]),
    ("encoder_repetition_penalty", &["1", "1.0"]),
    ("bad_words_ids", &["[]"]),
    ("sequence_bias", &["{}"]),
    ("suppress_tokens", &["[]"]),
    ("begin_suppress_tokens", &["[]"]),
    ("min_new_tokens", &["0"]),
    ("guidance_scale", &["1", "1.0"]),
];

impl SamplingArgs {
    /// The flags, then the model's `generation_config.json`, with a seed and the tokens that end a reply.
    ///
    /// # Errors
    /// For values that cannot work.
    pub fn of(&self, dir: &Path, seed: u64, stop_ids: Vec<u32>, ui: &Ui) -> anyhow::Result<Manner> {
        let path = dir.join("generation_config.json");
        let text = std::fs::read(&path).ok();
        let file: Json = text.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        let number = |key: &str| file[key].as_f64();
        let count = |key: &str| file[key].as_u64().map(|n| n as usize);
        let flagged = self.temperature.is_some()
            || self.top_k.is_some()
            || self.top_p.is_some()
            || self.min_p.is_some();
        let sampled = file["do_sample"] == true;
        let default = Sampling::default();
        let sampling = Sampling {
            do_sample: (flagged || sampled) && !self.greedy,
            temperature: self.temperature.or(number("temperature")).unwrap_or(default.temperature),
            top_k: self.top_k.or(count("top_k")).unwrap_or(default.top_k),
            top_p: self.top_p.or(number("top_p")).unwrap_or(default.top_p),
            min_p: self.min_p.or(number("min_p")).unwrap_or(default.min_p),
            repetition_penalty: self
                .repetition_penalty
                .or(number("repetition_penalty"))
                .unwrap_or(default.repetition_penalty),
            no_repeat_ngram_size: self
                .no_repeat_ngram_size
                .or(count("no_repeat_ngram_size"))
                .unwrap_or(default.no_repeat_ngram_size),
            seed,
            max_new_tokens: self.max_new_tokens.or(count("max_new_tokens")).unwrap_or(default.max_new_tokens),
            stop_ids,
        };
        sampling.validate()?;
        let mut stop_strings = self.stop_strings.clone();
        if stop_strings.is_empty() {
            let one = file["stop_strings"].as_str().map(str::to_string);
            let several = file["stop_strings"].as_array().into_iter().flatten();
            stop_strings
                .extend(one.into_iter().chain(several.filter_map(|s| s.as_str().map(str::to_string))));
        }
        if stop_strings.iter().any(String::is_empty) {
            let help = "name the text that ends a reply, such as --stop-strings '\\n\\n'";
            return Err(Failure::usage("--stop-strings: an empty text would end every reply", help).into());
        }
        for (key, inert) in NOT_APPLIED {
            let value = &file[key];
            if !value.is_null() && !inert.contains(&value.to_string().as_str()) {
                ui.warn(format_args!("{}: {key}={value} is not applied", path.display()));
            }
        }
        if sampling.do_sample && !flagged {
            ui.log(format_args!(
                "sampling as generation_config.json says (temperature {}, top_k {}, top_p {}); --greedy takes the most \
                 likely token",
                sampling.temperature, sampling.top_k, sampling.top_p
            ));
        }
        Ok(Manner { sampling, stop_strings })
    }
}

/// A finished reply.
pub struct Reply {
    /// Its text, without the stop token; a text that ends replies is part of it.
    pub text: String,
    /// Its token ids, the stop token included.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub ended: Ended,
}

/// Why a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The engine's reason.
    By(Stopped),
    /// By one of the texts that end replies.
    StopString,
}

impl Reply {
    /// Why it ended, as a clause.
    pub fn why(&self) -> &'static str {
        match self.ended {
            Ended::StopString => "ended by a stop string",
            Ended::By(Stopped::Stop(_)) => "ended by its stop token",
            Ended::By(Stopped::MaxNewTokens) => "cut off by max_new_tokens",
            Ended::By(Stopped::ContextFull) => "cut off: the model has no further positions",
            Ended::By(Stopped::Callback) => "interrupted",
        }
    }

    /// Why it ended, as a name in JSON.
    pub fn stopped_name(&self) -> &'static str {
        match self.ended {
            Ended::StopString => "stop_string",
            Ended::By(Stopped::Stop(_)) => "stop",
            Ended::By(Stopped::MaxNewTokens) => "max_new_tokens",
            Ended::By(Stopped::ContextFull) => "context_full",
            Ended::By(Stopped::Callback) => "interrupted",
        }
    }
}

/// A reply under way: the text of its tokens so far, and whether a text that ends replies is in it.
pub struct Speech<'a> {
    stream: DecodeStream<'a>,
    /// The text so far.
    pub text: String,
    /// With special tokens, for the texts that end replies; begins with the end of the prompt, as in transformers.
    raw: Option<(DecodeStream<'a>, String)>,
    stop_strings: &'a [String],
    /// True once one of them has occurred.
    ended: bool,
}

/// Tokens of the prompt that a text that ends replies may begin in.
const BEFORE: usize = 32;

impl<'a> Speech<'a> {
    /// A reply to a prompt.
    pub fn new(tokenizer: &'a Tokenizer, prompt: &[u32], stop_strings: &'a [String]) -> Speech<'a> {
        let before = || tokenizer.decode(&prompt[prompt.len().saturating_sub(BEFORE)..], false);
        let raw = (!stop_strings.is_empty()).then(|| (tokenizer.decode_stream(false), before()));
        let stream = tokenizer.decode_stream(true);
        Speech { stream, text: String::new(), raw, stop_strings, ended: false }
    }

    /// Adds a token and returns the text that it completes.
    pub fn take(&mut self, id: u32) -> Option<String> {
        if let Some((stream, text)) = &mut self.raw
            && let Some(new) = stream.push(id)
        {
            let old = text.len();
            text.push_str(&new);
            // It must end in what is new.
            self.ended |= self
                .stop_strings
                .iter()
                .any(|stop| text.rfind(stop.as_str()).is_some_and(|at| at + stop.len() > old));
        }
        let new = self.stream.push(id);
        self.text.extend(new.as_deref());
        new
    }

    /// True once one of the texts that end replies has occurred.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// The rest of the text.
    pub fn finish(&mut self) -> Option<String> {
        let rest = self.stream.finish();
        self.text.extend(rest.as_deref());
        rest
    }

    /// The reply, after [`Speech::finish`].
    pub fn reply(self, ids: Vec<u32>, stopped: Stopped) -> Reply {
        let ended = match stopped {
            Stopped::Callback if self.ended => Ended::StopString,
            stopped => Ended::By(stopped),
        };
        Reply { text: self.text, ids, ended }
    }
}

/// Generates one reply; `piece` gets its text as soon as characters are whole. The first `known` tokens of the
/// prompt are in the cache.
///
/// # Errors
/// If the model cannot continue the prompt, or `piece` fails.
pub fn reply(
    model: &mut Model,
    cache: &mut KvCache,
    known: usize,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    manner: &Manner,
    piece: &mut dyn FnMut(&str) -> std::io::Result<()>,
) -> anyhow::Result<Reply> {
    let stop = interrupt::flag();
    let mut speech = Speech::new(tokenizer, prompt, &manner.stop_strings);
    let mut failed = None;
    let mut say = |new: Option<String>| match new.map_or(Ok(()), |new| piece(&new)) {
        Ok(()) => ControlFlow::Continue(()),
        Err(error) => {
            failed = Some(error);
            ControlFlow::Break(())
        }
    };
    let generated = generate_after(model, cache, known, prompt, &manner.sampling, &mut |id| {
        if stop.load(Ordering::SeqCst) {
            return ControlFlow::Break(());
        }
        say(speech.take(id))?;
        if speech.has_ended() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    let _ = say(speech.finish());
    match failed {
        Some(error) => Err(error.into()),
        None => Ok(speech.reply(generated.ids, generated.stopped)),
    }
}

/// The response of a row, as text.
pub fn reference(sample: &Sample, tokenizer: &Tokenizer) -> String {
    let ids: Vec<u32> = sample
        .input_ids
        .iter()
        .zip(&sample.origins)
        .filter(|(_, origin)| matches!(origin, Origin::Response { .. }))
        .map(|(id, _)| *id)
        .collect();
    tokenizer.decode(&ids, true)
}
