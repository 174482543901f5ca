//! Writes to the kernel's files.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::sysroot::Sysroot;

/// Writes a kernel file, which must exist.
pub(super) fn write(root: &Sysroot, path: impl AsRef<Path>, text: &str) -> io::Result<()> {
    let mut file = open(root, path.as_ref(), false)?;
    write_whole(&mut file, text)
}

/// Writes a kernel file and reads it back through the same open file, without the end of line: the
/// kernel may accept a value and keep another.
pub(super) fn write_and_read_back(
    root: &Sysroot,
    path: impl AsRef<Path>,
    text: &str,
) -> io::Result<String> {
    let mut file = open(root, path.as_ref(), true)?;
    write_whole(&mut file, text)?;
    let mut bytes = [0; 4096];
    let used = file.read_at(&mut bytes, 0)?;
    Ok(String::from_utf8_lossy(&bytes[..used])
        .trim_end()
        .to_owned())
}

fn open(root: &Sysroot, path: &Path, read: bool) -> io::Result<File> {
    OpenOptions::new()
        .read(read)
        .write(true)
        .create(false)
        // In a captured tree the files are plain ones, which keep what follows the new text.
        .truncate(!root.is_live())
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(root.path(path))
}

/// One write call: the kernel takes a value whole or not at all.
fn write_whole(file: &mut File, text: &str) -> io::Result<()> {
    let written = file.write(text.as_bytes())?;
    if written < text.len() {
        Err(io::ErrorKind::WriteZero.into())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_kernel_file_is_an_error_and_not_created() {
        let dir = tempfile::tempdir().unwrap();
        let root = Sysroot::new(dir.path());
        assert!(write(&root, "online", "0").is_err());
        assert!(!root.exists("online"));
    }
}
