//! Knobs: every value of the kernel or of systemd that Pinfold may set.
//!
//! - [`Knob`] (`knobs.rs`) names one value, `names.rs` its label and file;
//! - `read.rs` reads it;
//! - [`Change`] (`change.rs`) is a knob with the value found and the value wanted;
//! - [`apply()`] (`apply.rs`) makes changes, through `write/`, the only code that writes.
//!
//! A knob's [`Value`] (`value.rs`) is typed; it becomes text only in files, messages and JSON.

#![deny(
    clippy::wildcard_enum_match_arm,
    reason = "a new knob needs an arm of its own"
)]

mod apply;
mod change;
mod knobs;
mod names;
mod read;
mod value;
mod write;

pub(crate) use apply::apply_each;
pub use apply::{apply, apply_one};
pub use change::{Applied, Change, Outcome, Setting};
pub use knobs::{Knob, NO_DRIVER};
pub use value::{ABSENT, NO_TIME, PRESENT, Value};
pub use write::{POLICY_DEADLINE, UNMOVABLE_IRQ};

pub use crate::sys::task::TaskId;
