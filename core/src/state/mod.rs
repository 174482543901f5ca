//! Values that come back: what a tool saves in a file, and what hook keeps under /run/pinfold.

#![expect(clippy::disallowed_methods, reason = "the writers of saved state")]

mod baseline;
pub mod save;
pub mod store;

pub use baseline::{Baseline, Planned};
pub use store::{Pending, Store};
