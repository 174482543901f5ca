//! The link to hook in a storage, through which Proxmox VE runs it: an upgrade of the program is one
//! of the hookscript too.

#![expect(
    clippy::disallowed_methods,
    reason = "makes and removes the link of hook install and hook remove"
)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use pinfold_core::{Error, Host, Result};

use crate::checks::script;

/// Where the package installs hook.
const PROGRAM: &str = "usr/sbin/hook";

/// The name of hook among the snippets.
pub(crate) const NAME: &str = "hook";

/// What is at the place of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// Hook, or a script that calls it.
    Hook,
    /// A link to this program.
    Link,
    /// Nothing, or a link that leads nowhere.
    Nothing,
    /// Something else.
    Other,
}

/// The program that the link leads to: that of the package, or this one.
pub(crate) fn program(root: &Host) -> PathBuf {
    let own = std::env::current_exe().ok();
    match own.filter(|_| !root.exists(PROGRAM)) {
        Some(own) => own,
        None => PathBuf::from("/").join(PROGRAM),
    }
}

/// What is at a path, below the root.
pub(crate) fn look(root: &Host, path: &str) -> Found {
    let full = root.path(path);
    let link = full.read_link().ok();
    if link.as_ref() == Some(&program(root)) {
        return Found::Link;
    }
    // Below --sysroot the link of another leads out of it.
    match full.metadata() {
        Ok(_) if script::is_hook(root, path) => Found::Hook,
        Ok(_) => Found::Other,
        Err(_) => Found::Nothing,
    }
}

/// Makes the link, with its folder.
///
/// # Errors
/// [`Error::Io`] with the path.
pub(crate) fn link(root: &Host, path: &str) -> Result<()> {
    let full = root.path(path);
    if let Some(folder) = full.parent() {
        let made = fs::create_dir_all(folder);
        made.map_err(|error| Error::io(folder, "make the folder", error))?;
    }
    if full.symlink_metadata().is_ok() {
        let removed = fs::remove_file(&full);
        removed.map_err(|error| Error::io(&full, "remove", error))?;
    }
    symlink(program(root), &full).map_err(|error| Error::io(&full, "link", error))
}

/// Removes the link.
///
/// # Errors
/// [`Error::Io`] with the path.
pub(crate) fn unlink(root: &Host, path: &str) -> Result<()> {
    let full = root.path(path);
    fs::remove_file(&full).map_err(|error| Error::io(&full, "remove", error))
}
