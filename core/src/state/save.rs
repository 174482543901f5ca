//! What a single tool changed, kept in a file of the user's (`--save`), and put back from it
//! (`--restore`).

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::host::Host;
use crate::knob::Knob;
use crate::knob::{Applied, Change, Outcome, Value, apply_one};

/// The layout of the file; another number is refused.
const VERSION: u32 = 1;

/// One knob as it was before, and what it was set to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct Entry {
    /// The knob.
    pub knob: Knob,
    /// Its name for people.
    pub label: String,
    /// Its value before.
    pub before: Value,
    /// What it was set to.
    pub set: Value,
}

/// An entry as it is in the file. To be restored, its knob and values must not leave their folders.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Unchecked {
    knob: Knob,
    label: String,
    before: String,
    set: String,
}

impl TryFrom<Unchecked> for Entry {
    type Error = Error;

    fn try_from(unchecked: Unchecked) -> Result<Self> {
        let Unchecked {
            knob,
            label,
            before,
            set,
        } = unchecked;
        knob.check()?;
        Ok(Self {
            before: knob.parse_checked(&before)?,
            set: knob.parse_checked(&set)?,
            knob,
            label,
        })
    }
}

impl From<&Change> for Entry {
    fn from(change: &Change) -> Self {
        Self {
            knob: change.knob.clone(),
            label: change.label.clone(),
            before: change.found.clone(),
            set: change.wanted.clone(),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    version: u32,
    tool: String,
    entries: Vec<Entry>,
}

/// Writes the file, before the first change is made. It must be new: the values of an earlier run
/// are not written over.
///
/// # Errors
/// [`Error::Unusable`] if the file exists already, [`Error::Io`] if it cannot be written.
pub fn write(path: &Path, tool: &str, entries: Vec<Entry>) -> Result<()> {
    let io = |tried: &str, source| Error::io(path, tried, source);
    let mut file = match OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
    {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            let why = "save: it holds the values of an earlier run; --restore it first, or name another file";
            return Err(Error::unusable(path.display().to_string(), why));
        }
        other => other.map_err(|source| io("save", source))?,
    };
    let text =
        to_text(tool, entries).map_err(|why| Error::malformed(path.display().to_string(), why))?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(|source| io("save", source))
}

/// Removes the file after everything in it was restored.
///
/// # Errors
/// [`Error::Io`] if it cannot be removed.
pub fn remove(path: &Path) -> Result<()> {
    fs::remove_file(path).map_err(|source| Error::io(path, "remove", source))
}

/// Reads the file that `tool` wrote.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::Malformed`] if it is not such a file.
pub fn read(path: &Path, tool: &str) -> Result<Vec<Entry>> {
    let text = fs::read_to_string(path).map_err(|source| Error::io(path, "restore", source))?;
    parse(&text, tool).map_err(|why| Error::malformed(path.display().to_string(), why))
}

/// The file's text, which [`parse`] reads.
///
/// # Errors
/// If the entries cannot be written as JSON.
pub fn to_text(tool: &str, entries: Vec<Entry>) -> std::result::Result<String, String> {
    let saved = Saved {
        version: VERSION,
        tool: tool.to_owned(),
        entries,
    };
    serde_json::to_string_pretty(&saved).map_err(|error| error.to_string())
}

/// Reads the file's text.
///
/// # Errors
/// Why it is none that `tool` wrote.
pub fn parse(text: &str, tool: &str) -> std::result::Result<Vec<Entry>, String> {
    let saved: Saved =
        serde_json::from_str(text).map_err(|error| format!("no file of --save: {error}"))?;
    if saved.version != VERSION {
        return Err(format!(
            "version {} of the file; this is for version {VERSION}",
            saved.version
        ));
    }
    if saved.tool != tool {
        return Err(format!("saved by {0}; restore it with {0}", saved.tool));
    }
    Ok(saved.entries)
}

/// Puts the values back, last change first. One that another program has set since is not changed.
pub fn restore(root: &Host, entries: Vec<Entry>, dry_run: bool) -> Vec<Applied> {
    entries
        .into_iter()
        .rev()
        .map(|entry| restore_one(root, entry, dry_run))
        .collect()
}

fn restore_one(root: &Host, entry: Entry, dry_run: bool) -> Applied {
    let Entry {
        knob,
        label,
        before,
        set,
    } = entry;
    let found = knob.read(root);
    let change = |found: Value| Change {
        knob,
        label,
        found,
        wanted: before,
    };
    match found {
        Err(error) => Applied {
            change: change(Value::text("")),
            outcome: Outcome::Failed(error.to_string()),
        },
        Ok(None) => Applied {
            change: change(Value::text("")),
            outcome: Outcome::Gone,
        },
        Ok(Some(found)) => {
            let change = change(found);
            if change.found != set && !change.is_noop() {
                let outcome = Outcome::Foreign(format!(
                    "it was set to {set} and holds {} now",
                    change.found
                ));
                Applied { change, outcome }
            } else if dry_run && !change.is_noop() {
                Applied {
                    change,
                    outcome: Outcome::Planned,
                }
            } else {
                apply_one(root, change)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuset::CpuSet;

    #[test]
    fn back_and_forth() {
        let dir = tempfile::tempdir().unwrap();
        let root = Host::new(dir.path());
        for (irq, value) in [(1, "0-5"), (2, "0-5"), (3, "7"), (4, "0-23")] {
            let folder = dir.path().join(format!("proc/irq/{irq}"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("smp_affinity_list"), value).unwrap();
        }
        let entry = |irq| Entry {
            knob: Knob::Irq(irq),
            label: format!("IRQ {irq}"),
            before: CpuSet::range(0, 23).into(),
            set: CpuSet::range(0, 5).into(),
        };
        let file = dir.path().join("saved");
        write(&file, "pin-irqs", [1, 2, 3, 4, 9].map(entry).into()).unwrap();
        assert!(
            write(&file, "pin-irqs", vec![])
                .unwrap_err()
                .to_string()
                .contains("earlier run")
        );
        assert!(
            read(&file, "governor")
                .unwrap_err()
                .to_string()
                .contains("saved by pin-irqs")
        );

        let texts = |dry_run| -> Vec<String> {
            restore(&root, read(&file, "pin-irqs").unwrap(), dry_run)
                .iter()
                .map(ToString::to_string)
                .collect()
        };
        let expected = [
            "IRQ 9: gone",
            "IRQ 4: already 0-23",
            "IRQ 3: left as it is: it was set to 0-5 and holds 7 now",
            "IRQ 2: 0-5 -> 0-23",
            "IRQ 1: 0-5 -> 0-23",
        ];
        assert_eq!(texts(true), expected);
        assert_eq!(texts(false), expected);
        assert_eq!(texts(false)[3], "IRQ 2: already 0-23");
    }

    #[test]
    fn other_files_are_refused() {
        for text in [
            "",
            "{}",
            "[]",
            "{\"version\":2,\"tool\":\"t\",\"entries\":[]}",
            "{\"version\":1,\"tool\":\"x\",\"entries\":[]}",
        ] {
            assert!(parse(text, "t").is_err(), "{text}");
        }
        for (knob, before, set) in [
            (r#"{"sysctl":"../x"}"#, "", ""),
            (r#"{"pci-driver":"0000:01:00.0"}"#, "../../x", "none"),
            (r#"{"cgroup-of":{"pid":1,"tid":1,"start":1}}"#, "/", "/../x"),
        ] {
            let entry =
                format!(r#"{{"knob":{knob},"label":"","before":"{before}","set":"{set}"}}"#);
            let leaving = format!(r#"{{"version":1,"tool":"t","entries":[{entry}]}}"#);
            let why = parse(&leaving, "t").unwrap_err();
            assert!(why.contains("leaves its folder"), "{why}");
        }
    }
}
