//! The vCPUs of a guest and what they are in, by QEMU's `-smp`; see qemu-options.hx,
//! hw/core/machine-smp.c and util/keyval.c of QEMU.

use std::collections::BTreeMap;
use std::fmt;

/// The levels of a guest's topology that a PC has one of: QEMU refuses more.
const UNSUPPORTED: [&str; 3] = ["drawers", "books", "clusters"];
/// The levels that are above a core, from the outside to the inside; the first is computed last.
const ABOVE_CORES: [&str; 3] = ["sockets", "dies", "modules"];

/// How many vCPUs a guest has, and the topology they are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Topology {
    /// The vCPUs that it starts with, those added as `-device` not counted.
    pub cpus: u64,
    /// The vCPUs that it can have.
    pub maxcpus: u64,
    /// The sockets.
    pub sockets: u64,
    /// The dies of each socket.
    pub dies: u64,
    /// The modules of each die.
    pub modules: u64,
    /// The cores of each module.
    pub cores: u64,
    /// The threads of each core.
    pub threads: u64,
}

/// Why QEMU refuses to start with its `-smp` options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SmpError {
    /// A key that it does not know, a value without a key, or a value that is not a number.
    Malformed(String),
    /// A number that is zero or negative.
    NotPositive(String),
    /// More than one of a level that the machine does not have.
    Unsupported(String),
    /// The levels multiply to another number than `maxcpus`.
    Product {
        /// The sockets times the cores of each and so on.
        product: u64,
        /// `maxcpus`.
        maxcpus: u64,
    },
    /// More vCPUs than `maxcpus`.
    MoreThanMax {
        /// `cpus`.
        cpus: u64,
        /// `maxcpus`.
        maxcpus: u64,
    },
}

impl fmt::Display for SmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(what) => write!(f, "-smp has {what:?}, which QEMU does not know"),
            Self::NotPositive(key) => write!(f, "-smp has a `{key}` that is not above zero"),
            Self::Unsupported(key) => write!(f, "-smp has `{key}`, but a PC has only one"),
            Self::Product { product, maxcpus } => write!(
                f,
                "the merged -smp has maxcpus={maxcpus}, and a topology of {product} vCPUs"
            ),
            Self::MoreThanMax { cpus, maxcpus } => {
                write!(f, "the merged -smp has {cpus} vCPUs, and maxcpus={maxcpus}")
            }
        }
    }
}

/// The topology by the values of all `-smp` options in their order; one vCPU if there are none.
///
/// QEMU merges the options key by key, so that the last one counts for each. It computes what is
/// left out, cores first, then sockets, then threads (as machine types since 6.2 do).
///
/// # Errors
/// Why QEMU does not start with them.
pub(super) fn merge<'a>(options: impl IntoIterator<Item = &'a str>) -> Result<Topology, SmpError> {
    let mut texts = BTreeMap::new();
    for option in options {
        add(option, &mut texts)?;
    }
    let mut values = BTreeMap::new();
    for (key, text) in texts {
        match integer(text).ok_or_else(|| SmpError::Malformed(format!("{key}={text}")))? {
            number @ 1.. => values.insert(key, number.unsigned_abs()),
            _ => return Err(SmpError::NotPositive(key.into())),
        };
    }
    let number = |key: &str| values.get(key).copied();
    if let Some(key) = UNSUPPORTED.iter().find(|key| number(key) > Some(1)) {
        return Err(SmpError::Unsupported((*key).into()));
    }
    let (cpus, maxcpus) = (number("cpus"), number("maxcpus"));
    let [dies, modules] = ["dies", "modules"].map(|key| number(key).unwrap_or(1));
    let [mut sockets, mut cores, mut threads] = ["sockets", "cores", "threads"].map(number);
    if let Some(maxcpus) = maxcpus.or(cpus) {
        let left_of = |levels: [Option<u64>; 2]| {
            let product = levels
                .into_iter()
                .flatten()
                .fold(dies.saturating_mul(modules), u64::saturating_mul);
            Some(maxcpus / product)
        };
        if cores.is_none() {
            cores = left_of([sockets, threads]);
        } else if sockets.is_none() {
            sockets = left_of([cores, threads]);
        } else if threads.is_none() {
            threads = left_of([sockets, cores]);
        }
    }
    let [sockets, cores, threads] = [sockets, cores, threads].map(|level| level.unwrap_or(1));
    let product = [sockets, dies, modules, cores, threads]
        .into_iter()
        .fold(1, u64::saturating_mul);
    let maxcpus = maxcpus.or(cpus).unwrap_or(product);
    let cpus = cpus.unwrap_or(maxcpus);
    if product != maxcpus {
        return Err(SmpError::Product { product, maxcpus });
    }
    if cpus > maxcpus {
        return Err(SmpError::MoreThanMax { cpus, maxcpus });
    }
    Ok(Topology {
        cpus,
        maxcpus,
        sockets,
        dies,
        modules,
        cores,
        threads,
    })
}

/// Adds the values of one option: `[cpus=]N,KEY=N,…`. Only those that are left after the merge have
/// to be numbers.
fn add<'a>(option: &'a str, texts: &mut BTreeMap<&'a str, &'a str>) -> Result<(), SmpError> {
    let option = option.strip_suffix(',').unwrap_or(option);
    if option.is_empty() {
        return Ok(());
    }
    for (index, field) in option.split(',').enumerate() {
        let (key, value) = match field.split_once('=') {
            Some(parts) => parts,
            None if index == 0 && field != "help" => ("cpus", field),
            None => return Err(SmpError::Malformed(field.into())),
        };
        let mut known = ["cpus", "maxcpus", "cores", "threads"]
            .iter()
            .chain(&ABOVE_CORES)
            .chain(&UNSUPPORTED);
        if !known.any(|known| *known == key) {
            return Err(SmpError::Malformed(field.into()));
        }
        texts.insert(key, value);
    }
    Ok(())
}

/// A number as QEMU reads it: as strtoll(3) does with base 0.
fn integer(text: &str) -> Option<i64> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\r', '\u{b}', '\u{c}']);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (digits, radix) = match digits.strip_prefix("0x").or(digits.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if digits.starts_with('0') => (digits, 8),
        None => (digits, 10),
    };
    let is_number = digits.starts_with(|digit: char| digit.is_digit(radix));
    let number = i64::from_str_radix(digits, radix)
        .ok()
        .filter(|_| is_number)?;
    Some(if negative { -number } else { number })
}

/// The threads of each core of a guest that runs, by the values of all its `-smp` options.
pub(super) fn threads_per_core<'a>(options: impl IntoIterator<Item = &'a str>) -> usize {
    let threads = merge(options).map_or(1, |topology| topology.threads);
    usize::try_from(threads).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topology_as_qemu_merges_it() {
        for (options, cpus, maxcpus, threads) in [
            (&[] as &[&str], 1, 1, 1),
            (&[""], 1, 1, 1),
            (&["12"], 12, 12, 1),
            (&["12,sockets=1,cores=12,maxcpus=12"], 12, 12, 1),
            (&["cpus=12,sockets=1,cores=6,threads=2"], 12, 12, 2),
            // Proxmox VE's own, then that of `args:`.
            (
                &[
                    "12,sockets=1,cores=12,maxcpus=12",
                    "12,sockets=1,cores=6,threads=2",
                ],
                12,
                12,
                2,
            ),
            (
                &["12,sockets=1,cores=12,maxcpus=12", "12,sockets=1,cores=6"],
                12,
                12,
                2,
            ),
            (&["1,sockets=1,cores=12,maxcpus=12", "cores=6"], 1, 12, 2),
            (
                &["4,sockets=1,cores=4,maxcpus=4", "cpus=6,maxcpus=6,cores=6"],
                6,
                6,
                1,
            ),
            (&["12,threads=2", "threads=1"], 12, 12, 1),
            (&["threads=2,cores=3"], 6, 6, 2),
            (&["x,cores=0", "4,cores=2"], 4, 4, 1),
            (&["maxcpus=8"], 8, 8, 1),
            (&["2,maxcpus=8"], 2, 8, 1),
            (&["12,sockets=1"], 12, 12, 1),
            (&["12,cores=6"], 12, 12, 1),
            (&["24,sockets=1,dies=2,cores=6"], 24, 24, 2),
            (&["0x10,sockets=2,cores= 010,books=1,"], 16, 16, 1),
        ] {
            let found = merge(options.iter().copied()).unwrap();
            assert_eq!(
                (found.cpus, found.maxcpus, found.threads),
                (cpus, maxcpus, threads),
                "{options:?}"
            );
        }
    }

    #[test]
    fn what_qemu_refuses() {
        for (options, message) in [
            (
                &[
                    "4,sockets=1,cores=4,maxcpus=4",
                    "12,sockets=1,cores=6,threads=2",
                ] as &[&str],
                "the merged -smp has maxcpus=4, and a topology of 12 vCPUs",
            ),
            (
                &["6,sockets=1,cores=2,maxcpus=2"],
                "the merged -smp has 6 vCPUs, and maxcpus=2",
            ),
            (
                &["4,sockets=4,cores=4"],
                "the merged -smp has maxcpus=4, and a topology of 0 vCPUs",
            ),
            (
                &["threads=0"],
                "-smp has a `threads` that is not above zero",
            ),
            (&["-4"], "-smp has a `cpus` that is not above zero"),
            (&["4,books=2"], "-smp has `books`, but a PC has only one"),
            (
                &["threads=x"],
                "-smp has \"threads=x\", which QEMU does not know",
            ),
            (
                &["4,threads"],
                "-smp has \"threads\", which QEMU does not know",
            ),
            (&["4,foo=1"], "-smp has \"foo=1\", which QEMU does not know"),
            (
                &["threads=99999999999999999999"],
                "-smp has \"threads=99999999999999999999\", which QEMU does not know",
            ),
            (&["4\n,=,,=2"], "-smp has \"=\", which QEMU does not know"),
            (
                &["4,cores=08"],
                "-smp has \"cores=08\", which QEMU does not know",
            ),
            (
                &["4,cores=+-1"],
                "-smp has \"cores=+-1\", which QEMU does not know",
            ),
        ] {
            assert_eq!(
                merge(options.iter().copied()).unwrap_err().to_string(),
                message,
                "{options:?}"
            );
            assert_eq!(threads_per_core(options.iter().copied()), 1, "{options:?}");
        }
        let most = "8,sockets=9223372036854775807,cores=9223372036854775807";
        assert!(merge([most]).is_err());
    }
}
