//! `pinfold COMMAND`: runs Pinfold's programs by one name. A COMMAND that is not a program is hook's.

#![allow(clippy::disallowed_methods)]

use std::env;
use std::ffi::OsString;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

/// As a shell returns for a command that it cannot run.
const CANNOT_RUN: u8 = 127;

fn main() -> ExitCode {
    let mut args: Vec<OsString> = env::args_os().skip(1).collect();
    let is_program = |word: &OsString| hook::PROGRAMS.iter().any(|program| word == program);
    let program = if args.first().is_some_and(is_program) {
        args.remove(0)
    } else {
        "hook".into()
    };
    // Of the same installation, also if another is first on PATH.
    let path = env::current_exe()
        .ok()
        .and_then(|own| Some(own.parent()?.join(&program)))
        .unwrap_or_else(|| PathBuf::from(&program));
    let error = Command::new(&path).args(args).exec();
    // There is nothing left to do if stderr is closed.
    let _ = writeln!(std::io::stderr(), "pinfold: {}: {error}", path.display());
    ExitCode::from(CANNOT_RUN)
}
