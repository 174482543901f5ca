//! stdout, stderr and the terminal.

use std::io::{self, Write};

use crate::error::os_text;

/// Prints a result to stdout. A reader that has gone (`| head`) is not an error.
///
/// # Errors
/// If stdout cannot be written, as on a full disk.
pub fn print(text: &str) -> anyhow::Result<()> {
    match try_out(text) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            anyhow::bail!("stdout: write: {}", os_text(&error))
        }
        _ => Ok(()),
    }
}

/// Writes to stdout, for a command that writes until the reader has gone.
///
/// # Errors
/// `BrokenPipe` if the reader has gone.
pub fn try_out(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Text with ANSI colours as stdout takes it: plain in a pipe, and if `NO_COLOR` or `TERM` ask for
/// that; `CLICOLOR_FORCE` keeps them in a pipe too.
pub fn coloured(text: &str) -> String {
    match anstream::AutoStream::choice(&io::stdout()) {
        anstream::ColorChoice::Never => anstream::adapter::strip_str(text).to_string(),
        _ => text.to_owned(),
    }
}

/// The columns and rows of the terminal that stdout is; `None` if it is not one.
pub fn size() -> Option<(usize, usize)> {
    let (columns, rows) = terminal_size::terminal_size_of(io::stdout())?;
    Some((columns.0.into(), rows.0.into()))
}

/// Writes to stderr, likewise.
pub fn err(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}
