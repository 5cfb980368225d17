//! Templates whose decisions do not depend on texts.
//!
//! Most templates inspect only roles and whether there is a text, and write the text itself uninspected: their
//! rendering of any conversation is that of its shape's specimen with the conversation's strings substituted
//! ([`super::shape`]). A static analysis of the template's syntax decides this. Every expression gets a [`Kind`];
//! an expression that may let a text affect a decision makes the template one that is not blind.

use super::{charges, engine};
use minijinja::machinery::ast::{BinOpKind, CallArg, CallType, CompareOpKind, Expr, Stmt, UnaryOpKind};
use minijinja::machinery::parse;
use minijinja::syntax::SyntaxConfig;
use std::collections::HashMap;

/// The kind of a value.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Equal for all conversations of a shape.
    Shape,
    /// Strings of messages, whole or trimmed, with text before, between and after them; or equal for all. Whether
    /// it is empty, and its type, are equal for all conversations of a shape.
    Text,
    /// A message, or nothing.
    Message,
    /// A list of messages.
    Messages,
    /// The result of `namespace(..)`. Its attributes are separate variables.
    Namespace,
}

use Kind::{Message, Messages, Namespace, Shape, Text};

impl Kind {
    fn join(self, other: Kind) -> Option<Kind> {
        match (self, other) {
            (a, b) if a == b => Some(a),
            (Shape, Text) | (Text, Shape) => Some(Text),
            _ => None,
        }
    }
}

/// True if the text of messages affects a template's decisions only by being present or absent. `source` is the
/// source as compiled.
pub(super) fn is_blind(source: &str, syntax: SyntaxConfig) -> bool {
    let Ok(Stmt::Template(template)) = parse(source, engine::NAME, syntax) else { return false };
    let mut names = Names { kinds: HashMap::from([("messages".to_string(), Messages)]), changed: true };
    // The kind of a variable covers all values that are ever assigned to it, anywhere; it changes twice at most.
    while names.changed {
        names.changed = false;
        if names.body(&template.children).is_none() {
            return false;
        }
    }
    true
}

/// The variables. Every method returns None if the template may inspect a text.
struct Names {
    /// By name, and by `namespace.name`. Variables without an entry are equal for all conversations of a shape.
    kinds: HashMap<String, Kind>,
    changed: bool,
}

/// The kind of a message's value under a key. Messages with calls have no shape.
fn held(key: &str) -> Kind {
    if matches!(key, "role" | "tool_calls") { Shape } else { Text }
}

impl Names {
    fn put(&mut self, name: String, kind: Kind) -> Option<()> {
        let old = self.kinds.get(&name).copied();
        let new = old.map_or(Some(kind), |old| old.join(kind))?;
        if old != Some(new) {
            self.changed = true;
            self.kinds.insert(name, new);
        }
        Some(())
    }

    fn body(&mut self, body: &[Stmt<'_>]) -> Option<()> {
        body.iter().try_for_each(|statement| self.statement(statement))
    }

    fn statement(&mut self, statement: &Stmt<'_>) -> Option<()> {
        match statement {
            Stmt::EmitRaw(_) | Stmt::Continue(_) | Stmt::Break(_) => Some(()),
            Stmt::EmitExpr(emit) => self.text(&emit.expr).map(drop),
            Stmt::IfCond(cond) => {
                self.decide(&cond.expr)?;
                self.body(&cond.true_body)?;
                self.body(&cond.false_body)
            }
            Stmt::ForLoop(each) if !each.recursive => {
                let item = match self.value(&each.iter)? {
                    Shape => Shape,
                    Messages => Message,
                    _ => return None,
                };
                self.assign(&each.target, item)?;
                each.filter_expr.as_ref().map_or(Some(()), |cond| self.decide(cond))?;
                self.body(&each.body)?;
                self.body(&each.else_body)
            }
            Stmt::Set(set) => match (&set.target, &set.expr) {
                (Expr::Var(name), Expr::Call(call))
                    if matches!(call.identify_call(), CallType::Function("namespace")) =>
                {
                    self.put(name.id.to_string(), Namespace)?;
                    call.args.iter().try_for_each(|arg| {
                        let CallArg::Kwarg(key, value) = arg else { return None };
                        let kind = self.value(value)?;
                        self.put(format!("{}.{key}", name.id), kind)
                    })
                }
                (target, value) => {
                    let kind = self.value(value)?;
                    self.assign(target, kind)
                }
            },
            Stmt::SetBlock(set) if set.filter.is_none() => {
                self.body(&set.body)?;
                self.assign(&set.target, Text)
            }
            Stmt::WithBlock(with) => {
                for (target, value) in &with.assignments {
                    let kind = self.value(value)?;
                    self.assign(target, kind)?;
                }
                self.body(&with.body)
            }
            // The marks of `{% generation %}` blocks surround their whole content.
            Stmt::FilterBlock(block) => match &block.filter {
                Expr::Filter(f) if f.name == engine::GENERATION && f.expr.is_none() && f.args.is_empty() => {
                    self.body(&block.body)
                }
                _ => None,
            },
            _ => None,
        }
    }

    fn assign(&mut self, target: &Expr<'_>, kind: Kind) -> Option<()> {
        match target {
            Expr::Var(name) => self.put(name.id.to_string(), kind),
            Expr::GetAttr(attr) => match &attr.expr {
                Expr::Var(name) => self.put(format!("{}.{}", name.id, attr.name), kind),
                _ => None,
            },
            Expr::List(list) if kind == Shape => {
                list.items.iter().try_for_each(|target| self.assign(target, kind))
            }
            Expr::Tuple(list) if kind == Shape => {
                list.items.iter().try_for_each(|target| self.assign(target, kind))
            }
            _ => None,
        }
    }

    /// A condition, which may only test whether something is present.
    fn decide(&self, expr: &Expr<'_>) -> Option<()> {
        match expr {
            Expr::BinOp(op) if matches!(op.op, BinOpKind::ScAnd | BinOpKind::ScOr) => {
                self.decide(&op.left)?;
                self.decide(&op.right)
            }
            Expr::UnaryOp(op) if matches!(op.op, UnaryOpKind::Not) => self.decide(&op.expr),
            _ => self.value(expr).map(drop),
        }
    }

    fn shape(&self, expr: &Expr<'_>) -> Option<Kind> {
        self.value(expr).filter(|kind| *kind == Shape)
    }

    fn text(&self, expr: &Expr<'_>) -> Option<Kind> {
        self.value(expr).filter(|kind| matches!(kind, Shape | Text))
    }

    fn shapes<'a, 'b: 'a>(&self, all: impl IntoIterator<Item = &'a Expr<'b>>) -> Option<Kind> {
        all.into_iter().try_for_each(|expr| self.shape(expr).map(drop)).map(|()| Shape)
    }

    fn arguments(&self, args: &[CallArg<'_>]) -> Option<Kind> {
        self.shapes(args.iter().map(|arg| match arg {
            CallArg::Pos(expr) | CallArg::Kwarg(_, expr) => expr,
            CallArg::PosSplat(expr) | CallArg::KwargSplat(expr) => expr,
        }))
    }

    /// Compared values must be equal for all; the set of keys of a message is, too.
    fn compared(&self, left: &Expr<'_>, right: &Expr<'_>, contains: bool) -> Option<Kind> {
        self.shape(left)?;
        self.value(right).filter(|right| *right == Shape || contains && *right == Message).map(|_| Shape)
    }

    fn value(&self, expr: &Expr<'_>) -> Option<Kind> {
        match expr {
            Expr::Const(_) => Some(Shape),
            // These contain values that are not variables.
            Expr::Var(name) if matches!(name.id, "loop" | "self" | "caller") => None,
            Expr::Var(name) => {
                Some(self.kinds.get(name.id).copied().unwrap_or(Shape)).filter(|kind| *kind != Namespace)
            }
            Expr::GetAttr(attr) => match &attr.expr {
                Expr::Var(name) if name.id == "loop" => {
                    (!matches!(attr.name, "previtem" | "nextitem")).then_some(Shape)
                }
                Expr::Var(name) if self.kinds.get(name.id) == Some(&Namespace) => {
                    Some(self.kinds.get(&format!("{}.{}", name.id, attr.name)).copied().unwrap_or(Shape))
                }
                of => match self.value(of)? {
                    Shape => Some(Shape),
                    Message => Some(held(attr.name)),
                    _ => None,
                },
            },
            Expr::GetItem(item) => {
                self.shape(&item.subscript_expr)?;
                match (self.value(&item.expr)?, &item.subscript_expr) {
                    (Shape, _) => Some(Shape),
                    (Messages, _) => Some(Message),
                    (Message, Expr::Const(key)) => key.value.as_str().map(held),
                    _ => None,
                }
            }
            Expr::Slice(slice) => {
                self.shapes([&slice.start, &slice.stop, &slice.step].into_iter().flatten())?;
                self.value(&slice.expr).filter(|kind| matches!(kind, Shape | Messages))
            }
            Expr::UnaryOp(op) => match op.op {
                UnaryOpKind::Not => self.decide(&op.expr).map(|()| Shape),
                UnaryOpKind::Neg => self.shape(&op.expr),
            },
            Expr::BinOp(op) => match op.op {
                BinOpKind::ScAnd | BinOpKind::ScOr => self.value(&op.left)?.join(self.value(&op.right)?),
                BinOpKind::Add | BinOpKind::Concat => self.text(&op.left)?.join(self.text(&op.right)?),
                BinOpKind::In => self.compared(&op.left, &op.right, true),
                _ => self.shapes([&op.left, &op.right]),
            },
            Expr::Compare(compare) => {
                let mut left = &compare.expr;
                for op in &compare.ops {
                    let contains = matches!(op.op, CompareOpKind::In | CompareOpKind::NotIn);
                    self.compared(left, &op.expr, contains)?;
                    left = &op.expr;
                }
                Some(Shape)
            }
            Expr::IfExpr(cond) => {
                self.decide(&cond.test_expr)?;
                let other = cond.false_expr.as_ref().map_or(Some(Shape), |expr| self.value(expr))?;
                self.value(&cond.true_expr)?.join(other)
            }
            Expr::Filter(filter) => {
                let of = self.value(filter.expr.as_ref()?)?;
                self.arguments(&filter.args)?;
                match (filter.name, of) {
                    (_, Shape) => Some(Shape),
                    (charges::SEEN | charges::COMPARED, of) => Some(of),
                    ("trim" | "string", Text) if filter.args.is_empty() => Some(Text),
                    ("length" | "count", Messages) => Some(Shape),
                    (engine::ITER | "list", Messages) => Some(Messages),
                    ("first" | "last", Messages) => Some(Message),
                    _ => None,
                }
            }
            Expr::Test(test) => {
                let of = match (&test.expr, test.name) {
                    // An attribute of a namespace, or a variable, that may be undefined.
                    (Expr::Var(name), "defined" | "undefined")
                        if self.kinds.get(name.id) == Some(&Namespace) =>
                    {
                        Shape
                    }
                    (expr, _) => self.value(expr)?,
                };
                self.arguments(&test.args)?;
                let types = matches!(
                    test.name,
                    "defined"
                        | "undefined"
                        | "none"
                        | "string"
                        | "mapping"
                        | "iterable"
                        | "sequence"
                        | "number"
                        | "boolean"
                        | "true"
                        | "false"
                );
                (types || of == Shape).then_some(Shape)
            }
            Expr::Call(call) => match call.identify_call() {
                CallType::Function("raise_exception") => {
                    call.args.iter().try_fold(Shape, |_, arg| match arg {
                        CallArg::Pos(expr) => self.text(expr).map(|_| Shape),
                        _ => None,
                    })
                }
                CallType::Function("range" | "strftime_now") => self.arguments(&call.args),
                CallType::Method(of, name) => match (self.value(of)?, name, call.args.as_slice()) {
                    (Shape, _, args) => self.arguments(args),
                    (Text, "strip" | "lstrip" | "rstrip", []) => Some(Text),
                    (Message, "get", [CallArg::Pos(Expr::Const(key))]) => key.value.as_str().map(held),
                    (Message, "get", [CallArg::Pos(Expr::Const(key)), CallArg::Pos(other)]) => {
                        key.value.as_str().map(held)?.join(self.text(other)?)
                    }
                    _ => None,
                },
                _ => None,
            },
            Expr::List(list) => self.shapes(&list.items),
            Expr::Tuple(list) => self.shapes(&list.items),
            Expr::Map(map) => self.shapes(map.keys.iter().chain(&map.values)),
        }
    }
}
