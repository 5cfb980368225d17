//! The import graph of a crate, read from its sources.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use syn::visit::{self, Visit};

/// A crate's modules by path from its root: `""` for lib.rs or main.rs, `"source/json"` for source/json.rs.
pub struct Crate {
    files: BTreeMap<String, Module>,
}

/// What a file imports.
#[derive(Default)]
struct Module {
    /// Paths from the crate's root that the file refers to, by `use` or in its code.
    paths: Vec<Vec<String>>,
    /// Names that the file imports or re-exports: name → path from the crate's root.
    names: BTreeMap<String, Vec<String>>,
}

impl Crate {
    /// Reads every source file below `src`.
    pub fn read(src: &Path) -> Crate {
        let mut found = Vec::new();
        walk(src, "", &mut found);
        let known: BTreeSet<String> = found.iter().map(|(module, _)| module.clone()).collect();
        let files = found.into_iter().map(|(module, file)| {
            let text = std::fs::read_to_string(&file).expect("a source file");
            let syntax = syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
            let at = module.split('/').filter(|s| !s.is_empty()).map(String::from).collect();
            let mut reader = Reader { at, known: &known, module: Module::default() };
            reader.visit_file(&syntax);
            (module, reader.module)
        });
        Crate { files: files.collect() }
    }

    /// Every module with its own file.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// `(importing module, defining module, name)` of every import between two files.
    pub fn imports(&self) -> Vec<(&str, &str, String)> {
        let mut imports = Vec::new();
        for (from, module) in &self.files {
            for path in &module.paths {
                let to = self.resolve(path, 0);
                if to != from {
                    imports.push((from.as_str(), to, path.last().cloned().unwrap_or_default()));
                }
            }
        }
        imports.sort();
        imports.dedup();
        imports
    }

    /// The module that defines the target of a path, following re-exports.
    fn resolve(&self, path: &[String], depth: usize) -> &str {
        let mut module = "".to_string();
        for (i, segment) in path.iter().enumerate() {
            let child = if module.is_empty() { segment.clone() } else { format!("{module}/{segment}") };
            if self.files.contains_key(&child) {
                module = child;
                continue;
            }
            let file = &self.files[&module];
            if let Some(target) = file.names.get(segment).filter(|_| depth < 16) {
                let rest: Vec<String> = target.iter().chain(&path[i + 1..]).cloned().collect();
                if rest[..] != *path {
                    return self.resolve(&rest, depth + 1);
                }
            }
            break;
        }
        self.files.get_key_value(&module).map_or("", |(key, _)| key)
    }
}

/// Source files with their module paths.
fn walk(folder: &Path, at: &str, found: &mut Vec<(String, std::path::PathBuf)>) {
    for entry in std::fs::read_dir(folder).expect("a source folder") {
        let path = entry.expect("an entry").path();
        let stem = path.file_stem().expect("a name").to_string_lossy().into_owned();
        let module = if at.is_empty() { stem.clone() } else { format!("{at}/{stem}") };
        if path.is_dir() {
            walk(&path, &module, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let named = matches!(stem.as_str(), "lib" | "main") && at.is_empty();
            let module = if named || stem == "mod" { at.to_string() } else { module };
            found.push((module, path));
        }
    }
}

/// Collects the paths of one file.
struct Reader<'a> {
    /// The module that is being visited.
    at: Vec<String>,
    known: &'a BTreeSet<String>,
    module: Module,
}

impl Reader<'_> {
    /// A path from the crate's root; `None` if the path leaves the crate or is local.
    fn absolute(&self, segments: &[String]) -> Option<Vec<String>> {
        let mut base = match segments.first()?.as_str() {
            "crate" => Vec::new(),
            "self" => self.at.clone(),
            "super" => self.at[..self.at.len().checked_sub(1)?].to_vec(),
            child => {
                // A path may start at a child of the module without `self::`.
                let path = self.at.iter().map(String::as_str).chain([child]).collect::<Vec<_>>().join("/");
                if !self.known.contains(&path) {
                    return None;
                }
                return Some(self.at.iter().chain(segments).cloned().collect());
            }
        };
        let mut rest = &segments[1..];
        while rest.first().is_some_and(|s| s == "super") {
            base.pop();
            rest = &rest[1..];
        }
        base.extend(rest.iter().cloned());
        Some(base)
    }

    fn tree(&mut self, tree: &syn::UseTree, before: &[String]) {
        let with = |ident: &syn::Ident| before.iter().cloned().chain([ident.to_string()]).collect::<Vec<_>>();
        match tree {
            syn::UseTree::Path(path) => self.tree(&path.tree, &with(&path.ident)),
            syn::UseTree::Group(group) => group.items.iter().for_each(|tree| self.tree(tree, before)),
            syn::UseTree::Name(name) if name.ident == "self" => self.import(before, before.last().cloned()),
            syn::UseTree::Name(name) => self.import(&with(&name.ident), Some(name.ident.to_string())),
            syn::UseTree::Rename(rename) => {
                self.import(&with(&rename.ident), Some(rename.rename.to_string()))
            }
            syn::UseTree::Glob(_) => {
                if let Some(path) = self.absolute(before) {
                    self.module.paths.push(path);
                }
            }
        }
    }

    fn import(&mut self, path: &[String], name: Option<String>) {
        let Some(path) = self.absolute(path) else { return };
        if let Some(name) = name {
            self.module.names.insert(name, path.clone());
        }
        self.module.paths.push(path);
    }
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        let attributes = match item {
            syn::Item::Mod(item) => &item.attrs,
            syn::Item::Use(item) => &item.attrs,
            syn::Item::Fn(item) => &item.attrs,
            syn::Item::Impl(item) => &item.attrs,
            _ => &Vec::new(),
        };
        if !attributes.iter().any(is_test) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        self.at.push(item.ident.to_string());
        visit::visit_item_mod(self, item);
        self.at.pop();
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.tree(&item.tree, &[]);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<String> = path.segments.iter().map(|s| s.ident.to_string()).collect();
        if segments.len() > 1
            && let Some(path) = self.absolute(&segments)
        {
            self.module.paths.push(path);
        }
        visit::visit_path(self, path);
    }
}

/// `#[cfg(test)]`.
fn is_test(attribute: &syn::Attribute) -> bool {
    attribute.path().is_ident("cfg")
        && attribute.parse_args::<syn::Path>().is_ok_and(|condition| condition.is_ident("test"))
}
