//! Virtual machines: their QEMU processes, threads and settings.

pub mod proxmox;
mod qemu;
pub mod qmp;
mod smp;

pub use qemu::*;
