//! Packs in rows: their boundaries, audits and views, and packs that are written and read.

use crate::*;

fn read(row: Value) -> Sample {
    let outcome = verify(row, &Policy::default());
    match outcome {
        Outcome::Kept(kept) => kept.sample,
        other => panic!("{other:?}"),
    }
}

fn verify(row: Value, policy: &Policy) -> Outcome {
    let s = Scratch::new();
    let path = s.file("packs.jsonl", row.to_string());
    let tokenizer = byte_tokenizer(true);
    let pipeline = Pipeline { mode: Mode::Verify, ..pipeline_of(Some(&tokenizer), policy) };
    outcomes(&pipeline, &path).0.remove(0)
}

const X: i64 = -100;
const E: i64 = EOS as i64;

#[test]
fn boundaries_are_read_however_they_are_written() {
    let ids = json!([1, 2, E, 3, 4, 5, E]);
    let labels = json!([X, 2, E, X, X, 5, E]);
    let lengths = read(json!({"input_ids": ids, "labels": labels, "seq_lengths": [3, 4]}));
    let positions = read(json!({"input_ids": ids, "labels": labels, "position_ids": [0, 1, 2, 0, 1, 2, 3]}));
    let numbers = read(json!({"input_ids": ids, "labels": labels, "attention_mask": [1, 1, 1, 2, 2, 2, 2]}));
    let ours = read(json!({"rows": [4, 9], "input_ids": ids, "labels": labels, "seq_lengths": [3, 4],
        "position_ids": [0, 1, 2, 0, 1, 2, 3], "origins": "TREKTRE"}));
    for sample in [&lengths, &positions, &numbers, &ours] {
        let pack = sample.pack.as_ref().unwrap();
        assert_eq!(Boundaries::of(pack).seq_lengths, [3, 4]);
        assert_eq!(pack.positions(), [0, 1, 2, 0, 1, 2, 3]);
        assert_eq!(
            sample.targets().collect::<Vec<_>>(),
            [(0, 2, 1.0), (1, EOS, 1.0), (4, 5, 1.0), (5, EOS, 1.0)]
        );
    }
    // Each sequence has its own prompt and response: no turn continues across the boundary.
    assert_eq!(lengths.origins[4], Origin::Prompt { turn: 0, section: Section::Other });
    let numbers: Vec<u64> = ours.pack.as_ref().unwrap().rows.iter().map(|id| id.row).collect();
    assert_eq!(numbers, [4, 9]);
    // Positions without a restart, and a single sequence that is the row, are a single row.
    assert!(
        read(json!({"input_ids": [1, 2, E], "labels": [X, 2, E], "position_ids": [0, 1, 2]})).pack.is_none()
    );
    // Padding at the end belongs to the last sequence, and is removed like other padding.
    let padded = json!({"input_ids": [1, 2, E, 3, 4, 0, 0], "labels": [X, 2, E, X, 4, X, X],
        "seq_lengths": [3, 2], "attention_mask": [1, 1, 1, 1, 1, 0, 0], "position_ids": [0, 1, 2, 0, 1, 0, 1]});
    let s = Scratch::new();
    let path = s.file("packs.jsonl", padded.to_string());
    let (policy, tokenizer) = (Policy::default(), byte_tokenizer(true));
    let (all, _) = outcomes(&pipeline_of(Some(&tokenizer), &policy), &path);
    let sample = &kept(&all, 0).sample;
    assert_eq!(sample.input_ids, [1, 2, EOS, 3, 4]);
    assert_eq!(Boundaries::of(sample.pack.as_ref().unwrap()).seq_lengths, [3, 2]);
}

#[test]
fn boundaries_that_cannot_be_are_p001() {
    let cases = [
        (json!({"rows": [1, 2]}), "it holds 2 rows, but neither"),
        (json!({"seq_lengths": [2, 3]}), "\"seq_lengths\" sum to 5, \"input_ids\" has 4 entries"),
        (json!({"seq_lengths": [2, 1]}), "\"seq_lengths\" sum to 3, \"input_ids\" has 4 entries"),
        (json!({"seq_lengths": [2, 0, 2]}), "\"seq_lengths\"[1] is 0"),
        (json!({"seq_lengths": []}), "sum to 0"),
        (
            json!({"seq_lengths": [2, 2], "position_ids": [0, 1, 2, 3]}),
            "\"position_ids\"[2] is 2, but token 2 is at position 0",
        ),
        (json!({"position_ids": [0, 1, 5, 6]}), "\"position_ids\"[2] is 5"),
        (json!({"position_ids": [0, 1, 0, 7]}), "\"position_ids\"[3] is 7"),
        (json!({"attention_mask": [1, 2, 1, 1]}), "\"attention_mask\"[2] goes back from sequence 2 to 1"),
        (
            json!({"seq_lengths": [2, 2], "attention_mask": [1, 2, 2, 2]}),
            "starts a sequence within tokens 0 to 1",
        ),
        (
            json!({"rows": [1, 2, 3], "seq_lengths": [2, 2]}),
            "\"rows\" names 3 rows, and the boundaries make 2",
        ),
        (json!({"seq_lengths": [2, 2], "prefix_ranges": [[0, 0]]}), "1 entries for 2 sequences"),
        (
            json!({"seq_lengths": [2, 2], "prefix_ranges": [[0, 0], [0, 1]]}),
            "is 0..1, which is not an earlier sequence",
        ),
        (
            json!({"seq_lengths": [2, 2], "prefix_ranges": [[2, 4], [0, 0]]}),
            "is 2..4, which is not an earlier sequence",
        ),
        (
            json!({"seq_lengths": [1, 1, 2], "prefix_ranges": [[0, 0], [0, 1], [1, 2]]}),
            "is 1..2, which is not an earlier",
        ),
        (json!({"prefix_ranges": [[0, 0]]}), "no \"seq_lengths\""),
    ];
    for (fields, message) in cases {
        let mut row = json!({"input_ids": [1, 2, 3, E], "labels": [X, 2, X, E]});
        row.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        // In every mode: such a row has no valid meaning.
        let Outcome::Failed { findings, error, .. } = verify(row.clone(), &Policy::default()) else {
            panic!("{row}")
        };
        assert_eq!(findings[0].code, Code::P001, "{row}");
        assert!(findings[0].message.contains(message), "{row}: {}", findings[0].message);
        assert!(error.to_string().contains("P001") && error.help().is_some());
    }
}

/// The check of a row of a hundred thousand sequences is not quadratic.
#[test]
fn many_short_sequences_are_read() {
    const N: u32 = 100_000;
    // Prompts and answers of one token each, all prompts first.
    let prefixes: Vec<[u32; 2]> =
        (0..N).map(|i| if i < N / 2 { [0, 0] } else { [i - N / 2, i - N / 2 + 1] }).collect();
    let labels: Vec<i64> = (0..N).map(|i| if i < N / 2 { X } else { 1 }).collect();
    let sample = read(json!({"input_ids": vec![1; N as usize], "labels": labels,
        "seq_lengths": vec![1; N as usize], "prefix_ranges": prefixes}));
    let pack = sample.pack.as_ref().unwrap();
    assert_eq!((pack.rows.len(), pack.segments.len()), (N as usize / 2, N as usize));
    assert!(pack.segments.iter().take(N as usize / 2).all(|segment| segment.branches == 1));
    assert_eq!(Boundaries::of(pack).position_ids[N as usize / 2 - 1..][..2], [0, 1]);
    let rows = sample.unpack();
    assert!(rows.len() == N as usize / 2 && rows.iter().all(|row| row.len() == 2));
}

#[test]
fn a_label_across_a_boundary_is_p001_and_no_target() {
    let row = json!({"input_ids": [1, 2, E, 3, 4, E], "labels": [1, 2, E, 3, 4, E], "seq_lengths": [3, 3],
        "origins": "RRERRE"});
    let outcome = verify(row.clone(), &Policy::default());
    assert_eq!(codes(&outcome), ["P001:e"]);
    let message = &outcome.findings()[0].message;
    assert!(message.starts_with("token 3 (\"\\u{3}\") supervised across the boundary"), "{message}");
    let targets: Vec<u32> = read(row).targets().map(|(at, ..)| at).collect();
    assert_eq!(targets, [0, 1, 3, 4]);
    // After a shared prompt the first token is a target of the prompt's last row.
    let shared = json!({"input_ids": [1, 2, 3, E, 4, E], "labels": [X, X, 3, E, 4, E], "seq_lengths": [2, 2, 2],
        "prefix_ranges": [[0, 0], [0, 2], [0, 2]], "rows": [0, 1], "origins": "TTRERE",
        "position_ids": [0, 1, 2, 3, 2, 3]});
    assert_eq!(codes(&verify(shared.clone(), &Policy::default())), [""; 0]);
    let targets: Vec<(u32, u32)> = read(shared.clone()).targets().map(|(at, id, _)| (at, id)).collect();
    assert_eq!(targets, [(1, 3), (2, EOS), (1, 4), (4, EOS)]);
    // All tokens: none across a boundary, and a shared one once for each of its rows.
    let all = Policy { objective: Objective::AllTokens, ..Policy::default() };
    let Outcome::Kept(kept) = verify(shared, &all) else { panic!() };
    assert_eq!(kept.sample.labels, [IGNORE, 2, 3, EOS as i32, 4, EOS as i32]);
    assert_eq!(kept.sample.weights, Some(vec![0.0, 2.0, 1.0, 1.0, 1.0, 1.0]));
}

#[test]
fn audits_look_at_each_sequence() {
    // The second sequence lacks its stop token, the third has no target, the fourth starts with two BOS.
    let row = json!({"input_ids": [1, 2, E, 3, 4, 5, 6, 257, 257, 7, E], "completion_mask": [0, 1, 1, 0, 1, 0, 0, 0, 0, 1, 1],
        "seq_lengths": [3, 2, 2, 4]});
    let outcome = verify(row, &Policy::default());
    assert_eq!(codes(&outcome), ["M002:e", "M001:e", "M006:e"]);
    let sequences: Vec<&str> =
        outcome.findings().iter().map(|f| f.message.split(':').next().unwrap()).collect();
    assert_eq!(sequences, ["sequence 1", "sequence 2", "sequence 3"]);
    assert!(outcome.findings().iter().all(|f| f.row == 0));
}

#[test]
fn views_show_where_sequences_begin() {
    let view = |row: Value| {
        let Outcome::Kept(kept) = verify(row, &Policy::default()) else { panic!() };
        RowView::new(&kept, None)
    };
    let begins = |view: &RowView| {
        let runs = view.runs.iter().filter_map(|run| Some((run.begins.clone()?, run.tokens[0].index)));
        runs.collect::<Vec<_>>()
    };
    let shared = view(
        json!({"rows": [7, 9, 12], "input_ids": [1, 2, 3, E, 4, E, 1, E], "labels": [X, X, 3, E, 4, E, X, E],
        "seq_lengths": [2, 2, 2, 2], "prefix_ranges": [[0, 0], [0, 2], [0, 2], [0, 0]], "origins": "TTRERETE"}),
    );
    let expected = [
        ("a prompt that 2 sequences share", 0),
        ("sequence 0 (row 7), after the prompt at token 0", 2),
        ("sequence 1 (row 9), after the prompt at token 0", 4),
        ("sequence 2 (row 12)", 6),
    ];
    assert_eq!(begins(&shared), expected.map(|(words, at)| (words.to_string(), at)));
    let text = report::terminal::row(&shared, &report::terminal::Style::default());
    assert!(text.contains("\n-- sequence 1 (row 9), after the prompt at token 0\n"), "{text}");
    // Adjacent tokens of one origin are two runs if a boundary lies between them.
    let foreign = view(
        json!({"input_ids": [1, 2, 3, 4], "labels": [X, 2, X, 4], "seq_lengths": [2, 2], "origins": "RRRR"}),
    );
    assert_eq!(begins(&foreign), [("sequence 0".to_string(), 0), ("sequence 1".to_string(), 2)]);
}

#[test]
fn packs_written_and_read_are_the_same() {
    for (share, weight) in [(false, 0.0), (true, 0.0), (true, 0.5)] {
        let rows = rows(60, 50, weight);
        let (packs, _) = Packer::new(80, share).pack(rows);
        let mut out = Vec::new();
        for pack in &packs {
            Record::of(pack, None).write_json(&mut out);
        }
        let s = Scratch::new();
        let path = s.file("packs.jsonl", &out);
        let read = prepared::read(&path, &Policy::default()).unwrap();
        assert_eq!(read.len(), packs.len());
        for (read, pack) in read.iter().zip(&packs) {
            assert_eq!(
                (&read.input_ids, &read.labels, &read.weights),
                (&pack.input_ids, &pack.labels, &pack.weights)
            );
            let (ours, theirs) = (pack.pack.as_ref().unwrap(), read.pack.as_ref().unwrap());
            assert_eq!(ours.segments, theirs.segments);
            assert_eq!(Boundaries::of(ours), Boundaries::of(theirs));
            let letters = |sample: &Sample| sample.origins.iter().map(|o| o.letter()).collect::<String>();
            assert_eq!(letters(read), letters(pack));
        }
    }
}

#[test]
fn counts_are_those_of_the_rows() {
    let rows = rows(300, 60, 0.5);
    let separate = Summary::of(&rows);
    for share in [false, true] {
        let (packs, fill) = Packer::new(128, share).pack(rows.clone());
        let packed = Summary::of(&packs);
        assert_eq!(packed.tokens, fill.tokens);
        for (name, stats) in separate.sections() {
            let theirs = packed.sections[name];
            assert_eq!(stats.targets_before, theirs.targets_before, "{name}");
            assert!((stats.weight_after - theirs.weight_after).abs() < 1e-6, "{name}");
        }
    }
}

#[test]
fn a_pack_is_not_cut() {
    let row = json!({"input_ids": [1, 2, E, 3, 4, E], "labels": [X, 2, E, X, 4, E], "seq_lengths": [3, 3]});
    let s = Scratch::new();
    let path = s.file("packs.jsonl", row.to_string());
    let tokenizer = byte_tokenizer(true);
    let run = |max| {
        let policy = Policy { max_length: Some(max), ..Policy::default() };
        outcomes(&Pipeline { mode: Mode::Verify, ..pipeline_of(Some(&tokenizer), &policy) }, &path);
        pipeline_of(Some(&tokenizer), &policy).samples(&path)
    };
    // Longer than max_length, but none of its rows is.
    assert_eq!(run(3).unwrap().0[0].len(), 6);
    let error = run(2).unwrap_err().to_string();
    assert!(error.contains("a row of the pack has 3 tokens, max_length is 2"), "{error}");
    // A packer returns a pack unchanged.
    let pack = run(3).unwrap().0.remove(0);
    assert_eq!(Packer::new(4, false).pack([pack.clone()]).0, [pack]);
}
