//! Matrix products by cuBLASLt, which is loaded at run time.

use super::driver::{Factor, Factors, Product};
use super::found;
use crate::{Error, Result};
use cudarc::cublaslt::{result as lt, sys as lt_sys};
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::c_void;

/// Bytes of cuBLASLt's workspace. Its algorithms are chosen for this size, so the size affects the bytes of results.
pub(super) const WORKSPACE: usize = 32 << 20;

/// cuBLASLt, and the algorithms that it has chosen.
pub(super) struct Products {
    handle: lt_sys::cublasLtHandle_t,
    workspace: u64,
    algorithms: HashMap<Shape, lt_sys::cublasLtMatmulAlgo_t>,
}

/// The properties for which an algorithm is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    sizes: [usize; 3],
    strides: [usize; 3],
    transposed: [bool; 2],
    factors: Factors,
    accumulate: bool,
    bias: bool,
    /// Largest power of two, up to 256, that divides the addresses of the two factors, and of the result and the bias.
    alignments: [u32; 3],
}

fn product_failure(call: &str, error: lt::CublasError) -> Error {
    Error::Device {
        message: format!("cuBLASLt's {call} failed: {:?}", error.0),
        help: "the library and the driver may not fit each other: install the cuBLAS of the CUDA version that `suasion \
               env` shows for the driver"
            .into(),
    }
}

/// A descriptor of cuBLASLt, destroyed when it is dropped.
struct Owned<T: Copy>(T, unsafe fn(T) -> Result<(), lt::CublasError>);

impl<T: Copy> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: created by cuBLASLt, and destroyed only here.
        let _ = unsafe { (self.1)(self.0) };
    }
}

type Layout = Owned<lt_sys::cublasLtMatrixLayout_t>;

/// cuBLASLt is column-major, so a row-major matrix is its transpose there: `c = a · b` becomes `cᵀ = bᵀ · aᵀ`, with `b`
/// as the first factor. A factor that is stored transposed is transposed by the operation.
impl Products {
    /// Loads the library, with a workspace of [`WORKSPACE`] bytes at this address.
    pub(super) fn open(card: &str, workspace: u64) -> Result<Products> {
        let handle = lt::create_handle().map_err(|e| found::cublas(card, e))?;
        Ok(Products { handle, workspace, algorithms: HashMap::new() })
    }

    /// Closes the library and returns the address of its workspace.
    ///
    /// # Safety
    /// None of its work is running or will run.
    pub(super) unsafe fn close(&mut self) -> u64 {
        // SAFETY: guaranteed by the caller.
        let _ = unsafe { lt::destroy_handle(self.handle) };
        self.workspace
    }

    /// Runs a product.
    ///
    /// # Safety
    /// As [`super::driver::Driver::matmul`], in the current context.
    pub(super) unsafe fn run(&mut self, p: &Product, stream: sys::CUstream) -> Result<()> {
        let failed = |call: &'static str| move |e| product_failure(call, e);
        let (compute, kind) = match p.factors {
            Factors::Bf16 => {
                (lt_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, lt_sys::cudaDataType::CUDA_R_16BF)
            }
            Factors::Tf32 => {
                (lt_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32, lt_sys::cudaDataType::CUDA_R_32F)
            }
            Factors::F32 => {
                (lt_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, lt_sys::cudaDataType::CUDA_R_32F)
            }
        };
        let single = lt_sys::cudaDataType::CUDA_R_32F;
        let (one, beta) = (1f32, if p.accumulate { 1f32 } else { 0f32 });
        // SAFETY: the descriptors were just made; the caller guarantees the addresses.
        unsafe {
            let description = Owned(
                lt::create_matmul_desc(compute, single).map_err(failed("MatmulDescCreate"))?,
                lt::destroy_matmul_desc,
            );
            use lt_sys::cublasLtMatmulDescAttributes_t as Attribute;
            // `cublasOperation_t`: CUBLAS_OP_N and CUBLAS_OP_T.
            let operation = |f: &Factor| i32::from(f.transposed);
            describe(&description, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, operation(&p.b))?;
            describe(&description, Attribute::CUBLASLT_MATMUL_DESC_TRANSB, operation(&p.a))?;
            if let Some(bias) = p.bias {
                let epilogue = lt_sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
                describe(&description, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue)?;
                describe(&description, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias)?;
            }
            let first = layout(kind, &p.b, p.k, p.n)?;
            let second = layout(kind, &p.a, p.m, p.k)?;
            let result = Factor { address: p.c, stride: p.c_stride, transposed: false };
            let result = layout(single, &result, p.m, p.n)?;
            let shape = Shape::of(p);
            let algorithm = match self.algorithms.get(&shape) {
                Some(known) => *known,
                None => {
                    let chosen = self.choose(shape, &description, &first, &second, &result)?;
                    self.algorithms.insert(shape, chosen);
                    chosen
                }
            };
            lt::matmul(
                self.handle,
                description.0,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                p.b.address as *const c_void,
                first.0,
                p.a.address as *const c_void,
                second.0,
                p.c as *const c_void,
                result.0,
                p.c as *mut c_void,
                result.0,
                &algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
            .map_err(failed("Matmul"))
        }
    }

    /// The algorithm that cuBLASLt's heuristic ranks first: a function of the shape, the library and the card. Partial
    /// sums of a split product are f32 in the workspace, and are added in a fixed order.
    fn choose(
        &self,
        shape: Shape,
        description: &Owned<lt_sys::cublasLtMatmulDesc_t>,
        first: &Layout,
        second: &Layout,
        result: &Layout,
    ) -> Result<lt_sys::cublasLtMatmulAlgo_t> {
        use lt_sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let failed = |call: &'static str| move |e| product_failure(call, e);
        let wanted = Owned(
            lt::create_matmul_pref().map_err(failed("MatmulPreferenceCreate"))?,
            lt::destroy_matmul_pref,
        );
        let set = |attribute, value: &[u8]| {
            // SAFETY: the value has the attribute's type in the calls below.
            unsafe { lt::set_matmul_pref_attribute(wanted.0, attribute, value.as_ptr().cast(), value.len()) }
                .map_err(failed("MatmulPreferenceSetAttribute"))
        };
        set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE.to_ne_bytes())?;
        let scheme = lt_sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &scheme.to_ne_bytes())?;
        let [a, b, c] = shape.alignments;
        for (attribute, alignment) in [
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, c),
        ] {
            set(attribute, &alignment.to_ne_bytes())?;
        }
        // SAFETY: the descriptors are live, here and in the caller.
        let chosen = unsafe {
            lt::get_matmul_algo_heuristic(
                self.handle,
                description.0,
                first.0,
                second.0,
                result.0,
                result.0,
                wanted.0,
            )
        };
        Ok(chosen.map_err(failed("MatmulAlgoGetHeuristic"))?.algo)
    }
}

/// Sets an attribute of a descriptor.
///
/// # Safety
/// The value has the attribute's type.
unsafe fn describe<T>(
    of: &Owned<lt_sys::cublasLtMatmulDesc_t>,
    attribute: lt_sys::cublasLtMatmulDescAttributes_t,
    value: T,
) -> Result<()> {
    // SAFETY: guaranteed by the caller.
    unsafe { lt::set_matmul_desc_attribute(of.0, attribute, (&raw const value).cast(), size_of::<T>()) }
        .map_err(|e| product_failure("MatmulDescSetAttribute", e))
}

/// The layout of a factor of `rows × width`; the elements of a column are adjacent.
fn layout(kind: lt_sys::cudaDataType, f: &Factor, rows: usize, width: usize) -> Result<Layout> {
    let (lying, of) = if f.transposed { (rows, width) } else { (width, rows) };
    let made = lt::create_matrix_layout(kind, lying as u64, of as u64, f.stride as i64);
    Ok(Owned(made.map_err(|e| product_failure("MatrixLayoutCreate", e))?, lt::destroy_matrix_layout))
}

impl Shape {
    fn of(p: &Product) -> Shape {
        let alignment = |address: u64| 1 << address.trailing_zeros().min(8);
        // The epilogue reads the bias with the same vector width as it writes the result.
        let written = p.c | p.bias.unwrap_or(0);
        Shape {
            sizes: [p.m, p.n, p.k],
            strides: [p.a.stride, p.b.stride, p.c_stride],
            transposed: [p.a.transposed, p.b.transposed],
            factors: p.factors,
            accumulate: p.accumulate,
            bias: p.bias.is_some(),
            alignments: [p.a.address, p.b.address, written].map(alignment),
        }
    }
}
