//! What Pinfold's tools share.
//!
//! One idea: a mutation is data. A tool reads the host ([`irq`], [`process`], [`cgroup`], …),
//! computes a list of [`Change`]s, and hands it over: a dry run prints it, [`apply`] carries it
//! out, [`save`] and [`store`] keep what it replaces. Nothing else writes to the kernel.

pub mod cgroup;
mod change;
pub mod cli;
pub mod command;
pub mod cpu;
pub mod cpuexpr;
pub mod cpufreq;
mod cpuset;
mod dbus;
mod error;
pub mod irq;
pub mod knob;
pub mod pci;
pub mod process;
pub mod qmp;
pub mod report;
pub mod save;
pub mod select;
mod smp;
pub mod store;
mod sysroot;
pub mod systemd;
pub mod topology;
pub mod vm;
pub mod vmconf;

pub use change::{Change, Done, Object, Outcome, apply, apply_one};
pub use cpuexpr::CpuExpr;
pub use cpuset::{CpuSet, CpuSetError, MAX_CPU};
pub use error::{Error, Result, os_text};
pub use knob::{Knob, TaskId};
pub use report::{Exit, Report, Table, Verbosity};
pub use sysroot::Sysroot;
