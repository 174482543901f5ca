//! Knobs: every value of the kernel or of systemd that Pinfold may set.
//!
//! - [`Knob`] (`knobs.rs`) names one value, `names.rs` its label and file;
//! - `read.rs` reads it;
//! - [`Change`] (`change.rs`) is a knob with the value found and the value wanted;
//! - [`apply()`] (`apply.rs`) makes changes, through `write/`, the only code that writes.
//!
//! A knob's value is text in one canonical form (CPU sets as lists, whatever the file wants), so
//! that found, wanted and saved values compare as they stand.

mod apply;
mod change;
mod knobs;
mod names;
mod read;
mod write;

pub(crate) use apply::apply_each;
pub use apply::{apply, apply_one};
pub use change::{Applied, Change, Outcome, Setting};
pub use knobs::{ABSENT, Knob, NO_DRIVER, PRESENT};

pub use crate::sys::task::TaskId;
