//! What `--json` prints has at least what it had in earlier versions: keys, types and words.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pinfold_lab::Host;
use serde_json::Value;

crate::stories![only trixie: json_keeps_its_shape];

/// The commands that print it, one file each in /tmp/frozen/json.
const SCRIPT: &str = include_str!("frozen.sh");

/// Keys whose texts programs compare.
const WORDS: [&str; 15] = [
    "can_go_offline",
    "check",
    "class",
    "isolation",
    "kind",
    "knob",
    "level",
    "method",
    "movable",
    "outcome",
    "owner",
    "phase",
    "state",
    "step",
    "tool",
];

/// Each place in a value, `/steps/[]/step`, with its type, and with its text if that is a word.
fn shape(value: &Value, place: &str, shape_so_far: &mut BTreeSet<String>) {
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    shape_so_far.insert(format!("{place}: {kind}"));
    match value {
        Value::String(text) if WORDS.iter().any(|key| place.ends_with(&format!("/{key}"))) => {
            shape_so_far.insert(format!("{place}: {text}"));
        }
        Value::Array(values) => {
            for value in values {
                shape(value, &format!("{place}/[]"), shape_so_far);
            }
        }
        Value::Object(fields) => {
            for (key, value) in fields {
                shape(value, &format!("{place}/{key}"), shape_so_far);
            }
        }
        _ => {}
    }
}

fn shape_of(json: &[u8]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    shape(
        &serde_json::from_slice(json).unwrap_or_default(),
        "",
        &mut found,
    );
    found
}

/// The files of all earlier versions.
fn frozen() -> Vec<PathBuf> {
    let versions = Path::new(env!("CARGO_MANIFEST_DIR")).join("../core/tests/frozen");
    let folders = fs::read_dir(versions).unwrap();
    let folders = folders.map(|version| version.unwrap().path().join("json"));
    let files = folders
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flatten();
    files.map(|file| file.unwrap().path()).collect()
}

/// What is not there any more, since there is nothing to print: no name has changed. Each stands for all that begin so.
const NOTHING_TO_PRINT: [&str; 8] = [
    // A process with a time limit compacts memory; nothing of it is restored.
    "hook-pre-start-hotplug.json/changes/[]",
    "hook-pre-start-partition.json/changes/[]/knob/trigger: string",
    "hook-pre-start-partition.json/changes/[]/step: caches",
    // In this state all CPUs are released already; recover used to look at the slices once more.
    "hook-recover-idle.json/changes/[]/knob/cgroup-cpus: string",
    "hook-recover-idle.json/changes/[]/knob/unit-cpus: string",
    "hook-recover-idle.json/changes/[]/step: slices",
    "hook-recover-idle.json/steps/[]/step: slices",
    "hook-recover-idle.json/steps/[]/step: tasks",
];

fn json_keeps_its_shape(host: &mut Host) {
    let script = ["/bin/sh", "-c", SCRIPT];
    let output = host.spawn(&script, Duration::from_secs(900)).unwrap();
    println!("{}", output.wait().unwrap().stderr);
    let mut faults = Vec::new();
    for file in frozen() {
        let name = file.file_name().unwrap().to_str().unwrap();
        let today = host
            .get(&format!("/tmp/frozen/json/{name}"))
            .unwrap_or_default();
        let (before, today) = (shape_of(&fs::read(&file).unwrap()), shape_of(&today));
        let missing = before
            .difference(&today)
            .map(|place| format!("{name}{place}"))
            .filter(|place| !NOTHING_TO_PRINT.iter().any(|gone| place.starts_with(gone)));
        faults.extend(missing);
    }
    assert!(faults.is_empty(), "missing: {faults:#?}");
}
