//! `lab`: the lab by hand and for make.

#![allow(
    clippy::disallowed_methods,
    reason = "the lab writes files and drives hosts of its own"
)]

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use pinfold_lab::cache::Cache;
use pinfold_lab::image::Image;
use pinfold_lab::scale::tree::{self, Counts};
use pinfold_lab::scale::{growth, measure, memory, table};
use pinfold_lab::{Guest, Host, all_slots, bench, console, demo, lifeline, noise, setup};
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// A command given by hand may take its time.
const RUN_PATIENCE: Duration = Duration::from_secs(24 * 3600);

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
    /// Show the main job on a real host: before, during, after
    Demo {
        /// Folder with the programs; beside this one without
        #[arg(long, value_name = "DIR")]
        bins: Option<PathBuf>,
    },
    /// Draw what `hook status` shows on a real host, as SVG
    Picture {
        /// The file to write the picture to
        file: PathBuf,
        /// Folder with the programs; beside this one without
        #[arg(long, value_name = "DIR")]
        bins: Option<PathBuf>,
    },
    /// Measure hook against the same steps done by a shell script
    Bench {
        /// Folder with the programs; beside this one without
        #[arg(long, value_name = "DIR")]
        bins: Option<PathBuf>,
    },
    /// Count what runs on a VM's CPUs beside its vCPUs: not isolated, by the shell script, by hook
    Noise {
        /// Folder with the programs; beside this one without
        #[arg(long, value_name = "DIR")]
        bins: Option<PathBuf>,
    },
    /// Count what the commands that read a host cost on made-up hosts, and how that grows
    Scale {
        /// Folder with the programs; beside this one without
        #[arg(long, value_name = "DIR")]
        bins: Option<PathBuf>,
        /// Only one of the tables, the bounds of growth and that of memory
        #[arg(long, value_name = "WHAT")]
        only: Option<Scale>,
        /// Only write a host into this folder, for --sysroot
        #[arg(long, value_name = "DIR", conflicts_with = "only")]
        tree: Option<PathBuf>,
        #[command(flatten)]
        counts: Counts,
    },
    /// End the hosts that were started since, when stdin ends
    #[command(hide = true)]
    EndHosts {
        /// Hosts that stay
        kept: Vec<String>,
    },
    /// Run a command and write its peak memory to a file, for `scale`
    #[command(hide = true)]
    Peak {
        /// The file
        file: PathBuf,
        /// The command and its arguments
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Run a command in a host, in the state the last one left
    Run {
        #[command(flatten)]
        place: Where,
        /// The command and its arguments
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Talk to a running host's serial console, a root shell; Ctrl-] leaves
    Console(Where),
    /// List the hosts and what is kept
    Status,
    /// End all hosts; what is kept makes the next start quick
    Down,
    /// End all hosts and remove all that is kept, images too
    Clean,
}

/// A part of `scale`.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Scale {
    /// What each command costs on hosts of several sizes
    Tables,
    /// How the costs grow; fails if one grows faster than the host
    Bounds,
    /// Peak memory on the largest host; fails if it is above 40 MB
    Memory,
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

/// The folder of the product's programs: as named, or that of this one.
fn beside(bins: Option<PathBuf>) -> Result<PathBuf> {
    match bins {
        Some(bins) => Ok(bins),
        None => Ok(std::env::current_exe()?
            .parent()
            .map_or_else(PathBuf::new, PathBuf::from)),
    }
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
            writeln!(
                out,
                "{} is up in {}",
                host.guest,
                host.slot().folder().display()
            )?;
        }
        Cmd::Demo { bins } => demo::run(&beside(bins)?, &mut out)?,
        Cmd::Picture { file, bins } => demo::picture(&beside(bins)?, &file)?,
        Cmd::Bench { bins } => bench::run(&beside(bins)?, &mut out)?,
        Cmd::Noise { bins } => noise::run(&beside(bins)?, &mut out)?,
        Cmd::Scale {
            tree: Some(tree),
            counts,
            ..
        } => {
            tree::write(&tree, counts)?;
        }
        Cmd::Scale { bins, only, .. } => {
            measure::check_tools()?;
            let bins = beside(bins)?;
            let is_wanted = |part| only.is_none_or(|only| only == part);
            if is_wanted(Scale::Tables) {
                table::print(&bins, &mut out)?;
            }
            if is_wanted(Scale::Memory) {
                memory::check(&bins, &mut out)?;
            }
            if is_wanted(Scale::Bounds) {
                growth::check(&bins, &mut out)?;
            }
        }
        Cmd::EndHosts { kept } => lifeline::end_hosts(std::io::stdin(), &kept)?,
        Cmd::Peak { file, command } => {
            let code = measure::peak_of(&file, &command)?;
            return Ok(u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from));
        }
        Cmd::Run { place, command } => {
            let host = place.host()?;
            let words: Vec<&str> = command.iter().map(String::as_str).collect();
            let output = host.spawn(&words, RUN_PATIENCE)?.wait()?;
            out.write_all(output.stdout.as_bytes())?;
            std::io::stderr().write_all(output.stderr.as_bytes())?;
            let code = output.code.or(output.signal.map(|signal| 128 + signal));
            return Ok(code
                .and_then(|code| u8::try_from(code).ok())
                .map_or(ExitCode::FAILURE, ExitCode::from));
        }
        Cmd::Console(place) => console::join(place.host()?.slot())?,
        Cmd::Status => status(&Cache::open()?, &mut out)?,
        Cmd::Down => down(&Cache::open()?)?,
        Cmd::Clean => {
            let cache = Cache::open()?;
            down(&cache)?;
            let folder = cache.path("");
            fs::remove_dir_all(&folder)
                .with_context(|| format!("{}: cannot remove", folder.display()))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn status(cache: &Cache, out: &mut impl Write) -> Result<()> {
    for (name, slot) in all_slots(cache) {
        let process = slot.pid().map_or_else(
            || "not running".to_owned(),
            |pid| format!("QEMU is process {pid}"),
        );
        writeln!(
            out,
            "host   {name:<12} {process}, {}",
            slot.folder().display()
        )?;
    }
    for kind in ["images", "booted"] {
        let entries = fs::read_dir(cache.path(kind))
            .into_iter()
            .flatten()
            .flatten();
        let mut names: Vec<_> = entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.retain(|name| name.contains('-'));
        names.sort();
        for name in names {
            writeln!(out, "{:<6} {name}", kind.trim_end_matches('s'))?;
        }
    }
    Ok(())
}

fn down(cache: &Cache) -> Result<()> {
    all_slots(cache)
        .iter()
        .try_for_each(|(name, slot)| slot.kill().with_context(|| format!("host {name}")))
}
