//! The data card of a run: the rows as its model card and its report describe them.

use crate::config::{Config, Init};
use crate::inputs::loading::RowSet;
use std::path::PathBuf;
use suasion_data::{Sample, Summary};
use suasion_train::{DataCard, FindingCount, SectionShare};

/// The data card: of the rows that were read (`rows`), those trained on (`train`) and those held out.
pub fn data_card(
    config: &Config,
    rows: &RowSet,
    train: &[Sample],
    eval: Option<&RowSet>,
    eval_rows: usize,
) -> DataCard {
    // Rows read, and those of them that are trained on: held-out rows are not.
    let (summary, trained) = (&rows.summary, Summary::of(train));
    let name = |path: &Option<PathBuf>| path.as_deref().map(|p| p.display().to_string()).unwrap_or_default();
    DataCard {
        title: config
            .output_dir
            .file_name()
            .map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned()),
        base_model: match config.init {
            Init::Weights => name(&config.model_name_or_path),
            Init::Random => {
                format!("random weights for the config.json of {}", name(&config.model_name_or_path))
            }
        },
        data: vec![rows.name.display().to_string()],
        eval_data: match eval {
            Some(rows) => vec![rows.name.display().to_string()],
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
        configuration: config.to_yaml(),
    }
}
