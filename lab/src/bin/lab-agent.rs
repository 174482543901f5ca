//! The lab's agent: runs inside the lab host.

#![allow(
    clippy::disallowed_methods,
    reason = "the lab writes files and drives hosts of its own"
)]

use anyhow::{Context, Result, bail};
use pinfold_lab::cpus::Cpus;
use pinfold_lab::{agent, bare, map, pvestatd, qm, snapshot, strays, topology};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match act(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            // A closed stderr leaves the exit code.
            let _ = writeln!(std::io::stderr(), "lab-agent: {err:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(words: &[&str]) -> Result<()> {
    let (name, args) = words
        .split_first()
        .map_or(("", &[][..]), |(name, args)| (*name, args));
    match (
        Path::new(name).file_name().and_then(|name| name.to_str()),
        args,
    ) {
        (Some("qm"), _) => qm::main(args),
        (Some("swtpm"), _) => qm::helper(),
        (_, ["serve"]) => agent::serve(),
        (_, ["topology"]) => topology::apply(),
        (_, ["bare", vmid]) => bare::isolate(vmid),
        (_, ["map"]) => print(&map::draw()?),
        (_, ["pvestatd"]) => print(&pvestatd::round()?),
        (_, ["snapshot"]) => print(&snapshot::take()?.to_string()),
        (_, ["strays", cpus, vms @ ..]) => {
            let vm = |word: &&str| -> Result<(u32, Option<Cpus>)> {
                let (vm, own) = word.split_once('=').unwrap_or((word, ""));
                let own = (!own.is_empty()).then(|| own.parse()).transpose()?;
                Ok((vm.parse().context("--vm: not a VMID")?, own))
            };
            let words = vms.iter().filter(|word| **word != "--vm");
            let vms: Vec<_> = words.map(vm).collect::<Result<_>>()?;
            let found = strays::find(&cpus.parse()?, &vms)?;
            print(&(serde_json::to_string_pretty(&found)? + "\n"))
        }
        _ => bail!(
            "usage: lab-agent serve | topology | map | bare VMID | pvestatd | snapshot | strays CPUS [--vm VMID[=CPUS]]..."
        ),
    }
}

fn print(text: &str) -> Result<()> {
    std::io::stdout()
        .write_all(text.as_bytes())
        .context("cannot print")
}
