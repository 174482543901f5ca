//! What Pinfold promises, told on real 24-CPU hosts: boot, start VMs as Proxmox VE does, run a phase or a tool, look at the
//! whole host.
//!
//! The main job is told on every guest, the rest on Debian 13. `PINFOLD_LAB_GUESTS` (`trixie`, `bookworm`, comma between)
//! leaves guests out, and says so.

// A story that cannot go on says where.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

mod support;

mod faults;
mod main_job;
mod tools;

/// A test per story and guest: those named first on each, the others on Debian 13.
macro_rules! stories {
    (each guest: [$($each:ident),* $(,)?], trixie: [$($story:ident),* $(,)?]) => {
        mod trixie {
            $(#[test]
            fn $each() {
                crate::support::tell(pinfold_lab::Guest::Trixie, super::$each);
            })*
            $(#[test]
            fn $story() {
                crate::support::tell(pinfold_lab::Guest::Trixie, super::$story);
            })*
        }
        mod bookworm {
            $(#[test]
            fn $each() {
                crate::support::tell(pinfold_lab::Guest::Bookworm, super::$each);
            })*
        }
    };
}
pub(crate) use stories;
