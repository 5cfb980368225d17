//! Where words go: results on stdout, progress and logs on stderr; colour only where it is seen.

use crate::failure::{Exit, Failure};
use clap::ValueEnum;
use std::fmt::Display;
use std::io::{self, BufWriter, IsTerminal, Write};
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// `--color`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ColorChoice {
    /// On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    /// Everywhere.
    Always,
    /// Nowhere.
    Never,
}

/// How this run speaks.
#[derive(Clone, Debug)]
pub struct Ui {
    /// Results as JSON.
    pub json: bool,
    /// No progress and no notes; errors and warnings remain.
    pub quiet: bool,
    /// Colour on stdout.
    pub color: bool,
    /// Colour on stderr.
    pub color_err: bool,
    /// Columns of stdout; 80 where it is no terminal.
    pub width: usize,
    /// Stderr is a terminal: progress may overwrite its line.
    pub live: bool,
}

impl Ui {
    /// The flags, the environment and what the streams are.
    pub fn new(json: bool, quiet: bool, choice: ColorChoice) -> Ui {
        let allowed = |terminal: bool| match choice {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            // no-color.org: present and not empty. A dumb terminal shows escapes as they are.
            ColorChoice::Auto => {
                terminal
                    && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
                    && std::env::var_os("TERM").is_none_or(|v| v != "dumb")
            }
        };
        let terminal = io::stdout().is_terminal();
        let width =
            if terminal { terminal_size::terminal_size().map(|(w, _)| usize::from(w.0)) } else { None };
        Ui {
            json,
            quiet,
            color: allowed(terminal),
            color_err: allowed(io::stderr().is_terminal()),
            width: width.unwrap_or(80).max(20),
            live: io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|v| v != "dumb"),
        }
    }

    /// A line of progress or log.
    pub fn say(&self, line: impl Display) {
        if !self.quiet {
            // A closed stderr is no reason to stop a training run.
            let _ = writeln!(io::stderr(), "{line}");
        }
    }

    /// Replaces the updating line (terminals only); empty text takes it away.
    pub fn overwrite(&self, line: &str) {
        if self.quiet || !self.live {
            return;
        }
        let columns = terminal_size::terminal_size_of(io::stderr()).map_or(80, |(w, _)| usize::from(w.0));
        let mut fitting = String::new();
        let mut used = 0;
        for character in line.chars() {
            used += character.width().unwrap_or(0);
            if used >= columns {
                break;
            }
            fitting.push(character);
        }
        let mut stderr = io::stderr().lock();
        let _ = write!(stderr, "\r\x1b[2K{fitting}");
        let _ = stderr.flush();
    }

    /// A warning, shown even when quiet.
    pub fn warn(&self, message: impl Display) {
        let _ = writeln!(io::stderr(), "{}: {message}", self.paint_err("33", "warning"));
    }

    /// Text in an SGR colour, where stderr has colour.
    pub fn paint_err(&self, sgr: &str, text: &str) -> String {
        if self.color_err { format!("\x1b[{sgr}m{text}\x1b[0m") } else { text.to_string() }
    }

    /// Stdout, locked and buffered: flush it, so that a full disk or a closed pipe is an error and not a panic.
    pub fn out(&self) -> BufWriter<io::StdoutLock<'static>> {
        BufWriter::new(io::stdout().lock())
    }

    /// Prints a result as one JSON document.
    pub fn print_json(&self, value: &impl serde::Serialize) -> anyhow::Result<()> {
        let mut out = self.out();
        serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from)?;
        writeln!(out)?;
        out.flush()?;
        Ok(())
    }

    /// Prints an error the way of the contract, and returns how the process ends.
    pub fn report(&self, error: &anyhow::Error) -> Exit {
        // `suasion verify … | head`: whoever read has read enough. Only stdout's errors come without a path.
        if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) {
            return Exit::Done;
        }
        let Told { tag, help, exit } = told(error);
        let mut stderr = io::stderr().lock();
        let _ = writeln!(stderr, "{}: {error}", self.paint_err("1;31", &format!("error[{tag}]")));
        if let Some(help) = help {
            let _ = writeln!(stderr, "{}: {help}", self.paint_err("1;36", "help"));
        }
        exit
    }
}

/// What an error says of itself beside its message.
struct Told {
    tag: &'static str,
    help: Option<String>,
    exit: Exit,
}

/// Finds the library's or our own error in the chain.
fn told(error: &anyhow::Error) -> Told {
    let mut told = Told { tag: "E-INTERNAL", help: None, exit: Exit::RunTime };
    for cause in error.chain() {
        if let Some(e) = cause.downcast_ref::<Failure>() {
            told = Told { tag: e.tag, help: e.help.clone(), exit: e.exit };
        } else if let Some(e) = cause.downcast_ref::<suasion_data::Error>() {
            told = Told { tag: e.tag(), help: e.help().map(str::to_string), exit: Exit::RunTime };
        } else if let Some(e) = cause.downcast_ref::<suasion_train::Error>() {
            let exit = if e.is_usage() { Exit::Usage } else { Exit::RunTime };
            told = Told { tag: e.tag(), help: e.help(), exit };
        } else if let Some(e) = cause.downcast_ref::<suasion_engine::Error>() {
            told = Told { tag: e.tag(), help: e.help().map(str::to_string), exit: Exit::RunTime };
        } else if cause.is::<io::Error>() {
            told = Told { tag: "E-IO", help: None, exit: Exit::RunTime };
        } else {
            continue;
        }
        break;
    }
    if told.help.is_none() {
        let io = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>());
        told.help = general_help(told.tag, io.map(io::Error::kind)).map(str::to_string);
    }
    told
}

/// What to do about an error that does not say so itself.
fn general_help(tag: &str, io: Option<io::ErrorKind>) -> Option<&'static str> {
    use io::ErrorKind::*;
    match (tag, io) {
        (_, Some(NotFound)) => Some("check the path; a relative one starts at the current folder"),
        (_, Some(PermissionDenied)) => Some("check who may read and write there"),
        (_, Some(StorageFull | QuotaExceeded | FileTooLarge)) => Some("free some space, or write elsewhere"),
        ("E-IO", _) => Some("check the file and the disk it is on"),
        ("E-TOKENIZER", _) => Some(
            "the model folder's tokenizer.json and tokenizer_config.json must be whole and belong together",
        ),
        ("E-BATCH", _) => Some("lower per_device_train_batch_size or max_length"),
        ("E-GENERATE", _) => {
            Some("give a prompt of at least one token, and no longer than the model has positions")
        }
        ("E-INTERNAL", _) => Some("this should not happen: please report it"),
        _ => None,
    }
}

/// A whole number in groups: `1,234,567`.
pub use suasion_data::report::thousands as count;

/// `1 row`, `2 rows`.
pub fn plural(n: u64, one: &str) -> String {
    if n == 1 { format!("1 {one}") } else { format!("{} {one}s", count(n)) }
}

/// Bytes in the unit that a person would choose.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 || value >= 99.95 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Seconds as `45s`, `3m20s`, `2h05m`.
pub fn duration(seconds: f64) -> String {
    let total = if seconds.is_finite() { seconds.max(0.0).round() as u64 } else { return "?".into() };
    match total {
        0..60 => format!("{total}s"),
        60..3600 => format!("{}m{:02}s", total / 60, total % 60),
        _ => format!("{}h{:02}m", total / 3600, total % 3600 / 60),
    }
}

/// A share as a percentage: one decimal, and never 0.0% or 100.0% for something that is not.
pub fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "0%".into();
    }
    let share = part as f64 / whole as f64 * 100.0;
    match part {
        0 => "0%".into(),
        _ if part == whole => "100%".into(),
        _ if share < 0.1 => "<0.1%".into(),
        _ if share > 99.9 => ">99.9%".into(),
        _ => format!("{share:.1}%"),
    }
}

/// Text in lines of at most `width` columns, broken at spaces; a word that is wider than a line is broken anywhere.
pub fn wrap(text: &str, width: usize) -> String {
    let mut out = String::with_capacity(text.len() + text.len() / width.max(1) + 1);
    for (index, line) in text.lines().enumerate() {
        if index > 0 {
            out.push('\n');
        }
        let mut used = 0;
        for word in line.split_inclusive(' ') {
            if used > 0 && used + word.trim_end().width() > width {
                out.truncate(out.trim_end_matches(' ').len());
                out.push('\n');
                used = 0;
            }
            for character in word.chars() {
                let columns = character.width().unwrap_or(0);
                if used + columns > width && character != ' ' {
                    out.push('\n');
                    used = 0;
                }
                out.push(character);
                used += columns;
            }
        }
        out.truncate(out.trim_end_matches(' ').len());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrapping_keeps_words_and_columns() {
        assert_eq!(wrap("one two three", 8), "one two\nthree");
        assert_eq!(wrap("abcdefgh", 3), "abc\ndef\ngh");
        assert_eq!(wrap("a\n\nb c", 80), "a\n\nb c");
        assert_eq!(wrap("電車電車", 5), "電車\n電車");
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!([bytes(12), bytes(1_500_000), bytes(999_999)], ["12 B", "1.5 MB", "1.0 MB"]);
        assert_eq!([duration(59.4), duration(200.0), duration(7500.0)], ["59s", "3m20s", "2h05m"]);
        assert_eq!(
            [percent(0, 9), percent(1, 10_000), percent(1, 3), percent(9999, 10_000), percent(3, 3)],
            ["0%", "<0.1%", "33.3%", ">99.9%", "100%"]
        );
    }
}
