//! The lab's end of the line to the agent.

use crate::protocol::{Answer, Ask, Reply, Request, line};
use anyhow::{Context, Result, anyhow, bail};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime};

type Waiting = Arc<Mutex<HashMap<u64, Sender<Answer>>>>;

/// A session with the agent. Requests may be under way side by side.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
    session: u64,
    next: AtomicU64,
    waiting: Waiting,
    /// Key of the files that the agent was unpacked with.
    pub payload: String,
}

/// A request under way.
#[derive(Debug)]
pub struct Pending(Receiver<Answer>);

impl Channel {
    /// Connects and waits until the agent answers.
    pub fn connect(socket: &Path, patience: Duration) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("{}: cannot connect", socket.display()))?;
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let session = now.as_micros() as u64 ^ (u64::from(std::process::id()) << 40);
        let waiting = Waiting::default();
        let replies = BufReader::new(stream.try_clone().context("cannot share the socket")?);
        let hand_out = Arc::clone(&waiting);
        thread::spawn(move || receive(replies, session, &hand_out));
        let mut channel = Self {
            stream,
            session,
            next: AtomicU64::new(0),
            waiting,
            payload: String::new(),
        };
        // Ends half a line that an earlier session may have left.
        (&channel.stream)
            .write_all(b"\n")
            .context("the agent's port: cannot send")?;
        match channel.ask(Ask::Hello)?.wait(patience)? {
            Answer::Hello { payload } => channel.payload = payload,
            other => bail!("the agent: no greeting but {other:?}"),
        }
        Ok(channel)
    }

    /// Sends a request.
    pub fn ask(&self, ask: Ask) -> Result<Pending> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (answered, answer) = mpsc::channel();
        let line = line(&Request {
            session: self.session,
            id,
            ask,
        })
        .context("cannot encode a request")?;
        let mut waiting = lock(&self.waiting);
        waiting.insert(id, answered);
        // Under the lock: two requests must not mix on the line.
        (&self.stream)
            .write_all(&line)
            .context("the agent's port: cannot send")?;
        Ok(Pending(answer))
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // Ends the receiving thread; a socket that is gone already does as well.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Pending {
    /// Waits for the answer.
    pub fn wait(self, patience: Duration) -> Result<Answer> {
        match self.0.recv_timeout(patience) {
            Ok(Answer::Failed(why)) => Err(anyhow!(why)),
            Ok(answer) => Ok(answer),
            Err(RecvTimeoutError::Timeout) => bail!("the agent: no answer within {patience:?}"),
            Err(RecvTimeoutError::Disconnected) => bail!("the agent: the line was closed"),
        }
    }
}

fn receive(
    mut replies: BufReader<UnixStream>,
    session: u64,
    waiting: &Mutex<HashMap<u64, Sender<Answer>>>,
) {
    let mut line = Vec::new();
    while let Ok(1..) = replies.read_until(b'\n', &mut line) {
        let reply = serde_json::from_slice::<Reply>(&line);
        line.clear();
        // Anything else is the rest of an earlier session.
        if let Ok(reply) = reply
            && reply.session == session
            && let Some(sender) = lock(waiting).remove(&reply.id)
        {
            // Who asked may have given up.
            let _ = sender.send(reply.answer);
        }
    }
    lock(waiting).clear();
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
