//! Which objects a tool moves, and to which CPUs: the options `--only`, `--except` and `--narrow`.

use std::str::FromStr;

use regex::Regex;

use crate::cpuset::CpuSet;
use crate::error::{Error, Result};
use crate::knob::{Change, Setting};

/// The options that select among a tool's objects. Without any of them all objects are moved to all
/// of the given CPUs.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct FilterArgs {
    /// Only objects with this number, or a name that this regular expression matches; may be repeated
    #[arg(long, value_name = "PATTERN")]
    only: Vec<Pattern>,

    /// All objects except those with this number, or a name that this regular expression matches; may
    /// be repeated
    #[arg(long, value_name = "PATTERN")]
    except: Vec<Pattern>,

    /// Narrow each object to those of its CPUs that are in CPUS; if there are none, move it to all
    /// of CPUS
    #[arg(long, conflicts_with_all = ["list", "restore"])]
    narrow: bool,
}

/// An exact number, or a regular expression on a name, unanchored as in grep.
#[derive(Debug, Clone)]
pub struct Pattern {
    text: String,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Number(u64),
    Name(Regex),
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let kind = if text.is_empty() {
            return Err("an empty pattern matches everything; leave the option out instead".into());
        } else if text.bytes().all(|byte| byte.is_ascii_digit()) {
            Kind::Number(text.parse().map_err(|_| format!("{text} is too large"))?)
        } else {
            // The crate's message draws the pattern over several lines; its last one has the
            // reason.
            let name = Regex::new(text).map_err(|error| {
                let error = error.to_string();
                let reason = error
                    .lines()
                    .last()
                    .unwrap_or_default()
                    .trim_start_matches("error: ");
                format!("\"{text}\" is not a regular expression: {reason}")
            })?;
            Kind::Name(name)
        };
        Ok(Self {
            text: text.to_owned(),
            kind,
        })
    }
}

impl Pattern {
    fn matches(&self, number: Option<u64>, name: &str) -> bool {
        match &self.kind {
            Kind::Number(wanted) => number == Some(*wanted),
            Kind::Name(regex) => regex.is_match(name),
        }
    }
}

impl FilterArgs {
    /// Starts to choose.
    pub fn filter(&self) -> Filter<'_> {
        Filter {
            select: self,
            used: vec![false; self.only.len()],
        }
    }

    /// The change that sets an object to `cpus`, or with `--narrow` narrows it to them.
    pub fn change(&self, object: Setting, cpus: &CpuSet) -> Change {
        let wanted = match object.found.cpus() {
            Some(found) if self.narrow => found.narrow_to(cpus),
            _ => cpus.clone(),
        };
        object.want(wanted)
    }
}

/// A selection in progress, with the patterns of `--only` that have matched something.
#[derive(Debug)]
pub struct Filter<'a> {
    select: &'a FilterArgs,
    used: Vec<bool>,
}

impl Filter<'_> {
    /// Whether to take the object with this number (IRQ, pid) and name.
    pub fn takes(&mut self, number: u64, name: &str) -> bool {
        self.decide(|pattern| pattern.matches(Some(number), name))
    }

    /// Whether to take the object with this name, which has no number.
    pub fn takes_name(&mut self, name: &str) -> bool {
        self.decide(|pattern| pattern.matches(None, name))
    }

    /// Whether to select the one object with exactly this name: the default IRQ mask is `default`.
    ///
    /// Patterns do not reach it, so that `--only .` means the numbered ones.
    pub fn takes_word(&mut self, word: &str) -> bool {
        self.decide(|pattern| pattern.text == word)
    }

    fn decide(&mut self, matches: impl Fn(&Pattern) -> bool) -> bool {
        let mut asked = self.select.only.is_empty();
        // All patterns are tried, to find those that match nothing.
        for (pattern, used) in self.select.only.iter().zip(&mut self.used) {
            if matches(pattern) {
                *used = true;
                asked = true;
            }
        }
        asked && !self.select.except.iter().any(matches)
    }

    /// Checks that every `--only` has matched something: one that has not is probably a typo.
    ///
    /// # Errors
    /// [`Error::Unusable`] naming the first that has not; `what` are the objects (`IRQ`).
    pub fn check(self, what: &str) -> Result<()> {
        match self
            .select
            .only
            .iter()
            .zip(self.used)
            .find(|(_, used)| !used)
        {
            None => Ok(()),
            Some((pattern, _)) => Err(Error::unusable(
                format!("--only {}", pattern.text),
                format!("no such {what}; see --list"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IRQS: [(u64, &str); 4] = [(1, "i8042"), (24, "nvme0q1"), (124, "nvme0q24"), (9, "")];

    fn taken(only: &[&str], except: &[&str]) -> std::result::Result<String, String> {
        let patterns = |texts: &[&str]| {
            texts
                .iter()
                .map(|text| text.parse())
                .collect::<std::result::Result<_, _>>()
        };
        let select = FilterArgs {
            only: patterns(only)?,
            except: patterns(except)?,
            narrow: false,
        };
        let mut choice = select.filter();
        let mut taken: Vec<String> = IRQS
            .iter()
            .filter(|(number, name)| choice.takes(*number, name))
            .map(|irq| irq.0.to_string())
            .collect();
        if choice.takes_word("default") {
            taken.push("default".into());
        }
        choice.check("IRQ").map_err(|error| error.to_string())?;
        Ok(taken.join(" "))
    }

    #[test]
    fn numbers_names_and_words() {
        for (only, except, expected) in [
            (&[][..], &[][..], "1 24 124 9 default"),
            (&["24"], &[], "24"),
            (&["nvme"], &[], "24 124"),
            (&["^nvme0q1$", "9"], &[], "24 9"),
            (&["."], &[], "1 24 124"),
            (&["nvme", "default"], &["124"], "24 default"),
            (&[], &["nvme"], "1 9 default"),
            (&[], &["default", "^$"], "1 24 124"),
            (&["24"], &["24"], ""),
        ] {
            assert_eq!(
                taken(only, except).as_deref(),
                Ok(expected),
                "only {only:?} except {except:?}"
            );
        }
    }

    #[test]
    fn to_all_or_within() {
        let wanted = |narrow, found: &str| {
            let select = FilterArgs {
                narrow,
                ..FilterArgs::default()
            };
            let found = CpuSet::from_kernel_list(found).unwrap();
            let object = Setting::new(crate::Knob::Irq(24), "IRQ 24", found);
            select
                .change(object, &CpuSet::range(0, 5))
                .wanted
                .to_string()
        };
        assert_eq!(wanted(false, "4-7"), "0-5");
        assert_eq!(wanted(true, "4-7"), "4-5");
        assert_eq!(wanted(true, "6-7"), "0-5");
    }

    #[test]
    fn invalid_patterns_are_refused() {
        for (only, message) in [
            ("nmve", "--only nmve: no such IRQ; see --list"),
            ("2", "--only 2: no such IRQ; see --list"),
            ("(", "\"(\" is not a regular expression: unclosed group"),
            (
                "",
                "an empty pattern matches everything; leave the option out instead",
            ),
            ("99999999999999999999", "99999999999999999999 is too large"),
        ] {
            assert_eq!(taken(&["1", only], &[]), Err(message.to_owned()));
        }
    }
}
