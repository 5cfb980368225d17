//! Keys whose values have names.

use super::value::choices;
use suasion_data::policy::{Boundary, ContentSpecialTokens, Format, OnBadRow, Supervise, TruncationMode};
use suasion_train::{Scheduler, Strategy};

/// How rows are put together into packs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackingStrategy {
    /// Best-fit decreasing.
    Bfd,
}

choices!(PackingStrategy { "bfd" => PackingStrategy::Bfd });

/// Where a model's first weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// The model folder's `*.safetensors`.
    Weights,
    /// Drawn as transformers draws them for a new model.
    Random,
}

choices!(Init { "weights" => Init::Weights, "random" => Init::Random });
choices!(Strategy {
    "no" => Strategy::No,
    "steps" => Strategy::Steps,
    "epoch" => Strategy::Epoch,
    "best" => Strategy::Best,
});
choices!(Scheduler {
    "linear" => Scheduler::Linear,
    "cosine" => Scheduler::Cosine,
    "constant" => Scheduler::Constant,
    "constant_with_warmup" => Scheduler::ConstantWithWarmup,
});
choices!(Format {
    "auto" => Format::Auto,
    "input_full" => Format::InputFull,
    "prompt_completion" => Format::PromptCompletion,
    "tokenised" => Format::Tokenised,
    "messages" => Format::Messages,
    "sharegpt" => Format::Sharegpt,
    "alpaca" => Format::Alpaca,
    "segments" => Format::Segments,
    "preference" => Format::Preference,
} aliases { "tokenized" => "tokenised" });
choices!(Supervise {
    "all" => Supervise::All,
    "last" => Supervise::Last,
    "per-message" => Supervise::PerMessage,
} aliases { "per_message" => "per-message" });
choices!(Boundary { "split" => Boundary::Split, "joint" => Boundary::Joint });
choices!(TruncationMode {
    "keep_response" => TruncationMode::KeepResponse,
    "keep_start" => TruncationMode::KeepStart,
    "keep_end" => TruncationMode::KeepEnd,
    "drop" => TruncationMode::Drop,
    "error" => TruncationMode::Error,
});
choices!(OnBadRow { "error" => OnBadRow::Error, "skip" => OnBadRow::Skip });
choices!(ContentSpecialTokens {
    "special" => ContentSpecialTokens::Special,
    "text" => ContentSpecialTokens::Text,
});
