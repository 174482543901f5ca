//! Storages: where the files of snippets are.

use super::paths;
use crate::error::Result;
use crate::sysroot::Sysroot;

/// A storage of Proxmox VE, by storage.cfg.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Storage {
    /// Its name.
    pub id: String,
    /// Where it is, below the root; none if it has no folder.
    pub path: Option<String>,
    /// What it may hold.
    pub content: Vec<String>,
    /// The folder of its snippets in [`path`](Self::path).
    snippets: String,
    /// Whether it is switched off.
    disabled: bool,
    /// The nodes that have it; all if none.
    pub nodes: Vec<String>,
    /// Whether all nodes see the same files in it.
    pub shared: bool,
}

/// What a storage may hold if its content is not set (`plugindata` of the plugins with a folder).
const DEFAULT_CONTENT: &str = "images,rootdir";
/// The same for the storage `local` of a node without one (`parse_config` in PVE::Storage::Plugin).
const CONTENT_OF_LOCAL: &str = "backup,images,iso,rootdir,snippets,vztmpl";

/// The storage that every node has.
pub const LOCAL: &str = "local";

impl Storage {
    fn new(kind: &str, id: &str) -> Self {
        let is_mounted = matches!(kind, "nfs" | "cifs" | "cephfs" | "glusterfs");
        Self {
            id: id.to_owned(),
            path: is_mounted.then(|| format!("mnt/pve/{id}")),
            content: words(DEFAULT_CONTENT),
            snippets: "snippets".to_owned(),
            disabled: false,
            nodes: Vec::new(),
            shared: is_mounted,
        }
    }

    fn local() -> Self {
        Self {
            path: Some(paths::LOCAL_STORAGE.to_owned()),
            content: words(CONTENT_OF_LOCAL),
            ..Self::new("dir", LOCAL)
        }
    }

    fn set(&mut self, key: &str, value: &str) {
        match key {
            "path" => self.path = Some(value.trim_start_matches('/').to_owned()),
            "content" => self.content = words(value),
            "content-dirs" => {
                let folder = words(value).into_iter().find_map(|word| {
                    let folder = word.strip_prefix("snippets=")?;
                    Some(folder.trim_matches('/').to_owned())
                });
                if let Some(folder) = folder {
                    self.snippets = folder;
                }
            }
            "disable" => self.disabled = value != "0",
            "nodes" => self.nodes = words(value),
            "shared" => self.shared |= value != "0",
            _ => {}
        }
    }

    /// Whether it may hold snippets.
    pub fn has_snippets(&self) -> bool {
        self.content.iter().any(|what| what == "snippets")
    }

    /// Whether this node has it.
    pub fn is_on(&self, node: &str) -> bool {
        let here = self.nodes.is_empty() || self.nodes.iter().any(|name| name == node);
        !self.disabled && (here || self.id == LOCAL)
    }

    /// The path of a snippet, below the root; none if the storage has no folder.
    pub fn snippet(&self, name: &str) -> Option<String> {
        let path = self.path.as_deref()?;
        Some(format!("{path}/{}/{name}", self.snippets))
    }
}

/// The storages of the cluster, in order; `local` first if it is not in storage.cfg.
///
/// # Errors
/// If storage.cfg cannot be read.
pub fn storages(root: &Sysroot) -> Result<Vec<Storage>> {
    match root.read(paths::STORAGES) {
        Err(error) if error.is_gone() => Ok(parse("")),
        text => Ok(parse(&text?)),
    }
}

/// The storage of a volume as in `nas:snippets/hook`, with the path of the snippet, below the root;
/// `None` if no storage of that name has a folder.
pub fn snippet(root: &Sysroot, volume: &str) -> Option<(Storage, String)> {
    let (id, name) = volume.split_once(":snippets/")?;
    let mut storages = storages(root).unwrap_or_default().into_iter();
    let storage = storages.find(|storage| storage.id == id)?;
    let path = storage.snippet(name)?;
    Some((storage, path))
}

/// Words between commas, semicolons or spaces (`split_list` in PVE::Tools).
fn words(list: &str) -> Vec<String> {
    list.split([',', ';', ' ', '\t'])
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Parses storage.cfg: `TYPE: ID`, then indented lines of a key and a value.
fn parse(text: &str) -> Vec<Storage> {
    let mut storages: Vec<Storage> = Vec::new();
    for line in text.lines() {
        if !line.starts_with([' ', '\t']) {
            if let Some((kind, id)) = line.split_once(':') {
                storages.push(Storage::new(kind, id.trim()));
            }
            continue;
        }
        let line = line.trim();
        let (key, value) = line.split_once([' ', '\t']).unwrap_or((line, ""));
        if let Some(storage) = storages.last_mut() {
            storage.set(key, value.trim());
        }
    }
    match storages.iter_mut().find(|storage| storage.id == LOCAL) {
        None => storages.insert(0, Storage::local()),
        Some(local) => {
            local
                .path
                .get_or_insert_with(|| paths::LOCAL_STORAGE.to_owned());
        }
    }
    storages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storages_are_read() {
        let text = "dir: local\n\tpath /var/lib/vz\n\tcontent iso, snippets\n\nnfs: nas\n\tserver 192.0.2.1\n\
                    \tcontent images\n\nlvmthin: data\n\tthinpool data\n\ndir: own\n\tpath /srv\n\
                    \tcontent-dirs iso=i,snippets=scripts/pve\n\tcontent snippets\n\tnodes pve2,pve3\n\n\
                    dir: off\n\tpath /off\n\tdisable\n\ndir: plain\n\tpath /plain\n\tshared 1\n";
        let shown: Vec<String> = parse(text)
            .iter()
            .map(|storage| {
                let path = storage.snippet("hook").unwrap_or("-".into());
                let (snippets, here) = (storage.has_snippets(), storage.is_on("pve1"));
                format!("{} {path} {snippets} {here} {}", storage.id, storage.shared)
            })
            .collect();
        assert_eq!(
            shown,
            [
                "local var/lib/vz/snippets/hook true true false",
                "nas mnt/pve/nas/snippets/hook false true true",
                "data - false true false",
                "own srv/scripts/pve/hook true false false",
                "off off/snippets/hook false false false",
                "plain plain/snippets/hook false true true",
            ]
        );
        // As every node has it.
        for text in ["", "\n", "\tpath /x\n", ":\n\t\n", "x"] {
            let local = Storage::local();
            assert!(parse(text).contains(&local), "{text:?}");
            assert!(local.has_snippets() && local.is_on("x"));
        }
    }
}
