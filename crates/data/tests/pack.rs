//! Packs: what is in them, who sees whom, and the rows that come back out.

mod common;

use common::{EOS, Goldens, Scratch, byte_tokenizer, codes, goldens, kept, outcomes, pipeline_of};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use suasion_data::pack::Packer;
use suasion_data::prepared::{Boundaries, Record};
use suasion_data::report::{self, RowView};
use suasion_data::{
    Code, IGNORE, Mode, Objective, Origin, Outcome, Pipeline, Policy, RowId, Sample, Section, Summary,
    prepared,
};

/// Knuth's MMIX generator.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }
}

fn prompt() -> Origin {
    Origin::Prompt { turn: 0, section: Section::Task }
}

/// A row of a prompt and a response that ends in a stop token; the prompt's tokens weigh `weight`.
fn row(number: u64, prompt_ids: &[u32], response: &[u32], weight: f32) -> Sample {
    let input_ids: Vec<u32> = prompt_ids.iter().chain(response).copied().chain([EOS]).collect();
    let origins: Vec<Origin> = (0..input_ids.len())
        .map(|i| match i {
            i if i < prompt_ids.len() => prompt(),
            i if i + 1 < input_ids.len() => Origin::Response { turn: 1 },
            _ => Origin::EndOfTurn { turn: 1 },
        })
        .collect();
    let weights: Vec<f32> = origins.iter().map(|o| if o.supervised() { 1.0 } else { weight }).collect();
    Sample {
        id: RowId {
            file: Arc::from(Path::new("rows.jsonl")),
            row: number,
            line: Some(number + 1),
            in_file: number,
        },
        labels: input_ids
            .iter()
            .zip(&weights)
            .map(|(&id, w)| if *w == 0.0 { IGNORE } else { id as i32 })
            .collect(),
        input_ids,
        origins,
        weights: Some(weights).filter(|w| w.iter().any(|w| *w != 0.0 && *w != 1.0)),
        pack: None,
    }
}

/// Rows of many lengths; every third has the prompt of the one before it.
fn rows(n: u64, longest: usize, weight: f32) -> Vec<Sample> {
    let mut numbers = Numbers(n ^ 0x5eed);
    let mut last: Vec<u32> = Vec::new();
    (0..n)
        .map(|number| {
            if number % 3 != 1 {
                last = (0..1 + numbers.below(longest / 2)).map(|_| numbers.below(250) as u32).collect();
            }
            let room = longest - last.len();
            let response: Vec<u32> =
                (0..1 + numbers.below(room - 1)).map(|_| numbers.below(250) as u32).collect();
            row(number, &last, &response, weight)
        })
        .collect()
}

/// A row as it comes out of a pack: a label on its first token was never a target.
fn without_first_label(mut sample: Sample) -> Sample {
    sample.labels[0] = IGNORE;
    if let Some(weights) = &mut sample.weights {
        weights[0] = 0.0;
    }
    sample.weights = sample.weights.filter(|w| w.iter().any(|w| *w != 0.0 && *w != 1.0));
    sample
}

/// Every row is in exactly one pack, whole; returns the rows in their order.
fn assert_packs(packs: &[Sample], rows: &[Sample], capacity: usize) {
    let mut seen: BTreeMap<u64, Sample> = BTreeMap::new();
    for pack in packs {
        assert!(pack.len() <= capacity);
        assert!(!pack.origins.contains(&Origin::Padding));
        let boundaries = pack.pack.as_ref().unwrap();
        assert_eq!(boundaries.segments.last().unwrap().own.end as usize, pack.len());
        let unpacked = pack.unpack();
        assert_eq!(unpacked.len(), pack.rows());
        for row in unpacked {
            let number = row.id.row;
            assert!(seen.insert(number, row).is_none(), "row {number} is there twice");
        }
    }
    let expected: Vec<Sample> = rows.iter().cloned().map(without_first_label).collect();
    let found: Vec<Sample> = seen.into_values().collect();
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(found, expected);
    }
}

#[test]
fn every_row_comes_out_whole() {
    for (share, weight) in [(false, 0.0), (true, 0.0), (false, 0.5), (true, 0.5), (true, 1.0)] {
        let rows = rows(400, 50, weight);
        let total: usize = rows.iter().map(Sample::len).sum();
        let (packs, fill) = Packer::new(128, share).pack(rows.clone());
        assert_packs(&packs, &rows, 128);
        let tokens: usize = packs.iter().map(Sample::len).sum();
        assert_eq!((fill.rows, fill.packs, fill.tokens), (400, packs.len() as u64, tokens as u64));
        assert_eq!(fill.rate(), tokens as f64 / (packs.len() * 128) as f64);
        assert_eq!(tokens < total, share, "a shared prompt stands once");
        assert!(fill.rate() > 0.98, "{}", fill.rate());
        // Packs follow their first rows, and rows stand in source order.
        let firsts: Vec<u64> = packs.iter().map(|pack| pack.id.row).collect();
        assert!(firsts.is_sorted());
        if !share {
            assert!(packs.iter().all(|p| p.pack.as_ref().unwrap().rows.iter().map(|id| id.row).is_sorted()));
        }
        assert_eq!(packs, Packer::new(128, share).pack(rows).0, "the same rows make the same packs");
    }
}

#[test]
fn a_window_bounds_what_is_held_and_loses_nothing() {
    let rows = rows(600, 60, 0.0);
    for share in [false, true] {
        let whole = Packer::new(96, share).pack(rows.clone()).1;
        let mut packer = Packer::new(96, share).with_window(1000);
        let (mut packs, mut given, mut taken) = (Vec::new(), 0, 0);
        for row in &rows {
            taken += 1;
            packs.extend(packer.push(row.clone()));
            given += packs.len() - given;
            let held: usize = taken - packs.iter().map(Sample::rows).sum::<usize>();
            // Rows have at least two tokens: what is held never exceeds the window.
            assert!(held <= 500, "{held} rows held");
        }
        assert!(given > packs.len() / 2, "packs come out before the end");
        let (last, fill) = packer.finish();
        packs.extend(last);
        assert_packs(&packs, &rows, 96);
        assert!(fill.packs >= whole.packs && fill.packs <= whole.packs * 11 / 10, "{fill:?} {whole:?}");
    }
}

#[test]
fn targets_are_those_of_the_rows() {
    // A target by what predicts it: the ids before it in its own row, and itself.
    type Target = (Vec<u32>, u32);
    let of = |sample: &Sample| -> Vec<(Target, f32)> {
        let targets =
            sample.targets().map(|(at, id, w)| ((sample.input_ids[..=at as usize].to_vec(), id), w));
        targets.collect()
    };
    for (share, weight) in [(false, 0.0), (true, 0.0), (true, 0.5), (true, 1.0)] {
        let rows = rows(200, 70, weight);
        let mut expected: BTreeMap<Target, f32> = BTreeMap::new();
        rows.iter().flat_map(of).for_each(|(target, w)| *expected.entry(target).or_default() += w);
        let mut found: BTreeMap<Target, f32> = BTreeMap::new();
        for pack in Packer::new(100, share).pack(rows).0 {
            let boundaries = pack.pack.as_ref().unwrap();
            for (at, id, w) in pack.targets() {
                let segment = boundaries.segments.iter().find(|s| s.own.contains(&at)).unwrap();
                let seen = segment.prefix.clone().chain(segment.own.start..at + 1);
                let before: Vec<u32> = seen.map(|i| pack.input_ids[i as usize]).collect();
                *found.entry((before, id)).or_default() += w;
            }
        }
        assert_eq!(found, expected, "share {share}, prompt weight {weight}");
    }
}

#[test]
fn a_shared_prompt_stands_once() {
    let prompt = [1, 2, 3, 4];
    let rows: Vec<Sample> =
        [&[10, 11][..], &[20], &[30, 31, 32]].iter().zip(0..).map(|(r, n)| row(n, &prompt, r, 0.5)).collect();
    let (packs, _) = Packer::new(64, true).pack(rows.clone());
    let [pack] = packs.as_slice() else { panic!("{} packs", packs.len()) };
    assert_eq!(pack.input_ids, [1, 2, 3, 4, 10, 11, EOS, 20, EOS, 30, 31, 32, EOS]);
    assert_eq!(pack.labels[..5], [IGNORE, 2, 3, 4, 10]);
    assert_eq!(pack.weights.as_ref().unwrap()[..5], [0.0, 1.5, 1.5, 1.5, 1.0], "half, three times");
    let columns = Boundaries::of(pack.pack.as_ref().unwrap());
    assert_eq!(columns.rows, [0, 1, 2]);
    assert_eq!(columns.seq_lengths, [4, 3, 2, 4]);
    assert_eq!(columns.position_ids, [0, 1, 2, 3, 4, 5, 6, 4, 5, 4, 5, 6, 7]);
    assert_eq!(columns.prefix_ranges, Some(vec![0..0, 0..4, 0..4, 0..4]));
    // The prompt's last row predicts the first token of each response.
    let firsts: Vec<u32> = pack.targets().filter(|(at, ..)| *at == 3).map(|(_, id, _)| id).collect();
    assert_eq!(firsts, [10, 20, 30]);
    assert_eq!(pack.longest_row(), 8);

    // Where they do not fit together each pack has its own trunk; what is left alone has none.
    let (packs, _) = Packer::new(9, true).pack(rows.clone());
    let lengths: Vec<Vec<u32>> =
        packs.iter().map(|p| Boundaries::of(p.pack.as_ref().unwrap()).seq_lengths).collect();
    assert_eq!(lengths, [vec![4, 3, 2], vec![8]]);

    // A prompt with other origins, labels or weights is another prompt; so is one without text.
    let mut other = rows.clone();
    other[1].origins[0] = Origin::Scaffold;
    other[2] = row(2, &prompt, &[30, 31, 32], 0.25);
    let bare: Vec<Sample> = (0..2)
        .map(|n| {
            let mut row = row(n, &[1], &[5, 6], 0.0);
            row.origins[0] = Origin::Scaffold;
            row
        })
        .collect();
    for rows in [other, bare] {
        let (packs, _) = Packer::new(64, true).pack(rows);
        assert!(packs.iter().all(|p| p.pack.as_ref().unwrap().segments.iter().all(|s| s.branches == 0)));
    }
}

#[test]
fn best_fit_decreasing_by_hand() {
    // Decreasing: 7, 5, 4, 3, 3, 2. Into 10: 7; 5; 4 beside 5 (room 1); 3 beside 7 (full); 3 alone; 2 beside it.
    let lengths = [3usize, 7, 2, 4, 5, 3];
    let rows: Vec<Sample> =
        lengths.iter().zip(0..).map(|(&n, number)| row(number, &[9], &vec![8; n - 2], 0.0)).collect();
    let (packs, fill) = Packer::new(10, false).pack(rows);
    let of = |p: &Sample| p.pack.as_ref().unwrap().rows.iter().map(|id| id.row).collect::<Vec<_>>();
    assert_eq!(packs.iter().map(of).collect::<Vec<_>>(), [vec![0, 1], vec![2, 5], vec![3, 4]]);
    assert_eq!((fill.tokens, fill.packs), (24, 3));
    // A row that fits nowhere is by itself.
    let (packs, fill) =
        Packer::new(4, false).pack([row(0, &[1, 2], &[3, 4, 5], 0.0), row(1, &[1], &[2], 0.0)]);
    assert_eq!(packs.iter().map(of).collect::<Vec<_>>(), [[0], [1]]);
    assert_eq!(fill.rate(), 1.0);
}

/// TRL packs the rows of a batch in the same way, so from the same rows come the same packs. What differs: TRL writes a
/// pack's rows from the longest to the shortest and packs as they were begun, and it keeps labels on first tokens
/// (its collator masks them where `position_ids` are 0).
#[test]
fn packs_are_trls() {
    goldens().iter().for_each(packs_equal);
}

fn packs_equal(folder: &Goldens) {
    let golden: Vec<Value> = folder
        .lines("goldens/trl.jsonl")
        .into_iter()
        .filter(|row| row["case"] == "qwen2_5/pc_text_pack_bfd")
        .collect();
    // Their packs through our reader, as any file of packs.
    let s = Scratch::new();
    let lines: Vec<String> = golden
        .iter()
        .map(|pack| {
            let mut mask = Vec::new();
            for (i, run) in pack["sup_rle"].as_array().unwrap().iter().enumerate() {
                mask.extend(std::iter::repeat_n(i % 2, run.as_u64().unwrap() as usize));
            }
            json!({"input_ids": pack["input_ids"], "seq_lengths": pack["seq_lengths"], "completion_mask": mask}).to_string()
        })
        .collect();
    let path = s.file("packs.jsonl", lines.join("\n"));
    let policy = Policy { max_length: Some(512), ..Policy::default() };
    let pipeline = Pipeline { mode: Mode::Verify, ..pipeline_of(None, &policy) };
    let (all, _) = outcomes(&pipeline, &path);
    let mut rows: Vec<Sample> = Vec::new();
    let mut expected: Vec<Vec<Vec<u32>>> = Vec::new();
    for (outcome, golden) in all.iter().zip(&golden) {
        let ids: Vec<u32> = serde_json::from_value(golden["input_ids"].clone()).unwrap();
        let lengths: Vec<usize> = serde_json::from_value(golden["seq_lengths"].clone()).unwrap();
        let mut sequences = Vec::new();
        let mut at = 0;
        for length in lengths {
            sequences.push(ids[at..at + length].to_vec());
            at += length;
        }
        // Packs of which TRL's truncation left only prompt are read, found to be without a target, and left out.
        match outcome {
            Outcome::Kept(kept) => {
                let unpacked = kept.sample.unpack();
                assert_eq!(unpacked.iter().map(|row| row.input_ids.clone()).collect::<Vec<_>>(), sequences);
                rows.extend(unpacked);
                expected.push(sequences);
            }
            Outcome::Dropped { .. } => assert!(golden["sup_rle"].as_array().unwrap().len() == 1),
            Outcome::Failed { error, .. } => panic!("{error}"),
        }
    }
    assert!(rows.len() > folder.expect(20, 25));
    // The rows in another order than that of their packs.
    rows.sort_by_key(|row| (row.len() % 7, row.input_ids.clone()));
    rows.iter_mut().zip(0..).for_each(|(row, number)| row.id.row = number);
    let (packs, fill) = Packer::new(512, false).pack(rows);
    let sorted = |mut rows: Vec<usize>| {
        rows.sort_unstable();
        rows
    };
    let mut ours: Vec<Vec<usize>> =
        packs.iter().map(|p| sorted(p.unpack().iter().map(Sample::len).collect())).collect();
    let mut theirs: Vec<Vec<usize>> =
        expected.iter().map(|p| sorted(p.iter().map(Vec::len).collect())).collect();
    ours.sort();
    theirs.sort();
    assert_eq!(ours, theirs);
    assert_eq!(fill.packs, expected.len() as u64);
}

/// The lengths of the rows of each pack, sorted, of rows of these lengths.
fn packed_lengths(lengths: &[usize]) -> Vec<Vec<usize>> {
    let rows = lengths.iter().zip(0..).map(|(&n, number)| row(number, &[1], &vec![2; n - 2], 0.0));
    let (packs, _) = Packer::new(512, false).pack(rows);
    sorted(packs.iter().map(|pack| pack.unpack().iter().map(Sample::len).collect()).collect())
}

fn sorted(mut packs: Vec<Vec<usize>>) -> Vec<Vec<usize>> {
    packs.iter_mut().for_each(|pack| pack.sort_unstable());
    packs.sort();
    packs
}

/// TRL's own packer on lengths that fill its tree: as many packs, filled alike. (Of packs with equal room it takes the one
/// that has had it longest, ours the first.)
#[test]
fn packs_of_many_lengths_are_filled_as_trls() {
    let golden = Goldens::repository().json("goldens/packs.json");
    let lengths: Vec<usize> = serde_json::from_value(golden["lengths"].clone()).unwrap();
    let theirs: Vec<Vec<usize>> = serde_json::from_value(golden["seq_lengths"].clone()).unwrap();
    let fill = |packs: &[Vec<usize>]| {
        let mut fill: Vec<usize> = packs.iter().map(|pack| pack.iter().sum()).collect();
        fill.sort_unstable();
        fill
    };
    assert_eq!(fill(&packed_lengths(&lengths)), fill(&theirs));
}

/// The TRL of this machine, on lengths whose packs are the same to the row.
#[test]
fn packs_are_as_many_as_trls() {
    let Some(python) = suasion_test_support::peers_python() else { return };
    let mut numbers = Numbers(3);
    let lengths: Vec<usize> = (0..4000).map(|_| 2 + numbers.below(60) * numbers.below(16)).collect();
    let lengths: Vec<usize> = lengths.into_iter().map(|n| n.min(512)).collect();
    let script = format!(
        "from trl import pack_dataset\nfrom datasets import Dataset\nimport json\n\
         d = Dataset.from_dict({{'input_ids': [[0] * n for n in {lengths:?}]}})\n\
         p = pack_dataset(d, 512, 'bfd', {{'batch_size': 4000}})\nprint('PACKS', json.dumps(p['seq_lengths'][:]))"
    );
    let out = std::process::Command::new(python).args(["-c", &script]).output().unwrap();
    let stdout = String::from_utf8_lossy(&out.stdout);
    let Some(json) = stdout.lines().find_map(|line| line.strip_prefix("PACKS ")) else {
        panic!("{}", String::from_utf8_lossy(&out.stderr));
    };
    assert_eq!(packed_lengths(&lengths), sorted(serde_json::from_str(json).unwrap()));
}

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
    // Each sequence has its own prompt and response: no turn goes on across the boundary.
    assert_eq!(lengths.origins[4], Origin::Prompt { turn: 0, section: Section::Other });
    let numbers: Vec<u64> = ours.pack.as_ref().unwrap().rows.iter().map(|id| id.row).collect();
    assert_eq!(numbers, [4, 9]);
    // Positions without a restart, and one sequence that is the row, are a row by itself.
    assert!(
        read(json!({"input_ids": [1, 2, E], "labels": [X, 2, E], "position_ids": [0, 1, 2]})).pack.is_none()
    );
    // Padding at the end belongs to the last sequence, and goes where padding goes.
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
        // In every mode: such a row has no meaning that could be trained on.
        let Outcome::Failed { findings, error, .. } = verify(row.clone(), &Policy::default()) else {
            panic!("{row}")
        };
        assert_eq!(findings[0].code, Code::P001, "{row}");
        assert!(findings[0].message.contains(message), "{row}: {}", findings[0].message);
        assert!(error.to_string().contains("P001") && error.help().is_some());
    }
}

/// A row of a hundred thousand sequences is checked without looking at all of them for each.
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
    // All tokens: none across a boundary, and a shared one as often as rows have it.
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
    // Neighbours of one origin are two runs where a boundary lies between them.
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
    // Longer than max_length, made of rows that are not.
    assert_eq!(run(3).unwrap().0[0].len(), 6);
    let error = run(2).unwrap_err().to_string();
    assert!(error.contains("a row of the pack has 3 tokens, max_length is 2"), "{error}");
    // A packer hands a pack on.
    let pack = run(3).unwrap().0.remove(0);
    assert_eq!(Packer::new(4, false).pack([pack.clone()]).0, [pack]);
}
