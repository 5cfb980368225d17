//! Settings that count steps, or name a share of the run's.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// Steps between two events: a whole number, or below 1 a share of all steps, as in transformers.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Interval(pub f64);

impl Interval {
    /// The interval in steps in a run of `total`: `ceil(total · share)` for a share, and at least 1.
    pub fn of(self, total: u64) -> u64 {
        let steps = if self.0 < 1.0 { (total as f64 * self.0).ceil() } else { self.0 };
        (steps as u64).max(1)
    }

    fn whole(self) -> Option<u64> {
        (self.0.fract() == 0.0 && (0.0..1e15).contains(&self.0)).then_some(self.0 as u64)
    }
}

impl From<u64> for Interval {
    fn from(steps: u64) -> Interval {
        Interval(steps as f64)
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.whole() {
            Some(steps) => write!(f, "{steps}"),
            None => write!(f, "{:?}", self.0),
        }
    }
}

impl Serialize for Interval {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.whole() {
            Some(steps) => serializer.serialize_u64(steps),
            None => serializer.serialize_f64(self.0),
        }
    }
}

impl<'de> Deserialize<'de> for Interval {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Interval, D::Error> {
        f64::deserialize(deserializer).map(Interval)
    }
}
