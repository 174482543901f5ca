//! Proxmox VE's own files about VMs.

pub mod conf;
pub mod mapping;
pub mod reservations;
pub mod run;
