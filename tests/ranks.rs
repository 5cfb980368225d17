//! Runs over several processes: started by the launcher or with torchrun's variables, and how they end.

use crate::util::{Dir, TestCommand};
use serde_json::Value;
use std::io::Read;
use std::net::TcpListener;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

// With a large epsilon, AdamW does not divide two values near zero by each other.
const QUICK: [&str; 6] = [
    "adam_epsilon=1e-4",
    "learning_rate=1e-2",
    "per_device_train_batch_size=2",
    "logging_steps=1",
    "eval_fraction=0.2",
    "init=random",
];

/// `suasion train` as one rank, with the variables that torchrun sets.
fn rank(dir: &Dir, rank: usize, ranks: usize, port: u16) -> TestCommand {
    dir.train("rows.jsonl")
        .set(&QUICK)
        .env("RANK", rank.to_string())
        .env("LOCAL_RANK", rank.to_string())
        .env("WORLD_SIZE", ranks.to_string())
        .env("LOCAL_WORLD_SIZE", ranks.to_string())
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", port.to_string())
}

fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Waits for a process to end, and returns its exit code and stderr.
fn end(mut child: Child, within: Duration) -> (Option<i32>, String) {
    let started = Instant::now();
    let mut stderr = child.stderr.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stderr.read_to_string(&mut text).unwrap();
        text
    });
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return (status.code(), reader.join().unwrap());
        }
        if started.elapsed() > within {
            let _ = child.kill();
            let _ = child.wait();
            panic!("it has not ended within {within:?}: {}", reader.join().unwrap());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn wait_for(what: &str, mut there: impl FnMut() -> bool) {
    let started = Instant::now();
    while !there() {
        assert!(started.elapsed() < Duration::from_secs(60), "{what} has not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The child processes of a process, in the order in which they were started.
fn children(of: u32) -> Vec<u32> {
    let path = format!("/proc/{of}/task/{of}/children");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().map(|id| id.parse().unwrap()).collect()
}

fn signal(id: u32, name: &str) {
    assert!(Command::new("kill").args([name, &id.to_string()]).status().unwrap().success());
}

/// Compares lines of metrics, ignoring values that depend on the clock, and losses up to the order of summation.
fn near(a: &Value, b: &Value) -> bool {
    let clock = |key: &str| key == "tokens_per_second" || key == "peak_memory_bytes";
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => a.iter().all(|(key, a)| clock(key) || near(a, &b[key])),
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            (a - b).abs() <= 1e-5 * a.abs().max(b.abs())
        }
        (a, b) => a == b,
    }
}

fn same_run(dir: &Dir, a: &str, b: &str) {
    let [ours, theirs] = [a, b].map(|run| dir.lines(&format!("{run}/metrics.jsonl")));
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert!(near(ours, theirs), "{ours}\n{theirs}");
    }
}

#[test]
fn the_launcher_trains_as_one_process_that_accumulates() {
    let dir = Dir::new().with_model().with_rows(15);
    let settings = ["max_steps=7", "save_steps=3"];
    let one = |out: &str| [format!("output_dir={out}"), "gradient_accumulation_steps=2".into()];
    let one = one("one");
    dir.train("rows.jsonl").set(&QUICK).set(&settings).set(&[&one[0], &one[1]]).ok();
    let ran = dir
        .train("rows.jsonl")
        .set(&QUICK)
        .set(&settings)
        .args(&["--ranks", "2", "-o", "two", "--json"])
        .ok()
        .says("2 rows × 2 ranks a step")
        .says("planned on each rank");
    // The first rank prints and writes, once.
    assert_eq!(ran.json()["plan"]["ranks"], 2);
    assert_eq!(ran.stderr.matches("checkpoint two/checkpoint-3").count(), 1, "{}", ran.stderr);
    assert!(!ran.stderr.contains("[rank 1]"), "{}", ran.stderr);
    same_run(&dir, "two", "one");
    // A checkpoint of two ranks is resumed by one process, and one of one process by two ranks.
    for (run, accumulation, ranks) in [("two", "2", "1"), ("one", "1", "2")] {
        for name in ["checkpoint-7", "checkpoint-6"] {
            std::fs::remove_dir_all(dir.path(&format!("{run}/{name}"))).unwrap();
        }
        let accumulation = format!("gradient_accumulation_steps={accumulation}");
        dir.suasion(&["train", "--resume", run, "--ranks", ranks]).set(&[&accumulation]).ok();
    }
    same_run(&dir, "two", "one");
    let wrong = dir.suasion(&["train", "--resume", "two", "--ranks", "3"]).run();
    wrong.error(2, "E-RESUME", "gradient_accumulation_steps: was 2, is 2 on each of 3 ranks");
}

#[test]
fn adapters_are_trained_over_ranks() {
    let dir = Dir::new().with_weights().with_rows(13);
    let train = |out: &str, more: &[&str]| {
        let sets = ["max_steps=4", "use_peft=true", "lora_r=4", "lora_dropout=0.1", "save_steps=2"];
        dir.train("rows.jsonl").set(&QUICK[..5]).set(&sets).args(&["-o", out]).args(more).ok()
    };
    train("one", &["--gradient_accumulation_steps", "3"]);
    train("three", &["--ranks", "3", "--threads", "1"]);
    same_run(&dir, "three", "one");
    assert!(dir.exists("three/adapter_model.safetensors") && dir.exists("three/report.html"));
}

#[test]
fn what_contradicts_itself_is_refused() {
    let dir = Dir::new().with_model().with_rows(8);
    let train = || dir.train("rows.jsonl").set(&QUICK).args(&["-o", "out"]);
    train().env("RANK", "0").run().error(2, "E-CONFIG", "WORLD_SIZE: nothing is set, but RANK=0 is");
    let inside = || rank(&dir, 0, 2, port()).args(&["-o", "out"]);
    inside().args(&["--ranks", "2"]).run().error(2, "E-USAGE", "this process is rank 0 of 2 already");
    inside().env("RANK", "2").run().error(2, "E-CONFIG", "RANK: 2 is not below WORLD_SIZE=2");
    dir.suasion(&["train", "--demo", "--ranks", "2"]).run().error(2, "E-USAGE", "--demo runs in one process");
    // No other rank joins.
    inside().env("SUASION_RANK_TIMEOUT", "1").run().error(
        3,
        "E-RANK",
        "rank 0 has waited 1 seconds for rank 1",
    );
    // One card cannot serve all ranks; and the kinds of device are compared before anything is read.
    train().args(&["--ranks", "2", "--dry-run", "--device", "cuda:1"]).run().error(
        2,
        "E-CONFIG",
        "device=cuda:1 is one card, and 2 ranks need one each",
    );
    // The first rank reports a wrong configuration, and no rank waits.
    let started = Instant::now();
    let ran = train().args(&["--ranks", "2", "--set", "learning_rate=-1"]).run();
    assert!(ran.stderr.contains("learning_rate"), "{}", ran.stderr);
    assert!(ran.code == Some(2) && started.elapsed() < Duration::from_secs(30));
    assert!(!dir.exists("out"));
}

/// Commands that do not divide their work: of the ranks that torchrun starts, the first runs the command, and the
/// others exit at once with a message. Tasks of Slurm may have been given different rows, so a task whose rows would be
/// ignored is refused.
#[test]
fn other_commands_are_left_to_the_first_rank() {
    let dir = Dir::new().with_model().with_rows(6);
    dir.train("rows.jsonl").set(&QUICK[5..]).set(&["max_steps=1", "output_dir=out"]).ok();
    let commands: [&[&str]; 6] = [
        &["eval", "--model", "out", "--data", "rows.jsonl"],
        &["compare", "--model", "model", "--data", "rows.jsonl", "--set", "init=random", "--max_steps", "1"],
        &["prepare", "--model", "model", "--data", "rows.jsonl", "-o", "prepared.jsonl"],
        &["verify", "--model", "model", "--data", "rows.jsonl"],
        &["generate", "--model", "out", "--data", "rows.jsonl", "--rows", "1"],
        &["diagnose", "--base", "out", "--tuned", "out", "--data", "rows.jsonl"],
    ];
    let torch = |command: &[&str], rank: &str| {
        dir.suasion(command).env("RANK", rank).env("WORLD_SIZE", "2").env("LOCAL_RANK", rank)
    };
    for command in commands {
        let name = command[0];
        let ran = torch(command, "1")
            .ok()
            .says(&format!("{name} runs in one process: rank 1 of 2 leaves it to rank 0"));
        assert_eq!(ran.stdout, "");
        assert!(!dir.exists("prepared.jsonl") && !dir.exists("suasion-out"), "{name}");
        let task = dir.suasion(command).env("SLURM_PROCID", "1").env("SLURM_NTASKS", "2").run();
        let task = task.error(2, "E-USAGE", &format!("{name} runs in one process, and this is task 1 of 2"));
        task.says(&format!("srun --ntasks 1 suasion {name}"));
    }
    torch(commands[2], "0").ok();
    assert!(dir.exists("prepared.jsonl"));
    // As in a Slurm job script, outside srun.
    dir.suasion(commands[3]).env("SLURM_PROCID", "0").env("SLURM_NTASKS", "2").ok();
    // Each machine reports its own environment.
    assert!(torch(&["env"], "1").ok().stdout.contains("suasion"));
}

#[test]
fn the_plan_of_ranks_divides_the_optimizer() {
    let dir = Dir::new().with_model().with_rows(10);
    let plan = |more: &[&str]| {
        let ran =
            dir.train("rows.jsonl").set(&QUICK).args(&["-o", "out", "--dry-run", "--json"]).args(more).ok();
        ran.json()
    };
    let (one, four) = (plan(&[]), plan(&["--ranks", "4"]));
    let memory = |plan: &Value, of: &str| plan["memory_bytes"][of].as_u64().unwrap();
    let parameters = one["parameters"].as_u64().unwrap();
    assert_eq!(memory(&one, "optimizer"), 8 * parameters);
    let share = memory(&four, "optimizer");
    assert!(share >= 2 * parameters && share <= 2 * parameters + 8 * 256, "{share}");
    for same in ["parameters", "gradients", "activations"] {
        assert_eq!(memory(&one, same), memory(&four, same));
    }
    assert_eq!(one["disk_bytes"]["checkpoint"], four["disk_bytes"]["checkpoint"]);
    // 8 of 10 rows are trained on: four steps of 2, or one of 8.
    let steps = |plan: &Value| {
        [&plan["plan"]["ranks"], &plan["plan"]["steps_per_epoch"]].map(|n| n.as_u64().unwrap())
    };
    assert_eq!((steps(&one), steps(&four)), ([1, 4], [4, 1]));
    assert!(!dir.exists("out"));
}

#[test]
fn ranks_started_by_hand_are_compared() {
    let dir = Dir::new().with_model().with_rows(8);
    let start = |out: &str, more: [&str; 2]| {
        let port = port();
        [0, 1].map(|n| {
            let own = rank(&dir, n, 2, port).set(&["max_steps=2"]).args(&["-o", out]);
            own.args(&["--set", more[n]]).spawn()
        })
    };
    let within = Duration::from_secs(60);
    let ends = start("out", ["seed=1", "seed=1"]).map(|child| end(child, within));
    assert!(ends.iter().all(|(code, _)| *code == Some(0)), "{ends:?}");
    assert_eq!(ends[1].1, "", "the second rank prints nothing");
    let ends = start("other", ["learning_rate=1e-3", "learning_rate=2e-3"]).map(|child| end(child, within));
    let text = "rank 1 and rank 0 differ in learning_rate: 0.002 and 0.001";
    assert!(ends.iter().all(|(code, err)| *code == Some(2) && err.contains(text)), "{ends:?}");
    assert!(ends[1].1.starts_with("[rank 1] error[E-RANK]: "), "{ends:?}");
}

/// A run that continues until it is ended; returns once it has written a checkpoint.
fn endless(dir: &Dir, out: &str, ranks: &str) -> (Child, Vec<u32>) {
    let sets = ["max_steps=50000", "save_steps=4", "save_total_limit=2"];
    let run = dir.train("rows.jsonl").set(&QUICK).set(&sets).args(&["-o", out, "--ranks", ranks]).spawn();
    wait_for("a checkpoint", || {
        let mut entries = std::fs::read_dir(dir.path(out)).into_iter().flatten().flatten();
        entries.any(|entry| entry.file_name().to_string_lossy().starts_with("checkpoint-"))
    });
    let ranks = children(run.id());
    (run, ranks)
}

#[test]
fn a_killed_rank_ends_the_run_and_a_checkpoint_is_left() {
    let dir = Dir::new().with_model().with_rows(9);
    for (n, lost) in [(1, "rank 1 was lost"), (0, "rank 0 was lost")] {
        let out = format!("out{n}");
        let (run, ranks) = endless(&dir, &out, "2");
        assert_eq!(ranks.len(), 2);
        signal(ranks[n], "-KILL");
        let (code, stderr) = end(run, Duration::from_secs(20));
        assert_eq!(code, Some(3), "{stderr}");
        assert!(stderr.contains(lost) && stderr.contains(&format!("{out}/checkpoint-")), "{stderr}");
        assert!(stderr.contains(&format!("rank {n} was ended from outside: signal: 9")), "{stderr}");
        assert!(ranks.iter().all(|id| !std::path::Path::new(&format!("/proc/{id}")).exists()));
        // The run is resumed, here in one process.
        let newest = dir.lines(&format!("{out}/metrics.jsonl")).len();
        assert!(newest > 0);
        dir.suasion(&["train", "--resume", &out, "--extend"])
            .set(&["max_steps=20000", "gradient_accumulation_steps=2", "lr_scheduler_type=constant"])
            .args(&["--dry-run"])
            .ok()
            .prints("continues");
    }
}

#[test]
fn a_signal_stops_all_ranks_where_they_can_be_resumed() {
    let dir = Dir::new().with_model().with_rows(9);
    // The signal goes to the launcher, or to one of the ranks.
    for (out, to_launcher) in [("launcher", true), ("rank", false)] {
        let (run, ranks) = endless(&dir, out, "3");
        signal(if to_launcher { run.id() } else { ranks[2] }, "-TERM");
        let (code, stderr) = end(run, Duration::from_secs(20));
        assert_eq!(code, Some(130), "{stderr}");
        assert_eq!(stderr.matches("interrupted after step").count(), 2, "{stderr}");
        assert!(stderr.contains(&format!("suasion train --resume {out}")), "{stderr}");
    }
    // A run whose launcher is gone stops too.
    let (mut run, ranks) = endless(&dir, "orphans", "2");
    run.kill().unwrap();
    run.wait().unwrap();
    wait_for("the end of the ranks", || {
        let state = |id: &u32| std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        ranks.iter().all(|id| state(id).is_empty() || state(id).contains(") Z"))
    });
}

#[test]
fn a_full_disk_ends_all_ranks() {
    let dir = Dir::new().with_model().with_rows(9);
    let run = dir.sh(
        "ulimit -f 200; exec \"$SUASION\" train -M model -D rows.jsonl -o out --ranks 2 --set init=random \
         --set max_steps=100000 --set save_steps=3 --set on_save_error=stop --set per_device_train_batch_size=1",
    );
    let (code, stderr) = end(run.spawn(), Duration::from_secs(60));
    assert_eq!(code, Some(3), "{stderr}");
    assert!(stderr.contains("out/checkpoint-3") && stderr.contains("rank 0 has ended the run: "), "{stderr}");
}
