//! Every suasion command of README.md runs.
//!
//! The commands of its `sh` code blocks are run in a folder with the files that the README assumes: `rows.jsonl` (also
//! as `train.jsonl` and `data.jsonl`) and a model in `model/`. Training commands get only a few steps.

use crate::util::{Dir, root};

fn commands() -> Vec<String> {
    let readme = std::fs::read_to_string(root().join("README.md")).expect("README.md");
    let mut commands = Vec::new();
    let mut inside = false;
    let mut pending = String::new();
    for line in readme.lines() {
        let line = line.trim();
        if line.starts_with("```") {
            inside = line == "```sh";
            continue;
        }
        if !inside || line.is_empty() || line.starts_with('#') {
            continue;
        }
        // A line that ends in a backslash continues on the next line.
        if let Some(start) = line.strip_suffix('\\') {
            pending += start;
            continue;
        }
        commands.push(std::mem::take(&mut pending) + line);
    }
    commands
}

#[test]
fn every_suasion_command_of_the_readme_works() {
    let commands = commands();
    for main in ["cargo run --release -- train --demo", "cargo test --workspace"] {
        assert!(
            commands.iter().any(|c| c.starts_with(main)),
            "the README has the command {main}: {commands:#?}"
        );
    }
    let dir = Dir::new().with_weights().with_rows(12);
    let rows = dir.read("rows.jsonl");
    for name in ["train.jsonl", "data.jsonl", "test.jsonl"] {
        dir.write(name, &rows);
    }
    let mut resumable: Option<String> = None;
    for command in commands {
        let Some(line) = command.strip_prefix("suasion ").or(command.strip_prefix("cargo run --release -- "))
        else {
            continue;
        };
        let line = line.split(" #").next().unwrap_or(line);
        let trains = line.starts_with("train") || line.starts_with("compare");
        let few =
            if trains && !line.contains("--resume") { " --set max_steps=2 --set save_steps=1" } else { "" };
        // The README may train into the same folder twice; a reader would not.
        if line.starts_with("train") && !line.contains("--resume") && !line.contains("--dry-run") {
            resumable = Some(line.to_string());
            for folder in ["trainer_output", "out"] {
                let _ = std::fs::remove_dir_all(dir.path(folder));
            }
        }
        assert!(!line.contains("--resume") || resumable.is_some(), "{line}: nothing was trained before");
        dir.sh(&format!("\"$SUASION\" {line}{few}")).ok();
    }
}
