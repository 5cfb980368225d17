//! Sampling against filters computed by hand, and the cache against full forward passes.

use crate::common::*;
use std::ops::ControlFlow;
use suasion_engine::Batch;
use suasion_train::generate::{Request, budget_of, generate_batch, generate_with};
use suasion_train::logits::{argmax, draw, filter, penalise};
use suasion_train::{Error, Sampling, Stopped, generate, prompt_ids};

/// Logits of these probabilities, in a mixed order.
const PROBABILITIES: [f64; 6] = [0.10, 0.40, 0.05, 0.20, 0.22, 0.03];

fn logits() -> Vec<f32> {
    PROBABILITIES.map(|p| p.ln() as f32).to_vec()
}

fn kept(sampling: Sampling) -> Vec<usize> {
    let mut logits = logits();
    filter(&mut logits, &sampling);
    (0..logits.len()).filter(|&id| logits[id] > f32::NEG_INFINITY).collect()
}

#[test]
fn filters_keep_what_transformers_keeps() {
    let s = Sampling::default;
    assert_eq!(kept(s()), [0, 1, 2, 3, 4, 5]);
    assert_eq!(kept(Sampling { top_k: 2, ..s() }), [1, 4]);
    assert_eq!(kept(Sampling { top_k: 99, ..s() }), [0, 1, 2, 3, 4, 5]);
    // 0.40 + 0.22 = 0.62 < 0.7 ≤ 0.82.
    assert_eq!(kept(Sampling { top_p: 0.7, ..s() }), [1, 3, 4]);
    assert_eq!(kept(Sampling { top_p: 0.39, ..s() }), [1]);
    assert_eq!(kept(Sampling { top_p: 0.0, ..s() }), [1], "at least one token stays");
    // At least 0.3 of 0.40.
    assert_eq!(kept(Sampling { min_p: 0.3, ..s() }), [1, 3, 4]);
    assert_eq!(kept(Sampling { min_p: 1.0, ..s() }), [1]);
    // top-k first: 0.40 and 0.22 of the remaining 0.62 are 0.645 and 0.355, so 0.6 is reached by the first
    // alone.
    assert_eq!(kept(Sampling { top_k: 2, top_p: 0.6, ..s() }), [1]);
    assert_eq!(kept(Sampling { top_p: 0.6, ..s() }), [1, 4], "without top-k it takes two");
    // Temperature first: at 0.5 the probabilities are squared, 0.16 of 0.2618 is 0.611.
    assert_eq!(kept(Sampling { temperature: 0.5, top_p: 0.6, ..s() }), [1]);
    // Tokens as likely as the k-th stay, as with the threshold of torch.topk.
    let mut equal = vec![1.0, 2.0, 1.0, 0.0];
    filter(&mut equal, &Sampling { top_k: 2, ..s() });
    assert_eq!(equal, [1.0, 2.0, 1.0, f32::NEG_INFINITY]);
}

#[test]
fn draws_follow_the_distribution() {
    assert_eq!(argmax(&[0.0, 3.0, 3.0, 1.0]), 1, "the lowest id among equals");
    // Cumulative: 0.10, 0.50, 0.55, 0.75, 0.97, 1.
    let logits = logits();
    let drawn = [0.0, 0.09, 0.11, 0.49, 0.51, 0.56, 0.74, 0.76, 0.96, 0.98].map(|point| draw(&logits, point));
    assert_eq!(drawn, [0, 0, 1, 1, 2, 3, 3, 4, 4, 5]);
    let mut filtered = logits.clone();
    filter(&mut filtered, &Sampling { top_k: 2, ..Sampling::default() });
    assert_eq!([0.0, 0.64, 0.65, 0.999_999_999].map(|point| draw(&filtered, point)), [1, 1, 4, 4]);
}

fn trained() -> suasion_engine::Model {
    let (rows, (_dir, out)) = (rows(24, 1), folder());
    let settings = suasion_train::Settings { num_train_epochs: 6.0, ..quick() };
    let mut job = Job::new(&rows, settings, &out);
    let mut model = job.model().unwrap();
    job.run_with(&mut model).unwrap();
    model
}

#[test]
fn the_cache_gives_the_tokens_of_a_full_pass() {
    let mut model = trained();
    let prompt = prompt_ids(&rows(1, 50)[0]).to_vec();
    let sampling = Sampling { max_new_tokens: 14, ..Sampling::default() };
    let mut streamed = Vec::new();
    let made = generate(&mut model, &prompt, &sampling, &mut |id| {
        streamed.push(id);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!((made.ids.len(), made.stopped, made.prompt_tokens), (14, Stopped::MaxNewTokens, prompt.len()));
    assert_eq!(streamed, made.ids);
    // Every generated token is the first choice of a pass over everything before it, and no other token is.
    let mut whole = prompt.clone();
    whole.extend(&made.ids);
    let mut batch = Batch::default();
    batch.push(&whole, (prompt.len()..whole.len()).map(|i| (i as u32 - 1, whole[i], 1.0)));
    assert!(model.forward(&batch).unwrap().iter().all(|outcome| outcome.top1));
    let other = (whole[prompt.len()] + 1) % VOCAB;
    let mut batch = Batch::default();
    batch.push(&whole, [(prompt.len() as u32 - 1, other, 1.0)]);
    assert!(!model.forward(&batch).unwrap()[0].top1);
}

/// transformers' `generate` without sampling (`greedy` of the goldens).
#[test]
fn greedy_text_is_that_of_transformers() {
    let mut compared = 0;
    for dir in golden_models() {
        let golden = golden(&dir, "golden.json");
        let ids = |key: &str| serde_json::from_value::<Vec<u32>>(golden["greedy"][key].clone());
        // The internal material has none.
        let Ok(prompt) = ids("prompt") else { continue };
        let arch = suasion_engine::Architecture::from_dir(&dir).unwrap();
        let budget = suasion_train::generate::budget(prompt.len());
        let mut model = suasion_engine::Model::new(arch, suasion_engine::Device::cpu(), budget).unwrap();
        model.load_weights(&dir).unwrap();
        let sampling = Sampling { max_new_tokens: 12, ..Sampling::default() };
        let made = generate(&mut model, &prompt, &sampling, &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(made.ids, ids("ids").unwrap(), "{}", dir.display());
        compared += 1;
    }
    assert_eq!(compared, suasion_test_support::MODELS.len());
}

#[test]
fn a_generation_ends_at_a_stop_token_a_callback_or_a_full_cache() {
    let mut model = trained();
    let prompt = prompt_ids(&rows(1, 50)[0]).to_vec();
    let go_on = &mut |_| ControlFlow::Continue(());
    let greedy = Sampling { max_new_tokens: 12, ..Sampling::default() };
    let free = generate(&mut model, &prompt, &greedy, go_on).unwrap().ids;
    // With a token of the text as the stop token, the text is the same up to it.
    let stop = free[5];
    let at = free.iter().position(|id| *id == stop).unwrap();
    let mut streamed = Vec::new();
    let sampling = Sampling { stop_ids: vec![stop], ..greedy.clone() };
    let made = generate(&mut model, &prompt, &sampling, &mut |id| {
        streamed.push(id);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!((made.ids.as_slice(), made.stopped), (&free[..=at], Stopped::Stop(stop)));
    assert_eq!(streamed, free[..at], "the stop token is not streamed");

    let made = generate(&mut model, &prompt, &greedy, &mut |_| ControlFlow::Break(())).unwrap();
    assert_eq!((made.ids.as_slice(), made.stopped), (&free[..1], Stopped::Callback));

    // A cache for the prompt and two more feeds back two tokens and makes a third; it can be used again.
    let mut cache = model.cache(prompt.len() + 2).unwrap();
    for _ in 0..2 {
        let made = generate_with(&mut model, &mut cache, &prompt, &greedy, go_on).unwrap();
        assert_eq!((made.ids.as_slice(), made.stopped), (&free[..3], Stopped::ContextFull));
    }
}

#[test]
fn a_seed_gives_one_text() {
    let mut model = model(suasion_train::generate::budget(8));
    let go_on = &mut |_| ControlFlow::Continue(());
    let mut sample = |sampling: &Sampling| generate(&mut model, &[1, 10, 11], sampling, go_on).unwrap().ids;
    let with = |seed| Sampling { do_sample: true, seed, max_new_tokens: 24, ..Sampling::default() };
    let (a, again, b) = (sample(&with(1)), sample(&with(1)), sample(&with(2)));
    assert_eq!(a, again);
    assert_ne!(a, b);
    // An untrained model is nearly uniform: 24 samples from 96 tokens are not all the likeliest token.
    let greedy = sample(&Sampling { max_new_tokens: 24, ..Sampling::default() });
    assert_ne!(a, greedy);
    assert_eq!(sample(&Sampling { top_k: 1, ..with(3) }), greedy);
    assert_eq!(sample(&Sampling { temperature: 0.0, ..with(3) }), greedy);
}

#[test]
fn sampling_and_prompts_that_cannot_work_are_refused() {
    let mut model = model(suasion_train::generate::budget(8));
    let go_on = &mut |_| ControlFlow::Continue(());
    let s = Sampling::default;
    for sampling in [
        Sampling { temperature: -1.0, ..s() },
        Sampling { temperature: f64::NAN, ..s() },
        Sampling { top_p: 1.1, ..s() },
        Sampling { min_p: -0.1, ..s() },
        Sampling { max_new_tokens: 0, ..s() },
    ] {
        assert!(
            matches!(generate(&mut model, &[1], &sampling, go_on), Err(Error::Setting { .. })),
            "{sampling:?}"
        );
    }
    for (prompt, message) in [
        (vec![], "the prompt is empty"),
        (vec![1, VOCAB], "token id 96 at position 1 of the prompt is outside the model's vocabulary of 96"),
    ] {
        let error = generate(&mut model, &prompt, &s(), go_on).unwrap_err();
        assert!(error.to_string().starts_with(message), "{error}");
        assert_eq!((error.tag(), error.is_usage()), ("E-GENERATE", false));
    }
}

fn generation() -> serde_json::Value {
    let crate_dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    json(crate_dir.join("../../tests/goldens/goldens/generation.json"))
}

fn sampling(settings: &serde_json::Value) -> Sampling {
    serde_json::from_value(settings.clone()).unwrap()
}

/// transformers' logits processors, in the order of its `generate`.
#[test]
fn logits_are_processed_as_in_transformers() {
    for case in generation()["processed"].as_array().unwrap() {
        let mut logits: Vec<f32> = serde_json::from_value(case["logits"].clone()).unwrap();
        let context: Vec<u32> = serde_json::from_value(case["context"].clone()).unwrap();
        let scores: Vec<Option<f32>> = serde_json::from_value(case["scores"].clone()).unwrap();
        let sampling = sampling(&case["settings"]);
        penalise(&mut logits, &context, &sampling);
        filter(&mut logits, &sampling);
        for (id, (ours, theirs)) in logits.iter().zip(&scores).enumerate() {
            let theirs = theirs.unwrap_or(f32::NEG_INFINITY);
            let near = *ours == theirs || (ours - theirs).abs() <= 1e-6 * theirs.abs();
            assert!(near, "{}: token {id}: {ours} instead of {theirs}", case["settings"]);
        }
    }
}

fn golden_model(name: &str, budget: suasion_engine::Budget) -> suasion_engine::Model {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models").join(name);
    let arch = suasion_engine::Architecture::from_dir(&dir).unwrap();
    let mut model = suasion_engine::Model::new(arch, suasion_engine::Device::cpu(), budget).unwrap();
    model.load_weights(&dir).unwrap();
    model
}

/// transformers' `generate` with each of the processors, one prompt at a time and three at once.
#[test]
fn text_without_repetitions_is_that_of_transformers_in_every_family() {
    let golden = generation();
    for name in suasion_test_support::MODELS {
        let prompt: Vec<u32> = serde_json::from_value(golden[name]["prompt"].clone()).unwrap();
        let mut model = golden_model(name, budget_of(prompt.len(), 3));
        for made in golden[name]["made"].as_array().unwrap() {
            let sampling = Sampling { max_new_tokens: 16, ..sampling(&made["settings"]) };
            let ids: Vec<u32> = serde_json::from_value(made["ids"].clone()).unwrap();
            let alone = generate(&mut model, &prompt, &sampling, &mut |_| ControlFlow::Continue(())).unwrap();
            assert_eq!(alone.ids, ids, "{name}: {}", made["settings"]);
            // The same prompt between two others of other lengths.
            let others = [&prompt[..2], &prompt[..], &prompt[1..]];
            assert_eq!(batch(&mut model, &others, 3, &sampling)[1], ids, "{name}: {}", made["settings"]);
        }
    }
}

/// What is generated for each prompt, `slots` at once.
fn batch(
    model: &mut suasion_engine::Model,
    prompts: &[&[u32]],
    slots: usize,
    sampling: &Sampling,
) -> Vec<Vec<u32>> {
    let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap();
    let mut cache = model.cache_of(slots, longest + sampling.max_new_tokens).unwrap();
    let requests: Vec<Request> =
        prompts.iter().enumerate().map(|(i, prompt)| Request { prompt, stream: i as u64 }).collect();
    let mut made = vec![Vec::new(); prompts.len()];
    let mut go_on = |_, _| ControlFlow::Continue(());
    let mut done = |index: usize, generated: suasion_train::Generated| {
        made[index] = generated.ids;
        ControlFlow::Continue(())
    };
    generate_batch(model, &mut cache, &requests, sampling, &mut go_on, &mut done).unwrap();
    made
}

/// Each row has a random stream of its own, so that neither the size of the batch nor the other rows matter.
#[test]
fn a_rows_text_does_not_depend_on_the_batch() {
    for name in ["llama", "gemma2", "gpt2", "llama_dynamic", "qwen3_moe", "phi3_longrope"] {
        let mut model = golden_model(name, budget_of(9, 5));
        let prompts: Vec<Vec<u32>> =
            (0..7u32).map(|i| (0..3 + i % 4).map(|j| 5 + (7 * i + 11 * j) % 100).collect()).collect();
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let sampling = Sampling {
            do_sample: true,
            temperature: 1.3,
            top_k: 30,
            max_new_tokens: 11,
            ..Sampling::default()
        };
        let alone = batch(&mut model, &prompts, 1, &sampling);
        for slots in [2, 3, 5] {
            assert_eq!(batch(&mut model, &prompts, slots, &sampling), alone, "{name}: {slots} at once");
        }
        // Two equal prompts are continued differently, and one alone as the first.
        let equal = batch(&mut model, &[prompts[0], prompts[0]], 2, &sampling);
        assert_eq!((&equal[0], equal[0] == equal[1]), (&alone[0], false), "{name}");
    }
}
