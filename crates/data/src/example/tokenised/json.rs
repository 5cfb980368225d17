//! Reads a tokenised row from JSON text.

use super::fields::{Attention, Fields, Key, Seen, origins, weight};
use crate::Origin;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use std::fmt;

/// The fields of a row; `None` if it is not a well-formed tokenised row.
pub fn read(row: &[u8]) -> Option<Fields> {
    // Rows of other formats would be parsed twice.
    memchr::memmem::find(row, b"\"input_ids\"")?;
    let row = std::str::from_utf8(row).ok()?;
    serde_json::from_str::<Fields>(row).ok()
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Fields, D::Error> {
        deserializer.deserialize_map(FieldsVisitor)
    }
}

struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a row")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
        let (mut fields, mut seen) = (Fields::default(), Seen::default());
        while let Some(Name(key)) = map.next_key()? {
            let Some(key) = key else {
                // `IgnoredAny` would accept some numbers and escapes that are errors in a value.
                map.next_value::<Value>()?;
                continue;
            };
            seen.note(key).ok_or_else(|| A::Error::custom("the field is there twice"))?;
            match key {
                Key::InputIds => fields.input_ids = map.next_value()?,
                Key::Labels => fields.labels = map.next_value()?,
                Key::CompletionMask => fields.completion_mask = mask(map.next_value()?)?,
                Key::AssistantMasks => fields.assistant_masks = mask(map.next_value()?)?,
                Key::AttentionMask => fields.attention_mask = attention(map.next_value()?)?,
                Key::Rows => fields.rows = numbers(&map.next_value()?),
                Key::SeqLengths => fields.seq_lengths = map.next_value()?,
                Key::PositionIds => fields.position_ids = map.next_value()?,
                Key::PrefixRanges => {
                    let ranges: Option<Vec<[u32; 2]>> = map.next_value()?;
                    fields.prefix_ranges =
                        ranges.map(|list| list.into_iter().map(|[start, end]| start..end).collect());
                }
                Key::Weights => {
                    let weights: Option<Vec<Weight>> = map.next_value()?;
                    fields.weights = weights.map(|list| list.into_iter().map(|Weight(w)| w).collect());
                }
                Key::Origins => fields.origins = map.next_value::<Option<Letters>>()?.map(|l| l.0),
                Key::Unknown => {
                    if map.next_value::<Value>()? != Value::Null {
                        return Err(A::Error::custom("perhaps a mask"));
                    }
                }
                Key::Text => {
                    if let Value::String(text) = map.next_value()? {
                        fields.text = Some(text);
                    }
                }
            }
        }
        Ok(fields)
    }
}

/// The numbers of a list; `None` if it is not a list of integers of at least 0. `-0` is accepted.
pub fn numbers(value: &Value) -> Option<Vec<u64>> {
    let zero = |value: &Value| value.as_f64().filter(|x| *x == 0.0).map(|_| 0);
    value.as_array()?.iter().map(|value| value.as_u64().or_else(|| zero(value))).collect()
}

/// The name of a field.
struct Name(Option<Key>);

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Name, D::Error> {
        deserializer.deserialize_identifier(NameVisitor)
    }
}

struct NameVisitor;

impl Visitor<'_> for NameVisitor {
    type Value = Name;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("the name of a field")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Name, E> {
        Ok(Name(Key::of(name)))
    }
}

/// An item of a mask.
enum Item {
    Boolean(bool),
    Number(u32),
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Item, D::Error> {
        deserializer.deserialize_any(ItemVisitor)
    }
}

struct ItemVisitor;

impl Visitor<'_> for ItemVisitor {
    type Value = Item;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a boolean or a number of at least 0")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Item, E> {
        Ok(Item::Boolean(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Item, E> {
        u32::try_from(value).map(Item::Number).map_err(E::custom)
    }
}

/// Booleans, or numbers that are 0 or 1.
fn mask<E: Error>(items: Option<Vec<Item>>) -> Result<Option<Vec<bool>>, E> {
    let bit = |item| match item {
        Item::Boolean(bit) => Ok(bit),
        Item::Number(bit @ (0 | 1)) => Ok(bit == 1),
        Item::Number(_) => Err(E::custom("a mask's items are 0 or 1")),
    };
    items.map(|items| items.into_iter().map(bit).collect()).transpose()
}

fn attention<E: Error>(items: Option<Vec<Item>>) -> Result<Option<Attention>, E> {
    let Some(items) = items else { return Ok(None) };
    if !items.iter().any(|item| matches!(item, Item::Number(2..))) {
        return Ok(mask(Some(items))?.map(Attention::Mask));
    }
    let number = |item| match item {
        Item::Number(number) => Ok(number),
        Item::Boolean(_) => Err(E::custom("a boolean among numbers")),
    };
    items.into_iter().map(number).collect::<Result<_, E>>().map(|numbers| Some(Attention::Numbers(numbers)))
}

struct Weight(f32);

impl<'de> Deserialize<'de> for Weight {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Weight, D::Error> {
        let value = f64::deserialize(deserializer)?;
        weight(value).map(Weight).ok_or_else(|| D::Error::custom("not a weight"))
    }
}

struct Letters(Vec<(Origin, usize)>);

impl<'de> Deserialize<'de> for Letters {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Letters, D::Error> {
        deserializer.deserialize_str(LettersVisitor)
    }
}

struct LettersVisitor;

impl Visitor<'_> for LettersVisitor {
    type Value = Letters;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("the letters of origins")
    }

    fn visit_str<E: Error>(self, letters: &str) -> Result<Letters, E> {
        origins(letters).map(Letters).ok_or_else(|| E::custom("not the letter of an origin"))
    }
}
