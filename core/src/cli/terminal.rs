//! stdout, stderr and the terminal.

use std::io::{self, BufWriter, Write};

use serde::{Serialize, Serializer};

use crate::error::os_text;

/// Prints a result to stdout. A reader that has gone (`| head`) is not an error.
///
/// # Errors
/// If stdout cannot be written, as on a full disk.
pub fn print(text: &str) -> anyhow::Result<()> {
    unless_gone(try_out(text))
}

/// The version of all JSON that the programs print (docs/json.md). Keys may be added to a version; one
/// that goes, or gets another type or meaning, makes a new version.
pub const JSON_VERSION: u32 = 1;

/// An object with the version of its form.
#[derive(Serialize)]
struct Versioned<'a, T> {
    version: u32,
    #[serde(flatten)]
    value: &'a T,
}

/// Prints a result, an object, to stdout as indented JSON with its version.
///
/// # Errors
/// As [`print()`].
pub fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    unless_gone(try_json(value))
}

/// Prints an array, whose items have their version.
///
/// # Errors
/// As [`print()`].
pub(super) fn print_json_array(value: &impl Serialize) -> anyhow::Result<()> {
    unless_gone(write_json(value))
}

fn unless_gone(written: io::Result<()>) -> anyhow::Result<()> {
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            anyhow::bail!("stdout: write: {}", os_text(&error))
        }
        _ => Ok(()),
    }
}

/// A JSON array whose items are made one by one, each when it is written.
#[derive(Debug, Clone, Copy)]
pub struct Each<F>(pub F);

impl<I, F> Serialize for Each<F>
where
    I: IntoIterator<Item: Serialize>,
    F: Fn() -> I,
{
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq((self.0)())
    }
}

/// Writes to stdout, for a command that writes until the reader has gone.
///
/// # Errors
/// `BrokenPipe` if the reader has gone.
pub fn try_out(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Writes an object to stdout as indented JSON with its version, as it is made, so that the whole
/// text is never in memory.
///
/// # Errors
/// As [`try_out`].
pub fn try_json(value: &impl Serialize) -> io::Result<()> {
    let version = JSON_VERSION;
    write_json(&Versioned { version, value })
}

fn write_json(value: &impl Serialize) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(64 * 1024, io::stdout().lock());
    serde_json::to_writer_pretty(&mut out, value)?;
    out.write_all(b"\n")?;
    out.flush()
}

/// Text with ANSI colours as stdout takes it: plain in a pipe, and if `NO_COLOR` or `TERM` ask for
/// that; `CLICOLOR_FORCE` keeps them in a pipe too.
pub fn coloured(text: &str) -> String {
    match anstream::AutoStream::choice(&io::stdout()) {
        anstream::ColorChoice::Never => anstream::adapter::strip_str(text).to_string(),
        _ => text.to_owned(),
    }
}

/// Text without ANSI colours.
pub fn plain(text: &str) -> String {
    anstream::adapter::strip_str(text).to_string()
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
