//! The baseline: for every knob that was touched, the value before and the values set since.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::cpuset::CpuSetPool;
use crate::error::{Error, Result};
use crate::knob::{Applied, Change, Knob, Outcome, Setting, Value};

use super::newer::Saved;

/// One knob of the baseline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub(super) struct Entry {
    pub(super) knob: Knob,
    label: Arc<str>,
    /// The value before the first touch.
    before: Value,
    /// Values set since, oldest first; the last may not have been written yet. Before them, what
    /// the kernel changed one to: it may return to any (a thread's mask, as CPUs go and come).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    set: Vec<Value>,
}

/// An entry as it is in the file. To become one of the baseline, its knob and values must not leave
/// their folders.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Unchecked {
    knob: Knob,
    label: String,
    before: String,
    #[serde(default)]
    set: Vec<String>,
}

impl Saved for Unchecked {
    type Entry = Entry;

    fn knob(&self) -> &Knob {
        &self.knob
    }

    fn values(&self) -> impl Iterator<Item = &str> {
        let values = std::iter::once(&self.before).chain(&self.set);
        values.map(String::as_str)
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
            set: set
                .iter()
                .map(|value| knob.parse_checked(value))
                .collect::<Result<_>>()?,
            knob,
            label: label.into(),
        })
    }
}

impl Entry {
    fn note(&mut self, value: &Value) {
        if self.set.last().is_none_or(|last| last != value) {
            self.set.retain(|earlier| earlier != value);
            // Most have no other.
            self.set.reserve_exact(1);
            self.set.push(value.clone());
        }
    }
}

#[cfg(test)]
impl Entry {
    /// Notes that the knob was set to its value from before.
    pub(super) fn note_before(&mut self) {
        self.note(&self.before.clone());
    }
}

/// The value of every touched knob before the first touch, and what it was set to since.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Baseline {
    pub(super) entries: BTreeMap<Knob, Entry>,
    /// Knobs that had, when this run began, a value that hook had not set.
    foreign: BTreeMap<Knob, Value>,
    /// The values that knobs would have by now, if changes are only planned: the host does not show
    /// them to the steps that follow.
    planned: BTreeMap<Knob, Value>,
}

impl Baseline {
    pub(super) fn from_entries(entries: Vec<Entry>) -> Self {
        let mut pool = CpuSetPool::default();
        let mut shared = |mut entry: Entry| {
            for value in [&mut entry.before].into_iter().chain(&mut entry.set) {
                value.share(&mut pool);
            }
            (entry.knob.clone(), entry)
        };
        Self {
            entries: entries.into_iter().map(&mut shared).collect(),
            ..Self::default()
        }
    }

    /// Adds an object, with the value it had before the first touch, or would have had: its present
    /// value then counts as set by hook. One that is in already stays as it is.
    pub fn adopt(&mut self, object: &Setting, before: &Value) {
        self.entries
            .entry(object.knob.clone())
            .or_insert_with(|| Entry {
                knob: object.knob.clone(),
                label: object.label.clone(),
                before: before.clone(),
                set: if object.found == *before {
                    Vec::new()
                } else {
                    vec![object.found.clone()]
                },
            });
    }

    /// Notes a value that the kernel gave a knob of the baseline as a consequence of what was set.
    pub fn learn(&mut self, object: &Setting) {
        if let Some(entry) = self.entries.get_mut(&object.knob)
            && object.found != entry.before
        {
            entry.note(&object.found);
        }
    }

    /// Whether a knob is in the baseline.
    pub fn has(&self, knob: &Knob) -> bool {
        self.entries.contains_key(knob)
    }

    /// The value of a knob before the first touch.
    pub fn before(&self, knob: &Knob) -> Option<&Value> {
        self.entries.get(knob).map(|entry| &entry.before)
    }

    /// The value a knob was last set to.
    pub fn last(&self, knob: &Knob) -> Option<&Value> {
        self.values_set(knob).last()
    }

    /// The values a knob has had by us since, the one that was set last at the end.
    pub fn values_set(&self, knob: &Knob) -> &[Value] {
        self.entries.get(knob).map_or(&[], |entry| &entry.set)
    }

    /// The first knob that is not ordered before `from`.
    pub fn first_from(&self, from: &Knob) -> Option<&Knob> {
        self.entries.range(from..).next().map(|(knob, _)| knob)
    }

    /// All knobs with their labels and values before the first touch.
    pub fn knobs(&self) -> impl Iterator<Item = (&Knob, &str, &Value)> {
        self.entries
            .values()
            .map(|entry| (&entry.knob, &*entry.label, &entry.before))
    }

    /// Finds knobs with a value that is neither their earlier one nor one that hook set, nor one
    /// that the kernel has changed one of these to (`is_kernels`, by that one and the one found):
    /// another program has set them since, and [`plan`](Self::plan) skips them. Threads that have
    /// ended are dropped. To be called once, before a run changes anything; `read` is
    /// [`Knob::read`], or what is known of the knob already. Returns whether a value
    /// of the kernel's was added, to be saved before the run changes what explains it.
    pub fn detect_foreign(
        &mut self,
        read: impl Fn(&Knob) -> Result<Option<Value>>,
        is_kernels: impl Fn(&Knob, &Value, &Value) -> bool,
    ) -> bool {
        let mut learned = false;
        self.foreign.clear();
        self.entries.retain(|knob, entry| {
            if entry.set.is_empty() {
                return true;
            }
            match read(knob) {
                Ok(Some(found)) if entry.before == found || entry.set.contains(&found) => true,
                Ok(Some(found)) => {
                    if [&entry.before]
                        .into_iter()
                        .chain(&entry.set)
                        .any(|given| is_kernels(knob, given, &found))
                    {
                        learned = true;
                        entry.set.insert(0, found);
                    } else {
                        self.foreign.insert(knob.clone(), found);
                    }
                    true
                }
                // A thread never comes back; a unit or an IRQ may.
                Ok(None) => !matches!(
                    knob,
                    Knob::Thread(_) | Knob::Kthread(_) | Knob::ThreadPolicy(_)
                ),
                Err(_) => true,
            }
        });
        learned
    }

    /// Whether [`detect_foreign`](Self::detect_foreign) found that another program had set a knob.
    pub fn is_foreign(&self, knob: &Knob) -> bool {
        self.foreign.contains_key(knob)
    }

    /// The changes that set objects to the value wanted, which is computed from each one's value
    /// before the first touch. Objects that are not in the baseline yet are added with the value
    /// found. The values to be set are recorded: save the state before applying.
    pub fn plan(
        &mut self,
        objects: Vec<Setting>,
        wanted: impl Fn(&Knob, &Value) -> Value,
    ) -> Vec<Planned> {
        let mut plan = Vec::with_capacity(objects.len());
        for mut object in objects {
            self.adopt(&object, &object.found.clone());
            if let Some(planned) = self.planned.get(&object.knob) {
                object.found.clone_from(planned);
            }
            let Some(entry) = self.entries.get_mut(&object.knob) else {
                continue;
            };
            let value = wanted(&object.knob, &entry.before);
            if let Some(now) = self.foreign.get(&object.knob) {
                let why = format!("something else has set it to {now}");
                plan.push(Planned {
                    skip_reason: Some(why),
                    change: object.want(value),
                });
                continue;
            }
            let change = object.want(value);
            entry.note(&change.wanted);
            plan.push(Planned {
                skip_reason: None,
                change,
            });
        }
        plan
    }

    /// Notes what became of a change.
    pub(super) fn settle(&mut self, done: &Applied) {
        let Some(entry) = self.entries.get_mut(&done.change.knob) else {
            return;
        };
        match done.outcome {
            // It does not have a value that hook set, even if it had the value wanted the last time. If
            // it refuses its old value, it still has the one that hook set.
            Outcome::Refused(_) if done.change.wanted != entry.before => entry.set.clear(),
            Outcome::Planned => {
                self.planned
                    .insert(done.change.knob.clone(), done.change.wanted.clone());
            }
            // A write that failed may have taken effect all the same.
            _ => {}
        }
    }

    /// Removes a knob: it is restored, or another program has set it.
    pub fn forget(&mut self, knob: &Knob) {
        self.entries.remove(knob);
        self.foreign.remove(knob);
    }
}

/// A change of a plan, or why its object is not changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// The change.
    pub change: Change,
    /// Why it is not to be made: another program has set the object since.
    pub skip_reason: Option<String>,
}
