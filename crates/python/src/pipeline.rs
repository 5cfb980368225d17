//! The pipeline that `verify` and a row's view share.

use crate::error::wrong;
use crate::folder::{Model, choices};
use crate::input::Rows;
use suasion_cli::embed::Problem;
use suasion_data::audit::Filter;
use suasion_data::{Mode, ModelFolder, Pipeline};

/// The pipeline that looks at rows, and notes on keys.
pub fn pipeline(
    model: Option<&Model>,
    keys: &str,
    rows: &Rows,
    select: Vec<String>,
    ignore: Vec<String>,
) -> Result<(Pipeline, Vec<String>), Problem> {
    let chosen = choices(keys, "verify", "verify")?;
    let filter = Filter::new(&select, &ignore)
        .map_err(|message| wrong(message, "give a code or a prefix: ignore=[\"T001\"], select=[\"M\"]"))?;
    let manifest = rows.manifest();
    let folder = model.map_or_else(|| ModelFolder::default().into(), |model| model.0.clone());
    let pipeline = Pipeline {
        mode: Mode::Verify,
        prepared_chats: manifest.is_some_and(|manifest| manifest.template.is_some()),
        labelled_under: manifest.map(|manifest| manifest.labelled_under(&chosen.policy).into()),
        filter,
        ..Pipeline::new(folder, chosen.policy)
    };
    Ok((pipeline, chosen.notes))
}
