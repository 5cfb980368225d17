//! Fuel for work that MiniJinja does not count: the texts that tests, methods and sorting filters inspect.
//!
//! MiniJinja (3.1) charges for the text that a filter or method is called on and for its result, but not for its
//! arguments, nor for the input of tests, nor for the texts that sorting compares. With texts of 16 MB a loop over
//! these takes hours.

use super::python::bad;
use minijinja::value::{Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, State, Value, filters, tests};

/// The identity filters: one for a text, and one that is also charged for the texts in a list ([`super::counted`]).
pub(super) const SEEN: &str = "__suasion_seen";

pub(super) const COMPARED: &str = "__suasion_compared";

/// Bytes of text per unit of fuel, as in MiniJinja.
const BYTES: u64 = 64;

/// The depth of lists and mappings up to which texts are counted.
const DEPTH: usize = 3;

/// Charges for the texts in some values, `times` over.
pub(super) fn charge(state: &State, values: &[Value], times: u64) -> Result<(), Error> {
    values.iter().try_for_each(|value| weigh(state, value, times, DEPTH))
}

fn weigh(state: &State, value: &Value, times: u64, depth: usize) -> Result<(), Error> {
    match value.kind() {
        // The fuel of the instruction covers short texts.
        ValueKind::String => match value.as_str().map_or(0, str::len) as u64 / BYTES {
            0 => Ok(()),
            units => state.consume_fuel(units.saturating_mul(times)),
        },
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map if depth > 0 => {
            let keys = value.kind() == ValueKind::Map;
            for (i, item) in value.try_iter()?.enumerate() {
                if i % 2 == 1 {
                    state.consume_fuel(1)?;
                }
                if keys {
                    weigh(state, &value.get_item(&item)?, times, depth - 1)?;
                }
                weigh(state, &item, times, depth - 1)?;
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// The number of comparisons per item when a list of this length is sorted.
fn comparisons(value: Option<&Value>) -> u64 {
    let items = value.and_then(Value::len).unwrap_or(usize::MAX);
    u64::from(usize::BITS - items.leading_zeros())
}

/// Replaces MiniJinja's tests and filters by ones that charge.
pub(super) fn add(env: &mut Environment<'static>) {
    // MiniJinja charges every filter for the text it is called on.
    env.add_filter(SEEN, |value: Value| value);
    env.add_filter(COMPARED, |state: &State, value: Value| -> Result<Value, Error> {
        if matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
            charge(state, std::slice::from_ref(&value), 1)?;
        }
        Ok(value)
    });
    let all = [
        (&["eq", "equalto", "=="][..], Value::from_function(tests::is_eq)),
        (&["ne", "!="], Value::from_function(tests::is_ne)),
        (&["lt", "lessthan", "<"], Value::from_function(tests::is_lt)),
        (&["le", "<="], Value::from_function(tests::is_le)),
        (&["gt", "greaterthan", ">"], Value::from_function(tests::is_gt)),
        (&["ge", ">="], Value::from_function(tests::is_ge)),
        (&["in"], Value::from_function(tests::is_in)),
        (&["startingwith"], Value::from_function(tests::is_startingwith)),
        (&["endingwith"], Value::from_function(tests::is_endingwith)),
        (&["lower"], Value::from_function(tests::is_lower)),
        (&["upper"], Value::from_function(tests::is_upper)),
        (&["sameas"], Value::from_function(tests::is_sameas)),
    ];
    for (name, test) in
        all.into_iter().flat_map(|(names, test)| names.iter().map(move |n| (*n, test.clone())))
    {
        env.add_test(name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            charge(state, &args, 1)?;
            test.call(state, &args)
        });
    }
    for (name, filter) in [
        ("sort", Value::from_function(filters::sort)),
        ("unique", Value::from_function(filters::unique)),
        ("groupby", Value::from_function(filters::groupby)),
        ("dictsort", Value::from_function(filters::dictsort)),
        ("min", Value::from_function(filters::min)),
        ("max", Value::from_function(filters::max)),
    ] {
        env.add_filter(name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            let value = args.first().ok_or_else(|| bad(format!("{name} needs a list")))?;
            charge(state, std::slice::from_ref(value), comparisons(Some(value)))?;
            filter.call(state, &args)
        });
    }
}
