//! Findings as workflow commands of GitHub Actions, which become annotations.

use super::format::{count, thousands};
use super::spool::{Findings, Located};
use super::text::visible;
use crate::Level;
use crate::pipeline::Summary;
use std::io::{self, Write};

/// The maximal number of annotations per level that GitHub shows for a step.
const SHOWN: u64 = 10;

/// Writes an annotation for each listed finding, at most ten per level, and a line that counts all of them.
///
/// # Errors
/// Those of the writer, and if the findings cannot be read.
pub fn write(out: &mut impl Write, summary: &Summary, findings: &Findings) -> io::Result<()> {
    let quotas = findings.quotas(None, Some(SHOWN));
    let listed: u64 = quotas.values().sum();
    findings.each(quotas, |located| writeln!(out, "{}", annotation(&located)))?;
    let mut text = format!(
        "{}, {} supervised of {}",
        count(summary.rows, "row"),
        thousands(summary.supervised_tokens),
        count(summary.tokens, "token")
    );
    for (code, found) in &summary.findings {
        text += &format!("; {code} ({}) {}", found.level, thousands(found.count));
    }
    if listed < findings.len() {
        text += &format!("; {} shown here", thousands(listed));
    }
    writeln!(out, "::notice title=suasion verify::{}", data(&text))
}

fn annotation(located: &Located) -> String {
    let Located { finding, file, line, in_file, .. } = located;
    let command = match finding.level {
        Level::Error => "error",
        Level::Warning => "warning",
        Level::Note => "notice",
    };
    let rule = finding.code.rule();
    format!(
        "::{command} file={},line={},title={}::{}",
        property(file.strip_prefix("./").unwrap_or(file)),
        line.unwrap_or(in_file + 1),
        property(&format!("{}: {}", finding.code, rule.meaning)),
        data(&format!("row {}: {}. Fix: {}.", finding.row, finding.message, rule.help)),
    )
}

/// Text of a command, on one line.
fn data(text: &str) -> String {
    visible(text).replace('%', "%25")
}

/// The value of a command's property.
fn property(text: &str) -> String {
    data(text).replace(':', "%3A").replace(',', "%2C")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Code, Finding, RowId};
    use std::path::Path;

    #[test]
    fn data_cannot_make_commands() {
        let mut findings = Findings::default();
        let finding = Finding::new(3, Code::M008, "100 %\n::error::\x1b[31m");
        findings.push(&RowId::new(Path::new("a,b:c\n.jsonl"), 3, Some(4)), 0, &finding).unwrap();
        let mut out = Vec::new();
        write(&mut out, &Summary::default(), &findings).unwrap();
        let out = String::from_utf8(out).unwrap();
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(lines.len(), 2, "{out}");
        assert!(
            lines[0].starts_with("::error file=a%2Cb%3Ac↵.jsonl,line=4,title=M008%3A everything"),
            "{out}"
        );
        assert!(lines[0].contains("::row 3: 100 %25↵::error::␛[31m. Fix: "), "{out}");
    }
}
