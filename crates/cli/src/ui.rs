//! Output: results on stdout, progress and logs on stderr, colour on terminals only. Control characters of
//! messages, which may come from file names and from data, are printed as visible signs.

use crate::failure::{Exit, Failures, Outcome};
use clap::ValueEnum;
use std::fmt::Display;
use std::io::{self, BufWriter, IsTerminal, Write};
use suasion_data::Level;
use suasion_data::report::{printable, visible};
use unicode_width::UnicodeWidthChar;

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

/// Where and how this process prints.
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
    /// Columns of stdout; 80 where it is not a terminal.
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
            // no-color.org: present and not empty. A dumb terminal prints escape sequences as text.
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

    /// Logs a line on stderr, unless quiet.
    pub fn log(&self, line: impl Display) {
        if !self.quiet {
            // A closed stderr must not stop a training run.
            let _ = writeln!(io::stderr(), "{}", printable(&line.to_string()));
        }
    }

    /// Logs a line about what stands on stdout above it, with an empty line between the two on a terminal.
    pub fn note(&self, line: impl Display) {
        let gap = if self.live { "\n" } else { "" };
        self.log(format_args!("{gap}{line}"));
    }

    /// Replaces the updating line (terminals only); empty text removes it.
    pub fn overwrite(&self, line: &str) {
        if self.quiet || !self.live {
            return;
        }
        let columns = terminal_size::terminal_size_of(io::stderr()).map_or(80, |(w, _)| usize::from(w.0));
        let mut fitting = String::new();
        let mut used = 0;
        for character in visible(line).chars() {
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

    /// Prints a warning, also when quiet.
    pub fn warn(&self, message: impl Display) {
        let message = printable(&message.to_string());
        let _ = writeln!(io::stderr(), "{}: {message}", self.paint_err("33", "warning"));
    }

    /// Prints a finding, `indent` columns in: errors and warnings by their names, also when quiet.
    pub fn finding(&self, level: Level, indent: usize, text: impl Display) {
        let label = match level {
            Level::Error => self.paint_err("1;31", "error"),
            Level::Warning => self.paint_err("33", "warning"),
            Level::Note => return self.log(format_args!("{:indent$}{text}", "")),
        };
        let indent = if self.quiet { 0 } else { indent };
        let text = printable(&text.to_string());
        let _ = writeln!(io::stderr(), "{:indent$}{label}: {text}", "");
    }

    /// Text in an SGR colour, where stderr has colour.
    pub fn paint_err(&self, sgr: &str, text: &str) -> String {
        if self.color_err { format!("\x1b[{sgr}m{text}\x1b[0m") } else { text.to_string() }
    }

    /// Stdout, locked and buffered: flush it, so that a full disk or a closed pipe is an error and not a
    /// panic.
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

    /// Prints an error as `error[TAG]: ..` and `help: ..`, and returns the exit code.
    pub fn report(&self, error: &anyhow::Error) -> Exit {
        // `suasion verify … | head`: the reader has closed the pipe, which is not an error. I/O errors
        // without a path are those of stdout.
        if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) {
            return Exit::Done;
        }
        if let Some(Failures(failures)) = error.downcast_ref() {
            for failure in failures {
                self.print_error(failure.tag, failure, failure.help.as_deref());
            }
            return failures.first().map_or(Exit::Usage, |failure| failure.exit);
        }
        let Outcome { tag, help, exit } = Outcome::of(error);
        self.print_error(tag, error, help.as_deref());
        exit
    }

    fn print_error(&self, tag: &str, error: impl Display, help: Option<&str>) {
        let mut stderr = io::stderr().lock();
        let error = printable(&error.to_string());
        let _ = writeln!(stderr, "{}: {error}", self.paint_err("1;31", &format!("error[{tag}]")));
        if let Some(help) = help.map(printable) {
            let _ = writeln!(stderr, "{}: {help}", self.paint_err("1;36", "help"));
        }
    }
}

/// Prose in lines of at most `width` columns, broken at spaces; its own line ends stay, and a word that is
/// wider than a line is broken anywhere.
pub fn wrap(text: &str, width: usize) -> String {
    let options = textwrap::Options::new(width)
        .wrap_algorithm(textwrap::WrapAlgorithm::FirstFit)
        .word_separator(textwrap::WordSeparator::AsciiSpace)
        .word_splitter(textwrap::WordSplitter::NoHyphenation);
    textwrap::fill(text, options)
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
        // Help texts are indented; lines are not broken at hyphens, which paths and flags contain.
        assert_eq!(wrap("help:\n  a --long-flag", 8), "help:\n  a\n--long-f\nlag");
    }
}
