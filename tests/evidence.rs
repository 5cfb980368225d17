//! `diagnose`, and `compare` over seeds.

use crate::util::Dir;

#[test]
fn a_checkpoint_is_diagnosed_from_its_base_and_rows() {
    let dir = Dir::new().with_weights().with_rows(24);
    dir.train("rows.jsonl")
        .set(&[
            "max_steps=40",
            "learning_rate=1e-2",
            "output_dir=out",
            "save_strategy=no",
            "completion_only_loss=false",
        ])
        .arg("--quiet")
        .ok();
    let diagnose = ["diagnose", "--base", "model", "--tuned", "out", "--data", "rows.jsonl"];
    let json = dir.suasion(&diagnose).args(&["--json", "--quiet"]).ok().json();
    assert_eq!((&json["verdict"], &json["rows"]), (&"all_tokens".into(), &24.into()), "{json:#}");
    assert!(json["confidence"].as_f64() > Some(0.7));
    // The figures equal those of eval on each of the two models.
    for (name, side) in [("model", "base"), ("out", "tuned")] {
        let eval = dir.suasion(&["eval", "-M", name, "-D", "rows.jsonl", "--json"]).ok().json();
        for (section, fall) in json["sections"].as_object().unwrap() {
            let (ours, theirs) =
                (fall[side].as_f64().unwrap(), eval["sections"][section]["loss"].as_f64().unwrap());
            assert!((ours - theirs).abs() < 1e-5, "{name} {section}: {ours} {theirs}");
        }
        let stop =
            json["stop"][side]["at_end"].as_f64().unwrap() - eval["stop"]["probability"].as_f64().unwrap();
        assert!(stop.abs() < 1e-6, "{name}");
    }
    let text = dir.suasion(&diagnose).args(&["--html", "page.html"]).ok();
    let page = dir.text("page.html");
    assert!(
        page.contains("The model was trained on all tokens, its prompts too.")
            && page.contains("default-src 'none'")
    );
    assert!(page.contains("suasion train --model model --data rows.jsonl -o retrained"));
    dir.suasion(&diagnose).args(&["--html", "rows.jsonl"]).run().error(
        2,
        "E-USAGE",
        "would replace what is read",
    );
    let text = text.prints("trained on all tokens, its prompts too").prints("Retrain from the base model");
    text.prints("suasion train --model model --data rows.jsonl -o").prints("loss by section");
    let same = dir.suasion(&["diagnose", "--base", "model", "--tuned", "model", "-D", "rows.jsonl"]).ok();
    same.prints("Undecided: both models say the same");
    dir.suasion(&["diagnose", "--tuned", "out", "-D", "rows.jsonl"]).run().error(
        2,
        "E-USAGE",
        "no base model is named",
    );
}

#[test]
fn a_comparison_over_seeds_has_an_interval_over_them() {
    let dir = Dir::new().with_model().with_rows(20);
    let compare = ["compare", "-M", "model", "-D", "rows.jsonl", "--init", "random", "--max_steps", "3"];
    let more = ["--eval_fraction", "0.3", "--seeds", "3"];
    let json = dir.suasion(&compare).args(&more).args(&["--json", "--quiet"]).ok().json();
    assert_eq!(json["seeds"], serde_json::json!([42, 43, 44]));
    let d = &json["response_difference"];
    let by_seed: Vec<f64> = d["by_seed"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    // Each seed is a separate comparison, and the mean is over them.
    let first = dir.suasion(&compare).args(&more[..2]).args(&["--json", "--quiet"]).ok().json();
    assert_eq!(first["response_difference"], json["runs"][0]["response_difference"]);
    assert_eq!(first["response_difference"]["mean"].as_f64(), Some(by_seed[0]));
    assert!(by_seed[0] != by_seed[1]);
    let mean = by_seed.iter().sum::<f64>() / 3.0;
    assert!((d["mean"].as_f64().unwrap() - mean).abs() < 1e-9);
    let end = |name: &str, side: &str| d[name][side].as_f64().unwrap();
    for name in ["interval", "bootstrap"] {
        assert!(end(name, "low") < mean && mean < end(name, "high"), "{d}");
    }
    let ran = dir.suasion(&compare).args(&more).ok().prints("difference").prints("3 seeds over");
    ran.says("seed 43 (2 of 3)").says("comparison-3.json and comparison-3.html");
    for page in ["comparison.html", "comparison-2.html", "comparison-3.html"] {
        assert!(dir.text(page).contains("on held-out responses"), "{page}");
    }
    dir.suasion(&compare).args(&["-o", "x.html"]).run().error(2, "E-USAGE", "has that name");
}
