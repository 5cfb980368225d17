//! Bytes to rows: every layout, every compression, several files, and files with errors in the middle.

mod common;

use common::Scratch;
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use suasion_data::Result;
use suasion_data::source::Row;
use suasion_data::source::{Framing, Source};

/// All rows: `Ok` with the value of `"n"`, or the error as text. The outer error ends the file.
fn rows(path: &Path) -> Result<Vec<Result<i64, String>>> {
    let mut source = Source::open(path)?;
    let mut out = Vec::new();
    while let Some(raw) = source.next_row()? {
        let shown = raw.id.clone();
        out.push(match Row::parse(raw) {
            Ok(row) => Ok(row.fields["n"].as_i64().unwrap()),
            Err(e) => Err(e.to_string().replace(&shown.file.display().to_string(), "FILE")),
        });
    }
    Ok(out)
}

fn numbers(path: &Path) -> Vec<i64> {
    rows(path).unwrap().into_iter().map(|r| r.unwrap()).collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut w = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    w.write_all(bytes).unwrap();
    w.finish().unwrap()
}

#[test]
fn every_layout_and_compression_gives_the_same_rows() {
    let s = Scratch::new();
    let lines = "{\"n\": 1, \"t\": \"}]\\\"{[,\"}\n{\"n\": 2}\n{\"n\": 3, \"deep\": [{\"n\": [9]}, \"]\"]}\n";
    let elements = lines.trim_end().replace('\n', ",\n");
    let printed = "{\n  \"n\": 1,\n  \"t\": \"}]\\\"{[,\"\n}\n{ \"n\": 2 }{\n  \"n\": 3,\n  \"deep\": [\n    {}\n  ]\n}";
    let contents = [
        ("lines.jsonl", lines.to_string(), Framing::Lines),
        ("no_end.jsonl", lines.trim_end().to_string(), Framing::Lines),
        ("bom.jsonl", format!("\u{feff}{lines}"), Framing::Lines),
        ("crlf.jsonl", lines.replace('\n', "\r\n"), Framing::Lines),
        ("blank.jsonl", format!("\n  \n{}\n\t\n", lines.replace('\n', "\n\n")), Framing::Lines),
        ("named_wrongly.json", lines.to_string(), Framing::Lines),
        ("no_name", lines.to_string(), Framing::Lines),
        ("array.json", format!("[{elements}]"), Framing::Array),
        ("array_bom.json", format!("\u{feff} \n[{elements}\n]\n"), Framing::Array),
        ("array_named_wrongly.jsonl", format!("[{elements}]"), Framing::Array),
        (
            "data.json",
            format!("{{\"version\": [\"[\", {{\"data\": 1}}], \"data\": [{elements}]}}"),
            Framing::Object,
        ),
        (
            "rows.json",
            format!("{{\n \"rows\": [\n{elements}\n ],\n \"more\": {{\"a\": [1]}}\n}}\n"),
            Framing::Object,
        ),
        // As jq prints rows, whatever the name of the file.
        ("jq.json", printed.to_string(), Framing::Objects),
        ("jq.jsonl", printed.replace('\n', "\r\n"), Framing::Objects),
        ("jq_unnamed", format!("\u{feff}\n{printed}"), Framing::Objects),
        ("train.json", format!("{{\"train\":[{}]}}", elements.replace('\n', "")), Framing::Object),
    ];
    for (name, content, layout) in &contents {
        let plain = s.file(name, content);
        assert_eq!(Source::open(&plain).unwrap().framing(), Some(*layout), "{name}");
        assert_eq!(numbers(&plain), [1, 2, 3], "{name}");
        let two = content.len() / 2;
        let mut members = gzip(&content.as_bytes()[..two]);
        members.extend(gzip(&content.as_bytes()[two..]));
        assert_eq!(numbers(&s.file(&format!("{name}.gz"), members)), [1, 2, 3], "{name}.gz of two members");
        let zst = zstd::encode_all(content.as_bytes(), 1).unwrap();
        assert_eq!(numbers(&s.file(&format!("{name}.zst"), &zst)), [1, 2, 3], "{name}.zst");
        assert_eq!(numbers(&s.file(&format!("{name}.unnamed"), &zst)), [1, 2, 3], "by content");
    }
}

#[test]
fn a_broken_row_is_one_bad_row_with_its_place() {
    let s = Scratch::new();
    let mut lines = b"{\"n\": 1}\n\n{\"n\": \"\xff\"}\n{\"n\": tru}\n[1]\n{\"n\": 2".to_vec();
    lines.extend_from_slice(b"\n{\"n\": \"a\x01b\"}\n{\"n\": 3}\n");
    let expected: Vec<Result<i64, String>> = vec![
        Ok(1),
        Err("FILE:3: invalid UTF-8 at byte 7 of the row (0xff)".into()),
        Err("FILE:4: invalid JSON at byte 9 of the row: expected ident".into()),
        Err("FILE:5: the row is a list, not an object".into()),
        Err("FILE:6: invalid JSON at byte 7 of the row: EOF while parsing an object".into()),
        Err("FILE:7: invalid JSON at byte 8 of the row: control character (\\u0000-\\u001F) found while parsing a string".into()),
        Ok(3),
    ];
    assert_eq!(rows(&s.file("bad.jsonl", &lines)).unwrap(), expected);

    let array = b"[{\"n\": 1},\n {\"n\": \"\xff\"}, {\"n\":\n tru}, 7, {\"n\": 3}]";
    let expected: Vec<Result<i64, String>> = vec![
        Ok(1),
        Err("FILE: row 1: invalid UTF-8 at byte 7 of the row (0xff)".into()),
        Err("FILE: row 2: invalid JSON at byte 10 of the row: expected ident".into()),
        Err("FILE: row 3: the row is a number, not an object".into()),
        Ok(3),
    ];
    assert_eq!(rows(&s.file("bad.json", array)).unwrap(), expected);
}

#[test]
fn a_first_line_that_is_broken_does_not_change_the_layout() {
    let s = Scratch::new();
    for (name, first) in
        [("cut in a string", "{\"n\": \"a"), ("cut in an object", "{\"n\": 1,"), ("garbage", "garbage")]
    {
        for file in ["x.jsonl", "x.json"] {
            let path = s.file(file, format!("{first}\n{{\"n\": 2}}\n{{\"n\": 3}}\n"));
            let all = rows(&path).unwrap();
            assert!(
                all[0].as_ref().is_err_and(|e| e.starts_with("FILE:1: invalid JSON")),
                "{name} {file}: {all:?}"
            );
            assert_eq!(all[1..], [Ok(2), Ok(3)], "{name} {file}");
        }
    }
}

#[test]
fn files_without_rows_say_so() {
    let s = Scratch::new();
    for (name, content) in [
        ("empty.jsonl", ""),
        ("bom.jsonl", "\u{feff}"),
        ("blank.jsonl", "\n \r\n\n"),
        ("array.json", "[]"),
        ("object.json", "{\"data\": []}"),
    ] {
        let error = rows(&s.file(name, content)).unwrap_err();
        assert!(error.to_string().ends_with("the file has no rows"), "{name}: {error}");
        assert!(error.help().is_some());
    }
    let error = rows(&s.file("empty.jsonl.gz", gzip(b""))).unwrap_err();
    assert!(error.to_string().ends_with("the file has no rows"), "{error}");
}

#[test]
fn files_that_are_no_rows_say_what_they_are() {
    let s = Scratch::new();
    let message = |name: &str, content: &[u8]| rows(&s.file(name, content)).unwrap_err().to_string();
    assert!(
        message("t.txt", b"hello\nthere\n")
            .ends_with("the file is not JSON, JSON Lines, CSV, Parquet or Arrow")
    );
    assert!(message("u.json", b"\xff\xfe{\0").ends_with("the file is UTF-16"));
    let long = format!("{{\n \"a\": \"{}\",\n \"b\": []\n}}", "x".repeat(70_000));
    let keys = message("k.json", long.as_bytes());
    assert!(keys.contains("keys (a, b)"), "{keys}");
    assert!(rows(&s.path("none.jsonl")).unwrap_err().to_string().contains("none.jsonl"));
    assert!(rows(s.dir.path()).unwrap_err().to_string().ends_with("is a folder, not a file of rows"));
    // A damaged gzip stream is an I/O error of the file, after the rows before the damage.
    let mut gz = gzip("{\"n\": 1}\n".repeat(100_000).as_bytes());
    gz.truncate(gz.len() / 2);
    assert!(matches!(rows(&s.file("cut.jsonl.gz", gz)), Err(suasion_data::Error::Io { .. })));
}

#[test]
fn one_object_over_several_lines_is_a_row() {
    let s = Scratch::new();
    assert_eq!(rows(&s.file("one.json", "{\n  \"n\": 7\n}\n")).unwrap(), [Ok(7)]);
    assert_eq!(rows(&s.file("one.jsonl", "{\n  \"n\": 7\n}\n")).unwrap(), [Ok(7)]);
    let cut = rows(&s.file("cut.json", "{\n  \"n\": 7\n}\n{\n  \"n\": 8\n")).unwrap();
    assert_eq!(cut, [Ok(7), Err("FILE: row 1: the file ends in the middle of this row".into())]);
    let bad = rows(&s.file("bad.json", "{\n  \"n\": 7\n}\n{\n  \"n\": tru\n}\n{\n  \"n\": 9\n}\n")).unwrap();
    assert!(bad[1].as_ref().is_err_and(|e| e.starts_with("FILE: row 1: invalid JSON")), "{bad:?}");
    assert_eq!((&bad[0], &bad[2]), (&Ok(7), &Ok(9)));
    let comma = rows(&s.file("comma.json", "{\n  \"n\": 7\n},\n{\n  \"n\": 8\n}\n")).unwrap_err().to_string();
    assert!(comma.contains("expected \"{\" after row 0, found \",\""), "{comma}");
}

#[test]
fn arrays_that_break_off_say_so_after_their_rows() {
    let s = Scratch::new();
    let all = rows(&s.file("cut.json", "[{\"n\": 1}, {\"n\": 2")).unwrap();
    assert_eq!(all, [Ok(1), Err("FILE: row 1: the file ends in the middle of this row".into())]);
    for content in [
        "[{\"n\": 1}",
        "[{\"n\": 1},",
        "[{\"n\": 1}] x",
        "{\"data\": [{\"n\": 1}]",
        "[{\"n\": 1} {\"n\": 2}]",
    ] {
        let mut source = Source::open(s.file("cut.json", content)).unwrap();
        assert!(source.next_row().unwrap().is_some(), "{content}");
        let rest = std::iter::from_fn(|| source.next_row().transpose()).collect::<Result<Vec<_>>>();
        // Two objects without a comma between them are one bad row.
        let bad_row = content == "[{\"n\": 1} {\"n\": 2}]";
        assert!(rest.is_err() || bad_row, "{content}: {rest:?}");
    }
}

#[test]
fn long_files_are_streamed_and_hashed() {
    let s = Scratch::new();
    // Longer than the sniffed head and the buffers, with rows across their boundaries.
    let mut content = String::new();
    for n in 0..20_000 {
        content.push_str(&format!("{{\"n\": {n}, \"t\": \"{}\"}}\n", "x".repeat(n % 97)));
    }
    let path = s.file("long.jsonl", &content);
    assert_eq!(numbers(&path), (0..20_000).collect::<Vec<_>>());
    let array = format!("[{}]", content.trim_end().replace('\n', ","));
    assert_eq!(numbers(&s.file("long.json", &array)), (0..20_000).collect::<Vec<_>>());

    let whole = |path: &Path, stop_after: usize| {
        let mut source = Source::open(path).unwrap();
        (0..stop_after).for_each(|_| _ = source.next_row().unwrap());
        source.finish().unwrap()
    };
    let hash = whole(&path, 20_001);
    assert_eq!(hash.blake3, blake3::hash(content.as_bytes()).to_hex().as_str());
    assert_eq!(hash.bytes, content.len() as u64);
    assert_eq!(whole(&path, 3), hash, "also where it is not read to its end");
    let gz = gzip(content.as_bytes());
    let gz_path = s.file("long.jsonl.gz", &gz);
    assert_eq!(whole(&gz_path, 20_001).blake3, blake3::hash(&gz).to_hex().as_str());
}

/// All rows as JSON objects, with their positions.
fn objects(source: Source) -> Vec<(String, Result<Value, String>)> {
    let mut source = source;
    let mut out = Vec::new();
    while let Some(raw) = source.next_row().unwrap() {
        let place = raw.id.clone();
        assert_eq!(place.row, out.len() as u64, "rows are counted over all files");
        let name = place.to_string();
        let name = name.rsplit_once('/').unwrap().1.to_string();
        out.push((
            name,
            match Row::parse(raw) {
                Ok(row) => Ok(Value::Object(row.fields)),
                Err(e) => Err(e.to_string().replace(&format!("{place}: "), "")),
            },
        ));
    }
    out
}

#[test]
fn csv_cells_are_fields() {
    let s = Scratch::new();
    // Quotes, delimiters, quotes and line ends inside cells, CRLF, blank lines, a column without a name.
    let text = "\u{feff}prompt,,completion,note\r\nWhy?,0,\"Because, \"\"so\"\".\",\r\n\r\n\"two\nlines\",1,plain \"quotes\" stay,x\r\n\"a\"b,2,\"\",é\n";
    let expected = [
        ("x.csv:2", json!({"prompt": "Why?", "completion": "Because, \"so\".", "note": ""})),
        ("x.csv:4", json!({"prompt": "two\nlines", "completion": "plain \"quotes\" stay", "note": "x"})),
        ("x.csv:6", json!({"prompt": "ab", "completion": "", "note": "é"})),
    ];
    let expected: Vec<_> = expected.into_iter().map(|(place, row)| (place.to_string(), Ok(row))).collect();
    let path = s.file("x.csv", text);
    assert_eq!(Source::open(&path).unwrap().framing(), Some(Framing::Delimited(b',')));
    assert_eq!(objects(Source::open(path).unwrap()), expected);
    // The same between semicolons and tabs, and compressed.
    let place = |name: &str| {
        expected.iter().map(|(p, row)| (p.replace("x.csv", name), row.clone())).collect::<Vec<_>>()
    };
    let other = |by: &str| {
        let outside = text.replace("Because,", "Because\u{0}").replace(',', by);
        outside.replace('\u{0}', ",")
    };
    assert_eq!(objects(Source::open(s.file("s.csv", other(";"))).unwrap()), place("s.csv"));
    assert_eq!(objects(Source::open(s.file("t.tsv", other("\t"))).unwrap()), place("t.tsv"));
    assert_eq!(objects(Source::open(s.file("x.csv.gz", gzip(text.as_bytes()))).unwrap()), place("x.csv.gz"));
    let zst = zstd::encode_all(text.as_bytes(), 1).unwrap();
    assert_eq!(objects(Source::open(s.file("x.CSV.zst", zst)).unwrap()), place("x.CSV.zst"));
}

#[test]
fn csv_cells_of_lists_are_json() {
    let s = Scratch::new();
    let text = "messages,tools,labels,text,label\n\
        \"[{\"\"role\"\": \"\"user\"\", \"\"content\"\": \"\"a\\nb\"\"}]\",,\"[1, -100]\",\"[1, 2]\",True\n\
        not json,{},3,,no\n";
    let rows: Vec<_> = objects(Source::open(s.file("x.csv", text)).unwrap())
        .into_iter()
        .map(|(_, row)| row.unwrap())
        .collect();
    assert_eq!(
        rows,
        [
            json!({"messages": [{"role": "user", "content": "a\nb"}], "labels": [1, -100], "text": "[1, 2]", "label": true}),
            json!({"messages": "not json", "tools": {}, "labels": "3", "text": "", "label": "no"}),
        ]
    );
}

#[test]
fn broken_csv_records_are_bad_rows_with_their_line() {
    let s = Scratch::new();
    let text = b"a,b\n1,2\n1\n1,2,3\n\"x\ny\",\xff\n5,6\n7,\"8\n9,10\n";
    let rows = objects(Source::open(s.file("x.csv", text)).unwrap());
    let expected = [
        ("x.csv:2", Ok(json!({"a": "1", "b": "2"}))),
        ("x.csv:3", Err("the record has 1 cell, the header has 2 columns")),
        ("x.csv:4", Err("the record has 3 cells, the header has 2 columns")),
        ("x.csv:5", Err("invalid UTF-8 at byte 6 of the row (0xff)")),
        ("x.csv:7", Ok(json!({"a": "5", "b": "6"}))),
        ("x.csv:8", Err("the file ends inside a quoted cell of this record: it has an unbalanced quote")),
    ];
    let expected: Vec<_> =
        expected.into_iter().map(|(place, row)| (place.to_string(), row.map_err(String::from))).collect();
    assert_eq!(rows, expected);
    let error = |name: &str, text: &str| {
        let result = Source::open(s.file(name, text)).and_then(|mut source| source.next_row());
        result.unwrap_err().to_string()
    };
    assert!(error("d.csv", "a,b,a\n1,2,3\n").ends_with("two columns are named \"a\""));
    assert!(error("e.csv", "").ends_with("the file has no rows"));
    assert!(error("h.csv", "a,b\n").ends_with("the file has no rows"));
    assert!(error("q.csv", "\"a,b\n1,2\n").contains("an unbalanced quote"));
}

/// Random cells with all syntax of the format, compared with the `csv` crate reading the whole file.
#[test]
fn records_are_cut_where_the_csv_crate_ends_them() {
    let s = Scratch::new();
    let mut state = 7u64;
    let mut next = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    let mut compared = 0;
    for _ in 0..400 {
        let mut text = String::from("a,b\n");
        for _ in 0..next(60) {
            text.push_str(["\"", "\"", ",", "\n", "\r\n", "x", " ", "é"][next(8)]);
        }
        text.push_str("end\n");
        let ours = objects_of(&s, &text);
        let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(text.as_bytes());
        let theirs: Vec<Vec<String>> =
            reader.records().map(|r| r.unwrap().iter().map(String::from).collect()).collect();
        let Some(ours) = ours else { continue };
        assert_eq!(ours.len(), theirs.len(), "{text:?}");
        for (ours, theirs) in ours.iter().zip(&theirs) {
            match ours {
                Ok(row) => {
                    assert_eq!(row["a"].as_str().unwrap(), theirs[0], "{text:?}");
                    assert_eq!(row["b"].as_str().unwrap(), theirs[1], "{text:?}");
                    assert_eq!(theirs.len(), 2, "{text:?}");
                    compared += 1;
                }
                Err(e) => assert_ne!(theirs.len(), 2, "{e}: {text:?}"),
            }
        }
    }
    assert!(compared > 300, "{compared}");
}

/// The rows of a CSV text; `None` if it ends inside quotes.
fn objects_of(s: &Scratch, text: &str) -> Option<Vec<Result<Value, String>>> {
    let rows = objects(Source::open(s.file("random.csv", text)).unwrap());
    let lost = |row: &Result<Value, String>| row.as_ref().is_err_and(|e| e.contains("an unbalanced quote"));
    (!rows.iter().any(|(_, row)| lost(row))).then(|| rows.into_iter().map(|(_, row)| row).collect())
}

#[test]
fn several_files_are_one_source() {
    let s = Scratch::new();
    let contents = [
        ("a.jsonl", "{\"n\": \"0\"}\n\n{\"n\": \"1\"}\n".to_string()),
        ("b.json", "[{\"n\": \"2\"}, {\"n\": \"3\"}]".to_string()),
        ("c.csv", "n\n4\n\"5\n\"\n6\n".to_string()),
    ];
    let files: Vec<_> = contents.iter().map(|(name, content)| s.file(name, content)).collect();
    let open = || Source::of("*", files.clone()).unwrap();
    let rows = objects(open());
    let places: Vec<&str> = rows.iter().map(|(place, _)| place.as_str()).collect();
    assert_eq!(
        places,
        ["a.jsonl:1", "a.jsonl:3", "b.json: row 0", "b.json: row 1", "c.csv:2", "c.csv:3", "c.csv:5"]
    );
    let values: Vec<&str> =
        rows.iter().map(|(_, row)| row.as_ref().unwrap()["n"].as_str().unwrap()).collect();
    assert_eq!(values, ["0", "1", "2", "3", "4", "5\n", "6"]);

    let hash = |mut source: Source, rows: usize| {
        (0..rows).for_each(|_| _ = source.next_row().unwrap());
        source.finish().unwrap()
    };
    let whole = hash(open(), 9);
    let each: Vec<String> =
        contents.iter().map(|(_, c)| blake3::hash(c.as_bytes()).to_hex().to_string()).collect();
    assert_eq!(whole.files.iter().map(|f| f.blake3.clone()).collect::<Vec<_>>(), each);
    assert_eq!(whole.blake3, blake3::hash((each.join("\n") + "\n").as_bytes()).to_hex().as_str());
    let bytes: usize = contents.iter().map(|(_, c)| c.len()).sum();
    assert_eq!((whole.bytes, open().size(), whole.path.as_str()), (bytes as u64, bytes as u64, "*"));
    assert_eq!(hash(open(), 0), whole, "also where it is not read");
    assert_eq!(hash(open(), 3), whole);
    // One file has the same hash and JSON as by itself.
    let one = hash(Source::of("name", [files[0].clone()]).unwrap(), 0);
    let json = serde_json::to_value(&one).unwrap();
    assert_eq!(json, json!({"path": "name", "blake3": each[0], "bytes": contents[0].1.len()}));

    assert!(Source::of("none", []).is_err());
    let missing = Source::of("x", [files[0].clone(), s.path("gone.jsonl")]).err().unwrap();
    assert!(missing.to_string().contains("gone.jsonl"), "{missing}");
    let mut empty = Source::of("x", [files[0].clone(), s.file("empty.jsonl", "")]).unwrap();
    let end = std::iter::from_fn(|| empty.next_row().transpose()).last().unwrap();
    assert!(end.unwrap_err().to_string().ends_with("empty.jsonl: the file has no rows"));
}

/// Files with random damage: every row is a row or a bad row, the stream ends, and nothing panics.
#[test]
fn damaged_files_end() {
    let s = Scratch::new();
    let whole = [
        "{\"n\": 1, \"t\": \"a\\\"b\"}\n{\"n\": 2}\n{\"n\": 3}\n".to_string(),
        "[{\"n\": 1, \"t\": \"a\\\"b\"}, {\"n\": 2},\n{\"n\": 3}]".to_string(),
        "{\"a\": {\"b\": 1}, \"rows\": [{\"n\": 1}, {\"n\": 2}], \"c\": \"d\"}".to_string(),
    ];
    let mut state = 1u64;
    let mut next = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    let alphabet = b"{}[]\",:\\\n\r\t \x00\xff\xef1nt";
    let (mut good, mut bad, mut ended) = (0, 0, 0);
    for round in 0..3000 {
        let mut bytes = whole[round % 3].clone().into_bytes();
        for _ in 0..1 + next(3) {
            let at = next(bytes.len());
            match next(3) {
                0 => bytes[at] = alphabet[next(alphabet.len())],
                1 => bytes.insert(at, alphabet[next(alphabet.len())]),
                _ => bytes.truncate(at.max(1)),
            }
        }
        let path = s.file("x", &bytes);
        let Ok(mut source) = Source::open(&path) else {
            ended += 1;
            continue;
        };
        for turn in 0.. {
            assert!(turn < 1000, "the stream does not end: {:?}", String::from_utf8_lossy(&bytes));
            match source.next_row() {
                Ok(Some(raw)) => match Row::parse(raw) {
                    Ok(_) => good += 1,
                    Err(_) => bad += 1,
                },
                Ok(None) => break,
                Err(_) => ended += 1,
            }
        }
        assert!(source.next_row().unwrap().is_none(), "it stays at its end");
    }
    assert!(good > 2000 && bad > 300 && ended > 300, "{good} {bad} {ended}");
}
