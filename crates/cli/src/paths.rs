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

/// The parser of flags whose values are paths.
pub fn parser() -> impl clap::builder::TypedValueParser<Value = PathBuf> {
    use clap::builder::TypedValueParser as _;
    clap::builder::PathBufValueParser::new().try_map(|path| Ok::<_, Infallible>(expanded(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

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
