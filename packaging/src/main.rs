//! Writes Pinfold's man pages and shell completions, from the definitions of its command lines.
//!
//!     manual DIR      # DIR/man/man8/hook.8 ..., DIR/bash, DIR/zsh, DIR/fish

#![allow(clippy::disallowed_methods)]

use std::fs;
use std::path::PathBuf;

use anyhow::Context;

fn main() -> anyhow::Result<()> {
    let folder: PathBuf = std::env::args_os()
        .nth(1)
        .context("usage: manual DIR")?
        .into();
    for (name, text) in packaging::files()? {
        let path = folder.join(name);
        let parent = path.parent().context("a file without a folder")?;
        fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
        fs::write(&path, text).with_context(|| path.display().to_string())?;
    }
    Ok(())
}
