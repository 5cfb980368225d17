//! A mixture of experts: the choice of experts for each row, and linear layers with separate weights per expert.
//!
//! Every row takes `per_row` experts, so it fills as many slots. Slots are sorted by expert, and within an expert by
//! row: the slots of an expert are adjacent rows of a matrix.

use super::buffers::Memory;
use super::check::rule;
use super::{Backend, Routes, Routing, View};
use crate::Result;
use std::ops::Range;

impl Routing {
    /// `x` holds a row's logits and becomes their softmax. Returns the chosen experts with their weights, the most
    /// likely first (the lower number if two are equal).
    pub(super) fn choose(self, x: &mut [f64]) -> Vec<(usize, f64)> {
        let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        x.iter_mut().for_each(|x| *x = (*x - max).exp());
        let sum: f64 = x.iter().sum();
        x.iter_mut().for_each(|x| *x /= sum);
        let mut experts: Vec<usize> = (0..x.len()).collect();
        experts.sort_by(|a, b| x[*b].total_cmp(&x[*a]));
        experts.truncate(self.per_row);
        let taken: f64 = experts.iter().map(|e| x[*e]).sum();
        let scale = if self.normalise { 1.0 / taken } else { 1.0 };
        experts.into_iter().map(|e| (e, x[e] * scale)).collect()
    }

    /// The gradient of a row's logits from that of its slots' weights; `taken` lists the row's experts and slots.
    pub(super) fn choose_backward(
        self,
        probabilities: &[f64],
        taken: &[(usize, usize)],
        d_weight: impl Fn(usize) -> f64,
    ) -> Vec<f64> {
        let mut d = vec![0.0; probabilities.len()];
        taken.iter().for_each(|(e, slot)| d[*e] = d_weight(*slot));
        if self.normalise {
            let sum: f64 = taken.iter().map(|(e, _)| probabilities[*e]).sum();
            let through: f64 = taken.iter().map(|(e, _)| d[*e] * probabilities[*e] / sum).sum();
            taken.iter().for_each(|(e, _)| d[*e] = (d[*e] - through) / sum);
        }
        let through: f64 = taken.iter().map(|(e, _)| d[*e] * probabilities[*e]).sum();
        d.iter_mut().zip(probabilities).for_each(|(d, p)| *d = p * (*d - through));
        d
    }
}

/// The slots of rows that took these experts.
pub(super) struct Slots {
    pub(super) rows: Vec<u32>,
    pub(super) offsets: Vec<u32>,
    pub(super) weights: Vec<f64>,
}

impl Slots {
    pub(super) fn of(experts: usize, taken: &[Vec<(usize, f64)>]) -> Slots {
        let mut slots = Slots { rows: Vec::new(), offsets: vec![0], weights: Vec::new() };
        let mut by_expert = vec![Vec::new(); experts];
        for (row, taken) in taken.iter().enumerate() {
            taken.iter().for_each(|(expert, weight)| by_expert[*expert].push((row as u32, *weight)));
        }
        for of_expert in by_expert {
            for (row, weight) in of_expert {
                slots.rows.push(row);
                slots.weights.push(weight);
            }
            slots.offsets.push(slots.rows.len() as u32);
        }
        slots
    }

    /// Stores them in host memory.
    pub(super) fn keep<M>(&self, memory: &mut Memory<M>) -> Routes {
        Routes { rows: memory.add_indices(&self.rows), offsets: memory.add_indices(&self.offsets) }
    }
}

/// Each expert's number with its range of slots.
fn runs(offsets: &[u32], slots: usize) -> Result<impl Iterator<Item = (usize, std::ops::Range<usize>)>> {
    let fits = offsets.first() == Some(&0)
        && offsets.is_sorted()
        && offsets.last().is_some_and(|end| *end as usize == slots);
    rule!("experts", fits, "offsets {offsets:?} of {slots} slots");
    Ok(offsets.windows(2).map(|pair| pair[0] as usize..pair[1] as usize).enumerate())
}

/// The weights of each expert. The views of `w` hold the experts' outputs one after the other; each expert has
/// `outputs` rows, given with their columns among these outputs.
pub(super) fn of_experts(
    w: &[View],
    experts: usize,
    outputs: usize,
) -> Result<Vec<Vec<(Range<usize>, View)>>> {
    let rows = w.iter().fold(0usize, |rows, w| rows.saturating_add(w.rows()));
    rule!(
        "experts",
        experts.checked_mul(outputs) == Some(rows),
        "weights of {rows} rows for {experts} of {outputs}"
    );
    let mut all = vec![Vec::new(); experts];
    let mut at = 0;
    for view in w {
        let mut start = 0;
        while start < view.rows() {
            // Up to the end of the view or of the expert, whichever comes first.
            let (expert, column) = (at / outputs, at % outputs);
            let rows = (view.rows() - start).min(outputs - column);
            all[expert].push((column..column + rows, view.row_range(start..start + rows)));
            (start, at) = (start + rows, at + rows);
        }
    }
    Ok(all)
}

/// `y[slots, outputs] = x[slots, inputs] · w[expert]ᵀ`.
pub(super) fn linear(b: &mut impl Backend, offsets: &[u32], y: View, x: View, w: &[View]) -> Result<()> {
    let weights = of_experts(w, offsets.len().saturating_sub(1), y.width())?;
    for (expert, slots) in runs(offsets, x.rows())?.filter(|(_, slots)| !slots.is_empty()) {
        for (outputs, w) in &weights[expert] {
            let y = y.row_range(slots.clone()).columns(outputs.clone());
            b.linear(y, false, x.row_range(slots.clone()), *w, None)?;
        }
    }
    Ok(())
}

/// `dx[slots, inputs] = dy[slots, outputs] · w[expert]`.
pub(super) fn linear_dx(b: &mut impl Backend, offsets: &[u32], dx: View, dy: View, w: &[View]) -> Result<()> {
    let weights = of_experts(w, offsets.len().saturating_sub(1), dy.width())?;
    for (expert, slots) in runs(offsets, dy.rows())?.filter(|(_, slots)| !slots.is_empty()) {
        for (n, (outputs, w)) in weights[expert].iter().enumerate() {
            let dy = dy.row_range(slots.clone()).columns(outputs.clone());
            b.linear_dx(dx.row_range(slots.clone()), n > 0, dy, *w)?;
        }
    }
    Ok(())
}

/// The gradient of rows `first..first + dw.rows()` of the weights of all experts.
pub(super) fn linear_dw(
    b: &mut impl Backend,
    offsets: &[u32],
    dw: View,
    first: usize,
    accumulate: bool,
    dy: View,
    x: View,
) -> Result<()> {
    let outputs = dy.width();
    for (expert, slots) in runs(offsets, dy.rows())? {
        let own = expert * outputs..(expert + 1) * outputs;
        let (start, end) = (own.start.max(first), own.end.min(first + dw.rows()));
        if start >= end {
            continue;
        }
        let dw = dw.row_range(start - first..end - first);
        if slots.is_empty() {
            if !accumulate {
                b.fill(dw, 0.0)?;
            }
            continue;
        }
        let dy = dy.row_range(slots.clone()).columns(start - own.start..end - own.start);
        b.linear_dw(dw, accumulate, dy, x.row_range(slots))?;
    }
    Ok(())
}

/// The experts of each row, each with its slot.
pub(super) fn taken(rows: &[u32], offsets: &[u32], count: usize) -> Result<Vec<Vec<(usize, usize)>>> {
    let mut taken = vec![Vec::new(); count];
    for (expert, slots) in runs(offsets, rows.len())? {
        for slot in slots {
            rule!("experts", (rows[slot] as usize) < count, "row {} of {count}", rows[slot]);
            taken[rows[slot] as usize].push((expert, slot));
        }
    }
    Ok(taken)
}
