//! The load-balancing loss of experts (Fedus et al. 2021, equations 4 to 6) as `load_balancing_loss_func` of
//! transformers computes it: over all layers that have experts together, and over all tokens, whether or not they are
//! targets.
//!
//! With `R` the rows of all these layers, `c_e` how often expert `e` was chosen and `p_e` the sum of its probabilities,
//! the loss is `experts · Σ_e (c_e / R) · (p_e / R)`. The choice of experts is a constant in the backward pass, so the
//! gradient of a probability is `experts · c_e / R²`. A prompt shared by several sequences counts once for each of
//! them.

use super::Model;
use crate::Result;
use crate::batch::Batch;
use crate::kernels::{Backend, Buffer, View};

/// State of the loss during a pass, on the device.
#[derive(Debug)]
pub(super) struct Balance {
    /// How often each expert was chosen, and the sums of the probabilities: `[2, experts]`.
    sums: Buffer,
    experts: usize,
    /// Rows of all layers.
    rows: f64,
    /// True once a layer has been added.
    begun: bool,
}

impl Balance {
    fn views(&self) -> [View; 2] {
        [0, 1].map(|n| self.sums.view().part(n * self.experts, self.experts).matrix(self.experts, 1))
    }
}

impl<B: Backend> Model<B> {
    /// Begins the loss of a pass, if the pass has one.
    pub(super) fn balance_begin(&mut self, batch: &Batch) -> Result<()> {
        self.balance = None;
        let (Some(_), Some(experts), Some(scratch)) = (self.pass, self.arch.experts(), self.arena.balance)
        else {
            return Ok(());
        };
        let (counts, layers) =
            (batch.sequences(), self.arch.blocks.iter().filter(|block| block.mlp.experts.is_some()));
        let rows = counts.iter().map(|count| f64::from(*count)).sum::<f64>() * layers.count() as f64;
        self.backend.write(scratch.rows.part(0, counts.len()), &counts)?;
        self.backend.fill(scratch.slots[1], 1.0)?;
        let sums = self.backend.allocate(2 * experts)?;
        self.balance = Some(Balance { sums, experts, rows, begun: false });
        Ok(())
    }

    /// Adds the choices of layer `n` for `tokens` rows.
    pub(super) fn balance_add(&mut self, n: usize, tokens: usize) -> Result<()> {
        let (Some(scratch), Some(routes)) = (self.arena.balance, &self.routes[n]) else { return Ok(()) };
        let (Some(balance), Some([probabilities, _])) =
            (&mut self.balance, self.arena.saved(n, tokens, tokens).route)
        else {
            return Ok(());
        };
        let (slots, offsets, rows) = (routes.rows(), routes.offsets(), scratch.rows.matrix(tokens, 1));
        let [of_slots, ones] = scratch.slots.map(|view| view.matrix(slots.len(), 1));
        let ([taken, sums], begun) = (balance.views(), std::mem::replace(&mut balance.begun, true));
        self.backend.gather(of_slots, rows, slots)?;
        self.backend.grouped_linear_dw(taken, 0, begun, of_slots, ones, offsets)?;
        self.backend.linear_dw(sums, begun, probabilities, rows)
    }

    /// Computes the gradient of the probabilities, which all layers share.
    pub(super) fn balance_factors(&mut self) -> Result<()> {
        let (Some(balance), Some(scratch), Some(pass)) = (&self.balance, self.arena.balance, self.pass)
        else {
            return Ok(());
        };
        let factor =
            f64::from(self.arch.balance * pass.balance) * balance.experts as f64 / balance.rows.powi(2);
        let factors = scratch.factors.matrix(balance.experts, 1);
        self.backend.copy(factors, balance.views()[0])?;
        self.backend.scale(factors, factor as f32)
    }

    /// Adds the loss's gradient to that of the logits of a layer's experts.
    pub(super) fn balance_backward(&mut self, d_logits: View, probabilities: View) -> Result<()> {
        let (Some(_), Some(scratch)) = (&self.balance, self.arena.balance) else { return Ok(()) };
        let (tokens, experts) = (d_logits.rows(), d_logits.width());
        let [terms, rest] = scratch.terms.map(|view| view.matrix(tokens, experts));
        let (sums, factors) = (scratch.sums.matrix(tokens, 1), scratch.factors.matrix(1, experts));
        // Backward of the softmax: p · (g − Σ p·g).
        self.backend.linear(sums, false, probabilities, factors, None)?;
        self.backend.copy(rest, probabilities)?;
        self.backend.scale_rows(rest, sums)?;
        self.backend.scale(rest, -1.0)?;
        self.backend.scale_columns(terms, false, probabilities, factors, None)?;
        self.backend.add(terms, rest)?;
        self.backend.scale_rows(terms, scratch.rows.matrix(tokens, 1))?;
        self.backend.add(d_logits, terms)
    }

    /// The load-balancing loss of a pass, without its factor; `None` if it had none.
    ///
    /// # Errors
    /// [`crate::Error::Operands`] for losses of another model.
    pub fn read_balance(&self, losses: &super::Losses) -> Result<Option<f64>> {
        let Some(balance) = &losses.balance else { return Ok(None) };
        let mut values = vec![0.0; 2 * balance.experts];
        self.backend.read(balance.sums.view(), &mut values)?;
        let (taken, sums) = values.split_at(balance.experts);
        let sum: f64 = taken.iter().zip(sums).map(|(taken, sum)| f64::from(*taken) * f64::from(*sum)).sum();
        Ok(Some(balance.experts as f64 * sum / balance.rows.powi(2)))
    }
}
