//! The pipeline that `verify` and a row's view share.

use crate::error::wrong;
use crate::folder::{Model, choices};
use crate::input::Rows;
use suasion_cli::embed::{self, Problem};
use suasion_data::audit::Filter;
use suasion_data::{Code, Mode, ModelFolder, Pipeline};

/// What looks at rows.
pub struct Looks {
    /// The pipeline.
    pub pipeline: Pipeline,
    /// Codes whose errors are allowed.
    pub allowed: Vec<Code>,
    /// Notes for the caller.
    pub notes: Vec<String>,
}

/// Looks at rows by keys.
pub fn looks(
    model: Option<&Model>,
    keys: &str,
    rows: &Rows,
    select: Vec<String>,
    ignore: Vec<String>,
) -> Result<Looks, Problem> {
    let chosen = choices(keys, "verify", "verify")?;
    let filter = Filter::new(&select, &ignore)
        .map_err(|message| wrong(message, "give a code or a prefix: ignore=[\"T001\"], select=[\"M\"]"))?;
    let manifest = rows.manifest();
    let folder = model.map_or_else(|| ModelFolder::default().into(), |model| model.0.clone());
    let mut notes = chosen.notes;
    if let Some(manifest) = manifest {
        let differences = embed::differences(manifest, &folder, &chosen.policy);
        if !differences.is_empty() {
            let name = rows.name.display();
            notes.push(format!("{name}: prepared with other settings: {}", differences.join("; ")));
        }
    }
    let pipeline = Pipeline {
        mode: Mode::Verify,
        prepared_chats: manifest.is_some_and(|manifest| manifest.template.is_some()),
        labelled_under: manifest.map(|manifest| manifest.labelled_under(&chosen.policy).into()),
        filter,
        ..Pipeline::new(folder, chosen.policy)
    };
    Ok(Looks { pipeline, allowed: chosen.allowed, notes })
}
