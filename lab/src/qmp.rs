//! QEMU's control socket.

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// A connection to one QEMU, which serves one at a time.
#[derive(Debug)]
pub struct Qmp(BufReader<UnixStream>);

impl Qmp {
    /// Connects and leaves negotiation mode. No answer takes longer than `patience`, or it is an
    /// error.
    pub fn connect(socket: &Path, patience: Duration) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("{}: cannot connect", socket.display()))?;
        stream
            .set_read_timeout(Some(patience))
            .context("cannot set a timeout")?;
        let mut qmp = Self(BufReader::new(stream));
        qmp.read()
            .with_context(|| format!("{}: no greeting", socket.display()))?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command; events that come meanwhile are dropped.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = json!({"execute": command, "arguments": arguments}).to_string() + "\n";
        self.0
            .get_mut()
            .write_all(line.as_bytes())
            .with_context(|| format!("QMP {command}: cannot send"))?;
        loop {
            let mut reply = self
                .read()
                .with_context(|| format!("QMP {command}: no answer"))?;
            if let Some(error) = reply.get("error") {
                bail!(
                    "QMP {command}: {}",
                    error
                        .get("desc")
                        .and_then(Value::as_str)
                        .unwrap_or("failed")
                );
            }
            if let Some(value) = reply.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Runs a line of the human monitor and returns what it prints; `savevm` and `loadvm` print
    /// only errors.
    pub fn hmp(&mut self, line: &str) -> Result<String> {
        let printed = self.execute("human-monitor-command", json!({"command-line": line}))?;
        Ok(printed.as_str().unwrap_or_default().replace('\r', ""))
    }

    /// Runs a line of the human monitor that prints nothing unless it fails.
    pub fn hmp_quiet(&mut self, line: &str) -> Result<()> {
        let printed = self.hmp(line)?;
        if printed.trim().is_empty() {
            Ok(())
        } else {
            bail!("QEMU monitor, {line}: {}", printed.trim())
        }
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            bail!("QEMU closed the connection");
        }
        Ok(serde_json::from_str(&line)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread;

    #[test]
    fn events_are_skipped_and_errors_reported() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"{\"QMP\": {}}\n").unwrap();
            let answers = [
                "{\"return\": {}}\n",
                "{\"event\": \"STOP\"}\n{\"return\": \"Error: no\\r\\n\"}\n",
                "{\"error\": {\"class\": \"GenericError\", \"desc\": \"bad\"}}\n",
            ];
            let mut asked = BufReader::new(stream.try_clone().unwrap()).lines();
            for answer in answers {
                asked.next().unwrap().unwrap();
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        let mut qmp = Qmp::connect(&socket, Duration::from_secs(5)).unwrap();
        let err = qmp.hmp_quiet("loadvm x").unwrap_err();
        assert_eq!(err.to_string(), "QEMU monitor, loadvm x: Error: no");
        assert_eq!(
            qmp.execute("quit", json!({})).unwrap_err().to_string(),
            "QMP quit: bad"
        );
        server.join().unwrap();
        let err = qmp.execute("quit", json!({})).unwrap_err();
        assert!(format!("{err:#}").starts_with("QMP quit: "));
    }
}
