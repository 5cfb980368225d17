//! Matrices in 4 or 8 bits: packed when they are loaded, or read as transformers and bitsandbytes saved them.

use super::{Files, floats, from_file};
use crate::dtype::{Packing, WeightType};
use crate::kernels::{Codes, Dtype, FileTensor, NF4, Packed, Scales};
use crate::params::{Layout, Parameter};
use crate::{Error, Result};
use safetensors::Dtype as Stored;
use safetensors::tensor::TensorView;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Blocks whose magnitudes share a scale.
const NESTED_BLOCK: u64 = 256;

/// Start of the suffix of the tensor that belongs to a matrix saved in 4 bits.
const STATE: &str = "quant_state.bitsandbytes__";

/// Packs a tensor of a file. Needs memory for one piece per thread besides the result.
pub(super) fn pack(path: &Path, p: &Parameter, packing: Packing, tensor: &TensorView) -> Result<FileTensor> {
    let sizes = (p.rows(), p.width());
    let packed = match p.layout {
        Layout::Transposed => {
            // In rows of inputs, as transformers packs Conv1D.
            let values = floats(path, &p.name, tensor.dtype(), tensor.data())?;
            let values = from_file(p, &values);
            Packed::pack(packing, sizes, |start, to| to.copy_from_slice(&values[start..start + to.len()]))
        }
        Layout::Same | Layout::ByHead { .. } => {
            let (kind, bytes) = (WeightType::of(tensor.dtype()), tensor.data());
            let size = kind.bytes();
            Packed::pack(packing, sizes, |start, to| {
                let bytes = &bytes[start * size..(start + to.len()) * size];
                to.copy_from_slice(&kind.widened(bytes));
            })
        }
    };
    packed.map(FileTensor::packed).map_err(|i| Error::Weights {
        path: path.to_path_buf(),
        message: format!(
            "element {i} of \"{}\" is larger than float16 holds, from which 8 bits are made",
            p.name
        ),
        help: "use load_in_4bit, or the base in its own type".into(),
    })
}

/// True for a tensor that [`stored`] reads.
pub(super) fn is_packed(tensor: &TensorView) -> bool {
    !matches!(tensor.dtype(), Stored::F32 | Stored::F16 | Stored::BF16 | Stored::F64)
}

/// Values of a tensor in the engine's layout.
pub(crate) fn from_tensor(p: &Parameter, tensor: &FileTensor) -> Vec<f32> {
    let values = tensor.values();
    match (tensor.dtype(), p.layout) {
        (Dtype::Packed(_), Layout::Transposed) => values,
        _ => from_file(p, &values).into_owned(),
    }
}

/// A matrix that transformers saved packed: its codes stay in the file. The tensors that belong to it are removed from
/// `tensors`.
pub(super) fn stored(
    files: &Files,
    p: &Parameter,
    name: &str,
    (path, tensor): (&Path, &TensorView),
    tensors: &mut BTreeMap<String, (&Path, TensorView)>,
) -> Result<FileTensor> {
    let broken = |message: String| Error::Weights {
        path: path.to_path_buf(),
        message: format!("tensor \"{name}\": {message}"),
        help: "load the original checkpoint with load_in_4bit or load_in_8bit instead".into(),
    };
    let missing = |name: &str| broken(format!("\"{name}\" is not beside it"));
    let (map, bytes) = files
        .bytes(path, tensor.data())
        .ok_or_else(|| broken("it does not lie in the file as the header says".into()))?;
    let codes = Codes::Mapped(map, bytes);
    let mut take = |name: &str| tensors.remove(name).map(|(_, tensor)| tensor);
    let (rows, width) = (p.rows(), p.width());
    let scales = match tensor.dtype() {
        Stored::I8 => {
            let module = name.strip_suffix(".weight").unwrap_or(name);
            take(&format!("{module}.weight_format"));
            let name = format!("{module}.SCB");
            Scales::Rows(numbers(&take(&name).ok_or_else(|| missing(&name))?).ok_or_else(|| missing(&name))?)
        }
        _ => {
            let mut beside = |what: &str| take(&format!("{name}.{what}"));
            if let Some(other) =
                ["fp4", "af4"].into_iter().find(|kind| beside(&format!("{STATE}{kind}")).is_some())
            {
                return Err(broken(format!("it is of the type {other}; nf4 is read")));
            }
            let what = format!("{STATE}nf4");
            let state = beside(&what).ok_or_else(|| missing(&what))?;
            let state: Value =
                serde_json::from_slice(state.data()).map_err(|e| broken(format!("{what}: {e}")))?;
            let wanted = |key: &str, want: Value| match &state[key] {
                found if *found == want => Ok(()),
                found => Err(broken(format!("its {key} is {found}, and {want} is read"))),
            };
            wanted("blocksize", Packing::BLOCK.into())?;
            wanted("shape", vec![rows, width].into())?;
            let map = beside("quant_map").and_then(|map| numbers(&map));
            if map.is_some_and(|map| map != NF4) {
                return Err(broken("its quant_map is not that of NF4".into()));
            }
            let scales = beside("absmax").ok_or_else(|| missing("absmax"))?;
            match beside("nested_absmax") {
                None => Scales::Blocks(numbers(&scales).ok_or_else(|| missing("absmax"))?),
                Some(nested) => {
                    wanted("nested_blocksize", NESTED_BLOCK.into())?;
                    let map = beside("nested_quant_map").and_then(|map| numbers(&map));
                    if map.is_some_and(|map| map != Packed::nested_values()) {
                        return Err(broken("its nested_quant_map is not bitsandbytes' dynamic one".into()));
                    }
                    let offset = state["nested_offset"].as_f64().filter(|x| x.is_finite());
                    let offset = offset.ok_or_else(|| broken(format!("{what} has no nested_offset")))?;
                    let scales_of = numbers(&nested).ok_or_else(|| missing("nested_absmax"))?;
                    Scales::Nested { codes: scales.data().to_vec(), scales: scales_of, offset: offset as f32 }
                }
            }
        }
    };
    let finite = match &scales {
        Scales::Blocks(scales) | Scales::Rows(scales) | Scales::Nested { scales, .. } => {
            scales.iter().all(|x| x.is_finite())
        }
    };
    if !finite {
        return Err(broken("a scale is not finite".into()));
    }
    let packed = Packed::of_parts(rows, width, codes, scales);
    let packed =
        packed.ok_or_else(|| broken(format!("codes and scales are not those of {rows} × {width}")))?;
    match p.packing {
        Some(packing) if packed.packing() == packing => Ok(FileTensor::packed(packed)),
        _ => Err(broken("it is packed in another way than quantization_config says".into())),
    }
}

/// The values of an f32 tensor.
fn numbers(tensor: &TensorView) -> Option<Vec<f32>> {
    (tensor.dtype() == Stored::F32).then(|| WeightType::F32.widened(tensor.data()))
}
