//! What Pinfold's tools share.
//!
//! One idea: a mutation is data. A tool reads the host ([`irq`], [`process`], [`cgroup`], …),
//! computes a list of [`Change`]s, and hands it over: a dry run prints it, [`apply`] carries it
//! out, [`save`] and [`store`] keep what it replaces. Nothing else writes to the kernel.

pub mod cli;
pub mod command;
mod cpuset;
mod error;
mod host;
pub mod knob;
pub mod selector;
pub mod state;
pub mod sys;
mod sysroot;
pub mod systemd;
mod text;
pub mod vm;

// The paths that other crates use until they follow the folders.
pub use cli::{filter as select, report};
pub use selector as cpuexpr;
pub use state::{save, store};
pub use sys::{cgroup, cpu, cpufreq, irq, pci, task as process, topology};
/// Proxmox VE's files, by their old path.
pub mod vmconf {
    pub use crate::vm::proxmox::conf::*;
    pub use crate::vm::proxmox::mapping::*;
    pub use crate::vm::proxmox::reservations::*;
}
pub use vm::qmp;

pub use cli::report::{Exit, Report, Table, Verbosity};
pub use cpuset::{CpuSet, CpuSetError, MAX_CPU};
pub use error::{Error, Result, os_text};
pub use knob::{Change, Done, Knob, Object, Outcome, TaskId, apply, apply_one};
pub use selector::CpuExpr;
// The name by which other crates still call the host.
pub use host::Host as Sysroot;
pub use host::Host;
pub use sysroot::Sysroot as Files;
pub use text::{excerpt, printable};
