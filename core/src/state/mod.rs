//! Values that come back: what a tool saves in a file, and what hook keeps under /run/pinfold.

#![expect(clippy::disallowed_methods, reason = "the writers of saved state")]

mod baseline;
mod newer;
mod replace;
pub mod save;
mod state_file;
pub mod store;
pub mod trust;

pub use baseline::{Baseline, Planned};
pub use newer::Newer;
pub use state_file::State;
pub use store::{Pending, Store};
