//! What Pinfold promises, tested on real 24-CPU hosts: boot, start VMs as Proxmox VE does, run a
//! phase or a tool, look at the whole host.
//!
//! The main job, the tools and the old faults run on Debian 13 and 12, partitions on Debian 13
//! with its own kernel and with that of its backports, `apart` on Debian 13 with another kernel line, the
//! rest on Debian 13. `PINFOLD_LAB_GUESTS` (`trixie`, `bookworm`, `trixie-backports`,
//! `trixie-isolcpus`, comma between) skips the other guests and prints which.

#![allow(clippy::disallowed_methods)]
// A story that cannot go on panics.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

mod support;

mod apart;
mod blame;
mod containers;
mod events;
mod faults;
mod frozen;
mod guests;
mod jitter;
mod main_job;
mod operate;
mod others;
mod package;
mod partition;
mod tools;
mod torture;

/// A test per story and guest; `only trixie:` for those that are long, `with partitions:` for
/// kernels that have them.
macro_rules! stories {
    (@ $module:ident $guest:ident $($story:ident)*) => {
        mod $module {
            $(#[test]
            fn $story() {
                crate::support::run(pinfold_lab::Guest::$guest, super::$story);
            })*
        }
    };
    (only trixie: $($story:ident),* $(,)?) => {
        crate::stories!(@ trixie Trixie $($story)*);
    };
    (with partitions: $($story:ident),* $(,)?) => {
        crate::stories!(@ trixie Trixie $($story)*);
        crate::stories!(@ backports Backports $($story)*);
    };
    ($($story:ident),* $(,)?) => {
        crate::stories!(@ trixie Trixie $($story)*);
        crate::stories!(@ bookworm Bookworm $($story)*);
    };
}
pub(crate) use stories;
