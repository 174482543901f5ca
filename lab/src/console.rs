//! Joins a terminal and the serial console of a lab host.

use crate::qemu::Slot;
use anyhow::{Context, Result};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;

/// Ctrl-], as telnet has it.
const LEAVE: u8 = 0x1d;

/// Until Ctrl-] is typed, or the host goes.
pub fn join(slot: &Slot) -> Result<()> {
    let (socket, terminal) = (slot.console(), std::io::stdin());
    let mut stream = UnixStream::connect(&socket)
        .with_context(|| format!("{}: cannot connect", socket.display()))?;
    let mut from_host = stream.try_clone().context("cannot share the socket")?;
    let before = tcgetattr(&terminal).context("stdin: not a terminal: use `lab run` instead")?;
    let mut raw = before.clone();
    cfmakeraw(&mut raw);
    tcsetattr(&terminal, SetArg::TCSANOW, &raw).context("stdin: cannot make it raw")?;
    thread::spawn(move || {
        let mut out = std::io::stdout();
        let mut chunk = [0; 4096];
        while let Ok(n @ 1..) = from_host.read(&mut chunk) {
            // A stdout that is closed has no one to show it to.
            let _ = out
                .write_all(chunk.get(..n).unwrap_or_default())
                .and_then(|()| out.flush());
        }
    });
    // A shell that waits shows its prompt.
    let result = stream.write_all(b"\r").and_then(|()| type_to(&mut stream));
    tcsetattr(&terminal, SetArg::TCSANOW, &before).context("stdin: cannot set it back")?;
    result.with_context(|| format!("{}: the host's console is gone", socket.display()))
}

fn type_to(stream: &mut UnixStream) -> std::io::Result<()> {
    let mut typed = [0; 256];
    loop {
        let n = std::io::stdin().lock().read(&mut typed)?;
        let typed = typed.get(..n).unwrap_or_default();
        if typed.is_empty() || typed.contains(&LEAVE) {
            return Ok(());
        }
        stream.write_all(typed)?;
    }
}
