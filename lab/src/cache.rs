//! The paths of images, snapshots and running hosts, and their keys and locks.

use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

const LOCK_POLL: Duration = Duration::from_millis(100);

/// The lab's folder: `$PINFOLD_LAB_CACHE`, else `pinfold-lab` in the user's cache folder.
#[derive(Debug, Clone)]
pub struct Cache(PathBuf);

impl Cache {
    /// Finds the folder from the environment and makes it.
    pub fn open() -> Result<Self> {
        let variable = |name| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let folder = variable("PINFOLD_LAB_CACHE")
            .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("pinfold-lab")))
            .or_else(|| Some(variable("HOME")?.join(".cache/pinfold-lab")))
            .ok_or_else(|| anyhow!("no place for the lab's cache: set PINFOLD_LAB_CACHE"))?;
        make(&folder)?;
        Ok(Self(folder))
    }

    /// A path within.
    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.0.join(relative)
    }

    /// Waits for the lock of this name until the deadline; it is free again when dropped.
    pub fn lock(&self, name: &str, patience: Duration) -> Result<Lock> {
        let deadline = Instant::now() + patience;
        loop {
            match self.try_lock(name)? {
                Some(lock) => return Ok(lock),
                None if Instant::now() < deadline => thread::sleep(LOCK_POLL),
                None => {
                    let path = self.path(name);
                    return Err(anyhow!(
                        "{}: still locked by another lab after {patience:?}",
                        path.display()
                    ));
                }
            }
        }
    }

    /// Takes the lock of this name if it is free.
    pub fn try_lock(&self, name: impl AsRef<Path>) -> Result<Option<Lock>> {
        let path = self.path(name);
        path.parent().map_or(Ok(()), make)?;
        // Rust opens with O_CLOEXEC: a QEMU started under the lock does not keep it.
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path);
        let file = file.with_context(|| format!("{}: cannot open", path.display()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(Lock(lock))),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => {
                Err(errno).with_context(|| format!("{}: cannot lock", path.display()))
            }
        }
    }
}

/// A lock held; dropping it frees it.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held for its drop")] Flock<File>);

/// Makes a folder and its parents.
pub fn make(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)
        .with_context(|| format!("{}: cannot make the folder", folder.display()))
}

/// Writes a whole file.
pub fn write(path: &Path, data: impl AsRef<[u8]>) -> Result<()> {
    fs::write(path, data).with_context(|| format!("{}: cannot write", path.display()))
}

/// Reads a whole file.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("{}: cannot read", path.display()))
}

/// A key for what these parts make: FNV-1a, which stays the same from one Rust to the next.
pub fn key<P: AsRef<[u8]>>(parts: impl IntoIterator<Item = P>) -> String {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for part in parts {
        let part = part.as_ref();
        for byte in part.len().to_le_bytes().iter().chain(part) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_depend_on_where_a_part_ends() {
        assert_eq!(key(["ab", "c"]), key(["ab", "c"]));
        assert_ne!(key(["ab", "c"]), key(["a", "bc"]));
        assert_ne!(key(["a"]), key(["a", ""]));
    }

    #[test]
    fn a_lock_is_held_until_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache(folder.path().to_owned());
        let held = cache.lock("a/lock", Duration::ZERO).unwrap();
        assert!(cache.try_lock("a/lock").unwrap().is_none());
        let err = cache
            .lock("a/lock", Duration::ZERO)
            .unwrap_err()
            .to_string();
        assert!(
            err.ends_with("a/lock: still locked by another lab after 0ns"),
            "{err}"
        );
        drop(held);
        assert!(cache.try_lock("a/lock").unwrap().is_some());
    }
}
