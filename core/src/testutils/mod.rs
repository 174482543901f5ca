//! Made-up machines and hosts for the tests of all crates.
//!
//! Behind the feature `testutils`, which only dev-dependencies enable (core/tests/structure checks
//! this): no program contains it.

#![allow(clippy::disallowed_methods, clippy::unwrap_used)]

mod files;
mod frozen;
mod host;
pub mod machine;

pub use files::{container_conf, thread, vm_conf, write};
pub use frozen::{assert_restored, frozen};
pub use host::MadeUpHost;
