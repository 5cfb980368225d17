//! The NVIDIA components of this machine: driver, cuBLASLt, cards. Nothing here fails if something is missing: the
//! problem is recorded, with its remedy.

use super::images;
use crate::Error;
use cudarc::cublaslt::result::CublasError;
use cudarc::driver::{result as cu, sys};

/// Why there is no usable card, and the remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What is missing.
    pub message: String,
    /// What to do.
    pub help: String,
}

impl Problem {
    pub(super) fn new(message: impl Into<String>, help: impl Into<String>) -> Problem {
        Problem { message: message.into(), help: help.into() }
    }
}

impl From<Problem> for Error {
    fn from(Problem { message, help }: Problem) -> Error {
        Error::Device { message, help }
    }
}

/// A card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// Its number, as in `cuda:N`.
    pub number: usize,
    /// Its name.
    pub name: String,
    /// Its compute capability.
    pub compute: (u32, u32),
    /// Bytes of its memory.
    pub memory: u64,
    /// The identifier that no other card has, on any machine.
    pub uuid: [u8; 16],
    /// Why it cannot be used, if so.
    pub problem: Option<Problem>,
}

impl Card {
    /// Bytes of its memory that no process uses. Opens the card briefly.
    ///
    /// # Errors
    /// [`Error::Device`] if another process has exclusive use of the card, or the driver fails.
    pub fn free_memory(&self) -> crate::Result<u64> {
        let ordinal = i32::try_from(self.number).unwrap_or(i32::MAX);
        let free = (|| {
            let device = cu::device::get(ordinal)?;
            // SAFETY: the device was returned by the driver; its context is released again.
            unsafe {
                let context = cu::primary_ctx::retain(device)?;
                let free = cu::ctx::set_current(context).and_then(|()| cu::mem_get_info());
                cu::primary_ctx::release(device)?;
                free
            }
        })();
        free.map(|(free, _)| free as u64).map_err(|e| unavailable(&self.name, e))
    }
}

/// The components that were found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The newest CUDA version that the driver supports.
    pub driver: Option<(u32, u32)>,
    /// True if cuBLASLt was found.
    pub cublas: bool,
    /// The cards.
    pub cards: Vec<Card>,
    /// Why no card at all can be used, if so.
    pub problem: Option<Problem>,
}

impl Found {
    /// Searches this machine.
    pub fn look() -> Found {
        let mut found = Found::default();
        found.problem = found.fill().err();
        found
    }

    /// The card with a number, or the first usable one.
    ///
    /// # Errors
    /// [`Error::Device`] if there is none.
    pub fn card(&self, number: Option<usize>) -> crate::Result<&Card> {
        if let Some(problem) = &self.problem {
            return Err(problem.clone().into());
        }
        let Some(number) = number else {
            let usable = self.cards.iter().find(|card| card.problem.is_none());
            let refused = || self.cards.iter().find_map(|card| card.problem.clone()).unwrap_or_else(no_card);
            return usable.ok_or_else(|| refused().into());
        };
        let card = self.cards.get(number).ok_or_else(|| {
            let names: Vec<String> =
                self.cards.iter().map(|card| format!("cuda:{} is {}", card.number, card.name)).collect();
            Problem::new(format!("there is no card cuda:{number}"), names.join(", "))
        })?;
        match &card.problem {
            Some(problem) => Err(problem.clone().into()),
            None => Ok(card),
        }
    }

    fn fill(&mut self) -> Result<(), Problem> {
        if !can_load() {
            return Err(Problem::new(
                "this is the static binary, which cannot load NVIDIA's libraries",
                "take the binary for x86_64-unknown-linux-gnu, or build it: cargo install --path crates/cli",
            ));
        }
        // SAFETY: loading the library runs its initialisers, as in any program that uses the card.
        if !unsafe { sys::is_culib_present() } {
            return Err(Problem::new(
                "there is no NVIDIA driver: libcuda was not found",
                "install NVIDIA's driver; in a container, start it with the card (docker run --gpus all)",
            ));
        }
        cu::init().map_err(not_started)?;
        let mut version = 0;
        // SAFETY: writes one number.
        if unsafe { sys::cuDriverGetVersion(&mut version) }.result().is_ok() {
            let version = u32::try_from(version).unwrap_or(0);
            self.driver = Some((version / 1000, version % 1000 / 10));
        }
        // SAFETY: as above.
        self.cublas = unsafe { cudarc::cublaslt::sys::is_culib_present() };
        let count = cu::device::get_count().map_err(not_started)?;
        self.cards = (0..count).filter_map(|number| look_at(number).ok()).collect();
        if self.cards.is_empty() {
            return Err(no_card());
        }
        let (major, minor) = self.driver.unwrap_or_default();
        let (least_major, least_minor) = images::DRIVER;
        if (major, minor) < images::DRIVER {
            return Err(Problem::new(
                format!(
                    "the NVIDIA driver is too old: it supports CUDA {major}.{minor}, and the kernels need \
                     {least_major}.{least_minor}"
                ),
                "install a newer driver",
            ));
        }
        if !self.cublas {
            return Err(Problem::new(
                "cuBLASLt is missing: libcublasLt was not found",
                format!(
                    "install it with CUDA {major}, or by `pip install nvidia-cublas{}` with the folder of its \
                     libcublasLt in LD_LIBRARY_PATH",
                    if major < 13 { format!("-cu{major}") } else { String::new() }
                ),
            ));
        }
        Ok(())
    }
}

/// False in a static binary, whose C library cannot load others.
pub(super) fn can_load() -> bool {
    !cfg!(all(target_os = "linux", target_feature = "crt-static"))
}

fn no_card() -> Problem {
    Problem::new(
        "the NVIDIA driver finds no card",
        "`nvidia-smi -L` lists the cards; CUDA_VISIBLE_DEVICES may hide them, and a container needs --gpus all",
    )
}

fn not_started(error: cu::DriverError) -> Problem {
    use sys::CUresult as Code;
    match error.0 {
        Code::CUDA_ERROR_NO_DEVICE => no_card(),
        Code::CUDA_ERROR_STUB_LIBRARY => Problem::new(
            "the libcuda that was found is the CUDA toolkit's stub, not a driver",
            "take the toolkit's `stubs` folder out of LD_LIBRARY_PATH",
        ),
        Code::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => Problem::new(
            "the NVIDIA driver's library and its kernel module have different versions",
            "restart the machine after an update of the driver; in a container, use the host's driver",
        ),
        code => Problem::new(
            format!("the NVIDIA driver does not start ({code:?})"),
            "see whether `nvidia-smi` works; `nvidia-modprobe -u` loads the kernel module",
        ),
    }
}

fn look_at(number: i32) -> Result<Card, cu::DriverError> {
    use sys::CUdevice_attribute as Attribute;
    let device = cu::device::get(number)?;
    let name = cu::device::get_name(device)?;
    // SAFETY: the device was returned by the driver.
    let attribute = |attribute| unsafe { cu::device::get_attribute(device, attribute) };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let pools = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)?;
    // SAFETY: as above.
    let memory = unsafe { cu::device::total_mem(device)? } as u64;
    let uuid = cu::device::get_uuid(device)?.bytes.map(|byte| byte as u8);
    let compute = (major.unsigned_abs(), minor.unsigned_abs());
    Ok(Card {
        number: number.unsigned_abs() as usize,
        problem: unfit(&name, compute, pools != 0),
        name,
        compute,
        memory,
        uuid,
    })
}

/// Why a card cannot be used, if so.
fn unfit(name: &str, (major, minor): (u32, u32), pools: bool) -> Option<Problem> {
    if images::of((major, minor)).is_none() {
        return Some(Problem::new(
            format!(
                "{name} has compute capability {major}.{minor}, and the kernels need 8.0 (Ampere) or later"
            ),
            "use a later card, or device=cpu",
        ));
    }
    (!pools).then(|| {
        Problem::new(
            format!("{name} does not have memory pools, which the engine allocates from"),
            "virtual cards (vGPU) need unified memory enabled by the host; or use device=cpu",
        )
    })
}

/// The error for a card that does not open.
pub(super) fn unavailable(name: &str, error: cu::DriverError) -> Error {
    use sys::CUresult as Code;
    let problem = match error.0 {
        Code::CUDA_ERROR_DEVICE_UNAVAILABLE => Problem::new(
            format!("{name} is not available: another process has it for itself"),
            "`nvidia-smi` lists the processes; end that one, take another card (device=cuda:1), or let processes share \
             the card (nvidia-smi -c DEFAULT)",
        ),
        Code::CUDA_ERROR_OUT_OF_MEMORY => Problem::new(
            format!("{name} has no memory left: other processes use it"),
            "`nvidia-smi` lists the processes; end them, or take another card (device=cuda:1)",
        ),
        code => Problem::new(
            format!("{name} does not open ({code:?})"),
            "see whether `nvidia-smi` lists it without errors",
        ),
    };
    problem.into()
}

/// The error for kernels that the driver does not load.
pub(super) fn old_image(name: &str, error: cu::DriverError) -> Error {
    let message = format!("the NVIDIA driver does not load the kernels for {name} ({:?})", error.0);
    Problem::new(message, "install a newer driver; `suasion env` shows the version of this one").into()
}

/// The error for a cuBLASLt that does not start.
pub(super) fn cublas(name: &str, error: CublasError) -> Error {
    let message = format!("cuBLASLt does not start on {name} ({:?})", error.0);
    let help =
        "install the cuBLAS of the CUDA version that `suasion env` shows for the driver, or a newer driver";
    Problem::new(message, help).into()
}

/// The error for a failed call of the driver.
pub(super) fn failure(call: &str, error: cu::DriverError) -> Error {
    let text = error.error_string().map_or_else(|_| "unknown".into(), |text| text.to_string_lossy());
    Error::Device {
        message: format!("the NVIDIA driver's {call} failed: {text} ({:?})", error.0),
        help: "an earlier operation may be the cause; `nvidia-smi` and the system's log (`dmesg`) say whether the card \
               is well, and device=cpu trains without it"
            .into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_says_so() {
        // On a machine with a card this test has nothing to check.
        let found = Found::look();
        if found.driver.is_none() {
            let problem = found.problem.clone().unwrap();
            assert!(
                problem.message.contains("NVIDIA driver") || problem.message.contains("static"),
                "{problem:?}"
            );
            assert!(!problem.help.is_empty() && found.cards.is_empty());
            for number in [None, Some(0)] {
                let error = found.card(number).unwrap_err();
                assert_eq!((error.tag(), error.to_string()), ("E-DEVICE", problem.message.clone()));
                assert_eq!(error.help(), Some(problem.help.as_str()));
            }
        }
    }

    #[test]
    fn cards_are_chosen_and_refused_by_name() {
        let card = |number: usize, compute, pools| {
            let name = format!("card {number}");
            let problem = unfit(&name, compute, pools);
            Card { number, name, compute, memory: 1 << 34, uuid: [number as u8; 16], problem }
        };
        let cards = vec![card(0, (7, 5), true), card(1, (9, 0), true), card(2, (8, 6), false)];
        let found = Found { driver: Some(images::DRIVER), cublas: true, cards, problem: None };
        assert_eq!(found.card(None).unwrap().number, 1);
        assert_eq!(found.card(Some(1)).unwrap().number, 1);
        for (number, message) in [
            (0, "card 0 has compute capability 7.5, and the kernels need 8.0 (Ampere) or later"),
            (2, "card 2 does not have memory pools, which the engine allocates from"),
            (3, "there is no card cuda:3"),
        ] {
            let error = found.card(Some(number)).unwrap_err();
            assert_eq!(error.to_string(), message);
            assert!(error.help().is_some_and(|help| !help.is_empty()));
        }
    }

    #[test]
    fn what_a_driver_says_becomes_a_remedy() {
        use sys::CUresult as Code;
        for (code, word) in [
            (Code::CUDA_ERROR_NO_DEVICE, "finds no card"),
            (Code::CUDA_ERROR_STUB_LIBRARY, "stub"),
            (Code::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "different versions"),
            (Code::CUDA_ERROR_UNKNOWN, "does not start (CUDA_ERROR_UNKNOWN)"),
        ] {
            let problem = not_started(cu::DriverError(code));
            assert!(problem.message.contains(word) && !problem.help.is_empty(), "{problem:?}");
        }
        let taken = unavailable("card", cu::DriverError(Code::CUDA_ERROR_DEVICE_UNAVAILABLE));
        assert!(taken.to_string().contains("another process"));
        assert!(taken.help().unwrap().contains("nvidia-smi"));
    }
}
