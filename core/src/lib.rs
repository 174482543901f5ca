//! The shared library of Pinfold's tools.
//!
//! A change is data. A tool reads the host, computes the changes it wants and hands them over:
//!
//! ```text
//!  sys, systemd, vm            readers of the kernel, systemd and QEMU
//!        |
//!     Setting                  a Knob with its label and the Value found
//!        |  want(value)
//!      Change                  ... and the Value wanted
//!        |                        |
//!        |                     state    the values before, on disk before the first write
//!        |
//!   apply, apply_one           a dry run plans; else knob/write writes and reads back
//!        |
//!     Applied                  the Change and its Outcome, which cli::report prints
//! ```
//!
//! CPUs are a [`CpuSet`], read and printed as the kernel does:
//!
//! ```
//! use pinfold_core::CpuSet;
//!
//! let cpus: CpuSet = "0-5,12-17".parse()?;
//! assert_eq!(cpus.len(), 12);
//! assert_eq!(cpus.to_mask(), "0003f03f");
//! let housekeeping = CpuSet::range(0, 3);
//! assert_eq!(cpus.narrow_to(&housekeeping).to_string(), "0-3");
//! # Ok::<(), pinfold_core::CpuSetError>(())
//! ```
//!
//! People can also write them as a [`Selector`], which is resolved on a host:
//!
//! ```
//! use pinfold_core::Selector;
//!
//! let selector: Selector = "ccd:1 & !6".parse()?;
//! assert_eq!(selector.to_string(), "llc:1&!6");
//! assert!("lcl:1".parse::<Selector>().is_err());
//! # Ok::<(), pinfold_core::selector::SelectorError>(())
//! ```
//!
//! Modules, from the lowest layer up: `error`, `cpuset`, `sysroot`, [`sys`], [`systemd`], `host`,
//! [`knob`], [`vm`], [`selector`], [`state`], [`cli`]. Imports lead downwards only. `testutils`, for
//! tests, is above all of them.

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
#[cfg(feature = "testutils")]
pub mod testutils;
mod text;
pub mod vm;

pub use cli::report::{Report, Verbosity};
pub use cli::{Exit, Table};
pub use cpuset::{CpuSet, CpuSetError, CpuSetPool, MAX_CPU};
pub use error::{Error, Result, os_text};
pub use host::Host;
pub use knob::{Applied, Change, Knob, Outcome, Setting, TaskId, apply, apply_one};
pub use selector::Selector;
pub use sysroot::Sysroot;
pub use text::{excerpt, last_line, nearest, printable};
