//! Which CPUs a VM gets, and which vCPU is on which: one model for `hook init`, `pins = "auto"`,
//! pre-start and `hook check`.
//!
//! It has no side effects: a machine, a guest and the CPUs of others go in; CPUs and typed reasons
//! come out. The reasons are computed from the CPUs that were chosen, so that the sentences match
//! them.

mod areas;
mod claims;
mod filling;
mod guest;
mod outcome;
mod select;

pub(crate) use areas::Areas;
pub(crate) use claims::{AllClaims, Claim, Claimed, Owner};
pub(crate) use filling::in_vcpu_order;
pub(crate) use guest::{Cell, Guest, cells, cpus_of_nodes};
pub(crate) use outcome::{Facts, Reason, VcacheRoom, WITH_CPU_0, counted, listed};
pub(crate) use select::{Choice, NoRoom, Question, best, choose, given, room_by_vcache};
