//! Keys whose values have names: the names that serde reads and writes the type under.

use super::value::{Value, unquoted};
use serde::de::value::Error;
use serde::de::{DeserializeOwned, Deserializer, Error as _, IntoDeserializer, Visitor};
use serde::{Deserialize, Serialize, forward_to_deserialize_any};
use serde_json::{Value as Json, json};
use suasion_data::{Boundary, Code, ContentSpecialTokens, Format, OnBadRow, Supervise, TruncationMode};
use suasion_train::{OnSaveError, Optim, ParamGroup, Patterns, Scheduler, Strategy};

/// Where a model's first weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// The model folder's `*.safetensors`.
    Weights,
    /// Drawn as transformers draws them for a new model.
    Random,
}

/// Types of the factors of matrix products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MatmulPrecision {
    /// bf16 on a card, f32 on the CPU.
    Auto,
    /// Rounded to bf16.
    Bf16,
    /// Rounded to 10 bits of fraction.
    Tf32,
    /// f32.
    F32,
}

impl MatmulPrecision {
    /// True for what only cards compute.
    pub fn is_rounded(self) -> bool {
        matches!(self, MatmulPrecision::Bf16 | MatmulPrecision::Tf32)
    }
}

/// transformers' `bnb_4bit_compute_dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ComputeDtype {
    /// 32 bits.
    Float32,
    /// The upper half of these.
    Bfloat16,
    /// 16 bits of IEEE 754.
    Float16,
}

/// How rows are put together into packs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PackingStrategy {
    /// Best-fit decreasing.
    Bfd,
}

/// PEFT's `init_lora_weights`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoraInitName {
    /// `A` uniform, `B` zero.
    True,
    /// `A` normal, `B` zero.
    Gaussian,
    /// Both uniform.
    #[serde(alias = "no")]
    False,
}

/// Codes of findings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Codes(pub Vec<Code>);

impl Codes {
    /// Those that can be allowed: a row that is not a sample cannot be trained on.
    fn all() -> impl Iterator<Item = Code> {
        Code::ALL.iter().copied().filter(|code| *code != Code::Row)
    }
}

impl Value for Codes {
    fn expected() -> String {
        "a list of codes of findings (E-ROW is allowed by on_bad_row=skip)".into()
    }

    fn schema() -> Json {
        let codes: Vec<&str> = Codes::all().map(Code::as_str).collect();
        json!({ "type": ["array", "null"], "items": { "enum": codes } })
    }

    fn from_json(json: &Json) -> Option<Codes> {
        let code = |text: &str| Codes::all().find(|code| code.as_str().eq_ignore_ascii_case(text));
        match json {
            Json::Null => Some(Codes::default()),
            Json::String(text) => Some(Codes(vec![code(text)?])),
            Json::Array(items) => {
                items.iter().map(|item| code(item.as_str()?)).collect::<Option<_>>().map(Codes)
            }
            _ => None,
        }
    }

    fn from_text(text: &str) -> Option<Codes> {
        let list = text.trim().trim_start_matches('[').trim_end_matches(']');
        let items = list.split(',').map(|item| unquoted(item.trim())).filter(|item| !item.is_empty());
        Codes::from_json(&items.map(Json::from).collect())
    }

    fn to_json(&self) -> Json {
        self.0.iter().map(|code| code.as_str()).collect()
    }
}

impl Value for Patterns {
    fn expected() -> String {
        "a pattern of names of parameters, or a list of them".into()
    }

    fn schema() -> Json {
        Vec::<String>::schema()
    }

    fn from_json(json: &Json) -> Option<Patterns> {
        Vec::<String>::from_json(json).map(Patterns)
    }

    fn from_text(text: &str) -> Option<Patterns> {
        Vec::<String>::from_text(text).map(Patterns)
    }

    fn to_json(&self) -> Json {
        self.0.to_json()
    }
}

impl Value for Vec<ParamGroup> {
    fn expected() -> String {
        "a list of {match: pattern, learning_rate: number, weight_decay: number}".into()
    }

    fn schema() -> Json {
        let number = json!({ "type": "number", "minimum": 0 });
        let group = json!({
            "type": "object", "required": ["match"], "additionalProperties": false,
            "properties": { "match": Patterns::schema(), "learning_rate": number, "weight_decay": number },
        });
        json!({ "type": ["array", "null"], "items": group })
    }

    fn from_json(json: &Json) -> Option<Vec<ParamGroup>> {
        match json {
            Json::Null => Some(Vec::new()),
            Json::Array(items) => {
                let group = |item: &Json| {
                    let mut item = item.clone();
                    for rate in ["learning_rate", "weight_decay"] {
                        // Numbers have the spellings that they have elsewhere.
                        if let Some(number) = item.get(rate).and_then(<f64 as Value>::from_json) {
                            item[rate] = number.into();
                        }
                    }
                    serde_json::from_value(item).ok()
                };
                items.iter().map(group).collect()
            }
            _ => None,
        }
    }

    fn to_json(&self) -> Json {
        json!(self)
    }
}

/// Where metrics go beside `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reports(pub Vec<String>);

impl Default for Reports {
    fn default() -> Reports {
        Reports(vec!["tensorboard".into()])
    }
}

impl Reports {
    /// Services that transformers reports to. No service is contacted here.
    const SERVICES: [&str; 12] = [
        "azure_ml",
        "clearml",
        "codecarbon",
        "comet_ml",
        "dagshub",
        "dvclive",
        "flyte",
        "mlflow",
        "neptune",
        "swanlab",
        "trackio",
        "wandb",
    ];

    /// True if TensorBoard gets an event file. wandb's own program uploads these.
    pub fn tensorboard(&self) -> bool {
        self.0.iter().any(|name| ["tensorboard", "all", "wandb"].contains(&name.as_str()))
    }

    /// Those that get nothing.
    pub fn services(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str).filter(|name| Reports::SERVICES.contains(name))
    }
}

impl Value for Reports {
    fn expected() -> String {
        format!("tensorboard, none, all, or a list of names; also {}", Reports::SERVICES.join(", "))
    }

    fn schema() -> Json {
        let names: Vec<&str> = ["tensorboard", "none", "all"].into_iter().chain(Reports::SERVICES).collect();
        json!({ "anyOf": [{ "enum": names }, { "type": "array", "items": { "enum": names } }, { "type": "null" }] })
    }

    fn from_json(json: &Json) -> Option<Reports> {
        let name = |json: &Json| {
            // mlflow and comet have been spelled so, too.
            let name = json.as_str()?.trim().to_ascii_lowercase();
            let name = if name == "comet" { "comet_ml".to_string() } else { name };
            let known = ["tensorboard", "none", "all"].contains(&name.as_str());
            (known || Reports::SERVICES.contains(&name.as_str())).then_some(name)
        };
        let mut names: Vec<String> = match json {
            Json::Null => Vec::new(),
            Json::Array(items) => items.iter().map(name).collect::<Option<_>>()?,
            _ => vec![name(json)?],
        };
        names.retain(|name| name != "none");
        Some(Reports(names))
    }

    fn from_text(text: &str) -> Option<Reports> {
        let list = text.trim().trim_start_matches('[').trim_end_matches(']');
        let items = list.split(',').map(|item| unquoted(item.trim())).filter(|item| !item.is_empty());
        Reports::from_json(&items.map(Json::from).collect())
    }

    fn to_json(&self) -> Json {
        match self.0.as_slice() {
            [] => "none".into(),
            [one] => one.as_str().into(),
            several => several.into(),
        }
    }
}

/// An enum of unit variants that is a key's type.
pub trait Choice: Serialize + DeserializeOwned {}

impl Choice for Boundary {}
impl Choice for ContentSpecialTokens {}
impl Choice for ComputeDtype {}
impl Choice for Format {}
impl Choice for Init {}
impl Choice for LoraInitName {}
impl Choice for MatmulPrecision {}
impl Choice for OnBadRow {}
impl Choice for Optim {}
impl Choice for PackingStrategy {}
impl Choice for OnSaveError {}
impl Choice for Scheduler {}
impl Choice for Strategy {}
impl Choice for Supervise {}
impl Choice for TruncationMode {}

impl<T: Choice> Value for T {
    fn expected() -> String {
        format!("one of: {}", names::<T>().join(", "))
    }

    fn schema() -> Json {
        json!({ "enum": names::<T>() })
    }

    fn from_json(json: &Json) -> Option<T> {
        let text = match json {
            // `no` without quotes is YAML's false.
            Json::Bool(false) => "no",
            Json::Bool(true) => "true",
            Json::String(text) => text.as_str(),
            _ => return None,
        };
        T::deserialize(IntoDeserializer::<Error>::into_deserializer(text)).ok()
    }

    fn from_text(text: &str) -> Option<T> {
        Self::from_json(&Json::from(unquoted(text)))
    }

    fn to_json(&self) -> Json {
        serde_json::to_value(self).unwrap_or_default()
    }
}

/// The names of a type's values, without aliases.
fn names<T: Choice>() -> Vec<&'static str> {
    let mut names: &[&str] = &[];
    let _ = T::deserialize(Names(&mut names));
    let own = |name: &&str| T::from_json(&Json::from(*name)).is_some_and(|value| value.to_json() == *name);
    names.iter().copied().filter(own).collect()
}

/// A deserializer that notes the names of an enum's variants and has no value.
struct Names<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Names<'_> {
    type Error = Error;

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        *self.0 = variants;
        self.deserialize_any(visitor)
    }

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Error> {
        Err(Error::custom("only the names are wanted"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_types() {
        assert_eq!(names::<Strategy>(), ["no", "steps", "epoch", "best"]);
        assert_eq!(Strategy::from_json(&Json::Bool(false)), Some(Strategy::No));
        assert_eq!(names::<Supervise>(), ["all", "last", "per-message"]);
        for name in ["per-message", "per_message", "'per-message'"] {
            assert_eq!(Supervise::from_text(name), Some(Supervise::PerMessage), "{name}");
        }
        assert_eq!(Supervise::PerMessage.to_json(), "per-message");
        assert_eq!(Format::from_text("tokenized"), Some(Format::Tokenised));
        assert_eq!(names::<Format>().len(), 10);
        assert_eq!(Format::from_text("none"), None);
        for text in ["M002,T001", "[M002, T001]", "['m002', \"T001\"]"] {
            assert_eq!(Codes::from_text(text), Some(Codes(vec![Code::M002, Code::T001])), "{text}");
        }
        assert_eq!(Codes::from_text("[]"), Some(Codes::default()));
        assert_eq!(Codes::from_text("M02"), None);
    }
}
