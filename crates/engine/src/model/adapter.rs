//! Low-rank adapters beside linear layers (Hu et al. 2021): their passes, and their weights in and out.
//!
//! A part's output gets `t · Bᵀ` with `t = scale · (x · Aᵀ)`. Backward: `dB = dyᵀ · t`, and, with
//! `dt = scale · (dy · B)`, `dA = dtᵀ · x` and `dx += dt · A`. Both `t` and `dt` are as narrow as the rank, so
//! they are computed again where they are needed.

use super::Model;
use crate::kernels::{Backend, View};
use crate::params::{Adapter, Linear, Parameter};
use crate::weights::{self, Lazy};
use crate::{Error, Result, init};
use std::path::Path;
use std::sync::Arc;

impl<B: Backend> Model<B> {
    /// `y += scale · (x · Aᵀ) · Bᵀ`, in the columns of each part that has an adapter.
    pub(super) fn adapters_forward(&mut self, at: &Linear, y: View, x: View) -> Result<()> {
        for part in &at.parts {
            let Some(adapter) = &part.adapter else { continue };
            let t = self.adapter_rows(adapter, x)?;
            self.backend.linear(
                y.columns(part.outputs.clone()),
                true,
                t,
                self.slot_view(&adapter.b),
                None,
            )?;
        }
        Ok(())
    }

    /// The gradients of `A` and `B`.
    pub(super) fn adapters_dw(&mut self, at: &Linear, dy: View, x: View) -> Result<()> {
        for part in &at.parts {
            let Some(adapter) = &part.adapter else { continue };
            let dy = dy.columns(part.outputs.clone());
            if let Some((db, accumulate)) = self.gradient_of(&[&adapter.b]) {
                let t = self.adapter_rows(adapter, x)?;
                let [rows, rank] = adapter.b.shape;
                self.backend.linear_dw(db.matrix(rows, rank), accumulate, dy, t)?;
            }
            if let Some((da, accumulate)) = self.gradient_of(&[&adapter.a]) {
                let dt = self.adapter_gradient(adapter, dy)?;
                let [rank, inputs] = adapter.a.shape;
                self.backend.linear_dw(da.matrix(rank, inputs), accumulate, dt, x)?;
            }
        }
        Ok(())
    }

    /// `dx += scale · (dy · B) · A`.
    pub(super) fn adapters_dx(&mut self, at: &Linear, dx: View, dy: View) -> Result<()> {
        for part in &at.parts {
            let Some(adapter) = &part.adapter else { continue };
            let dt = self.adapter_gradient(adapter, dy.columns(part.outputs.clone()))?;
            self.backend.linear_dx(dx, true, dt, self.slot_view(&adapter.a))?;
        }
        Ok(())
    }

    /// `t = scale · (x · Aᵀ)`.
    fn adapter_rows(&mut self, adapter: &Adapter, x: View) -> Result<View> {
        let [t, _] = self.arena.low(x.rows());
        self.backend.linear(t, false, x, self.slot_view(&adapter.a), None)?;
        self.backend.scale(t, adapter.scale)?;
        Ok(t)
    }

    /// `dt = scale · (dy · B)`.
    fn adapter_gradient(&mut self, adapter: &Adapter, dy: View) -> Result<View> {
        let [_, dt] = self.arena.low(dy.rows());
        self.backend.linear_dx(dt, false, dy, self.slot_view(&adapter.b))?;
        self.backend.scale(dt, adapter.scale)?;
        Ok(dt)
    }

    /// Starts the adapter as PEFT does: `A` uniform, `B` zero, so that the model computes what its base does.
    ///
    /// # Errors
    /// [`Error::Parameter`] when the model has no adapter.
    pub fn init_adapter(&mut self, seed: u64) -> Result<()> {
        self.need_adapter()?;
        let map = Arc::clone(&self.map);
        for (i, p) in map.parameters.iter().enumerate().filter(|(_, p)| p.kind.is_adapter()) {
            let values = init::values(&self.arch, p, i, seed);
            self.backend.write(self.parameter_view(&p.range), &values)?;
        }
        Ok(())
    }

    /// Writes the adapter's weights under PEFT's names (`adapter_model.safetensors`).
    ///
    /// # Errors
    /// [`Error::Io`] with the file; [`Error::Parameter`] when the model has no adapter.
    pub fn save_adapter(&self, path: &Path) -> Result<()> {
        self.need_adapter()?;
        let of_adapter = |p: &&Parameter| p.kind.is_adapter();
        let tensors: Vec<Lazy> =
            self.map.parameters.iter().filter(of_adapter).map(|p| self.lazy(p)).collect();
        weights::write(path, &tensors.iter().collect::<Vec<_>>())
    }

    /// Reads the adapter's weights.
    ///
    /// # Errors
    /// [`Error::Weights`] when the file is damaged or belongs to another adapter; [`Error::Parameter`] when
    /// the model has none.
    pub fn load_adapter(&mut self, path: &Path) -> Result<()> {
        self.need_adapter()?;
        let (mut fitting, mut others) = (0, 0);
        let map = Arc::clone(&self.map);
        let parameters = self.parameters.view();
        weights::read(path, |name, shape, values| {
            let found = map.find(name).filter(|p| p.kind.is_adapter() && p.shape == shape);
            let Some(p) = found else {
                others += 1;
                return Ok(());
            };
            fitting += 1;
            let values = weights::from_file(p, &values);
            self.backend.write(parameters.part(p.range.start, p.range.len()), &values)
        })?;
        let wanted = map.parameters.iter().filter(|p| p.kind.is_adapter()).count();
        if fitting == wanted && others == 0 {
            return Ok(());
        }
        Err(Error::Weights {
            path: path.to_path_buf(),
            message: format!(
                "{fitting} of {wanted} adapter tensors fit this model, {others} belong to another"
            ),
            help: "load it with the model, the rank and the target modules that it was made with".into(),
        })
    }

    /// Adds the adapter to the weights of its layers and sets its `B` to zero: the model computes the same,
    /// and its own weights hold what was learned.
    ///
    /// # Errors
    /// [`Error::Parameter`] when the model has no adapter.
    pub fn merge_adapter(&mut self) -> Result<()> {
        self.need_adapter()?;
        let map = Arc::clone(&self.map);
        for part in map.blocks.iter().flat_map(|block| block.linears()).flat_map(|linear| &linear.parts) {
            let Some(adapter) = &part.adapter else { continue };
            let b = self.slot_view(&adapter.b);
            self.backend.scale(b, adapter.scale)?;
            self.backend.linear_dx(self.slot_view(&part.weight), true, b, self.slot_view(&adapter.a))?;
            self.backend.fill(b, 0.0)?;
        }
        Ok(())
    }

    fn need_adapter(&self) -> Result<()> {
        match self.map.rank() {
            0 => Err(Error::Parameter { message: "the model was made without an adapter".into() }),
            _ => Ok(()),
        }
    }
}
