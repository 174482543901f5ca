//! Writes a file whole or not at all, and only if its text has changed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// How much of a text is compared, and written, at a time.
const BUFFER: usize = 64 * 1024;

/// What a text is written to.
pub(super) type Out<'a> = BufWriter<Replacement<'a>>;

/// Replaces a file by one with the text that `text` writes, which only root can read. The text is
/// made once and is never in memory as a whole; a file that has it already is left alone.
///
/// # Errors
/// If the file cannot be written; it is as it was then.
pub(super) fn replace<'a>(
    path: &'a Path,
    text: impl FnOnce(&mut Out<'a>) -> io::Result<()>,
) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(BUFFER, Replacement::of(path));
    text(&mut out)?;
    out.into_inner()
        .map_err(io::IntoInnerError::into_error)?
        .finish()
}

/// A file while its text is written: compared with the present one up to the first difference, and
/// from there on in a new file, which then takes its place.
pub(super) struct Replacement<'a> {
    path: &'a Path,
    new_path: PathBuf,
    /// The present file, if there is one that only root can read.
    present: Option<File>,
    /// How much of it is as it was written so far.
    same: u64,
    /// What was read of it last.
    read: Vec<u8>,
    /// The new file, from the first difference on.
    new: Option<File>,
}

impl<'a> Replacement<'a> {
    fn of(path: &'a Path) -> Self {
        let present = OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(path);
        let is_private = |file: &File| file.metadata().is_ok_and(|meta| meta.mode() & 0o077 == 0);
        Self {
            path,
            new_path: path.with_extension("json.new"),
            present: present.ok().filter(is_private),
            same: 0,
            read: Vec::new(),
            new: None,
        }
    }

    /// Whether the present file goes on with this text.
    fn goes_on_with(&mut self, text: &[u8]) -> bool {
        let Some(present) = &mut self.present else {
            return false;
        };
        self.read.resize(text.len(), 0);
        present.read_exact(&mut self.read).is_ok() && self.read == text
    }

    /// Begins the new file with what the present one has in common with it.
    fn begin(&mut self) -> io::Result<()> {
        // A leftover of a run that was killed while it wrote.
        if let Err(error) = fs::remove_file(&self.new_path)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
        let mut new = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&self.new_path)?;
        if let Some(present) = self.present.as_mut().filter(|_| self.same > 0) {
            present.seek(SeekFrom::Start(0))?;
            let copied = io::copy(&mut present.take(self.same), &mut new)?;
            if copied != self.same {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        self.new = Some(new);
        Ok(())
    }

    fn finish(mut self) -> io::Result<()> {
        if self.new.is_none() {
            let is_at_its_end = |file: &mut File| file.read(&mut [0]).is_ok_and(|read| read == 0);
            if self.present.as_mut().is_some_and(is_at_its_end) {
                return Ok(());
            }
            self.begin()?;
        }
        fs::rename(&self.new_path, self.path)
    }
}

impl Write for Replacement<'_> {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        if self.new.is_none() {
            if self.goes_on_with(text) {
                self.same += text.len() as u64;
                return Ok(text.len());
            }
            self.begin()?;
        }
        match &mut self.new {
            Some(new) => new.write(text),
            None => Ok(0),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// Writes a text in pieces; whether the file was made anew.
    fn written(path: &Path, text: &[u8]) -> bool {
        let inode = || fs::metadata(path).map(|meta| meta.ino()).ok();
        let before = inode();
        replace(path, |out| {
            text.chunks(1000).try_for_each(|part| out.write_all(part))
        })
        .unwrap();
        assert!(fs::read(path).unwrap() == text);
        assert_eq!(fs::metadata(path).unwrap().mode() & 0o777, 0o600);
        inode() != before
    }

    #[test]
    fn a_file_is_written_only_if_its_text_has_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let long: Vec<u8> = (0..3 * BUFFER + 7).map(|n| b'a' + (n % 23) as u8).collect();
        let changed = |at: usize| {
            let mut text = long.clone();
            text[at] = b'-';
            text
        };
        assert!(written(&path, &long));
        assert!(!written(&path, &long));
        for text in [
            changed(0),
            changed(BUFFER - 1),
            changed(BUFFER),
            changed(long.len() - 1),
            // Shorter and longer ones with the same beginning.
            long[..1].to_vec(),
            long[..BUFFER].to_vec(),
            long[..2 * BUFFER].to_vec(),
            [&long[..], b"x"].concat(),
            Vec::new(),
        ] {
            assert!(written(&path, &text));
            assert!(!written(&path, &text));
            assert!(written(&path, &long));
        }
        // A leftover does not stop it, and a file that others can read is replaced.
        fs::write(path.with_extension("json.new"), "half").unwrap();
        assert!(written(&path, b"other"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(written(&path, b"other"));
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(names.len(), 1);
    }

    #[test]
    fn a_text_that_fails_leaves_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        assert!(written(&path, b"before"));
        let half = replace(&path, |out| {
            out.write_all(&vec![b'x'; 2 * BUFFER])?;
            Err(io::Error::other("no more"))
        });
        assert!(half.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"before");
        assert!(written(&path, b"after"));
    }
}
