//! What hook keeps under /run/pinfold.

pub(crate) mod counters;
pub(crate) mod reservation;
pub(crate) mod step_times;
