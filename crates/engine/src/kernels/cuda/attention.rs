//! Attention: the lists that its kernels read, and their launches.

use super::allocation::{Allocation, Work};
use super::launch::{Size, launch, pair, small};
use super::tiles::Tiles;
use super::{Cuda, Precision};
use crate::kernels::{Attention, AttentionPlan, Dropout, Heads, PlanBuffer, View};
use crate::{Error, Result};
use std::ffi::CStr;

/// A plan in the card's memory.
#[derive(Debug)]
pub(super) struct Plan {
    rows: Allocation,
    tiles: Allocation,
    tile_count: usize,
    key_tiles: Allocation,
    key_tile_count: usize,
    entries: Allocation,
}

/// The kernels for heads of at most `padded` columns.
#[derive(Clone, Copy, Debug)]
struct Variant {
    padded: usize,
    /// Queries of a block, or keys in the backward of the keys.
    rows: usize,
    /// Columns of a tile: keys in the forward pass, keys or queries in the backward.
    forward: usize,
    backward: usize,
    /// Number of bf16 values that represent an f32.
    parts: usize,
    names: [&'static CStr; 3],
}

/// The variant whose kernels' names end with `$name`.
macro_rules! variant {
    ($name:literal, $parts:literal, $padded:literal, $rows:literal, $forward:literal, $backward:literal) => {
        Variant {
            padded: $padded,
            rows: $rows,
            forward: $forward,
            backward: $backward,
            parts: $parts,
            names: [
                c_name(concat!("attention_forward_", $name, "\0")),
                c_name(concat!("attention_dq_", $name, "\0")),
                c_name(concat!("attention_dkv_", $name, "\0")),
            ],
        }
    };
}

const fn c_name(name: &str) -> &CStr {
    match CStr::from_bytes_with_nul(name.as_bytes()) {
        Ok(name) => name,
        Err(_) => panic!("it ends with its only 0"),
    }
}

const VARIANTS: [Variant; 8] = [
    variant!("bf16_32", 1, 32, 64, 64, 64),
    variant!("bf16_64", 1, 64, 64, 64, 64),
    variant!("bf16_128", 1, 128, 64, 64, 32),
    variant!("bf16_256", 1, 256, 64, 32, 32),
    variant!("f32_32", 3, 32, 32, 32, 32),
    variant!("f32_64", 3, 64, 32, 32, 32),
    variant!("f32_128", 3, 128, 32, 32, 32),
    variant!("f32_256", 3, 256, 16, 16, 16),
];

impl Variant {
    fn of(precision: Precision, head_dim: usize) -> Result<Variant> {
        let parts = if precision == Precision::Bf16 { 1 } else { 3 };
        let fits = |v: &&Variant| v.parts == parts && head_dim <= v.padded;
        VARIANTS.iter().find(fits).copied().ok_or_else(|| Error::Operands {
            operation: "attention",
            message: format!("heads of {head_dim} columns: the kernels of cards take up to 256"),
        })
    }

    fn size(self, [x, y, z]: [usize; 3], bytes: usize) -> Result<Size> {
        let grid = [small(x)?, small(y)?, small(64 / self.rows * z)?];
        Ok(Size::new(grid, [2 * self.rows as u32, 1, 1])
            .with_shared((bytes * self.padded * 2 * self.parts) as u32))
    }
}

/// `AttentionShape` of the kernels, as words.
fn shape(h: Heads, dropout: Option<Dropout>, queries: usize, keys: usize) -> Result<[u64; 8]> {
    // A window over all keys counts as none; kernels add the window to key indices, which are 31-bit numbers.
    let window = h.window.filter(|window| *window < keys).map_or(Ok(0), small)?;
    // A rate of 0 means no dropout.
    let dropout = dropout.filter(|dropout| dropout.limit() > 0);
    let (key, limit) = dropout.map_or((0, 0), |d| (d.draw.key, d.limit()));
    let (site, kept) = dropout.map_or((0, 0.0), |d| (d.draw.site, d.kept()));
    Ok([
        pair(small(queries)?, small(keys)?),
        pair(small(h.heads)?, small(h.kv_heads)?),
        pair(small(h.head_dim)?, window),
        pair(h.scale.to_bits(), h.softcap.unwrap_or(0.0).to_bits()),
        key,
        limit,
        pair(site, kept.to_bits()),
        0,
    ])
}

/// The bytes of 32-bit numbers.
fn bytes(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

impl Cuda {
    pub(super) fn plan(&mut self, plan: AttentionPlan) -> Result<PlanBuffer> {
        plan.check()?;
        let (queries, keys) = (plan.rows.len(), plan.keys());
        small(queries.max(keys).saturating_mul(2))?;
        let lists = Tiles::of(&plan);
        let put = |values: &[u32]| Allocation::of(&self.driver, &bytes(values));
        let kept = Plan {
            rows: put(&plan.rows)?,
            tiles: put(lists.tiles.as_flattened())?,
            tile_count: lists.tiles.len(),
            key_tiles: put(lists.key_tiles.as_flattened())?,
            key_tile_count: lists.key_tiles.len(),
            entries: put(lists.entries.as_flattened())?,
        };
        Ok(self.memory.keep_plan(kept, queries, keys))
    }

    /// The bf16 parts of `x[rows, heads · head_dim]`.
    fn split(&self, v: Variant, x: View, heads: usize, head_dim: usize) -> Result<Work> {
        let n = x.rows().saturating_mul(heads).saturating_mul(v.padded);
        let planes = self.work(n.saturating_mul(2 * v.parts))?;
        let from = self.source(x)?;
        launch!(
            self,
            c"attention_split",
            Size::elements(n),
            [&planes, from, x.rows(), heads, head_dim, v.padded, v.parts]
        )?;
        Ok(planes)
    }

    pub(super) fn attend(&self, a: Attention, [o, lse]: [View; 2], [q, kv]: [View; 2]) -> Result<()> {
        let (h, lists) = (a.heads, self.memory.kept_plan(a.plan)?);
        let v = Variant::of(self.precision, h.head_dim)?;
        let shape = shape(h, a.dropout, q.rows(), kv.rows())?;
        let (q, kv) =
            (self.split(v, q, h.heads, h.head_dim)?, self.split(v, kv, 2 * h.kv_heads, h.head_dim)?);
        let (o, lse) = (self.target(o)?, self.target(lse)?);
        let size = v.size([lists.tile_count, h.heads, 1], v.rows + 2 * v.forward)?;
        launch!(self, v.names[0], size, [o, lse, &q, &kv, &lists.rows, &lists.tiles, shape])
    }

    pub(super) fn attend_backward(
        &self,
        a: Attention,
        [dq, dkv]: [View; 2],
        [d_o, o, lse, q, kv]: [View; 5],
    ) -> Result<()> {
        let (h, lists) = (a.heads, self.memory.kept_plan(a.plan)?);
        let v = Variant::of(self.precision, h.head_dim)?;
        let shape = shape(h, a.dropout, q.rows(), kv.rows())?;
        self.zero(dkv.row_range(a.plan.keys()..dkv.rows()))?;
        let sums = q.rows().saturating_mul(h.heads);
        let delta = self.floats(sums)?;
        let (o, d_o_at) = (self.source(o)?, self.source(d_o)?);
        launch!(
            self,
            c"attention_delta",
            Size::rows(sums),
            [&delta, o, d_o_at, q.rows(), h.heads, h.head_dim]
        )?;
        let q = self.split(v, q, h.heads, h.head_dim)?;
        let kv = self.split(v, kv, 2 * h.kv_heads, h.head_dim)?;
        let d_o = self.split(v, d_o, h.heads, h.head_dim)?;
        let lse = self.source(lse)?;
        let shared = 2 * v.rows + 2 * v.backward;
        let dq = self.target(dq)?;
        let size = v.size([lists.tile_count, h.heads, 1], shared)?;
        launch!(self, v.names[1], size, [dq, &q, &kv, &d_o, lse, &delta, &lists.rows, &lists.tiles, shape])?;
        let halves = if v.padded == 256 { 2 } else { 1 };
        let dkv = self.target(dkv)?;
        let size = v.size([lists.key_tile_count, h.kv_heads, halves], shared)?;
        let (key_tiles, entries) = (&lists.key_tiles, &lists.entries);
        launch!(
            self,
            v.names[2],
            size,
            [dkv, &q, &kv, &d_o, lse, &delta, &lists.rows, key_tiles, entries, shape]
        )
    }
}
