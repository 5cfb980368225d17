//! Devices through the binary, on a machine without a card; where there is one, `benches/gpu.sh` looks at it.

use crate::util::Dir;

/// What `env` says of cards; `None`, and the test skipped, where one can be used.
fn without_card(dir: &Dir) -> Option<(String, String)> {
    let json = dir.suasion(&["env", "--json"]).ok().json();
    let Some(problem) = json["cuda"]["problem"].as_str() else {
        suasion_test_support::skipped("there is a card");
        return None;
    };
    assert_eq!(json["cuda"]["cards"], serde_json::json!([]));
    Some((problem.to_string(), json["cuda"]["help"].as_str().unwrap().to_string()))
}

#[test]
fn a_machine_without_a_card_says_what_is_missing() {
    let dir = Dir::new().with_model().with_rows(8);
    let Some((problem, help)) = without_card(&dir) else { return };
    dir.suasion(&["env"]).ok().prints(&format!("NVIDIA cards       not usable: {problem}")).prints(&help);
    let quick = ["init=random", "max_steps=2"];
    for device in ["cuda", "cuda:3"] {
        let device = format!("device={device}");
        let run = dir.train("rows.jsonl").set(&quick).set(&["output_dir=out", &device]).run();
        run.error(3, "E-DEVICE", &problem).says(&help);
        // Before rows are read, and in a plan too.
        let dry = dir.train("rows.jsonl").set(&quick).set(&["output_dir=out", &device]).args(&["--dry-run"]);
        dry.run().error(3, "E-DEVICE", &problem);
        assert!(!dir.exists("out"), "nothing was written");
    }
    // The CPU, with a note: the same bytes.
    let note = format!("note: device=auto is the CPU: {problem}");
    dir.train("rows.jsonl").set(&quick).set(&["output_dir=auto", "device=auto"]).ok().says(&note);
    dir.train("rows.jsonl").set(&quick).set(&["output_dir=cpu"]).ok();
    let weights = |folder: &str| dir.read(&format!("{folder}/model.safetensors"));
    assert!(weights("auto") == weights("cpu"));
    for command in ["eval", "generate"] {
        let args = [command, "--model", "cpu", "--data", "rows.jsonl", "--device", "cuda"];
        dir.suasion(&args).run().error(3, "E-DEVICE", &problem);
        dir.suasion(&[&args[..6], &["auto"]].concat()).ok();
    }
    let args = ["diagnose", "--base", "cpu", "--tuned", "auto", "--data", "rows.jsonl", "--device=cuda:0"];
    dir.suasion(&args).run().error(3, "E-DEVICE", &problem);
}

#[test]
fn devices_that_do_not_exist_or_contradict_are_refused() {
    let dir = Dir::new().with_model().with_rows(4);
    let refused = |keys: &[&str], text: &str| {
        dir.train("rows.jsonl").set(keys).set(&["output_dir=out"]).run().error(2, "E-CONFIG", text);
    };
    refused(&["device=gpu"], "device: expected auto, cpu, cuda, or cuda:N");
    refused(&["device=cuda:x"], "device: expected auto, cpu, cuda, or cuda:N");
    refused(&["device=cuda", "use_cpu=true"], "use_cpu=true and device=cuda contradict each other");
    refused(&["matmul_precision=bf16"], "matmul_precision=bf16: products on the CPU are of f32");
    refused(&["device=auto", "use_cpu=true", "matmul_precision=tf32"], "products on the CPU are of f32");
    refused(&["no_cuda=true"], "use_cpu");
    // transformers' name for the CPU needs no card, and looks for none.
    let run = dir.train("rows.jsonl").set(&["init=random", "max_steps=1", "output_dir=out", "use_cpu=true"]);
    run.set(&["device=auto"]).ok();
}
