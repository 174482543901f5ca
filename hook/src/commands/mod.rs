//! The verbs: a file for each, with its options and its run.

pub(crate) mod check;
pub(crate) mod init;
pub(crate) mod layout;
pub(crate) mod map;
pub(crate) mod plan;
pub(crate) mod recover;
pub(crate) mod status;
pub(crate) mod step;
