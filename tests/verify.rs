//! `suasion verify`: output in 80 columns, piped, without colour, with wide characters; and exit codes.

use crate::util::{Dir, TestCommand};
use unicode_width::UnicodeWidthStr;

fn verify(dir: &Dir) -> TestCommand {
    dir.verify("rows.jsonl")
}

fn fits_80_columns(text: &str) {
    for line in text.lines() {
        assert!(line.width() <= 80, "{} columns: {line}", line.width());
    }
}

#[test]
fn piped_output_is_plain_and_fits() {
    let dir = Dir::new().with_model().with_rows(5);
    let ran = verify(&dir).ok();
    fits_80_columns(&ran.stdout);
    assert!(!ran.stdout.contains('\x1b'));
    // Without colour, text marks the supervised tokens.
    for word in ["LEARNED", "masked", "response", "system", "context", "task", "scaffold", "end_of_turn"] {
        assert!(ran.stdout.contains(word), "{word}\n{}", ran.stdout);
    }
    // Three rows by default.
    for (row, shown) in [(0, true), (1, true), (2, true), (3, false)] {
        assert_eq!(ran.stdout.contains(&format!("rows.jsonl:{}", row + 1)), shown, "{}", ran.stdout);
    }
}

#[test]
fn rows_and_row_choose_what_is_shown() {
    let dir = Dir::new().with_model().with_rows(5);
    let four = verify(&dir).args(&["--row", "4"]).ok().stdout;
    assert!(four.contains("rows.jsonl:5") && !four.contains("rows.jsonl:1"), "{four}");
    let none = verify(&dir).args(&["--rows", "0"]).ok().stdout;
    assert!(!none.contains("rows.jsonl:1"), "{none}");
    verify(&dir).args(&["--row", "5"]).run().error(2, "E-USAGE", "has the rows 0 to 4");
}

#[test]
fn wide_characters_and_emoji_fit() {
    let dir = Dir::new().with_model();
    let input = "[SYSTEM] 誠実に答えてください。\n[CONTEXT] 電車は遅い。👩‍👩‍👧‍👦 한국어 텍스트 עברית\u{200f}\n[TASK] 👍🏽\n[RESPONSE]";
    let full = format!("{input} {}", "そうですね、朝の混雑は本当に大変です。🚆🚆🚆 e\u{301}".repeat(6));
    dir.write("rows.jsonl", serde_json::json!({"input_text": input, "full_text": full}).to_string());
    for args in [&["--color", "never"][..], &["--ids"][..]] {
        let ran = verify(&dir).args(args).ok();
        fits_80_columns(&ran.stdout);
    }
}

#[test]
fn control_characters_do_not_reach_the_terminal() {
    let dir = Dir::new().with_model();
    let row = serde_json::json!({"input_text": "a\x1b[31m", "full_text": "a\x1b[31m \x07b\x1b]0;x\x07 c"});
    dir.write("rows.jsonl", row.to_string());
    let ran = verify(&dir).ok();
    assert!(!ran.stdout.contains('\x1b') && !ran.stdout.contains('\x07'), "{:?}", ran.stdout);
}

#[test]
fn colour_needs_a_terminal_or_the_flag() {
    let dir = Dir::new().with_model().with_rows(1);
    assert!(verify(&dir).args(&["--color", "always"]).ok().stdout.contains('\x1b'));
    assert!(!verify(&dir).args(&["--color", "never"]).ok().stdout.contains('\x1b'));
    assert!(!verify(&dir).env("NO_COLOR", "1").ok().stdout.contains('\x1b'));
}

#[test]
fn a_closed_pipe_does_not_panic() {
    let dir = Dir::new().with_model().with_rows(400);
    for command in ["verify -M model -D rows.jsonl --rows 400", "completions bash", "check", "env"] {
        let ran = dir.sh(&format!("\"$SUASION\" {command} | head -n 1")).ok();
        assert_eq!(ran.stdout.lines().count(), 1);
        assert!(!ran.stderr.contains("error"), "{}", ran.stderr);
    }
}

#[test]
fn json_has_the_contracts_fields() {
    let dir = Dir::new().with_model().with_rows(8);
    let json = verify(&dir).arg("--json").ok().json();
    assert_eq!((&json["rows"], &json["trainable_rows"]), (&8.into(), &8.into()));
    let (tokens, supervised) =
        (json["tokens"].as_u64().unwrap(), json["supervised_tokens"].as_u64().unwrap());
    let sections = json["sections"].as_object().unwrap();
    let sum = |name: &str| sections.values().map(|s| s[name].as_f64().unwrap()).sum::<f64>();
    assert!((sum("share_before") - 1.0).abs() < 1e-9 && (sum("share_after") - 1.0).abs() < 1e-9);
    assert_eq!(sum("tokens") as u64, tokens);
    let of = |name: &str| sections[name]["tokens"].as_u64().unwrap();
    assert_eq!(of("response") + of("end_of_turn"), supervised);
    assert_eq!(sections["system"]["share_after"], 0.0);
    assert!(json["findings"].is_array() && json["counts"].is_object());
}

/// Tokenised rows of other tools: a correct one, and one for each common mistake.
const TOKENISED: [(&str, &str); 4] = [
    ("", r#"{"input_ids": [11, 12, 13, 14, 0], "labels": [-100, -100, 13, 14, 0]}"#),
    ("M001", r#"{"input_ids": [11, 12, 13, 14, 0], "labels": [-100, -100, -100, -100, -100]}"#),
    ("M008", r#"{"input_ids": [11, 12, 13, 14, 0], "labels": [11, 12, 13, 14, 0]}"#),
    ("L001", r#"{"input_ids": [11, 12, 13, 14, 0], "labels": [-100, -100, 14, 0, -100]}"#),
];

#[test]
fn tokenised_rows_need_no_model_and_errors_exit_1() {
    let dir = Dir::new();
    for (code, row) in TOKENISED {
        dir.write("rows.jsonl", format!("{row}\n"));
        let ran = dir.suasion(&["verify", "--data", "rows.jsonl", "--json"]).run();
        let ran = ran.code(if code.is_empty() { 0 } else { 1 });
        let counts = ran.json()["counts"].clone();
        if !code.is_empty() {
            assert_eq!(counts[code], 1, "{counts}");
        }
    }
}

#[test]
fn select_and_ignore_decide_the_exit_code() {
    let dir = Dir::new();
    dir.write("rows.jsonl", format!("{}\n{}\n", TOKENISED[0].1, TOKENISED[2].1));
    let run = |args: &[&str]| dir.suasion(&["verify", "-D", "rows.jsonl"]).args(args).run();
    run(&[]).code(1).prints("M008");
    run(&["--ignore", "M008"]).code(0);
    run(&["--select", "T"]).code(0);
    run(&["--select", "M"]).code(1);
    run(&["--select", "X9"]).error(2, "E-USAGE", "X9");
}

#[test]
fn raw_rows_that_fail_are_findings() {
    let dir = Dir::new().with_model();
    dir.write(
        "rows.jsonl",
        "{\"input_text\": \"a\", \"full_text\": \"b\"}\n{\"input_text\": \"a\", \"full_text\": \"a b\"}\n",
    );
    let ran = verify(&dir).run().code(1).prints("rows.jsonl:1: ").prints("does not start with");
    fits_80_columns(&ran.stdout);
    let json = verify(&dir).arg("--json").run().code(1).json();
    assert_eq!(json["findings"][0]["row"], 0);
}

#[test]
fn html_is_one_page() {
    let dir = Dir::new().with_model();
    let row = serde_json::json!({"input_text": "<script>alert(1)</script>", "full_text": "<script>alert(1)</script> yes"});
    dir.write("rows.jsonl", row.to_string());
    verify(&dir).args(&["--html", "page.html"]).ok().says("page.html");
    let page = dir.text("page.html");
    assert!(page.to_ascii_lowercase().starts_with("<!doctype html>"));
    assert!(!page.contains("<script>alert") && !page.contains("http://") && !page.contains("https://"));
}

#[test]
fn prepared_data_verifies() {
    let dir = Dir::new().with_model().with_rows(4);
    dir.prepare("rows.jsonl", "out.jsonl").ok();
    let raw = verify(&dir).arg("--json").ok().json();
    let prepared = dir.suasion(&["verify", "-D", "out.jsonl", "--json"]).ok().json();
    assert_eq!(raw["sections"], prepared["sections"]);
}

/// Rows with a finding of each level, and an unreadable row.
fn with_findings(dir: &Dir) {
    let everything = r#"{"input_ids": [31, 32, 33], "labels": [31, 32, 33]}"#;
    let rows = [everything, TOKENISED[0].1, TOKENISED[0].1, "{\"input_ids\": []}"];
    dir.write("rows.jsonl", rows.join("\n"));
}

#[test]
fn findings_become_annotations() {
    let dir = Dir::new();
    with_findings(&dir);
    let run = |args: &[&str]| {
        let ran = dir
            .suasion(&["verify", "-D", "rows.jsonl", "--output-format", "github"])
            .args(args)
            .run()
            .code(1);
        ran.stdout
    };
    let all = run(&[]);
    let lines: Vec<&str> = all.lines().collect();
    assert_eq!(lines.len(), 4, "{all}");
    assert!(lines[0].starts_with("::error file=rows.jsonl,line=1,title=M008%3A "), "{all}");
    assert!(lines[1].starts_with("::notice file=rows.jsonl,line=3,title=D001%3A "), "{all}");
    assert!(lines[2].starts_with("::error file=rows.jsonl,line=4,title=E-ROW%3A "), "{all}");
    assert!(lines[3].starts_with("::notice title=suasion verify::4 rows, "), "{all}");
    let two = run(&["--max-findings", "2"]);
    assert!(
        two.contains("line=1,") && two.contains("line=4,") && !two.contains("line=3,"),
        "errors first: {two}"
    );
    assert!(two.contains("D001 (note) 1; 2 shown here"), "{two}");
    dir.suasion(&["verify", "-D", "rows.jsonl", "--json", "--output-format", "github"]).run().code(2);
}

#[test]
fn max_findings_lists_fewer_and_counts_all() {
    let dir = Dir::new();
    with_findings(&dir);
    let run = |args: &[&str]| dir.suasion(&["verify", "-D", "rows.jsonl"]).args(args).run().code(1).json();
    let all = run(&["--json"]);
    assert_eq!(all, run(&["--output-format", "json"]));
    let one = run(&["--json", "--max-findings", "1"]);
    assert_eq!(
        (all["findings"].as_array().unwrap().len(), one["findings"].as_array().unwrap().len()),
        (3, 1)
    );
    assert_eq!(all["counts"], one["counts"]);
}

#[test]
fn sarif_names_lines_and_fingerprints_that_do_not_move() {
    let dir = Dir::new();
    with_findings(&dir);
    let run =
        || dir.suasion(&["verify", "-D", "rows.jsonl", "--output-format", "sarif"]).run().code(1).json();
    let of = |log: &serde_json::Value| {
        let results = log["runs"][0]["results"].as_array().unwrap().clone();
        results
            .into_iter()
            .map(|result| {
                let place = &result["locations"][0]["physicalLocation"];
                assert_eq!(place["artifactLocation"]["uri"], "rows.jsonl");
                let line = place["region"]["startLine"].as_u64().unwrap();
                let print =
                    result["partialFingerprints"]["primaryLocationLineHash"].as_str().unwrap().to_string();
                (result["ruleId"].as_str().unwrap().to_string(), line, print)
            })
            .collect::<Vec<_>>()
    };
    let log = run();
    let before = of(&log);
    let places: Vec<(&str, u64)> = before.iter().map(|(code, line, _)| (code.as_str(), *line)).collect();
    assert_eq!(places, [("M008", 1), ("D001", 3), ("E-ROW", 4)]);
    let rules = log["runs"][0]["tool"]["driver"]["rules"].as_array().unwrap();
    for result in log["runs"][0]["results"].as_array().unwrap() {
        assert_eq!(rules[result["ruleIndex"].as_u64().unwrap() as usize]["id"], result["ruleId"]);
    }
    // With one more row at the start: the same findings at other lines.
    dir.write(
        "rows.jsonl",
        format!("{}\n{}", r#"{"input_ids": [21, 22], "labels": [-100, 22]}"#, dir.text("rows.jsonl")),
    );
    let after = of(&run());
    let prints =
        |list: &[(String, u64, String)]| list.iter().map(|(_, _, print)| print.clone()).collect::<Vec<_>>();
    assert_eq!(prints(&before), prints(&after));
    assert_eq!(after[0].1, 2);
}

#[test]
fn allowed_findings_do_not_fail_the_check() {
    let dir = Dir::new();
    dir.write("rows.jsonl", TOKENISED[2].1);
    let run = |args: &[&str]| dir.suasion(&["verify", "-D", "rows.jsonl"]).args(args).run();
    run(&[]).code(1).prints("fix: correct the labels");
    run(&["--set", "allow_findings=M008"]).code(0).prints("M008");
}

/// A file name, a message and a row with 7-bit and 8-bit escape codes, in every format.
#[test]
fn escape_codes_reach_no_terminal() {
    let dir = Dir::new().with_model();
    let evil = "\u{1b}[31m\u{9b}31m\u{7}\u{7f}\u{202e}";
    let name = format!("rows{evil}.jsonl");
    let rows = [
        serde_json::json!({"prompt": format!("a{evil}"), "completion": format!("b{evil} c")}),
        serde_json::json!({"prompt": "a", evil: evil}),
        serde_json::json!({"input_text": evil, "full_text": "x"}),
        serde_json::json!({"messages": [{"role": evil, "content": evil}]}),
        serde_json::json!({"input_ids": [70, 71], "labels": [70, 71], "origins": evil}),
        serde_json::json!({"input_ids": evil, "labels": [evil]}),
    ];
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    dir.write(&name, &lines);
    for (row, values) in rows.iter().enumerate() {
        dir.write(&format!("{row}{name}"), values.to_string());
        for format in ["text", "json", "github", "sarif"] {
            for data in [name.clone(), format!("{row}{name}")] {
                let ran = dir
                    .suasion(&["verify", "-M", "model", "-D", &data, "--ids", "--output-format", format])
                    .run();
                for text in [&ran.stdout, &ran.stderr] {
                    let bad = text.chars().find(|c| c.is_control() && *c != '\n');
                    assert_eq!(bad, None, "{format}: {text:?}");
                }
            }
        }
    }
}

/// Tokenised rows as another program would write them: prepared rows without their origins.
fn foreign_rows(dir: &Dir) -> Vec<serde_json::Value> {
    dir.prepare("rows.jsonl", "out.jsonl").ok();
    let bare =
        |row: serde_json::Value| serde_json::json!({"input_ids": row["input_ids"], "labels": row["labels"]});
    dir.lines("out.jsonl").into_iter().map(bare).collect()
}

#[test]
fn source_rows_say_which_tokens_are_whose() {
    let dir = Dir::new().with_model().with_rows(6);
    let mut rows = foreign_rows(&dir);
    // In row 3 a token of the task is supervised, and row 4 has lost its end.
    let at = dir.lines("out.jsonl")[3]["origins"].as_str().unwrap().rfind('K').unwrap();
    rows[3]["labels"][at] = rows[3]["input_ids"][at].clone();
    for key in ["input_ids", "labels"] {
        rows[4][key].as_array_mut().unwrap().pop();
    }
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    dir.write("foreign.jsonl", lines);
    let codes = |args: &[&str]| {
        let json = dir.verify("foreign.jsonl").args(args).arg("--json").run().code(1).json();
        let found = json["findings"].as_array().unwrap().clone();
        found.iter().map(|f| format!("{} {}", f["code"].as_str().unwrap(), f["row"])).collect::<Vec<_>>()
    };
    assert!(codes(&[]).iter().all(|code| code.starts_with("M002")));
    assert_eq!(codes(&["--source", "rows.jsonl"]), ["M004 3", "M002 4", "L002 4"]);
    let shown = dir.verify("foreign.jsonl").args(&["--source", "rows.jsonl", "--row", "3"]).run().code(1);
    let shown = shown.prints("LEARNED task").prints("learned with weight 1 though it is prompt");
    assert!(
        shown.stdout.contains("what to do") && shown.stdout.contains("train_on_inputs: false"),
        "{}",
        shown.stdout
    );
}

/// Tokenised rows whose ids refer to their source rows, in another order and each without its last token, so that only
/// the id can match them.
#[test]
fn ids_pair_rows_with_their_source_rows() {
    let dir = Dir::new().with_model().with_rows(4);
    let numbered = |names: [serde_json::Value; 4]| {
        let rows = dir.lines("rows.jsonl").into_iter().zip(names);
        rows.map(|(mut row, name)| {
            row["id"] = name;
            format!("{row}\n")
        })
        .collect::<String>()
    };
    let mut rows = foreign_rows(&dir);
    for (row, name) in rows.iter_mut().zip(["a", "7", "c", "d"]) {
        row["id"] = name.into();
        for key in ["input_ids", "labels"] {
            row[key].as_array_mut().unwrap().pop();
        }
    }
    rows.swap(0, 3);
    rows[2]["id"] = "zz".into();
    let lines = |rows: &[serde_json::Value]| rows.iter().map(|row| format!("{row}\n")).collect::<String>();
    // A number in one file and a string in the other are the same id.
    dir.write("source.jsonl", numbered(["a".into(), 7.into(), "c".into(), "d".into()]));
    dir.write("foreign.jsonl", lines(&rows));
    let found = |args: &[&str]| {
        let json = dir.verify("foreign.jsonl").args(&["--source", "source.jsonl", "--json"]).args(args);
        let json = json.run().code(1).json();
        let found = json["findings"].as_array().unwrap().iter().filter(|f| f["code"] == "L002");
        found.map(|f| format!("{} {}", f["row"], f["message"].as_str().unwrap())).collect::<Vec<_>>()
    };
    for args in [&[][..], &["--id", "id"]] {
        let [first, second, third, last] = found(args).try_into().unwrap();
        assert!(
            first.starts_with("0 the row is the first ")
                && first.contains("source row 3 (of the same \"id\")"),
            "{first}"
        );
        assert!(second.contains("source row 1 (of the same \"id\") gives: it was cut"), "{second}");
        assert_eq!(third, "2 no source row has the \"id\" \"zz\"");
        assert!(last.contains("source row 0 (of the same \"id\")"), "{last}");
    }
    let by_order = found(&["--by-order"]);
    assert!(
        by_order[0].contains(", and source row 0 has ") && by_order[2].contains("source row 2 gives"),
        "{by_order:?}"
    );

    let refused = |args: &[&str], text: &str| {
        let ran = dir.verify("foreign.jsonl").args(&["--source", "source.jsonl"]).args(args).run();
        ran.error(3, "E-ROW", text).says("--by-order");
    };
    refused(&["--id", "uid"], "the row has no \"uid\"");
    dir.write("source.jsonl", numbered(["a".into(), 7.into(), "a".into(), "d".into()]));
    refused(&[], "source.jsonl:3: its \"id\" is \"a\", as that of row 0");
    dir.write("source.jsonl", numbered(["a".into(), serde_json::Value::Null, "c".into(), "d".into()]));
    refused(&[], "source.jsonl:2: its \"id\" is null");
    dir.write("source.jsonl", numbered(["a".into(), 7.into(), "c".into(), "d".into()]));
    rows[1]["id"] = "a".into();
    dir.write("foreign.jsonl", lines(&rows));
    refused(&[], "foreign.jsonl:4: its \"id\" is \"a\", as that of row 1");
    dir.verify("foreign.jsonl").args(&["--id", "id"]).run().error(2, "E-USAGE", "--source");
}

#[test]
fn a_template_needs_a_tokenizer_and_must_be_one() {
    let dir = Dir::new().with_model();
    dir.write("rows.jsonl", TOKENISED[0].1).write("t.jinja", "{% for %}");
    let bare = dir.suasion(&["verify", "-D", "rows.jsonl", "--template", "t.jinja"]).run();
    bare.error(2, "E-USAGE", "--template needs a tokenizer");
    dir.verify("rows.jsonl").args(&["--template", "t.jinja"]).run().error(2, "E-USAGE", "t.jinja");
}
