//! The verbs: a file for each, with its options and its run.

pub(crate) mod blame;
pub(crate) mod check;
mod comparison;
pub(crate) mod complete;
mod drawing;
pub(crate) mod init;
pub(crate) mod install;
pub(crate) mod jitter;
pub(crate) mod layout;
pub(crate) mod list;
mod loops;
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
mod traced;

use anyhow::ensure;
use pinfold_core::Host;
use pinfold_core::cli::check_root;

use crate::settings::MAX_DEADLINE;

/// Parses a number of seconds of the command line, 1 to [`MAX_DEADLINE`].
fn seconds(text: &str) -> Result<u64, String> {
    let number = text.parse().ok();
    number
        .filter(|seconds| (1..=MAX_DEADLINE).contains(seconds))
        .ok_or_else(|| format!("not a number of seconds (1 to {MAX_DEADLINE})"))
}

/// Checks that the host may be changed, unless the steps are only printed.
fn needs_root(root: &Host, dry_run: bool) -> anyhow::Result<()> {
    ensure!(
        dry_run || check_root(root).is_ok(),
        "this needs root; -n prints the steps without it"
    );
    Ok(())
}
