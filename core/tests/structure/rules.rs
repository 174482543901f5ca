//! The rules of the workspace's structure: which crate and which file may use which.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::imports::{self, Imports};

/// Layers from the lowest to the highest, each with its modules. A module may use those of lower
/// layers, and those of its own layer without a circle of files.
type Layers = &'static [&'static [&'static str]];

const CORE: Layers = &[
    &["error", "cpuset", "text"],
    &["sysroot"],
    &["sys"],
    &["systemd"],
    &["host"],
    &["knob"],
    &["vm"],
    &["selector"],
    &["state"],
    &["cli"],
    &["testutils"],
];

const HOOK: Layers = &[
    &["exec"],
    &["choice"],
    &["settings"],
    &["state"],
    &["claims"],
    &["own_steps"],
    &["strays"],
    &["reconcile"],
    &["checks"],
    &["chain", "snippet"],
    &["phases"],
    &["commands"],
    &["cli"],
    &["front"],
];

const TOOLS: [&str; 7] = [
    "pin-vcpu",
    "pin-irqs",
    "pin-kthreads",
    "cpu-hotplug",
    "cg-slice",
    "pci-reset",
    "governor",
];

/// Crates that may open kernel files without core's `Sysroot`.
const NOT_SHIPPED: [&str; 3] = ["fuzz", "lab", "packaging"];

/// Files with absolute kernel paths that are printed, not opened.
const PRINTS_KERNEL_PATHS: [&str; 1] = ["hook/src/checks/memory.rs"];

/// What the paths of Proxmox VE's files begin with.
const PROXMOX: [&str; 5] = [
    "etc/pve",
    "run/qemu-server",
    "var/run/qemu-server",
    "var/lib/vz",
    "qemu.slice",
];

/// The folders that know Proxmox VE's files.
const KNOWS_PROXMOX: [&str; 2] = ["core/src/vm", "core/src/testutils"];

/// Every violation of the rules in the tree at `workspace`, each a line with the file and what to do about it.
pub(crate) fn violations(workspace: &Path) -> Vec<String> {
    let mut found = testutils_in_programs(workspace, "Cargo.toml");
    for crate_folder in members(workspace) {
        found.extend(forbidden_dependencies(workspace, &crate_folder));
        found.extend(testutils_in_programs(
            workspace,
            &format!("{crate_folder}/Cargo.toml"),
        ));
        for root in roots(workspace, &crate_folder) {
            let imports = imports::read(workspace, &root);
            found.extend(imports.errors.iter().cloned());
            found.extend(circles(&imports));
            if !NOT_SHIPPED.contains(&crate_folder.as_str()) {
                found.extend(absolute_kernel_paths(&imports));
                found.extend(proxmox_paths(&imports));
            }
            let source = Path::new(&crate_folder).join("src");
            match crate_folder.as_str() {
                "core" if root == source.join("lib.rs") => {
                    found.extend(upward(&imports, &source, CORE));
                }
                "hook" if root == source.join("lib.rs") => {
                    found.extend(upward(&imports, &source, HOOK));
                }
                _ => {}
            }
        }
    }
    found
}

/// Kernel files named by absolute path instead of relative to a `Sysroot`. Tests may contain them.
fn absolute_kernel_paths(imports: &Imports) -> Vec<String> {
    let is_kernel_path = |text: &str| text.starts_with("/sys/") || text.starts_with("/proc/");
    paths_outside(imports, is_kernel_path, &PRINTS_KERNEL_PATHS)
        .map(|place| format!("{place}: absolute path of a kernel file"))
        .collect()
}

/// Files and folders of Proxmox VE, which only `vm/` knows.
fn proxmox_paths(imports: &Imports) -> Vec<String> {
    let is_proxmox_path = |text: &str| {
        let text = text.trim_start_matches('/');
        PROXMOX.iter().any(|folder| text.starts_with(folder))
    };
    paths_outside(imports, is_proxmox_path, &KNOWS_PROXMOX)
        .map(|place| format!("{place}: a path of Proxmox VE; add it to core/src/vm/proxmox"))
        .collect()
}

/// Where programs and libraries have such a literal, except in the `allowed` files and folders.
fn paths_outside(
    imports: &Imports,
    is_such: impl Fn(&str) -> bool,
    allowed: &[&str],
) -> impl Iterator<Item = String> {
    imports
        .literals
        .iter()
        .filter(|(file, ..)| file.iter().nth(1).is_some_and(|folder| folder == "src"))
        .filter(|(file, ..)| !allowed.iter().any(|known| file.starts_with(known)))
        .filter(move |(_, _, text)| is_such(text))
        .map(|(file, line, _)| format!("{}:{line}", file.display()))
}

/// The members of the workspace, and the fuzz targets.
fn members(workspace: &Path) -> Vec<String> {
    let manifest = fs::read_to_string(workspace.join("Cargo.toml")).unwrap();
    let (_, members) = manifest.split_once("members = [").unwrap();
    let (members, _) = members.split_once(']').unwrap();
    let members = members.split('"').skip(1).step_by(2).map(str::to_owned);
    members.chain(["fuzz".to_owned()]).collect()
}

/// The files that a crate's module trees begin with: libraries, programs, tests.
fn roots(workspace: &Path, crate_folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(crate_folder);
    let mut roots = Vec::new();
    for name in ["src/lib.rs", "src/main.rs"] {
        roots.push(folder.join(name));
    }
    for name in ["src/bin", "tests", "benches", "examples"] {
        let Ok(entries) = fs::read_dir(workspace.join(folder).join(name)) else {
            continue;
        };
        for entry in entries {
            let file_name = entry.unwrap().file_name();
            let path = folder.join(name).join(file_name);
            if path.extension().is_some_and(|extension| extension == "rs") {
                roots.push(path);
            } else {
                roots.push(path.join("main.rs"));
            }
        }
    }
    roots.retain(|path| workspace.join(path).is_file());
    roots.sort();
    roots
}

/// core depends on no other crate of the workspace, a tool on core only, hook on core and the tools,
/// packaging on all of these, the lab on none.
fn forbidden_dependencies(workspace: &Path, crate_folder: &str) -> Vec<String> {
    let allowed: BTreeSet<&str> = match crate_folder {
        "hook" => TOOLS.into_iter().chain(["pinfold-core"]).collect(),
        "packaging" => TOOLS.into_iter().chain(["hook", "pinfold-core"]).collect(),
        "fuzz" => BTreeSet::from(["hook", "pinfold-core"]),
        tool if TOOLS.contains(&tool) => BTreeSet::from(["pinfold-core"]),
        _ => BTreeSet::new(),
    };
    let ours: BTreeSet<&str> = TOOLS
        .into_iter()
        .chain(["hook", "pinfold-core", "pinfold-lab"])
        .collect();
    let file = format!("{crate_folder}/Cargo.toml");
    let manifest = fs::read_to_string(workspace.join(&file)).unwrap();
    dependencies(&manifest)
        .into_iter()
        .filter(|name| ours.contains(name.as_str()) && !allowed.contains(name.as_str()))
        .map(|name| format!("{file}: {crate_folder} may not depend on {name}"))
        .collect()
}

/// Lines of a manifest that enable the feature `testutils` for more than tests.
fn testutils_in_programs(workspace: &Path, manifest: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut section = "";
    let text = fs::read_to_string(workspace.join(manifest)).unwrap();
    for (number, line) in (1..).zip(text.lines()) {
        if line.starts_with('[') {
            section = line;
        } else if line.contains("\"testutils\"") && section != "[dev-dependencies]" {
            found.push(format!(
                "{manifest}:{number}: testutils is for dev-dependencies only"
            ));
        }
    }
    found
}

/// The names in the section `dependencies` of a manifest.
fn dependencies(manifest: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut is_inside = false;
    for line in manifest.lines() {
        if line.starts_with('[') {
            is_inside = line == "[dependencies]";
        } else if let Some((name, _)) = line.split_once('=').filter(|_| is_inside) {
            let name = name.trim();
            names.push(name.split('.').next().unwrap_or(name).to_owned());
        }
    }
    names
}

/// Uses of a module in a higher layer, and modules without a layer.
fn upward(imports: &Imports, source: &Path, layers: Layers) -> Vec<String> {
    let mut found = Vec::new();
    let root = source.join("lib.rs");
    let layer = |file: &Path| {
        let module = top_module(file, source)?;
        layers.iter().position(|names| names.contains(&&*module))
    };
    for file in &imports.files {
        if *file != root && layer(file).is_none() {
            found.push(format!(
                "{}: no layer; add its module to core/tests/structure/rules.rs",
                file.display()
            ));
        }
    }
    for ((from, to), line) in &imports.uses {
        if *from == root {
            continue;
        }
        let is_upward = match (layer(from), layer(to)) {
            (Some(from), Some(to)) => to > from,
            _ => *to == root,
        };
        if is_upward {
            found.push(format!(
                "{}:{line}: upward import of {}",
                from.display(),
                to.display()
            ));
        }
    }
    found
}

/// `knob` of core/src/knob/write/file.rs, `error` of core/src/error.rs.
fn top_module(file: &Path, source: &Path) -> Option<String> {
    let first = file.strip_prefix(source).ok()?.iter().next()?.to_str()?;
    Some(first.trim_end_matches(".rs").to_owned())
}

/// Groups of files that use each other in a circle.
fn circles(imports: &Imports) -> Vec<String> {
    let mut targets: BTreeMap<&Path, Vec<&Path>> = BTreeMap::new();
    for (from, to) in imports.uses.keys() {
        targets.entry(from).or_default().push(to);
    }
    let reach = |start: &Path| -> BTreeSet<PathBuf> {
        let mut reached = BTreeSet::new();
        let mut open: Vec<&Path> = vec![start];
        while let Some(file) = open.pop() {
            for target in targets.get(file).into_iter().flatten() {
                if reached.insert(target.to_path_buf()) {
                    open.push(target);
                }
            }
        }
        reached
    };
    let reached: BTreeMap<&PathBuf, BTreeSet<PathBuf>> = imports
        .files
        .iter()
        .map(|file| (file, reach(file)))
        .collect();
    let mut groups: BTreeSet<Vec<&PathBuf>> = BTreeSet::new();
    for (file, targets) in &reached {
        if targets.contains(*file) {
            let group = targets.iter().filter(|to| reached[*to].contains(*file));
            groups.insert(group.collect());
        }
    }
    groups
        .iter()
        .map(|group| describe(group, imports))
        .collect()
}

/// The files of a circle with the line of each use among them.
fn describe(group: &[&PathBuf], imports: &Imports) -> String {
    let uses: Vec<String> = imports
        .uses
        .iter()
        .filter(|((from, to), _)| group.contains(&from) && group.contains(&to))
        .map(|((from, to), line)| format!("{}:{line} uses {}", from.display(), to.display()))
        .collect();
    format!("circle of {} files: {}", group.len(), uses.join(", "))
}
