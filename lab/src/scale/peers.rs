//! What others cost for the like of it, reading only: lscpu and lstopo on the made-up hosts, ps and
//! tuna, which know the running host only, by what 2,000 sleeping threads more cost them.

use std::io::Write;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::scale::measure::Run;

const SLEEPERS: u32 = 2000;

/// Those that read a host below a folder, by name.
pub fn on_tree(root: &Path) -> [(&'static str, Run); 2] {
    let root = root.display().to_string();
    [
        ("lscpu -e", run("lscpu", &["-e", "--sysroot", &root])),
        (
            "lstopo-no-graphics",
            run("lstopo-no-graphics", &["--input", &root, "--of", "console"]),
        ),
    ]
}

/// Prints what each thread costs those that read the running host only.
pub fn print_live(out: &mut impl Write) -> Result<()> {
    let scratch = TempDir::new().context("no folder for the measurements")?;
    let scratch = scratch.path();
    writeln!(
        out,
        "\nOn the running host, by {SLEEPERS} sleeping threads more:\n\n\
         | command | calls per thread | instructions per thread |\n|---|--:|--:|"
    )?;
    for (name, run) in [
        (
            "ps -eLo pid,tid,psr,comm",
            run("ps", &["-eLo", "pid,tid,psr,comm"]),
        ),
        ("tuna -P", run("tuna", &["-P"])),
    ] {
        // One that is not installed is left out.
        let Ok(calls) = run.calls(scratch) else {
            continue;
        };
        let instructions = run.instructions(scratch)?;
        let sleepers = Sleepers::start()?;
        let (more_calls, more_instructions) = (run.calls(scratch)?, run.instructions(scratch)?);
        drop(sleepers);
        let per_thread =
            |with: u64, without: u64| with.saturating_sub(without) / u64::from(SLEEPERS);
        writeln!(
            out,
            "| `{name}` | {} | {} |",
            per_thread(more_calls, calls),
            per_thread(more_instructions, instructions)
        )?;
    }
    Ok(())
}

fn run(program: &str, args: &[&str]) -> Run {
    Run {
        program: program.to_owned(),
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        codes: &[0],
    }
}

/// Threads that sleep until this is dropped.
struct Sleepers(#[expect(dead_code, reason = "its drop ends the threads")] Vec<Sender<()>>);

impl Sleepers {
    fn start() -> Result<Self> {
        let start = |_| -> Result<Sender<()>> {
            let (sender, receiver): (Sender<()>, Receiver<()>) = channel();
            thread::Builder::new()
                .stack_size(64 * 1024)
                .spawn(move || receiver.recv())
                .context("cannot start a thread")?;
            Ok(sender)
        };
        Ok(Self((0..SLEEPERS).map(start).collect::<Result<_>>()?))
    }
}
