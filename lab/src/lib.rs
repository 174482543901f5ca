//! The lab: a real 24-CPU host under QEMU, to test Pinfold on.
//!
//! `Host::acquire` gives a running host in a known state; commands, files and VMs in it are methods
//! of it, and `reset` brings the known state back in seconds. Nothing here touches the machine that
//! the lab runs on but for its cache folder and its QEMU processes.

#![allow(
    clippy::disallowed_methods,
    reason = "the lab writes files and drives hosts of its own"
)]

pub mod acpi;
pub mod agent;
pub mod bare;
pub mod bench;
pub mod cache;
pub mod channel;
pub mod console;
pub mod cpus;
pub mod demo;
mod guest;
mod host;
pub mod image;
pub mod inside;
pub mod lifeline;
pub mod map;
pub mod noise;
pub mod proc;
pub mod progress;
pub mod protocol;
pub mod pvestatd;
pub mod qemu;
pub mod qm;
pub mod qmp;
pub mod scale;
pub mod setup;
pub mod snapshot;
pub mod strays;
pub mod svg;
pub mod tool;
pub mod topology;
mod vm;

pub use guest::Guest;
pub use host::{Host, Job, Output, all_slots};
pub use snapshot::HostState;
pub use strays::Strays;
pub use vm::VmSpec;
