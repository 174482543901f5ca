//! What Pinfold promises, told on real 24-CPU hosts: boot, start VMs as Proxmox VE does, run a phase or a tool, look at the
//! whole host.
//!
//! The main job, the tools and the old faults are told on Debian 13 and 12, partitions on Debian 13 with its own kernel and
//! with that of its backports, the rest on Debian 13. `PINFOLD_LAB_GUESTS` (`trixie`,
//! `bookworm`, comma between) leaves guests out, and says so.

// A story that cannot go on says where.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

mod support;

mod faults;
mod main_job;
mod others;
mod partition;
mod tools;
mod torture;

/// A test per story and guest; `only trixie:` for those that are long, `with partitions:` for kernels that have them.
macro_rules! stories {
    (only trixie: $($story:ident),* $(,)?) => {
        mod trixie {
            $(#[test]
            fn $story() {
                crate::support::tell(pinfold_lab::Guest::Trixie, super::$story);
            })*
        }
    };
    (with partitions: $($story:ident),* $(,)?) => {
        mod trixie {
            $(#[test]
            fn $story() {
                crate::support::tell(pinfold_lab::Guest::Trixie, super::$story);
            })*
        }
        mod backports {
            $(#[test]
            fn $story() {
                crate::support::tell(pinfold_lab::Guest::Backports, super::$story);
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
