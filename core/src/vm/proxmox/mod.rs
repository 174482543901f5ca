//! Proxmox VE's own files about VMs.

pub(super) mod cluster;
pub(super) mod conf;
pub(super) mod container;
pub(super) mod cpu_models;
mod grammar;
mod hostpci;
pub(super) mod huge_pages;
pub(super) mod mapping;
pub(super) mod outline;
pub(super) mod paths;
mod property;
pub(super) mod reservations;
mod schema;
pub(super) mod storage;
mod words;
