//! Reports on stderr what takes minutes, while it does.

use std::io::Write;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(15);

/// Something long under way: a line when it begins, one each `INTERVAL`, and one when it is
/// dropped.
#[derive(Debug)]
pub struct Progress {
    end: Option<Sender<()>>,
    reporter: Option<JoinHandle<()>>,
}

impl Progress {
    /// Reports that it begins.
    pub fn start(what: &str) -> Self {
        let what = what.to_owned();
        let (end, ended) = channel();
        print(&format!("{what} ..."));
        let reporter = thread::spawn(move || {
            let began = Instant::now();
            let seconds = || began.elapsed().as_secs();
            while ended.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                print(&format!("{what} ... {} s", seconds()));
            }
            print(&format!("{what}: ended after {} s", seconds()));
        });
        Self {
            end: Some(end),
            reporter: Some(reporter),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(reporter) = self.reporter.take() {
            // A thread that only prints has no way to fail.
            let _ = reporter.join();
        }
    }
}

fn print(line: &str) {
    // A closed stderr is not a reason to stop.
    let _ = writeln!(std::io::stderr(), "lab: {line}");
}
