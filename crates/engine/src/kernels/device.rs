//! The backend chosen at run time.

use super::cpu::Cpu;
use super::cuda::Cuda;
use super::reference::Reference;
use super::{
    Activation, Adafactor, AdamW, Attention, AttentionPlan, Backend, Buffer, ByteBuffer, Bytes, Draw,
    Dropout, FileBuffer, FileTensor, IndexBuffer, Indices, Norm, PlanBuffer, Routes, Routing, Sgd, View,
};
use crate::Result;
use crate::collective::Collective;
use crate::dtype::WeightType;

/// One of the backends. The choice is dispatched once per operation, never per element.
#[derive(Debug)]
pub enum Device {
    /// All cores of this machine.
    Cpu(Cpu),
    /// An NVIDIA card.
    Cuda(Cuda),
    /// Plain loops, for testing the other backends.
    Reference(Reference<f32>),
}

impl Device {
    /// The CPU.
    pub fn cpu() -> Device {
        Device::Cpu(Cpu::new())
    }
}

impl From<Cuda> for Device {
    fn from(cuda: Cuda) -> Device {
        Device::Cuda(cuda)
    }
}

impl From<Cpu> for Device {
    fn from(cpu: Cpu) -> Device {
        Device::Cpu(cpu)
    }
}

/// Calls a method of the chosen backend.
macro_rules! chosen {
    ($device:expr, $name:ident($($arg:ident),*)) => {
        match $device {
            Device::Cpu(backend) => backend.$name($($arg),*),
            Device::Cuda(backend) => backend.$name($($arg),*),
            Device::Reference(backend) => backend.$name($($arg),*),
        }
    };
}

/// Defines methods of [`Backend`] that call the chosen backend; those under `shared` take `&self`.
macro_rules! dispatch {
    ($($name:ident($($arg:ident: $type:ty),*) -> $result:ty;)*) => {
        $(fn $name(&mut self, $($arg: $type),*) -> $result {
            chosen!(self, $name($($arg),*))
        })*
    };
    (shared $($name:ident($($arg:ident: $type:ty),*) -> $result:ty;)*) => {
        $(fn $name(&self, $($arg: $type),*) -> $result {
            chosen!(self, $name($($arg),*))
        })*
    };
}

impl Backend for Device {
    dispatch! { shared
        allocated() -> u64;
        logits() -> usize;
        copy_bytes(kind: WeightType) -> usize;
        read(from: View, to: &mut [f32]) -> Result<()>;
        read_bytes(from: Bytes, to: &mut [u8]) -> Result<()>;
        sum_squares(x: View) -> Result<f64>;
    }

    dispatch! {
        allocate(len: usize) -> Result<Buffer>;
        allocate_bytes(len: usize) -> Result<ByteBuffer>;
        write_bytes(to: Bytes, from: &[u8]) -> Result<()>;
        map(tensor: FileTensor) -> Result<FileBuffer>;
        keep_factor(w: View, alone: bool) -> Result<()>;
        share_factor(x: View) -> Result<()>;
        release_factor(x: View) -> ();
        upload_indices(values: &[u32]) -> Result<IndexBuffer>;
        upload_plan(plan: AttentionPlan) -> Result<PlanBuffer>;
        begin_pass(kind: &[u64]) -> Result<()>;
        end_pass() -> Result<()>;
        sync() -> Result<()>;
        write(to: View, from: &[f32]) -> Result<()>;
        fill(x: View, value: f32) -> Result<()>;
        scale(x: View, factor: f32) -> Result<()>;
        copy(y: View, x: View) -> Result<()>;
        blend(y: View, x: View, share: f32) -> Result<()>;
        swap(x: View, y: View) -> Result<()>;
        add(y: View, x: View) -> Result<()>;
        gather(y: View, x: View, rows: Indices) -> Result<()>;
        scatter_add(y: View, x: View, rows: Indices) -> Result<()>;
        norm(norm: Norm, y: View, stats: View, x: View, w: View, b: Option<View>) -> Result<()>;
        norm_again(n: Norm, y: View, stats: View, x: View, w: View, b: Option<View>) -> Result<()>;
        norm_backward(
            norm: Norm, dx: View, dw: Option<View>, db: Option<View>, dy: View, stats: View, x: View, w: View
        ) -> Result<()>;
        linear(y: View, accumulate: bool, x: View, w: View, b: Option<View>) -> Result<()>;
        linear_dx(dx: View, accumulate: bool, dy: View, w: View) -> Result<()>;
        linear_dw(dw: View, accumulate: bool, dy: View, x: View) -> Result<()>;
        linear_db(db: View, accumulate: bool, dy: View) -> Result<()>;
        row_norms(n: View, w: View, b: View, a: View, scale: f32) -> Result<()>;
        divide(y: View, a: View, b: View) -> Result<()>;
        scale_columns(y: View, accumulate: bool, x: View, factors: View, bias: Option<View>) -> Result<()>;
        column_dots(out: View, accumulate: bool, a: View, b: View, divisors: View) -> Result<()>;
        rotate(x: View, head_dim: usize, table: View, positions: Indices, inverse: bool) -> Result<()>;
        dropout(x: View, dropout: Dropout) -> Result<()>;
        add_noise(x: View, sizes: View, draw: Draw) -> Result<()>;
        attention(a: Attention, o: View, lse: View, q: View, kv: View) -> Result<()>;
        attention_backward(
            a: Attention, dq: View, dkv: View, d_o: View, o: View, lse: View, q: View, kv: View
        ) -> Result<()>;
        activate(f: Activation, a: View, up: View) -> Result<()>;
        activate_backward(f: Activation, dup: View, da: View, up: View) -> Result<()>;
        scale_rows(x: View, factors: View) -> Result<()>;
        row_dots(out: View, a: View, b: View) -> Result<()>;
        route(r: Routing, probabilities: View, weights: View) -> Result<Routes>;
        route_backward(
            r: Routing, d_logits: View, probabilities: View, d_weights: View, routes: &Routes
        ) -> Result<()>;
        grouped_linear(y: View, x: View, w: &[View], offsets: Indices) -> Result<()>;
        grouped_linear_dx(dx: View, dy: View, w: &[View], offsets: Indices) -> Result<()>;
        grouped_linear_dw(
            dw: View, first: usize, accumulate: bool, dy: View, x: View, offsets: Indices
        ) -> Result<()>;
        cross_entropy(
            losses: View, logits: View, ids: Indices, weights: Option<View>, softcap: Option<f32>, smoothing: f32
        ) -> Result<()>;
        adamw(s: AdamW, p: View, g: View, m: View, v: View) -> Result<()>;
        adamw_8bit(s: AdamW, p: View, g: View, codes: [Bytes; 2], scales: [View; 2]) -> Result<()>;
        adafactor(s: Adafactor, p: View, g: View, rows: View, columns: Option<View>) -> Result<()>;
        sgd(s: Sgd, p: View, g: View, m: Option<View>) -> Result<()>;
        join(collective: &dyn Collective) -> Result<()>;
        all_reduce(x: View, collective: &dyn Collective) -> Result<()>;
        reduce_scatter(x: View, cuts: &[usize], collective: &dyn Collective) -> Result<()>;
        all_gather(x: View, cuts: &[usize], collective: &dyn Collective) -> Result<()>;
    }
}
