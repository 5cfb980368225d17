//! `suasion completions SHELL`: completions from the definition of the flags.

use crate::failure::Exit;
use crate::ui::Ui;
use std::io::Write;

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct CompletionsArgs {
    /// The shell to write completions for
    pub shell: clap_complete::Shell,
}

/// Bash treats `key=value` as three words, and puts a space after a completed word. The generated function gets one
/// word, and its results are cut to the part that bash replaces.
const BASH: &str = r#"
_suasion_assignments() {
    local at=0 n=$COMP_CWORD
    if [[ ${COMP_WORDS[n]} == "=" ]]; then
        at=$((n - 1))
    elif [[ $n -gt 2 && ${COMP_WORDS[n - 1]} == "=" ]]; then
        at=$((n - 2))
    fi
    if [[ $at -gt 1 && ${COMP_WORDS[at - 1]} == "--set" ]]; then
        local key="${COMP_WORDS[at]}=" value="${COMP_WORDS[n]#=}" found
        COMP_WORDS=("${COMP_WORDS[@]:0:at}" "$key$value")
        COMP_CWORD=$at
        _suasion "$1" "$key$value" --set
        found=("${COMPREPLY[@]#"$key"}")
        COMPREPLY=()
        for value in "${found[@]}"; do
            [[ -n $value ]] && COMPREPLY+=("$value")
        done
    else
        _suasion "$@"
    fi
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && type compopt &>/dev/null; then
        compopt -o nospace 2>/dev/null
    fi
    return 0
}
"#;

/// Zsh puts a space after a completed word, here after `key=value` only.
const ZSH: &str = r#"
_suasion_assignments() {
    compadd -S '' -- ${(M)@:#*=}
    compadd -- ${@:#*=}
}
"#;

/// The generated script, with additions for the words after `--set`. Fish needs none.
fn with_assignments(shell: clap_complete::Shell, script: String) -> String {
    match shell {
        clap_complete::Shell::Bash => {
            let (start, registered) = script.split_at(script.find("\nif [[").unwrap_or(script.len()));
            format!(
                "{start}{BASH}{}",
                registered.replace("complete -F _suasion ", "complete -F _suasion_assignments ")
            )
        }
        clap_complete::Shell::Zsh => {
            let (before, after) = (":KEY=VALUE:(", ":KEY=VALUE:{_suasion_assignments ");
            let line = |line: &str| match line.split_once(before) {
                Some((flag, rest)) => format!("{flag}{after}{}", rest.replacen(")'", "}'", 1)),
                None => line.to_string(),
            };
            let mut lines: Vec<String> = script.lines().map(line).collect();
            // After `#compdef` and before the function that is run.
            lines.insert(1, ZSH.to_string());
            lines.join("\n") + "\n"
        }
        _ => script,
    }
}

/// Runs the command.
pub fn run(args: &CompletionsArgs, ui: &Ui) -> anyhow::Result<Exit> {
    // Into memory first: the generator panics where its writer fails, and a closed pipe must not panic.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::command(), "suasion", &mut script);
    let script = with_assignments(args.shell, String::from_utf8(script)?);
    let mut out = ui.out();
    out.write_all(script.as_bytes())?;
    out.flush()?;
    Ok(Exit::Done)
}
