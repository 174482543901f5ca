//! What is checked: what stops a start, and what is advice.

pub(crate) mod advice;
pub(crate) mod cluster;
mod devices;
pub(crate) mod finding;
mod host;
pub(crate) mod memory;
mod place;
pub(crate) mod qm_set;
pub(crate) mod required;
pub(crate) mod script;
pub(crate) mod shared_readings;
pub(crate) mod vm_settings;
