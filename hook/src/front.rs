//! `pinfold COMMAND`: every program by one name. A COMMAND that is not a program is hook's.

// It runs the program in its own place, without a time limit.
#![allow(clippy::disallowed_methods)]

use std::env;
use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process;

use clap::{Command, CommandFactory};
use pinfold_core::cli;

use crate::cli::{Args, unknown_verb};

const NAME: &str = "pinfold";

/// As a shell returns for a command that it cannot run.
const CANNOT_RUN: u8 = 127;

/// The programs' command lines. [`command`] has them as subcommands.
#[must_use]
pub fn programs() -> Vec<Command> {
    vec![
        Args::command(),
        pin_vcpu::Args::command(),
        pin_irqs::Args::command(),
        pin_kthreads::Args::command(),
        cpu_hotplug::Args::command(),
        cg_slice::Args::command(),
        pci_reset::Args::command(),
        governor::Args::command(),
    ]
}

/// The command line of `pinfold`: hook's, and the programs.
#[must_use]
pub fn command() -> Command {
    let mut hook = Args::command();
    // With the options that all commands have.
    hook.build();
    let verbs = hook
        .get_subcommands()
        .filter(|verb| verb.get_name() != "help");
    Command::new(NAME)
        .about("Isolate CPUs of a Proxmox VE host for virtual machines: all of Pinfold's commands by one name")
        .override_usage("pinfold <COMMAND> [ARGUMENTS]\n       pinfold <VMID> <PHASE>")
        .subcommand_help_heading("Commands, those of hook first")
        .subcommands(verbs.cloned())
        .subcommands(programs())
        .after_help("pinfold help COMMAND prints the help of a command.")
}

/// What the words after `pinfold` stand for.
#[derive(Debug, PartialEq, Eq)]
enum Meaning {
    /// A program with its arguments.
    Run(OsString, Vec<OsString>),
    Help,
    Version,
    Unknown(String),
}

fn meaning(mut words: Vec<OsString>) -> Meaning {
    let is_program = |word: &OsStr| {
        let mut programs = programs().into_iter();
        programs.any(|program| word == program.get_name())
    };
    let is_verb = |word: &str| Args::command().find_subcommand(word).is_some();
    let Some(first) = words
        .first()
        .map(|word| word.to_string_lossy().into_owned())
    else {
        return Meaning::Help;
    };
    match (first.as_str(), words.get(1)) {
        ("-h" | "--help", _) | ("help", None) => Meaning::Help,
        ("-V" | "--version", _) => Meaning::Version,
        ("help", Some(program)) if is_program(program) => {
            let program = words.remove(1);
            // A program without commands has no help for them.
            let args = if words.len() > 1 {
                words
            } else {
                vec!["--help".into()]
            };
            Meaning::Run(program, args)
        }
        ("help", Some(word)) if !is_verb(&word.to_string_lossy()) => {
            Meaning::Unknown(word.to_string_lossy().into_owned())
        }
        (program, _) if is_program(OsStr::new(program)) => Meaning::Run(words.remove(0), words),
        (word, _)
            if word.starts_with(|c: char| c.is_ascii_alphabetic())
                && !is_verb(word)
                && word != "help" =>
        {
            Meaning::Unknown(first)
        }
        _ => Meaning::Run("hook".into(), words),
    }
}

/// The whole run of `pinfold`; `commit` is that of the program.
pub fn main(commit: Option<&str>) -> process::ExitCode {
    let (program, args) = match meaning(env::args_os().skip(1).collect()) {
        Meaning::Run(program, args) => (program, args),
        Meaning::Help => return cli::print_answer(&command().render_help().to_string()),
        Meaning::Version => {
            return cli::print_answer(&format!("{NAME} {}\n", cli::version(commit)));
        }
        Meaning::Unknown(word) => return cli::refused(&unknown_verb(&command(), &word)),
    };
    // Of the same installation, also if another is first on PATH.
    let path = env::current_exe()
        .ok()
        .and_then(|own| Some(own.parent()?.join(&program)))
        .unwrap_or_else(|| PathBuf::from(&program));
    let error = process::Command::new(&path).args(args).exec();
    cli::print_error(NAME, &anyhow::anyhow!("{}: {error}", path.display()));
    process::ExitCode::from(CANNOT_RUN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn words_after_pinfold() {
        for (line, program, args) in [
            ("pin-irqs --list", "pin-irqs", "--list"),
            ("hook check 100", "hook", "check 100"),
            ("check 100", "hook", "check 100"),
            ("100 post-start", "hook", "100 post-start"),
            ("--json status", "hook", "--json status"),
            ("help check", "hook", "help check"),
            ("help pin-irqs", "pin-irqs", "--help"),
            ("help governor set", "governor", "help set"),
        ] {
            assert_eq!(
                meaning(words(line)),
                Meaning::Run(program.into(), words(args)),
                "{line}"
            );
        }
        for line in ["", "help", "--help", "-h"] {
            assert_eq!(meaning(words(line)), Meaning::Help, "{line}");
        }
        assert_eq!(meaning(words("--version")), Meaning::Version);
        for (line, nearest) in [
            ("pin-irq --list", "'pin-irqs'"),
            ("help statsu", "'status'"),
        ] {
            let Meaning::Unknown(word) = meaning(words(line)) else {
                panic!("{line} is known")
            };
            let error = unknown_verb(&command(), &word).to_string();
            assert!(error.contains(nearest), "{line}: {error}");
        }
        command().debug_assert();
    }
}
