//! Properties that cannot hold by accident: of packs, prefixes, accumulation, recomputation and threads.

mod common;

use common::{FAMILIES, Random, STEP, gradients, mean_loss, model, relative};
use suasion_engine::{AdamW, Architecture, Backend, Batch, Cpu, Model, Reference, Target, Trainable};

/// Rows of odd lengths, the last third of each supervised, with odd weights.
fn rows(count: usize) -> Vec<(Vec<u32>, Vec<(u32, u32, f32)>)> {
    let mut random = Random(11);
    (0..count)
        .map(|i| {
            let ids = random.ids(5 + 7 * i % 23);
            let from = ids.len() * 2 / 3;
            let targets = (from..ids.len()).map(|j| (j as u32 - 1, ids[j], 0.5 + (j % 3) as f32)).collect();
            (ids, targets)
        })
        .collect()
}

fn pack(rows: &[(Vec<u32>, Vec<(u32, u32, f32)>)]) -> Batch {
    let mut batch = Batch::default();
    rows.iter().for_each(|(ids, targets)| batch.push(ids, targets.iter().copied()));
    batch
}

/// Loss and gradients of micro-batches, normalised over all of them.
fn step<B: Backend>(model: &mut Model<B>, batches: &[Batch]) -> (f64, Vec<(String, Vec<f32>)>) {
    let total: f64 = batches.iter().map(Batch::weight).sum();
    model.zero_gradients();
    let mut loss = 0.0;
    for batch in batches {
        let outcomes = common::accumulate(model, batch, (1.0 / total) as f32);
        loss += mean_loss(batch, &outcomes) * batch.weight() / total;
    }
    (loss, gradients(model))
}

fn assert_close(
    a: &(f64, Vec<(String, Vec<f32>)>),
    b: &(f64, Vec<(String, Vec<f32>)>),
    tolerance: f64,
    what: &str,
) {
    assert!((a.0 - b.0).abs() < tolerance, "{what}: loss {} and {}", a.0, b.0);
    for ((name, a), (_, b)) in a.1.iter().zip(&b.1) {
        // The gradient of key biases under a softmax is only rounding error; all others are far above 1e-4.
        let size = b.iter().map(|x| (*x as f64).powi(2)).sum::<f64>().sqrt();
        assert!(size < 1e-5 || relative(a, b) < tolerance, "{what}: {name} differs by {:e}", relative(a, b));
    }
}

#[test]
fn packed_equals_separate_and_any_accumulation() {
    for family in FAMILIES {
        let mut model = model(family, Cpu::new(), false);
        let rows = rows(8);
        let one = step(&mut model, &[pack(&rows)]);
        for size in [1, 2, 4] {
            let batches: Vec<Batch> = rows.chunks(size).map(pack).collect();
            assert_close(
                &step(&mut model, &batches),
                &one,
                2e-5,
                &format!("{family}: micro-batches of {size}"),
            );
        }
    }
}

#[test]
fn tokens_after_a_row_change_nothing_in_it() {
    for family in FAMILIES {
        let mut model = model(family, Cpu::new(), false);
        let rows = rows(4);
        let plain = step(&mut model, &[pack(&rows)]);
        let mut padded = Batch::default();
        for (ids, targets) in &rows {
            // Padding added by hand, inside the row's own segment.
            let ids: Vec<u32> = ids.iter().copied().chain([0; 13]).collect();
            padded.push(&ids, targets.iter().copied());
        }
        assert_close(&step(&mut model, &[padded]), &plain, 2e-5, family);
    }
}

#[test]
fn a_shared_prefix_equals_separate_rows() {
    for family in FAMILIES {
        for prefix_len in [1, 9, 40, 110] {
            let mut model = model(family, Cpu::new(), false);
            let mut random = Random(5);
            let prompt = random.ids(prefix_len);
            let replies = [6, 1, 11].map(|n| random.ids(n));

            let mut separate = Batch::default();
            let mut budget_left = 256usize;
            for reply in &replies {
                let row: Vec<u32> = prompt.iter().chain(reply).copied().collect();
                budget_left = budget_left.saturating_sub(row.len());
                let from = prompt.len();
                separate.push(&row, (from..row.len()).map(|j| (j as u32 - 1, row[j], 1.0)));
            }
            let mut shared = Batch::default();
            shared.push(&prompt, []);
            let trunk = 0..prompt.len() as u32;
            for reply in &replies {
                shared.push_after(
                    trunk.clone(),
                    reply,
                    (1..reply.len()).map(|j| (j as u32 - 1, reply[j], 1.0)),
                );
                // The prompt's last row has one target per reply: the reply's first token.
                shared.targets.push(Target { row: trunk.end - 1, id: reply[0], weight: 1.0 });
            }
            let separate = match budget_left {
                0 => split(&separate),
                _ => vec![separate],
            };
            let what = format!("{family}, a prompt of {prefix_len}");
            assert_close(&step(&mut model, &[shared]), &step(&mut model, &separate), 3e-5, &what);
        }
    }
}

#[test]
fn shared_prefixes_may_lie_apart() {
    // Two prompts with two replies each, interleaved: no reply directly follows its prompt or the other reply.
    for family in FAMILIES {
        let mut random = Random(29);
        let prompts = [random.ids(13), random.ids(21)];
        let (mut shared, mut separate) = (Batch::default(), Batch::default());
        let trunks = prompts.each_ref().map(|prompt| {
            let start = shared.tokens() as u32;
            shared.push(prompt, []);
            start..shared.tokens() as u32
        });
        for length in [9, 4] {
            for (prompt, trunk) in prompts.iter().zip(&trunks) {
                let reply = random.ids(length);
                shared.push_after(trunk.clone(), &reply, (1..length).map(|j| (j as u32 - 1, reply[j], 1.0)));
                shared.targets.push(Target { row: trunk.end - 1, id: reply[0], weight: 1.0 });
                let row: Vec<u32> = prompt.iter().chain(&reply).copied().collect();
                separate.push(&row, (prompt.len()..row.len()).map(|j| (j as u32 - 1, row[j], 1.0)));
            }
        }
        let run = |threads, batch: &Batch| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| step(&mut model(family, Cpu::new(), false), std::slice::from_ref(batch)))
        };
        let one = run(1, &shared);
        assert_close(&one, &run(1, &separate), 3e-5, family);
        assert!(one == run(4, &shared), "{family}: 4 threads");
    }
}

/// A batch per segment.
fn split(batch: &Batch) -> Vec<Batch> {
    batch
        .segments
        .iter()
        .map(|s| {
            let mut one = Batch::default();
            let targets = batch.targets.iter().filter(|t| s.own.contains(&t.row));
            let ids = &batch.ids[s.own.start as usize..s.own.end as usize];
            one.push(ids, targets.map(|t| (t.row - s.own.start, t.id, t.weight)));
            one
        })
        .collect()
}

#[test]
fn recomputing_changes_no_bit() {
    for family in FAMILIES {
        let batches: Vec<Batch> = rows(6).chunks(3).map(pack).collect();
        let kept = step(&mut model(family, Cpu::new(), false), &batches);
        let again = step(&mut model(family, Cpu::new(), true), &batches);
        assert!(kept == again, "{family}");
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for family in FAMILIES {
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut model = model(family, Cpu::new(), false);
                let result = step(&mut model, &[pack(&rows(8))]);
                model.adamw(&AdamW { gradient_scale: 0.3, ..STEP }).unwrap();
                let names = model.parameter_names();
                let weights: Vec<_> = names.iter().map(|n| model.parameter(n).unwrap().data).collect();
                (result, model.gradient_norm().unwrap().to_bits(), weights)
            })
        };
        let one = run(1);
        assert!(one == run(2), "{family}: 2 threads");
        assert!(one == run(5), "{family}: 5 threads");
    }
}

#[test]
fn the_cpu_equals_the_reference() {
    for family in FAMILIES {
        let batches: Vec<Batch> = rows(5).chunks(2).map(pack).collect();
        let fast = step(&mut model(family, Cpu::new(), false), &batches);
        let plain = step(&mut model(family, Reference::<f32>::new(), false), &batches);
        assert_close(&fast, &plain, 2e-5, family);
    }
}

#[test]
fn gradients_are_the_slopes_of_the_loss() {
    // Central differences of the f64 reference, compared with its own gradients and with the CPU's.
    for family in FAMILIES {
        let batch = pack(&rows(3));
        let arch = common::smooth(family);
        let all = Trainable::All;
        let mut fast = common::model_of(arch.clone(), Cpu::new(), false, &all);
        let (_, fast) = step(&mut fast, std::slice::from_ref(&batch));
        let mut model = common::model_of(arch, Reference::<f64>::new(), false, &all);
        let (_, exact) = step(&mut model, std::slice::from_ref(&batch));
        let mut random = Random(17);
        for ((name, exact), (_, fast)) in exact.iter().zip(&fast) {
            for _ in 0..2 {
                let i = random.below(exact.len());
                let slope = common::slope(&mut model, &batch, name, i);
                for (what, g) in [("f64 reference", exact[i]), ("cpu", fast[i])] {
                    let g = g as f64;
                    assert!(
                        (g - slope).abs() < 2e-4 + 2e-3 * slope.abs(),
                        "{family} {name}[{i}], {what}: {g}, slope {slope}"
                    );
                }
            }
        }
    }
}

/// The loss of each token after the first, from logits of the cache, token by token.
fn decoded(model: &mut Model<Cpu>, ids: &[u32]) -> Vec<f64> {
    let mut cache = model.cache(ids.len()).unwrap();
    let next = ids.windows(2).map(|pair| {
        let logits = model.decode(&mut cache, &pair[..1]).unwrap();
        let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
        sum.ln() - f64::from(logits[pair[1] as usize])
    });
    next.collect()
}

/// The loss of each token after the first, in one pass over all of them.
fn passed(model: &mut Model<Cpu>, ids: &[u32]) -> Vec<f64> {
    let mut batch = Batch::default();
    batch.push(ids, (1..ids.len()).map(|j| (j as u32 - 1, ids[j], 1.0)));
    model.forward(&batch).unwrap().iter().map(|loss| f64::from(loss.nll)).collect()
}

#[test]
fn generation_with_a_cache_equals_the_full_pass() {
    // 23 tokens: longer than every window of the families.
    for family in FAMILIES {
        let mut model = model(family, Cpu::new(), false);
        let ids = Random(43).ids(23);
        for (at, (a, b)) in decoded(&mut model, &ids).iter().zip(passed(&mut model, &ids)).enumerate() {
            assert!((a - b).abs() < 2e-5 * b.max(1.0), "{family}, token {at}: {a} and {b}");
        }
    }
}

/// Families whose rotation depends on the sequence length, beyond 14 tokens.
fn by_length() -> [Architecture; 2] {
    let mut long = common::config("phi3");
    long["original_max_position_embeddings"] = 14.into();
    long["rope_scaling"] = serde_json::json!({
        "type": "longrope", "short_factor": [1.0, 1.2], "long_factor": [1.5, 4.0]
    });
    let mut dynamic = common::config("llama");
    dynamic["max_position_embeddings"] = 14.into();
    dynamic["rope_scaling"] = serde_json::json!({"rope_type": "dynamic", "factor": 3.0});
    [long, dynamic]
        .map(|config| Architecture::from_json(&config, std::path::Path::new("config.json")).unwrap())
}

#[test]
fn sequences_of_a_pack_are_rotated_by_their_own_length() {
    for arch in by_length() {
        let new = |arch| common::model_of(arch, Cpu::new(), false, &Trainable::All);
        let mut model = new(arch.clone());
        let rows = rows(8);
        let longer = rows.iter().filter(|(ids, _)| ids.len() > 14).count();
        assert!((2..7).contains(&longer), "{longer} of 8 rows have other frequencies");
        let one = step(&mut model, &[pack(&rows)]);
        let separate: Vec<Batch> = rows.chunks(1).map(pack).collect();
        assert_close(&step(&mut model, &separate), &one, 2e-5, &arch.model_type);

        let mut plain = arch.clone();
        for block in &mut plain.blocks {
            block.attention.rope.as_mut().unwrap().beyond = None;
        }
        let (loss, _) = step(&mut new(plain), &[pack(&rows)]);
        assert!((loss - one.0).abs() > 1e-3, "{}: the frequencies matter", arch.model_type);

        // A cache whose sequence grows beyond the limit: each loss equals that of a pass over the tokens so far.
        let ids = Random(47).ids(18);
        for (at, loss) in decoded(&mut model, &ids).iter().enumerate() {
            let mut batch = Batch::default();
            batch.push(&ids[..at + 1], [(at as u32, ids[at + 1], 1.0)]);
            let want = f64::from(model.forward(&batch).unwrap()[0].nll);
            assert!((loss - want).abs() < 2e-5 * want.max(1.0), "token {at}: {loss} and {want}");
        }

        // Short and long rows cannot share the keys of a prompt; rows with the same frequencies can.
        let mut shared = Batch::default();
        shared.push(&ids[..6], []);
        shared.push_after(0..6, &ids[6..10], [(1, 3, 1.0)]);
        shared.push_after(0..6, &ids[6..18], [(1, 3, 1.0)]);
        let message = model.forward(&shared).unwrap_err().to_string();
        assert!(message.contains("sequences of 18 and 10 tokens share a prompt"), "{message}");
        shared.segments.pop();
        shared.ids.truncate(10);
        shared.positions.truncate(10);
        shared.targets.pop();
        model.forward(&shared).unwrap();
    }
}

#[test]
fn no_target_changes_nothing() {
    let mut model = model("llama", Cpu::new(), false);
    let mut batch = Batch::default();
    batch.push(&[1, 2, 3], []);
    assert_eq!(common::accumulate(&mut model, &batch, 1.0), vec![]);
    assert_eq!(model.gradient_norm().unwrap(), 0.0);
    assert!(gradients(&model).iter().all(|(_, g)| g.iter().all(|x| *x == 0.0)));
}

#[test]
fn batches_that_do_not_fit_are_refused() {
    let mut model = model("gpt2", Cpu::new(), false);
    let mut refuse = |batch: Batch, part: &str| {
        let message = model.forward(&batch).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    };
    let with = |ids: &[u32], targets: Vec<(u32, u32, f32)>| {
        let mut batch = Batch::default();
        batch.push(ids, targets);
        batch
    };
    refuse(with(&[97], vec![]), "token id 97 is outside the model's vocabulary of 97");
    refuse(with(&[1], vec![(0, 200, 1.0)]), "token id 200");
    refuse(with(&[1; 129], vec![]), "position 128 is beyond the model's 128 learned positions");
    refuse(with(&[1, 2], vec![(2, 1, 1.0)]), "a target on row 2");
    let mut long = Batch::default();
    (0..3).for_each(|_| long.push(&[1; 100], []));
    refuse(long, "300 tokens");
    let mut torn = with(&[1, 2], vec![]);
    torn.segments[0].own = 0..1;
    refuse(torn, "segments cover 1 of 2 tokens");
}
