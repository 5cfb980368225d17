//! `Dir` and `TestCommand`: a folder for each test, and the binary run in it.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A folder of the test material; `None`, with the test recorded as skipped, if there is none.
pub fn material(under: &str) -> Option<PathBuf> {
    Some(suasion_test_support::material()?.join(under))
}

/// A temporary folder; commands run in it.
pub struct Dir(tempfile::TempDir);

impl Dir {
    pub fn new() -> Dir {
        Dir(tempfile::tempdir().expect("a temporary folder"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> &Dir {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
        std::fs::write(path, content).expect("written");
        self
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    pub fn text(&self, name: &str) -> String {
        String::from_utf8(self.read(name)).expect("UTF-8")
    }

    /// A JSON file.
    pub fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&self.read(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// The lines of a JSON Lines file.
    pub fn lines(&self, name: &str) -> Vec<Value> {
        self.text(name).lines().map(|line| serde_json::from_str(line).expect("a JSON line")).collect()
    }

    pub fn exists(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    /// The binary, with this folder as its working directory.
    pub fn suasion(&self, args: &[&str]) -> TestCommand {
        let mut command = Command::new(env!("CARGO_BIN_EXE_suasion"));
        command.args(args);
        self.isolated(command)
    }

    /// `suasion prepare` with `model/`.
    pub fn prepare(&self, data: &str, output: &str) -> TestCommand {
        self.suasion(&["prepare", "-M", "model", "-D", data, "-o", output])
    }

    /// `suasion train` with `model/`.
    pub fn train(&self, data: &str) -> TestCommand {
        self.suasion(&["train", "-M", "model", "-D", data])
    }

    /// `suasion verify` with `model/`.
    pub fn verify(&self, data: &str) -> TestCommand {
        self.suasion(&["verify", "-M", "model", "-D", data])
    }

    /// A shell line, with the binary as `$SUASION`.
    pub fn sh(&self, line: &str) -> TestCommand {
        let mut command = Command::new("sh");
        command.args(["-c", line]).env("SUASION", env!("CARGO_BIN_EXE_suasion"));
        self.isolated(command)
    }

    fn isolated(&self, mut command: Command) -> TestCommand {
        command.current_dir(self.0.path());
        for name in [
            "NO_COLOR",
            "HF_HOME",
            "HF_HUB_CACHE",
            "HUGGINGFACE_HUB_CACHE",
            "HF_ENDPOINT",
            "HF_HUB_OFFLINE",
            "HF_TOKEN",
            "HF_TOKEN_PATH",
            "TRANSFORMERS_OFFLINE",
            "XDG_CACHE_HOME",
            "RUST_BACKTRACE",
        ] {
            command.env_remove(name);
        }
        command.env("HOME", self.0.path());
        TestCommand(command)
    }

    /// `model/`: the demo's tokenizer with a model so small that a step takes a millisecond; without weights.
    pub fn with_model(self) -> Dir {
        let demo = root().join("examples/persuasion");
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            self.write(
                &format!("model/{name}"),
                std::fs::read(demo.join(name)).expect("the demo's tokenizer"),
            );
        }
        let mut config = self.json(demo.join("config.json").to_str().expect("a path"));
        for (key, value) in [
            ("hidden_size", 32),
            ("intermediate_size", 48),
            ("num_hidden_layers", 2),
            ("num_attention_heads", 4),
            ("num_key_value_heads", 2),
            ("head_dim", 8),
        ] {
            config[key] = value.into();
        }
        self.write("model/config.json", config.to_string());
        self
    }

    /// `model/` with random weights.
    pub fn with_weights(self) -> Dir {
        let dir = self.with_model().with_rows(2);
        dir.train("rows.jsonl").set(&["init=random", "max_steps=1", "output_dir=made"]).arg("--quiet").ok();
        dir.write("model/model.safetensors", dir.read("made/model.safetensors"));
        std::fs::remove_dir_all(dir.path("made")).expect("removed");
        dir
    }

    /// `rows.jsonl`: short rows in the four-section format.
    pub fn with_rows(self, n: usize) -> Dir {
        let rows: String = (0..n).map(|i| row(i) + "\n").collect();
        self.write("rows.jsonl", rows);
        self
    }
}

/// The origins of a prepared line, one letter per run of tokens.
pub fn runs(line: &Value) -> String {
    let mut letters: Vec<char> = line["origins"].as_str().expect("origins").chars().collect();
    letters.dedup();
    letters.into_iter().collect()
}

/// A row as a line of JSON.
pub fn row(i: usize) -> String {
    const VIEWS: [&str; 4] =
        ["Buses are slow.", "Maps are boring.", "Tea is better cold.", "Nobody needs a garden."];
    const REPLIES: [&str; 4] = [
        "They are, at rush hour. A lane of their own changes that.",
        "Perhaps the ones in school. Look at one that shows where birds go.",
        "On a hot day, yes. In the evening a warm cup slows you down.",
        "Nobody needs music either, and few would want to do without.",
    ];
    let input = format!(
        "[SYSTEM] Be honest.\n[CONTEXT] {}\n[TASK] Reply to view number {i}.\n[RESPONSE]",
        VIEWS[i % VIEWS.len()]
    );
    let full = format!("{input} {}", REPLIES[i % REPLIES.len()]);
    serde_json::json!({ "input_text": input, "full_text": full }).to_string()
}

/// A command and its arguments, not yet run.
pub struct TestCommand(Command);

impl TestCommand {
    pub fn arg(mut self, arg: impl AsRef<std::ffi::OsStr>) -> TestCommand {
        self.0.arg(arg);
        self
    }

    pub fn args(mut self, args: &[&str]) -> TestCommand {
        self.0.args(args);
        self
    }

    /// `--set key=value` for each.
    pub fn set(mut self, assignments: &[&str]) -> TestCommand {
        for assignment in assignments {
            self.0.args(["--set", assignment]);
        }
        self
    }

    pub fn env(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> TestCommand {
        self.0.env(name, value);
        self
    }

    pub fn stdin(self, text: &str) -> Ran {
        use std::io::Write;
        let TestCommand(mut command) = self;
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        child.stdin.take().expect("a pipe").write_all(text.as_bytes()).expect("written");
        Ran::new(child.wait_with_output().expect("it ends"), &command)
    }

    /// Runs it, accepting any exit code.
    pub fn run(mut self) -> Ran {
        let output = self.0.stdin(Stdio::null()).output().expect("the binary runs");
        Ran::new(output, &self.0)
    }

    /// Starts it without waiting.
    pub fn spawn(mut self) -> Child {
        self.0
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs")
    }

    /// Runs it and expects exit code 0.
    pub fn ok(self) -> Ran {
        self.run().code(0)
    }
}

/// The output of a finished command.
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    what: String,
}

impl Ran {
    fn new(output: std::process::Output, command: &Command) -> Ran {
        Ran {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).expect("stdout is UTF-8"),
            stderr: String::from_utf8(output.stderr).expect("stderr is UTF-8"),
            what: format!("{command:?}"),
        }
    }

    fn dump(&self) -> String {
        format!("{}\nexit: {:?}\nstdout:\n{}\nstderr:\n{}", self.what, self.code, self.stdout, self.stderr)
    }

    /// Expects an exit code, and that no thread panicked.
    pub fn code(self, code: i32) -> Ran {
        assert!(!self.stderr.contains("panicked"), "{}", self.dump());
        assert_eq!(self.code, Some(code), "{}", self.dump());
        self
    }

    /// Expects text on stderr.
    pub fn says(self, text: &str) -> Ran {
        assert!(self.stderr.contains(text), "stderr lacks {text:?}\n{}", self.dump());
        self
    }

    /// Expects text on stdout.
    pub fn prints(self, text: &str) -> Ran {
        assert!(self.stdout.contains(text), "stdout lacks {text:?}\n{}", self.dump());
        self
    }

    /// Expects an error: the exit code, `error[TAG]: …` with `text` in it, and a `help:` line.
    pub fn error(self, code: i32, tag: &str, text: &str) -> Ran {
        let ran = self.code(code).says(&format!("error[{tag}]: ")).says(text);
        assert!(ran.stderr.lines().any(|line| line.starts_with("help: ")), "no help\n{}", ran.dump());
        ran
    }

    /// Stdout as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}\n{}", self.dump()))
    }
}
