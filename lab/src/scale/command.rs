//! The product's commands that are measured.

use std::path::Path;

use crate::scale::measure::Run;
use crate::scale::tree::Counts;

/// A command of the product's.
#[derive(Debug, Clone, Copy)]
pub struct Command {
    /// The program.
    pub program: &'static str,
    /// Its arguments but `--sysroot`.
    pub args: &'static [&'static str],
    /// The host that it is run on.
    pub host: HostState,
    /// How many objects it looks at.
    pub objects: fn(Counts) -> u32,
    codes: &'static [i32],
}

/// What a command needs of the host, or does to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum HostState {
    /// It reads the host as it was written.
    Fresh,
    /// It changes the host: each run needs one of its own.
    Changed,
    /// It reads a host on which VM 100 has its CPUs.
    Fenced,
}

/// post-start, by which a host becomes fenced as well.
pub const POST_START: Command = Command {
    program: "hook",
    args: &["100", "post-start"],
    host: HostState::Changed,
    objects: |counts| counts.cpus + counts.kthreads + counts.irqs,
    codes: &[0],
};

/// The commands, those that need the host as it was written first.
pub const COMMANDS: [Command; 12] = [
    Command {
        args: &["plan", "100"],
        host: HostState::Fresh,
        ..POST_START
    },
    Command {
        args: &["check"],
        host: HostState::Fresh,
        objects: |counts| counts.vms,
        // 1: it has found something.
        codes: &[0, 1],
        ..POST_START
    },
    list("hook", &["layout"], |counts| counts.cpus),
    list("pin-irqs", &["--list"], |counts| counts.irqs),
    list("pin-kthreads", &["--list"], |counts| counts.kthreads),
    list("pin-vcpu", &["100", "--list"], |counts| {
        counts.cpus / 2 / counts.vms.max(1)
    }),
    list("pci-reset", &["--list"], |counts| counts.pci),
    list("cpu-hotplug", &["--list"], |counts| counts.cpus),
    list("governor", &["--list"], |counts| counts.cpus),
    list("cg-slice", &["--list"], |counts| counts.vms),
    POST_START,
    Command {
        args: &["status"],
        host: HostState::Fenced,
        objects: |counts| counts.cpus + counts.kthreads + counts.threads + counts.irqs,
        // 1: something may run on CPU of VM 100.
        codes: &[0, 1],
        ..POST_START
    },
];

/// More commands, of which only the memory is bounded: they do what one of [`COMMANDS`] does, and
/// keep or print more.
pub const FOR_MEMORY: [Command; 8] = [
    list("hook", &["plan", "100", "--json"], no_objects),
    list("hook", &["plan", "100", "--verbose"], no_objects),
    Command {
        codes: &[0, 1],
        ..list("hook", &["check", "--json"], no_objects)
    },
    list("hook", &["layout", "--json"], no_objects),
    list("pin-irqs", &["--list", "--json"], no_objects),
    list("pin-kthreads", &["--list", "--json"], no_objects),
    Command {
        host: HostState::Fenced,
        ..POST_START
    },
    Command {
        args: &["status", "--json"],
        host: HostState::Fenced,
        codes: &[0, 1],
        ..POST_START
    },
];

const fn no_objects(_: Counts) -> u32 {
    0
}

const fn list(
    program: &'static str,
    args: &'static [&'static str],
    objects: fn(Counts) -> u32,
) -> Command {
    Command {
        program,
        args,
        host: HostState::Fresh,
        objects,
        codes: &[0],
    }
}

impl Command {
    /// As a user types it.
    pub fn name(&self) -> String {
        format!("{} {}", self.program, self.args.join(" "))
    }

    /// A run of the program in `bins` on the host below `root`.
    pub fn run(&self, bins: &Path, root: &Path) -> Run {
        let mut args: Vec<String> = self.args.iter().map(|&arg| arg.to_owned()).collect();
        args.extend(["--sysroot".to_owned(), root.display().to_string()]);
        Run {
            program: bins.join(self.program).display().to_string(),
            args,
            codes: self.codes,
        }
    }
}
