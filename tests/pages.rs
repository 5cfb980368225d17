//! The pages in a browser, with rows that try to run scripts in them (`tests/pages.py`).

use crate::util::{Dir, root};
use serde_json::json;
use std::process::Command;

/// Texts that would run a script, or break out of their context, in a page that does not escape them.
const HOSTILE: [&str; 16] = [
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=2>",
    "\"><svg onload=window.pwned=3>",
    "' onmouseover='window.pwned=4' x='",
    "\" onfocus=\"window.pwned=5\" autofocus tabindex=0 x=\"",
    "</title></style></textarea></noscript><script>window.pwned=6</script>",
    "<!-- --><script>window.pwned=7</script><!--",
    "<iframe srcdoc=\"<script>parent.pwned=8</script>\"></iframe>",
    "<a href=\"javascript:window.pwned=9\">click</a>",
    "<details open ontoggle=window.pwned=10>",
    "<base href=\"https://example.com/\"><meta http-equiv=refresh content=\"0;url=https://example.com/\">",
    "&lt;script&gt;window.pwned=11&lt;/script&gt; &#60;script&#62;",
    "<link rel=stylesheet href=https://example.com/x.css><style>*{display:none}</style>",
    "${window.pwned=12} {{constructor.constructor('window.pwned=13')()}} `${pwned=14}`",
    "\u{0}<\u{0}script>window.pwned=15</script>\u{202e}\u{2066}txt.exe\u{7}\u{1b}[31m\u{feff}",
    "<math><mtext></p><style><img src onerror=window.pwned=16></style>",
];

/// A Python with playwright and a Chromium; otherwise the test is recorded as skipped.
fn browser() -> Option<std::path::PathBuf> {
    let python = suasion_test_support::peers_python()?;
    let has = Command::new(&python)
        .args(["-c", "import playwright"])
        .output()
        .is_ok_and(|ran| ran.status.success());
    let chromium = std::env::var_os("CHROMIUM").unwrap_or_else(|| "/usr/bin/chromium".into());
    if !has || !std::path::Path::new(&chromium).exists() {
        suasion_test_support::skipped("no playwright or no Chromium (CHROMIUM)");
        return None;
    }
    Some(python)
}

#[test]
fn pages_are_safe_and_readable_in_a_browser() {
    let Some(python) = browser() else { return };
    let dir = Dir::new().with_weights();
    let mut rows: Vec<String> = Vec::new();
    for (i, text) in HOSTILE.iter().enumerate() {
        let prompt = format!("[SYSTEM] {text}\n[CONTEXT] {i}\n[TASK] {text}\n[RESPONSE]");
        rows.push(json!({"input_text": prompt, "full_text": format!("{prompt} {text}")}).to_string());
    }
    // A duplicate (D001), a copied answer, a long word, an empty answer, and invalid rows.
    rows.push(rows[0].clone());
    let long = "unbroken".repeat(300);
    rows.push(
        json!({"input_text": format!("[TASK] {long}"), "full_text": format!("[TASK] {long} {long}")})
            .to_string(),
    );
    rows.push(json!({"input_text": "[TASK] a", "full_text": "[TASK] a"}).to_string());
    rows.push(json!({"<script>window.pwned=17</script>": "x"}).to_string());
    rows.push("{\"input_text\": \"<img src=x onerror=window.pwned=18>\", ".into());
    let name = "<img src=x onerror=pwned=19>'\"&\u{202e}.jsonl";
    dir.write(name, rows.join("\n"));
    dir.suasion(&[
        "verify",
        "-M",
        "model",
        "-D",
        name,
        "--set",
        "init=random",
        "--html",
        "bad.html",
        "--loss",
    ])
    .run()
    .code(1);

    // A run whose files have hostile names, and a page without findings.
    let good: Vec<String> = HOSTILE
        .iter()
        .enumerate()
        .map(|(i, text)| {
            json!({"prompt": format!("[TASK] {text} {i}\n"), "completion": format!("{i} {text}")}).to_string()
        })
        .collect();
    let good_name = "<script>window.pwned=20<\u{2215}script>.jsonl";
    dir.write(good_name, good.join("\n"));
    dir.suasion(&["verify", "-M", "model", "-D", good_name, "--html", "good.html"]).run();
    let out = "out\" onmouseover=\"window.pwned=21";
    dir.train(good_name)
        .args(&["-o", out, "--max_steps=40", "--eval_fraction=0.2", "--eval_strategy=steps"])
        .args(&["--eval_steps=10", "--logging_steps=1"])
        .ok();
    std::fs::copy(dir.path(out).join("report.html"), dir.path("run.html")).unwrap();

    // A diagnosis, and a comparison.
    dir.suasion(&[
        "diagnose",
        "--base",
        "model",
        "--tuned",
        out,
        "-D",
        good_name,
        "--html",
        "diagnosis.html",
    ])
    .ok();
    dir.suasion(&["compare", "-M", "model", "-D", good_name, "--max_steps=4", "-o", "comparison.json"]).ok();

    let pages =
        ["bad.html", "good.html", "run.html", "diagnosis.html", "comparison.html"].map(|name| dir.path(name));
    let ran = Command::new(python).arg(root().join("tests/pages.py")).args(&pages).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success(), "{out}\n{err}");
}
