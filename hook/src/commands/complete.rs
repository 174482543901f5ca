//! `hook __complete`: what the shells' completions can offer on this host, a word per line.

use pinfold_core::cli::Output;
use pinfold_core::cli::terminal::print;
use pinfold_core::sys::cpufreq;
use pinfold_core::sys::topology::Topology;
use pinfold_core::vm;
use pinfold_core::{Exit, Host, Result, printable};

use super::layout;
use crate::phases;

/// The options of `hook __complete`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    kind: Kind,
}

/// Words of one kind.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Kind {
    Vms,
    Phases,
    Cpus,
    Governors,
}

/// The command's whole run. What cannot be read is not offered.
///
/// # Errors
/// If stdout cannot be written.
pub(crate) fn run(args: &Args, output: &Output) -> anyhow::Result<Exit> {
    let mut words = words(args.kind, &output.root()).unwrap_or_default();
    words.sort();
    words.dedup();
    for word in words {
        print(&printable(&format!("{word}\n")))?;
    }
    Ok(Exit::Success)
}

fn words(kind: Kind, root: &Host) -> Result<Vec<String>> {
    Ok(match kind {
        Kind::Vms => vm::all(root)?.iter().map(ToString::to_string).collect(),
        Kind::Phases => phases::NAMES.map(str::to_owned).to_vec(),
        Kind::Cpus => layout::selectors(&Topology::read(root)?),
        Kind::Governors => {
            let mut governors = Vec::new();
            for policy in cpufreq::policies(root)? {
                governors.extend(policy.available(root)?);
            }
            governors
        }
    })
}
