//! The direct readers agree with the general one, on rows of every kind.

use super::{direct, projection};
use crate::example::Example;
use crate::example::body::Body;
use crate::policy::Format;
use crate::source::{Content, RawRow, Row, Source};
use crate::{Result, RowId};
use arrow_array::types::{
    ArrowPrimitiveType, Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type,
    UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{
    Array, ArrayRef, BinaryArray, BooleanArray, FixedSizeListArray, Float64Array, Int64Array, LargeListArray,
    LargeStringArray, ListArray, PrimitiveArray, RecordBatch, StringArray, StringViewArray,
};
use arrow_buffer::{NullBuffer, OffsetBuffer};
use arrow_schema::{DataType, Field, Schema};
use std::path::Path;
use std::sync::Arc;

type Half = <Float16Type as ArrowPrimitiveType>::Native;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % limit as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

const FORMATS: [Format; 4] = [Format::Auto, Format::Tokenised, Format::PromptCompletion, Format::Messages];

fn raw(content: Content) -> RawRow {
    RawRow { id: RowId::new(Path::new("rows"), 7, Some(8)), content: Ok(content), size: 0 }
}

fn general(raw: RawRow, format: Format) -> Result<Example> {
    Example::from_row(Row::parse(raw)?, format)
}

/// The complete result as text, including the sign of a zero.
fn shown(result: &Result<Example>) -> String {
    match result {
        Ok(example) => format!("{example:?}"),
        Err(error) => format!("{error} | {:?}", error.help()),
    }
}

/// Asserts that both readers agree; true if the direct one accepted the row.
fn agree(row: &RawRow, format: Format) -> bool {
    let (read, wanted) = (Example::read(row.clone(), format), general(row.clone(), format));
    assert_eq!(shown(&read), shown(&wanted), "{format:?} {:?}", row.content);
    direct(row).is_some()
}

/// The kind of values of a field.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Ids,
    Labels,
    Bits,
    Sequences,
    Lengths,
    Positions,
    Ranges,
    Weights,
}

const LISTS: [(&str, Kind); 10] = [
    ("input_ids", Kind::Ids),
    ("labels", Kind::Labels),
    ("completion_mask", Kind::Bits),
    ("assistant_masks", Kind::Bits),
    ("attention_mask", Kind::Sequences),
    ("rows", Kind::Ids),
    ("seq_lengths", Kind::Lengths),
    ("position_ids", Kind::Positions),
    ("prefix_ranges", Kind::Ranges),
    ("weights", Kind::Weights),
];

/// Well-formed values of a field of `n` tokens.
fn regular(random: &mut Random, kind: Kind, n: usize) -> Vec<String> {
    let numbers_sequences = random.one_in(3);
    let first = random.below(n + 1);
    let item = |random: &mut Random, i: usize| match kind {
        Kind::Ids => random.of(&["0", "5", "151644", "2147483647"]).to_string(),
        Kind::Labels => random.of(&["-100", "5", "2147483647", "-2147483648"]).to_string(),
        Kind::Bits => random.of(&["0", "1"]).to_string(),
        Kind::Sequences if numbers_sequences => (1 + usize::from(i >= first)).to_string(),
        Kind::Sequences => "1".into(),
        Kind::Positions => (if i < first { i } else { i - first }).to_string(),
        Kind::Weights => random.of(&["0.5", "1", "0", "3.25"]).to_string(),
        Kind::Lengths | Kind::Ranges => unreachable!("not one per token"),
    };
    match kind {
        Kind::Lengths => vec![first.to_string(), (n - first).to_string()],
        Kind::Ranges => vec!["[0, 0]".into(), format!("[0, {first}]")],
        _ => (0..n).map(|i| item(random, i)).collect(),
    }
}

const ODD: [&str; 27] = [
    "null",
    "true",
    "false",
    "2",
    "-1",
    "1.0",
    "1.5",
    "-0",
    "-0.0",
    "1e2",
    "2147483648",
    "4294967295",
    "4294967296",
    "-2147483649",
    "18446744073709551615",
    "18446744073709551616",
    "1e999",
    "1e39",
    "\"x\"",
    "\"R\"",
    "[1]",
    "[]",
    "{}",
    "01",
    "\"\\ud800\"",
    "NaN",
    "[[[[]]]]",
];

/// A row as JSON, most of its fields well-formed.
fn json_row(random: &mut Random) -> Vec<u8> {
    let n = random.below(6);
    // Half of all rows are well-formed in all fields.
    let tidy = random.one_in(2);
    let odd = |random: &mut Random, one_in: usize| !tidy && random.one_in(one_in);
    let mut fields: Vec<(String, String)> = Vec::new();
    for (name, kind) in LISTS {
        let there = match name {
            "input_ids" | "labels" => !odd(random, 12),
            _ => random.one_in(3),
        };
        if !there {
            continue;
        }
        let length = if odd(random, 12) { n + 1 } else { n };
        let mut items = regular(random, kind, length);
        if !items.is_empty() && odd(random, 6) {
            let at = random.below(items.len());
            items[at] = random.of(&ODD).to_string();
        }
        let value = if odd(random, 10) { random.of(&ODD).into() } else { format!("[{}]", items.join(", ")) };
        fields.push((name.into(), value));
    }
    if random.one_in(2) {
        let letters =
            if odd(random, 4) { &["R", "x", "é", "\\u0052"][..] } else { &["B", "K", "R", "E", "-"] };
        let text: String = (0..n).map(|_| random.of(letters)).collect();
        let value = if odd(random, 8) { random.of(&ODD).into() } else { format!("\"{text}\"") };
        fields.push(("origins".into(), value));
    }
    for (name, value) in [
        ("row", "3"),
        ("text", "\"<|im_start|> é\""),
        ("text", "{\"a\": 1}"),
        ("prompt", "\"p\""),
        ("completion", "\"c\""),
        ("label", "false"),
        ("messages", "[{\"role\": \"user\", \"content\": \"u\"}]"),
    ] {
        if random.one_in(5) {
            fields.push((name.into(), if odd(random, 5) { random.of(&ODD).into() } else { value.into() }));
        }
    }
    if odd(random, 6) && !fields.is_empty() {
        let twice = fields[random.below(fields.len())].clone();
        fields.push(twice);
    }
    for at in (1..fields.len()).rev() {
        fields.swap(at, random.below(at + 1));
    }
    let fields: Vec<String> = fields.iter().map(|(name, value)| format!("\"{name}\": {value}")).collect();
    let mut row = format!("{{{}}}", fields.join(", ")).into_bytes();
    if odd(random, 12) {
        let at = random.below(row.len());
        row[at] = random.of(b"\"[],:0 \xff}");
    }
    if odd(random, 20) {
        row.truncate(random.below(row.len()));
    }
    row
}

#[test]
fn json_rows_are_read_alike() {
    let mut random = Random(1);
    let (mut taken, mut failed) = (0, 0);
    for _ in 0..60_000 {
        let row = raw(Content::Json(json_row(&mut random)));
        for format in FORMATS {
            taken += usize::from(agree(&row, format));
        }
        failed += usize::from(Example::read(row, Format::Auto).is_err());
    }
    assert!(taken > 100_000 && failed > 15_000, "{taken} {failed}");
}

/// A row's list of numbers; `None` if it is null.
type Numbers = Option<Vec<Option<i64>>>;

/// Lists of numbers as a column of some type.
fn column(random: &mut Random, lists: &[Numbers], natural: bool) -> ArrayRef {
    let items: Vec<Option<i64>> = lists.iter().flatten().flatten().copied().collect();
    macro_rules! primitive {
        ($type:ty) => {
            Arc::new(items.iter().map(|item| item.map(|item| item as _)).collect::<PrimitiveArray<$type>>())
        };
    }
    let values: ArrayRef = match random.below(if natural { 4 } else { 13 }) {
        0 => primitive!(Int32Type),
        1 | 2 => primitive!(Int64Type),
        3 if natural => primitive!(Int32Type),
        3 => primitive!(Int8Type),
        4 => primitive!(Int16Type),
        5 => primitive!(UInt8Type),
        6 => primitive!(UInt16Type),
        7 => primitive!(UInt32Type),
        8 => primitive!(UInt64Type),
        9 => primitive!(Float32Type),
        10 => primitive!(Float64Type),
        11 => Arc::new(items.iter().map(|item| item.map(|item| item == 1)).collect::<BooleanArray>()),
        _ => Arc::new(items.iter().map(|item| item.map(|item| item.to_string())).collect::<StringArray>()),
    };
    wrapped(random, lists.iter().map(|list| list.as_ref().map(Vec::len)).collect(), values)
}

/// Values as lists of these lengths.
fn wrapped(random: &mut Random, lengths: Vec<Option<usize>>, values: ArrayRef) -> ArrayRef {
    let nulls = NullBuffer::from_iter(lengths.iter().map(Option::is_some));
    let nulls = Some(nulls).filter(|nulls| nulls.null_count() > 0);
    let field = Arc::new(Field::new("item", values.data_type().clone(), true));
    let of = |lengths: &[Option<usize>]| lengths.iter().map(|n| n.unwrap_or(0)).collect::<Vec<_>>();
    let same = lengths.iter().all(|n| n.is_some() && *n == lengths[0]);
    match random.below(3) {
        0 if same && lengths[0].is_some_and(|n| n > 0) => {
            Arc::new(FixedSizeListArray::new(field, lengths[0].unwrap_or(1) as i32, values, nulls))
        }
        1 => Arc::new(LargeListArray::new(field, OffsetBuffer::from_lengths(of(&lengths)), values, nulls)),
        _ => Arc::new(ListArray::new(field, OffsetBuffer::from_lengths(of(&lengths)), values, nulls)),
    }
}

/// A batch of rows, most of whose columns are well-formed.
fn batch(random: &mut Random) -> RecordBatch {
    let rows = 1 + random.below(5);
    let tidy = random.one_in(2);
    let same = random.one_in(2).then(|| 1 + random.below(5));
    let lengths: Vec<usize> = (0..rows).map(|_| same.unwrap_or_else(|| random.below(6))).collect();
    let mut columns: Vec<(Field, ArrayRef)> = Vec::new();
    let mut push = |name: &str, column: ArrayRef| {
        columns.push((Field::new(name, column.data_type().clone(), true), column));
    };
    for (name, kind) in LISTS {
        let there = match name {
            "input_ids" | "labels" => tidy || !random.one_in(12),
            _ => random.one_in(3),
        };
        if !there {
            continue;
        }
        if kind == Kind::Weights {
            let items = lengths.iter().flat_map(|&n| regular(random, kind, n));
            let items: Vec<Option<f64>> = items.map(|item| item.parse().ok()).collect();
            let odd = [None, Some(f64::NAN), Some(f64::INFINITY), Some(-0.0), Some(-1.0), Some(1e300)];
            let items =
                items.into_iter().map(|item| if !tidy && random.one_in(15) { random.of(&odd) } else { item });
            let items: Vec<Option<f64>> = items.collect();
            let values: ArrayRef = match random.below(3) {
                0 => Arc::new(
                    items.iter().map(|w| w.map(|w| w as f32)).collect::<PrimitiveArray<Float32Type>>(),
                ),
                1 => Arc::new(
                    items.iter().map(|w| w.map(Half::from_f64)).collect::<PrimitiveArray<Float16Type>>(),
                ),
                _ => Arc::new(items.iter().copied().collect::<Float64Array>()),
            };
            push(name, wrapped(random, lengths.iter().copied().map(Some).collect(), values));
            continue;
        }
        if kind == Kind::Ranges {
            let first: Vec<usize> = lengths.iter().map(|&n| random.below(n + 1)).collect();
            let ends: Vec<Numbers> = first
                .iter()
                .flat_map(|&n| [Some(vec![Some(0), Some(0)]), Some(vec![Some(0), Some(n as i64)])])
                .collect();
            let ranges = column(random, &ends, tidy);
            push(name, wrapped(random, vec![Some(2); rows], ranges));
            continue;
        }
        let mut lists: Vec<Numbers> = Vec::new();
        for &n in &lengths {
            let n = if !tidy && random.one_in(15) { n + 1 } else { n };
            let items = regular(random, kind, n).into_iter().map(|item| item.parse::<i64>().ok());
            lists.push(Some(items.collect()));
            if let Some(Some(items)) = lists.last_mut()
                && !items.is_empty()
                && !tidy
                && random.one_in(6)
            {
                let at = random.below(items.len());
                items[at] =
                    random.of(&[None, Some(-1), Some(2), Some(1 << 31), Some(1 << 40), Some(i64::MIN)]);
            }
            if !tidy && random.one_in(12) {
                lists.pop();
                lists.push(None);
            }
        }
        push(name, column(random, &lists, tidy));
    }
    if random.one_in(2) {
        let letters =
            if !tidy && random.one_in(3) { &["R", "x", "é"][..] } else { &["B", "K", "R", "E", "-"] };
        let texts = lengths.iter().map(|&n| (0..n).map(|_| random.of(letters)).collect::<String>());
        let texts: Vec<Option<String>> = texts.map(Some).collect();
        let texts: Vec<_> = texts.into_iter().map(|t| t.filter(|_| tidy || !random.one_in(8))).collect();
        push(
            "origins",
            match random.below(3) {
                0 => Arc::new(texts.into_iter().collect::<StringArray>()),
                1 => Arc::new(texts.into_iter().collect::<LargeStringArray>()),
                _ => Arc::new(texts.into_iter().collect::<StringViewArray>()),
            },
        );
    }
    let strings = |text: &str| -> ArrayRef { Arc::new(StringArray::from(vec![text; rows])) };
    for (name, column) in [
        ("row", Arc::new(Int64Array::from_iter_values(0..rows as i64)) as ArrayRef),
        ("text", strings("<|im_start|> é")),
        ("prompt", strings("p")),
        ("completion", strings("c")),
        ("image", Arc::new(BinaryArray::from(vec![&b"\xff\x00"[..]; rows]))),
        ("score", Arc::new(Float64Array::from(vec![0.5; rows]))),
    ] {
        if random.one_in(3) {
            push(name, column);
        }
    }
    if !tidy && random.one_in(4) {
        push("score", Arc::new(Float64Array::from(vec![random.of(&[f64::INFINITY, f64::NAN]); rows])));
    }
    if !tidy && random.one_in(6) {
        let column = strings(random.of(&["{\"a\": 1}", "no JSON"]));
        let json: std::collections::HashMap<_, _> =
            [("ARROW:extension:name".to_string(), "arrow.json".to_string())].into();
        let name = random.of(&["extra", "text", "origins"]);
        columns.push((Field::new(name, DataType::Utf8, true).with_metadata(json), column));
    }
    if !tidy && random.one_in(8) && !columns.is_empty() {
        let twice = columns[random.below(columns.len())].clone();
        columns.push(twice);
    }
    for at in (1..columns.len()).rev() {
        columns.swap(at, random.below(at + 1));
    }
    if columns.is_empty() {
        columns.push((Field::new("a", DataType::Utf8, true), strings("b")));
    }
    let (fields, columns): (Vec<Field>, Vec<ArrayRef>) = columns.into_iter().unzip();
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap()
}

#[test]
fn rows_of_columns_are_read_alike() {
    let mut random = Random(2);
    let (mut taken, mut failed) = (0, 0);
    for _ in 0..20_000 {
        let whole = batch(&mut random);
        // A slice has its own offsets.
        let from = random.below(whole.num_rows());
        let part = Arc::new(whole.slice(from, whole.num_rows() - from));
        for at in 0..part.num_rows() {
            let row = raw(Content::Columns(part.clone(), at));
            for format in FORMATS {
                taken += usize::from(agree(&row, format));
            }
            failed += usize::from(Example::read(row, Format::Auto).is_err());
        }
    }
    assert!(taken > 60_000 && failed > 10_000, "{taken} {failed}");
}

/// The rows of a source, each read in both ways.
fn examples(mut source: Source) -> Vec<String> {
    let mut examples = Vec::new();
    while let Some(row) = source.next_row().unwrap() {
        agree(&row, Format::Auto);
        let mut example = Example::read(row, Format::Auto);
        if let Ok(Example { body: Body::Tokenised(row), .. }) = &mut example {
            row.text = None;
        }
        examples.push(shown(&example));
    }
    examples
}

#[test]
fn a_projection_leaves_every_row_and_error_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    let mut random = Random(3);
    let mut written = 0;
    for _ in 0..600 {
        let batch = batch(&mut random);
        let file = std::fs::File::create(&path).unwrap();
        // A file cannot have two columns of one name.
        let Ok(mut writer) = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None) else {
            continue;
        };
        if writer.write(&batch).is_err() || writer.close().is_err() {
            continue;
        }
        written += 1;
        let wanted = examples(Source::open(&path).unwrap());
        for text in [false, true] {
            let mut source = Source::open(&path).unwrap();
            source.project(projection(text));
            assert_eq!(examples(source), wanted, "{batch:?}");
        }
    }
    assert!(written > 400, "{written}");
}

#[test]
fn only_wanted_columns_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.parquet");
    let names = |path: &Path, text| {
        let mut source = Source::open(path).unwrap();
        source.project(projection(text));
        let Ok(Content::Columns(batch, _)) = source.next_row().unwrap().unwrap().content else { panic!() };
        crate::source::column_names(&batch).map(str::to_string).collect::<Vec<_>>()
    };
    let write = |columns: &[(&str, ArrayRef)]| {
        let batch = RecordBatch::try_from_iter(columns.iter().cloned()).unwrap();
        let file = std::fs::File::create(&path).unwrap();
        let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    };
    let mut random = Random(4);
    let ids = column(&mut random, &[Some(vec![Some(1), Some(2)])], true);
    let text: ArrayRef = Arc::new(StringArray::from(vec!["t"]));
    let score: ArrayRef = Arc::new(Float64Array::from(vec![f64::INFINITY]));
    write(&[
        ("row", Arc::new(Int64Array::from(vec![0]))),
        ("input_ids", ids.clone()),
        ("prompt", text.clone()),
        ("labels", ids.clone()),
        ("text", text.clone()),
        ("score", score),
    ]);
    // An infinite score is not an error if no reader needs it.
    assert_eq!(names(&path, false), ["input_ids", "labels"]);
    assert_eq!(names(&path, true), ["input_ids", "labels", "text"]);
    // Without labels these are not tokenised rows.
    write(&[("input_ids", ids), ("prompt", text.clone()), ("completion", text)]);
    assert_eq!(names(&path, false), ["input_ids", "prompt", "completion"]);
}
