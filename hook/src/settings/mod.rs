//! hook's settings: a TOML file per VM, the layouts that come with hook, and what they resolve to.

mod deadlines;
mod file;
mod pins;
mod resolve;
mod schema;

pub(crate) use deadlines::{Bounds, Deadlines, MAX_DEADLINE};
pub(crate) use file::{
    add_chain, any_file_on, create, file_on, find, no_own_file, node_file, node_files, own_file,
    remove, vms_with_own_file, with_chain,
};
pub(crate) use resolve::{Loaded, chain, chain_of, deadlines, joined, load, load_on, resolve};
#[cfg(test)]
pub(crate) use schema::known_keys;
pub(crate) use schema::{Method, PciReset, REMOVE, ResetPci, Settings, default};
