//! The kernels of cards as a library for the CPU: `tests/emulation` and `src/kernels/cuda`, compiled by g++.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder of the kernels' sources.
fn kernels() -> PathBuf {
    suasion_test_support::repository().join("crates/engine/src/kernels/cuda")
}

/// Names of the kernels declared in `kernels.h`, and whether their threads wait for each other.
pub fn declared() -> Vec<(String, bool)> {
    let text = std::fs::read_to_string(kernels().join("kernels.h")).unwrap();
    let mut names = Vec::new();
    for line in text.lines() {
        let name_after = |start: &str| line.strip_prefix(start)?.split(['(', ')']).next().map(String::from);
        if let Some(name) = name_after("KERNEL ") {
            names.push((name, false));
        } else if let Some(name) = name_after("BLOCK_KERNEL ") {
            names.push((name, true));
        } else if let Some(suffix) = name_after("ATTENTION(") {
            names.extend(["forward", "dq", "dkv"].map(|kind| (format!("attention_{kind}_{suffix}"), true)));
        }
    }
    names
}

/// The flag that makes a launch fail if two threads race.
pub const RACES: &str = "-fsanitize=thread";

/// Flags of `.ci/sanitize`, in place of [`RACES`].
pub fn sanitizer() -> Option<String> {
    std::env::var("SUASION_EMULATION_FLAGS").ok()
}

/// The library of all kernels, which detects races; compiled once for each state of the sources. Without g++, the
/// running test is recorded as skipped.
pub fn library() -> Option<PathBuf> {
    build(|_| true, &[RACES])
}

/// The library of some of the source files, compiled with additional flags.
pub fn build(wanted: impl Fn(&str) -> bool, flags: &[&str]) -> Option<PathBuf> {
    let sanitizer = sanitizer();
    let own = flags.iter().copied().filter(|flag| sanitizer.is_none() || *flag != RACES);
    let flags: Vec<&str> = own.chain(sanitizer.iter().flat_map(|flags| flags.split_whitespace())).collect();
    if !Command::new("g++").arg("--version").output().is_ok_and(|output| output.status.success()) {
        suasion_test_support::skipped("no g++ for the emulation of cards");
        return None;
    }
    let emulation = suasion_test_support::repository().join("crates/engine/tests/emulation");
    let files = |folder: &Path| {
        let all = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let is_source = |path: &PathBuf| {
            path.extension().is_some_and(|e| ["cu", "cuh", "h", "cpp"].iter().any(|x| e == *x))
        };
        let mut all: Vec<PathBuf> = all.filter(is_source).collect();
        all.sort();
        all
    };
    let mut all = files(&kernels());
    let is_unit = |path: &Path| path.extension().is_some_and(|e| e == "cu");
    all.retain(|path| !is_unit(path) || wanted(path.file_stem().unwrap().to_str().unwrap()));
    all.extend(files(&emulation));
    let texts: Vec<String> = all.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect();
    let units: Vec<&PathBuf> = all.iter().filter(|path| is_unit(path)).collect();
    let sources: String = units.iter().map(|path| format!("#include \"{}\"\n", path.display())).collect();
    let code: String =
        all.iter().zip(&texts).filter(|(path, _)| is_unit(path)).map(|(_, t)| t.as_str()).collect();
    // Attention's kernels are defined by a macro.
    let defined = |name: &str| match name.starts_with("attention_") {
        true => wanted("attention"),
        false => code.contains(&format!(" {name}(")),
    };
    let entry = |(name, waits): (String, bool)| format!("ENTRY({name}, {waits})\n");
    let registry: String = declared().into_iter().filter(|(name, _)| defined(name)).map(entry).collect();
    let mut hasher = DefaultHasher::new();
    (&flags, &texts, &sources).hash(&mut hasher);

    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("emulation-{:016x}", hasher.finish()));
    let library = folder.join("libemulation.so");
    std::fs::create_dir_all(&folder).unwrap();
    // Tests run in parallel, in several processes: the first one compiles.
    let lock = std::fs::File::create(folder.join("lock")).unwrap();
    lock.lock().unwrap();
    if library.exists() {
        return Some(library);
    }
    std::fs::write(folder.join("sources.inc"), sources).unwrap();
    std::fs::write(folder.join("registry.inc"), registry).unwrap();
    // Memory accesses are checked only in kernels, and by the emulation itself: no sanitizer library is linked.
    let checks = flags.contains(&RACES);
    let others: Vec<&str> = flags.iter().copied().filter(|flag| *flag != RACES).collect();
    let compile = |flags: &[&str], arguments: &[&Path]| {
        let output = Command::new("g++")
            .args(["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"])
            .args(["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-parameter"])
            .args(flags)
            .args(checks.then_some("-DCHECKS_RACES=1"))
            .arg("-I")
            .arg(&folder)
            .arg("-I")
            .arg(kernels())
            .arg("-I")
            .arg(&emulation)
            .args(arguments)
            // A sanitizer preloaded into this process must not affect the compiler.
            .env_remove("LD_PRELOAD")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let (object, unfinished) = (folder.join("kernels.o"), folder.join("unfinished.so"));
    compile(&flags, &["-c".as_ref(), &emulation.join("kernels.cpp"), "-o".as_ref(), &object]);
    let [scheduler, nccl] = ["emulation.cpp", "nccl.cpp"].map(|name| emulation.join(name));
    compile(
        &[&others[..], &["-pthread"]].concat(),
        &["-shared".as_ref(), &scheduler, &nccl, &object, "-o".as_ref(), &unfinished],
    );
    std::fs::rename(&unfinished, &library).unwrap();
    Some(library)
}

type Launch =
    unsafe extern "C" fn(*const c_char, *const u32, *const u32, u32, *mut *mut c_void, u32) -> c_int;

/// Launches kernels on host slices.
pub struct Emulation {
    library: libloading::Library,
}

/// An argument of a kernel: the bits of a number, or the address of a slice.
#[derive(Clone, Copy)]
pub struct Argument(u64);

impl From<u32> for Argument {
    fn from(x: u32) -> Argument {
        Argument(x.into())
    }
}

impl From<u64> for Argument {
    fn from(x: u64) -> Argument {
        Argument(x)
    }
}

impl From<f32> for Argument {
    fn from(x: f32) -> Argument {
        Argument(x.to_bits().into())
    }
}

impl<T> From<&[T]> for Argument {
    fn from(x: &[T]) -> Argument {
        Argument(x.as_ptr() as u64)
    }
}

impl<T> From<&mut [T]> for Argument {
    fn from(x: &mut [T]) -> Argument {
        Argument(x.as_mut_ptr() as u64)
    }
}

impl<T> From<&Vec<T>> for Argument {
    fn from(x: &Vec<T>) -> Argument {
        x.as_slice().into()
    }
}

impl<T> From<&mut Vec<T>> for Argument {
    fn from(x: &mut Vec<T>) -> Argument {
        x.as_mut_slice().into()
    }
}

impl Emulation {
    pub fn load(library: &Path) -> Emulation {
        // SAFETY: the library was compiled from the repository's own sources and runs no code when it is loaded.
        Emulation { library: unsafe { libloading::Library::new(library) }.unwrap() }
    }

    /// Runs a kernel. Slices must have the lengths in the kernel's description: the address sanitizer detects a kernel
    /// that goes further.
    pub fn launch(
        &self,
        name: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        arguments: &mut [Argument],
        seed: u32,
    ) -> Result<(), String> {
        let name = CString::new(name).unwrap();
        let mut pointers: Vec<*mut c_void> = arguments.iter_mut().map(|a| (&raw mut a.0).cast()).collect();
        // SAFETY: the two functions of emulation.cpp; the test is responsible for the arguments, as described above.
        unsafe {
            let launch = self.library.get::<Launch>(b"launch").unwrap();
            let rc =
                launch(name.as_ptr(), grid.as_ptr(), block.as_ptr(), shared, pointers.as_mut_ptr(), seed);
            if rc == 0 {
                return Ok(());
            }
            let error = self.library.get::<unsafe extern "C" fn() -> *const c_char>(b"launch_error").unwrap();
            Err(CStr::from_ptr(error()).to_string_lossy().into_owned())
        }
    }
}
