//! Files that decide what root writes: settings, and what `--save` has kept. They are read only if
//! no user but root can have written or can replace them.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, Metadata, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result};

/// More than this is not read.
const MAX_BYTES: u64 = 16 * 1024 * 1024;
/// So many links are followed at most.
const MAX_LINKS: usize = 8;

/// Reads a file of root's: `path` below `start`, which is trusted itself. Every folder on the way,
/// and the file, must belong to root (or to the user that runs this) and be writable by no one
/// else; a folder may have the sticky bit instead, as /tmp has. Symbolic links are refused, except
/// below `links`: relative ones that stay there, as Proxmox VE has them in /etc/pve.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::Unusable`] that names the file or folder that is
/// not root's alone.
pub fn read(start: &Path, path: &Path, links: Option<&Path>) -> Result<String> {
    let full = find(start, path, links)?;
    let file = OpenOptions::new()
        .read(true)
        // A pipe would be waited for.
        .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK)
        .open(&full);
    let file = file.map_err(|source| Error::io(&full, "read", source))?;
    let meta = file
        .metadata()
        .map_err(|source| Error::io(&full, "examine", source))?;
    if !meta.is_file() {
        return Err(refused(&full, "not a regular file"));
    }
    check(&full, &meta)?;
    if meta.len() > MAX_BYTES {
        return Err(refused(&full, "it is longer than 16 MiB"));
    }
    let mut text = String::new();
    file.take(MAX_BYTES)
        .read_to_string(&mut text)
        .map_err(|source| Error::io(&full, "read", source))?;
    Ok(text)
}

/// As [`read`], for a path that a user has typed: from the root folder, or from the current one.
///
/// # Errors
/// As [`read`].
pub fn read_typed(path: &Path) -> Result<String> {
    let current = || {
        std::env::current_dir().map_err(|source| Error::io(".", "find the current folder", source))
    };
    let full = if path.is_absolute() {
        path.to_owned()
    } else {
        current()?.join(path)
    };
    read(Path::new("/"), &full, None)
}

/// The path without links.
fn find(start: &Path, path: &Path, links: Option<&Path>) -> Result<PathBuf> {
    let mut parts: VecDeque<OsString> = parts(path);
    let mut below = PathBuf::new();
    let mut followed = 0;
    while let Some(part) = parts.pop_front() {
        if part == ".." {
            below.pop();
            continue;
        }
        below.push(&part);
        let full = start.join(&below);
        let meta =
            fs::symlink_metadata(&full).map_err(|source| Error::io(&full, "examine", source))?;
        if !meta.is_symlink() {
            check(&full, &meta)?;
            continue;
        }
        let target = fs::read_link(&full).map_err(|source| Error::io(&full, "read", source))?;
        let stays = target
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        followed += 1;
        if !links.is_some_and(|links| below.starts_with(links) && below != links)
            || !stays
            || followed > MAX_LINKS
        {
            return Err(refused(
                &full,
                "it is a symbolic link; name its target instead",
            ));
        }
        check_owner(&full, &meta)?;
        below.pop();
        for part in self::parts(&target).into_iter().rev() {
            parts.push_front(part);
        }
    }
    Ok(start.join(below))
}

fn parts(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir))
        .map(|part| part.as_os_str().to_owned())
        .collect()
}

fn check(path: &Path, meta: &Metadata) -> Result<()> {
    check_owner(path, meta)?;
    let sticky = meta.is_dir() && meta.mode() & 0o1000 != 0;
    if meta.mode() & 0o022 != 0 && !sticky {
        return Err(refused(path, "group or others can write it; chmod go-w"));
    }
    Ok(())
}

fn check_owner(path: &Path, meta: &Metadata) -> Result<()> {
    if meta.uid() != 0 && meta.uid() != nix::unistd::geteuid().as_raw() {
        return Err(refused(path, "it does not belong to root"));
    }
    Ok(())
}

fn refused(path: &Path, why: &str) -> Error {
    Error::unusable(path.display().to_string(), format!("refused: {why}"))
}

/// Whether only root can write a file, as far as its own owner and mode show.
///
/// # Errors
/// Why not.
pub fn is_roots(meta: &Metadata) -> std::result::Result<(), &'static str> {
    if meta.uid() != 0 && meta.uid() != nix::unistd::geteuid().as_raw() {
        Err("it does not belong to root")
    } else if meta.mode() & 0o022 != 0 {
        Err("group or others can write it")
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn only_files_that_no_one_else_can_have_written() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        fs::create_dir_all(at("etc/pve/nodes/a/pinfold")).unwrap();
        fs::create_dir_all(at("etc/pinfold")).unwrap();
        let file = at("etc/pinfold/100.toml");
        fs::write(&file, "text").unwrap();
        fs::write(at("etc/pve/nodes/a/pinfold/100.toml"), "local").unwrap();
        mode(&at("etc/pve/nodes/a/pinfold/100.toml"), 0o640);
        mode(&file, 0o644);
        let links = Some(Path::new("etc/pve"));
        let read = |path: &str| read(dir.path(), Path::new(path), links);
        let refusal = |path: &str| read(path).unwrap_err().to_string();
        assert_eq!(read("etc/pinfold/100.toml").unwrap(), "text");
        assert!(read("etc/pinfold/101.toml").unwrap_err().is_gone());

        // Proxmox VE's own links.
        symlink("nodes/a", at("etc/pve/local")).unwrap();
        assert_eq!(read("etc/pve/local/pinfold/100.toml").unwrap(), "local");
        // No others: one that leads out, or is somewhere else.
        symlink("../pinfold", at("etc/pve/out")).unwrap();
        symlink(at("etc/pinfold"), at("etc/pve/absolute")).unwrap();
        symlink("pinfold", at("etc/link")).unwrap();
        symlink("100.toml", at("etc/pinfold/link.toml")).unwrap();
        symlink("loop", at("etc/pve/loop")).unwrap();
        for path in [
            "etc/pve/out/100.toml",
            "etc/pve/absolute/100.toml",
            "etc/link/100.toml",
            "etc/pinfold/link.toml",
            "etc/pve/loop",
        ] {
            assert!(refusal(path).contains("symbolic link"), "{path}");
        }

        for (path, bits) in [
            (&file, 0o664),
            (&file, 0o646),
            (&at("etc/pinfold"), 0o777),
            (&at("etc"), 0o775),
        ] {
            let before = fs::metadata(path).unwrap().permissions();
            mode(path, bits);
            let why = refusal("etc/pinfold/100.toml");
            assert!(
                why.contains("group or others can write it")
                    && why.contains(path.to_str().unwrap()),
                "{why}"
            );
            fs::set_permissions(path, before).unwrap();
        }
        // Like /tmp: users cannot replace the files of others there.
        mode(&at("etc/pinfold"), 0o1777);
        assert_eq!(read("etc/pinfold/100.toml").unwrap(), "text");
        // A pipe is not waited for.
        nix::unistd::mkfifo(&at("etc/pinfold/pipe"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(refusal("etc/pinfold/pipe").contains("not a regular file"));
        if nix::unistd::geteuid().is_root() {
            nix::unistd::chown(&file, Some(nix::unistd::Uid::from_raw(1000)), None).unwrap();
            assert!(refusal("etc/pinfold/100.toml").contains("does not belong to root"));
        }
    }
}
