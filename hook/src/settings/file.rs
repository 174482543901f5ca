//! The paths of settings files, and the check that only root can write them.

#![expect(
    clippy::disallowed_methods,
    reason = "writes and removes settings files"
)]

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use pinfold_core::state::trust;
use pinfold_core::vm::{self, VmId};
use pinfold_core::{Error, Host, Result};

use super::schema::File;

/// The folder of this node's settings that `hook init` writes to, below the sysroot.
const OWN_FOLDER: &str = "etc/pinfold";

/// The file for all VMs that have none of their own.
const DEFAULT: &str = "default.toml";

/// The folders of settings files, below the sysroot, the most specific first: CPUs have other numbers
/// on other nodes. A VM's file in any of them comes before a file for all VMs.
fn folders() -> [String; 3] {
    [
        format!("{}/pinfold", vm::NODE_FOLDER),
        OWN_FOLDER.to_owned(),
        format!("{}/pinfold", vm::SHARED_FOLDER),
    ]
}

/// The possible paths of a VM's settings, below the sysroot; the first file found is used.
fn candidates(vmid: VmId) -> impl Iterator<Item = String> {
    let default = folders().map(|folder| format!("{folder}/{DEFAULT}"));
    own_candidates(vmid).into_iter().chain(default)
}

fn own_candidates(vmid: VmId) -> [String; 3] {
    folders().map(|folder| format!("{folder}/{vmid}.toml"))
}

/// The VMs that have a settings file of their own, some maybe twice.
///
/// # Errors
/// If a folder cannot be read.
pub(crate) fn vms_with_own_file(root: &Host) -> Result<Vec<VmId>> {
    let mut vmids = Vec::new();
    for folder in folders() {
        let names = match root.names(&folder) {
            Err(error) if error.is_gone() => continue,
            names => names?,
        };
        vmids.extend(
            names
                .iter()
                .filter_map(|name| name.strip_suffix(".toml")?.parse::<VmId>().ok()),
        );
    }
    Ok(vmids)
}

/// Some editors begin a file with it.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// The path of a VM's own settings file, if there is one; default.toml is not its own.
pub(crate) fn own_file(root: &Host, vmid: VmId) -> Option<PathBuf> {
    own_candidates(vmid)
        .into_iter()
        .map(|path| root.path(path))
        .find(|path| path.symlink_metadata().is_ok())
}

/// The path of a VM's settings for this node, whether they exist or not.
pub(crate) fn node_file(root: &Host, vmid: VmId) -> PathBuf {
    root.path(format!("{OWN_FOLDER}/{vmid}.toml"))
}

/// Writes a VM's settings for this node, if it has none.
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
        // A partial file would be read as a complete one.
        file.write_all(text.as_bytes())
            .inspect_err(|_| drop(fs::remove_file(&path)))
    });
    written.map_err(|source| Error::io(&path, "write", source))?;
    Ok(path)
}

/// A VM's own settings file with a hookscript added to `chain`: its path and its text.
///
/// # Errors
/// [`Error::Unusable`] if it has no file of its own, or others in `chain`; [`Error::Io`] with the
/// path.
pub(crate) fn with_chain(root: &Host, vmid: VmId, volume: &str) -> Result<(PathBuf, String)> {
    let Some(path) = own_file(root, vmid) else {
        let why = "without a settings file of its own, its earlier hookscript cannot be kept";
        let fix = format!("write one: hook init {vmid}");
        return Err(Error::unusable(
            format!("VM {vmid}"),
            format!("{why}; {fix}"),
        ));
    };
    let text = fs::read_to_string(&path).map_err(|source| Error::io(&path, "read", source))?;
    let text = text.trim_start_matches(BYTE_ORDER_MARK);
    let new = format!("chain = [{volume:?}]\n{text}");
    if toml::from_str::<File>(&new).is_err() {
        let why = format!("add {volume:?} to the hookscripts of `chain`, then run this again");
        return Err(Error::unusable(path.display().to_string(), why));
    }
    Ok((path, new))
}

/// Adds a hookscript to `chain` in a VM's own settings file. The file is replaced as a whole, so that
/// no phase reads a part of it.
///
/// # Errors
/// As [`with_chain`].
pub(crate) fn add_chain(root: &Host, vmid: VmId, volume: &str) -> Result<()> {
    let (path, new) = with_chain(root, vmid, volume)?;
    let mode = path
        .metadata()
        .map_or(0o644, |file| file.permissions().mode() & 0o777);
    let beside = path.with_extension("toml.new");
    // One of a run that was killed.
    drop(fs::remove_file(&beside));
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&beside);
    let written = file
        .and_then(|mut file| file.write_all(new.as_bytes()))
        .and_then(|()| fs::rename(&beside, &path))
        .inspect_err(|_| drop(fs::remove_file(&beside)));
    written.map_err(|source| Error::io(&path, "write", source))
}

/// A VM's own settings files for this node.
pub(crate) fn node_files(root: &Host, vmid: VmId) -> Vec<PathBuf> {
    let [node, own, _cluster] = own_candidates(vmid).map(|path| root.path(path));
    let is_there = |path: &PathBuf| path.symlink_metadata().is_ok();
    [node, own].into_iter().filter(is_there).collect()
}

/// The settings file of a VM on another node, as far as the cluster shares it.
pub(crate) fn file_on(root: &Host, node: &str, vmid: VmId) -> Option<PathBuf> {
    let of_node = format!("{}/pinfold/{vmid}.toml", vm::node_folder(node));
    let [_, _, cluster] = own_candidates(vmid);
    [of_node, cluster]
        .into_iter()
        .map(|path| root.path(path))
        .find(|path| path.symlink_metadata().is_ok())
}

/// The settings file that applies to a VM on another node, as far as the cluster shares it: the
/// VM's own, or one for all VMs. The node's folder that the cluster does not share comes between.
pub(crate) fn any_file_on(root: &Host, node: &str, vmid: VmId) -> Option<PathBuf> {
    let of_node = format!("{}/pinfold/{DEFAULT}", vm::node_folder(node));
    let [_, _, cluster] = folders();
    let defaults = [of_node, format!("{cluster}/{DEFAULT}")];
    let mut defaults = defaults.into_iter().map(|path| root.path(path));
    let is_there = |path: &PathBuf| path.symlink_metadata().is_ok();
    file_on(root, node, vmid).or_else(|| defaults.find(is_there))
}

/// Removes a settings file, and its folder if that is empty then.
///
/// # Errors
/// [`Error::Io`] with the path.
pub(crate) fn remove(path: &Path) -> Result<()> {
    fs::remove_file(path).map_err(|source| Error::io(path, "remove", source))?;
    if let Some(folder) = path.parent() {
        // Others may have files there.
        let _ = fs::remove_dir(folder);
    }
    Ok(())
}

/// Checks that a VM has no settings file of its own yet.
///
/// # Errors
/// [`Error::Unusable`] that names it.
pub(crate) fn no_own_file(root: &Host, vmid: VmId) -> Result<()> {
    match own_file(root, vmid) {
        None => Ok(()),
        Some(path) => {
            let why = format!(
                "VM {vmid} has these settings already, which are not changed; edit or remove them"
            );
            Err(Error::unusable(path.display().to_string(), why))
        }
    }
}

/// A VM's settings file: its full path and its text.
///
/// # Errors
/// If the file cannot be read, or users other than root can write it.
pub(crate) fn find(root: &Host, vmid: VmId) -> Result<Option<(String, String)>> {
    for candidate in candidates(vmid) {
        // Whoever can write the settings decides where root writes. Proxmox VE's folder has links
        // to this node's.
        match trust::read(
            &root.path(""),
            candidate.as_ref(),
            Some(vm::SHARED_FOLDER.as_ref()),
        ) {
            Err(error) if error.is_gone() => {}
            Err(error) => return Err(error),
            Ok(text) => return Ok(Some((root.path(&candidate).display().to_string(), text))),
        }
    }
    Ok(None)
}
