//! Writes to the kernel's files.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::sysroot::Sysroot;

/// How much is read back at once.
const PAGE: usize = 4096;

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
    let mut bytes = Vec::new();
    loop {
        // A CPU list of a large host may be longer than a page.
        let mut page = [0; PAGE];
        let read = file.read_at(&mut page, bytes.len() as u64)?;
        bytes.extend_from_slice(&page[..read]);
        if read < PAGE {
            return Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned());
        }
    }
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
    fn a_cpu_list_longer_than_a_page_is_read_back_whole() {
        let dir = tempfile::tempdir().unwrap();
        let root = Sysroot::new(dir.path());
        std::fs::write(dir.path().join("smp_affinity_list"), "0\n").unwrap();
        let odd: crate::CpuSet = (1..4096).step_by(2).collect();
        let list = odd.to_string();
        assert!(list.len() > 2 * PAGE);
        for list in [&list[..], &list[..PAGE], "1"] {
            let kept = write_and_read_back(&root, "smp_affinity_list", list).unwrap();
            assert_eq!(kept, list);
        }
    }

    #[test]
    fn a_missing_kernel_file_is_an_error_and_not_created() {
        let dir = tempfile::tempdir().unwrap();
        let root = Sysroot::new(dir.path());
        assert!(write(&root, "online", "0").is_err());
        assert!(!root.exists("online"));
    }
}
