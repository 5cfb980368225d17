//! An exponential moving average of the trained parameters (Polyak & Juditsky 1992).

use super::{Model, part};
use crate::Result;
use crate::dtype::WeightType;
use crate::kernels::{Backend, Buffer};
use crate::weights::{self, Lazy};
use std::path::Path;
use std::sync::Arc;

impl<B: Backend> Model<B> {
    /// Adds the current weights to the average: `average = decay · average + (1 − decay) · weights`. The first call
    /// copies the weights, as PyTorch's `AveragedModel` does.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] if there is not enough memory; [`crate::Error::Batch`] when the model does not train.
    pub fn update_average(&mut self, decay: f64) -> Result<()> {
        let share = match self.average {
            Some(_) => 1.0 - decay,
            None => 1.0,
        };
        let map = Arc::clone(&self.map);
        let average = self.need_average()?;
        for (p, range) in map.trained() {
            let (average, weights) = (part(average, &range), part(self.parameters.view(), &p.range));
            match share {
                1.0 => self.backend.copy(average, weights)?,
                share => self.backend.blend(average, weights, share as f32)?,
            }
        }
        Ok(())
    }

    /// Exchanges the weights and their average; does nothing without an average.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn exchange_average(&mut self) -> Result<()> {
        let map = Arc::clone(&self.map);
        let Some(average) = self.average.as_ref().map(Buffer::view) else { return Ok(()) };
        for (p, range) in map.trained() {
            self.backend.swap(part(self.parameters.view(), &p.range), part(average, &range))?;
        }
        self.weights_changed();
        Ok(())
    }

    /// True if there is an average.
    pub fn has_average(&self) -> bool {
        self.average.is_some()
    }

    /// Writes the average without rounding.
    ///
    /// # Errors
    /// [`crate::Error::Io`] with the file.
    pub fn save_average(&self, path: &Path) -> Result<()> {
        let Some(average) = self.average.as_ref().map(Buffer::view) else { return Ok(()) };
        let tensors: Vec<Lazy> = self
            .map
            .trained()
            .map(|(p, range)| Lazy {
                name: p.name.clone(),
                shape: p.shape.clone(),
                kind: WeightType::F32,
                read: Box::new(move || Ok(self.tensor(average, p, &range)?.data)),
            })
            .collect();
        weights::write(path, &tensors.iter().collect::<Vec<_>>())
    }

    /// Reads an average back.
    ///
    /// # Errors
    /// [`crate::Error::Weights`] when the file is damaged, or belongs to another model or another choice of trained parameters.
    pub fn load_average(&mut self, path: &Path) -> Result<()> {
        let map = Arc::clone(&self.map);
        let average = self.need_average()?;
        let (mut fitting, mut others) = (0, 0);
        let backend = &mut self.backend;
        weights::read(path, |name, shape, values| {
            let found = map.trained().find(|(p, _)| p.name == name && p.shape == shape);
            let Some((p, range)) = found else {
                others += 1;
                return Ok(());
            };
            fitting += 1;
            backend.write(part(average, &range), &weights::from_file(p, &values))
        })?;
        let what = "averages fit this model and the parameters that it trains";
        weights::check_fit(path, what, fitting, map.trained().count(), others)
    }

    /// The average's memory, allocated on first use.
    fn need_average(&mut self) -> Result<crate::kernels::View> {
        self.trained()?;
        if let Some(average) = &self.average {
            return Ok(average.view());
        }
        let average = self.backend.allocate(self.map.trained_len())?;
        let view = average.view();
        self.average = Some(average);
        self.plan.optimizer = self.plan.optimizer.saturating_add(4 * view.len() as u64);
        Ok(view)
    }
}
