//! What hook keeps under /run/pinfold: its part of state.json ([`reservation`]; the file is core's
//! `state::state_file`), and files that nothing depends on.

pub(crate) mod counters;
pub(crate) mod reservation;
pub(crate) mod step_times;
