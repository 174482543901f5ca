//! Access to the files of the kernel and the host.
//!
//! Paths are given relative to the root (`proc/irq/24/smp_affinity_list`), so that a captured tree
//! can stand in for a host (`--sysroot DIR`, as lscpu and lsmem have).

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::cpuset::CpuSet;
use crate::error::{Error, Result};

/// The root of the host's files: `/`, or a captured tree. It only reads.
#[derive(Debug, Clone)]
pub struct Sysroot {
    root: PathBuf,
}

/// How much of a file is read at once: as much as the kernel gives of a sysfs attribute.
const PAGE: usize = 4096;
/// How much of a file is read at once if it is handled line by line.
const LINES_BUFFER: usize = 64 * 1024;

impl Default for Sysroot {
    fn default() -> Self {
        Self::new("/")
    }
}

impl Sysroot {
    /// A root at `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Whether this is the running host, so that system calls and files refer to the same objects.
    pub fn is_live(&self) -> bool {
        self.root == Path::new("/")
    }

    /// The full path of `path`; a leading slash counts for nothing, so links read from the host fit
    /// too.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        let below = path.strip_prefix("/").unwrap_or(path);
        match below.to_str().filter(|text| text.contains(STAND_INS)) {
            Some(text) => self.root.join(OsStr::from_bytes(&bytes_of(text))),
            None => self.root.join(below),
        }
    }

    /// Whether anything is at `path`.
    pub fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.path(path).exists()
    }

    /// A whole file as text. Bytes that are not UTF-8 (a thread may have any name) become
    /// U+FFFD.
    ///
    /// # Errors
    /// [`Error::Io`] with the path.
    pub fn read(&self, path: impl AsRef<Path>) -> Result<String> {
        self.read_until(path.as_ref(), false)
    }

    /// A file that the kernel hands out in one piece (a sysfs attribute, /proc/PID/stat): one read,
    /// no second one to see the end.
    ///
    /// # Errors
    /// [`Error::Io`] with the path.
    pub(crate) fn read_record(&self, path: impl AsRef<Path>) -> Result<String> {
        self.read_until(path.as_ref(), true)
    }

    /// A file of the kernel's as a value: one read, without the line's end; `None` if the file does
    /// not exist.
    ///
    /// # Errors
    /// [`Error::Io`] with the path, for anything but a file that does not exist.
    pub fn read_value(&self, path: impl AsRef<Path>) -> Result<Option<String>> {
        match self.read_record(path) {
            Ok(mut text) => {
                text.truncate(text.trim_end().len());
                Ok(Some(text))
            }
            Err(error) if error.is_gone() => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn read_until(&self, path: &Path, short_read_ends: bool) -> Result<String> {
        let path = self.path(path);
        let inner = || -> io::Result<String> {
            // Its buffer is not zeroed for each file.
            let mut file = BufReader::with_capacity(PAGE, File::open(&path)?);
            let first = file.fill_buf()?;
            if first.is_empty() || (short_read_ends && first.len() < PAGE) {
                return Ok(text(first).into_owned());
            }
            let mut bytes = Vec::new();
            if !short_read_ends {
                file.read_to_end(&mut bytes)?;
                return Ok(text(&bytes).into_owned());
            }
            loop {
                let page = file.fill_buf()?;
                let read = page.len();
                bytes.extend_from_slice(page);
                file.consume(read);
                if read < PAGE {
                    return Ok(text(&bytes).into_owned());
                }
            }
        };
        inner().map_err(|source| Error::io(path.clone(), "read", source))
    }

    /// Passes each line of a file to `each`, without keeping the file in memory.
    ///
    /// # Errors
    /// [`Error::Io`] with the path.
    pub fn for_each_line(&self, path: impl AsRef<Path>, mut each: impl FnMut(&str)) -> Result<()> {
        let path = self.path(path);
        let mut inner = || -> io::Result<()> {
            let mut file = BufReader::with_capacity(LINES_BUFFER, File::open(&path)?);
            let mut line = Vec::new();
            while file.read_until(b'\n', &mut line)? > 0 {
                each(text(&line).trim_end_matches('\n'));
                line.clear();
            }
            Ok(())
        };
        inner().map_err(|source| Error::io(path.clone(), "read", source))
    }

    /// The names in a folder, sorted; numbers by their value (`2` before `10`). In a name that is not
    /// UTF-8 characters of a private range stand for the bytes that are none, so that
    /// [`path`](Self::path) finds the file.
    ///
    /// # Errors
    /// [`Error::Io`] with the path.
    pub fn names(&self, path: impl AsRef<Path>) -> Result<Vec<String>> {
        let path = self.path(path);
        let list = || -> io::Result<Vec<(u64, String)>> {
            fs::read_dir(&path)?
                .map(|entry| {
                    let name = match entry?.file_name().into_string() {
                        Ok(name) => name,
                        Err(name) => with_stand_ins(name.as_bytes()),
                    };
                    Ok((name.parse().unwrap_or(u64::MAX), name))
                })
                .collect()
        };
        let mut names = list().map_err(|source| Error::io(path.clone(), "list", source))?;
        names.sort_unstable();
        Ok(names.into_iter().map(|(_, name)| name).collect())
    }

    /// The last component a symbolic link points at (`driver`, `iommu_group`); `None` if there
    /// is none.
    pub(crate) fn link_name(&self, path: impl AsRef<Path>) -> Option<String> {
        let target = fs::read_link(self.path(path)).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    }
}

/// Whether a character stands for a byte that is not UTF-8: U+F780 for 0x80 and so on, as in MirBSD's
/// OPTU-8.
const STAND_INS: fn(char) -> bool = |c| ('\u{f780}'..='\u{f7ff}').contains(&c);

/// A name with stand-ins for the bytes that are not UTF-8.
fn with_stand_ins(name: &[u8]) -> String {
    let mut text = String::with_capacity(name.len());
    for chunk in name.utf8_chunks() {
        text.push_str(chunk.valid());
        let stand_in = |byte: &u8| char::from_u32(0xf700 + u32::from(*byte));
        text.extend(chunk.invalid().iter().filter_map(stand_in));
    }
    text
}

/// The bytes of a name that may have stand-ins.
fn bytes_of(name: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(name.len());
    for c in name.chars() {
        match u8::try_from(u32::from(c).wrapping_sub(0xf700)) {
            Ok(byte) if STAND_INS(c) => bytes.push(byte),
            _ => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    bytes
}

/// Reads a kernel file's CPU list. It ends at the first control character, as hwloc and lscpu, which
/// read it as a C string, end it at a NUL; those in front of it are skipped.
pub(crate) fn cpu_list(object: &str, text: &str) -> Result<CpuSet> {
    let list = text.trim_start_matches(char::is_control);
    let list = list.split(char::is_control).next().unwrap_or_default();
    CpuSet::from_kernel_list(list).map_err(|source| Error::Cpus {
        object: object.to_owned(),
        source,
    })
}

/// Bytes as text; those that are not UTF-8 become U+FFFD.
fn text(bytes: &[u8]) -> Cow<'_, str> {
    // Faster than the lossy conversion, which is rarely needed.
    match std::str::from_utf8(bytes) {
        Ok(text) => text.into(),
        Err(_) => String::from_utf8_lossy(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_sort_by_number() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["10", "2", "default_smp_affinity"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(
            Sysroot::new(dir.path()).names("").unwrap(),
            ["2", "10", "default_smp_affinity"]
        );
    }

    #[test]
    fn a_name_that_is_not_utf_8_leads_back_to_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let root = Sysroot::new(dir.path());
        let names: [&[u8]; 4] = [b"a\xff\x80b", "ä.slice".as_bytes(), b"\xc3", b"plain"];
        for name in names {
            fs::create_dir(dir.path().join(OsStr::from_bytes(name))).unwrap();
            fs::write(dir.path().join(OsStr::from_bytes(name)).join("x"), name).unwrap();
        }
        let listed = root.names("").unwrap();
        assert_eq!(listed.len(), names.len());
        for name in listed {
            let path = root.path(format!("{name}/x"));
            let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{name:?}: {error}"));
            assert_eq!(bytes_of(&name), bytes);
        }
    }

    #[test]
    fn a_missing_file_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let root = Sysroot::new(dir.path());
        let error = root.read("online").unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "{}: read: No such file or directory",
                dir.path().join("online").display()
            )
        );
    }

    #[test]
    fn a_list_ends_at_a_control_character() {
        for (text, cpus) in [
            ("0-3\n", "0-3"),
            ("0-3\0", "0-3"),
            ("0-3\0garbage", "0-3"),
            ("\u{1b}0-3\u{1}\n", "0-3"),
            ("\0\n", ""),
            ("", ""),
        ] {
            assert_eq!(cpu_list("x", text).unwrap().to_string(), cpus, "{text:?}");
        }
        assert!(cpu_list("x", "0-3x").is_err());
    }

    #[test]
    fn long_files_and_odd_bytes_are_read_whole() {
        let dir = tempfile::tempdir().unwrap();
        let root = Sysroot::new(dir.path());
        fs::write(dir.path().join("long"), "x".repeat(10_000)).unwrap();
        assert_eq!(root.read("long").unwrap().len(), 10_000);
        assert_eq!(root.read_record("/long").unwrap().len(), 10_000);
        fs::write(dir.path().join("odd"), b"a\xffb\n").unwrap();
        assert_eq!(root.read_value("odd").unwrap().unwrap(), "a\u{fffd}b");
    }
}
