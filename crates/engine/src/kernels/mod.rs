//! Operations on device memory. All `unsafe` code of the workspace is below this module, except one memory map.
//!
//! [`Backend`] is a trait of coarse operations. Model code holds [`View`]s, which refer to ranges of a backend's
//! buffers, and never a pointer. Lists of rows, positions and targets and attention plans are uploaded once a step and
//! passed as handles. Whatever safe code passes, an operation either computes or returns an error.
//!
//! Three backends exist: [`reference::Reference`], plain f64 loops that can be checked by reading, [`cpu::Cpu`] and
//! [`cuda::Cuda`]. Every kernel test compares the other two with the reference. [`device::Device`] is one of them,
//! chosen at run time.

mod buffers;
mod check;
#[allow(unsafe_code)]
pub mod cpu;
#[allow(unsafe_code)]
pub mod cuda;
pub mod device;
mod experts;
mod host;
mod packed;
mod plan;
mod quantised;
mod random;
pub mod reference;
mod shapes;
mod stored;
mod view;

pub use buffers::{Buffer, ByteBuffer, Bytes, FileBuffer, IndexBuffer, Indices, PlanBuffer, Routes};
pub(crate) use packed::{Codes, NF4, Packed, Scales};
pub use plan::{AttentionPlan, AttentionRange};
pub use quantised::BLOCK as QUANTISED_BLOCK;
pub use random::{Draw, Dropout};
pub use shapes::{Activation, Adafactor, AdamW, Heads, Norm, Routing, Sgd, TargetLoss};
pub use stored::FileTensor;
pub use view::{Dtype, View};

use crate::Result;
use crate::collective::Collective;
use crate::dtype::WeightType;

/// Elements of logits computed at once on the CPU (32 MiB): enough rows for an efficient matrix product at any
/// vocabulary size.
pub(crate) const LOGITS: usize = 8 << 20;

/// Causal attention within the ranges of a plan, and within the heads' window.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// The heads.
    pub heads: Heads,
    /// Which keys each query row attends to.
    pub plan: &'a PlanBuffer,
    /// Dropout of the probabilities. The element of a query's head and a key is in row `token · heads + head`, where
    /// `token` is the query's row among the keys. Its column is the key's place among the keys of the query's range,
    /// prefix then own.
    pub dropout: Option<Dropout>,
}

/// Coarse operations on device memory. Matrices are row-major; `x += …` accumulates, `x = …` overwrites, and `(+)=`
/// does either, depending on `accumulate`.
///
/// # Errors
/// Every operation returns [`crate::Error::Operands`], before it touches memory, if sizes do not match, a written view
/// overlaps another view of the call, a view has gaps between its rows and the operation does not document that it
/// takes such views, or a handle belongs to another backend or to freed memory. A device may add failures of its own.
pub trait Backend {
    /// A buffer of `len` zeros, freed when the handle is dropped.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] if there is not enough memory.
    fn allocate(&mut self, len: usize) -> Result<Buffer>;
    /// A buffer of `len` zero bytes, freed when the handle is dropped.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] if there is not enough memory.
    fn allocate_bytes(&mut self, len: usize) -> Result<ByteBuffer>;
    /// Host to device; lengths must be equal.
    fn write_bytes(&mut self, to: Bytes, from: &[u8]) -> Result<()>;
    /// Device to host, after all previous operations; lengths must be equal.
    fn read_bytes(&self, from: Bytes, to: &mut [u8]) -> Result<()>;
    /// Lets operations read a tensor in place in its file, or packed; see [`Dtype`].
    ///
    /// # Errors
    /// A failure of the device.
    fn map(&mut self, tensor: FileTensor) -> Result<FileBuffer>;
    /// Bytes of live buffers and of packed matrices; tensors in files are not counted.
    fn allocated(&self) -> u64;
    /// Elements of logits that the head should compute at once: enough for an efficient matrix product.
    fn logits(&self) -> usize {
        LOGITS
    }
    /// Announces that products will use `w`, or rows of it, as weights repeatedly. A device whose products take another
    /// type then keeps a copy in that type, which always matches the current values. `w` is a range of a buffer without
    /// such a copy, or a tensor in a file; with `alone`, no other operation reads that tensor.
    /// # Errors
    /// [`crate::Error::Memory`] if there is not enough memory.
    fn keep_factor(&mut self, w: View, alone: bool) -> Result<()> {
        let _ = (w, alone);
        Ok(())
    }
    /// Announces that several products take `x`, or parts of it, one after the other: a device that rounds factors
    /// rounds it once, until `x` is written or released.
    ///
    /// # Errors
    /// As [`Backend::read`].
    fn share_factor(&mut self, x: View) -> Result<()> {
        let _ = x;
        Ok(())
    }
    /// Ends the effect of [`Backend::share_factor`].
    fn release_factor(&mut self, x: View) {
        let _ = x;
    }
    /// Bytes per element of a copy that [`Backend::keep_factor`] keeps of weights of this type; 0 if it keeps none.
    fn copy_bytes(&self, kind: WeightType) -> usize {
        let _ = kind;
        0
    }
    /// Uploads row, token or position numbers.
    fn upload_indices(&mut self, values: &[u32]) -> Result<IndexBuffer>;
    /// Checks and uploads an attention plan.
    fn upload_plan(&mut self, plan: AttentionPlan) -> Result<PlanBuffer>;
    /// Begins a pass of a kind. Passes of one kind run the same operations with other numbers, so that a device can
    /// replay them. Small buffers allocated before the end of the pass get the same place in the next one.
    ///
    /// # Errors
    /// A failure of the device.
    fn begin_pass(&mut self, _kind: &[u64]) -> Result<()> {
        Ok(())
    }
    /// Ends a pass.
    ///
    /// # Errors
    /// A failure of the device.
    fn end_pass(&mut self) -> Result<()> {
        Ok(())
    }
    /// Waits until all operations are done, and frees the memory of dropped handles.
    fn sync(&mut self) -> Result<()>;
    /// Host to device; lengths must be equal.
    fn write(&mut self, to: View, from: &[f32]) -> Result<()>;
    /// Device to host, after all previous operations; lengths must be equal.
    fn read(&self, from: View, to: &mut [f32]) -> Result<()>;

    /// `x = value`.
    fn fill(&mut self, x: View, value: f32) -> Result<()>;
    /// `x = factor · x`.
    fn scale(&mut self, x: View, factor: f32) -> Result<()>;
    /// `y = x`. Both may have gaps between rows.
    fn copy(&mut self, y: View, x: View) -> Result<()>;
    /// `y += share · (x − y)`.
    fn blend(&mut self, y: View, x: View, share: f32) -> Result<()>;
    /// Exchanges `x` and `y`.
    fn swap(&mut self, x: View, y: View) -> Result<()>;
    /// `y += x`.
    fn add(&mut self, y: View, x: View) -> Result<()>;
    /// `y[i, :] = x[rows[i], :]`. An embedding lookup, with the table as `x`.
    fn gather(&mut self, y: View, x: View, rows: Indices) -> Result<()>;
    /// `y[rows[i], :] += x[i, :]`, in the order of `i`: the backward of [`Backend::gather`].
    fn scatter_add(&mut self, y: View, x: View, rows: Indices) -> Result<()>;

    /// `y = norm(x)`, and the statistics for the backward pass, `norm.statistics()` per group.
    ///
    /// Each group of `w.len()` columns of a row is normalised separately: the whole row, or each head of it. `x` and
    /// `y` may have gaps.
    fn norm(&mut self, norm: Norm, y: View, stats: View, x: View, w: View, b: Option<View>) -> Result<()>;
    /// Recomputes `y` from `x` and its statistics: cheaper than saving it.
    fn norm_again(&mut self, n: Norm, y: View, stats: View, x: View, w: View, b: Option<View>) -> Result<()>;
    /// `dx += …`, and, if given, `dw += …`, `db += …`. `dx`, `dy` and `x` may have gaps.
    fn norm_backward(
        &mut self,
        norm: Norm,
        dx: View,
        dw: Option<View>,
        db: Option<View>,
        dy: View,
        stats: View,
        x: View,
        w: View,
    ) -> Result<()>;

    /// `y[rows, outputs] (+)= x[rows, inputs] · w[outputs, inputs]ᵀ + b[outputs]`. `x` and `y` may have gaps.
    fn linear(&mut self, y: View, accumulate: bool, x: View, w: View, b: Option<View>) -> Result<()>;
    /// `dx[rows, inputs] (+)= dy[rows, outputs] · w[outputs, inputs]`. `dx` and `dy` may have gaps.
    fn linear_dx(&mut self, dx: View, accumulate: bool, dy: View, w: View) -> Result<()>;
    /// `dw[outputs, inputs] (+)= dyᵀ · x`. `dy` and `x` may have gaps.
    fn linear_dw(&mut self, dw: View, accumulate: bool, dy: View, x: View) -> Result<()>;
    /// `db[outputs] (+)= Σ_rows dy[rows, outputs]`. `dy` may have gaps.
    fn linear_db(&mut self, db: View, accumulate: bool, dy: View) -> Result<()>;

    /// `n[i] = ‖w[i, :] + scale · b[i, :] · a‖`, for `w[outputs, inputs]`, `b[outputs, rank]`, `a[rank, inputs]`.
    fn row_norms(&mut self, n: View, w: View, b: View, a: View, scale: f32) -> Result<()>;
    /// `y = a / b`, element by element.
    fn divide(&mut self, y: View, a: View, b: View) -> Result<()>;
    /// `y[i, j] (+)= factors[j] · x[i, j] + bias[j]`. `x` and `y` may have gaps.
    fn scale_columns(
        &mut self,
        y: View,
        accumulate: bool,
        x: View,
        factors: View,
        bias: Option<View>,
    ) -> Result<()>;
    /// `out[j] (+)= Σ_i a[i, j] · b[i, j] / divisors[j]`. `a` and `b` may have gaps.
    fn column_dots(&mut self, out: View, accumulate: bool, a: View, b: View, divisors: View) -> Result<()>;

    /// Rotates the first columns of each head of `head_dim` columns in place (RoPE, Su et al. 2021, with the half-split
    /// pairing of transformers). Row `p` of `table` holds the cosines and then the sines of position `p`, each half as
    /// many as the rotated columns; row `r` of `x` has position `positions[r]`. `inverse` rotates back, which is the
    /// backward. `x` may have gaps.
    fn rotate(
        &mut self,
        x: View,
        head_dim: usize,
        table: View,
        positions: Indices,
        inverse: bool,
    ) -> Result<()>;

    /// `x = x · dropout`, each element by its row and column in `x`. The backward applies the same to the gradient.
    fn dropout(&mut self, x: View, dropout: Dropout) -> Result<()>;
    /// `x[i, :] += sizes[i] · u`, with `u` uniform in [−1, 1) for each element by its row and column in `x`.
    fn add_noise(&mut self, x: View, sizes: View, draw: Draw) -> Result<()>;

    /// `q[queries, query_width]`, `kv[keys, kv_width]` → `o[queries, query_width]` and the log-sum-exp of each score row
    /// in `lse[queries, heads]`.
    fn attention(&mut self, a: Attention, o: View, lse: View, q: View, kv: View) -> Result<()>;
    /// `dq = …`, `dkv = …` (rows of `kv` outside the plan get zeros).
    fn attention_backward(
        &mut self,
        a: Attention,
        dq: View,
        dkv: View,
        d_o: View,
        o: View,
        lse: View,
        q: View,
        kv: View,
    ) -> Result<()>;

    /// `a[rows, width] = f(up[rows, gate_width · width])`.
    fn activate(&mut self, f: Activation, a: View, up: View) -> Result<()>;
    /// `dup = da · f'(up)`.
    fn activate_backward(&mut self, f: Activation, dup: View, da: View, up: View) -> Result<()>;

    /// `x[i, :] = factors[i] · x[i, :]`.
    fn scale_rows(&mut self, x: View, factors: View) -> Result<()>;
    /// `out[i] = Σ_j a[i, j] · b[i, j]`.
    fn row_dots(&mut self, out: View, a: View, b: View) -> Result<()>;

    /// Chooses experts. `probabilities[rows, experts]` holds logits and becomes their softmax; `weights[rows ·
    /// per_row]` receives the weights of the slots, in slot order.
    fn route(&mut self, r: Routing, probabilities: View, weights: View) -> Result<Routes>;
    /// `d_logits = …`, given the gradient of the slots' weights.
    fn route_backward(
        &mut self,
        r: Routing,
        d_logits: View,
        probabilities: View,
        d_weights: View,
        routes: &Routes,
    ) -> Result<()>;
    /// `y[slots, outputs] = x[slots, inputs] · w[expert]ᵀ`, with the slots of each expert at the offsets of [`Routes`].
    /// The views of `w`, stacked, are the weights of all experts, `[experts · outputs, inputs]`.
    fn grouped_linear(&mut self, y: View, x: View, w: &[View], offsets: Indices) -> Result<()>;
    /// `dx[slots, inputs] = dy[slots, outputs] · w[expert]`.
    fn grouped_linear_dx(&mut self, dx: View, dy: View, w: &[View], offsets: Indices) -> Result<()>;
    /// `dw (+)= …`, where `dw` is the gradient of `dw.rows()` rows of the stacked weights, from row `first` on.
    fn grouped_linear_dw(
        &mut self,
        dw: View,
        first: usize,
        accumulate: bool,
        dy: View,
        x: View,
        offsets: Indices,
    ) -> Result<()>;

    /// Softmax cross-entropy of `logits[n, vocab]` with `ids[n]`, into the rows of `losses[n, TargetLoss::COLUMNS]`,
    /// which stay on the device. With `weights[n]` the logits are overwritten by the gradient of `Σ weights[i]·nll_i`,
    /// `weights[i] · (softmax − onehot)`; without, they are unchanged. With `softcap` it is the cross-entropy of
    /// `softcap · tanh(logits / softcap)`. With `smoothing` above 0 the gradient is that of [`TargetLoss::smoothed`],
    /// and the column `uniform` is filled.
    fn cross_entropy(
        &mut self,
        losses: View,
        logits: View,
        ids: Indices,
        weights: Option<View>,
        softcap: Option<f32>,
        smoothing: f32,
    ) -> Result<()>;

    /// `Σ x²` in f64, summed in an order that does not depend on the number of threads. Waits for the result.
    fn sum_squares(&self, x: View) -> Result<f64>;
    /// One step for parameters `p` with gradients `g` and moments `m`, `v`.
    fn adamw(&mut self, s: AdamW, p: View, g: View, m: View, v: View) -> Result<()>;
    /// As [`Backend::adamw`], with moments of one byte per element as in bitsandbytes: each block of 256 has codes and
    /// a scale in `scales`. New moments have codes 0 and scales 0.
    fn adamw_8bit(&mut self, s: AdamW, p: View, g: View, codes: [Bytes; 2], scales: [View; 2]) -> Result<()>;
    /// One step for a matrix `p` with mean squares per row in `rows` and per column in `columns`; without `columns`,
    /// for a vector with one mean square per element in `rows`.
    fn adafactor(&mut self, s: Adafactor, p: View, g: View, rows: View, columns: Option<View>) -> Result<()>;
    /// One step for parameters `p`, with the last direction in `m` if there is momentum.
    fn sgd(&mut self, s: Sgd, p: View, g: View, m: Option<View>) -> Result<()>;
    /// Connects the devices of all ranks, if they have their own transport. All ranks must call it before the first of
    /// the operations below.
    ///
    /// # Errors
    /// A failure of the device, or of a rank.
    fn join(&mut self, _: &dyn Collective) -> Result<()> {
        Ok(())
    }
    /// Replaces `x` by its sum over all ranks.
    fn all_reduce(&mut self, x: View, collective: &dyn Collective) -> Result<()>;
    /// Replaces this rank's share of `x` by its sum over all ranks; see [`Collective::reduce_scatter`].
    fn reduce_scatter(&mut self, x: View, cuts: &[usize], collective: &dyn Collective) -> Result<()> {
        check::shares(x, cuts, collective.ranks())?;
        let mut values = vec![0.0; x.len()];
        self.read(x, &mut values)?;
        collective.reduce_scatter(&mut values, cuts)?;
        self.write(x, &values)
    }
    /// Replaces every share of `x` by the values of its rank; see [`Collective::all_gather`].
    fn all_gather(&mut self, x: View, cuts: &[usize], collective: &dyn Collective) -> Result<()> {
        check::shares(x, cuts, collective.ranks())?;
        let mut values = vec![0.0; x.len()];
        self.read(x, &mut values)?;
        collective.all_gather(&mut values, cuts)?;
        self.write(x, &values)
    }
}
