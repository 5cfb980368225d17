//! `suasion man DIR`: a manual page per command, from the definition of the flags.

use crate::failure::Exit;
use crate::paths;
use crate::ui::Ui;
use std::path::PathBuf;
use suasion_data::Error;
use suasion_data::report::format::count;

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct ManArgs {
    /// The folder to write suasion.1, suasion-train.1 and so on into; made where there is none
    #[arg(value_name = "DIR", value_parser = paths::parser())]
    dir: PathBuf,
}

/// Runs the command.
pub fn run(args: &ManArgs, ui: &Ui) -> anyhow::Result<Exit> {
    let dir = &args.dir;
    std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    let mut command = crate::command().disable_help_subcommand(true);
    command.build();
    let subcommands = command.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    let mut pages = vec![command.clone()];
    pages.extend(subcommands.collect::<Vec<_>>());
    for page in &pages {
        let page = clap_mangen::Man::new(page.clone()).manual("suasion");
        let path = dir.join(page.get_filename());
        let mut text = Vec::new();
        page.render(&mut text).map_err(|e| Error::io(&path, e))?;
        suasion_files::write_bytes(&path, &text).map_err(Error::from)?;
    }
    ui.log(format_args!(
        "wrote {} to {}; read one with: man -l {}",
        count(pages.len() as u64, "page"),
        dir.display(),
        dir.join("suasion-train.1").display()
    ));
    Ok(Exit::Done)
}
