//! The configuration: one typed tree, and one table of keys that drives reading, checking, printing and
//! documentation.
//!
//! Names are those of TRL's `SFTConfig` where it has one. A key is supported (it is a field of [`Config`]),
//! known but not supported ([`known`]: accepted at values that change nothing, refused by name otherwise),
//! another trainer's ([`synonyms`]: answered with our name), or unknown (refused with the nearest name). No key is ignored silently.

mod adapter;
mod bounds;
mod check;
mod choices;
mod device;
pub mod docs;
pub mod flags;
mod known;
mod libraries;
mod read;
mod synonyms;
mod table;
#[cfg(test)]
mod tests;
mod value;

pub use choices::{Init, MatmulPrecision};
pub use device::DeviceName;
pub use read::{Loaded, suggestion};
pub use table::{Config, KEYS, Key};
pub use value::Paths;
