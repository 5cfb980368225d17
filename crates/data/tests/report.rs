//! Reports: exact small outputs, and properties of outputs for hostile input.

mod common;

use common::{Scratch, byte_tokenizer, kept, outcomes, pipeline_of};
use serde_json::{Value, json};
use suasion_data::report::terminal::{self, Style};
use suasion_data::report::{Findings, Gallery, RowView, html, json as report_json};
use suasion_data::{Kept, Mode, OnBadRow, Outcome, Policy, Summary, TruncationMode};
use unicode_width::UnicodeWidthStr;

fn run(rows: &[Value], policy: &Policy) -> (Vec<Outcome>, Summary) {
    let s = Scratch::new();
    let lines: String = rows.iter().map(|r| format!("{r}\n")).collect();
    let path = s.file("data.jsonl", lines);
    let tokenizer = byte_tokenizer(true);
    let mut pipeline = pipeline_of(Some(&tokenizer), policy);
    pipeline.mode = Mode::Verify;
    pipeline.keep_text = true;
    outcomes(&pipeline, &path)
}

/// The kept row with a file name that does not change from run to run.
fn fixed(outcomes: &[Outcome], i: usize) -> Kept {
    let mut kept = kept(outcomes, i).clone();
    kept.sample.id.file = std::path::Path::new("data.jsonl").into();
    kept
}

fn view(outcomes: &[Outcome], i: usize) -> RowView {
    RowView::new(&fixed(outcomes, i), Some(&byte_tokenizer(true)))
}

/// The page of `verify` about rows.
fn page(rows: &[Value], policy: &Policy, name: &str) -> String {
    let (all, summary) = run(rows, policy);
    let mut gallery = Gallery::new(0..3, None);
    all.into_iter().for_each(|outcome| gallery.add(outcome));
    html::page(&html::Verified {
        name: name.into(),
        summary: &summary,
        gallery: &gallery,
        rows: gallery.chosen(Some(&byte_tokenizer(true))),
        losses: None,
        objective: policy.objective,
        flags: vec!["--data".into(), name.into()],
        prepared: false,
        tokenizer: true,
    })
}

/// The text of a page's rows, without the style and the script.
fn body(page: &str) -> &str {
    let (_, rest) = page.split_once("</style>").unwrap();
    rest.rsplit_once("<script>").unwrap().0
}

#[test]
fn a_row_without_colour() {
    let rows = [
        json!({"prompt": "[SYSTEM] Be kind.\n[TASK] Tea or 日本 coffee? ", "completion": "Tea: it\twakes gently."}),
    ];
    let (all, _) = run(&rows, &Policy::default());
    let text = terminal::row(&view(&all, 0), &Style { width: 60, ..Style::default() });
    let expected = "\
data.jsonl:1 (row 0): 70 tokens, 48 masked, 22 supervised
(31.4 %), 22 targets

masked  scaffold         9 | [SYSTEM]
masked  system          10 | ·Be kind.↵
masked  scaffold         6 | [TASK]
masked  task            23 | ·Tea or 日本 coffee?·
LEARNED response        21 > Tea: it⇥wakes gently.
LEARNED end_of_turn      1 > <|end|>

the model is trained on
  «Tea: it⇥wakes gently.<|end|>»

why
  masked scaffold      masked: a marker, separator, BOS, or
                       text after the stop token
  masked system        masked: prompt, section system
  masked task          masked: prompt, section task
  LEARNED response     learned: the response
  LEARNED end_of_turn  learned: the stop token
";
    assert_eq!(text, expected, "\n{text}");
}

#[test]
fn ids_and_origins_on_request() {
    let (all, _) = run(&[json!({"prompt": "a ", "completion": "é"})], &Policy::default());
    let text = terminal::row(&view(&all, 0), &Style { ids: true, origins: true, ..Style::default() });
    for line in [
        "      0 B 257 \"<|bos|>\"\n",
        "      1 O 97 \"a\"  2 O 32 \" \"\n",
        "      3 R 195 \"<0xC3>\"  4 R 169 \"<0xA9>\"\n",
        "      5 E 256 \"<|end|>\"\n",
    ] {
        assert!(text.contains(line), "{line:?} in\n{text}");
    }
    let only_origins = terminal::row(&view(&all, 0), &Style { origins: true, ..Style::default() });
    assert!(only_origins.contains("      1 O \"a\"  2 O \" \"\n"), "{only_origins}");
}

#[test]
fn cuts_are_shown_where_they_were() {
    let policy = Policy { max_length: Some(30), ..Policy::default() };
    let row = json!({"prompt": "[CONTEXT] one two three four [TASK] q ", "completion": "abc"});
    let (all, _) = run(&[row], &policy);
    let v = view(&all, 0);
    let shown: Vec<(&str, &str, usize, &str)> =
        v.runs.iter().map(|r| (r.state(), r.origin.name(), r.count, r.text.as_str())).collect();
    assert_eq!(
        shown,
        [
            ("masked", "scaffold", 10, "[CONTEXT]"),
            ("cut", "context", 13, " one two thre"),
            ("masked", "context", 7, "e four "),
            ("masked", "scaffold", 6, "[TASK]"),
            ("masked", "task", 3, " q "),
            ("LEARNED", "response", 3, "abc"),
            ("LEARNED", "end_of_turn", 1, "<|end|>"),
        ]
    );
    let text = terminal::row(&v, &Style::default());
    assert!(text.contains("cut     context         13 / ·one two thre\n"), "{text}");
    assert!(
        text.contains("T002  warning  13 prompt tokens cut to fit max_length = 30 (context 13)\n"),
        "{text}"
    );
}

/// Every byte of the text is in exactly one run, whatever was cut and however tokens share characters.
#[test]
fn runs_hold_the_whole_text_once() {
    let prompt = "[SYSTEM] 👩‍👩‍👧 e\u{301} [CONTEXT] x\r\n\u{1b}[31m [TASK] ?? ";
    for mode in [TruncationMode::KeepResponse, TruncationMode::KeepStart, TruncationMode::KeepEnd] {
        for max in 1..90 {
            let policy = Policy { truncation_mode: mode, max_length: Some(max), ..Policy::default() };
            let (all, _) = run(&[json!({"prompt": prompt, "completion": "ja 👍🏽 ok"})], &policy);
            let Outcome::Kept(k) = &all[0] else { continue };
            let v = RowView::new(k, None);
            let text: String = v.runs.iter().map(|r| r.text.as_str()).collect();
            assert_eq!(text, format!("{prompt}ja 👍🏽 ok<|end|>"));
            assert_eq!(v.runs.iter().filter(|r| !r.cut).map(|r| r.count).sum::<usize>(), k.sample.len());
            // Every run has its reason as text.
            assert!(v.runs.iter().all(|r| !r.reason().is_empty()));
        }
    }
}

#[test]
fn any_data_is_safe_and_fits_at_any_width() {
    let hostile: String = (1..0x250u32)
        .chain([0x200b, 0x202e, 0x2066, 0xfeff, 0x1f468, 0x200d, 0x1f469, 0xfe0f, 0x4e2d, 0x0e01, 0x0e33])
        .filter_map(char::from_u32)
        .collect();
    let rows = [
        json!({"prompt": format!("{hostile}\u{1b}]0;title\u{7}"), "completion": format!("<script>alert(1)</script>&\"'{hostile}")}),
    ];
    let (all, summary) = run(&rows, &Policy { max_length: None, ..Policy::default() });
    let v = view(&all, 0);
    for width in [1, 20, 40, 49, 60, 80, 200] {
        for (ids, origins) in [(false, false), (true, true)] {
            let style = Style { width, ids, origins, color: false };
            let text = terminal::row(&v, &style) + &terminal::summary(&summary, &style);
            for line in text.lines() {
                assert!(
                    !line
                        .chars()
                        .any(|c| c.is_control()
                            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')),
                    "{line:?}"
                );
                assert!(width < 60 || line.width() <= width, "{} columns of {width}: {line}", line.width());
            }
        }
    }
    let page = page(&rows, &Policy { max_length: None, ..Policy::default() }, "t <b>");
    let body = body(&page);
    assert!(
        body.contains("&lt;script&gt;")
            && page.contains("<title>suasion verify: t &lt;b&gt;</title>")
            && !body.contains("<b>\"")
    );
    assert!(
        !body.contains("<script")
            && !page.contains('\u{202e}')
            && !page.contains('\u{1b}')
            && !page.contains('\0')
    );
}

#[test]
fn colour_is_beside_the_words_never_alone() {
    let rows = [json!({"prompt": "[TASK] a ", "completion": "b"}), json!({"prompt": "a", "completion": ""})];
    let (all, summary) = run(&rows, &Policy::default());
    let plain = Style::default();
    let color = Style { color: true, ..plain };
    let strip = |text: &str| {
        let mut out = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('\u{1b}') {
            out.push_str(before);
            rest = after.split_once('m').unwrap().1;
        }
        out + rest
    };
    let row = terminal::row(&view(&all, 0), &color);
    assert!(row.contains("\u{1b}[1;32m"));
    assert_eq!(strip(&row), terminal::row(&view(&all, 0), &plain));
    assert_eq!(strip(&terminal::summary(&summary, &color)), terminal::summary(&summary, &plain));
}

#[test]
fn a_data_set() {
    let mut rows = vec![json!({"prompt": "[TASK] ab ", "completion": "xyzxyzx"}); 14];
    rows.push(json!({"prompt": "a", "completion": ""}));
    rows.push(json!({"prompt": "a"}));
    rows.push(json!({"prompt": "z".repeat(5000), "completion": "yes"}));
    let policy = Policy {
        truncation_mode: TruncationMode::KeepStart,
        on_bad_row: OnBadRow::Skip,
        ..Policy::default()
    };
    let (_, summary) = run(&rows, &policy);
    let text = terminal::summary(&summary, &Style::default());
    let expected = "\
rows     17: 14 kept (0 cut), 1 left out, 2 failed
         left out: 1 without a target
tokens   266: 154 masked, 112 supervised (42.1 %)
targets  112 in 14 trainable rows; the longest row has 19 tokens

share of           tokens  loss on all               now
task                   56  ███▌              22.2 %                    0.0 %
scaffold               98  █████▍            33.3 %                    0.0 %
response               98  ██████▎           38.9 %  ██████████████   87.5 %
end_of_turn            14  ▉                  5.6 %  ██               12.5 %

findings
  E-ROW error         1  the row cannot become a sample: row 15
  M001  error         2  no supervised token: rows 14, 16
  T001  warning       1  supervised tokens lost by truncation: row 16
  T002  warning       1  prompt cut by truncation: row 16
  D001  note         13  duplicate of another row, or response copied from its
                         prompt: rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 3 more
";
    println!("{text}");
    // The shares by hand: 14 rows of 18 targets after the first token: task 4, scaffold 6, response 7, stop 1.
    assert!(
        text.contains("22.2 %")
            && text.contains("33.3 %")
            && text.contains("38.9 %")
            && text.contains("5.6 %")
    );
    let words = |t: &str| {
        t.lines()
            .map(|l| l.replace(|c: char| !c.is_ascii(), "").split_whitespace().collect::<Vec<_>>().join(" "))
            .collect::<Vec<_>>()
    };
    assert_eq!(words(&text), words(expected));
    assert!(text.lines().all(|l| l.width() <= 80));
    let narrow = terminal::summary(&summary, &Style { width: 40, ..Style::default() });
    assert!(narrow.contains("87.5 %") && !narrow.contains('█'));
}

#[test]
fn verify_json_is_the_contract() {
    let rows =
        [json!({"prompt": "[TASK] ab ", "completion": "xyz"}), json!({"prompt": "a", "completion": ""})];
    let (all, summary) = run(&rows, &Policy::default());
    let mut findings = Findings::default();
    all.iter().for_each(|outcome| findings.add(outcome).unwrap());
    let value = serde_json::to_value(report_json::verify(&summary, &findings)).unwrap();
    // BOS, 6 of the marker, 4 of the task, 3 + 1 supervised; all except the BOS would be targets.
    assert_eq!(
        value,
        json!({
            "rows": 2, "trainable_rows": 1, "tokens": 15, "supervised_tokens": 4,
            "sections": {
                "task": {"tokens": 4, "share_before": 4.0 / 14.0, "share_after": 0.0},
                "scaffold": {"tokens": 7, "share_before": 6.0 / 14.0, "share_after": 0.0},
                "response": {"tokens": 3, "share_before": 3.0 / 14.0, "share_after": 0.75},
                "end_of_turn": {"tokens": 1, "share_before": 1.0 / 14.0, "share_after": 0.25},
            },
            "findings": [{"row": 1, "code": "M001", "level": "error", "message": "the response is empty"}],
            "counts": {"M001": 1},
        })
    );
}

#[test]
fn a_page_stands_alone() {
    let rows =
        [json!({"prompt": "[TASK] ab\n", "completion": "xé"}), json!({"prompt": "a", "completion": ""})];
    let page = page(&rows, &Policy::default(), "my rows.jsonl");
    for part in ["src=", "url(", "@import", "http://", "https://", " style=", " onclick", "innerHTML"] {
        assert!(!page.contains(part), "{part}");
    }
    let links = page.matches("href=\"").count();
    assert!(links > 0 && links == page.matches("href=\"#").count());
    assert!(
        page.contains("default-src 'none'; style-src 'sha256-") && page.contains("'; script-src 'sha256-")
    );
    let body = body(&page);
    // The verdict, its reasons, the next steps with their commands.
    assert!(body.contains("Not ready to train on: 1 of 2 rows has an error: no supervised token."), "{body}");
    assert!(body.contains("suasion verify --data &#39;my rows.jsonl&#39; --row 1"));
    // Each token, with its id; two that form one character are shown as one.
    for part in [
        "<i data-id=\"120\">x</i><i data-id=\"195 169\">é</i>",
        "<i data-id=\"256\">&lt;|end|&gt;</i>",
        "<i data-id=\"257\">&lt;|bos|&gt;</i><i data-id=\"91\">[</i>",
        "<b>learned</b> response <small>×3</small>",
        "<i data-id=\"98\">b</i><i data-id=\"10\">↵\n</i>",
    ] {
        assert!(body.contains(part), "{part}\n{body}");
    }
    // No bar for a share of 0.
    assert!(body.contains("0.0 %</span><svg class=\"bar\" aria-hidden=\"true\" focusable=\"false\"></svg>"));
    // Every element that is opened is closed.
    for tag in [
        "html", "head", "body", "main", "section", "table", "thead", "tbody", "tr", "td", "th", "span",
        "div", "p", "ul", "ol", "li", "svg", "i", "details", "summary", "figure", "article", "nav", "select",
        "option", "form",
    ] {
        let opened = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
        assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
    }
}

#[test]
fn a_page_keeps_the_rows_that_matter() {
    // One row in 997 has no answer; one is the longest.
    let mut rows: Vec<Value> =
        (0..3000).map(|i| json!({"prompt": format!("[TASK] {i} "), "completion": "ok ok"})).collect();
    for i in (500..3000).step_by(997) {
        rows[i]["completion"] = "".into();
    }
    rows[2222] = json!({"prompt": format!("[TASK] {}", "z".repeat(900)), "completion": "ok"});
    let page = page(&rows, &Policy::default(), "rows.jsonl");
    let body = body(&page);
    for row in [0, 1, 2, 500, 1497, 2222, 2494] {
        assert!(body.contains(&format!("id=\"row-{row}\"")), "{row}");
    }
    assert!(body.contains("<span class=\"soft\">longest, least learned</span>"));
    // Those with findings come first.
    assert!(body.find("id=\"row-500\"").unwrap() < body.find("id=\"row-0\"").unwrap());
    assert!((30..80).contains(&body.matches("<details class=\"row\"").count()));
    assert!(body.contains("of 3,000 rows are here") && body.contains("--row N"));
}

#[test]
fn a_page_stays_small_whatever_the_rows() {
    let id = |row: usize, i: usize| (row * 7 + i) % 256;
    let rows: Vec<Value> = (0..60)
        .map(|row| {
            // Thousands of short runs, which need the most markup per token.
            let ids: Vec<usize> = (0..9000).map(|i| id(row, i)).collect();
            let label = |i: usize| if i.is_multiple_of(2) { -100 } else { id(row, i) as i64 };
            json!({"input_ids": ids, "labels": (0..9000).map(label).collect::<Vec<_>>()})
        })
        .collect();
    let page = page(&rows, &Policy { max_length: None, ..Policy::default() }, "rows.jsonl");
    assert!(page.len() < 5_000_000, "{} bytes", page.len());
    let body = body(&page);
    let kept = body.matches("<details class=\"row\"").count();
    assert!((1..60).contains(&kept) && body.contains(&format!("{kept} of 60 rows are here")), "{kept}");
    assert!(body.contains(" more parts of "));
    // No link leads to a row that was left out for lack of room.
    for link in body.split("href=\"#row-").skip(1) {
        let row = link.split('"').next().unwrap();
        assert!(body.contains(&format!("id=\"row-{row}\"")), "{row}");
    }
}

#[test]
fn tokenised_rows_are_shown_by_decoding() {
    let rows =
        [json!({"input_ids": [257, 97, 32, 195, 169, 256], "labels": [-100, -100, -100, 195, 169, 256]})];
    let (all, _) = run(&rows, &Policy::default());
    let shown: Vec<(String, String)> =
        view(&all, 0).runs.iter().map(|r| (format!("{} {}", r.state(), r.origin), r.text.clone())).collect();
    let expected = [
        ("masked scaffold", "<|bos|>"),
        ("masked prompt", "a "),
        ("LEARNED response", "é"),
        ("LEARNED end_of_turn", "<|end|>"),
    ];
    assert_eq!(shown, expected.map(|(a, b)| (a.to_string(), b.to_string())));
    let without = RowView::new(&fixed(&all, 0), None);
    assert_eq!(without.runs[2].text, "195 169 ");
}
