//! What Pinfold's tools share.
//!
//! One idea: a mutation is data. A tool reads the host ([`irq`], [`process`], [`cgroup`], …),
//! computes a list of [`Change`]s, and hands it over: a dry run prints it, [`apply`] carries it
//! out, [`save`] and [`store`] keep what it replaces. Nothing else writes to the kernel.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod cli;
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

pub use cli::Table;
pub use cli::report::{Exit, Report, Verbosity};
pub use cpuset::{CpuSet, CpuSetError, MAX_CPU};
pub use error::{Error, Result, os_text};
pub use host::Host;
pub use knob::{Applied, Change, Knob, Outcome, Setting, TaskId, apply, apply_one};
pub use selector::Selector;
pub use sysroot::Sysroot;
pub use text::{excerpt, printable};
