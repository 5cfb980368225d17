//! Bytes to rows: every layout, every compression, and files with something wrong in the middle.

mod common;

use common::Scratch;
use std::io::Write;
use std::path::Path;
use suasion_data::Result;
use suasion_data::row::Row;
use suasion_data::source::{Layout, Source};

/// All rows: `Ok` with the value of `"n"`, or the error in words. The outer error ends the file.
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
    let contents = [
        ("lines.jsonl", lines.to_string(), Layout::Lines),
        ("no_end.jsonl", lines.trim_end().to_string(), Layout::Lines),
        ("bom.jsonl", format!("\u{feff}{lines}"), Layout::Lines),
        ("crlf.jsonl", lines.replace('\n', "\r\n"), Layout::Lines),
        ("blank.jsonl", format!("\n  \n{}\n\t\n", lines.replace('\n', "\n\n")), Layout::Lines),
        ("named_wrongly.json", lines.to_string(), Layout::Lines),
        ("no_name", lines.to_string(), Layout::Lines),
        ("array.json", format!("[{elements}]"), Layout::Array),
        ("array_bom.json", format!("\u{feff} \n[{elements}\n]\n"), Layout::Array),
        ("array_named_wrongly.jsonl", format!("[{elements}]"), Layout::Array),
        (
            "data.json",
            format!("{{\"version\": [\"[\", {{\"data\": 1}}], \"data\": [{elements}]}}"),
            Layout::Object,
        ),
        (
            "rows.json",
            format!("{{\n \"rows\": [\n{elements}\n ],\n \"more\": {{\"a\": [1]}}\n}}\n"),
            Layout::Object,
        ),
        ("train.json", format!("{{\"train\":[{}]}}", elements.replace('\n', "")), Layout::Object),
    ];
    for (name, content, layout) in &contents {
        let plain = s.file(name, content);
        assert_eq!(Source::open(&plain).unwrap().layout(), *layout, "{name}");
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
    assert!(message("t.txt", b"hello\nthere\n").ends_with("the file is neither JSON nor JSON Lines"));
    assert!(message("x.parquet", b"PAR1\x15\x04").ends_with("Parquet is not supported yet"));
    assert!(message("u.json", b"\xff\xfe{\0").ends_with("the file is UTF-16"));
    let keys = message("k.json", b"{\n \"a\": 1,\n \"b\": []\n}");
    assert!(keys.contains("keys (a, b)"), "{keys}");
    assert!(rows(&s.path("none.jsonl")).unwrap_err().to_string().contains("none.jsonl"));
    assert!(rows(s.dir.path()).unwrap_err().to_string().ends_with("is a folder, not a file of rows"));
    // A damaged gzip stream is an I/O error of the file, after the rows before the damage.
    let mut gz = gzip("{\"n\": 1}\n".repeat(100_000).as_bytes());
    gz.truncate(gz.len() / 2);
    assert!(matches!(rows(&s.file("cut.jsonl.gz", gz)), Err(suasion_data::Error::Io { .. })));
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
    // Longer than the sniffed head and the buffers, with rows across their edges.
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
