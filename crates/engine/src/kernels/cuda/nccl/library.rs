//! The NCCL library: found at run time, its functions, and its version.

use crate::kernels::cuda::found::{Problem, can_load};
use crate::{Error, Result};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// The names of the library.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The oldest supported version: the first with non-blocking communicators.
const OLDEST: (u32, u32) = (2, 14);

pub(super) type Code = c_int;
pub(super) const SUCCESS: Code = 0;
pub(super) const IN_PROGRESS: Code = 7;
/// `ncclFloat32` and `ncclSum`.
pub(super) const FLOAT: c_int = 7;
pub(super) const SUM: c_int = 0;

/// `ncclUniqueId`, by which ranks find each other.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Id(pub(super) [u8; 128]);

/// `ncclConfig_t` of version 2.14, which later versions accept.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    /// Padding in 2.14; a field in later versions.
    cga_cluster_size: c_int,
}

impl Config {
    /// For non-blocking communicators.
    pub(super) fn without_blocking() -> Config {
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: 21400,
            blocking: 0,
            cga_cluster_size: c_int::MIN,
        }
    }
}

/// A version of NCCL: major, minor and patch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd)]
pub struct Version(pub [u32; 3]);

impl Version {
    /// `22005` is 2.20.5.
    fn of(number: c_int) -> Version {
        let n = number.unsigned_abs();
        // As NCCL_VERSION in nccl.h: one digit less up to version 2.8.
        Version(if n < 10_000 {
            [n / 1000, n / 100 % 10, n % 100]
        } else {
            [n / 10_000, n / 100 % 100, n % 100]
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Version([major, minor, patch]) = self;
        write!(f, "{major}.{minor}.{patch}")
    }
}

/// Declares the functions of the library and looks them up.
macro_rules! functions {
    ($($name:ident = $symbol:literal: fn($($type:ty),*) -> $result:ty;)*) => {
        /// The functions of the library.
        pub(in crate::kernels::cuda) struct Nccl {
            pub(super) version: Version,
            $(pub(super) $name: unsafe extern "C" fn($($type),*) -> $result,)*
            /// Keeps the functions loaded.
            _library: libloading::Library,
        }

        impl Nccl {
            /// # Safety
            /// The file is NCCL, or has functions with its names and types.
            unsafe fn look_up(library: libloading::Library) -> Result<Nccl, libloading::Error> {
                // SAFETY: guaranteed by the caller; the types are those of `nccl.h`.
                unsafe {
                    $(let $name = *library.get(concat!($symbol, "\0").as_bytes())?;)*
                    Ok(Nccl { version: Version::default(), $($name,)* _library: library })
                }
            }
        }
    };
}

functions! {
    get_unique_id = "ncclGetUniqueId": fn(*mut Id) -> Code;
    init = "ncclCommInitRankConfig": fn(*mut *mut c_void, c_int, Id, c_int, *mut Config) -> Code;
    async_error = "ncclCommGetAsyncError": fn(*mut c_void, *mut Code) -> Code;
    abort = "ncclCommAbort": fn(*mut c_void) -> Code;
    finalize = "ncclCommFinalize": fn(*mut c_void) -> Code;
    destroy = "ncclCommDestroy": fn(*mut c_void) -> Code;
    error_string = "ncclGetErrorString": fn(Code) -> *const c_char;
    last_error = "ncclGetLastError": fn(*mut c_void) -> *const c_char;
    group_start = "ncclGroupStart": fn() -> Code;
    group_end = "ncclGroupEnd": fn() -> Code;
    reduce = "ncclReduce": fn(*const c_void, *mut c_void, usize, c_int, c_int, c_int, *mut c_void, *mut c_void) -> Code;
    broadcast = "ncclBroadcast": fn(*const c_void, *mut c_void, usize, c_int, c_int, *mut c_void, *mut c_void) -> Code;
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nccl").field("version", &self.version).finish_non_exhaustive()
    }
}

/// The library of this machine; searched once.
fn found() -> &'static Result<Arc<Nccl>, Problem> {
    static FOUND: OnceLock<Result<Arc<Nccl>, Problem>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let mut said = String::new();
        for name in NAMES {
            if !can_load() {
                break;
            }
            // SAFETY: a library of this name is NCCL.
            match unsafe { Nccl::open(Path::new(name)) } {
                Ok(nccl) => return Ok(Arc::new(nccl)),
                Err(Absent::NotLoaded(error)) => said = error,
                Err(Absent::Unfit(problem)) => return Err(problem),
            }
        }
        // The system's reason is added if the file exists but one of its dependencies does not.
        let why = if said.starts_with("libnccl.so") || said.is_empty() { String::new() } else { format!(" ({said})") };
        Err(Problem::new(
            format!("NCCL is missing: libnccl.so.2 was not found{why}"),
            "ranks on cards exchange gradients by it: install it with CUDA (package libnccl2), or by `pip install \
             nvidia-nccl-cu12` (for CUDA 13 nvidia-nccl-cu13) with the folder of its libnccl.so.2 in LD_LIBRARY_PATH",
        ))
    })
}

/// The version of NCCL that ranks on cards of this machine use.
///
/// # Errors
/// Why there is none, with the remedy.
pub fn version() -> Result<Version, Problem> {
    found().as_ref().map(|nccl| nccl.version).map_err(Clone::clone)
}

/// The system's message about a library.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// Why a library cannot be used.
enum Absent {
    NotLoaded(String),
    Unfit(Problem),
}

impl Nccl {
    /// The library of this machine.
    pub(in crate::kernels::cuda) fn found() -> Result<Arc<Nccl>> {
        Ok(found().clone()?)
    }

    /// A library of tests.
    ///
    /// # Safety
    /// The file has functions with NCCL's names and types.
    pub(in crate::kernels::cuda) unsafe fn load(path: &Path) -> Result<Arc<Nccl>> {
        // SAFETY: guaranteed by the caller.
        match unsafe { Nccl::open(path) } {
            Ok(nccl) => Ok(Arc::new(nccl)),
            Err(Absent::Unfit(problem)) => Err(problem.into()),
            Err(Absent::NotLoaded(message)) => Err(Error::Device { message, help: String::new() }),
        }
    }

    /// # Safety
    /// As [`Nccl::load`].
    unsafe fn open(path: &Path) -> Result<Nccl, Absent> {
        // SAFETY: loading the library runs its initialisers, as in any program that uses NCCL.
        let library = unsafe { libloading::Library::new(path) }.map_err(|e| Absent::NotLoaded(reason(&e)))?;
        let mut number = 0;
        // SAFETY: the function exists in all versions; it writes one number.
        let known = unsafe {
            library
                .get::<unsafe extern "C" fn(*mut c_int) -> Code>(b"ncclGetVersion\0")
                .map(|f| f(&mut number))
        };
        let version = Version::of(number);
        if known.is_ok() && (version.0[0], version.0[1]) < OLDEST {
            return Err(Absent::Unfit(old(version)));
        }
        // SAFETY: guaranteed by the caller.
        let nccl = unsafe { Nccl::look_up(library) }.map_err(|error| {
            let message = format!("{} is no NCCL that can be used: {}", path.display(), reason(&error));
            Absent::Unfit(Problem::new(
                message,
                "install a newer NCCL, as for the CUDA version that `suasion env` shows",
            ))
        })?;
        Ok(Nccl { version, ..nccl })
    }

    /// NCCL's message about a failed call.
    pub(super) fn failure(&self, call: &str, comm: *mut c_void, code: Code) -> String {
        // SAFETY: both return static strings of the library, or null.
        let [what, more] = unsafe { [(self.error_string)(code), (self.last_error)(comm)] }.map(|text| {
            // SAFETY: as above.
            let text =
                (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned());
            text.unwrap_or_default()
        });
        let what = what.split(" (run with").next().unwrap_or(&what);
        match more.trim() {
            "" => format!("NCCL's {call} failed: {what}"),
            more => format!("NCCL's {call} failed: {what}: {more}"),
        }
    }

    /// The state of the last operation of a communicator.
    ///
    /// # Safety
    /// `comm` is a communicator, and no other thread uses it.
    pub(super) unsafe fn state(&self, comm: *mut c_void) -> Code {
        let mut state = SUCCESS;
        // SAFETY: guaranteed by the caller.
        match unsafe { (self.async_error)(comm, &mut state) } {
            SUCCESS => state,
            failed => failed,
        }
    }
}

fn old(version: Version) -> Problem {
    Problem::new(
        format!("NCCL {version} is too old: ranks on cards need {}.{} or later", OLDEST.0, OLDEST.1),
        "install a newer one: with CUDA (package libnccl2), or by `pip install nvidia-nccl-cu12` with the folder of its \
         libnccl.so.2 first in LD_LIBRARY_PATH",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_those_of_the_header() {
        for (number, version) in
            [(2708, [2, 7, 8]), (21003, [2, 10, 3]), (22005, [2, 20, 5]), (23007, [2, 30, 7])]
        {
            assert_eq!(Version::of(number), Version(version));
        }
        let problem = old(Version([2, 10, 3]));
        assert_eq!(problem.message, "NCCL 2.10.3 is too old: ranks on cards need 2.14 or later");
        assert!(problem.help.contains("nvidia-nccl-cu12"));
    }

    #[test]
    fn the_configuration_is_that_of_nccl_2_14() {
        assert_eq!((size_of::<Config>(), std::mem::offset_of!(Config, blocking)), (24, 16));
    }
}
