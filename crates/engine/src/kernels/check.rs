//! The rules for operands of each operation, the same for every backend.
//!
//! Kernels step through their operands together, and some write through pointers. So each backend calls the operation's
//! check before it computes: sizes must match, and no written view may overlap another operand.

use super::Attention;
use super::buffers::{Bytes, Indices, Routes};
use super::quantised::BLOCK;
use super::random::Dropout;
use super::shapes::{Activation, Norm, Routing, TargetLoss};
use super::view::{Dtype, View};
use crate::Result;

/// Returns an error with the operands' sizes unless a rule holds.
macro_rules! rule {
    ($operation:expr, $holds:expr, $($message:tt)+) => {
        if !$holds {
            return Err($crate::Error::Operands { operation: $operation, message: format!($($message)+) });
        }
    };
}

pub(super) use rule;

fn same(operation: &'static str, a: View, b: View) -> Result<()> {
    let (x, y) = ((a.rows(), a.width()), (b.rows(), b.width()));
    rule!(operation, x == y, "operands of {} × {} and {} × {}", x.0, x.1, y.0, y.1);
    Ok(())
}

fn contiguous(operation: &'static str, views: &[View]) -> Result<()> {
    let gaps = views.iter().find(|view| !view.is_contiguous());
    rule!(operation, gaps.is_none(), "an operand with gaps between its rows: {gaps:?}");
    Ok(())
}

/// `x` is one vector of `len`.
fn vector(operation: &'static str, what: &str, x: View, len: usize) -> Result<()> {
    rule!(operation, x.len() == len, "{what} has {} elements instead of {len}", x.len());
    contiguous(operation, &[x])
}

/// As [`vector`], if there is one.
fn optional(operation: &'static str, what: &str, x: Option<View>, len: usize) -> Result<()> {
    x.map_or(Ok(()), |x| vector(operation, what, x, len))
}

/// An empty view in place of an absent operand.
pub(super) fn or_none(view: Option<View>) -> View {
    view.unwrap_or(View::planned(0, 0))
}

/// No written view overlaps another view of the call.
pub(super) fn apart(written: &[View], read: &[View]) -> Result<()> {
    for (i, out) in written.iter().enumerate() {
        let mut others = written[i + 1..].iter().chain(read);
        let meets = others.find(|view| out.overlaps(**view));
        rule!("memory", meets.is_none(), "a written view overlaps another: {out:?} and {meets:?}");
    }
    Ok(())
}

pub(super) fn transfer(view: View, len: usize) -> Result<()> {
    vector("transfer", "the view", view, len)
}

pub(super) fn copy(y: View, x: View) -> Result<()> {
    same("copy", y, x)?;
    apart(&[y], &[x])
}

/// Also used for other operations on two vectors of equal length.
pub(super) fn add(y: View, x: View) -> Result<()> {
    same("add", y, x)?;
    contiguous("add", &[y, x])?;
    apart(&[y], &[x])
}

pub(super) fn element_wise(x: View) -> Result<()> {
    contiguous("fill or scale", &[x])
}

/// The shares of the ranks must cover the elements of `x`, one after the other.
pub(super) fn shares(x: View, cuts: &[usize], ranks: usize) -> Result<()> {
    let fits = cuts.len() == ranks + 1 && cuts.is_sorted();
    let whole = cuts.first() == Some(&0) && cuts.last() == Some(&x.len());
    rule!("shares of ranks", fits && whole, "cuts {cuts:?} of {} elements for {ranks} ranks", x.len());
    element_wise(x)
}

pub(super) fn gather(y: View, x: View, rows: Indices) -> Result<()> {
    rows_of(y, x, rows)?;
    apart(&[y], &[x])
}

pub(super) fn scatter_add(y: View, x: View, rows: Indices) -> Result<()> {
    rows_of(x, y, rows)?;
    apart(&[y], &[x])
}

/// `short[i]` belongs to `long[rows[i]]`.
fn rows_of(short: View, long: View, rows: Indices) -> Result<()> {
    let operation = "gather";
    rule!(
        operation,
        short.width() > 0 && short.width() == long.width(),
        "rows of {} and of {}",
        short.width(),
        long.width()
    );
    rule!(operation, rows.len() == short.rows(), "{} indices for {} rows", rows.len(), short.rows());
    rule!(operation, rows.bound() <= long.rows(), "row {} of {}", rows.bound() - 1, long.rows());
    match long.dtype() {
        Dtype::F32 => contiguous(operation, &[short, long]),
        Dtype::File(_) => contiguous(operation, &[short]).and(rows_in_file(operation, long)),
        Dtype::Packed(_) => packed(operation, false),
    }
}

/// Elements of a row, or of a column, must be adjacent.
fn rows_in_file(operation: &'static str, x: View) -> Result<()> {
    let runs = x.column() == 1 || x.stride() == 1;
    rule!(operation, runs, "elements {} and {} apart", x.stride(), x.column());
    Ok(())
}

/// A matrix of weights, in a buffer or in a file.
fn weights(operation: &'static str, w: View) -> Result<()> {
    match w.dtype() {
        Dtype::F32 => contiguous(operation, &[w]),
        Dtype::File(_) => rows_in_file(operation, w),
        Dtype::Packed(_) => packed(operation, w.is_contiguous()),
    }
}

/// Whole rows of a packed matrix, if the operation reads one.
fn packed(operation: &'static str, holds: bool) -> Result<()> {
    rule!(operation, holds, "a packed matrix, or a part of one that is not whole rows");
    Ok(())
}

/// Groups of columns that are normalised separately.
fn groups(norm: Norm, y: View, stats: View, x: View, w: View) -> Result<()> {
    let operation = "norm";
    same(operation, y, x)?;
    let width = w.len();
    let groups = width > 0 && x.width() > 0 && x.width().is_multiple_of(width);
    rule!(operation, groups, "groups of {width} in {}", x.width());
    let groups = x.len() / width;
    vector(operation, "stats", stats, groups.saturating_mul(norm.statistics()))?;
    vector(operation, "w", w, width)
}

pub(super) fn norm(norm: Norm, y: View, stats: View, x: View, w: View, b: Option<View>) -> Result<()> {
    groups(norm, y, stats, x, w)?;
    optional("norm", "b", b, w.len())?;
    apart(&[y, stats], &[x, w, or_none(b)])
}

pub(super) fn norm_again(norm: Norm, y: View, stats: View, x: View, w: View, b: Option<View>) -> Result<()> {
    groups(norm, y, stats, x, w)?;
    optional("norm", "b", b, w.len())?;
    apart(&[y], &[stats, x, w, or_none(b)])
}

pub(super) fn norm_backward(
    norm: Norm,
    dx: View,
    [dw, db]: [Option<View>; 2],
    [dy, stats, x, w]: [View; 4],
) -> Result<()> {
    groups(norm, dx, stats, x, w)?;
    same("norm", dy, x)?;
    optional("norm", "the gradient of w or b", dw, w.len())?;
    optional("norm", "the gradient of w or b", db, w.len())?;
    apart(&[dx, or_none(dw), or_none(db)], &[dy, stats, x, w])
}

/// `x [rows, inputs]`, `y [rows, outputs]`, `w [outputs, inputs]`, in all three directions.
fn layer(y: View, x: View, w: View) -> Result<()> {
    let operation = "linear";
    rule!(operation, x.rows() == y.rows(), "{} rows in, {} rows out", x.rows(), y.rows());
    let (outputs, inputs) = (w.rows(), w.width());
    rule!(
        operation,
        x.width() == inputs && y.width() == outputs && inputs > 0 && outputs > 0,
        "weights of {outputs} × {inputs} between {} and {} columns",
        x.width(),
        y.width()
    );
    weights(operation, w)
}

pub(super) fn linear(y: View, x: View, w: View, b: Option<View>) -> Result<()> {
    layer(y, x, w)?;
    optional("linear", "b", b, w.rows())?;
    apart(&[y], &[x, w, or_none(b)])
}

pub(super) fn linear_dx(dx: View, dy: View, w: View) -> Result<()> {
    layer(dy, dx, w)?;
    apart(&[dx], &[dy, w])
}

pub(super) fn linear_dw(dw: View, dy: View, x: View) -> Result<()> {
    layer(dy, x, dw)?;
    apart(&[dw], &[dy, x])
}

pub(super) fn linear_db(db: View, dy: View) -> Result<()> {
    vector("sum of rows", "the result", db, dy.width())?;
    apart(&[db], &[dy])
}

/// `w [outputs, inputs]`, `b [outputs, rank]`, `a [rank, inputs]`.
pub(super) fn row_norms(n: View, w: View, b: View, a: View) -> Result<()> {
    let operation = "row norms";
    let (outputs, inputs) = (w.rows(), w.width());
    rule!(
        operation,
        b.rows() == outputs && a.width() == inputs && a.rows() == b.width() && w.len() > 0 && a.rows() > 0,
        "weights of {outputs} × {inputs}, {} × {} and {} × {}",
        b.rows(),
        b.width(),
        a.rows(),
        a.width()
    );
    vector(operation, "n", n, outputs)?;
    weights(operation, w)?;
    contiguous(operation, &[a, b])?;
    apart(&[n], &[w, b, a])
}

pub(super) fn divide(y: View, a: View, b: View) -> Result<()> {
    vector("divide", "an operand", a, y.len())?;
    vector("divide", "an operand", b, y.len())?;
    contiguous("divide", &[y])?;
    apart(&[y], &[a, b])
}

pub(super) fn scale_columns(y: View, x: View, factors: View, bias: Option<View>) -> Result<()> {
    let operation = "scale columns";
    same(operation, y, x)?;
    rule!(operation, x.width() > 0, "rows without columns");
    vector(operation, "factors", factors, x.width())?;
    optional(operation, "bias", bias, x.width())?;
    apart(&[y], &[x, factors, or_none(bias)])
}

pub(super) fn column_dots(out: View, a: View, b: View, divisors: View) -> Result<()> {
    let operation = "column dots";
    same(operation, a, b)?;
    rule!(operation, a.width() > 0, "rows without columns");
    vector(operation, "the result", out, a.width())?;
    vector(operation, "divisors", divisors, a.width())?;
    apart(&[out], &[a, b, divisors])
}

pub(super) fn rotate(x: View, head_dim: usize, table: View, positions: Indices) -> Result<()> {
    let operation = "rotate";
    rule!(
        operation,
        head_dim > 0 && x.width() > 0 && x.width().is_multiple_of(head_dim),
        "heads of {head_dim} in {}",
        x.width()
    );
    let rotated = table.width();
    rule!(operation, rotated.is_multiple_of(2) && rotated <= head_dim, "{rotated} of {head_dim} columns");
    rule!(operation, positions.len() == x.rows(), "{} positions for {} rows", positions.len(), x.rows());
    let bound = positions.bound();
    rule!(operation, bound <= table.rows(), "position {} in a table of {}", bound - 1, table.rows());
    contiguous(operation, &[table])?;
    apart(&[x], &[table])
}

/// A dropout rate.
fn rate(operation: &'static str, dropout: Dropout) -> Result<()> {
    rule!(operation, (0.0..=1.0).contains(&dropout.rate), "a dropout of {}", dropout.rate);
    Ok(())
}

pub(super) fn dropout(x: View, dropout: Dropout) -> Result<()> {
    rate("dropout", dropout)?;
    rule!("dropout", x.width() > 0, "rows without columns");
    contiguous("dropout", &[x])
}

/// The same rule for operands and for their gradients.
fn heads(a: Attention, o: View, lse: View, q: View, kv: View) -> Result<()> {
    let operation = "attention";
    let Attention { heads: h, plan, dropout } = a;
    dropout.map_or(Ok(()), |dropout| rate(operation, dropout))?;
    let whole = h.kv_heads > 0 && h.heads.is_multiple_of(h.kv_heads) && h.head_dim > 0;
    rule!(operation, whole && h.heads > 0 && h.window != Some(0), "{h:?}");
    let widths = (q.width(), kv.width());
    rule!(
        operation,
        widths == (h.query_width(), h.kv_width()),
        "rows of {} and {} for {h:?}",
        widths.0,
        widths.1
    );
    same(operation, o, q)?;
    rule!(operation, q.rows() == plan.queries(), "{} of {} queries are planned", plan.queries(), q.rows());
    rule!(operation, plan.keys() <= kv.rows(), "keys up to {} of {}", plan.keys(), kv.rows());
    vector(operation, "lse", lse, q.rows().saturating_mul(h.heads))?;
    contiguous(operation, &[o, q, kv])
}

pub(super) fn attention(a: Attention, o: View, lse: View, q: View, kv: View) -> Result<()> {
    heads(a, o, lse, q, kv)?;
    apart(&[o, lse], &[q, kv])
}

pub(super) fn attention_backward(
    a: Attention,
    [dq, dkv]: [View; 2],
    [d_o, o, lse, q, kv]: [View; 5],
) -> Result<()> {
    heads(a, o, lse, q, kv)?;
    heads(a, d_o, lse, dq, dkv)?;
    apart(&[dq, dkv], &[d_o, o, lse, q, kv])
}

fn activation(f: Activation, a: View, up: View) -> Result<()> {
    let operation = "activate";
    let (inside, width) = (up.width(), a.width());
    let fits = width.checked_mul(f.gate_width()) == Some(inside);
    let fits = fits && width > 0;
    rule!(operation, fits && a.rows() == up.rows(), "{:?} from {:?}", (a.rows(), width), (up.rows(), inside));
    contiguous(operation, &[a, up])
}

pub(super) fn activate(f: Activation, a: View, up: View) -> Result<()> {
    activation(f, a, up)?;
    apart(&[a], &[up])
}

pub(super) fn activate_backward(f: Activation, dup: View, da: View, up: View) -> Result<()> {
    activation(f, da, up)?;
    activation(f, da, dup)?;
    apart(&[dup], &[da, up])
}

/// `probabilities` is `[rows, experts]`, and `weights` has `per_row` entries for each row.
fn choice(r: Routing, probabilities: View, weights: View) -> Result<()> {
    let operation = "route";
    let (rows, experts) = (probabilities.rows(), probabilities.width());
    rule!(operation, (1..=experts).contains(&r.per_row), "{} of {experts} experts", r.per_row);
    vector(operation, "weights", weights, rows.saturating_mul(r.per_row))?;
    contiguous(operation, &[probabilities])
}

pub(super) fn route(r: Routing, probabilities: View, weights: View) -> Result<()> {
    choice(r, probabilities, weights)?;
    apart(&[probabilities, weights], &[])
}

pub(super) fn route_backward(
    r: Routing,
    d: View,
    probabilities: View,
    d_weights: View,
    routes: &Routes,
) -> Result<()> {
    let operation = "route";
    choice(r, probabilities, d_weights)?;
    same(operation, d, probabilities)?;
    contiguous(operation, &[d])?;
    let (rows, offsets) = (routes.rows(), routes.offsets());
    let fits = rows.len() == d_weights.len() && rows.bound() <= d.rows() && offsets.len() == d.width() + 1;
    rule!(operation, fits, "{} slots of {} rows, {} offsets", rows.len(), d.rows(), offsets.len());
    apart(&[d], &[probabilities, d_weights])
}

/// Slots before and after a linear layer with separate weights per expert.
fn slots(y: View, x: View, offsets: Indices) -> Result<()> {
    let operation = "experts";
    rule!(operation, y.rows() == x.rows(), "{} and {} slots", y.rows(), x.rows());
    rule!(operation, y.width() > 0 && x.width() > 0, "layers without inputs or outputs");
    let fits = offsets.len() > 0 && offsets.bound() <= x.rows() + 1;
    rule!(operation, fits, "{} offsets below {} of {} slots", offsets.len(), offsets.bound(), x.rows());
    contiguous(operation, &[y, x])
}

/// Used for both directions: `y` is written. Whether the weights fit is checked when they are divided among the
/// experts.
pub(super) fn grouped(y: View, x: View, w: &[View], offsets: Indices) -> Result<()> {
    slots(y, x, offsets)?;
    apart(&[y], &[x])?;
    apart(&[y], w)
}

pub(super) fn grouped_dw(dw: View, first: usize, dy: View, x: View, offsets: Indices) -> Result<()> {
    slots(dy, x, offsets)?;
    contiguous("experts", &[dw])?;
    let (experts, outputs, rows) = (offsets.len() - 1, dy.width(), dw.rows());
    let fits = dw.width() == x.width() && first.saturating_add(rows) <= experts.saturating_mul(outputs);
    rule!("experts", fits, "{dw:?} from row {first} of {experts} experts of {outputs} by {x:?}");
    apart(&[dw], &[dy, x])
}

/// A factor or result for each row.
fn each_row(x: View, of_rows: View) -> Result<()> {
    vector("rows", "the vector", of_rows, x.rows())?;
    rule!("rows", x.width() > 0, "rows without columns");
    contiguous("rows", &[x])
}

/// Also used for noise with a size for each row.
pub(super) fn scale_rows(x: View, factors: View) -> Result<()> {
    each_row(x, factors)?;
    apart(&[x], &[factors])
}

pub(super) fn row_dots(out: View, a: View, b: View) -> Result<()> {
    same("rows", a, b)?;
    each_row(a, out)?;
    each_row(b, out)?;
    apart(&[out], &[a, b])
}

pub(super) fn cross_entropy(
    losses: View,
    logits: View,
    ids: Indices,
    weights: Option<View>,
    smoothing: f32,
) -> Result<()> {
    let operation = "cross-entropy";
    rule!(operation, (0.0..=1.0).contains(&smoothing), "a smoothing of {smoothing}");
    let rows = logits.rows();
    rule!(operation, ids.len() == rows, "{} targets for {rows} rows of logits", ids.len());
    rule!(operation, logits.width() > 0, "no vocabulary");
    rule!(operation, ids.bound() <= logits.width(), "token {} of {}", ids.bound() - 1, logits.width());
    vector(operation, "losses", losses, rows.saturating_mul(TargetLoss::COLUMNS))?;
    contiguous(operation, &[logits])?;
    optional(operation, "weights", weights, rows)?;
    apart(&[losses, logits], &[or_none(weights)])
}

pub(super) fn bytes(bytes: Bytes, len: usize) -> Result<()> {
    rule!("transfer", bytes.len() == len, "{len} bytes for a run of {}", bytes.len());
    Ok(())
}

pub(super) fn adamw_8bit(p: View, g: View, codes: [Bytes; 2], scales: [View; 2]) -> Result<()> {
    let operation = "adamw in 8 bits";
    vector(operation, "the gradient", g, p.len())?;
    contiguous(operation, &[p])?;
    for codes in codes {
        rule!(operation, codes.len() == p.len(), "{} codes for {} elements", codes.len(), p.len());
    }
    rule!(operation, !codes[0].shares(codes[1]), "the codes of both moments are in one buffer");
    for scales in scales {
        vector(operation, "the scales", scales, p.len().div_ceil(BLOCK))?;
    }
    apart(&[p, scales[0], scales[1]], &[g])
}

pub(super) fn adafactor(p: View, g: View, rows: View, columns: Option<View>) -> Result<()> {
    let operation = "adafactor";
    vector(operation, "the gradient", g, p.len())?;
    contiguous(operation, &[p])?;
    rule!(operation, p.len() > 0, "no parameters");
    match columns {
        None => vector(operation, "the mean squares", rows, p.len())?,
        Some(columns) => {
            vector(operation, "the mean squares of rows", rows, p.rows())?;
            vector(operation, "the mean squares of columns", columns, p.width())?;
        }
    }
    apart(&[p, rows, or_none(columns)], &[g])
}

pub(super) fn sgd(p: View, g: View, m: Option<View>) -> Result<()> {
    vector("sgd", "the gradient", g, p.len())?;
    contiguous("sgd", &[p])?;
    optional("sgd", "the momentum", m, p.len())?;
    apart(&[p, or_none(m)], &[g])
}

pub(super) fn adamw(p: View, g: View, m: View, v: View) -> Result<()> {
    [g, m, v].into_iter().try_for_each(|x| vector("adamw", "an operand", x, p.len()))?;
    contiguous("adamw", &[p])?;
    apart(&[p, m, v], &[g])
}
