//! `lab scale`: how the commands that read a host grow with it.
//!
//! Made-up hosts for `--sysroot`, and counts of what a command costs on them.

pub mod tree;
