//! hook: isolates CPUs for a VM when it starts, and returns them to the host when it stops.
//!
//! It calls the other tools' libraries in the documented order (docs/design.md) and saves, under
//! /run/pinfold, what is needed to undo everything.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

use std::process::ExitCode;

use pinfold_core::Host;
use pinfold_core::state::State;

mod chain;
mod checks;
mod choice;
mod claims;
mod cli;
mod commands;
mod exec;
#[cfg(test)]
mod fixture;
pub mod front;
mod own_steps;
mod phases;
mod reconcile;
mod settings;
mod snippet;
mod state;
mod strays;

pub use cli::Args;

use state::reservation::Reservation;

/// The command's whole run. `commit` is that of the program, for `--version` and the report.
pub fn main(commit: Option<&str>) -> ExitCode {
    pinfold_core::cli::main(own_steps::TOOL, commit, |args| cli::run(args, commit))
}

/// Checks the text of a settings file as pre-start does, and resolves it for a guest without SMT:
/// the JSON that is saved with the VM's reservation. `source` names the file in errors.
///
/// # Errors
/// What is wrong with the text, with the key; or that a layout is for another machine.
pub fn check_settings(root: &Host, text: &str, source: &str) -> anyhow::Result<String> {
    Ok(serde_json::to_string(&settings::resolve(
        root, text, source, 1,
    )?)?)
}

/// Checks the text of a state file as every phase does, and returns it as hook would write it.
///
/// # Errors
/// Why it cannot be trusted.
pub fn check_state(text: &str) -> anyhow::Result<String> {
    let state = State::<Reservation>::parse(text).map_err(anyhow::Error::msg)?;
    Ok(state.to_text()?)
}
