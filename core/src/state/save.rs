//! What a single tool changed, kept in a file of the user's (`--save`), and put back from it
//! (`--restore`).

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json as json;

use crate::error::{Error, Result};
use crate::host::Host;
use crate::knob::Knob;
use crate::knob::{Applied, Change, Outcome, Value, apply_one};

use super::{newer, trust};

/// The layout of the file. A later version may have a higher number.
const VERSION: u64 = 1;

/// One knob as it was before, and what it was set to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct Entry {
    /// The knob.
    pub knob: Knob,
    /// Its name for people.
    pub label: Arc<str>,
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

impl newer::Saved for Unchecked {
    type Entry = Entry;

    fn knob(&self) -> &Knob {
        &self.knob
    }

    fn values(&self) -> impl Iterator<Item = &str> {
        [self.before.as_str(), self.set.as_str()].into_iter()
    }
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
            label: label.into(),
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

#[derive(Serialize)]
struct Saved {
    version: u64,
    tool: String,
    entries: Vec<Entry>,
}

/// What is in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restorable {
    /// What this version can restore.
    pub entries: Vec<Entry>,
    /// What else a later version of the tool has saved, if anything.
    pub newer: Option<String>,
}

/// Writes the file, before the first change is made. It must be new: the values of an earlier run
/// are not written over.
///
/// # Errors
/// [`Error::Unusable`] if the file exists already, [`Error::Io`] if it cannot be written.
pub fn write(path: &Path, tool: &str, entries: Vec<Entry>) -> Result<()> {
    let text =
        to_text(tool, entries).map_err(|why| Error::malformed(path.display().to_string(), why))?;
    let Some(name) = path.file_name() else {
        let why = "save: not a file name";
        return Err(Error::unusable(path.display().to_string(), why));
    };
    // Under a name of its own until it is whole: half a file would block the next run.
    let mut new = OsString::from(".");
    new.push(name);
    new.push(".new");
    let new = path.with_file_name(new);
    let written = write_new(&new, &text).and_then(|()| rename_to_new(&new, path));
    if written.is_err() {
        // Nothing more can be done about it.
        let _ = fs::remove_file(&new);
    }
    match written {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let why = "save: the file holds values of an earlier run; --restore it first, or name another file";
            Err(Error::unusable(path.display().to_string(), why))
        }
        other => other.map_err(|source| Error::io(path, "save", source)),
    }
}

fn write_new(path: &Path, text: &str) -> io::Result<()> {
    // A leftover of a run that was killed while it wrote.
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// Renames a file, unless the new name is taken; on disk when this returns.
fn rename_to_new(from: &Path, to: &Path) -> io::Result<()> {
    // A second name instead of renameat2(2), which not every file system has.
    fs::hard_link(from, to)?;
    fs::remove_file(from)?;
    let folder = match to.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    fs::File::open(folder)?.sync_all()
}

/// Removes the file after everything in it was restored.
///
/// # Errors
/// [`Error::Io`] if it cannot be removed.
pub fn remove(path: &Path) -> Result<()> {
    fs::remove_file(path).map_err(|source| Error::io(path, "remove", source))
}

/// Reads the file that `tool` wrote. It decides what root writes, so only root may have written it,
/// and it contains only knobs of the tool.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::Unusable`] if it is not
/// [root's alone](super::trust), [`Error::Malformed`] if it is not such a file.
pub fn read(path: &Path, tool: &str, is_own: impl Fn(&Knob) -> bool) -> Result<Restorable> {
    let malformed = |why| Error::malformed(path.display().to_string(), why);
    let text = trust::read_typed(path).map_err(|error| match error {
        Error::Io { source, .. } => Error::io(path, "restore", source),
        other => other,
    })?;
    let saved = parse(&text, tool).map_err(malformed)?;
    match saved.entries.iter().find(|entry| !is_own(&entry.knob)) {
        None => Ok(saved),
        Some(Entry { knob, .. }) => Err(malformed(format!("{tool} does not set this: {knob}"))),
    }
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

/// Reads the file's text. Of one that a later version has written, what this one knows.
///
/// # Errors
/// Why it is none that `tool` wrote.
pub fn parse(text: &str, tool: &str) -> std::result::Result<Restorable, String> {
    let bad = |why: &str| format!("not a --save file: {why}");
    let raw = serde_json::from_str(text).map_err(|error| bad(&error.to_string()))?;
    let json::Value::Object(mut fields) = raw else {
        return Err(bad("it is not a JSON object"));
    };
    let (Some(version), Some(json::Value::String(of)), Some(json::Value::Array(all))) = (
        fields
            .remove("version")
            .and_then(|version| version.as_u64()),
        fields.remove("tool"),
        fields.remove("entries"),
    ) else {
        return Err(bad("version, tool or entries is missing"));
    };
    if version < VERSION {
        return Err(bad(&format!("version {version} is not supported")));
    }
    if of != tool {
        return Err(format!("saved by {of}; restore it with {of}"));
    }
    let is_newer = version > VERSION;
    let (mut entries, mut whole, mut newer) = (Vec::new(), Vec::new(), Vec::new());
    for raw in all {
        match newer::entry::<Unchecked>(&raw, is_newer).map_err(|why| bad(&why))? {
            Some((entry, unknown)) => {
                newer.extend(
                    unknown
                        .names()
                        .map(|name| format!("{name:?} of {}", entry.knob)),
                );
                entries.push(entry);
            }
            None => whole.push(raw),
        }
    }
    if !whole.is_empty() {
        newer.insert(0, format!("values of {}", newer::kinds(&whole)));
    }
    newer.extend(fields.keys().map(|name| format!("the field {name:?}")));
    newer.extend(is_newer.then(|| format!("version {version} of the file")));
    Ok(Restorable {
        entries,
        newer: (!newer.is_empty()).then(|| newer.join("; ")),
    })
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
    let restoring = |found: Value| Change {
        knob,
        label,
        found,
        wanted: before,
    };
    match found {
        Err(error) => Applied {
            change: restoring(Value::text("")),
            outcome: Outcome::Failed(error.to_string()),
        },
        Ok(None) => Applied {
            change: restoring(Value::text("")),
            outcome: Outcome::Gone,
        },
        Ok(Some(found)) => {
            let change = restoring(found);
            if change.found != set && !change.is_noop() {
                let outcome =
                    Outcome::Foreign(format!("it was set to {set} and is now {}", change.found));
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
            label: format!("IRQ {irq}").into(),
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
            read(&file, "governor", |_| true)
                .unwrap_err()
                .to_string()
                .contains("saved by pin-irqs")
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "and proc");

        let texts = |dry_run| -> Vec<String> {
            let entries = read(&file, "pin-irqs", |knob| matches!(knob, Knob::Irq(_)));
            restore(&root, entries.unwrap().entries, dry_run)
                .iter()
                .map(ToString::to_string)
                .collect()
        };
        let expected = [
            "IRQ 9: gone",
            "IRQ 4: already 0-23",
            "IRQ 3: left as it is: it was set to 0-5 and is now 7",
            "IRQ 2: 0-5 -> 0-23",
            "IRQ 1: 0-5 -> 0-23",
        ];
        assert_eq!(texts(true), expected);
        assert_eq!(texts(false), expected);
        assert_eq!(texts(false)[3], "IRQ 2: already 0-23");
    }

    #[test]
    fn a_run_that_was_killed_while_it_saved_blocks_none() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("saved");
        fs::write(dir.path().join(".saved.new"), "{\"version\":1,\"to").unwrap();
        write(&file, "pin-irqs", vec![]).unwrap();
        assert!(
            read(&file, "pin-irqs", |_| true)
                .unwrap()
                .entries
                .is_empty()
        );
        // Whole or not at all, and no other name is left.
        let names = || fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(names(), 1);
        let text = fs::read_to_string(&file).unwrap();
        write(&file, "governor", vec![]).unwrap_err();
        assert_eq!((names(), fs::read_to_string(&file).unwrap()), (1, text));
        assert!(write(Path::new(".."), "governor", vec![]).is_err());
    }

    #[test]
    fn a_file_restores_only_what_its_tool_sets() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("saved");
        let entry = |knob: Knob, value: &str| Entry {
            before: knob.parse(value).unwrap(),
            set: knob.parse(value).unwrap(),
            label: "IRQ 24".into(),
            knob,
        };
        let made_up = vec![
            entry(Knob::Irq(24), "0-5"),
            entry(Knob::Sysctl("kernel/core_pattern".into()), "|/tmp/x"),
        ];
        write(&file, "pin-irqs", made_up).unwrap();
        let is_own = |knob: &Knob| matches!(knob, Knob::Irq(_) | Knob::DefaultIrq);
        let why = read(&file, "pin-irqs", is_own).unwrap_err().to_string();
        assert!(
            why.ends_with("saved: pin-irqs does not set this: kernel.core_pattern"),
            "{why}"
        );
        fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
        let why = read(&file, "pin-irqs", |_| true).unwrap_err().to_string();
        assert!(why.contains("group or others can write it"), "{why}");
    }

    #[test]
    fn other_files_are_refused() {
        for text in [
            "",
            "{}",
            "[]",
            "{\"version\":0,\"tool\":\"t\",\"entries\":[]}",
            "{\"version\":2,\"tool\":\"x\",\"entries\":[]}",
            "{\"version\":2,\"tool\":\"t\"}",
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
            // No matter how new.
            for version in [1, 2] {
                let leaving =
                    format!(r#"{{"version":{version},"tool":"t","x":1,"entries":[{entry}]}}"#);
                let why = parse(&leaving, "t").unwrap_err();
                assert!(why.contains("leaves its folder"), "{why}");
            }
        }
    }

    #[test]
    fn of_a_later_versions_file_what_is_known_is_restored() {
        let irq = r#"{"knob":{"irq":24},"label":"IRQ 24","before":"0-5","set":"0"}"#;
        let newer_field = irq
            .replace("24", "25")
            .replace("\"set\"", "\"how\":1,\"set\"");
        let newer_value = irq.replace("24", "26").replace("0-5", "all but 3");
        let newer_knob = irq.replace("\"irq\":24", "\"irq-thread\":24");
        let knows = |text: &str| {
            let Restorable { entries, newer } = parse(text, "t").unwrap();
            let knobs: Vec<String> = entries.iter().map(|entry| entry.knob.to_string()).collect();
            (knobs.join(", "), newer.unwrap_or_default())
        };
        let file = |version: u32, field: &str, entries: &[&str]| {
            let entries = entries.join(",");
            knows(&format!(
                r#"{{"version":{version},"tool":"t"{field},"entries":[{entries}]}}"#
            ))
        };
        let restored = |knobs: &str, newer: &str| (knobs.to_owned(), newer.to_owned());
        assert_eq!(file(1, "", &[irq]), restored("IRQ 24", ""));
        assert_eq!(
            file(2, "", &[irq]),
            restored("IRQ 24", "version 2 of the file")
        );
        let field = r#","boot":"x""#;
        assert_eq!(
            file(1, field, &[irq]),
            restored("IRQ 24", "the field \"boot\"")
        );
        assert_eq!(
            file(1, "", &[irq, &newer_field]),
            restored("IRQ 24, IRQ 25", "\"how\" of IRQ 25")
        );
        assert_eq!(
            file(1, "", &[&newer_value, &newer_knob, irq]),
            restored("IRQ 24", "values of \"irq\" (1), \"irq-thread\" (1)")
        );
        // In a format of its own an entry may be anything.
        assert_eq!(
            file(2, "", &["7", irq]),
            restored("IRQ 24", "values of \"\" (1); version 2 of the file")
        );
        assert!(parse(r#"{"version":1,"tool":"t","entries":[7]}"#, "t").is_err());
    }
}
