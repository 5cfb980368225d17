//! What this machine has: instruction sets and memory.

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

/// Total and available memory in bytes; `None` on systems without `/proc/meminfo`.
pub fn memory() -> (Option<u64>, Option<u64>) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
    };
    (field("MemTotal"), field("MemAvailable"))
}
