//! Weights from and to safetensors files, with the names and the layout of Hugging Face.

use crate::map::Map;
use crate::params::Parameter;
use crate::{Error, Result};
use safetensors::{Dtype, SafeTensors};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Files above this size are cut into shards, as transformers does.
const SHARD_BYTES: usize = 5_000_000_000;

/// A host tensor in the layout of its file.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Shape, as in the file.
    pub shape: Vec<usize>,
    /// Row-major values.
    pub data: Vec<f32>,
}

/// Reads every parameter from `dir` and hands its values to `put`, in the engine's layout.
///
/// Returns the names of tensors that the model has no place for.
///
/// # Errors
/// A file that is missing, truncated or hostile; a parameter that is missing, of another shape, of a type
/// that is not a float, or not finite. The message names file and tensor.
pub(crate) fn load<'a>(
    dir: &Path,
    parameters: impl Iterator<Item = &'a Parameter>,
    mut put: impl FnMut(&Parameter, &[f32]) -> Result<()>,
) -> Result<Vec<String>> {
    let files = files(dir)?;
    let mut left: BTreeMap<&str, &Parameter> = parameters.map(|p| (p.name.as_str(), p)).collect();
    let wanted = left.len();
    let mut unknown = Vec::new();
    for path in &files {
        let map = Map::open(path)?;
        let tensors = parse(path, &map)?;
        for (name, tensor) in tensors.iter() {
            // Base models are published without the prefix of their language model ("wte.weight").
            let mut full = vec![name.to_string()];
            full.extend(["transformer", "model", "gpt_neox"].map(|prefix| format!("{prefix}.{name}")));
            // What transformers 5 calls the head of GPT-NeoX in memory.
            full.extend((name == "lm_head.weight").then(|| "embed_out.weight".to_string()));
            let Some(p) = full.iter().find_map(|n| left.remove(n.as_str())) else {
                unknown.push(name.to_string());
                continue;
            };
            if tensor.shape() != p.shape {
                return Err(Error::Weights {
                    path: path.clone(),
                    message: format!(
                        "tensor \"{name}\" has shape {:?}, config.json asks for {:?}",
                        tensor.shape(),
                        p.shape
                    ),
                    help: "config.json and the weights belong to different models; copy both from one place"
                        .into(),
                });
            }
            let values = floats(path, name, tensor.dtype(), tensor.data())?;
            if let Some(i) = values.iter().position(|x| !x.is_finite()) {
                return Err(Error::Weights {
                    path: path.clone(),
                    message: format!("tensor \"{name}\" holds {} at element {i}", values[i]),
                    help: "the weights are damaged or come from a run that diverged; train from an earlier checkpoint".into(),
                });
            }
            put(p, &from_file(p, &values))?;
        }
    }
    if let Some(first) = left.keys().next() {
        return Err(Error::Weights {
            path: dir.to_path_buf(),
            message: format!("{} of {} parameters are missing, the first is \"{first}\"", left.len(), wanted),
            help: "a shard may not have been downloaded, or config.json describes another model".into(),
        });
    }
    Ok(unknown)
}

/// The weight files of a folder: one file, or the shards that the index names.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let single = dir.join("model.safetensors");
    if single.exists() {
        return Ok(vec![single]);
    }
    let index = dir.join("model.safetensors.index.json");
    if !index.exists() {
        return Err(Error::Weights {
            path: dir.to_path_buf(),
            message: "no model.safetensors and no model.safetensors.index.json".into(),
            help: "download the safetensors weights, or start from random ones with --set init=random".into(),
        });
    }
    let broken = |message: String| Error::Weights {
        path: index.clone(),
        message,
        help: "download the index again".into(),
    };
    let text = std::fs::read(&index).map_err(|e| Error::io(&index, e))?;
    let json: serde_json::Value =
        serde_json::from_slice(&text).map_err(|e| broken(format!("not valid JSON: {e}")))?;
    let map = json
        .get("weight_map")
        .and_then(|m| m.as_object())
        .ok_or_else(|| broken("no \"weight_map\"".into()))?;
    let mut names: Vec<&str> = map.values().filter_map(|v| v.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    names
        .into_iter()
        .map(|name| match Path::new(name).components().collect::<Vec<_>>()[..] {
            // A shard is a plain file name: an index must not be able to reach outside its folder.
            [std::path::Component::Normal(_)] => Ok(dir.join(name)),
            _ => Err(broken(format!("shard \"{name}\" is not a plain file name"))),
        })
        .collect()
}

/// The header of a file, checked by its format's own library.
fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(bytes).map_err(|e| Error::Weights {
        path: path.to_path_buf(),
        message: format!("not a valid safetensors file: {e}"),
        help: "the file is truncated or damaged; download or copy it again".into(),
    })
}

/// Widens to f32.
fn floats(path: &Path, name: &str, dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>> {
    let pairs = || bytes.as_chunks::<2>().0.iter();
    match dtype {
        Dtype::F32 => Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
        Dtype::F16 => Ok(pairs().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect()),
        Dtype::BF16 => Ok(pairs().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()),
        other => Err(Error::Weights {
            path: path.to_path_buf(),
            message: format!("tensor \"{name}\" is of type {other:?}; F32, F16 and BF16 can be read"),
            help: "quantised weights cannot be trained; use the original checkpoint".into(),
        }),
    }
}

/// A parameter's values in the layout of its file → in the engine's.
pub(crate) fn from_file<'a>(p: &Parameter, values: &'a [f32]) -> Cow<'a, [f32]> {
    p.layout.of_file(values, &p.shape)
}

/// A tensor that is read from the device only when the writer comes to it, so that saving needs the memory of
/// one tensor, not of the model.
pub(crate) struct Lazy<'a> {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) read: Box<dyn Fn() -> Result<Vec<f32>> + 'a>,
}

impl Lazy<'_> {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * size_of::<f32>()
    }
}

/// A tensor on its way into a file. The writer of the format cannot take an error, so the first one is kept
/// here.
struct Reading<'a> {
    tensor: &'a Lazy<'a>,
    failure: &'a RefCell<Option<Error>>,
}

impl safetensors::View for Reading<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match (self.tensor.read)() {
            Ok(values) => Cow::Owned(values.iter().flat_map(|x| x.to_le_bytes()).collect()),
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

/// Writes `dir/model.safetensors`, or shards and an index above 5 GB. Each file appears complete or not at
/// all.
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

/// Removes what an earlier save left in the other layout: readers would take it for this one.
fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, e)),
        _ => Ok(()),
    }
}

/// Writes one safetensors file, completely or not at all.
pub(crate) fn write(path: &Path, tensors: &[&Lazy]) -> Result<()> {
    // What transformers looks for before it reads a file.
    let metadata = [("format".to_string(), "pt".to_string())].into();
    let failure = RefCell::new(None);
    let written = suasion_files::write_at(path, |temporary| {
        let named =
            tensors.iter().map(|tensor| (tensor.name.as_str(), Reading { tensor, failure: &failure }));
        let result = safetensors::serialize_to_file(named, Some(metadata), temporary);
        if failure.borrow().is_some() {
            return Err(std::io::Error::other("a tensor could not be read from the device"));
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

/// Reads a flat file written by [`write`]: name, shape and values.
///
/// # Errors
/// As [`load`].
pub(crate) fn read(path: &Path, mut put: impl FnMut(&str, &[usize], Vec<f32>) -> Result<()>) -> Result<()> {
    let map = Map::open(path)?;
    for (name, tensor) in parse(path, &map)?.iter() {
        put(name, tensor.shape(), floats(path, name, tensor.dtype(), tensor.data())?)?;
    }
    Ok(())
}
