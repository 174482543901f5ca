//! hook: fences CPUs off for a VM when it starts, and puts the host back when it stops.
//!
//! It composes the other tools' libraries in the documented order (docs/design.md) and keeps, under
//! /run/pinfold, what is needed to take everything back.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

use std::process::ExitCode;

use pinfold_core::Host;
use pinfold_core::state::Store;

mod checks;
mod cli;
mod commands;
mod exec;
#[cfg(test)]
mod fixture;
mod phases;
mod reconcile;
mod settings;
mod state;
mod steps;
mod strays;

pub use cli::Args;
use state::reservation::Reservation;

/// The command's whole run.
pub fn main() -> ExitCode {
    pinfold_core::cli::main(steps::TOOL, cli::run)
}

/// Checks the text of a settings file as pre-start does before it looks at the VM, and says what it
/// comes to: the JSON that is kept with the VM's reservation, for a guest without SMT. `source`
/// names the file in errors.
///
/// # Errors
/// What the text says wrong, with the key; that a layout is not for this machine.
pub fn check_settings(root: &Host, text: &str, source: &str) -> anyhow::Result<String> {
    Ok(serde_json::to_string(&settings::resolve(
        root, text, source, 1,
    )?)?)
}

/// Checks the text of a state file as every phase does, and gives it back as hook would write it.
///
/// # Errors
/// Why it cannot be trusted.
pub fn check_state(text: &str) -> anyhow::Result<String> {
    let (reservations, baseline) = Store::<Reservation>::parse(text).map_err(anyhow::Error::msg)?;
    Ok(Store::to_text(&reservations, &baseline)?)
}

#[cfg(test)]
#[path = "../../core/tests/machine/mod.rs"]
mod machine;
