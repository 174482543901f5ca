//! Other hookscripts of a VM, which hook runs since Proxmox VE calls only one: `chain` in its
//! settings. See docs/design.md, "Other hookscripts".

use std::io;
use std::time::Duration;

use anyhow::{Context, bail};
use pinfold_core::state::Store;
use pinfold_core::vm::VmId;
use pinfold_core::{Host, Report, os_text};

use crate::checks::script;
use crate::exec;
use crate::settings;
use crate::state::reservation::Reservation;

/// The scripts of a VM, and how long each may take.
#[derive(Debug)]
pub(crate) struct Chain {
    vmid: VmId,
    scripts: Vec<String>,
    deadline: Duration,
}

impl Chain {
    /// The scripts for the next start of a VM.
    pub(crate) fn for_start(root: &Host, vmid: VmId) -> Self {
        let (scripts, deadline) = settings::chain(root, vmid);
        Self {
            vmid,
            scripts,
            deadline,
        }
    }

    /// The scripts of a VM that was started: by the settings of its start, if they are known.
    pub(crate) fn of_started(root: &Host, vmid: VmId) -> Self {
        let state = Store::<Reservation>::peek(root).ok().flatten();
        match state.and_then(|mut state| state.reservations.remove(&vmid.into())) {
            None => Self::for_start(root, vmid),
            Some(reservation) => Self {
                vmid,
                deadline: Duration::from_secs(reservation.settings.deadlines.chain),
                scripts: reservation.settings.chain,
            },
        }
    }

    /// Runs the scripts in order, up to the first that fails.
    ///
    /// # Errors
    /// What failed, with the script.
    pub(crate) fn run(&self, root: &Host, report: &mut Report, phase: &str) -> anyhow::Result<()> {
        for volume in &self.scripts {
            self.run_one(root, report, volume, phase)?;
        }
        Ok(())
    }

    /// Runs the scripts in reverse, all of them; failures are reported.
    pub(crate) fn run_back(&self, root: &Host, report: &mut Report, phase: &str) {
        for volume in self.scripts.iter().rev() {
            if let Err(error) = self.run_one(root, report, volume, phase) {
                report.error(&format!("{error:#}"));
            }
        }
    }

    fn run_one(
        &self,
        root: &Host,
        report: &mut Report,
        volume: &str,
        phase: &str,
    ) -> anyhow::Result<()> {
        let named = || format!("hookscript {volume} on {phase}");
        let path = script::file(root, volume).with_context(named)?;
        let vmid = self.vmid.to_string();
        let ended = exec::run_script(&root.path(&path), &[&vmid, phase], self.deadline, |line| {
            report.line(line);
        });
        let ended = ended.map_err(|error| {
            let why = match error.kind() {
                io::ErrorKind::NotFound => script::lacks_interpreter(root, &path),
                _ => None,
            };
            let why = why.unwrap_or_else(|| os_text(&error));
            anyhow::anyhow!("{}: {why}", named())
        })?;
        if !ended.left.is_empty() {
            let left = ended.left.join(", ");
            report.note(&format!("{} left processes behind: {left}", named()));
        }
        match ended.status {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("{}: {status}", named()),
            None => bail!(
                "{}: not finished within {} s; it was killed",
                named(),
                self.deadline.as_secs_f64()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::MadeUpHost;
    use pinfold_core::Verbosity;
    use std::fs;

    fn host(scripts: &[(&str, &str)]) -> MadeUpHost {
        let host = MadeUpHost::new("5900x");
        for (name, text) in scripts {
            let path = format!("var/lib/vz/snippets/{name}");
            host.file(&path, &format!("#!/bin/sh\n{text}\n"));
            host.mode(&path, 0o755);
        }
        host
    }

    fn chain(scripts: &[&str], milliseconds: u64) -> Chain {
        Chain {
            vmid: "100".parse().unwrap(),
            scripts: scripts
                .iter()
                .map(|name| format!("local:snippets/{name}"))
                .collect(),
            deadline: Duration::from_millis(milliseconds),
        }
    }

    fn run(host: &MadeUpHost, chain: &Chain, phase: &str) -> (Result<(), String>, Vec<String>) {
        let mut report = Report::new("hook", Verbosity::Normal, false).for_log();
        let ended = chain.run(&host.root, &mut report, phase);
        (
            ended.map_err(|error| format!("{error:#}")),
            report.notes().to_vec(),
        )
    }

    #[test]
    fn scripts_get_what_proxmox_ve_gives_them() {
        let log = |host: &MadeUpHost| host.root.read("log").unwrap_or_default();
        let note = |name: &str| {
            format!("cd \"$(dirname \"$0\")/../../../..\"; echo {name} $# $1 $2 $(wc -c) >> log")
        };
        let host = host(&[("a", &note("a")), ("b", &note("b"))]);
        let both = chain(&["a", "b"], 20_000);
        assert_eq!(run(&host, &both, "pre-start").0, Ok(()));
        assert_eq!(log(&host), "a 2 100 pre-start 0\nb 2 100 pre-start 0\n");
        fs::remove_file(host.root.path("log")).unwrap();
        let mut report = Report::new("hook", Verbosity::Quiet, false);
        both.run_back(&host.root, &mut report, "post-stop");
        assert_eq!(log(&host), "b 2 100 post-stop 0\na 2 100 post-stop 0\n");
    }

    #[test]
    fn what_fails_hangs_or_stays_is_named() {
        let host = host(&[
            ("fails", "exit 3"),
            ("hangs", "exec sleep 1000"),
            ("leaves", "setsid sleep 7.25 & exit 0"),
            ("fine", "touch \"$0.ran\""),
            ("loops", "/var/lib/vz/snippets/hook \"$@\""),
        ]);
        for (name, text) in [
            ("windows", "#!/bin/sh\r\nexit 0\r\n"),
            ("moved", "#! /opt/gone/perl -w\n"),
            ("bare", "touch \"$0.ran\"\n"),
        ] {
            let path = format!("var/lib/vz/snippets/{name}");
            host.file(&path, text);
            host.mode(&path, 0o755);
        }
        let why = |names: &[&str]| run(&host, &chain(names, 1500), "pre-start").0.unwrap_err();
        assert_eq!(
            why(&["fails", "fine"]),
            "hookscript local:snippets/fails on pre-start: exit status: 3"
        );
        assert!(!host.root.exists("var/lib/vz/snippets/fine.ran"));
        assert_eq!(
            why(&["hangs"]),
            "hookscript local:snippets/hangs on pre-start: not finished within 1.5 s; it was killed"
        );
        assert!(why(&["gone"]).ends_with("snippets/gone: No such file or directory"));
        assert!(why(&["loops"]).ends_with("snippets/loops: it is hook itself, or calls it"));
        assert!(why(&["windows"]).ends_with(
            "snippets/windows: its lines end as on Windows, so that the interpreter \"/bin/sh\\r\" is \
             not found; remove the carriage returns"
        ));
        assert_eq!(
            why(&["moved"]),
            "hookscript local:snippets/moved on pre-start: its interpreter /opt/gone/perl does not exist"
        );
        // As by exec(3).
        assert_eq!(run(&host, &chain(&["bare"], 5000), "pre-start").0, Ok(()));
        assert!(host.root.exists("var/lib/vz/snippets/bare.ran"));
        // It holds the script's pipes; hook does not wait for it.
        let (ended, notes) = run(&host, &chain(&["leaves"], 5000), "post-start");
        assert_eq!(ended, Ok(()));
        let left = "hookscript local:snippets/leaves on post-start left processes behind: ";
        assert!(notes.len() == 1 && notes[0].starts_with(left), "{notes:?}");
    }
}
