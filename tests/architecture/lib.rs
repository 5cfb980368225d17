//! Checks that the sources follow the order of modules in ARCHITECTURE.md.
//!
//! ARCHITECTURE.md has a block per crate, fenced as `modules crates/NAME`, that lists every source file once. A file
//! may import the files before it; a parent module and its children may import each other. A name that a module only
//! re-exports counts as the defining module's, so a re-export cannot hide an import. Test modules are exempt.
#![forbid(unsafe_code)]
#![cfg(test)]

mod graph;

use graph::Crate;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The blocks of ARCHITECTURE.md: crate folder → modules in order.
fn stated_orders() -> BTreeMap<String, Vec<String>> {
    let text = std::fs::read_to_string(workspace().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let mut orders = BTreeMap::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(folder) = line.strip_prefix("```modules ") else { continue };
        let body = lines.by_ref().take_while(|line| !line.starts_with("```"));
        let modules = body.flat_map(|line| line.split_whitespace().map(String::from).collect::<Vec<_>>());
        orders.insert(folder.trim().to_string(), modules.collect());
    }
    orders
}

/// True if one of the two is the other's ancestor.
fn related(a: &str, b: &str) -> bool {
    let below =
        |child: &str, parent: &str| child.strip_prefix(parent).is_some_and(|rest| rest.starts_with('/'));
    below(a, b) || below(b, a)
}

#[test]
fn every_crate_states_its_order() {
    let orders = stated_orders();
    for entry in std::fs::read_dir(workspace().join("crates")).expect("crates/") {
        let folder = format!("crates/{}", entry.expect("an entry").file_name().to_string_lossy());
        assert!(orders.contains_key(&folder), "ARCHITECTURE.md has no block `modules {folder}`");
    }
}

#[test]
fn no_module_imports_a_later_one() {
    let mut faults = Vec::new();
    for (folder, order) in stated_orders() {
        let krate = Crate::read(&workspace().join(&folder).join("src"));
        let place: BTreeMap<&str, usize> = order.iter().enumerate().map(|(i, m)| (m.as_str(), i)).collect();
        if place.len() != order.len() {
            faults.push(format!("{folder}: a module is listed twice"));
        }
        let missing = krate.modules().filter(|m| !m.is_empty() && !place.contains_key(*m));
        faults.extend(missing.map(|m| format!("{folder}: {m} is not listed in ARCHITECTURE.md")));
        let gone = order.iter().filter(|m| !krate.modules().any(|module| module == m.as_str()));
        faults.extend(gone.map(|m| format!("{folder}: {m} is listed in ARCHITECTURE.md and has no file")));
        for (from, to, name) in krate.imports() {
            if from.is_empty() || to.is_empty() || related(from, to) {
                continue;
            }
            if let (Some(a), Some(b)) = (place.get(from), place.get(to))
                && a < b
            {
                faults.push(format!("{folder}: {from} imports {name} from {to}, which is later"));
            }
        }
    }
    faults.sort();
    faults.dedup();
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

#[test]
fn a_planted_circle_is_found() {
    let dir = std::env::temp_dir().join(format!("suasion-architecture-{}", std::process::id()));
    std::fs::create_dir_all(dir.join("deep")).expect("a folder");
    let write = |name: &str, text: &str| std::fs::write(dir.join(name), text).expect("a file");
    write("lib.rs", "mod late; mod early; mod deep; pub use late::Late;");
    write("late.rs", "pub struct Late;");
    // Once through the crate's re-export, once by a path in a function body, once through a parent's re-export.
    write(
        "early.rs",
        "use crate::Late; fn f() { let _ = crate::deep::inner(); } #[cfg(test)] mod t { use crate::late; }",
    );
    write("deep.rs", "mod child; pub use child::inner;");
    write("deep/child.rs", "pub fn inner() -> super::Gone { loop {} }");
    let krate = Crate::read(&dir);
    let imports: Vec<_> = krate.imports().into_iter().filter(|(from, ..)| *from == "early").collect();
    assert_eq!(
        imports,
        [("early", "deep/child", "inner".to_string()), ("early", "late", "Late".to_string())]
    );
    std::fs::remove_dir_all(&dir).expect("removed");
}
