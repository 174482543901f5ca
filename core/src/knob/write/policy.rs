//! Scheduling policies, by chrt(1): no crate has a safe function for sched_setscheduler(2).

use std::io::{self, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::answer::Answer;
use crate::error::into_io;
use crate::sys::sched::{self, SchedPolicy};
use crate::sys::task::{self, TaskId};
use crate::sysroot::Sysroot;
use crate::text::last_line;

/// How long chrt may take for one thread.
pub const POLICY_DEADLINE: Duration = Duration::from_secs(5);
/// How often its end is polled.
const INTERVAL: Duration = Duration::from_millis(1);

/// Sets a thread's policy. Threads that it starts later do not inherit a real-time one.
pub(super) fn set(root: &Sysroot, task: &TaskId, policy: &str) -> io::Result<Answer> {
    if !root.is_live() {
        return Err(io::Error::other(
            "policies can be set on the running host only, not under --sysroot",
        ));
    }
    let policy: SchedPolicy = policy.parse().map_err(io::Error::other)?;
    let options: &[&str] = match policy {
        SchedPolicy::Other => &["--other"],
        SchedPolicy::Fifo(_) => &["--reset-on-fork", "--fifo"],
        SchedPolicy::RoundRobin(_) => &["--reset-on-fork", "--rr"],
        SchedPolicy::Batch => &["--batch"],
        SchedPolicy::Idle => &["--idle"],
        SchedPolicy::Deadline | SchedPolicy::Ext => {
            return Err(io::Error::other("chrt cannot set this policy"));
        }
    };
    task::check_start(root, task).map_err(into_io)?;
    let priority = policy.priority().unwrap_or(0).to_string();
    let mut child = Command::new("chrt")
        .args(options)
        .args(["--pid", &priority, &task.tid.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| io::Error::other(format!("chrt: {error}")))?;
    if let Err(error) = end(&mut child) {
        // Of a thread that has ended, chrt only has a text.
        task::check_start(root, task).map_err(into_io)?;
        return Err(error);
    }
    let found = sched::policy(root, task).map_err(into_io)?;
    Ok(Answer::Taken(Some(found.to_string())))
}

/// Waits for chrt.
fn end(child: &mut Child) -> io::Result<()> {
    let until = Instant::now() + POLICY_DEADLINE;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= until {
            let _ = child.kill();
            let _ = child.wait();
            return Err(io::Error::other("chrt did not end in time; it was killed"));
        }
        std::thread::sleep(INTERVAL);
    };
    if status.success() {
        return Ok(());
    }
    let mut text = String::new();
    if let Some(stderr) = &mut child.stderr {
        stderr.read_to_string(&mut text)?;
    }
    Err(io::Error::other(
        last_line(&text).map_or_else(|| format!("chrt: {status}"), str::to_owned),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Host;
    use crate::knob::{Knob, Outcome, Setting, Value, apply};
    use std::sync::mpsc;

    #[test]
    fn a_threads_policy_is_set_and_comes_back() {
        let host = Host::new("/");
        let (send_tid, tid) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            send_tid.send(nix::unistd::gettid().as_raw()).unwrap();
            let _ = ended.recv();
        });
        let pid = nix::unistd::getpid().as_raw();
        let id = task::task(&host, pid, tid.recv().unwrap()).unwrap().id;
        let knob = Knob::ThreadPolicy(id);
        let now = || knob.read(&host).unwrap().unwrap();
        let set = |policy: &str| {
            let setting = Setting::new(knob.clone(), knob.to_string(), now());
            apply(&host, vec![setting.want(Value::text(policy))])[0]
                .outcome
                .clone()
        };
        assert_eq!(now(), Value::text("other"));
        // This one needs no privilege.
        assert_eq!(set("batch"), Outcome::Changed);
        assert_eq!(now(), Value::text("batch"));
        assert_eq!(set("other"), Outcome::Changed);
        assert_eq!(now(), Value::text("other"));
        assert!(matches!(set("deadline"), Outcome::Failed(_)));
        drop(end);
        thread.join().unwrap();
        assert!(set_of_ended(&host, &knob));
    }

    fn set_of_ended(host: &Host, knob: &Knob) -> bool {
        let setting = Setting::new(knob.clone(), knob.to_string(), Value::text("other"));
        let done = apply(host, vec![setting.want(Value::text("batch"))]);
        done[0].outcome == Outcome::Gone
    }
}
