//! From (baseline, reservations) to the value of every knob, and the steps that set it.
//!
//! Every phase changes the set of reservations and then comes here. A knob's wanted value is
//! computed from its value before the first touch: narrowed to the housekeeping CPUs while any VM
//! is fenced, the old value when none is. So isolating, releasing, recovering after a crash and a
//! second VM are one computation.

mod apart;
mod boot_masks;
mod changed_by_kernel;
mod containers;
mod guest;
mod host_steps;
mod hotplug;
mod order;
mod partition;
mod run;
mod threads;

pub(crate) use run::{Reconcile, Refused};
pub(crate) use threads::thread_timer;
