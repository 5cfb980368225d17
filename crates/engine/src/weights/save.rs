//! Writing safetensors files.

use crate::dtype::WeightType;
use crate::{Error, Result};
use safetensors::Dtype;
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

/// Larger models are split into shards of this size, as in transformers.
const SHARD_BYTES: usize = 5_000_000_000;

/// A tensor that is read from the device only when it is written, so that saving needs the memory of one tensor, not of
/// the whole model.
pub(crate) struct Lazy<'a> {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) kind: WeightType,
    pub(crate) read: Box<dyn Fn() -> Result<Vec<f32>> + 'a>,
}

impl Lazy<'_> {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.kind.bytes()
    }
}

/// A tensor being written to a file. The safetensors writer cannot return an error, so the first one is kept here.
struct Reading<'a> {
    tensor: &'a Lazy<'a>,
    path: &'a Path,
    failure: &'a RefCell<Option<Error>>,
}

impl safetensors::View for Reading<'_> {
    fn dtype(&self) -> Dtype {
        self.tensor.kind.dtype()
    }

    fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let Lazy { name, kind, read, .. } = self.tensor;
        let bytes = read().and_then(|values| {
            kind.narrow(&values).map_err(|i| Error::Weights {
                path: self.path.to_path_buf(),
                message: format!(
                    "element {i} of \"{name}\" is {}, which {} cannot hold",
                    values[i],
                    kind.name()
                ),
                help: "the checkpoint of this step holds the weights in float32".into(),
            })
        });
        match bytes {
            Ok(bytes) => Cow::Owned(bytes),
            Err(error) => {
                self.failure.borrow_mut().get_or_insert(error);
                Cow::Owned(vec![0; self.tensor.bytes()])
            }
        }
    }

    fn data_len(&self) -> usize {
        self.tensor.bytes()
    }
}

/// Writes `dir/model.safetensors`, or shards and an index above 5 GB. Each file appears complete or not at all.
pub(crate) fn save(dir: &Path, tensors: &[Lazy]) -> Result<()> {
    let mut shards: Vec<Vec<&Lazy>> = vec![Vec::new()];
    let (mut bytes, mut total) = (0, 0);
    for tensor in tensors {
        let len = tensor.bytes();
        if bytes > 0 && bytes + len > SHARD_BYTES {
            shards.push(Vec::new());
            bytes = 0;
        }
        bytes += len;
        total += len;
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    if let [shard] = &shards[..] {
        write(&dir.join("model.safetensors"), shard)?;
        return remove(&dir.join("model.safetensors.index.json"));
    }
    let mut map = BTreeMap::new();
    for (i, shard) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        write(&dir.join(&name), shard)?;
        map.extend(shard.iter().map(|t| (t.name.clone(), name.clone())));
    }
    let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": map });
    let path = dir.join("model.safetensors.index.json");
    suasion_files::write_atomic(&path, |file| writeln!(file, "{index:#}"))?;
    remove(&dir.join("model.safetensors"))
}

/// Removes the files of an earlier save in the other layout: readers would use them instead.
fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, e)),
        _ => Ok(()),
    }
}

/// Writes one safetensors file, complete or not at all.
pub(crate) fn write(path: &Path, tensors: &[&Lazy]) -> Result<()> {
    // Metadata that transformers requires.
    let metadata = [("format".to_string(), "pt".to_string())].into();
    let failure = RefCell::new(None);
    let written = suasion_files::write_at(path, |temporary| {
        let named =
            tensors.iter().map(|tensor| (tensor.name.as_str(), Reading { tensor, path, failure: &failure }));
        let result = safetensors::serialize_to_file(named, Some(metadata), temporary);
        if failure.borrow().is_some() {
            return Err(std::io::Error::other("a tensor could not be written"));
        }
        result.map_err(|e| match e {
            safetensors::SafeTensorError::IoError(e) => e,
            other => std::io::Error::other(other),
        })
    });
    match failure.take() {
        Some(error) => Err(error),
        None => Ok(written?),
    }
}
