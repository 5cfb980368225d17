//! The model card and the report page.

mod card;
pub mod data;
mod html;
mod input;

use crate::{Comparison, Identity, Report, Result, Settings};
use data::{DataCard, SampleReply};
use input::Input;
use std::path::Path;
use suasion_files::write_bytes;

/// Writes `README.md` (the model card) and `report.html` into a run's folder. [`crate::train`] calls it
/// without replies and comparison at the end of a run; call it again to add them.
pub fn write_report(
    dir: &Path,
    report: &Report,
    settings: &Settings,
    identity: &Identity,
    card: &DataCard,
    replies: &[SampleReply],
    comparison: Option<&Comparison>,
) -> Result<()> {
    let input = Input { report, settings, identity, card, replies, comparison };
    write_bytes(dir.join("README.md"), card::model_card(&input).as_bytes())?;
    Ok(write_bytes(dir.join("report.html"), html::page(&input).as_bytes())?)
}
