//! Packs in the layout of LLaMA-Factory and axolotl, made by their own code
//! (`tests/goldens/generate/make_packers.py`): each sequence is audited separately, padding is padding, and packs
//! whose samples may attend to each other are reported.

mod common;

use common::{Goldens, codes};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use suasion_data::template::ChatTemplate;
use suasion_data::{Kept, Mode, ModelFolder, Outcome, Pipeline, Policy};

/// The rows that were packed, and the packs: their program, their settings, and the row.
fn packs(goldens: &Goldens) -> (Vec<Value>, Vec<(String, String, Value)>) {
    let mut lines = goldens.lines("goldens/packers.jsonl").into_iter();
    let sources = lines.next().unwrap()["rows"].as_array().unwrap().clone();
    let text = |value: &Value| value.as_str().unwrap().to_string();
    (sources, lines.map(|line| (text(&line["peer"]), text(&line["settings"]), line["row"].clone())).collect())
}

fn fields(row: &Value) -> Map<String, Value> {
    row.as_object().unwrap().clone()
}

/// With or without the tokenizer and the chat template that the rows were made with.
fn pipeline(goldens: &Goldens, mode: Mode, bare: bool) -> Pipeline {
    let policy = Policy { max_length: None, ..Policy::default() };
    if bare {
        return Pipeline { mode, ..Pipeline::new(ModelFolder::default(), policy) };
    }
    let file = goldens.dir.join("tokenizers/qwen2_5/tokenizer.json");
    let config = json!({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}).to_string();
    let bytes = std::fs::read(file).unwrap();
    let tokenizer = suasion_data::tokens::Tokenizer::from_bytes(&bytes, Some(config.as_bytes())).unwrap();
    let mut folder = ModelFolder::from(Arc::new(tokenizer));
    let template = ChatTemplate::new(&goldens.text("templates/tools.jinja"), None, Some("<|im_end|>"));
    folder.template = Some(Arc::new(template.unwrap()));
    Pipeline { mode, ..Pipeline::new(folder, policy) }
}

fn kept(pipeline: &Pipeline, row: &Value) -> (Kept, Vec<String>) {
    let outcome = pipeline.row(fields(row)).unwrap();
    let found = codes(&outcome);
    match outcome {
        Outcome::Kept(kept) => (kept, found),
        other => panic!("{other:?}"),
    }
}

#[test]
fn packs_of_other_programs_are_read_as_their_rows() {
    let goldens = Goldens::repository();
    let (sources, packs) = packs(&goldens);
    for bare in [false, true] {
        let verify = pipeline(&goldens, Mode::Verify, bare);
        // The findings of the single rows: the training template supervises the line end after a stop token.
        let mut alone: Vec<String> = sources.iter().flat_map(|row| kept(&verify, row).1).collect();
        alone.dedup();
        assert_eq!(alone, if bare { vec![] } else { vec!["M007:w"] });
        let mut warned = 0;
        for (peer, settings, row) in &packs {
            let what = format!("{peer} {settings}, bare: {bare}");
            let (kept, found) = kept(&verify, row);
            let sequences = kept.sample.unpack();
            for sequence in &sequences {
                let real: Vec<usize> = (0..sequence.len())
                    .filter(|&i| sequence.origins[i] != suasion_data::Origin::Padding)
                    .collect();
                let ids: Vec<u32> = real.iter().map(|&i| sequence.input_ids[i]).collect();
                let labels: Vec<i32> = real.iter().map(|&i| sequence.labels[i]).collect();
                let source = sources.iter().find(|source| source["input_ids"] == json!(ids));
                let source = source.unwrap_or_else(|| panic!("{what}: {} tokens of no row", ids.len()));
                assert_eq!(source["labels"], json!(labels), "{what}");
            }
            // LLaMA-Factory without neat_packing counts the padding as tokens: its samples attend to each other. A
            // pack of one has no other sample.
            let sees = settings == "packing" && sequences.len() > 1;
            warned += u32::from(sees);
            let mut expected: Vec<String> = sequences.iter().flat_map(|_| alone.clone()).collect();
            expected.extend(sees.then(|| "P001:w".to_string()));
            assert_eq!(found, expected, "{what}: {:?}", kept.findings);
        }
        assert_eq!((packs.len(), warned), (9, 2));
    }
}

#[test]
fn padding_that_no_mask_tells_is_left_out_of_training() {
    let goldens = Goldens::repository();
    let (sources, packs) = packs(&goldens);
    let prepare = pipeline(&goldens, Mode::Prepare, true);
    let length = |row: &Value| row["input_ids"].as_array().unwrap().len();
    let known: Vec<usize> = sources.iter().map(length).collect();
    for (peer, settings, row) in &packs {
        let sample = kept(&prepare, row).0.sample;
        let parts: Vec<usize> = sample.unpack().iter().map(suasion_data::Sample::len).collect();
        assert!(parts.iter().all(|part| known.contains(part)), "{peer} {settings}: {parts:?} of {known:?}");
        assert_eq!(sample.len(), parts.iter().sum::<usize>());
    }
    // A single supervised token at position 0 is a sequence, not padding.
    let row = json!({"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "position_ids": [0, 1, 0]});
    assert_eq!(kept(&prepare, &row).0.sample.unpack().len(), 2);
    let masked = json!({"input_ids": [5, 6, 7], "labels": [-100, 6, -100], "position_ids": [0, 1, 0]});
    assert_eq!(kept(&prepare, &masked).0.sample.input_ids, [5, 6]);
}
