//! Finds which source files of a crate use which others, by parsing them.
//!
//! A file uses another if a `use` or a path in its code, macro arguments included, leads to an item of it. Declaring a
//! child by `mod` is not a use; re-exporting an item of it is. Code under `cfg(test)` does not count; the feature
//! `testutils` is a module like others.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{TokenStream, TokenTree};
use quote::ToTokens;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemMod, ItemUse, UseTree};

/// A module path within its crate; the crate's root is the empty path.
type ModulePath = Vec<String>;

/// What the files of one crate root use of each other.
#[derive(Default)]
pub(crate) struct Imports {
    /// The files by path, relative to the workspace.
    pub(crate) files: BTreeSet<PathBuf>,
    /// From a file, to a file: the line of the first use.
    pub(crate) uses: BTreeMap<(PathBuf, PathBuf), usize>,
    /// String literals outside of tests: file, line and text.
    pub(crate) literals: BTreeSet<(PathBuf, usize, String)>,
    /// Files that could not be read or parsed.
    pub(crate) errors: Vec<String>,
}

/// One file with the modules in it, its own first.
struct Source {
    path: PathBuf,
    module: ModulePath,
    items: Vec<Item>,
}

/// Follows the modules of `root` (a lib.rs, main.rs or a test's file) below `workspace`.
pub(crate) fn read(workspace: &Path, root: &Path) -> Imports {
    let mut imports = Imports::default();
    let mut sources = Vec::new();
    load(
        workspace,
        root,
        Vec::new(),
        true,
        &mut sources,
        &mut imports,
    );

    let mut modules: HashMap<ModulePath, PathBuf> = HashMap::new();
    for source in &sources {
        modules.insert(source.module.clone(), source.path.clone());
        declare_inline(&source.items, &source.module, &source.path, &mut modules);
    }
    for source in &sources {
        let mut found = Vec::new();
        references(&source.items, &source.module, &modules, &mut found);
        for (line, text) in literals(&source.items) {
            imports.literals.insert((source.path.clone(), line, text));
        }
        for (target, line) in found {
            let file = &modules[longest_module(&target, &modules)];
            if *file != source.path {
                let pair = (source.path.clone(), file.clone());
                let first = imports.uses.entry(pair).or_insert(line);
                *first = line.min(*first);
            }
        }
    }
    imports
}

/// Reads a file and the files of the modules that it declares.
fn load(
    workspace: &Path,
    path: &Path,
    module: ModulePath,
    is_root: bool,
    sources: &mut Vec<Source>,
    imports: &mut Imports,
) {
    imports.files.insert(path.to_owned());
    let file = fs::read_to_string(workspace.join(path))
        .map_err(|error| error.to_string())
        .and_then(|text| syn::parse_file(&text).map_err(|error| error.to_string()));
    let items = match file {
        Ok(file) => file.items,
        Err(error) => {
            imports.errors.push(format!("{}: {error}", path.display()));
            return;
        }
    };
    let folder = path.parent().unwrap_or(Path::new(""));
    let is_folder_root = is_root || path.file_name().is_some_and(|name| name == "mod.rs");
    let children = match path.file_stem() {
        Some(stem) if !is_folder_root => folder.join(stem),
        _ => folder.to_owned(),
    };
    let mut declared = Vec::new();
    declared_files(&items, &module, folder, &children, &mut declared);
    sources.push(Source {
        path: path.to_owned(),
        module,
        items,
    });
    for (module, candidates) in declared {
        match candidates
            .iter()
            .find(|path| workspace.join(path).is_file())
        {
            Some(path) => load(workspace, path, module, false, sources, imports),
            None => imports
                .errors
                .push(format!("{}: not found", candidates[0].display())),
        }
    }
}

/// The modules that `items` declare in other files, each with the files it may be in.
fn declared_files(
    items: &[Item],
    module: &[String],
    folder: &Path,
    children: &Path,
    declared: &mut Vec<(ModulePath, Vec<PathBuf>)>,
) {
    for item in items.iter().filter_map(as_module) {
        let name = item.ident.to_string();
        let path = [module, std::slice::from_ref(&name)].concat();
        if let Some((_, items)) = &item.content {
            let children = children.join(&name);
            declared_files(items, &path, &children, &children, declared);
        } else if let Some(file) = path_attribute(&item.attrs) {
            declared.push((path, vec![normalize(&folder.join(file))]));
        } else {
            let file = children.join(format!("{name}.rs"));
            let in_folder = children.join(&name).join("mod.rs");
            declared.push((path, vec![file, in_folder]));
        }
    }
}

fn declare_inline(
    items: &[Item],
    module: &[String],
    file: &Path,
    modules: &mut HashMap<ModulePath, PathBuf>,
) {
    for item in items.iter().filter_map(as_module) {
        if let Some((_, items)) = &item.content {
            let path = [module, &[item.ident.to_string()]].concat();
            modules.insert(path.clone(), file.to_owned());
            declare_inline(items, &path, file, modules);
        }
    }
}

/// The module that an item is, unless it is for tests only.
fn as_module(item: &Item) -> Option<&ItemMod> {
    match item {
        Item::Mod(module) if !is_test_only(&module.attrs) => Some(module),
        _ => None,
    }
}

fn path_attribute(attributes: &[Attribute]) -> Option<String> {
    let attribute = attributes
        .iter()
        .find(|attribute| attribute.path().is_ident("path"))?;
    let value = &attribute.meta.require_name_value().ok()?.value;
    Some(
        value
            .to_token_stream()
            .to_string()
            .trim_matches('"')
            .to_owned(),
    )
}

/// Resolves `..` without following links.
fn normalize(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for part in path {
        if part == ".." {
            normal.pop();
        } else {
            normal.push(part);
        }
    }
    normal
}

/// Whether a `cfg` names `test`, and does not negate it.
fn is_test_only(attributes: &[Attribute]) -> bool {
    attributes
        .iter()
        .filter(|attribute| attribute.path().is_ident("cfg"))
        .any(|attribute| {
            let condition = attribute.meta.to_token_stream().to_string();
            let names_test = condition
                .split(|c: char| !c.is_alphanumeric() && c != '_')
                .any(|word| word == "test");
            names_test && !condition.contains("not")
        })
}

/// Every path in `items` that leads into this crate, with its line.
fn references(
    items: &[Item],
    module: &[String],
    modules: &HashMap<ModulePath, PathBuf>,
    found: &mut Vec<(ModulePath, usize)>,
) {
    let mut uses = Uses::default();
    for item in items.iter().filter(|item| !is_module_or_test(item)) {
        uses.visit_item(item);
    }
    let mut aliases: HashMap<String, ModulePath> = HashMap::new();
    for (path, name, line) in uses.found {
        if let Some(target) = resolve(&path, module, modules, &HashMap::new()) {
            found.push((target.clone(), line));
            if let Some(name) = name {
                aliases.insert(name, target);
            }
        }
    }
    for item in items.iter().filter(|item| !is_module_or_test(item)) {
        let mut paths = Vec::new();
        paths_in(without_tests(item).to_token_stream(), &mut paths);
        for (path, line) in paths {
            if let Some(target) = resolve(&path, module, modules, &aliases) {
                found.push((target, line));
            }
        }
    }
    for item in items.iter().filter_map(as_module) {
        if let Some((_, items)) = &item.content {
            let path = [module, &[item.ident.to_string()]].concat();
            references(items, &path, modules, found);
        }
    }
}

/// The string literals with their lines.
fn literals(items: &[Item]) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for item in items.iter().filter(|item| !is_module_or_test(item)) {
        literals_in(without_tests(item).to_token_stream(), &mut found);
    }
    for module in items.iter().filter_map(as_module) {
        if let Some((_, items)) = &module.content {
            found.extend(literals(items));
        }
    }
    found
}

fn literals_in(tokens: TokenStream, found: &mut Vec<(usize, String)>) {
    for token in tokens {
        match token {
            TokenTree::Group(group) => literals_in(group.stream(), found),
            TokenTree::Literal(literal) => {
                let text = literal.to_string();
                let prefix = text.find('"').unwrap_or(text.len());
                let text = text[prefix..].trim_matches(['"', '#']).to_owned();
                found.push((literal.span().start().line, text));
            }
            _ => {}
        }
    }
}

fn is_module_or_test(item: &Item) -> bool {
    match item {
        Item::Mod(_) => true,
        Item::Fn(item) => is_test_only(&item.attrs),
        Item::Impl(item) => is_test_only(&item.attrs),
        Item::Use(item) => is_test_only(&item.attrs),
        Item::Struct(item) => is_test_only(&item.attrs),
        Item::Const(item) => is_test_only(&item.attrs),
        _ => false,
    }
}

/// An item without those of its functions that are for tests only.
fn without_tests(item: &Item) -> Item {
    let mut item = item.clone();
    if let Item::Impl(block) = &mut item {
        block.items.retain(
            |item| !matches!(item, syn::ImplItem::Fn(function) if is_test_only(&function.attrs)),
        );
    }
    item
}

/// The `use` declarations of items and function bodies: path, name it brings into scope, line.
#[derive(Default)]
struct Uses {
    found: Vec<(ModulePath, Option<String>, usize)>,
}

impl Uses {
    fn add(&mut self, tree: &UseTree, prefix: &[String]) {
        let join = |name: &syn::Ident| [prefix, &[name.to_string()]].concat();
        let line = tree.span().start().line;
        match tree {
            UseTree::Path(path) => self.add(&path.tree, &join(&path.ident)),
            UseTree::Group(group) => {
                for tree in &group.items {
                    self.add(tree, prefix);
                }
            }
            UseTree::Glob(_) => self.found.push((prefix.to_vec(), None, line)),
            UseTree::Name(name) if name.ident == "self" => {
                self.found
                    .push((prefix.to_vec(), prefix.last().cloned(), line));
            }
            UseTree::Name(name) => {
                self.found
                    .push((join(&name.ident), Some(name.ident.to_string()), line));
            }
            UseTree::Rename(rename) => {
                self.found
                    .push((join(&rename.ident), Some(rename.rename.to_string()), line));
            }
        }
    }
}

impl<'ast> Visit<'ast> for Uses {
    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        self.add(&item.tree, &[]);
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        if !is_test_only(&function.attrs) {
            visit::visit_impl_item_fn(self, function);
        }
    }
}

/// Collects `a::b::c` from tokens, so that arguments of macros count too; `use` declarations are skipped.
fn paths_in(tokens: TokenStream, paths: &mut Vec<(ModulePath, usize)>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let mut at = 0;
    while at < tokens.len() {
        match &tokens[at] {
            // The path in `pub(in path)` is not a use.
            TokenTree::Group(_) if at > 0 && is_ident(&tokens[at - 1], "pub") => {}
            TokenTree::Group(group) => paths_in(group.stream(), paths),
            TokenTree::Ident(ident) if ident == "use" => {
                while at < tokens.len() && !is_punct(&tokens, at, ';') {
                    at += 1;
                }
            }
            TokenTree::Ident(ident) => {
                let line = ident.span().start().line;
                let mut path = vec![ident.to_string()];
                while is_punct(&tokens, at + 1, ':') && is_punct(&tokens, at + 2, ':') {
                    let Some(TokenTree::Ident(next)) = tokens.get(at + 3) else {
                        break;
                    };
                    path.push(next.to_string());
                    at += 3;
                }
                if path.len() > 1 {
                    paths.push((path, line));
                }
            }
            _ => {}
        }
        at += 1;
    }
}

fn is_ident(token: &TokenTree, name: &str) -> bool {
    matches!(token, TokenTree::Ident(ident) if ident == name)
}

fn is_punct(tokens: &[TokenTree], at: usize, character: char) -> bool {
    matches!(tokens.get(at), Some(TokenTree::Punct(punct)) if punct.as_char() == character)
}

/// The absolute path within the crate that `path` in `module` means; none if it leads to another crate.
fn resolve(
    path: &[String],
    module: &[String],
    modules: &HashMap<ModulePath, PathBuf>,
    aliases: &HashMap<String, ModulePath>,
) -> Option<ModulePath> {
    let (first, rest) = path.split_first()?;
    match first.as_str() {
        "crate" => Some(rest.to_vec()),
        "self" => resolve_below(module, rest),
        "super" => {
            let (_, parent) = module.split_last()?;
            resolve_below(parent, rest)
        }
        name => {
            let child = [module, &[name.to_owned()]].concat();
            if modules.contains_key(&child) {
                return Some([&child, rest].concat());
            }
            Some([aliases.get(name)?, rest].concat())
        }
    }
}

/// Continues in `module`; more `super` may follow.
fn resolve_below(module: &[String], rest: &[String]) -> Option<ModulePath> {
    match rest.split_first() {
        Some((first, rest)) if first == "super" => resolve_below(module.split_last()?.1, rest),
        _ => Some([module, rest].concat()),
    }
}

/// The longest beginning of a path that is a module.
fn longest_module<'path>(
    path: &'path [String],
    modules: &HashMap<ModulePath, PathBuf>,
) -> &'path [String] {
    (0..=path.len())
        .rev()
        .map(|length| &path[..length])
        .find(|beginning| modules.contains_key(*beginning))
        .unwrap_or_default()
}
