//! Devices through the binary, on a machine without a card; with one, `benches/gpu.sh` tests them.

use crate::util::Dir;

/// What `env` reports about cards; `None`, and the test is skipped, if one can be used.
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
        // Refused before rows are read, and also when only planning.
        let dry = dir.train("rows.jsonl").set(&quick).set(&["output_dir=out", &device]).args(&["--dry-run"]);
        dry.run().error(3, "E-DEVICE", &problem);
        assert!(!dir.exists("out"), "nothing was written");
    }
    // The CPU is used, with a note, and gives the same bytes.
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

/// What `env` and ranks on cards report about NCCL: for NVIDIA's own, one that is too old, and none.
#[test]
fn nccl_is_found_or_missed_by_name() {
    let dir = Dir::new().with_model().with_rows(4);
    let env = |folder: &str| {
        let ran = dir.suasion(&["env", "--json"]).env("LD_LIBRARY_PATH", folder).ok();
        let cuda = &ran.json()["cuda"];
        (cuda["nccl"].clone(), cuda["nccl_problem"].as_str().unwrap_or_default().to_string())
    };
    if let (nccl, problem) = env("")
        && nccl.is_null()
    {
        assert_eq!(problem, "NCCL is missing: libnccl.so.2 was not found");
    }
    let source = "int ncclGetVersion(int* v) { *v = VERSION; return 0; }";
    std::fs::write(dir.path("nccl.c"), source).unwrap();
    let compiled = |version: &str| {
        std::fs::create_dir_all(dir.path(version)).unwrap();
        let command = format!("cc -shared -fPIC -DVERSION={version} nccl.c -o {version}/libnccl.so.2");
        dir.sh(&command).ok();
        env(dir.path(version).to_str().unwrap())
    };
    let (nccl, problem) = compiled("21003");
    assert!(
        nccl.is_null() && problem == "NCCL 2.10.3 is too old: ranks on cards need 2.14 or later",
        "{problem}"
    );
    let (nccl, problem) = compiled("22005");
    let text = "libnccl.so.2 is no NCCL that can be used: ";
    assert!(nccl.is_null() && problem.starts_with(text) && problem.contains("ncclGetUniqueId"), "{problem}");
    let Some(python) = suasion_test_support::peers_python() else { return };
    let site = python.parent().unwrap().join("../lib");
    let folder = std::fs::read_dir(site)
        .unwrap()
        .flatten()
        .map(|entry| entry.path().join("site-packages/nvidia/nccl/lib"));
    let Some(folder) = folder.into_iter().find(|folder| folder.join("libnccl.so.2").exists()) else {
        return suasion_test_support::skipped("no NCCL beside PyTorch");
    };
    let (nccl, problem) = env(folder.to_str().unwrap());
    assert!(
        nccl.as_str().is_some_and(|version| version.starts_with("2.")) && problem.is_empty(),
        "{nccl} {problem}"
    );
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
    // transformers' name for the CPU: no card is searched for.
    let run = dir.train("rows.jsonl").set(&["init=random", "max_steps=1", "output_dir=out", "use_cpu=true"]);
    run.set(&["device=auto"]).ok();
}
