//! The device that a configuration names, opened.

use crate::config::{Config, DeviceName, MatmulPrecision};
use crate::failure::Failure;
use crate::ranks::Team;
use crate::ui::Ui;
use std::sync::OnceLock;
use suasion_engine::kernels::cuda::found::{Card, Found};
use suasion_engine::kernels::cuda::nccl;
use suasion_engine::{Cuda, Device, Precision};
use suasion_train::ranks::cards::{self, Seat};

/// Where models run, and how exactly.
#[derive(Clone, Copy, Debug)]
pub struct Chosen {
    name: DeviceName,
    precision: Precision,
    /// It is one of several, which exchange gradients.
    of_ranks: bool,
    /// A card runs passes as CUDA graphs.
    pub graphs: bool,
}

impl Default for Chosen {
    fn default() -> Chosen {
        Chosen { name: DeviceName::default(), precision: Precision::default(), of_ranks: false, graphs: true }
    }
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
        Chosen { name, precision, of_ranks: false, graphs: self.cuda_graphs }
    }

    /// The same for a rank of a run: of cards, the one of its number on its machine.
    ///
    /// # Errors
    /// If a card is named for all ranks, there are not enough, or NCCL is missing.
    pub fn device_of(&self, team: &Team, ui: &Ui) -> anyhow::Result<Chosen> {
        let chosen = self.device();
        let chosen = Chosen { of_ranks: team.ranks > 1, ..chosen };
        if !chosen.of_ranks {
            return Ok(chosen);
        }
        if let DeviceName::Cuda(Some(number)) = chosen.name {
            let message = format!("device=cuda:{number} is one card, and {} ranks need one each", team.ranks);
            let help = "set device=cuda: each rank takes the card of its number on its machine (LOCAL_RANK), of those that \
                        CUDA_VISIBLE_DEVICES shows";
            return Err(Failure::config(message, help).into());
        }
        // Without a card, `card` returns the reason.
        if chosen.name == DeviceName::Cpu || found().card(None).is_err() {
            return Ok(chosen);
        }
        if let Err(problem) = nccl::version() {
            if chosen.name == DeviceName::Auto {
                note_cpu(ui, &problem.message);
                return Ok(Chosen { name: DeviceName::Cpu, ..chosen });
            }
            return Err(suasion_engine::Error::from(problem).into());
        }
        let (local, cards) = (Some(team.local), found().cards.len());
        let number = cards::card_of(team.local_rank, local, team.may_have_card, cards)?;
        Ok(Chosen { name: DeviceName::Cuda(Some(number)), ..chosen })
    }
}

/// The cards of this machine; looked up once per process, when a card is requested.
pub fn found() -> &'static Found {
    static FOUND: OnceLock<Found> = OnceLock::new();
    FOUND.get_or_init(Found::look)
}

/// Says once why `auto` is the CPU.
fn note_cpu(ui: &Ui, why: &dyn std::fmt::Display) {
    static SAID: OnceLock<()> = OnceLock::new();
    SAID.get_or_init(|| ui.log(format_args!("note: device=auto is the CPU: {why}")));
}

impl Chosen {
    /// How exactly a card multiplies.
    pub fn precision(self) -> Precision {
        self.precision
    }

    /// The card to use; `None` for the CPU, with a note where there is no card for `auto`.
    ///
    /// # Errors
    /// If a card is named that cannot be used.
    pub fn card(self, ui: &Ui) -> suasion_engine::Result<Option<&'static Card>> {
        let number = match self.name {
            DeviceName::Cpu => return Ok(None),
            DeviceName::Auto => None,
            DeviceName::Cuda(number) => number,
        };
        match (found().card(number), self.name) {
            (Ok(card), _) => Ok(Some(card)),
            (Err(error), DeviceName::Auto) => {
                note_cpu(ui, &error);
                Ok(None)
            }
            (Err(error), _) => Err(error),
        }
    }

    /// Bytes of the card beside what a model takes: what connects it with those of other ranks.
    pub fn overhead(self) -> u64 {
        if self.of_ranks { nccl::OVERHEAD } else { 0 }
    }

    /// Checks that all ranks compute in the same way, each on its own card.
    ///
    /// # Errors
    /// If they do not, on all ranks; where a card is named that cannot be used.
    pub fn agree(self, team: &Team, ui: &Ui) -> anyhow::Result<()> {
        let card = self.card(ui)?;
        let seat = Seat {
            card: card.map(|card| format!("cuda:{}, {}", card.number, card.name)),
            uuid: card.map(|card| card.uuid),
            precision: format!("{:?}", self.precision).to_lowercase(),
        };
        Ok(cards::agree(&seat, team.collective())?)
    }

    /// Opens it.
    ///
    /// # Errors
    /// As [`Chosen::card`], and where the card does not open.
    pub fn open(self, ui: &Ui) -> suasion_engine::Result<Device> {
        Ok(match self.card(ui)? {
            None => Device::cpu(),
            Some(card) => Cuda::open(card, self.precision)?.with_graphs(self.graphs).into(),
        })
    }
}
