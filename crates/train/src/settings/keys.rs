//! What the table of settings states about each: its range, and what a resume compares.

use super::{OnSaveError, Optim, ParamGroups, Settings, Strategy};
use crate::groups::Patterns;
use crate::interval::Interval;
use crate::schedule::{Kwargs, Scheduler};
use std::fmt;

/// A setting of the table.
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// What a resume compares.
    pub on_resume: OnResume,
    /// The numbers that it may be; `None` if every value of its type can work.
    pub range: Option<Range>,
    pub(super) value: fn(&Settings) -> String,
    pub(super) number: fn(&Settings) -> Option<f64>,
}

/// The numbers that a setting may have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Range {
    /// From here on.
    AtLeast(f64),
    /// From the first to below the second.
    FromBelow(f64, f64),
    /// From the first to the second.
    FromTo(f64, f64),
    /// Above the first and up to the second.
    AboveTo(f64, f64),
    /// Whole numbers up to this, and shares below 1.
    WholeOrShare(f64),
    /// As [`Range::WholeOrShare`], without 0.
    StepsOrShare(f64),
}

impl Range {
    /// True for a number within. NaN and the infinities are in no range.
    pub fn holds(self, number: f64) -> bool {
        number.is_finite()
            && match self {
                Range::AtLeast(low) => number >= low,
                Range::FromBelow(low, high) => (low..high).contains(&number),
                Range::FromTo(low, high) => (low..=high).contains(&number),
                Range::AboveTo(low, high) => number > low && number <= high,
                Range::WholeOrShare(high) => {
                    (0.0..1.0).contains(&number) || ((1.0..=high).contains(&number) && number.fract() == 0.0)
                }
                Range::StepsOrShare(high) => number != 0.0 && Range::WholeOrShare(high).holds(number),
            }
    }
}

impl fmt::Display for Range {
    /// A phrase that follows "must be": `at least 1`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Range::AtLeast(low) => write!(f, "at least {low}"),
            Range::FromBelow(low, high) => write!(f, "at least {low} and below {high}"),
            Range::FromTo(low, high) => write!(f, "between {low} and {high}"),
            Range::AboveTo(low, high) => write!(f, "above {low} and at most {high:e}"),
            Range::WholeOrShare(_) => f.write_str("at least 0, and whole or below 1"),
            Range::StepsOrShare(_) => f.write_str("at least 1 and whole, or a share of the steps below 1"),
        }
    }
}

/// Whether a resume may change a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnResume {
    /// The steps depend on it: it must be the checkpoint's.
    Same,
    /// What it resolves to is compared instead (`data_seed`, the steps of the run and of the warm-up).
    Resolved,
    /// No step depends on it.
    Free,
}

impl Key {
    /// The value as a configuration has it.
    pub fn value(&self, settings: &Settings) -> String {
        (self.value)(settings)
    }
}

/// A type of a setting.
pub(super) trait Shown {
    /// The text of the value in a configuration.
    fn shown(&self) -> String;

    /// The value where it is a number, for its range.
    fn number(&self) -> Option<f64> {
        None
    }
}

macro_rules! shown {
    ($($type:ty: $format:literal $(as $number:ty)?),*) => { $(impl Shown for $type {
        fn shown(&self) -> String {
            format!($format, self)
        }

        fn number(&self) -> Option<f64> {
            None$(.or(Some(*self as $number)))?
        }
    })* };
}

shown!(bool: "{}", u64: "{}" as f64, usize: "{}" as f64, f64: "{:?}" as f64, Scheduler: "{}", Strategy: "{}");
shown!(OnSaveError: "{}", Optim: "{}", String: "{}");

impl Shown for Interval {
    fn shown(&self) -> String {
        self.to_string()
    }

    fn number(&self) -> Option<f64> {
        Some(self.0)
    }
}

macro_rules! shown_as_json {
    ($($type:ty),*) => { $(impl Shown for $type {
        fn shown(&self) -> String {
            serde_json::json!(self).to_string()
        }
    })* };
}

shown_as_json!(Kwargs, Patterns, ParamGroups);

impl<T: Shown> Shown for Option<T> {
    fn shown(&self) -> String {
        self.as_ref().map_or("null".into(), T::shown)
    }

    fn number(&self) -> Option<f64> {
        self.as_ref().and_then(T::number)
    }
}
