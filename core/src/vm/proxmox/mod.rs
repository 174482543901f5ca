//! Proxmox VE's own files about VMs.

pub(super) mod conf;
mod grammar;
mod hostpci;
pub(super) mod mapping;
mod property;
pub(super) mod reservations;
pub(super) mod run;
mod schema;
mod words;
