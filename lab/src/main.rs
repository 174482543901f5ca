//! `lab`: the lab by hand and for make.

use anyhow::Result;
use clap::{Parser, Subcommand};
use pinfold_lab::cache::Cache;
use pinfold_lab::image::Image;
use pinfold_lab::{Guest, Host, setup};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// A real 24-CPU host under QEMU, to test Pinfold on
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Subcommand)]
enum Cmd {
    /// Install what the lab is made with, if it is missing
    Setup,
    /// Build a guest's image, if it is not there
    Image { guest: Guest },
    /// Start a host, or find it running; it stays until `down`
    Up(Where),
    /// Run a command in a host, in the state the last one left
    Run {
        #[command(flatten)]
        place: Where,
        /// The command and its arguments
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
}

#[derive(clap::Args)]
struct Where {
    /// trixie or bookworm
    guest: Guest,
    /// Number of the host, to have several of one guest
    #[arg(long)]
    slot: Option<usize>,
    /// Folder with the programs to test, put on the host's PATH
    #[arg(long, value_name = "DIR")]
    bins: Option<PathBuf>,
    /// Bring the host back to its first state before
    #[arg(long)]
    reset: bool,
}

impl Where {
    fn host(&self) -> Result<Host> {
        let mut host = Host::attach(self.guest, self.slot.or(Some(0)), self.bins.as_deref())?;
        if self.reset {
            host.reset()?;
        }
        Ok(host)
    }
}

fn main() -> ExitCode {
    act(Args::parse()).unwrap_or_else(|err| {
        // A closed stderr leaves the exit code.
        let _ = writeln!(std::io::stderr(), "lab: {err:#}");
        ExitCode::FAILURE
    })
}

fn act(args: Args) -> Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    match args.command {
        Cmd::Setup => {
            let installed = setup::ensure(&Cache::open()?)?;
            if !installed.is_empty() {
                writeln!(out, "installed {}", installed.join(" "))?;
            }
        }
        Cmd::Image { guest } => {
            let image = Image::ensure(&Cache::open()?, guest)?;
            writeln!(out, "{}", image.disk().display())?;
        }
        Cmd::Up(place) => {
            let host = place.host()?;
            writeln!(out, "{} is up in {}", host.guest, host.slot().folder().display())?;
        }
        Cmd::Run { place, command } => {
            let host = place.host()?;
            let words: Vec<&str> = command.iter().map(String::as_str).collect();
            let output = host.run(&words)?;
            out.write_all(output.stdout.as_bytes())?;
            std::io::stderr().write_all(output.stderr.as_bytes())?;
            let code = output.code.or(output.signal.map(|signal| 128 + signal));
            return Ok(code.and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from));
        }
    }
    Ok(ExitCode::SUCCESS)
}
