//! Prepared data that is kept in memory.

use super::columnar::{Batches, Columns};
use super::manifest::{Inputs, Manifest};
use super::names::Shape;
use super::record::Record;
use crate::pack::Packer;
use crate::pipeline::{Outcome, Pipeline, Progress};
use crate::source::Source;
use crate::{Error, Finding, Result};
use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use std::path::Path;

/// Prepared rows in columns ([`super::columnar`]), with their findings and their manifest.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// The schema of the batches.
    pub schema: SchemaRef,
    /// The rows, or packs of them.
    pub batches: Vec<RecordBatch>,
    /// The findings, in the order of the rows.
    pub findings: Vec<Finding>,
    /// The inputs of the rows. It names no files.
    pub manifest: Manifest,
}

/// Prepares the rows of a source with this name. `goes_on` is called between rows, and `false` cancels.
///
/// # Errors
/// As [`Pipeline::rows`]; [`Error::Interrupted`] if `goes_on` returned false; [`Error::Source`] if a record does
/// not fit into columns.
pub fn prepare_rows(
    pipeline: &Pipeline,
    source: Source,
    name: &Path,
    mut goes_on: impl FnMut(Progress) -> bool,
) -> Result<Prepared> {
    let columns = Columns { text: pipeline.keep_text, ..Columns::of(&pipeline.policy) };
    let inputs = Inputs::of(pipeline, Shape { with_text: pipeline.keep_text, ..Shape::default() });
    let mut batches = Batches::new(columns);
    let mut packer = Packer::of(&pipeline.policy);
    let mut findings = Vec::new();
    let mut rows = pipeline.rows(source)?;
    while let Some(outcome) = rows.next() {
        if !goes_on(rows.progress()) {
            let message = "nothing is kept of it".into();
            return Err(Error::Interrupted { path: name.to_path_buf(), message });
        }
        let outcome = outcome?;
        findings.extend_from_slice(outcome.findings());
        let Outcome::Kept(kept) = outcome else { continue };
        match &mut packer {
            None => batches.push(&Record::of(&kept.sample, kept.text.as_deref()), name)?,
            Some(packer) => {
                for pack in packer.push(kept.sample) {
                    batches.push(&Record::of(&pack, None), name)?;
                }
            }
        }
    }
    let mut fill = None;
    if let Some(packer) = packer {
        let (packs, filled) = packer.finish();
        packs.iter().try_for_each(|pack| batches.push(&Record::of(pack, None), name))?;
        fill = Some(filled);
    }
    let (schema, batches) = batches.finish(name)?;
    let summary = rows.into_summary();
    let unread = || Error::io(name, std::io::ErrorKind::UnexpectedEof.into());
    let source = summary.source.clone().ok_or_else(unread)?;
    let mut manifest = Manifest::new(&summary, &inputs, &pipeline.policy, source);
    manifest.packs = fill;
    Ok(Prepared { schema, batches, findings, manifest })
}
