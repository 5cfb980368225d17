//! The data card of a run: the rows as its model card and its report describe them.

use crate::config::{Config, Init, Paths};
use crate::inputs::loading::RowSet;
use crate::inputs::opened::Opened;
use std::path::Path;
use suasion_data::report::RowView;
use suasion_data::tokens::Tokenizer;
use suasion_data::{Sample, Summary};
use suasion_train::{DataCard, FindingCount, SectionShare};

/// Rows that the report shows.
const ROWS_SHOWN: usize = 3;

/// A path as others can understand it: a hub id or a relative path as it is, else the last name.
fn public_name(path: &Path) -> String {
    match path.file_name() {
        Some(name) if path.is_absolute() || path.exists() => name.to_string_lossy().into_owned(),
        _ => path.display().to_string(),
    }
}

/// The base model: its hub id, where the folder is of the hub's cache or its config.json names one; else its name.
fn base_model(path: &Path) -> String {
    if !path.exists() {
        return path.display().to_string();
    }
    let cached = path.components().find_map(|part| {
        let id = part.as_os_str().to_str()?.strip_prefix("models--")?;
        Some(id.replace("--", "/"))
    });
    let named = || {
        let bytes = std::fs::read(path.join("config.json")).ok()?;
        let config: serde_json::Value = serde_json::from_slice(&bytes).ok()?;
        let name = config.get("_name_or_path")?.as_str()?.to_string();
        let hub =
            name.split('/').count() == 2 && !name.starts_with(['/', '.', '~']) && !Path::new(&name).exists();
        hub.then_some(name)
    };
    let folder = || {
        let whole = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        whole.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    };
    cached.or_else(named).unwrap_or_else(folder)
}

/// The card of a run that trains this model: an adapter's names its base, whatever the configuration names.
pub fn of_model(card: DataCard, opened: &Opened) -> DataCard {
    match &opened.adapter {
        None => card,
        Some(adapter) => DataCard {
            adapter: true,
            base_model: if adapter.from.is_some() {
                base_model(&opened.base)
            } else {
                card.base_model.clone()
            },
            ..card
        },
    }
}

/// The first rows that are trained on, as a page shows them.
pub fn first_rows(train: &[Sample], tokenizer: Option<&Tokenizer>) -> Vec<RowView> {
    let rows = train.iter().take(ROWS_SHOWN).flat_map(Sample::unpack).take(ROWS_SHOWN);
    rows.map(|row| RowView::of_sample(&row, tokenizer)).collect()
}

/// The data card: of the rows that were read (`rows`), those trained on (`train`) and those held out.
pub fn data_card(
    config: &Config,
    chat: bool,
    rows: &RowSet,
    train: &[Sample],
    eval: Option<&RowSet>,
    eval_rows: usize,
) -> DataCard {
    // Rows read, and those of them that are trained on: held-out rows are not.
    let (summary, trained) = (&rows.summary, Summary::of(train));
    let base = config.model_name_or_path.as_deref().map(base_model).unwrap_or_default();
    // Hub ids as they are; of files and folders the name, for others have them elsewhere.
    let names = |paths: &Option<Paths>, rows: &RowSet| -> Vec<String> {
        let named = paths.iter().flat_map(|paths| &paths.0).map(|path| public_name(path));
        let names: Vec<String> = named.collect();
        if names.is_empty() { vec![public_name(&rows.name)] } else { names }
    };
    DataCard {
        title: config
            .output_dir
            .file_name()
            .map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned()),
        start: match config.init {
            Init::Weights => String::new(),
            Init::Random => format!("random weights for the config.json of {base}"),
        },
        base_model: match config.init {
            Init::Weights => base,
            Init::Random => String::new(),
        },
        adapter: false,
        chat,
        machine: crate::machine::sentence(),
        rows: Vec::new(),
        data: names(&config.dataset_name, rows),
        eval_data: match eval {
            Some(rows) => names(&config.eval_dataset_name, rows),
            None if eval_rows > 0 => vec![format!("{eval_rows} rows held out of the training data")],
            None => Vec::new(),
        },
        rows_read: summary.rows,
        rows_kept: trained.kept,
        rows_cut: summary.cut,
        rows_dropped: summary.dropped_rows(),
        rows_failed: summary.failed,
        eval_rows: eval_rows as u64,
        tokens: trained.tokens,
        supervised_tokens: trained.supervised_tokens,
        sections: trained
            .sections()
            .map(|(name, stats)| SectionShare {
                name: name.to_string(),
                tokens: stats.tokens,
                share_before: trained.share_before(name),
                share_after: trained.share_after(name),
            })
            .collect(),
        findings: summary
            .findings
            .iter()
            .map(|(code, found)| FindingCount {
                code: code.to_string(),
                level: found.level.to_string(),
                count: found.count,
                example: rows
                    .examples
                    .get(code)
                    .map(|finding| format!("row {}: {}", finding.row, finding.message))
                    .unwrap_or_default(),
            })
            .collect(),
        configuration: config.shareable().to_yaml(),
    }
}
