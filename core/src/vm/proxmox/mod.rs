//! Proxmox VE's own files about VMs.

pub(super) mod conf;
pub(super) mod mapping;
pub(super) mod reservations;
pub(super) mod run;
