//! Progress of a run: one updating line on a terminal, a plain line now and then elsewhere.

use crate::bar::{bar, fitted, sparkline};
use crate::tables;
use crate::ui::Ui;
use std::path::Path;
use std::time::{Duration, Instant};
use suasion_data::report::format::{bytes, count, duration, loss, perplexity, thousands};
use suasion_data::report::visible;
use suasion_train::{Event, Observer, StepEvent};

/// Without a terminal, a run's steps are reported in about this many lines at most.
const PLAIN_LINES: u64 = 20;

/// Without a terminal, a line is written at least this often.
const PLAIN_PAUSE: Duration = Duration::from_secs(30);

/// On a terminal, the line is redrawn at most this often.
const REDRAW: Duration = Duration::from_millis(100);

/// Characters of the curve of losses.
const CURVE: usize = 16;

/// Prints the events of a run on stderr.
pub struct Progress<'a> {
    ui: &'a Ui,
    /// Printed before each line: the arm of a comparison.
    prefix: String,
    last: Option<Instant>,
    live_line: bool,
    /// Loss and rates, smoothed for display; the files hold the exact values.
    smooth: Option<Smooth>,
    /// The smoothed losses so far, each of `every` steps.
    curve: Vec<f64>,
    every: u64,
}

struct Smooth {
    loss: f64,
    targets: f64,
    tokens: f64,
}

impl<'a> Progress<'a> {
    /// Progress of a run that has not started.
    pub fn new(ui: &'a Ui) -> Progress<'a> {
        let (prefix, curve) = (String::new(), Vec::new());
        Progress { ui, prefix, last: None, live_line: false, smooth: None, curve, every: 1 }
    }

    /// A line that is not overwritten.
    fn line(&mut self, text: &str) {
        self.clear();
        self.ui.log(format_args!("{}{text}", self.prefix));
    }

    fn overwrite(&mut self, text: &str) {
        self.live_line = true;
        self.ui.overwrite(&format!("{}{text}", self.prefix));
    }

    fn clear(&mut self) {
        if std::mem::take(&mut self.live_line) {
            self.ui.overwrite("");
        }
    }

    fn due(&mut self, pause: Duration) -> bool {
        let due = self.last.is_none_or(|last| last.elapsed() >= pause);
        if due {
            self.last = Some(Instant::now());
        }
        due
    }

    fn step(&mut self, step: &StepEvent) {
        if let Some(loss) = step.loss {
            let blend = |old: f64, new: f64| old + 0.2 * (new - old);
            self.smooth = Some(match self.smooth.take() {
                None => Smooth { loss, targets: step.targets_per_second, tokens: step.tokens_per_second },
                Some(old) => Smooth {
                    loss: blend(old.loss, loss),
                    targets: blend(old.targets, step.targets_per_second),
                    tokens: blend(old.tokens, step.tokens_per_second),
                },
            });
            self.trace(step.step);
        }
        let last = step.step == step.total_steps;
        if self.ui.live {
            // The last step's line is not overwritten.
            if last {
                let text = self.step_text(step);
                self.line(&text);
            } else if self.due(REDRAW) {
                let text = self.step_text(step);
                self.overwrite(&text);
            }
            return;
        }
        let every = step.total_steps.div_ceil(PLAIN_LINES).max(1);
        if step.step == 1 || last || step.step.is_multiple_of(every) || self.due(PLAIN_PAUSE) {
            self.last = Some(Instant::now());
            let text = self.step_text(step);
            self.line(&text);
        }
    }

    /// Adds the smoothed loss to the curve, which keeps a bounded number of them.
    fn trace(&mut self, step: u64) {
        let Some(smooth) = self.smooth.as_ref().filter(|_| step.is_multiple_of(self.every)) else { return };
        self.curve.push(smooth.loss);
        if self.curve.len() > 2 * CURVE {
            let mut at = 0;
            self.curve.retain(|_| {
                at += 1;
                at % 2 == 0
            });
            self.every *= 2;
        }
    }

    /// On a terminal, a line of its width: the most important first. Elsewhere, the fields in plain text.
    fn step_text(&self, step: &StepEvent) -> String {
        // Plain lines show the step's own loss, as metrics.jsonl does.
        let loss = match (&self.smooth, self.ui.live, step.loss) {
            (Some(smooth), true, Some(_)) => format!("loss {}", loss(smooth.loss)),
            (_, false, Some(own)) => format!("loss {}", loss(own)),
            _ => "loss - (no target in this step)".into(),
        };
        let rate = |value: f64| thousands(value.round().max(0.0) as u64);
        let (targets, tokens) = match &self.smooth {
            Some(smooth) => (smooth.targets, smooth.tokens),
            None => (step.targets_per_second, step.tokens_per_second),
        };
        let share = step.step as f64 / step.total_steps.max(1) as f64;
        let width = step.total_steps.to_string().len();
        let count = format!("step {:>width$}/{}", step.step, step.total_steps);
        let eta = format!("ETA {}", duration(step.eta_seconds));
        let learning_rate = format!("lr {:.2e}", step.learning_rate);
        let tokens = format!("{} tokens/s", rate(tokens));
        let targets = format!("{} targets/s", rate(targets));
        let memory = step.peak_memory_bytes.map(bytes).unwrap_or_default();
        if !self.ui.live {
            let percent = bar(share, 0);
            let fields = [&count, &percent, &eta, &loss, &learning_rate, &targets, &tokens, &memory];
            return fitted(fields.map(String::as_str), usize::MAX);
        }
        let columns = self.ui.columns().saturating_sub(self.prefix.len());
        let curve = sparkline(&self.curve, if columns < 100 { CURVE / 2 } else { CURVE });
        let bar = bar(share, columns);
        let fields = [&bar, &eta, &count, &loss, &curve, &learning_rate, &tokens, &targets, &memory];
        fitted(fields.map(String::as_str), columns)
    }
}

impl Observer for Progress<'_> {
    fn event(&mut self, event: &Event<'_>) {
        match event {
            Event::Plan { resumed_from: Some(path), step, plan, .. } => {
                self.line(&format!(
                    "resuming from {}: step {step} of {} is done",
                    path.display(),
                    plan.total_steps
                ));
            }
            Event::Arm { objective } => {
                self.prefix = format!("[{}] ", tables::objective(*objective));
                (self.smooth, self.last) = (None, None);
                (self.curve, self.every) = (Vec::new(), 1);
            }
            Event::Step(step) => self.step(step),
            Event::EvalProgress { done, rows } if self.ui.live && self.due(REDRAW) => {
                let text = share_of("evaluating", *done, *rows, self.ui.columns());
                self.overwrite(&text);
            }
            Event::Eval { step, evaluation, best } => {
                let best = if *best { "  (the best so far)" } else { "" };
                self.line(&format!(
                    "held-out loss after step {step}: {}  perplexity {}  {} targets{best}",
                    loss(evaluation.loss),
                    perplexity(evaluation.perplexity),
                    thousands(evaluation.targets),
                ));
            }
            Event::Checkpoint { path, removed, .. } => {
                let gone = match removed.len() {
                    0 => String::new(),
                    n => format!(" ({} removed)", count(n as u64, "older one")),
                };
                self.line(&format!("checkpoint {}{gone}", path.display()));
            }
            Event::Warning(text) => {
                self.clear();
                self.ui.warn(text);
            }
            Event::Interrupted { step, checkpoint } => {
                self.line(&format!("interrupted after step {step}; kept in {}", checkpoint.display()));
            }
            _ => {}
        }
    }
}

/// `evaluating  ██████░░░░░░  50 %  40/80 rows`, as much of it as fits.
pub fn share_of(what: &str, done: u64, rows: u64, columns: usize) -> String {
    let bar = bar(done as f64 / rows.max(1) as f64, columns);
    fitted([what, &bar, &format!("{}/{}", thousands(done), count(rows, "row"))], columns)
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        self.clear();
    }
}

/// The updating line while rows are read; only on a terminal, and only once reading takes a noticeable time.
pub struct Meter<'a> {
    ui: &'a Ui,
    name: String,
    started: Instant,
    /// Rows when it was last shown.
    rows: u64,
    shown: bool,
}

impl<'a> Meter<'a> {
    /// A meter for reading `path`.
    pub fn new(ui: &'a Ui, path: &Path) -> Meter<'a> {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Meter { ui, name, started: Instant::now(), rows: 0, shown: false }
    }

    /// Shows how much has been read.
    pub fn show(&mut self, progress: suasion_data::Progress) {
        let news = std::mem::replace(&mut self.rows, progress.rows) != progress.rows;
        if !news || self.ui.quiet || !self.ui.live || self.started.elapsed().as_secs_f64() < 0.3 {
            return;
        }
        self.shown = true;
        let columns = self.ui.columns();
        let bar = bar(progress.bytes as f64 / progress.size.max(1) as f64, columns);
        let rows = count(progress.rows, "row");
        let tokens = format!("{} tokens", thousands(progress.tokens));
        let name = format!("reading {}", visible(&self.name));
        self.ui.overwrite(&fitted([&bar, &rows, &tokens, &name].map(String::as_str), columns));
    }
}

impl Drop for Meter<'_> {
    /// Removes the line.
    fn drop(&mut self) {
        if self.shown {
            self.ui.overwrite("");
        }
    }
}
