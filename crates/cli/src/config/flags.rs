//! Flags of keys: every key is a flag of the commands that use it (`--learning_rate 1e-4`).
//!
//! The flags come from the table. Other spellings of keys (`--learning-rate`, keys of other
//! trainers, keys of TRL that are not supported, `--loss_weights.system`) is respelled before clap reads it, so
//! that it gets the answer that it would get in a file.

use super::table::{Group, KEYS, Key};
use super::{known, synonyms, table};
use clap::builder::{PossibleValue, StringValueParser, TypedValueParser};
use clap::{Arg, ArgMatches, Command, FromArgMatches, ValueHint};
use std::ffi::{OsStr, OsString};

/// The commands that take keys.
pub const COMMANDS: [&str; 10] =
    ["train", "prepare", "verify", "eval", "compare", "diagnose", "generate", "chat", "check", "init"];

/// The hidden flag that carries `name=value` for a name that is not itself a flag.
const TYPED: &str = "key";

/// A key as it was given on the command line.
#[derive(Clone, Debug)]
pub struct Typed {
    /// The key, or what was taken for one.
    pub name: String,
    /// Its value.
    pub text: String,
}

/// The keys given as flags.
#[derive(Clone, Debug, Default)]
pub struct KeyFlags(pub Vec<Typed>);

impl clap::Args for KeyFlags {
    /// Adds nothing: [`with_keys`] adds the flags, because it knows the command.
    fn augment_args(command: Command) -> Command {
        command
    }

    fn augment_args_for_update(command: Command) -> Command {
        command
    }
}

impl FromArgMatches for KeyFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<KeyFlags, clap::Error> {
        // A command does not have every flag; a flag that it lacks is not given.
        let one = |key: &Key| matches.try_get_one::<String>(key.name).ok().flatten();
        let mut typed: Vec<Typed> = KEYS
            .iter()
            .filter_map(|key| Some(Typed { name: key.name.into(), text: one(key)?.clone() }))
            .collect();
        for text in matches.try_get_many::<String>(TYPED).ok().flatten().into_iter().flatten() {
            let (name, text) = text.split_once('=').unwrap_or((text, ""));
            typed.push(Typed { name: name.into(), text: text.into() });
        }
        Ok(KeyFlags(typed))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = KeyFlags::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Any text. The names are for completion only: the table reads values in more spellings, and has the better
/// errors.
#[derive(Clone)]
pub struct Named(pub Vec<String>);

impl TypedValueParser for Named {
    type Value = String;

    fn parse_ref(&self, command: &Command, arg: Option<&Arg>, value: &OsStr) -> Result<String, clap::Error> {
        StringValueParser::new().parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(self.0.iter().cloned().map(PossibleValue::new)))
    }
}

impl Key {
    /// The values of the key that have names.
    fn names(&self) -> Vec<String> {
        let schema = (self.schema)();
        let names = schema["enum"].as_array().into_iter().flatten();
        let mut names: Vec<String> = names.filter_map(|name| Some(name.as_str()?.to_string())).collect();
        if schema["type"].to_string().contains("boolean") {
            names.extend(["true".to_string(), "false".into()]);
        }
        names
    }

    /// What may follow `--set`: `key=value` for the values that have names, else `key=`.
    fn assignments(&self) -> Vec<String> {
        match self.names() {
            names if names.is_empty() => vec![format!("{}=", self.name)],
            names => names.iter().map(|value| format!("{}={value}", self.name)).collect(),
        }
    }

    /// True if a command uses the key.
    pub fn used_by(&self, command: &str) -> bool {
        let held_out = matches!(self.name, "eval_dataset_name" | "eval_fraction" | "dataset_test_split");
        let of_device = matches!(self.name, "device" | "matmul_precision" | "use_cpu" | "cuda_graphs");
        let of_packing = self.name.contains("load_in") || self.name.contains("bnb");
        match (command, self.group) {
            ("train" | "check" | "init", _) => true,
            ("chat", Group::Rows) => false,
            ("chat", Group::Labels) => {
                matches!(self.name, "stop_tokens" | "template_date" | "template_kwargs")
            }
            ("compare", Group::Output) => self.name == "logging_steps",
            ("compare", _) => true,
            (_, Group::Labels) => COMMANDS.contains(&command),
            // verify --loss measures a model.
            ("verify", Group::Model) => true,
            ("prepare", Group::Model) => !of_device && !of_packing && self.name != "init",
            ("diagnose", Group::Model) => of_device || of_packing || self.name == "model_name_or_path",
            ("prepare" | "verify" | "diagnose", Group::Rows) => !held_out,
            ("eval", Group::Rows) => self.name != "eval_fraction",
            ("eval" | "diagnose", Group::Evaluation) => self.name == "per_device_eval_batch_size",
            ("generate", Group::Rows) => !held_out || self.name == "dataset_test_split",
            ("eval" | "generate" | "chat", Group::Model) => true,
            ("eval" | "generate" | "chat", Group::Seeds) => self.name == "seed",
            _ => false,
        }
    }

    /// The commands that use the key.
    pub fn commands(&self) -> Vec<&'static str> {
        COMMANDS.into_iter().filter(|command| self.used_by(command)).collect()
    }

    fn flag(&self, command: &str) -> Arg {
        let flag = Arg::new(self.name)
            .long(self.name)
            .value_name("VALUE")
            .help(format!("{} [{}]", self.doc.trim().trim_end_matches('.'), (self.expected)()))
            .help_heading(self.group.heading())
            .hide_short_help(true)
            .allow_negative_numbers(true);
        let flag = match self.names() {
            names if !names.is_empty() => flag.value_parser(Named(names)).hide_possible_values(true),
            _ if (self.expected)().starts_with("a path") => flag.value_hint(ValueHint::AnyPath),
            _ => flag,
        };
        let flag = if (self.schema)()["type"].to_string().contains("boolean") {
            flag.num_args(0..=1).default_missing_value("true")
        } else {
            flag
        };
        if self.name == "output_dir" && command == "train" {
            flag.short('o').value_name("DIR").hide_short_help(false).help_heading(None::<&str>)
        } else {
            flag
        }
    }
}

/// The command line with a flag per key on every command that uses it.
pub fn with_keys(command: Command) -> Command {
    command.mut_subcommands(|subcommand| {
        let name = subcommand.get_name().to_string();
        if !COMMANDS.contains(&name.as_str()) {
            return subcommand;
        }
        let keys = KEYS.iter().filter(|key| key.used_by(&name)).map(|key| key.flag(&name));
        let typed = Arg::new(TYPED).long(TYPED).hide(true).action(clap::ArgAction::Append);
        let assignments = KEYS.iter().filter(|key| key.used_by(&name)).flat_map(Key::assignments).collect();
        subcommand
            .args(keys)
            .arg(typed.allow_hyphen_values(true))
            .mut_arg("set", |set| set.value_parser(Named(assignments)).hide_possible_values(true))
    })
}

/// The arguments, with names of keys spelled as `command` has them.
pub fn respelled(command: &Command, args: Vec<OsString>) -> Vec<OsString> {
    if !args.iter().any(|arg| arg.to_str().is_some_and(|arg| COMMANDS.contains(&arg))) {
        return args;
    }
    let is_flag = |name: &str| {
        command
            .get_subcommands()
            .chain([command])
            .flat_map(Command::get_arguments)
            .any(|arg| arg.get_long() == Some(name))
    };
    let mut spelled: Vec<OsString> = Vec::new();
    let mut rest = args.into_iter().peekable();
    while let Some(arg) = rest.next() {
        if arg == "--" {
            spelled.push(arg);
            spelled.extend(rest);
            break;
        }
        let after_set =
            spelled.last().is_some_and(|last| last == "--set" || last == "--prompt" || last == "-p");
        let flag = arg.to_str().filter(|_| !after_set).and_then(|arg| arg.strip_prefix("--"));
        let Some(flag) = flag else {
            spelled.push(arg);
            continue;
        };
        let (typed, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (flag, None),
        };
        let (head, entry) = typed.split_at(typed.find('.').unwrap_or(typed.len()));
        let head = head.replace('-', "_");
        let is_key = table::find(&head).is_some();
        if is_key && entry.is_empty() {
            let value = value.map(|value| format!("={value}")).unwrap_or_default();
            spelled.push(format!("--{head}{value}").into());
        } else if is_key
            || !is_flag(typed) && (known::find(&head).is_some() || synonyms::find(&head).is_some())
        {
            let value = match value {
                Some(value) => value.to_string(),
                // As with a flag of a truth value, none is true.
                None => rest
                    .next_if(|next| !next.to_string_lossy().starts_with("--"))
                    .map_or("true".into(), |next| next.to_string_lossy().into_owned()),
            };
            spelled.push(format!("--{TYPED}={head}{entry}={value}").into());
        } else {
            spelled.push(arg);
        }
    }
    spelled
}
