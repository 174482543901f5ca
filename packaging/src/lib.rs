//! Pinfold's command lines as data, and what is made of them: man pages and shell completions.

mod commands;
mod completions;
mod pages;

use std::path::PathBuf;

/// All man pages and completions, with their paths below the folder that they are written to.
///
/// # Errors
///
/// If a page could not be rendered.
pub fn files() -> anyhow::Result<Vec<(PathBuf, Vec<u8>)>> {
    Ok(pages::all()?
        .into_iter()
        .chain(completions::all())
        .collect())
}
