//! Names of devices.

use super::value::Value;
use serde_json::{Value as Json, json};

/// The device of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceName {
    /// The first card that can be used, or the CPU.
    Auto,
    /// All cores.
    #[default]
    Cpu,
    /// An NVIDIA card: one by its number, or the first that can be used.
    Cuda(Option<usize>),
}

impl DeviceName {
    fn parse(text: &str) -> Option<DeviceName> {
        let text = text.trim().to_ascii_lowercase();
        match text.as_str() {
            "auto" => Some(DeviceName::Auto),
            "cpu" => Some(DeviceName::Cpu),
            "cuda" => Some(DeviceName::Cuda(None)),
            _ => text.strip_prefix("cuda:")?.parse().ok().map(|number| DeviceName::Cuda(Some(number))),
        }
    }
}

impl std::fmt::Display for DeviceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DeviceName::Auto => f.write_str("auto"),
            DeviceName::Cpu => f.write_str("cpu"),
            DeviceName::Cuda(None) => f.write_str("cuda"),
            DeviceName::Cuda(Some(number)) => write!(f, "cuda:{number}"),
        }
    }
}

impl Value for DeviceName {
    fn expected() -> String {
        "auto, cpu, cuda, or cuda:N with the number of a card".into()
    }

    fn schema() -> Json {
        json!({ "type": "string", "pattern": "^(auto|cpu|cuda(:[0-9]+)?)$" })
    }

    fn from_json(json: &Json) -> Option<DeviceName> {
        DeviceName::parse(json.as_str()?)
    }

    fn from_text(text: &str) -> Option<DeviceName> {
        DeviceName::parse(super::value::unquoted(text))
    }

    fn to_json(&self) -> Json {
        Json::String(self.to_string())
    }
}
