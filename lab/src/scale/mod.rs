//! `lab scale`: how the commands that read a host grow with it.
//!
//! [`tree`] writes made-up hosts for `--sysroot`, [`measure`] counts what a program costs,
//! [`command`] lists the commands of the product, [`table`] prints their costs on hosts of three
//! sizes with [`peers`] beside them, [`growth`] fails if a cost grows faster than the host, and
//! [`memory`] if the largest host takes too much memory.
//! Counts depend on the program and the host only; seconds would depend on the machine.

pub mod command;
pub mod growth;
pub mod measure;
pub mod memory;
pub mod peers;
pub mod table;
pub mod tree;
