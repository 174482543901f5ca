//! The verbs: a file for each, with its options and its run.

pub(crate) mod blame;
pub(crate) mod check;
pub(crate) mod complete;
mod drawing;
pub(crate) mod init;
pub(crate) mod install;
pub(crate) mod jitter;
pub(crate) mod layout;
pub(crate) mod list;
mod machine;
pub(crate) mod map;
mod monitor;
mod places;
pub(crate) mod plan;
pub(crate) mod recover;
pub(crate) mod remove;
pub(crate) mod report;
pub(crate) mod status;
pub(crate) mod step;
