//! A set of CPUs, read from the kernel's lists and masks. The lab's own: its word must not hang on
//! the product's code.

use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// CPUs by logical number.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cpus(pub BTreeSet<u32>);

impl Cpus {
    /// Reads a mask: hexadecimal words of 32 bits, the highest first, between commas.
    pub fn from_mask(mask: &str) -> Result<Self> {
        let mut cpus = BTreeSet::new();
        for (word, text) in (0u32..).zip(mask.trim().rsplit(',')) {
            let bits =
                u32::from_str_radix(text, 16).with_context(|| format!("{mask}: no CPU mask"))?;
            cpus.extend(
                (0..32)
                    .filter(|bit| bits >> bit & 1 == 1)
                    .map(|bit| word * 32 + bit),
            );
        }
        Ok(Self(cpus))
    }

    /// Whether all of these are among the others.
    pub fn are_within(&self, others: &Self) -> bool {
        self.0.is_subset(&others.0)
    }

    /// Whether the two have a CPU in common.
    pub fn meets(&self, other: &Self) -> bool {
        !self.0.is_disjoint(&other.0)
    }
}

impl FromStr for Cpus {
    type Err = anyhow::Error;

    /// Reads a list such as `0-5,12`; an empty one has no CPU.
    fn from_str(list: &str) -> Result<Self> {
        let mut cpus = BTreeSet::new();
        for range in list.trim().split(',').filter(|range| !range.is_empty()) {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let number = |text: &str| {
                text.parse::<u32>()
                    .with_context(|| format!("{list}: no CPU list"))
            };
            cpus.extend(number(first)?..=number(last)?);
        }
        Ok(Self(cpus))
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.iter().copied().peekable();
        let mut comma = "";
        while let Some(first) = rest.next() {
            let mut last = first;
            while let Some(next) = rest.next_if_eq(&(last + 1)) {
                last = next;
            }
            write!(f, "{comma}{first}")?;
            if last != first {
                write!(f, "-{last}")?;
            }
            comma = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_masks() {
        for (list, mask) in [
            ("", "0"),
            ("0", "1"),
            ("6-11,18-23", "fc0fc0\n"),
            ("0,32-33", "3,00000001"),
        ] {
            let cpus: Cpus = list.parse().unwrap();
            assert_eq!(cpus.to_string(), list);
            assert_eq!(Cpus::from_mask(mask).unwrap(), cpus, "{mask}");
        }
        assert!("x".parse::<Cpus>().is_err());
        assert!(Cpus::from_mask("xyz").is_err());
    }

    #[test]
    fn meeting() {
        let set = |list: &str| list.parse::<Cpus>().unwrap();
        assert!(set("0-6").meets(&set("6-11")));
        assert!(!set("0-5").meets(&set("6-11")));
        assert!(!set("").meets(&set("0")));
    }
}
