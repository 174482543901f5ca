//! `hook recover`: what a killed hook or a VM that has gone left behind.

use pinfold_core::Exit;
use pinfold_core::cli::Output;

use crate::own_steps::TOOL;
use crate::phases::Run;

/// The options of `hook recover`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Remove a saved state that cannot be read; the host stays as it is now
    #[arg(long)]
    discard: bool,
}

/// The command's whole run.
///
/// # Errors
/// If the state or the host cannot be read.
pub(crate) fn run(args: &Args, output: &Output) -> anyhow::Result<Exit> {
    let mut report = output.report(TOOL).for_log();
    let mut run = Run {
        root: output.root(),
        report: &mut report,
        migrated_from: None,
    };
    if args.discard {
        run.discard()
    } else {
        run.recover()
    }
}
