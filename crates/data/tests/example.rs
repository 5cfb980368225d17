//! Rows of every format, and rows of none.

mod common;

use std::path::Path;
use suasion_data::example::{Body, Example, Tokenised};
use suasion_data::source::Row;
use suasion_data::{Error, Format, Origin, RowId};

fn read(json: &str, format: Format) -> Result<Body, Error> {
    let id = RowId::new(Path::new("data.jsonl"), 481, Some(482));
    let serde_json::Value::Object(fields) = serde_json::from_str(json).unwrap() else { panic!() };
    Example::from_row(Row { id, fields }, format).map(|e| e.body)
}

fn text(json: &str) -> (String, String) {
    match read(json, Format::Auto).unwrap() {
        Body::Text { text, prompt_len } => (text[..prompt_len].into(), text[prompt_len..].into()),
        other => panic!("{other:?}"),
    }
}

fn tokens(json: &str) -> Tokenised {
    match read(json, Format::Auto).unwrap() {
        Body::Tokenised(t) => *t,
        other => panic!("{other:?}"),
    }
}

fn error(json: &str) -> (String, String) {
    let e = read(json, Format::Auto).unwrap_err();
    let message = e.to_string();
    let message = message.strip_prefix("data.jsonl:482: ").expect("the place comes first");
    (message.to_string(), e.help().unwrap().to_string())
}

#[test]
fn text_formats() {
    let split = ("Ask: ".to_string(), "yes é".to_string());
    assert_eq!(text(r#"{"input_text": "Ask: ", "full_text": "Ask: yes é", "id": 3}"#), split);
    assert_eq!(text(r#"{"completion": "yes é", "prompt": "Ask: "}"#), split);
    // Fields of another format that are not complete do not confuse.
    assert_eq!(
        text(r#"{"completion": "yes é", "prompt": "Ask: ", "input_text": "x", "messages": []}"#),
        split
    );
    assert_eq!(text(r#"{"prompt": "", "completion": "all"}"#), (String::new(), "all".into()));
    let both = r#"{"input_text": "Ask: ", "full_text": "Ask: yes é", "prompt": "p", "completion": "c"}"#;
    assert!(error(both).0.contains("two formats: input_text+full_text and prompt+completion"));
    let chosen = read(both, Format::PromptCompletion).unwrap();
    assert_eq!(chosen, Body::Text { text: "pc".into(), prompt_len: 1 });
}

#[test]
fn tokenised_formats() {
    let t = tokens(r#"{"input_ids": [1, 2, 3], "labels": [-100, 2, 7], "attention_mask": [1, 1, 0]}"#);
    assert_eq!((t.input_ids, t.labels), (vec![1, 2, 3], Some(vec![-100, 2, 7])));
    assert_eq!(t.attention, Some(vec![true, true, false]));
    let t = tokens(r#"{"input_ids": [1, 2], "completion_mask": [0, 1], "assistant_masks": [1, 1]}"#);
    assert_eq!((t.labels, t.mask), (None, Some(vec![false, true])));
    let t = tokens(
        r#"{"input_ids": [1, 2], "labels": null, "assistant_masks": [false, true], "prompt": "x", "completion": "y"}"#,
    );
    assert_eq!(t.mask, Some(vec![false, true]));
    let t = tokens(
        r#"{"row": 0, "input_ids": [1, 2], "labels": [-100, 2], "origins": "SE", "weights": [0, 0.5], "text": "ab"}"#,
    );
    let letter = |(origin, length): (Origin, usize)| origin.letter().to_string().repeat(length);
    let origins: String = t.origins.unwrap().into_iter().map(letter).collect();
    assert_eq!((origins.as_str(), t.weights, t.text.as_deref()), ("SE", Some(vec![0.0, 0.5]), Some("ab")));
}

#[test]
fn a_full_text_that_does_not_continue_its_input_text() {
    let input = "Convince me that the moon is made of cheese. ";
    let full = "Convince me that the moon is m\u{e4}de of cheese. It is.";
    // The letter differs; its first byte is the 31st, counted from 0 at "C": 30 characters precede it.
    let json = serde_json::json!({"input_text": input, "full_text": full}).to_string();
    let (message, help) = error(&json);
    assert_eq!(message, "\"full_text\" does not start with \"input_text\": first difference at byte 30");
    assert!(help.contains("made of cheese") && help.contains("m\u{e4}de of"), "{help}");

    let at = |input: &str, full: &str| {
        error(&serde_json::json!({"input_text": input, "full_text": full}).to_string())
    };
    let (message, help) = at("Hello \n", "Hello there");
    assert!(
        message.ends_with("first difference at byte 6")
            && help.ends_with("white space that full_text does not have there")
    );
    let (message, help) = at("Hello", "Hell");
    assert!(message.ends_with("first difference at byte 4") && help.contains("(it ends)"), "{help}");
    let (_, help) = at("a\r\nb", "a\nb c");
    assert!(help.contains("CRLF"), "{help}");
    let (_, help) = at(" a", "a b");
    assert!(help.contains("leading white space"), "{help}");
    // The difference is inside a character: both sides are still shown whole.
    let (message, help) = at("\u{e9}", "\u{e8}x");
    assert!(message.ends_with("byte 1") && help.contains('\u{e9}') && help.contains('\u{e8}'));
}

#[test]
fn fields_that_are_missing_null_or_of_a_wrong_type() {
    assert_eq!(error(r#"{"prompt": null, "completion": "x"}"#).0, "\"prompt\" is null");
    assert_eq!(error(r#"{"prompt": "x", "completion": 7}"#).0, "\"completion\" is a number, not a string");
    assert_eq!(
        error(r#"{"input_text": "x", "full_text": {"a": 1}}"#).0,
        "\"full_text\" is an object, not a string"
    );
    let (message, help) = error(r#"{"id": 1, "prompt": "x", "chosen": "y"}"#);
    assert_eq!(message, "the row is not in a known format; it has \"id\", \"prompt\", \"chosen\"");
    assert_eq!(
        help,
        "the row is {\"id\": 1, \"prompt\": \"x\", \"chosen\": \"y\"}\n\
         name its fields as one of the formats does, the nearest first:\n  \
         prompt_completion lacks \"completion\"\n  \
         preference lacks \"rejected\"\n  \
         messages lacks \"messages\"\n  \
         sharegpt lacks \"conversations\" or \"conversation\"\n  \
         segments lacks \"segments\"\n  \
         text lacks \"text\"\n  \
         input_full lacks \"input_text\" and \"full_text\"\n  \
         alpaca lacks \"instruction\" and \"output\"\n  \
         tokenised lacks \"input_ids\" and \"labels\" or \"completion_mask\" or \"assistant_masks\""
    );
    assert!(error("{}").0.ends_with("it has no fields"));
    let text = "012345678901234567890123456789012345678\u{e4}";
    let (_, help) = error(&format!("{{\"labels\": [1, 2, 3], \"text_\": \"{text}\u{f6}\"}}"));
    let lines: Vec<&str> = help.lines().collect();
    assert_eq!(lines[0], format!("the row is {{\"labels\": [1, ..], \"text_\": \"{text}\"..}}"));
    let nearest = "  tokenised lacks \"input_ids\"";
    assert_eq!(lines[2], nearest);
    let e = read(r#"{"input_text": "x", "other": 1}"#, Format::InputFull).unwrap_err();
    assert!(e.to_string().ends_with("\"full_text\" is missing; the row has: other"), "{e}");
}

#[test]
fn tokenised_rows_that_contradict_themselves() {
    let cases = [
        (r#"{"input_ids": [], "labels": []}"#, "\"input_ids\" is empty"),
        (r#"{"input_ids": [1, 2], "labels": [1]}"#, "\"labels\" has 1 entries, \"input_ids\" has 2"),
        (
            r#"{"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1]}"#,
            "\"attention_mask\" has 1 entries, \"input_ids\" has 2",
        ),
        (r#"{"input_ids": [1, -2], "labels": [1, 2]}"#, "\"input_ids\"[1] is -2"),
        (r#"{"input_ids": [[1], [2]], "labels": [1, 2]}"#, "\"input_ids\"[0] is a list, not an integer"),
        (r#"{"input_ids": [1.5], "labels": [1]}"#, "\"input_ids\"[0] is 1.5, not an integer"),
        (r#"{"input_ids": "1 2", "labels": [1]}"#, "\"input_ids\" is a string, not a list"),
        (r#"{"input_ids": [1], "labels": [null]}"#, "\"labels\"[0] is null, not an integer"),
        (r#"{"input_ids": [1], "completion_mask": [2]}"#, "\"completion_mask\"[0] is 2"),
        (r#"{"input_ids": [1], "labels": [1], "weights": [-0.5]}"#, "\"weights\"[0] is -0.5"),
        (r#"{"input_ids": [1], "labels": [1], "origins": "X"}"#, "\"origins\" has the letter 'X'"),
        (
            r#"{"input_ids": [1], "labels": [1], "origins": "RR"}"#,
            "\"origins\" has 2 entries, \"input_ids\" has 1",
        ),
    ];
    for (json, message) in cases {
        assert_eq!(error(json).0, message, "{json}");
    }
}
