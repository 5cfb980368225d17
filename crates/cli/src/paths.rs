//! Paths as users write them: the one place where `~` is expanded.
//!
//! A shell expands `~` in `--data ~/x`, and not in `--data=~/x`, in quotes, or in a configuration file.

use std::convert::Infallible;
use std::path::{Path, PathBuf};

/// `~` and `~/x` name the home folder; any other path, `~user/x` too, stays as it is.
pub fn expanded(path: impl Into<PathBuf>) -> PathBuf {
    expanded_in(path.into(), std::env::home_dir())
}

fn expanded_in(path: PathBuf, home: Option<PathBuf>) -> PathBuf {
    match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) if !home.as_os_str().is_empty() => {
            if rest == Path::new("") {
                home
            } else {
                home.join(rest)
            }
        }
        _ => path,
    }
}

/// What a path that does not exist was probably meant to be: the most similar name in its folder, whatever its
/// extension.
pub fn near(path: &Path) -> Option<PathBuf> {
    let stem = |name: &str| name.split('.').next().unwrap_or(name).to_lowercase();
    let name = path.file_name()?.to_str()?;
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    let names = std::fs::read_dir(folder.unwrap_or(Path::new("."))).ok()?.flatten();
    let likeness = |other: &str| {
        let alike = strsim::normalized_damerau_levenshtein;
        (alike(&stem(name), &stem(other)), alike(name, other))
    };
    let best = names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .map(|other| (likeness(&other), other))
        .max_by(|(a, _), (b, _)| (a.0 + a.1).total_cmp(&(b.0 + b.1)))?;
    // Below this similarity it is a different name: `test.jsonl` is not `rows.jsonl`.
    (best.0.0 >= 0.7).then(|| folder.unwrap_or(Path::new("")).join(best.1))
}

/// The remedy for a path that does not exist.
pub fn missing(path: &Path) -> String {
    let folder = path.parent().filter(|folder| *folder != Path::new("") && !folder.exists());
    match (near(path), folder) {
        (Some(near), _) => format!("did you mean {}?", near.display()),
        (None, Some(folder)) => {
            format!("there is no folder {}: make it, or check the path", folder.display())
        }
        (None, None) => "check the path; a relative one starts at the current folder".into(),
    }
}

/// The parser of flags whose values are paths.
pub fn parser() -> impl clap::builder::TypedValueParser<Value = PathBuf> {
    use clap::builder::TypedValueParser as _;
    clap::builder::PathBufValueParser::new().try_map(|path| Ok::<_, Infallible>(expanded(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_nearly_there() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("rows.jsonl"), "").unwrap();
        std::fs::create_dir(at("model")).unwrap();
        assert_eq!(near(&at("rwos.jsonl")), Some(at("rows.jsonl")));
        assert_eq!(near(&at("rows.json")), Some(at("rows.jsonl")));
        assert_eq!(near(&at("modle")), Some(at("model")));
        for other in ["test.jsonl", "one.jsonl", "x", "none/rows.jsonl"] {
            assert_eq!(near(&at(other)), None, "{other}");
        }
        assert!(missing(&at("none/x.jsonl")).starts_with("there is no folder "));
        assert!(missing(&at("x")).starts_with("check the path"));
    }

    #[test]
    fn only_a_leading_tilde_is_the_home_folder() {
        let at = |path: &str| expanded_in(path.into(), Some("/home/ada".into())).display().to_string();
        assert_eq!(at("~"), "/home/ada");
        assert_eq!(at("~/"), "/home/ada");
        assert_eq!(at("~/data/[0-9].jsonl"), "/home/ada/data/[0-9].jsonl");
        for same in ["./~", "./~/x", "~ada/x", "a/~/b", "~x", "/~", ""] {
            assert_eq!(at(same), same);
        }
        assert_eq!(expanded_in("~/x".into(), None), Path::new("~/x"));
        assert_eq!(expanded_in("~/x".into(), Some("".into())), Path::new("~/x"));
    }
}
