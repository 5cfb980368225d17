//! Faults that are planted in correct rows.

use crate::*;

/// A row with its origins, to plant a fault in.
struct Planted {
    ids: Vec<u32>,
    labels: Vec<i32>,
    origins: Vec<Origin>,
    attention: Vec<u8>,
}

impl Planted {
    fn of(sample: &Sample) -> Planted {
        let attention = vec![1; sample.len()];
        let Sample { input_ids, labels, origins, .. } = sample.clone();
        Planted { ids: input_ids, labels, origins, attention }
    }

    fn row(&self) -> Value {
        json!({"input_ids": self.ids, "labels": self.labels, "attention_mask": self.attention})
    }

    fn learn(&mut self, wanted: impl Fn(&[Origin], usize) -> bool) {
        for i in (1..self.ids.len()).filter(|&i| wanted(&self.origins, i)).collect::<Vec<_>>() {
            self.labels[i] = self.ids[i] as i32;
        }
    }

    /// The first and last token of the last answer.
    fn answer(&self) -> (usize, usize) {
        let is = |origin: &Origin| matches!(origin, Origin::Response { .. });
        let last = self.origins.iter().rposition(is).unwrap();
        let first = (0..last).rev().take_while(|&i| is(&self.origins[i])).last().unwrap_or(last);
        (first, last)
    }
}

/// A fault: its name, the code that finds it, and how it is planted; false where the row cannot have it.
type Fault = (&'static str, Code, fn(&mut Planted, &Planted) -> bool);

const PAD: u32 = 0;

const FAULTS: &[Fault] = &[
    ("labels equal the inputs", Code::M008, |row, _| {
        row.labels = row.ids.iter().map(|&id| id as i32).collect();
        true
    }),
    ("the prompt is learned", Code::M004, |row, _| {
        row.learn(|origins, i| matches!(origins[i], Origin::Prompt { .. }));
        true
    }),
    ("one word of the prompt is learned", Code::M004, |row, _| {
        let at = row.origins.iter().rposition(|origin| matches!(origin, Origin::Prompt { .. })).unwrap();
        row.labels[at - 1] = row.ids[at - 1] as i32;
        true
    }),
    ("the role header is learned", Code::M007, |row, _| {
        let (first, _) = row.answer();
        row.labels[first - 1] = row.ids[first - 1] as i32;
        true
    }),
    ("the stop token is masked", Code::M009, |row, _| {
        let at = row.origins.iter().rposition(|origin| matches!(origin, Origin::EndOfTurn { .. })).unwrap();
        row.labels[at] = IGNORE;
        true
    }),
    ("there is no stop token", Code::M002, |row, _| {
        let at = row.answer().1 + 1;
        row.ids.truncate(at);
        row.labels.truncate(at);
        row.attention.truncate(at);
        true
    }),
    ("padding is learned", Code::M005, |row, _| {
        for _ in 0..3 {
            row.ids.push(PAD);
            row.labels.push(PAD as i32);
            row.attention.push(0);
        }
        true
    }),
    ("nothing is learned", Code::M001, |row, _| {
        row.labels.fill(IGNORE);
        true
    }),
    ("the answer is cut", Code::M002, |row, _| {
        let (first, last) = row.answer();
        let at = first.midpoint(last).max(first + 1);
        row.ids.truncate(at);
        row.labels.truncate(at);
        row.attention.truncate(at);
        true
    }),
    ("samples of a pack see each other", Code::P001, |row, other| {
        row.ids.extend(&other.ids);
        row.labels.extend(&other.labels);
        row.attention.extend(&other.attention);
        true
    }),
    ("two BOS", Code::M006, |row, _| {
        let bos = row.ids[0];
        row.ids.insert(0, bos);
        row.labels.insert(0, IGNORE);
        row.attention.insert(0, 1);
        true
    }),
    ("a label is another id", Code::L001, |row, _| {
        let (first, _) = row.answer();
        row.labels[first] += 1;
        true
    }),
    ("labels are shifted", Code::L001, |row, _| {
        row.labels.remove(0);
        row.labels.push(IGNORE);
        true
    }),
    ("the mask starts late", Code::M010, |row, _| {
        let (first, last) = row.answer();
        row.labels[first] = IGNORE;
        last > first
    }),
    ("the mask ends early", Code::M010, |row, _| {
        let (first, last) = row.answer();
        row.labels[last] = IGNORE;
        last > first
    }),
    ("the mask has a hole", Code::M010, |row, _| {
        let (first, last) = row.answer();
        row.labels[first + 1] = IGNORE;
        last > first + 1
    }),
];

/// Conversations with a system message, one to three turns, and answers of several words; no two alike.
fn chats(n: usize) -> Vec<Value> {
    let words = ["tea", "garden", "bus", "map", "bird", "lane", "music", "evening", "cup", "rush hour"];
    let chat = |i: usize| {
        let mut messages = vec![json!({"role": "system", "content": "Answer honestly."})];
        for turn in 0..=i % 3 {
            let word = words[(i + 3 * turn) % words.len()];
            messages.push(json!({"role": "user", "content": format!("What about the {word}, number {i}?")}));
            messages.push(json!({"role": "assistant", "content": format!("The {word} is fine, I would say {} times.", i + turn)}));
        }
        json!({"messages": messages})
    };
    (0..n).map(chat).collect()
}

#[test]
fn planted_faults_are_found_in_their_rows_and_nowhere_else() {
    let folder = Goldens::repository();
    let (mut table, mut wrong) = (BTreeMap::new(), Vec::new());
    for name in ["chatml.jinja", "headers.jinja", "phi.jinja"] {
        let case = Case::of(&folder, name);
        let clean: Vec<Planted> = samples(&case.pipeline(Mode::Prepare, Boundary::Joint), &chats(240))
            .iter()
            .map(Planted::of)
            .collect();
        assert!(clean.len() > 200, "{name}: {}", clean.len());
        let verify = case.pipeline(Mode::Verify, Boundary::Split);
        let errors = |rows: &[Value]| -> Vec<BTreeSet<String>> {
            let scratch = Scratch::new();
            let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
            let (all, _) = outcomes(&verify, &scratch.file("rows.jsonl", lines));
            let of = |outcome: &Outcome| {
                codes(outcome).into_iter().filter(|code| !code.starts_with("D001")).collect()
            };
            all.iter().map(of).collect()
        };
        let rows: Vec<Value> = clean.iter().map(Planted::row).collect();
        let before = errors(&rows);
        assert!(
            before.iter().all(|found| found.iter().all(|code| code.ends_with(":w"))),
            "{name}: {before:?}"
        );
        let bos = case.folder.tokenizer.as_ref().unwrap().bos().is_some_and(|bos| clean[0].ids[0] == bos.id);
        for (what, code, plant) in FAULTS {
            if *code == Code::M006 && !bos {
                continue;
            }
            let faulty = |i: usize| {
                let mut row = Planted { ids: clean[i].ids.clone(), ..clean_copy(&clean[i]) };
                plant(&mut row, &clean[(i + 1) % clean.len()]).then(|| row.row())
            };
            // In one row.
            let at = clean.len() / 2;
            let mut one = rows.clone();
            one[at] = faulty(at).unwrap();
            for (i, (found, before)) in errors(&one).iter().zip(&before).enumerate() {
                if i == at && !found.iter().any(|f| f.starts_with(code.as_str())) {
                    wrong.push(format!("{name}, {what}: {found:?} {}", one[at]));
                } else if i != at && found != before {
                    wrong.push(format!("{name}, {what}: row {i}: {found:?}, not {before:?}"));
                }
            }
            // In all rows.
            let all: Vec<Value> = (0..clean.len()).filter_map(faulty).collect();
            let found =
                errors(&all).iter().filter(|f| f.iter().any(|f| f.starts_with(code.as_str()))).count();
            if found != all.len() {
                wrong.push(format!("{name}, {what}: in {found} of {} rows", all.len()));
            }
            *table.entry(*what).or_insert(0) += found;
        }
    }
    println!("{table:#?}");
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

fn clean_copy(row: &Planted) -> Planted {
    Planted {
        ids: row.ids.clone(),
        labels: row.labels.clone(),
        origins: row.origins.clone(),
        attention: row.attention.clone(),
    }
}
