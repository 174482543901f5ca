//! State that a later version of the program has saved: what this version knows is read, the rest is
//! kept as it is for that one, and named.
//!
//! This works because saved names are permanent: what has a name keeps its meaning in all versions,
//! and a new meaning gets a new name (docs/design.md, "State").

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{DeserializeOwned, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use serde_path_to_error::Segment;

use crate::error::Error;
use crate::knob::Knob;

/// Parts of a saved value that this version does not know, to be written back as they were.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Unknown(Vec<Part>);

#[derive(Debug, Clone, PartialEq)]
struct Part {
    /// Where it is, by keys from the outside in.
    path: Vec<String>,
    value: Value,
    /// What this version reads and writes in its place, if anything.
    read_as: Option<Value>,
}

/// A JSON value in which no object has a key twice: then it would depend on the reader which of the
/// two counts.
#[derive(Debug)]
pub(super) struct Unique(pub(super) Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON value")
            }

            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
                Ok(value.into())
            }

            fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
                Ok(value.into())
            }

            fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
                Ok(value.into())
            }

            fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
                Ok(value.into())
            }

            fn visit_str<E>(self, value: &str) -> Result<Value, E> {
                Ok(value.into())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
                let mut values = Vec::new();
                while let Some(Unique(value)) = list.next_element()? {
                    values.push(value);
                }
                Ok(values.into())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Value, A::Error> {
                let mut fields = Map::new();
                while let Some((key, Unique(value))) = object.next_entry::<String, _>()? {
                    if fields.contains_key(&key) {
                        return Err(A::Error::custom(format!("duplicate field `{key}`")));
                    }
                    fields.insert(key, value);
                }
                Ok(fields.into())
            }
        }

        deserializer.deserialize_any(Any).map(Self)
    }
}

/// Why a saved value cannot be read.
#[derive(Debug)]
pub(super) enum Unread {
    /// It has parts that this version does not know, and is nothing without them.
    Newer,
    /// It is damaged, or was not written by any version.
    Malformed(String),
}

/// Reads what this version knows of a value: without fields that it does not know, and with the
/// default of a field whose value it does not know.
///
/// # Errors
/// [`Unread`].
pub(super) fn read<T: DeserializeOwned>(raw: &Value) -> Result<(T, Unknown), Unread> {
    let mut known = raw.clone();
    let mut unknown = Unknown::default();
    loop {
        let error = match serde_path_to_error::deserialize(&known) {
            Ok(value) => return Ok((value, unknown)),
            Err(error) => error,
        };
        match take_unknown(&mut known, &error) {
            Some(part) => unknown.0.push(part),
            None if unknown.is_empty() => return Err(Unread::Malformed(error.to_string())),
            None => return Err(Unread::Newer),
        }
    }
}

/// Takes out what a value cannot be read for, if that is a field or an enum's value that this
/// version does not know.
fn take_unknown(
    value: &mut Value,
    error: &serde_path_to_error::Error<serde_json::Error>,
) -> Option<Part> {
    let text = error.inner().to_string();
    let mut path: Vec<String> = Vec::new();
    let mut segments = error.path().iter().peekable();
    while let Some(Segment::Map { key }) = segments.peek() {
        path.push(key.clone());
        segments.next();
    }
    if let Some(rest) = text.strip_prefix("unknown field `") {
        let name = rest.split('`').next().unwrap_or_default();
        // Within a list or an enum: all of that.
        if segments.peek().is_none() && path.last().is_none_or(|last| last != name) {
            path.push(name.to_owned());
        }
    } else if !text.starts_with("unknown variant `") {
        return None;
    }
    let (last, parents) = path.split_last()?;
    let taken = parents
        .iter()
        .try_fold(value, |value, key| value.get_mut(key))?
        .as_object_mut()?
        .remove(last)?;
    Some(Part {
        path,
        value: taken,
        read_as: None,
    })
}

impl Unknown {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a part is in this field.
    fn is_in(&self, field: &str) -> bool {
        self.0.iter().any(|part| part.path[0] == field)
    }

    /// The names of the parts.
    pub(super) fn names(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|part| part.path.join("."))
    }

    /// Notes what this version writes in the place of the parts.
    pub(super) fn note(mut self, written: &Value) -> Self {
        for part in &mut self.0 {
            part.read_as = (part.path.iter())
                .try_fold(written, |value, key| value.get(key))
                .cloned();
        }
        self
    }

    /// Puts the parts into a value that is to be written, except where this version has changed what
    /// it reads in their place.
    pub(super) fn put_back(&self, into: &mut Value) {
        for Part {
            path,
            value,
            read_as,
        } in &self.0
        {
            let Some((last, parents)) = path.split_last() else {
                continue;
            };
            let parent = (parents.iter()).try_fold(&mut *into, |value, key| value.get_mut(key));
            if let Some(Value::Object(parent)) = parent
                && parent.get(last) == read_as.as_ref()
            {
                parent.insert(last.clone(), value.clone());
            }
        }
    }
}

/// What an entry with a knob has in a file, before it is checked.
pub(super) trait Saved: DeserializeOwned {
    /// What it is when it was checked.
    type Entry: TryFrom<Self, Error = Error>;
    fn knob(&self) -> &Knob;
    fn values(&self) -> impl Iterator<Item = &str>;
}

/// Reads an entry; `None` if its knob, or a value of it, is one that this version does not know.
/// `is_newer` is for a file of a format that this version does not know.
///
/// # Errors
/// What is wrong with it.
pub(super) fn entry<S: Saved>(
    raw: &Value,
    is_newer: bool,
) -> Result<Option<(S::Entry, Unknown)>, String> {
    let (saved, unknown) = match read::<S>(raw) {
        Ok((_, unknown)) if unknown.is_in("knob") => return Ok(None),
        Ok(read) => read,
        Err(Unread::Malformed(why)) if !is_newer => return Err(why),
        Err(_) => return Ok(None),
    };
    let knob = saved.knob();
    knob.check().map_err(|error| error.to_string())?;
    if saved.values().any(|value| knob.parse(value).is_err()) {
        return Ok(None);
    }
    let entry = S::Entry::try_from(saved).map_err(|error| error.to_string())?;
    Ok(Some((entry, unknown)))
}

/// The kinds of knobs of entries that cannot be read, each with how many there are.
pub(super) fn kinds(entries: &[Value]) -> String {
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    for entry in entries {
        let kind = match entry.get("knob") {
            Some(Value::String(kind)) => kind,
            Some(Value::Object(knob)) => knob.keys().next().map_or("", String::as_str),
            _ => "",
        };
        *kinds.entry(kind).or_default() += 1;
    }
    let kinds: Vec<String> = (kinds.into_iter())
        .map(|(kind, count)| format!("{kind:?} ({count})"))
        .collect();
    kinds.join(", ")
}

/// What a later version of the program keeps in the state and this version does not know. All of it
/// is written back with the state. The state stays as long as there is something in it that a later
/// version can still restore: knobs, and reservations.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Newer {
    /// The file's version, if that is higher than this program's.
    pub(super) version: Option<u64>,
    /// Fields of the state itself.
    pub(super) fields: Map<String, Value>,
    /// Parts of reservations.
    pub(super) reservations: BTreeMap<u32, Unknown>,
    /// Reservations that cannot be read without such parts.
    pub(super) whole_reservations: BTreeMap<u32, Value>,
    /// Parts of the baseline's entries.
    pub(super) entries: BTreeMap<Knob, Unknown>,
    /// Entries whose knob or values are not known.
    pub(super) whole_entries: Vec<Value>,
}

impl Newer {
    /// Whether this version knows everything in the state.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether a later version could restore something that this one cannot.
    pub(super) fn has_values(&self) -> bool {
        !self.whole_entries.is_empty() || !self.whole_reservations.is_empty()
    }

    /// What this version does not know of a VM's reservation, by the names of the fields.
    pub fn of_vm(&self, vmid: u32) -> Vec<String> {
        (self.reservations.get(&vmid).into_iter())
            .flat_map(Unknown::names)
            .collect()
    }

    /// What this version does not know of the state beside the reservations that it has read.
    pub fn of_host(&self) -> Vec<String> {
        let mut all = Vec::new();
        if !self.whole_entries.is_empty() {
            all.push(format!("values of {}", kinds(&self.whole_entries)));
        }
        for vmid in self.whole_reservations.keys() {
            all.push(format!("the reservation of VM {vmid}"));
        }
        if !self.fields.is_empty() {
            let names: Vec<String> = self.fields.keys().map(|name| format!("{name:?}")).collect();
            all.push(format!("the fields {}", names.join(", ")));
        }
        for (knob, unknown) in &self.entries {
            let names: Vec<String> = unknown.names().collect();
            all.push(format!("{:?} of {knob}", names.join(", ")));
        }
        if let Some(version) = self.version {
            all.push(format!("version {version} of the file"));
        }
        all
    }

    /// All of it, in one line; none if there is nothing.
    pub fn summary(&self) -> Option<String> {
        let of_vms = self.reservations.keys().map(|vmid| {
            let names = self.of_vm(*vmid).join(", ");
            format!("{names:?} of VM {vmid}")
        });
        let all: Vec<String> = self.of_host().into_iter().chain(of_vms).collect();
        (!all.is_empty()).then(|| {
            format!(
                "a later version of hook has saved data unknown to this one: {}",
                all.join("; ")
            )
        })
    }

    /// Forgets what was kept of a VM's earlier reservation.
    pub fn forget_vm(&mut self, vmid: u32) {
        self.reservations.remove(&vmid);
        self.whole_reservations.remove(&vmid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::{Deserialize, Serialize};
    use serde_json::json;

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Way {
        #[default]
        Known,
        Other,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        #[serde(default)]
        way: Way,
        list: Vec<Way>,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        inner: Inner,
        number: u32,
    }

    #[test]
    fn what_is_known_is_read_and_the_rest_is_written_back() {
        let raw = json!({
            "inner": {"way": "newer", "list": ["other"], "deep": [1, 2]},
            "number": 7,
            "top": {"number": 8},
        });
        let (mut value, unknown) = read::<Outer>(&raw).unwrap();
        assert_eq!((value.number, &value.inner.way), (7, &Way::Known));
        let mut names: Vec<String> = unknown.names().collect();
        names.sort_unstable();
        assert_eq!(names, ["inner.deep", "inner.way", "top"]);
        let unknown = unknown.note(&json!(value));
        let mut written = json!(value);
        unknown.put_back(&mut written);
        assert_eq!(written, raw);
        // What was changed since has the word.
        value.inner.way = Way::Other;
        let mut written = json!(value);
        unknown.put_back(&mut written);
        assert_eq!(written["inner"]["way"], json!("other"));
        assert_eq!(written["top"], raw["top"]);
    }

    #[test]
    fn what_is_nothing_without_its_unknown_parts_is_newer_and_damage_is_not() {
        let newer = json!({"inner": {"list": ["newer"]}, "number": 7});
        assert!(matches!(read::<Outer>(&newer), Err(Unread::Newer)));
        for damaged in [
            json!({"inner": {"list": []}, "number": "7"}),
            json!({"inner": {"list": []}}),
            json!([]),
            json!({"inner": {"list": [7]}, "number": 7}),
        ] {
            let read = read::<Outer>(&damaged);
            assert!(matches!(read, Err(Unread::Malformed(_))), "{damaged}");
        }
    }
}
