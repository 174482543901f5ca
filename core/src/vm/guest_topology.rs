//! How many threads the cores of a guest have, by QEMU's `-smp`; see qemu-options.hx and
//! hw/core/machine-smp.c of QEMU.

use std::collections::BTreeMap;

/// What a guest's cores are in, from without to within; of what is not told there is one.
const LEVELS: [&str; 7] = [
    "drawers", "books", "sockets", "dies", "clusters", "modules", "cores",
];

/// The threads of each core, by the values of all `-smp` options in their order; 1 where there are
/// none, at least 1.
///
/// QEMU merges the options key by key, so the last one counts. Where sockets and cores are told and
/// threads are not, what is left of the vCPUs is threads. What is no number is passed over: QEMU
/// would not start with it.
pub(super) fn threads_per_core<'a>(options: impl IntoIterator<Item = &'a str>) -> usize {
    let mut told = BTreeMap::new();
    for field in options.into_iter().flat_map(|option| option.split(',')) {
        let (key, value) = field.split_once('=').unwrap_or(("cpus", field));
        if let Ok(number @ 1..) = value.parse::<usize>() {
            told.insert(key, number);
        }
    }
    let number = |key: &str| told.get(key).copied();
    let left_over = || {
        let (_sockets, _cores) = (number("sockets")?, number("cores")?);
        let cores = LEVELS
            .into_iter()
            .filter_map(number)
            .fold(1, usize::saturating_mul);
        Some(number("maxcpus").or(number("cpus"))? / cores)
    };
    number("threads").or_else(left_over).unwrap_or(1).max(1)
}

#[cfg(test)]
mod tests {
    #[test]
    fn threads_as_qemu_counts_them() {
        for (options, threads) in [
            (&[] as &[&str], 1),
            (&[""], 1),
            (&["12"], 1),
            (&["12,sockets=1,cores=12,maxcpus=12"], 1),
            (&["cpus=12,sockets=1,cores=6,threads=2"], 2),
            // Proxmox VE's own, then that of `args:`.
            (
                &[
                    "12,sockets=1,cores=12,maxcpus=12",
                    "12,sockets=1,cores=6,threads=2",
                ],
                2,
            ),
            (
                &["12,sockets=1,cores=12,maxcpus=12", "12,sockets=1,cores=6"],
                2,
            ),
            (&["1,sockets=1,cores=12,maxcpus=12", "cores=6"], 2),
            (&["12,threads=2", "threads=1"], 1),
            (&["12,sockets=1"], 1),
            (&["12,cores=6"], 1),
            (&["24,sockets=1,dies=2,cores=6"], 2),
            (&["4,sockets=4,cores=4"], 1),
            (&["threads=0"], 1),
            (&["threads=x,threads"], 1),
            (&["threads=99999999999999999999"], 1),
            (
                &["8,sockets=18446744073709551615,cores=18446744073709551615"],
                1,
            ),
            (&["help\n,=,,=2"], 1),
        ] {
            assert_eq!(
                super::threads_per_core(options.iter().copied()),
                threads,
                "{options:?}"
            );
        }
    }
}
