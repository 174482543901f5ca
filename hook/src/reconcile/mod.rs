//! From (baseline, reservations) to what every knob should hold, and the steps that bring it there.
//!
//! Every phase changes the set of reservations and then comes here. A knob's wanted value is
//! computed from its value before the first touch: CPUs held to the housekeeping CPUs while any VM
//! is fenced, the old value when none is. So isolating, releasing, mending after a crash and a
//! second VM are one computation.

mod guest;
mod host_steps;
mod hotplug;
mod kernel_masks;
mod order;
mod partition;
mod run;
mod threads;

pub(crate) use run::Reconcile;
