//! Packs: their contents, attention boundaries, and unpacked rows.

mod boundaries;
#[path = "../common/mod.rs"]
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

/// A row with a prompt and a response that ends in a stop token; the prompt's tokens have the weight `weight`.
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

/// Rows of many lengths; every third has the prompt of the previous one.
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

/// A row after unpacking: a label on its first token was never a target.
fn without_first_label(mut sample: Sample) -> Sample {
    sample.labels[0] = IGNORE;
    if let Some(weights) = &mut sample.weights {
        weights[0] = 0.0;
    }
    sample.weights = sample.weights.filter(|w| w.iter().any(|w| *w != 0.0 && *w != 1.0));
    sample
}

/// Asserts that every row is in exactly one pack, whole.
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
        // Packs are in the order of their first rows, and rows are in source order.
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
            // Rows have at least two tokens: the held tokens never exceed the window.
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
    // A target with its context: the ids before it in its own row, and its id.
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

    // If they do not fit together, each pack has its own trunk; a single row has none.
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
    // A row that fits nowhere is a separate pack.
    let (packs, fill) =
        Packer::new(4, false).pack([row(0, &[1, 2], &[3, 4, 5], 0.0), row(1, &[1], &[2], 0.0)]);
    assert_eq!(packs.iter().map(of).collect::<Vec<_>>(), [[0], [1]]);
    assert_eq!(fill.rate(), 1.0);
}

/// TRL packs the rows of a batch in the same way, so equal rows give equal packs. The differences: TRL writes a
/// pack's rows from the longest to the shortest and packs in the order they were begun, and it keeps labels on
/// first tokens (its collator masks them where `position_ids` are 0).
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
    // Their packs through our reader, like any file of packs.
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
        // Packs in which TRL's truncation left only prompt are read, have no target, and are left out.
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
    // The rows in a different order from that of their packs.
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

/// The sorted lengths of the rows in each pack, for rows of these lengths.
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

/// TRL's own packer on lengths that fill its tree: as many packs, equally full. (Of packs with equal room it takes
/// the one that has had that room longest; ours takes the first.)
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

/// TRL on this machine, with lengths whose packs are equal row by row.
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
