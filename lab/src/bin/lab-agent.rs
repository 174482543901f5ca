//! The lab's agent: runs inside the lab host.

use anyhow::{Result, bail};
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match act(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            use std::io::Write;
            // A closed stderr leaves the exit code.
            let _ = writeln!(std::io::stderr(), "lab-agent: {err:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(words: &[&str]) -> Result<()> {
    let (name, args) = words.split_first().map_or(("", &[][..]), |(name, args)| (*name, args));
    match (Path::new(name).file_name().and_then(|name| name.to_str()), args) {
        (Some("qm"), _) => Ok(()),
        (_, ["serve"]) => pinfold_lab::agent::serve(),
        _ => bail!("usage: lab-agent serve"),
    }
}
