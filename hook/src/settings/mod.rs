//! hook's settings: a TOML file per VM, the layouts that come with hook, and what they resolve to.

mod deadlines;
mod file;
mod pins;
mod resolve;
mod schema;

pub(crate) use deadlines::{Bounds, Deadlines, MAX_DEADLINE};
pub(crate) use file::{create, no_own_file, node_file, own_file};
pub(crate) use resolve::{deadlines, load, resolve};
#[cfg(test)]
pub(crate) use schema::known_keys;
pub(crate) use schema::{Method, ResetPci, Settings};
