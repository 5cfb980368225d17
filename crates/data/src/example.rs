//! What a row says, whatever its format: a prompt with its completion, a conversation, segments of text, or token
//! ids with their labels.
//!
//! | format | fields |
//! |---|---|
//! | `input_full` | `input_text`, `full_text` |
//! | `prompt_completion` | `prompt`, `completion`: strings, or messages (only the completion is learned) |
//! | `messages`, `sharegpt` | `messages`; `conversations`; with `tools`, `system`, `chat_template_kwargs` where given |
//! | `alpaca` | `instruction`, `output`, perhaps `input`, `history`, `system` |
//! | `segments` | `segments`: a list of `text` with `train` or `weight` |
//! | `preference` | `chosen`, with `prompt`, `conversations` or `instruction` before it or within it: the chosen side is learned |
//! | `tokenised` | `input_ids` with `labels`, `completion_mask` or `assistant_masks`; packs with `seq_lengths`, `position_ids` or a numbered `attention_mask` |

mod conversation;
mod plain;
mod unknown;

pub use plain::Alpaca;

use crate::chat::Conversation;
use crate::pack::read;
use crate::policy::Format;
use crate::row::{Row, type_name};
use crate::sample::Pack;
use crate::{Error, Origin, Result, RowId};
use conversation::LISTS;
use serde_json::{Map, Value};
use unknown::unknown;

/// One example of the data set.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// The row that it was read from.
    pub id: RowId,
    /// What it says.
    pub body: Body,
}

/// The content of an example.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// A prompt and its completion, one after the other.
    Text {
        /// Prompt and completion.
        text: String,
        /// Where the completion starts, in bytes.
        prompt_len: usize,
    },
    /// A conversation, which needs a chat template to become text.
    Chat(Box<Conversation>),
    /// An instruction: a conversation where there is a chat template, text where there is none.
    Alpaca(Box<Alpaca>),
    /// Text in pieces that say of themselves whether they are learned.
    Segments(Vec<Segment>),
    /// Already tokens.
    Tokenised(Box<Tokenised>),
}

/// A piece of text and its loss weight; 0 makes it prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    /// The text.
    pub text: String,
    /// Its loss weight.
    pub weight: f32,
}

/// A tokenised row, as it was given. All vectors have the length of `input_ids`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tokenised {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// Labels as given: any value, right or wrong.
    pub labels: Option<Vec<i32>>,
    /// `completion_mask` or `assistant_masks`: true on the response.
    pub mask: Option<Vec<bool>>,
    /// `attention_mask`: false on padding.
    pub attention: Option<Vec<bool>>,
    /// A loss weight per token.
    pub weights: Option<Vec<f32>>,
    /// Origins, as our own prepared rows carry them.
    pub origins: Option<Vec<Origin>>,
    /// The rendered text, as `--with-text` writes it.
    pub text: Option<String>,
    /// For a pack, its boundaries (`seq_lengths`, `position_ids`, an `attention_mask` that numbers its sequences).
    pub pack: Option<Pack>,
    /// Why the boundaries that it names cannot be: it cannot become a sample (P001).
    pub broken: Option<String>,
}

impl Tokenised {
    /// The row of these tokens of a pack.
    pub(crate) fn part(&self, tokens: &[usize]) -> Tokenised {
        fn pick<T: Copy>(values: &[T], tokens: &[usize]) -> Vec<T> {
            tokens.iter().map(|&i| values[i]).collect()
        }
        Tokenised {
            input_ids: pick(&self.input_ids, tokens),
            labels: self.labels.as_ref().map(|v| pick(v, tokens)),
            mask: self.mask.as_ref().map(|v| pick(v, tokens)),
            attention: self.attention.as_ref().map(|v| pick(v, tokens)),
            weights: self.weights.as_ref().map(|v| pick(v, tokens)),
            origins: self.origins.as_ref().map(|v| pick(v, tokens)),
            ..Tokenised::default()
        }
    }
}

/// The masks that name the response, in order of preference.
const MASKS: [&str; 2] = ["completion_mask", "assistant_masks"];

impl Example {
    /// Reads a row by `format`, or by the fields it has where that is [`Format::Auto`].
    ///
    /// # Errors
    /// [`Error::Row`]: fields that are missing, null, of the wrong type or length, or that contradict each other.
    pub fn from_row(row: Row, format: Format) -> Result<Example> {
        let Row { id, fields } = row;
        let format = match format {
            Format::Auto => detect(&id, &fields)?,
            fixed => fixed,
        };
        let reader = Reader { id: &id, fields };
        let text = |key: &str| reader.fields.get(key).is_some_and(Value::is_string);
        // A field that is there and wrong is the text reader's error, which names it.
        let messages = |key: &str| matches!(reader.fields.get(key), Some(Value::Array(_) | Value::Object(_)));
        let body = match format {
            Format::InputFull => reader.input_full()?,
            Format::PromptCompletion if messages("prompt") || messages("completion") => {
                Body::Chat(Box::new(reader.pair("completion")?))
            }
            Format::PromptCompletion => reader.prompt_completion("completion")?,
            Format::Tokenised => reader.tokenised()?,
            Format::Messages => Body::Chat(Box::new(reader.chat(&["messages"])?)),
            Format::Sharegpt => Body::Chat(Box::new(reader.chat(&["conversations", "conversation"])?)),
            Format::Alpaca => Body::Alpaca(Box::new(reader.alpaca("output")?)),
            Format::Segments => Body::Segments(reader.segments()?),
            Format::Preference if text("chosen") && text("instruction") => {
                Body::Alpaca(Box::new(reader.alpaca("chosen")?))
            }
            Format::Preference if text("chosen") && text("prompt") => reader.prompt_completion("chosen")?,
            Format::Preference
                if text("chosen") && !LISTS.iter().any(|key| messages(key)) && !messages("prompt") =>
            {
                return Err(Error::row(
                    id,
                    "\"chosen\" is a string, and there is no \"prompt\" before it",
                    "write what both sides begin with as \"prompt\"",
                ));
            }
            Format::Preference => Body::Chat(Box::new(reader.preferred()?)),
            Format::Auto => unreachable!("detect returns a format"),
        };
        Ok(Example { id, body })
    }
}

/// The format that a row's fields make.
fn detect(id: &RowId, fields: &Map<String, Value>) -> Result<Format> {
    let has = |key: &str| fields.contains_key(key);
    let labelled = has("labels") || MASKS.iter().any(|m| has(m));
    if has("input_ids") && labelled {
        return Ok(Format::Tokenised);
    }
    let filled = |key: &str| match fields.get(key) {
        None | Some(Value::Null) => false,
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::String(text)) => !text.is_empty(),
        Some(_) => true,
    };
    if has("chosen") && has("rejected") {
        return Ok(Format::Preference);
    }
    let complete: Vec<(Format, &str)> = [
        (has("input_text") && has("full_text"), Format::InputFull, "input_text+full_text"),
        (has("prompt") && has("completion"), Format::PromptCompletion, "prompt+completion"),
        (filled("messages"), Format::Messages, "messages"),
        (filled("conversations") || filled("conversation"), Format::Sharegpt, "conversations"),
        (has("instruction") && has("output"), Format::Alpaca, "instruction+output"),
        (filled("segments"), Format::Segments, "segments"),
    ]
    .into_iter()
    .filter_map(|(complete, format, name)| complete.then_some((format, name)))
    .collect();
    match complete.as_slice() {
        // Of a list that is there and empty its own reader tells.
        [] if has("messages") => Ok(Format::Messages),
        [] if has("conversations") || has("conversation") => Ok(Format::Sharegpt),
        [] if has("segments") => Ok(Format::Segments),
        [] => Err(unknown(id, fields)),
        [(format, _)] => {
            let sided = matches!(format, Format::PromptCompletion | Format::Messages | Format::Sharegpt);
            if sided && fields.get("label") == Some(&Value::Bool(false)) {
                return Err(Error::row(
                    id.clone(),
                    "the row is the rejected side of a preference: its \"label\" is false",
                    format!(
                        "leave such rows out; to learn from them all the same set format={}",
                        format.name()
                    ),
                ));
            }
            Ok(*format)
        }
        several => {
            let names: Vec<&str> = several.iter().map(|(_, name)| *name).collect();
            let formats: Vec<&str> = several.iter().map(|(format, _)| format.name()).collect();
            let number = match several.len() {
                2 => "two".to_string(),
                n => n.to_string(),
            };
            Err(Error::row(
                id.clone(),
                format!("the row has the fields of {number} formats: {}", names.join(" and ")),
                format!("set format to {}", formats.join(" or ")),
            ))
        }
    }
}

/// The fields of one row, taken one by one with errors that name them.
struct Reader<'a> {
    id: &'a RowId,
    fields: Map<String, Value>,
}

impl Reader<'_> {
    fn error(&self, message: String, help: &str) -> Error {
        Error::row(self.id.clone(), message, help)
    }

    fn string(&mut self, key: &str) -> Result<String> {
        match self.fields.swap_remove(key) {
            Some(Value::String(text)) => Ok(text),
            Some(Value::Null) => {
                Err(self.error(format!("\"{key}\" is null"), "fill the field, or remove the row"))
            }
            Some(other) => {
                let found = type_name(&other);
                Err(self.error(format!("\"{key}\" is {found}, not a string"), "write the field as a string"))
            }
            None => Err(self.missing(key)),
        }
    }

    fn missing(&self, key: &str) -> Error {
        let keys: Vec<&str> = self.fields.keys().map(String::as_str).take(12).collect();
        self.error(
            format!("\"{key}\" is missing; the row has: {}", keys.join(", ")),
            "fill the field, or set format=auto",
        )
    }

    fn input_full(mut self) -> Result<Body> {
        let input = self.string("input_text")?;
        let full = self.string("full_text")?;
        if !full.starts_with(&input) {
            return Err(self.not_a_prefix(&input, &full));
        }
        Ok(Body::Text { text: full, prompt_len: input.len() })
    }

    /// `prompt` and what follows it.
    fn prompt_completion(mut self, after: &str) -> Result<Body> {
        let mut text = self.string("prompt")?;
        let completion = self.string(after)?;
        let prompt_len = text.len();
        text.push_str(&completion);
        Ok(Body::Text { text, prompt_len })
    }

    /// The error for a `full_text` that does not continue its `input_text`: the place, both sides, and the usual causes.
    fn not_a_prefix(&self, input: &str, full: &str) -> Error {
        let at = input.bytes().zip(full.bytes()).take_while(|(a, b)| a == b).count();
        let hint = if full.starts_with(input.trim_end()) {
            "; input_text ends in white space that full_text does not have there"
        } else if full.replace("\r\n", "\n").starts_with(&input.replace("\r\n", "\n")) {
            "; one has CRLF line ends and the other LF"
        } else if full.trim_start().starts_with(input.trim_start()) {
            "; they differ in leading white space"
        } else {
            ""
        };
        let help = format!(
            "input_text has {} and full_text has {} there{hint}",
            around(input, at),
            around(full, at)
        );
        Error::row(
            self.id.clone(),
            format!("\"full_text\" does not start with \"input_text\": first difference at byte {at}"),
            help,
        )
    }

    fn tokenised(mut self) -> Result<Body> {
        let input_ids = match self.list("input_ids")? {
            Some(list) => self
                .integers("input_ids", &list, 0, i64::from(i32::MAX))?
                .into_iter()
                .map(|v| v as u32)
                .collect::<Vec<u32>>(),
            None => {
                return Err(
                    self.error("\"input_ids\" is missing".into(), "tokenised rows need \"input_ids\"")
                );
            }
        };
        if input_ids.is_empty() {
            return Err(self.error("\"input_ids\" is empty".into(), "remove the row"));
        }
        let n = input_ids.len();
        let mut row = Tokenised { input_ids, ..Tokenised::default() };
        if let Some(list) = self.sized("labels", n)? {
            let labels = self.integers("labels", &list, i64::from(i32::MIN), i64::from(i32::MAX))?;
            row.labels = Some(labels.into_iter().map(|v| v as i32).collect());
        }
        for key in MASKS {
            if row.mask.is_none()
                && let Some(list) = self.sized(key, n)?
            {
                row.mask = Some(self.booleans(key, &list)?);
            }
        }
        let mut given = read::Given::default();
        if let Some(list) = self.sized("attention_mask", n)? {
            // A mask that numbers the sequences of a pack says where they begin, too.
            if list.iter().any(|value| value.as_u64().is_some_and(|number| number > 1)) {
                let numbers = self.unsigned("attention_mask", &list)?;
                row.attention = Some(numbers.iter().map(|&number| number != 0).collect());
                given.numbers = Some(numbers);
            } else {
                row.attention = Some(self.booleans("attention_mask", &list)?);
            }
        }
        self.boundaries(&mut row, given)?;
        if let Some(list) = self.sized("weights", n)? {
            let mut weights = Vec::with_capacity(n);
            for (i, value) in list.iter().enumerate() {
                match value.as_f64().map(|w| w as f32).filter(|w| w.is_finite() && *w >= 0.0) {
                    Some(w) => weights.push(w),
                    None => {
                        return Err(self.error(
                            format!("\"weights\"[{i}] is {value}"),
                            "weights are finite numbers of 0 or more",
                        ));
                    }
                }
            }
            row.weights = Some(weights);
        }
        if self.fields.get("origins").is_some_and(|v| !v.is_null()) {
            let letters = self.string("origins")?;
            let mut origins = Vec::with_capacity(n);
            for letter in letters.chars() {
                let known = Origin::from_letter(letter);
                origins.push(known.ok_or_else(|| {
                    self.error(
                        format!("\"origins\" has the letter {letter:?}"),
                        "its letters are B S C K U T O R E and -",
                    )
                })?);
            }
            if origins.len() != n {
                return Err(self.length("origins", origins.len(), n));
            }
            row.origins = Some(origins);
        }
        if let Some(Value::String(text)) = self.fields.swap_remove("text") {
            row.text = Some(text);
        }
        if row.labels.is_none() && row.mask.is_none() {
            return Err(self.error(
                "a tokenised row without \"labels\", \"completion_mask\" or \"assistant_masks\"".into(),
                "without one of them nothing says which tokens are the response",
            ));
        }
        Ok(Body::Tokenised(Box::new(row)))
    }

    /// What the row says of its boundaries.
    fn boundaries(&mut self, row: &mut Tokenised, mut given: read::Given) -> Result<()> {
        let n = row.input_ids.len();
        given.attention.clone_from(&row.attention);
        // A field of this name that lists no numbers is somebody else's, and says nothing of packs.
        let rows = self.fields.swap_remove("rows");
        given.rows =
            rows.as_ref().and_then(Value::as_array).and_then(|l| l.iter().map(Value::as_u64).collect());
        if let Some(list) = self.list("seq_lengths")? {
            given.lengths = Some(self.unsigned("seq_lengths", &list)?);
        }
        if let Some(list) = self.sized("position_ids", n)? {
            given.positions = Some(self.unsigned("position_ids", &list)?);
        }
        if let Some(list) = self.list("prefix_ranges")? {
            let range = |(i, value): (usize, &Value)| match value.as_array().map(Vec::as_slice) {
                Some([start, end]) => {
                    let ends = self.unsigned("prefix_ranges", &[start.clone(), end.clone()])?;
                    Ok(ends[0]..ends[1])
                }
                _ => Err(self.error(
                    format!("\"prefix_ranges\"[{i}] is {value}"),
                    "its entries are [first token, token after the last], [0, 0] for none",
                )),
            };
            given.prefixes = Some(list.iter().enumerate().map(range).collect::<Result<_>>()?);
        }
        match read::boundaries(self.id, n, &given) {
            Ok(pack) => row.pack = pack,
            Err(why) => row.broken = Some(why),
        }
        Ok(())
    }

    /// A list of numbers of at least 0.
    fn unsigned(&self, key: &str, list: &[Value]) -> Result<Vec<u32>> {
        let numbers = self.integers(key, list, 0, i64::from(u32::MAX))?;
        Ok(numbers.into_iter().map(|number| number as u32).collect())
    }

    /// A list, or `None` where the field is missing or null.
    fn list(&mut self, key: &str) -> Result<Option<Vec<Value>>> {
        match self.fields.swap_remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => {
                let found = type_name(&other);
                Err(self.error(format!("\"{key}\" is {found}, not a list"), "write one entry per token"))
            }
        }
    }

    /// A list of `n` entries.
    fn sized(&mut self, key: &str, n: usize) -> Result<Option<Vec<Value>>> {
        match self.list(key)? {
            Some(list) if list.len() != n => Err(self.length(key, list.len(), n)),
            other => Ok(other),
        }
    }

    fn length(&self, key: &str, found: usize, n: usize) -> Error {
        self.error(
            format!("\"{key}\" has {found} entries, \"input_ids\" has {n}"),
            "write one entry per token",
        )
    }

    fn integers(&self, key: &str, list: &[Value], least: i64, most: i64) -> Result<Vec<i64>> {
        let mut out = Vec::with_capacity(list.len());
        for (i, value) in list.iter().enumerate() {
            match value.as_i64() {
                Some(v) if (least..=most).contains(&v) => out.push(v),
                Some(v) => {
                    return Err(self.error(
                        format!("\"{key}\"[{i}] is {v}"),
                        &format!("its entries lie in {least}..={most}"),
                    ));
                }
                None => {
                    let found = type_name(value);
                    let found = if value.is_number() { format!("{value}") } else { found.to_string() };
                    return Err(self.error(
                        format!("\"{key}\"[{i}] is {found}, not an integer"),
                        "one flat list of integers per row",
                    ));
                }
            }
        }
        Ok(out)
    }

    fn booleans(&self, key: &str, list: &[Value]) -> Result<Vec<bool>> {
        let mut out = Vec::with_capacity(list.len());
        for (i, value) in list.iter().enumerate() {
            match (value.as_bool(), value.as_i64()) {
                (Some(b), _) => out.push(b),
                (None, Some(v @ (0 | 1))) => out.push(v == 1),
                _ => {
                    return Err(
                        self.error(format!("\"{key}\"[{i}] is {value}"), "a mask's entries are 0 or 1")
                    );
                }
            }
        }
        Ok(out)
    }
}

/// A few characters around byte `at`, quoted and escaped; says so where the text ends there.
fn around(text: &str, at: usize) -> String {
    let mut start = at.saturating_sub(12);
    while !text.is_char_boundary(start) {
        start -= 1;
    }
    let mut end = (at + 20).min(text.len());
    while !text.is_char_boundary(end) {
        end += 1;
    }
    let before = if start > 0 { ".." } else { "" };
    let after = if end < text.len() { ".." } else { "" };
    let ends = if at >= text.len() { " (it ends)" } else { "" };
    format!("{before}{:?}{after}{ends}", &text[start..end])
}
