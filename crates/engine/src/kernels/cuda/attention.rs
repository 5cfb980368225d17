//! Attention: the lists that its kernels read, and their launches.

use super::allocation::{Allocation, Work};
use super::launch::{Arguments, Size, pair, small};
use super::tiles::Tiles;
use super::{Cuda, Precision};
use crate::kernels::{AttentionPlan, Dropout, Heads, PlanBuffer, View, check};
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

/// Kernels for heads of at most `padded` columns.
#[derive(Clone, Copy, Debug)]
struct Variant {
    padded: usize,
    /// Queries, or keys in the backward of these, of a block.
    rows: usize,
    /// Columns of a tile: keys of the forward pass, keys or queries of the backward.
    forward: usize,
    backward: usize,
    /// bf16 values that an f32 becomes.
    parts: usize,
    names: [&'static CStr; 3],
}

const VARIANTS: [Variant; 8] = [
    variant(
        1,
        32,
        64,
        64,
        64,
        [c"attention_forward_bf16_32", c"attention_dq_bf16_32", c"attention_dkv_bf16_32"],
    ),
    variant(
        1,
        64,
        64,
        64,
        64,
        [c"attention_forward_bf16_64", c"attention_dq_bf16_64", c"attention_dkv_bf16_64"],
    ),
    variant(
        1,
        128,
        64,
        64,
        32,
        [c"attention_forward_bf16_128", c"attention_dq_bf16_128", c"attention_dkv_bf16_128"],
    ),
    variant(
        1,
        256,
        64,
        32,
        32,
        [c"attention_forward_bf16_256", c"attention_dq_bf16_256", c"attention_dkv_bf16_256"],
    ),
    variant(
        3,
        32,
        32,
        32,
        32,
        [c"attention_forward_f32_32", c"attention_dq_f32_32", c"attention_dkv_f32_32"],
    ),
    variant(
        3,
        64,
        32,
        32,
        32,
        [c"attention_forward_f32_64", c"attention_dq_f32_64", c"attention_dkv_f32_64"],
    ),
    variant(
        3,
        128,
        32,
        32,
        32,
        [c"attention_forward_f32_128", c"attention_dq_f32_128", c"attention_dkv_f32_128"],
    ),
    variant(
        3,
        256,
        16,
        16,
        16,
        [c"attention_forward_f32_256", c"attention_dq_f32_256", c"attention_dkv_f32_256"],
    ),
];

const fn variant(
    parts: usize,
    padded: usize,
    rows: usize,
    forward: usize,
    backward: usize,
    names: [&'static CStr; 3],
) -> Variant {
    Variant { padded, rows, forward, backward, parts, names }
}

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

/// `AttentionShape` of the kernels.
fn shape(h: Heads, dropout: Option<Dropout>, queries: usize, keys: usize) -> Result<[u64; 8]> {
    // One that reaches over all keys is none; kernels add it to places of keys, as numbers of 31 bits.
    let window = h.window.filter(|window| *window < keys).map_or(Ok(0), small)?;
    // A rate of 0 drops nothing.
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

/// Bytes of numbers.
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

    /// The parts in bf16 of `x[rows, heads · head_dim]`.
    fn split(&self, v: Variant, x: View, heads: usize, head_dim: usize) -> Result<Work> {
        let n = x.rows().saturating_mul(heads).saturating_mul(v.padded);
        let planes = self.work(n.saturating_mul(2 * v.parts))?;
        let arguments = Arguments::default().add(planes.address()).add(self.source(x)?).add(small(x.rows())?);
        let arguments = arguments.add(small(heads)?).add(small(head_dim)?).add(small(v.padded)?);
        // SAFETY: `check` has compared the sizes, and `planes` was made for them.
        unsafe {
            arguments.add(v.parts as u32).launch(&self.driver, c"attention_split", Size::elements(n))?;
        }
        Ok(planes)
    }

    pub(super) fn attend(
        &self,
        h: Heads,
        plan: &PlanBuffer,
        dropout: Option<Dropout>,
        [o, lse]: [View; 2],
        [q, kv]: [View; 2],
    ) -> Result<()> {
        check::apart(&[o, lse], &[q, kv])?;
        let (v, lists) = (Variant::of(self.precision, h.head_dim)?, self.memory.kept_plan(plan)?);
        let shape = shape(h, dropout, q.rows(), kv.rows())?;
        let (q, kv) =
            (self.split(v, q, h.heads, h.head_dim)?, self.split(v, kv, 2 * h.kv_heads, h.head_dim)?);
        let arguments = Arguments::default().add(self.target(o)?).add(self.target(lse)?);
        let arguments = arguments.add(q.address()).add(kv.address());
        let arguments = arguments.add(lists.rows.address()).add(lists.tiles.address()).add(shape);
        let size = v.size([lists.tile_count, h.heads, 1], v.rows + 2 * v.forward)?;
        // SAFETY: `check` has compared the sizes with the plan's, and the lists are those of the plan.
        unsafe { arguments.launch(&self.driver, v.names[0], size) }
    }

    pub(super) fn attend_backward(
        &self,
        h: Heads,
        plan: &PlanBuffer,
        dropout: Option<Dropout>,
        [dq, dkv]: [View; 2],
        [d_o, o, lse, q, kv]: [View; 5],
    ) -> Result<()> {
        check::apart(&[dq, dkv], &[d_o, o, lse, q, kv])?;
        let (v, lists) = (Variant::of(self.precision, h.head_dim)?, self.memory.kept_plan(plan)?);
        let shape = shape(h, dropout, q.rows(), kv.rows())?;
        self.zero(dkv.row_range(plan.keys()..dkv.rows()))?;
        let queries = q.rows();
        let delta = self.work(queries.saturating_mul(h.heads).saturating_mul(4))?;
        let arguments = Arguments::default().add(delta.address()).add(self.source(o)?).add(self.source(d_o)?);
        let arguments = arguments.add(small(queries)?).add(small(h.heads)?).add(small(h.head_dim)?);
        // SAFETY: `check` has compared the sizes.
        unsafe { arguments.launch(&self.driver, c"attention_delta", Size::rows(queries * h.heads))? };
        let q = self.split(v, q, h.heads, h.head_dim)?;
        let kv = self.split(v, kv, 2 * h.kv_heads, h.head_dim)?;
        let d_o = self.split(v, d_o, h.heads, h.head_dim)?;
        let shared = 2 * v.rows + 2 * v.backward;
        let arguments = |to: u64, lse: u64| {
            let planes = Arguments::default().add(to).add(q.address()).add(kv.address()).add(d_o.address());
            planes.add(lse).add(delta.address()).add(lists.rows.address())
        };
        let lse = self.source(lse)?;
        let size = v.size([lists.tile_count, h.heads, 1], shared)?;
        let for_queries = arguments(self.target(dq)?, lse).add(lists.tiles.address()).add(shape);
        // SAFETY: as in the forward pass.
        unsafe { for_queries.launch(&self.driver, v.names[1], size)? };
        let halves = if v.padded == 256 { 2 } else { 1 };
        let size = v.size([lists.key_tile_count, h.kv_heads, halves], shared)?;
        let for_keys = arguments(self.target(dkv)?, lse).add(lists.key_tiles.address());
        // SAFETY: as in the forward pass.
        unsafe { for_keys.add(lists.entries.address()).add(shape).launch(&self.driver, v.names[2], size) }
    }
}
