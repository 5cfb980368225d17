//! The model card and the report page.

mod card;
pub mod comparison;
pub mod data;
pub mod diagnosis;
mod html;
mod input;
mod words;

use crate::{Comparison, Identity, Report, Result, Settings};
use data::{DataCard, SampleReply};
use input::Input;
use std::path::Path;
use suasion_files::write_bytes;

/// Name of the model card.
pub(crate) const CARD: &str = "README.md";
/// Its name beside a README.md that no run wrote.
pub(crate) const CARD_BESIDE: &str = "MODEL_CARD.md";
/// Name of the report page.
pub(crate) const REPORT: &str = "report.html";

/// True for a model card of ours.
pub(crate) fn is_card(path: &Path) -> bool {
    std::fs::read_to_string(path).is_ok_and(|text| text.contains(card::SIGNATURE))
}

/// Writes `README.md` (the model card; `MODEL_CARD.md` beside a `README.md` that no run wrote) and `report.html` into a
/// run's folder. [`crate::train`] calls it
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
    let place = dir.join(CARD);
    let place = if place.exists() && !is_card(&place) { dir.join(CARD_BESIDE) } else { place };
    write_bytes(place, card::model_card(&input).as_bytes())?;
    Ok(write_bytes(dir.join(REPORT), html::page(&input).as_bytes())?)
}
