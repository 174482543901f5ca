//! What Pinfold promises, told on real 24-CPU hosts: boot, start VMs as Proxmox VE does, run a phase or a tool, look at the
//! whole host.
//!
//! The main job, the tools and the old faults are told on both guests, the rest on Debian 13. `PINFOLD_LAB_GUESTS` (`trixie`,
//! `bookworm`, comma between) leaves guests out, and says so.

// A story that cannot go on says where.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

mod support;

mod faults;
mod main_job;
mod others;
mod tools;
mod torture;

/// A test per story and guest; `only trixie:` for those that are long.
macro_rules! stories {
    (only trixie: $($story:ident),* $(,)?) => {
        mod trixie {
            $(#[test]
            fn $story() {
                crate::support::tell(pinfold_lab::Guest::Trixie, super::$story);
            })*
        }
    };
    ($($story:ident),* $(,)?) => {
        mod trixie {
            $(#[test]
            fn $story() {
                crate::support::tell(pinfold_lab::Guest::Trixie, super::$story);
            })*
        }
        mod bookworm {
            $(#[test]
            fn $story() {
                crate::support::tell(pinfold_lab::Guest::Bookworm, super::$story);
            })*
        }
    };
}
pub(crate) use stories;
