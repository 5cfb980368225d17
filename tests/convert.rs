//! `convert`: our own small corpora in the formats of ConvoKit, CMV threads and PersuasionForGood; and `eval --pairs`
//! on the output.

use crate::util::{Dir, material};
use serde_json::{Value, json};

/// An utterance of a ConvoKit corpus.
fn utterance(id: &str, speaker: &str, reply_to: Option<&str>, text: &str, meta: Value) -> Value {
    json!({"id": id, "speaker": speaker, "conversation_id": "t3_a", "reply_to": reply_to, "timestamp": 1, "text": text, "meta": meta})
}

/// A post with a chain that earned a delta, a chain that did not, a bot, a deleted comment and a reply to it.
fn corpus(dir: &Dir) {
    let won = || json!({"success": 1, "pair_ids": ["p_1"]});
    let rows = [
        utterance(
            "t3_a",
            "ann",
            None,
            "I like rain.\n\n_____\n\n> *Hello, users of CMV! This is a footnote from your moderators. Bye.*",
            json!({"success": null}),
        ),
        utterance("c1", "bob", Some("t3_a"), "&gt; I like rain.\n\nSun dries clothes.\n\nEDIT: typo", won()),
        utterance("c2", "ann", Some("c1"), "Rain waters plants.", json!({})),
        utterance("c3", "bob", Some("c2"), "A hose does too & it stops.", won()),
        utterance("c4", "ann", Some("c3"), "∆ You have a point.", json!({})),
        utterance("c5", "DeltaBot", Some("c4"), "Confirmed: 1 delta awarded to /u/bob.", json!({})),
        utterance("d1", "cid", Some("t3_a"), "You are wrong.", json!({"success": 0, "pair_ids": ["p_1"]})),
        utterance("e1", "eve", Some("t3_a"), "[deleted]", json!({})),
        utterance("e2", "fay", Some("e1"), "I agree with that.", json!({})),
    ];
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    dir.write("corpus/utterances.jsonl", lines);
    dir.write("corpus/speakers.json", "{}");
    dir.write(
        "corpus/conversations.json",
        r#"{"t3_a": {"meta": {"op-title": "CMV: Rain is best", "op-userID": "ann"}, "vectors": []}}"#,
    );
}

#[test]
fn a_convokit_corpus_becomes_rows_of_what_earned_a_delta() {
    let dir = Dir::new().with_model();
    corpus(&dir);
    let ran = dir.suasion(&["convert", "--from", "convokit", "corpus", "-o", "rows.jsonl"]).ok();
    let ran = ran
        .prints("1 thread with 8 comments: 1 row, 0 held out")
        .prints("1  left out: by a bot or a moderator");
    ran.prints("1  left out: deleted or removed")
        .prints("3  left out: without a delta")
        .says("wrote rows.jsonl");
    let rows = dir.lines("rows.jsonl");
    // Only c3 was answered with a delta; c1 began its chain.
    let prompt = "[SYSTEM] You write honest, respectful replies that may change a reader's mind.\n\
                  [CONTEXT] CMV: Rain is best\n\nI like rain.\n\nYou: Sun dries clothes.\n\nAuthor: Rain waters plants.\n\
                  [TASK] Reply to the author's view.\n[RESPONSE]";
    let reply = "A hose does too & it stops.";
    let row = json!({"input_text": prompt, "full_text": format!("{prompt} {reply}"), "thread": "t3_a", "id": "c3", "outcome": "won"});
    assert_eq!(rows, [row]);
    // They are rows of the four sections with only the reply supervised.
    let found = dir.verify("rows.jsonl").arg("--json").ok().json();
    assert_eq!(found["trainable_rows"], 1);
    for section in ["system", "context", "task", "scaffold"] {
        assert_eq!(found["sections"][section]["share_after"], 0.0, "{section}");
    }

    let all = [
        "convert",
        "--from",
        "convokit",
        "--data",
        "corpus",
        "-o",
        "all.parquet",
        "--outcome",
        "all",
        "--context-depth",
        "0",
    ];
    let counts = dir.suasion(&all).arg("--json").ok().json();
    assert_eq!(
        (&counts["rows"], &counts["removed"]["quoted lines"], &counts["removed"]["edits"]),
        (&3.into(), &1.into(), &1.into())
    );
    assert_eq!(counts["dropped"]["answers a comment that is deleted or missing"], 1);
    // Parquet has the same rows; the context of depth 0 is the post.
    let shown = dir.suasion(&["verify", "-M", "model", "-D", "all.parquet", "--json"]).ok().json();
    assert_eq!(shown["rows"], 3);
    // The corpus's own pairs: the first replies of both chains.
    dir.suasion(&all[..5]).args(&["--pairs", "-o", "pairs.jsonl"]).ok().prints("1 pair, 0 held out");
    let pair = &dir.lines("pairs.jsonl")[0];
    assert_eq!(
        (&pair["chosen"], &pair["rejected"]),
        (&" Sun dries clothes.".into(), &" You are wrong.".into())
    );
}

#[test]
fn speakers_depth_and_older_corpora() {
    let dir = Dir::new();
    corpus(&dir);
    let convert = |more: &[&str]| {
        dir.suasion(&["convert", "--from", "convokit", "corpus", "-o", "x.jsonl"]).args(more).ok();
        dir.lines("x.jsonl")
    };
    let outcome = |rows: &[Value]| -> Vec<String> {
        rows.iter()
            .map(|row| format!("{}: {}", row["id"].as_str().unwrap(), row["outcome"].as_str().unwrap()))
            .collect()
    };
    let all = convert(&["--outcome", "all", "--context-depth", "1"]);
    assert_eq!(outcome(&all), ["c1: unknown", "c3: won", "d1: lost"]);
    let context = all[1]["input_text"].as_str().unwrap();
    assert!(context.contains("Author: Rain waters plants.") && !context.contains("Sun dries"), "{context}");
    assert_eq!(all[0]["full_text"].as_str().unwrap().split("[RESPONSE] ").nth(1), Some("Sun dries clothes."));
    assert_eq!(outcome(&convert(&["--outcome", "all", "--persuader", "op"])), ["c2: unknown", "c4: unknown"]);
    assert_eq!(outcome(&convert(&["--outcome", "all", "--persuader", "cid"])), ["d1: lost"]);

    // Names from before ConvoKit 2: user, root, reply-to, and metadata without "meta".
    let old = dir
        .text("corpus/utterances.jsonl")
        .replace("\"speaker\"", "\"user\"")
        .replace("conversation_id", "root");
    dir.write("old/utterances.jsonl", old.replace("reply_to", "reply-to"));
    dir.write("old/conversations.json", r#"{"t3_a": {"op-title": "CMV: Rain is best"}}"#);
    dir.write("old/users.json", "{}");
    dir.suasion(&[
        "convert",
        "--from",
        "convokit",
        "old",
        "-o",
        "old.jsonl",
        "--outcome",
        "all",
        "--context-depth",
        "1",
    ])
    .ok();
    assert_eq!(dir.lines("old.jsonl"), all);
}

/// A file of chains with these outcomes, two chains per post.
fn threads(posts: usize) -> String {
    let chain = |post: usize, outcome: &str, reply: String| {
        let replies = json!([{"author": "u1", "text": reply}, {"author": "op", "text": "I see."}]);
        json!({"id": format!("p{post}"), "outcome": outcome, "title": format!("CMV: {post}"), "op": "My view.", "replies": replies})
    };
    let chains = |post| {
        let won = chain(
            post,
            "positive",
            format!("A kind answer number {post} with a reason and with an example from home."),
        );
        let lost = chain(post, "negative", format!("No. Number {post} is wrong."));
        format!("{won}\n{lost}\n")
    };
    (0..posts).map(chains).collect()
}

#[test]
fn no_thread_is_on_both_sides_of_a_split() {
    let dir = Dir::new();
    dir.write("threads.jsonl", threads(60));
    let all = ["convert", "--from", "cmv", "threads.jsonl", "--outcome", "all", "--split", "0.2", "-o"];
    let counts = dir.suasion(&all).args(&["out.jsonl", "--json"]).ok().json();
    let (train, test) = (dir.lines("out.jsonl"), dir.lines("out.test.jsonl"));
    assert_eq!(
        (counts["rows"].as_u64(), counts["held_out"].as_u64()),
        (Some(train.len() as u64), Some(test.len() as u64))
    );
    assert_eq!((train.len() + test.len(), counts["threads"].as_u64()), (120, Some(60)));
    // 60 threads at a share of 0.2: between 4 and 20 of them, except for one seed in 400.
    assert!((8..=40).contains(&test.len()), "{}", test.len());
    let ids = |rows: &[Value]| -> std::collections::HashSet<String> {
        rows.iter().map(|row| row["thread"].to_string()).collect()
    };
    assert!(ids(&train).is_disjoint(&ids(&test)));
    // In a folder the files are named after the splits, and a thread's side depends only on the thread and the seed.
    dir.suasion(&all).arg("folder").ok();
    assert_eq!((dir.lines("folder/train.jsonl"), dir.lines("folder/test.jsonl")), (train, test.clone()));
    dir.suasion(&all).args(&["other.jsonl", "--seed", "7"]).ok();
    assert_ne!(dir.lines("other.test.jsonl"), test);
}

#[test]
fn pairs_are_of_one_post_and_a_model_is_asked_which_it_prefers() {
    let dir = Dir::new().with_weights();
    dir.write("threads.jsonl", threads(9));
    dir.suasion(&["convert", "--from", "cmv", "threads.jsonl", "--pairs", "-o", "pairs.jsonl"])
        .ok()
        .prints("9 pairs, 0 held out");
    let pairs = dir.lines("pairs.jsonl");
    for (post, pair) in pairs.iter().enumerate() {
        assert_eq!(
            pair["chosen"],
            format!(" A kind answer number {post} with a reason and with an example from home.")
        );
        assert_eq!(pair["rejected"], format!(" No. Number {post} is wrong."));
        assert!(pair["prompt"].as_str().unwrap().ends_with("[RESPONSE]"));
    }
    let asked = ["eval", "-M", "model", "--pairs", "--json", "-D"];
    let found = dir.suasion(&asked).arg("pairs.jsonl").ok().json();
    assert_eq!(
        (&found["pairs"], &found["prompts"], &found["length"]["winner_longer"]),
        (&9.into(), &9.into(), &1.0.into())
    );
    // Each side's score equals that of eval on it alone; checked for the first pair.
    for (side, tokens) in [("chosen", "won_tokens"), ("rejected", "lost_tokens")] {
        let rows: String = pairs
            .iter()
            .map(|p| json!({"prompt": p["prompt"], "completion": p[side]}).to_string() + "\n")
            .collect();
        dir.write("side.jsonl", rows);
        let alone = dir.suasion(&["eval", "-M", "model", "-D", "side.jsonl", "--json"]).ok().json();
        let mean = alone["targets"].as_f64().unwrap() / 9.0;
        assert!((found["length"][tokens].as_f64().unwrap() - mean).abs() < 1e-9, "{side}");
    }
    // The same pairs with renamed fields, and with preferred and rejected swapped.
    let renamed: String = pairs
        .iter()
        .map(|p| {
            json!({"question": p["prompt"], "good": p["chosen"], "bad": p["rejected"]}).to_string() + "\n"
        })
        .collect();
    dir.write("renamed.jsonl", renamed);
    let columns = |good: &str, bad: &str| {
        let set = [
            "columns.prompt=question".to_string(),
            format!("columns.chosen={good}"),
            format!("columns.rejected={bad}"),
        ];
        dir.suasion(&asked).arg("renamed.jsonl").set(&[&set[0], &set[1], &set[2]]).ok().json()
    };
    assert_eq!(columns("good", "bad"), found);
    let swapped = columns("bad", "good");
    for score in ["total", "mean"] {
        assert_eq!(
            swapped[score]["preferred"].as_f64().unwrap(),
            9.0 - found[score]["preferred"].as_f64().unwrap(),
            "{score}"
        );
    }
    dir.suasion(&["eval", "-M", "model", "--pairs", "-D", "pairs.jsonl"])
        .ok()
        .prints("winner preferred by")
        .prints("Length: ");
    dir.write("none.jsonl", r#"{"prompt": "a", "chosen": " b"}"#);
    dir.suasion(&asked).arg("none.jsonl").run().error(3, "E-ROW", "none.jsonl:1: ");
}

#[test]
fn dialogues_merge_the_units_of_a_turn() {
    let dir = Dir::new();
    dir.write("d.csv", ",Unit,Turn,B4,B2\n0,Hello.,0,0,x1\n1,How are you?,0,0,x1\n2,\"Fine, thanks.\",0,1,x1\n3,Would you give?,1,0,x1\n4,Hi,0,1,x2\n5,Please give.,0,0,x2\n");
    dir.write(
        "info.csv",
        ",B2,B3,B4,B5,B6\n0,x1,u1,0,0,0.0\n1,x1,u2,1,1,0.5\n2,x2,u3,0,0,1.0\n3,x2,u4,1,0,0.0\n",
    );
    let convert = ["convert", "--from", "p4g", "d.csv", "-o", "d.jsonl"];
    dir.suasion(&convert).ok();
    let rows = dir.lines("d.jsonl");
    let replies: Vec<_> = rows
        .iter()
        .map(|row| row["full_text"].as_str().unwrap().split("[RESPONSE] ").nth(1).unwrap())
        .collect();
    assert_eq!(replies, ["Hello. How are you?", "Would you give?", "Please give."]);
    assert!(rows[0]["input_text"].as_str().unwrap().contains("[CONTEXT] The conversation begins.\n"));
    assert!(
        rows[1]["input_text"]
            .as_str()
            .unwrap()
            .contains("You: Hello. How are you?\n\nPartner: Fine, thanks.\n[TASK]")
    );
    // With the donations only the successful dialogue remains: a donation by the persuader of x2 does not count.
    dir.suasion(&convert).args(&["--information", "info.csv"]).ok();
    assert_eq!(
        dir.lines("d.jsonl").iter().map(|row| row["thread"].clone()).collect::<Vec<_>>(),
        ["x1", "x1"]
    );
    dir.suasion(&convert).args(&["--outcome", "won"]).run().error(2, "E-USAGE", "do not say who donated");
    dir.suasion(&convert).arg("--pairs").run().error(2, "E-USAGE", "--pairs");
}

#[test]
fn unreadable_corpora_are_refused_by_line_and_sources_stay() {
    let dir = Dir::new();
    corpus(&dir);
    let source = dir.text("corpus/utterances.jsonl");
    let convert = |from: &str, corpus: &str, output: &str| {
        dir.suasion(&["convert", "--from", from, corpus, "-o", output])
    };
    convert("convokit", "corpus", "corpus/utterances.jsonl").run().error(
        2,
        "E-USAGE",
        "would replace what is read",
    );
    assert_eq!(dir.text("corpus/utterances.jsonl"), source);
    dir.write("bad/utterances.jsonl", source.replacen("\"id\":\"d1\"", "\"id\":\"c1\"", 1));
    convert("convokit", "bad", "x.jsonl").run().error(
        3,
        "E-ROW",
        "utterances.jsonl:7: the id \"c1\" is also that of",
    );
    dir.write("bad/utterances.jsonl", source.replacen("\"text\":\"You are wrong.\"", "\"body\":\"\"", 1));
    convert("convokit", "bad", "x.jsonl").run().error(3, "E-ROW", "utterances.jsonl:7: there is no \"text\"");
    dir.write("bad/utterances.jsonl", &source).write("bad/conversations.json", "{\"t3_a\": \n{]}");
    convert("convokit", "bad", "x.jsonl").run().error(3, "E-SOURCE", "conversations.json: line 2");
    dir.write("t.jsonl", threads(2).replacen("negative", "lost", 1));
    convert("cmv", "t.jsonl", "x.jsonl").run().error(3, "E-ROW", "t.jsonl:2: \"outcome\" is \"lost\"");
    dir.write("d.csv", "Unit,Turn,B4,B2\nHello,0,2,x\n");
    convert("p4g", "d.csv", "x.jsonl").run().error(3, "E-ROW", "d.csv:2: \"B4\" is \"2\"");
    dir.write("t.jsonl", threads(2).replace("positive", "negative"));
    convert("cmv", "t.jsonl", "x.jsonl").run().error(3, "E-SOURCE", "no row is left of 8 comments");
    convert("cmv", "t.jsonl", "x.txt").run().error(3, "E-SOURCE", "no format has this ending");
    assert!(!dir.exists("x.jsonl") && !dir.exists("x.txt"));
}

/// The material's corpora: replies contain nothing from moderators, bots, quotes or deltas, and threads do not mix.
#[test]
fn the_materials_corpora_are_clean() {
    let Some(material) = material("datasets") else { return };
    let dir = Dir::new();
    let file = |name: &str| material.join(name).to_str().unwrap().to_string();
    let convert = |from: &str, name: &str, more: &[&str]| {
        dir.suasion(&["convert", "--from", from, &file(name), "-o", "rows.jsonl", "--json"])
            .args(more)
            .ok()
            .json()
    };
    let counts = convert("cmv", "cmv_threads.jsonl", &["--outcome", "all", "--split", "0.1"]);
    let rows: Vec<Value> =
        ["rows.jsonl", "rows.test.jsonl"].iter().flat_map(|name| dir.lines(name)).collect();
    assert!(rows.len() > 150 && counts["held_out"].as_u64() > Some(0), "{counts}");
    for row in &rows {
        let reply =
            row["full_text"].as_str().unwrap().strip_prefix(row["input_text"].as_str().unwrap()).unwrap();
        assert!(!reply.lines().any(|line| line.trim_start().starts_with('>')), "{row}");
        assert!(!row["full_text"].as_str().unwrap().contains("footnote from your moderators"), "{row}");
    }
    let won = convert("cmv", "cmv_threads.jsonl", &[]);
    let pairs = convert("cmv", "cmv_threads.jsonl", &["--pairs"]);
    assert!(
        won["rows"].as_u64() < counts["rows"].as_u64() && pairs["rows"].as_u64() > Some(20),
        "{won} {pairs}"
    );
    let dialogues = convert("p4g", "p4g_full_dialog.csv", &[]);
    assert_eq!(dialogues["threads"], 610);
    assert!(dialogues["rows"].as_u64() > Some(5000), "{dialogues}");
}
