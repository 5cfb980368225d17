//! Reading and writing weights in safetensors files, with the names and layout of Hugging Face.

use crate::arch::Architecture;
use crate::dtype::WeightType;
use crate::kernels::FileTensor;
use crate::map::Map;
use crate::params::Parameter;
use crate::{Error, Result, init};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

mod packed;
mod save;

pub(crate) use packed::from_tensor;
pub(crate) use save::{Lazy, save, write};

/// Elements of a mapped tensor that are checked together.
const PIECE: usize = 1 << 16;

/// A host tensor in the layout of its file.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Shape, as in the file.
    pub shape: Vec<usize>,
    /// Row-major values.
    pub data: Vec<f32>,
}

/// The weight files of a folder, mapped: one file, or the shards listed in the index.
pub(crate) struct Files {
    maps: Vec<(PathBuf, Arc<Map>)>,
    /// The index, and the file that it lists for each tensor.
    index: Option<(PathBuf, BTreeMap<String, String>)>,
}

impl Files {
    /// Opens the files of a folder.
    ///
    /// # Errors
    /// A file that is missing; an index that is broken, that reaches outside its folder, or that lies beside a
    /// `model.safetensors` which it does not list.
    pub(crate) fn open(dir: &Path) -> Result<Files> {
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        let (paths, index) = match (single.exists(), index.exists()) {
            (true, false) => (vec![single], None),
            (false, false) => {
                return Err(Error::Weights {
                    path: dir.to_path_buf(),
                    message: "no model.safetensors and no model.safetensors.index.json".into(),
                    help:
                        "download the safetensors weights, or start from random ones with --set init=random"
                            .into(),
                });
            }
            (single_exists, true) => {
                let map = read_index(&index)?;
                let names: BTreeSet<&String> = map.values().collect();
                let paths: Vec<PathBuf> = names.into_iter().map(|name| dir.join(name)).collect();
                if single_exists && !paths.contains(&single) {
                    return Err(Error::Weights {
                        path: index,
                        message: format!(
                            "{} stands beside this index and is not named in it",
                            single.display()
                        ),
                        help: "one of them is left over from another model; remove it".into(),
                    });
                }
                (paths, Some((index, map)))
            }
        };
        let open = |path: PathBuf| Map::open(&path).map(|map| (path, Arc::new(map)));
        Ok(Files { maps: paths.into_iter().map(open).collect::<Result<_>>()?, index })
    }

    /// A tensor of one of these files as a tensor in place.
    fn in_file(&self, path: &Path, tensor: &TensorView) -> Option<FileTensor> {
        let (map, bytes) = self.bytes(path, tensor.data())?;
        FileTensor::new(map, bytes, WeightType::of(tensor.dtype()))
    }

    /// The map that contains these bytes of a file, and their range in it.
    fn bytes(&self, path: &Path, bytes: &[u8]) -> Option<(Arc<Map>, Range<usize>)> {
        let (_, map) = self.maps.iter().find(|(of, _)| of == path)?;
        let start = (bytes.as_ptr() as usize).checked_sub(map.as_ptr() as usize)?;
        let end = start.checked_add(bytes.len()).filter(|end| *end <= map.len())?;
        Some((Arc::clone(map), start..end))
    }

    /// All tensors by their names in the files, with the file of each; and copies in other files than the index lists,
    /// which are not read.
    ///
    /// # Errors
    /// A file that is truncated or hostile; a tensor that is in two files and not in the index.
    pub(crate) fn tensors(&self) -> Result<Tensors<'_>> {
        let mut found = Tensors::default();
        for (path, map) in &self.maps {
            for (name, tensor) in parse(path, map)?.iter() {
                let named = self.index.as_ref().and_then(|(_, map)| map.get(name));
                if named.is_some_and(|named| path.file_name().is_none_or(|file| file != named.as_str())) {
                    found.strays.insert(name.to_string(), path);
                } else if let (Some((other, _)), Some((index, _))) =
                    (found.all.insert(name.to_string(), (path, tensor)), &self.index)
                {
                    return Err(Error::Weights {
                        path: index.clone(),
                        message: format!(
                            "{} and {} both hold a tensor \"{name}\", which the index does not name",
                            other.display(),
                            path.display()
                        ),
                        help: MISPLACED.into(),
                    });
                }
            }
        }
        Ok(found)
    }
}

/// The tensors of a folder.
#[derive(Default)]
pub(crate) struct Tensors<'a> {
    /// Tensors by name, with the file of each.
    pub(crate) all: BTreeMap<String, (&'a Path, TensorView<'a>)>,
    /// Names of tensors in other files than the index lists, with the file of each.
    strays: BTreeMap<String, &'a Path>,
}

const MISPLACED: &str =
    "index and shards belong to different models, or were not written together; download them again";

/// The file that an index lists for each tensor.
fn read_index(index: &Path) -> Result<BTreeMap<String, String>> {
    let broken = |message: String| Error::Weights {
        path: index.to_path_buf(),
        message,
        help: "download the index again".into(),
    };
    let text = std::fs::read(index).map_err(|e| Error::io(index, e))?;
    let json: serde_json::Value =
        serde_json::from_slice(&text).map_err(|e| broken(format!("not valid JSON: {e}")))?;
    let map = json
        .get("weight_map")
        .and_then(|m| m.as_object())
        .filter(|map| !map.is_empty())
        .ok_or_else(|| broken("no \"weight_map\" that names tensors".into()))?;
    map.iter()
        .map(|(tensor, file)| {
            let name = file
                .as_str()
                .ok_or_else(|| broken(format!("the file of \"{tensor}\" is {file}, not a name")))?;
            match Path::new(name).components().collect::<Vec<_>>()[..] {
                // A shard is a plain file name: an index must not be able to reach outside its folder.
                [std::path::Component::Normal(_)] => Ok((tensor.clone(), name.to_string())),
                _ => Err(broken(format!("shard \"{name}\" is not a plain file name"))),
            }
        })
        .collect()
}

/// The names under which files may hold a parameter: base models are published without the prefix of their language
/// model ("wte.weight").
fn aliases(name: &str) -> impl Iterator<Item = &str> {
    let prefixes = ["transformer.", "model.", "gpt_neox."].into_iter();
    // The name of GPT-NeoX's head in transformers 5.
    let head = (name == "embed_out.weight").then_some("lm_head.weight");
    std::iter::once(name).chain(prefixes.filter_map(|prefix| name.strip_prefix(prefix))).chain(head)
}

/// The source of a parameter's values.
pub(crate) enum Source<'a> {
    /// Its values, in the engine's layout.
    Values(&'a [f32]),
    /// A read-only tensor.
    File {
        /// The tensor that products read: in place in its file, in the file's layout, or packed.
        used: FileTensor,
        /// The tensor as stored in its file.
        stored: FileTensor,
    },
}

/// Reads every parameter from `dir` and passes it to `put`.
///
/// If the files hold the head of a tied model, it serves as the embedding if they hold none, and must equal the
/// embedding otherwise: [`Architecture::with_head_of`] unties a different head.
///
/// Returns the names of tensors without a place in the model, of copies in other files than the index lists, and the
/// storage type of the weights.
///
/// # Errors
/// A file that is missing, truncated or hostile; a parameter that is missing, has another shape or a type that is not a
/// float, or is not finite. The message names file and tensor.
pub(crate) fn load<'a>(
    dir: &Path,
    arch: &Architecture,
    parameters: impl Iterator<Item = &'a Parameter>,
    mut put: impl FnMut(&Parameter, Source) -> Result<()>,
) -> Result<(Vec<String>, WeightType)> {
    let files = Files::open(dir)?;
    let Tensors { all: mut tensors, strays } = files.tensors()?;
    if arch.head.tied
        && let Some(path) = untied_head(arch, &tensors)?
    {
        return Err(Error::Weights {
            path: path.to_path_buf(),
            message: format!(
                "tensor \"{}.weight\" differs from the embedding, and the model's head is tied to it",
                arch.names.head
            ),
            help: "set tie_word_embeddings to false in config.json".into(),
        });
    }
    let (embedding, head) = (weight(arch.names.embedding), weight(arch.names.head));
    let (mut missing, mut wanted) = (Vec::new(), 0);
    let mut types = BTreeSet::new();
    for p in parameters {
        wanted += 1;
        let own = aliases(&p.name).find(|name| tensors.contains_key(*name));
        let tied =
            (arch.head.tied && p.name == embedding && tensors.contains_key(&head)).then_some(head.as_str());
        let Some(name) = own.or(tied) else {
            missing.push(p.name.as_str());
            continue;
        };
        let Some((path, tensor)) = tensors.remove(name) else { continue };
        if p.packing.is_some() && arch.packed.is_some() && packed::is_packed(&tensor) {
            let used = packed::stored(&files, p, name, (path, &tensor), &mut tensors)?;
            put(p, Source::File { stored: used.clone(), used })?;
            continue;
        }
        // Before the shape: another type often means another shape too, and the message about the type is clearer.
        floats(path, name, tensor.dtype(), &[])?;
        if tensor.shape() != p.shape && !lacks_rows(arch, p, tensor.shape()) {
            return Err(Error::Weights {
                path: path.to_path_buf(),
                message: format!(
                    "tensor \"{name}\" has shape {:?}, config.json asks for {:?}",
                    tensor.shape(),
                    p.shape
                ),
                help: "config.json and the weights belong to different models; copy both from one place"
                    .into(),
            });
        }
        types.insert(WeightType::of(tensor.dtype()));
        let damaged = |i: usize, value: f32| Error::Weights {
            path: path.to_path_buf(),
            message: format!("tensor \"{name}\" holds {value} at element {i}"),
            help:
                "the weights are damaged or come from a run that diverged; train from an earlier checkpoint"
                    .into(),
        };
        if p.mapped {
            // Checked in pieces, so that the whole tensor is never copied.
            let size = tensor.dtype().bitsize() / 8;
            for (n, bytes) in tensor.data().chunks(PIECE * size.max(1)).enumerate() {
                let values = floats(path, name, tensor.dtype(), bytes)?;
                if let Some(i) = values.iter().position(|x| !x.is_finite()) {
                    return Err(damaged(n * PIECE + i, values[i]));
                }
            }
            let stored = files.in_file(path, &tensor).ok_or_else(|| Error::Weights {
                path: path.to_path_buf(),
                message: format!("tensor \"{name}\" does not lie in the file as its header says"),
                help: "download or copy the file again".into(),
            })?;
            let used = match p.packing {
                // In a folder with packed matrices, an unpacked one was left so on purpose.
                Some(packing) if arch.packed.is_none() => packed::pack(path, p, packing, &tensor)?,
                _ => stored.clone(),
            };
            put(p, Source::File { used, stored })?;
            continue;
        }
        let values = floats(path, name, tensor.dtype(), tensor.data())?;
        if let Some(i) = values.iter().position(|x| !x.is_finite()) {
            return Err(damaged(i, values[i]));
        }
        put(p, Source::Values(&with_added_rows(arch, p, from_file(p, &values))))?;
    }
    if let Some(first) = missing.first() {
        let named = files.index.as_ref().and_then(|(_, map)| map.get(*first));
        let named = named.map_or(String::new(), |file| format!(", which the index says is in {file}"));
        if let Some(path) = strays.get(*first) {
            return Err(Error::Weights {
                path: dir.to_path_buf(),
                message: format!("tensor \"{first}\" is in {}{named}", path.display()),
                help: MISPLACED.into(),
            });
        }
        return Err(Error::Weights {
            path: dir.to_path_buf(),
            message: format!(
                "{} of {wanted} parameters are missing, the first is \"{first}\"{named}",
                missing.len()
            ),
            help: "a shard may not have been downloaded, or config.json describes another model".into(),
        });
    }
    // With mixed types, only f32 represents all values exactly.
    let stored = match types.first() {
        Some(first) if types.len() == 1 => *first,
        _ => WeightType::F32,
    };
    let copies = strays.into_iter().map(|(name, path)| format!("the copy of {name} in {}", path.display()));
    Ok((tensors.into_keys().chain(copies).collect(), stored))
}

/// Whether a parameter is the embedding (0) or the head (1).
fn vocabulary(arch: &Architecture, p: &Parameter) -> Option<usize> {
    [arch.names.embedding, arch.names.head].iter().position(|module| p.name == weight(module))
}

/// True if a file has only the rows of the base, and the architecture has added others.
fn lacks_rows(arch: &Architecture, p: &Parameter, shape: &[usize]) -> bool {
    let base = arch.added.is_some_and(|added| shape == [added.base, arch.hidden]);
    base && vocabulary(arch, p).is_some()
}

/// The values of a parameter, with the rows added that its file lacks ([`Architecture::grow`]).
pub(crate) fn with_added_rows<'a>(
    arch: &Architecture,
    p: &Parameter,
    values: Cow<'a, [f32]>,
) -> Cow<'a, [f32]> {
    let lacking = p.range.len().saturating_sub(values.len()) / arch.hidden.max(1);
    let (Some(added), Some(index), 1..) = (arch.added, vocabulary(arch, p), lacking) else { return values };
    let mut values = values.into_owned();
    let rows = init::added_rows(&values, arch.hidden, lacking, index, added.seed);
    values.extend(rows);
    values.into()
}

fn weight(module: &str) -> String {
    format!("{module}.weight")
}

/// The file of a head that differs from the embedding, if there is one.
fn untied_head<'a>(
    arch: &Architecture,
    tensors: &BTreeMap<String, (&'a Path, TensorView)>,
) -> Result<Option<&'a Path>> {
    let (embedding, head) = (weight(arch.names.embedding), weight(arch.names.head));
    let embedding = aliases(&embedding).find_map(|name| Some((name, tensors.get(name)?)));
    let (Some((name, (path, embedding))), Some((head_path, tensor))) = (embedding, tensors.get(&head)) else {
        return Ok(None);
    };
    let same = embedding.shape() == tensor.shape()
        && (embedding.dtype() == tensor.dtype() && embedding.data() == tensor.data()
            || floats(path, name, embedding.dtype(), embedding.data())?
                == floats(head_path, &head, tensor.dtype(), tensor.data())?);
    Ok((!same).then_some(*head_path))
}

impl Architecture {
    /// The architecture for the weights in `dir`: a head in the files that differs from the embedding is used, whatever
    /// `tie_word_embeddings` says (`PreTrainedModel.tie_weights`). In that case, a sentence about it is returned too.
    ///
    /// # Errors
    /// Files that are missing, truncated or hostile.
    pub fn with_head_of(mut self, dir: &Path) -> Result<(Architecture, Option<String>)> {
        if !self.head.tied {
            return Ok((self, None));
        }
        let files = Files::open(dir)?;
        let tensors = files.tensors()?;
        let Some(path) = untied_head(&self, &tensors.all)? else { return Ok((self, None)) };
        self.head.tied = false;
        let sentence = format!(
            "{}: \"{}.weight\" differs from the embedding, so it is used as the model's head although config.json \
             says tie_word_embeddings = true",
            path.display(),
            self.names.head
        );
        Ok((self, Some(sentence)))
    }
}

/// The header of a file, checked by the safetensors library.
fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(bytes).map_err(|e| Error::Weights {
        path: path.to_path_buf(),
        message: format!("not a valid safetensors file: {e}"),
        help: "the file is truncated or damaged; download or copy it again".into(),
    })
}

/// Widens to f32.
fn floats(path: &Path, name: &str, dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>> {
    match dtype {
        Dtype::F32 | Dtype::F16 | Dtype::BF16 => Ok(WeightType::of(dtype).widened(bytes)),
        other => Err(Error::Weights {
            path: path.to_path_buf(),
            message: format!("tensor \"{name}\" is of type {other:?}; F32, F16 and BF16 can be read"),
            help: match other {
                Dtype::F64 => "save the model in float32 first: model.float().save_pretrained(..)",
                _ => "quantised weights cannot be trained; use the original checkpoint",
            }
            .into(),
        }),
    }
}

/// Converts a parameter's values from the layout of its file to the engine's.
pub(crate) fn from_file<'a>(p: &Parameter, values: &'a [f32]) -> Cow<'a, [f32]> {
    p.layout.of_file(values, &p.shape)
}

/// Reads a flat file written by [`write()`]: name, shape and values.
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

/// Rejects a checkpoint file unless all `wanted` tensors are there (`fitting`) and no `others`; `what` describes the
/// tensors.
pub(crate) fn check_fit(path: &Path, what: &str, fitting: usize, wanted: usize, others: usize) -> Result<()> {
    if fitting == wanted && others == 0 {
        return Ok(());
    }
    Err(Error::Weights {
        path: path.to_path_buf(),
        message: format!("{fitting} of {wanted} {what}"),
        help: "resume with the model, the optimizer and the trained parameters that the checkpoint was made with"
            .into(),
    })
}

/// The widest storage type of the tensors in a folder's files.
///
/// # Errors
/// As [`Files::open`].
pub(crate) fn widest_type(dir: &Path) -> Result<WeightType> {
    let files = Files::open(dir)?;
    let tensors = files.tensors()?;
    let plain = tensors.all.values().filter(|(_, tensor)| !packed::is_packed(tensor));
    let types = plain.map(|(_, tensor)| WeightType::of(tensor.dtype()));
    Ok(types.max_by_key(|kind| kind.bytes()).unwrap_or_default())
}

/// The names and shapes of the tensors in a file.
///
/// # Errors
/// A file that is missing, truncated or hostile.
pub(crate) fn shapes(path: &Path, mut see: impl FnMut(&str, &[usize])) -> Result<()> {
    let map = Map::open(path)?;
    parse(path, &map)?.iter().for_each(|(name, tensor)| see(name, tensor.shape()));
    Ok(())
}
