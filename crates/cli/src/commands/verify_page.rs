//! The page that `verify --html` writes.

use crate::config::Config;
use crate::failure::Failure;
use crate::inputs::opened::Opened;
use crate::interrupt;
use crate::progress::share_of;
use crate::ui::Ui;
use suasion_data::Summary;
use suasion_data::report::html::{self, Verified};
use suasion_data::report::{Gallery, Losses};
use suasion_data::tokens::Tokenizer;
use suasion_train::plan::{check_row, eval_budget};
use suasion_train::token_losses;

/// What the page is made of.
pub struct Parts<'a> {
    /// The data, as it was named.
    pub name: String,
    /// Its rows in numbers.
    pub summary: &'a Summary,
    /// The rows kept for the page.
    pub gallery: &'a Gallery,
    pub tokenizer: Option<&'a Tokenizer>,
    /// The arguments that name data, model and configuration.
    pub words: Vec<String>,
    /// True if the rows were prepared by suasion.
    pub prepared: bool,
    /// True if the model's loss is requested.
    pub loss: bool,
}

/// The page.
///
/// # Errors
/// If the loss is requested and the model cannot compute it.
pub fn page(parts: Parts<'_>, config: &Config, ui: &Ui) -> anyhow::Result<String> {
    let Parts { name, summary, gallery, tokenizer, words: flags, prepared, loss } = parts;
    let mut rows = gallery.chosen(tokenizer);
    let losses = match loss {
        true => Some(measure(gallery, &mut rows, config, ui)?),
        false => None,
    };
    let tokenizer = tokenizer.is_some();
    let objective = config.data.objective;
    Ok(html::page(&Verified { name, summary, gallery, rows, losses, objective, flags, prepared, tokenizer }))
}

/// Measures the model's loss on the gallery's sample, and gives it to the rows that the page shows.
fn measure(
    gallery: &Gallery,
    rows: &mut [suasion_data::report::Chosen],
    config: &Config,
    ui: &Ui,
) -> anyhow::Result<Losses> {
    if config.model_name_or_path.is_none() && config.adapter_name_or_path.is_none() {
        return Err(Failure::usage("--loss: no model is named", "name one: --model M").into());
    }
    let opened = Opened::of(config, ui)?;
    let samples = gallery.samples();
    samples.iter().try_for_each(|sample| check_row(&opened.arch, sample))?;
    let budgets = samples.iter().map(|sample| eval_budget(std::slice::from_ref(*sample), 1));
    let budget = budgets.reduce(|a, b| suasion_engine::Budget {
        tokens: a.tokens.max(b.tokens),
        targets: a.targets.max(b.targets),
        ..a
    });
    let mut losses = Losses::default();
    let Some(budget) = budget else { return Ok(losses) };
    let mut model = opened.start(ui, config).build(budget)?;
    let mut of_rows = std::collections::HashMap::new();
    for (i, sample) in samples.iter().enumerate() {
        if interrupt::raised() {
            return Err(suasion_train::Error::Interrupted.into());
        }
        ui.overwrite(&share_of("measuring the loss", i as u64, samples.len() as u64, ui.columns()));
        let tokens = token_losses(&mut model, sample)?;
        let mean = losses.add(sample, &tokens);
        of_rows.insert(sample.id.row, (tokens, mean));
    }
    ui.overwrite("");
    for row in rows {
        if let Some((tokens, mean)) = of_rows.get(&row.view.id.row) {
            row.view.set_losses(tokens, *mean);
        }
    }
    Ok(losses)
}
