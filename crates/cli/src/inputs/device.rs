//! The device that a configuration names, opened.

use crate::config::{Config, DeviceName, MatmulPrecision};
use crate::ui::Ui;
use std::sync::OnceLock;
use suasion_engine::kernels::cuda::found::{Card, Found};
use suasion_engine::{Cuda, Device, Precision};

/// Where models run, and how exactly.
#[derive(Clone, Copy, Debug, Default)]
pub struct Chosen {
    name: DeviceName,
    precision: Precision,
}

impl Config {
    /// The device that this configuration names.
    pub fn device(&self) -> Chosen {
        let name = if self.use_cpu { DeviceName::Cpu } else { self.device };
        let precision = match self.matmul_precision {
            MatmulPrecision::Auto | MatmulPrecision::Bf16 => Precision::Bf16,
            MatmulPrecision::Tf32 => Precision::Tf32,
            MatmulPrecision::F32 => Precision::F32,
        };
        Chosen { name, precision }
    }
}

/// What this machine has; looked for once a process, where a card is asked for.
pub fn found() -> &'static Found {
    static FOUND: OnceLock<Found> = OnceLock::new();
    FOUND.get_or_init(Found::look)
}

impl Chosen {
    /// How exactly a card multiplies.
    pub fn precision(self) -> Precision {
        self.precision
    }

    /// The card to use; `None` for the CPU, with a note where there is no card for `auto`.
    ///
    /// # Errors
    /// Where a card is named that cannot be used.
    pub fn card(self, ui: &Ui) -> suasion_engine::Result<Option<&'static Card>> {
        static SAID: OnceLock<()> = OnceLock::new();
        let number = match self.name {
            DeviceName::Cpu => return Ok(None),
            DeviceName::Auto => None,
            DeviceName::Cuda(number) => number,
        };
        match (found().card(number), self.name) {
            (Ok(card), _) => Ok(Some(card)),
            (Err(error), DeviceName::Auto) => {
                SAID.get_or_init(|| ui.log(format_args!("note: device=auto is the CPU: {error}")));
                Ok(None)
            }
            (Err(error), _) => Err(error),
        }
    }

    /// Opens it.
    ///
    /// # Errors
    /// As [`Chosen::card`], and where the card does not open.
    pub fn open(self, ui: &Ui) -> suasion_engine::Result<Device> {
        Ok(match self.card(ui)? {
            None => Device::cpu(),
            Some(card) => Cuda::open(card, self.precision)?.into(),
        })
    }
}
