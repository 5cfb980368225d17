//! The instruction sets, memory and threads of this machine.

use crate::failure::Failure;
use crate::ui::Ui;
use std::num::NonZeroUsize;
use suasion_data::report::format::{bytes, count};

/// The instruction sets that matter to the kernels, as found at run time.
pub fn instruction_sets() -> Vec<&'static str> {
    #[cfg(any(target_arch = "x86_64", target_arch = "x86"))]
    {
        macro_rules! found {
            ($($name:tt),+) => { [$(($name, std::arch::is_x86_feature_detected!($name))),+] };
        }
        let all =
            found!("sse4.2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vnni", "avx512bf16");
        all.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect()
    }
    #[cfg(target_arch = "aarch64")]
    {
        macro_rules! found {
            ($($name:tt),+) => { [$(($name, std::arch::is_aarch64_feature_detected!($name))),+] };
        }
        found!("neon", "fp16", "bf16", "i8mm", "sve")
            .into_iter()
            .filter(|(_, has)| *has)
            .map(|(name, _)| name)
            .collect()
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "x86", target_arch = "aarch64")))]
    {
        Vec::new()
    }
}

/// Total and available memory in bytes; `None` on systems without `/proc/meminfo`. The total is what this process may
/// use of it: a limit of its control group (a container's) or of its address space (`ulimit -v`) may be lower.
pub fn memory() -> (Option<u64>, Option<u64>) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
    };
    let total = field("MemTotal").into_iter().chain(limits()).min();
    (total, field("MemAvailable").map(|available| total.map_or(available, |total| available.min(total))))
}

/// Limits of memory of the control group and of the process, in bytes.
fn limits() -> impl Iterator<Item = u64> {
    let group = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let group = group.into_iter().filter_map(|path| {
        // `max` where there is none.
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    });
    let text = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Max address space").map(str::to_string));
    let space = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    group.chain(space)
}

/// A short description of this machine: system, processor, cores, memory.
pub fn sentence() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("", |(_, name)| name.trim());
    let memory = memory().0.map(bytes).unwrap_or_default();
    let system = format!("{} {}", std::env::consts::OS, std::env::consts::ARCH);
    let parts = [system, model.to_string(), count(cores() as u64, "core"), memory];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", ")
}

/// The number of cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// Starts the pool that all work runs on, with `usual` threads by default, and at most one per core: more
/// are slower, and results are the same for any number.
///
/// # Errors
/// E-MEMORY where the system refuses the threads.
pub fn start_threads(flag: Option<NonZeroUsize>, usual: usize, ui: &Ui) -> Result<(), Failure> {
    let variable = std::env::var("RAYON_NUM_THREADS").ok().filter(|text| !text.trim().is_empty());
    let threads = match threads(flag, variable.as_deref(), usual, cores()) {
        Ok((threads, note)) => {
            note.iter().for_each(|note| ui.log(format_args!("note: {note}")));
            threads
        }
        Err(warning) => {
            ui.warn(warning);
            usual
        }
    };
    // It also fails, without a reason from the system, if the pool already exists.
    let started = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    match started.as_ref().err().and_then(std::error::Error::source) {
        None => Ok(()),
        Some(refused) => Err(Failure::run_time(
            "E-MEMORY",
            format!("{threads} threads do not start: {refused}"),
            "use fewer --threads, or raise the limits of the process (ulimit -v, ulimit -u)",
        )),
    }
}

/// The number of threads, with a note if it differs from the one given; the error is for a value that is not
/// a number.
fn threads(
    flag: Option<NonZeroUsize>,
    variable: Option<&str>,
    usual: usize,
    cores: usize,
) -> Result<(usize, Option<String>), String> {
    let (name, wanted) = match (flag, variable) {
        (Some(wanted), _) => ("--threads", wanted.get()),
        (None, None) => return Ok((usual, None)),
        (None, Some(text)) => match text.trim().parse() {
            // The default, by rayon's rule.
            Ok(0) => return Ok((usual, None)),
            Ok(wanted) => ("RAYON_NUM_THREADS", wanted),
            Err(_) => {
                return Err(format!("RAYON_NUM_THREADS={text} is not a number; using {usual} threads"));
            }
        },
    };
    let note = (wanted > cores)
        .then(|| format!("{name}={wanted}: this machine has {cores} cores, and {cores} threads are used"));
    Ok((wanted.min(cores), note))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_at_most_the_cores() {
        let of = |flag, variable, cores| threads(NonZeroUsize::new(flag), variable, cores, cores);
        assert_eq!(of(0, None, 4), Ok((4, None)));
        assert_eq!(of(3, Some("64"), 4), Ok((3, None)));
        // By default a rank's share of them.
        assert_eq!(threads(None, None, 2, 4), Ok((2, None)));
        assert_eq!(of(0, Some("4"), 4), Ok((4, None)));
        assert_eq!(of(0, Some("0"), 4), Ok((4, None)));
        let (threads, note) = of(1_000_000, None, 2).unwrap();
        assert_eq!(threads, 2);
        assert_eq!(note.unwrap(), "--threads=1000000: this machine has 2 cores, and 2 threads are used");
        assert_eq!(of(0, Some("64"), 2).unwrap().0, 2);
        assert!(of(0, Some("64"), 2).unwrap().1.unwrap().starts_with("RAYON_NUM_THREADS=64: "));
        assert!(of(0, Some("many"), 2).unwrap_err().contains("RAYON_NUM_THREADS=many is not a number"));
    }
}
