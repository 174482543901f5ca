//! The agent: runs inside the lab host as a service and does what the lab asks over virtio-serial.

use crate::protocol::{Answer, Ask, Bytes, Done, PORT, Reply, Request, Run, line};
use anyhow::{Context, Result, bail};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// Holds the key of the payload, beside the agent.
pub const PAYLOAD_KEY: &str = "/usr/local/lib/pinfold-lab/key";

/// How long a program that has ended may leave its output open before the answer goes without it.
const OUTPUT_GRACE: Duration = Duration::from_secs(3);
/// While the lab's end of the port is closed, it is looked at this often.
const CLOSED_POLL: Duration = Duration::from_millis(50);

/// Answers requests without end.
pub fn serve() -> Result<()> {
    let path = Path::new("/dev/virtio-ports").join(PORT);
    while !path.exists() {
        thread::sleep(CLOSED_POLL);
    }
    let port = OpenOptions::new().read(true).write(true).open(&path);
    let port = port.with_context(|| format!("{}: cannot open", path.display()))?;
    let out = Arc::new(Mutex::new(
        port.try_clone().context("cannot share the port")?,
    ));
    let mut lines = BufReader::new(port);
    let mut session = 0;
    let mut buffer = Vec::new();
    loop {
        // A closed host end reads as end of file; what came before stays in the buffer.
        lines
            .read_until(b'\n', &mut buffer)
            .context("cannot read the port")?;
        if buffer.last() != Some(&b'\n') {
            thread::sleep(CLOSED_POLL);
            continue;
        }
        let request = serde_json::from_slice::<Request>(&buffer);
        buffer.clear();
        let Ok(request) = request else { continue };
        if request.ask == Ask::Hello {
            session = request.session;
        }
        if request.session == session {
            let out = Arc::clone(&out);
            thread::spawn(move || answer(request, &out));
        }
    }
}

fn answer(request: Request, out: &Mutex<File>) {
    let answer = act(request.ask).unwrap_or_else(|err| Answer::Failed(format!("{err:#}")));
    let reply = Reply {
        session: request.session,
        id: request.id,
        answer,
    };
    let Ok(line) = line(&reply) else { return };
    // If the port fails, it cannot be reported.
    let _ = out
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .write_all(&line);
}

fn act(ask: Ask) -> Result<Answer> {
    Ok(match ask {
        Ask::Hello => Answer::Hello {
            payload: fs::read_to_string(PAYLOAD_KEY).unwrap_or_default(),
        },
        Ask::Run(run) => Answer::Done(execute(run)?),
        Ask::Put { path, mode, data } => {
            put(Path::new(&path), mode, &data.0)
                .with_context(|| format!("{path}: cannot write"))?;
            Answer::Written
        }
        Ask::Get { path } => {
            let data = fs::read(&path).with_context(|| format!("{path}: cannot read"))?;
            Answer::Content(Bytes(data))
        }
    })
}

/// Writes beside and renames, so that a program that is running can be replaced; a kernel file is
/// written as it is.
fn put(path: &Path, mode: u32, data: &[u8]) -> Result<()> {
    let kernel_file = ["/proc", "/sys"].iter().any(|fs| path.starts_with(fs));
    if kernel_file {
        return Ok(OpenOptions::new().write(true).open(path)?.write_all(data)?);
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    fs::write(&beside, data)?;
    fs::set_permissions(&beside, fs::Permissions::from_mode(mode))?;
    Ok(fs::rename(&beside, path)?)
}

/// Before hook looks at CPUs: those that were offline have QEMU's numbering since, and on a 5900X they would have their own.
fn renumber() -> Result<()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _lock = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    crate::topology::apply()
}

fn execute(run: Run) -> Result<Done> {
    let [program, args @ ..] = run.argv.as_slice() else {
        bail!("no program to run")
    };
    let runs_hook = |word: &String| word.contains("hook") || word.contains("qm");
    if run.argv.iter().any(runs_hook) {
        renumber()?;
    }
    let stdin = if run.stdin.is_some() {
        Stdio::piped()
    } else {
        Stdio::null()
    };
    let mut child = Command::new(program)
        .args(args)
        .envs(run.env)
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("{program}: cannot run"))?;
    if let (Some(mut pipe), Some(bytes)) = (child.stdin.take(), run.stdin) {
        // A program need not read its input.
        thread::spawn(move || drop(pipe.write_all(&bytes.0)));
    }
    let stdout = child.stdout.take().map(Collector::start);
    let stderr = child.stderr.take().map(Collector::start);
    let group = nix::unistd::Pid::from_raw(child.id().cast_signed());
    let (ended, wait) = mpsc::channel();
    thread::spawn(move || ended.send(child.wait()));
    let mut status = wait.recv_timeout(Duration::from_millis(run.timeout_ms));
    let timed_out = matches!(status, Err(RecvTimeoutError::Timeout));
    if timed_out {
        // It may have ended just now.
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
        status = wait.recv_timeout(OUTPUT_GRACE);
    }
    let status = status.with_context(|| format!("{program}: not to be killed"))?;
    let status = status.with_context(|| format!("{program}: cannot wait for it"))?;
    let (stdout, stdout_open) = stdout.map(Collector::finish).unwrap_or_default();
    let (stderr, stderr_open) = stderr.map(Collector::finish).unwrap_or_default();
    Ok(Done {
        code: status.code(),
        signal: status.signal(),
        timed_out,
        left_open: stdout_open || stderr_open,
        stdout: Bytes(stdout),
        stderr: Bytes(stderr),
    })
}

/// Reads a pipe in a thread of its own.
struct Collector {
    bytes: Arc<Mutex<Vec<u8>>>,
    closed: Receiver<()>,
}

impl Collector {
    fn start(mut pipe: impl Read + Send + 'static) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let (done, closed) = mpsc::channel();
        let into = Arc::clone(&bytes);
        thread::spawn(move || {
            let mut chunk = vec![0; 1 << 16];
            while let Ok(n @ 1..) = pipe.read(&mut chunk) {
                into.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .extend(chunk.iter().take(n));
            }
            // Once the answer is sent, the receiver has gone.
            let _ = done.send(());
        });
        Self { bytes, closed }
    }

    /// What was read, and whether the pipe is still open.
    fn finish(self) -> (Vec<u8>, bool) {
        let open = self.closed.recv_timeout(OUTPUT_GRACE).is_err();
        let bytes = std::mem::take(&mut *self.bytes.lock().unwrap_or_else(PoisonError::into_inner));
        (bytes, open)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, timeout_ms: u64) -> Done {
        let argv = ["sh", "-c", script].map(String::from).to_vec();
        execute(Run {
            argv,
            timeout_ms,
            ..Run::default()
        })
        .unwrap()
    }

    #[test]
    fn a_program_is_run_to_its_end() {
        let argv = ["sh", "-c", "cat; echo $WORD >&2; exit 3"]
            .map(String::from)
            .to_vec();
        let env = vec![("WORD".to_owned(), "err".to_owned())];
        let stdin = Some(Bytes(b"in\xff".to_vec()));
        let done = execute(Run {
            argv,
            env,
            stdin,
            timeout_ms: 60_000,
        })
        .unwrap();
        let wanted = Done {
            code: Some(3),
            stdout: Bytes(b"in\xff".to_vec()),
            stderr: Bytes(b"err\n".to_vec()),
            ..Done::default()
        };
        assert_eq!(done, wanted);
    }

    #[test]
    fn one_that_takes_too_long_is_killed() {
        let done = sh("echo begun; sleep 60 & wait", 200);
        assert!(done.timed_out);
        assert_eq!((done.code, done.signal), (None, Some(9)));
        assert_eq!(done.stdout.0, b"begun\n");
    }

    #[test]
    fn output_that_a_child_keeps_open_is_reported() {
        let done = sh("sleep 8 & echo done", 60_000);
        assert!(done.left_open);
        assert_eq!(done.stdout.0, b"done\n");
    }

    #[test]
    fn what_cannot_be_run_is_named() {
        let run = Run {
            argv: vec!["/no/such".to_owned()],
            ..Run::default()
        };
        let err = execute(run).unwrap_err();
        assert_eq!(
            format!("{err:#}"),
            "/no/such: cannot run: No such file or directory (os error 2)"
        );
    }
}
