//! Proxmox VE's own files about VMs.

pub mod conf;
