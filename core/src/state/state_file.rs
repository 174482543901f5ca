//! What is in state.json: a reservation per VM, and the baseline. `R` is hook's, see its
//! state/reservation.rs.

use std::collections::BTreeMap;
use std::io::Write;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::baseline::{Baseline, Entry, Unchecked};
use super::newer::{self, Newer, Unique, Unread};

/// The layout of the state file. A later version may have a higher number.
const VERSION: u64 = 1;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OnDisk<R, E = Entry> {
    version: u64,
    reservations: BTreeMap<u32, R>,
    baseline: Vec<E>,
}

/// What is in the state. `R` is what is kept per VM, by its number.
#[derive(Debug, Clone, PartialEq)]
pub struct State<R> {
    /// What is kept per VM.
    pub reservations: BTreeMap<u32, R>,
    /// The earlier values of every touched knob.
    pub baseline: Baseline,
    /// What a later version of the program keeps in it, and this one does not know.
    pub newer: Newer,
}

impl<R> Default for State<R> {
    fn default() -> Self {
        Self {
            reservations: BTreeMap::new(),
            baseline: Baseline::default(),
            newer: Newer::default(),
        }
    }
}

impl<R: Serialize + DeserializeOwned> State<R> {
    /// Reads the text of a state file. Of one that a later version has written, what this one knows.
    ///
    /// # Errors
    /// Why it is none, or cannot be trusted.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        let error = match serde_json::from_str::<OnDisk<R>>(text) {
            Ok(state) if state.version == VERSION => {
                return Ok(Self {
                    reservations: state.reservations,
                    baseline: Baseline::from_entries(state.baseline),
                    newer: Newer::default(),
                });
            }
            Ok(state) => format!("version {} is not supported", state.version),
            Err(error) => error.to_string(),
        };
        let bad = |why: String| format!("not a hook state file: {why}");
        match Self::parse_newer(text).map_err(bad)? {
            state if state.newer.is_empty() => Err(bad(error)),
            state => Ok(state),
        }
    }

    fn parse_newer(text: &str) -> std::result::Result<Self, String> {
        let Unique(raw) = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let Value::Object(mut fields) = raw else {
            return Err("it is not a JSON object".into());
        };
        let (Some(version), Some(Value::Object(reservations)), Some(Value::Array(entries))) = (
            fields
                .remove("version")
                .and_then(|version| version.as_u64()),
            fields.remove("reservations"),
            fields.remove("baseline"),
        ) else {
            return Err("version, reservations or baseline is missing".into());
        };
        if version < VERSION {
            return Err(format!("versions below {VERSION} are not supported"));
        }
        let is_newer = version > VERSION;
        let mut newer = Newer {
            version: is_newer.then_some(version),
            fields,
            ..Newer::default()
        };
        let mut known = BTreeMap::new();
        for (key, raw) in reservations {
            // As it is written: two keys of one VM would be one reservation lost.
            let vmid: u32 = (key.parse().ok())
                .filter(|vmid: &u32| vmid.to_string() == key)
                .ok_or_else(|| format!("{key:?} is not a VM's number"))?;
            match newer::read::<R>(&raw) {
                Ok((reservation, unknown)) => {
                    if !unknown.is_empty() {
                        let written = serde_json::to_value(&reservation);
                        let unknown = unknown.note(&written.map_err(|error| error.to_string())?);
                        newer.reservations.insert(vmid, unknown);
                    }
                    known.insert(vmid, reservation);
                }
                Err(Unread::Malformed(why)) if !is_newer => {
                    return Err(format!("the reservation of VM {vmid}: {why}"));
                }
                Err(_) => {
                    newer.whole_reservations.insert(vmid, raw);
                }
            }
        }
        let mut baseline = Vec::new();
        for raw in entries {
            match newer::entry::<Unchecked>(&raw, is_newer)? {
                Some((entry, unknown)) => {
                    if !unknown.is_empty() {
                        newer.entries.insert(entry.knob.clone(), unknown);
                    }
                    baseline.push(entry);
                }
                None => newer.whole_entries.push(raw),
            }
        }
        Ok(Self {
            reservations: known,
            baseline: Baseline::from_entries(baseline),
            newer,
        })
    }

    /// The text of a state file, which [`parse`](Self::parse) reads.
    ///
    /// # Errors
    /// If what is kept per VM cannot be written as JSON.
    pub fn to_text(&self) -> serde_json::Result<String> {
        let mut text = Vec::new();
        write_text(&mut text, &self.reservations, &self.baseline, &self.newer)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

/// Writes the text of a state file, of what this version knows as it is made.
pub(super) fn write_text<R: Serialize>(
    out: impl Write,
    reservations: &BTreeMap<u32, R>,
    baseline: &Baseline,
    newer: &Newer,
) -> serde_json::Result<()> {
    let known = OnDisk {
        version: newer.version.unwrap_or(VERSION),
        reservations: reservations
            .iter()
            .map(|(vmid, kept)| (*vmid, kept))
            .collect(),
        baseline: baseline.entries.values().collect(),
    };
    if newer.is_empty() {
        return serde_json::to_writer(out, &known);
    }
    let mut all = serde_json::to_value(&known)?;
    for (vmid, raw) in &newer.whole_reservations {
        let of_vms = &mut all["reservations"];
        if of_vms.get(vmid.to_string()).is_none() {
            of_vms[vmid.to_string()] = raw.clone();
        }
    }
    for (vmid, unknown) in &newer.reservations {
        if let Some(reservation) = all["reservations"].get_mut(vmid.to_string()) {
            unknown.put_back(reservation);
        }
    }
    if let Value::Array(entries) = &mut all["baseline"] {
        for (entry, knob) in entries.iter_mut().zip(baseline.entries.keys()) {
            if let Some(unknown) = newer.entries.get(knob) {
                unknown.put_back(entry);
            }
        }
        entries.extend(newer.whole_entries.iter().cloned());
    }
    for (name, value) in &newer.fields {
        all[name] = value.clone();
    }
    serde_json::to_writer(out, &all)
}
