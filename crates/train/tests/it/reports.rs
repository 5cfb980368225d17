//! The model card and the report page.

use crate::common::*;
use suasion_train::{DataCard, FindingCount, SampleReply, SectionShare, Settings, Strategy, write_report};

#[test]
fn reports_have_the_numbers_and_escape_the_text_of_rows() {
    let (train, held_out) = (rows(6, 1), rows(3, 2));
    let (_dir, out) = folder();
    let settings = Settings {
        max_steps: Some(5),
        eval_strategy: Strategy::Steps,
        eval_steps: Some(2.into()),
        ..quick()
    };
    let report = Job::new(&train, settings.clone(), &out).eval(&held_out).run().unwrap();

    let hostile = "<script>alert('x')</script> | ``` & \u{7} ünï 😀";
    let card = DataCard {
        title: hostile.into(),
        base_model: "owner/tiny-llama".into(),
        data: vec!["rows.jsonl".into()],
        rows_read: 1234567,
        tokens: 1000,
        supervised_tokens: 205,
        sections: vec![SectionShare {
            name: hostile.into(),
            tokens: 795,
            share_before: 0.795,
            share_after: 0.0,
        }],
        findings: vec![FindingCount {
            code: "T002".into(),
            level: "warning".into(),
            count: 3,
            example: hostile.into(),
        }],
        configuration: format!("a: 1 # {hostile}"),
        ..DataCard::default()
    };
    let reply = SampleReply {
        prompt: hostile.into(),
        before: Some("zzz".into()),
        reply: "because".into(),
        reference: Some(hostile.into()),
        stopped: "stop".into(),
    };
    write_report(&out, &report, &settings, &identity(), &card, &[reply], None).unwrap();

    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    let body = page.split_once("</style>").unwrap().1.rsplit_once("<script>").unwrap().0;
    assert!(!body.contains("<script>") && body.contains("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;"));
    assert!(!page.contains('\u{7}') && page.contains("ünï 😀"));
    // Self-contained: nothing is fetched, and a policy says so.
    for part in ["http://", "https://", "src=", "@import", "url("] {
        assert!(!page.contains(part), "{part}");
    }
    assert!(page.contains("default-src 'none'; style-src 'sha256-") && page.contains("<html lang=\"en\">"));
    let (before, after) = (report.before.as_ref().unwrap(), report.after.as_ref().unwrap());
    for number in [after.loss, after.sections["task"].loss, before.loss] {
        assert!(body.contains(&format!("{number:.4}")), "{number}");
    }
    assert!(body.contains("79.5 %") && body.contains("20.5 %"));
    // The verdict follows the losses.
    let learned = if after.loss < before.loss { " fell from " } else { "The model has not learned: " };
    assert!(body.contains(learned), "{body}");
    assert!(body.contains("suasion train") && body.contains("<h4>Before training</h4><pre>zzz</pre>"));
    // Every opened element is closed.
    for tag in
        ["table", "tr", "td", "th", "pre", "p", "ul", "li", "h2", "h3", "svg", "main", "details", "div"]
    {
        let opened = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
        assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
    }
    // The points of the curve are inside the drawing.
    let drawing = body.split("Loss over steps.").nth(1).unwrap();
    let points = drawing.split("<path class=\"main\" d=\"M").nth(1).unwrap().split('"').next().unwrap();
    let points: Vec<(f64, f64)> = points
        .split('L')
        .map(|p| p.split_once(' ').map(|(x, y)| (x.parse().unwrap(), y.parse().unwrap())).unwrap())
        .collect();
    assert_eq!(points.len(), 5);
    assert!(
        points.iter().all(|(x, y)| (0.0..=1000.0).contains(x) && (0.0..=220.0).contains(y)),
        "{points:?}"
    );
    let losses: Vec<f64> = report.steps.iter().map(|s| s.loss.unwrap()).collect();
    assert_eq!(losses[0] > losses[4], points[0].1 < points[4].1, "a higher loss is drawn higher");

    let readme = std::fs::read_to_string(out.join("README.md")).unwrap();
    assert!(readme.starts_with("---\nlibrary_name: transformers\n"));
    assert!(
        readme.contains("base_model: owner/tiny-llama\n") && readme.contains("| Data fingerprint | f1 |")
    );
    assert!(readme.contains("responses only") && readme.contains("205 of 1,000 (20.5 %)"));
    // Bars in cells are escaped, and a fence is longer than those in its text.
    assert!(readme.contains("\\| ``` &") && readme.contains("````text\n<script>"));
}

#[test]
fn a_local_path_is_not_called_a_hub_model() {
    let train = rows(4, 1);
    let (_dir, out) = folder();
    let settings = Settings { max_steps: Some(1), ..quick() };
    let report = Job::new(&train, settings.clone(), &out).run().unwrap();
    for path in ["/models/llama", "./models/llama", "../llama", "random weights"] {
        let card = DataCard { base_model: path.into(), ..DataCard::default() };
        write_report(&out, &report, &settings, &identity(), &card, &[], None).unwrap();
        let readme = std::fs::read_to_string(out.join("README.md")).unwrap();
        assert!(!readme.contains("base_model:"), "{path}");
    }
}
