//! Where settings files are, and that they are root's alone.

#![expect(
    clippy::disallowed_methods,
    reason = "writes the settings file of hook init"
)]

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use pinfold_core::vm::VmId;
use pinfold_core::{Error, Host, Result};

/// Where a VM's settings may be, below the sysroot; the first that is there counts.
pub(super) fn candidates(vmid: VmId) -> [String; 3] {
    [
        format!("etc/pve/pinfold/{vmid}.toml"),
        format!("etc/pinfold/{vmid}.toml"),
        "etc/pinfold/default.toml".to_owned(),
    ]
}

/// A VM's own settings file: where it is, if there is one. What is for all VMs is none.
pub(crate) fn own_file(root: &Host, vmid: VmId) -> Option<PathBuf> {
    let [cluster, node, _] = candidates(vmid).map(|path| root.path(path));
    [cluster, node]
        .into_iter()
        .find(|path| path.symlink_metadata().is_ok())
}

/// Where a VM's settings for this node are, or would be.
pub(crate) fn node_file(root: &Host, vmid: VmId) -> PathBuf {
    let [_, node, _] = candidates(vmid);
    root.path(node)
}

/// Writes a VM's settings for this node, where it has none.
///
/// # Errors
/// [`Error::Unusable`] that names a file that is there already, [`Error::Io`] with the path.
pub(crate) fn create(root: &Host, vmid: VmId, text: &str) -> Result<PathBuf> {
    no_own_file(root, vmid)?;
    let path = node_file(root, vmid);
    if let Some(folder) = path.parent() {
        let made = DirBuilder::new().recursive(true).mode(0o755).create(folder);
        made.map_err(|source| Error::io(folder, "make the folder", source))?;
    }
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&path);
    let written = file.and_then(|mut file| {
        // Half a file would be taken for the whole of it.
        file.write_all(text.as_bytes())
            .inspect_err(|_| drop(fs::remove_file(&path)))
    });
    written.map_err(|source| Error::io(&path, "write", source))?;
    Ok(path)
}

/// Makes sure that a VM has no settings file of its own yet.
///
/// # Errors
/// [`Error::Unusable`] that names it.
pub(crate) fn no_own_file(root: &Host, vmid: VmId) -> Result<()> {
    match own_file(root, vmid) {
        None => Ok(()),
        Some(path) => {
            let why = format!(
                "VM {vmid} has these settings already, which are left as they are; change or remove them"
            );
            Err(Error::unusable(path.display().to_string(), why))
        }
    }
}

/// A VM's settings file: its full path and its text.
pub(super) fn find(root: &Host, vmid: VmId) -> Result<Option<(String, String)>> {
    for candidate in candidates(vmid) {
        let path = root.path(&candidate);
        match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::io(path, "look at", source)),
            Ok(meta) => {
                let path = path.display().to_string();
                check_owner(&path, &meta)?;
                return Ok(Some((path, root.read(&candidate)?)));
            }
        }
    }
    Ok(None)
}

/// Whoever can write the settings decides where root writes.
fn check_owner(path: &str, meta: &fs::Metadata) -> Result<()> {
    let fault = if !meta.is_file() {
        "it is no plain file"
    } else if meta.uid() != nix::unistd::geteuid().as_raw() && meta.uid() != 0 {
        "it does not belong to root"
    } else if meta.mode() & 0o022 != 0 {
        "others than root can write it; chmod go-w"
    } else {
        return Ok(());
    };
    Err(Error::unusable(path, format!("settings refused: {fault}")))
}
