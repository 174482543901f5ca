//! The timer that has hook look for new threads of a VM, such as vCPUs that are plugged in: nothing
//! calls a hook then.

use std::io;

use crate::error::into_io;
use crate::host::Host;
use crate::systemd::{Client, Writer, timer};

/// How often hook looks, in microseconds.
const EVERY: u64 = 3_000_000;

/// When systemd may wake up for it together with other timers, in microseconds.
const ACCURACY: u64 = 500_000;

/// LOG_NOTICE: systemd does not log that the service starts and ends.
const LOG_LEVEL: i32 = 5;

/// Starts the timer with its service, or stops it. Transient units are gone when they end.
pub(super) fn start_or_stop(host: &Host, vmid: u32, start: bool) -> io::Result<()> {
    let session = host.systemd();
    let unit = timer::unit(vmid);
    let what = if start { "start" } else { "stop" };
    let failed = |error| into_io(session.failed(format!("{what} {unit}.timer"))(error));
    let client = session.connect(host, session.timeouts().call);
    let Some(mut client) = client.map_err(failed)? else {
        return Err(io::Error::other(
            "timers can be started on the running host only, not under --sysroot",
        ));
    };
    if start {
        let program = std::env::current_exe()?;
        let command = [
            &program.to_string_lossy(),
            "step",
            "pin-new",
            &vmid.to_string(),
        ]
        .map(str::to_owned);
        start_timer(&mut client, &unit, &command).map_err(failed)
    } else {
        let mut body = Writer::default();
        body.string(&format!("{unit}.timer")).string("replace");
        match client.manager("StopUnit", "ss", body) {
            // Its file stays for a moment after it was stopped: by another hook, or by the timer's own.
            Err(error) if error.is_gone() => Ok(()),
            stopped => stopped.map(drop).map_err(failed),
        }
    }
}

fn start_timer(client: &mut Client, unit: &str, command: &[String]) -> crate::systemd::Called<()> {
    let description = "Look for new threads of a VM (Pinfold)";
    let mut body = Writer::default();
    body.string(&format!("{unit}.timer"))
        .string("fail")
        .array(8, |properties| {
            properties.property("Description", "s", |value| value.string(description));
            properties.property("TimersMonotonic", "a(st)", |value| {
                value.array(8, |timers| {
                    // From the end of one look to the next.
                    for base in ["OnActiveSec", "OnUnitInactiveSec"] {
                        timers.record().string(base).u64(EVERY);
                    }
                })
            });
            properties.property("AccuracyUSec", "t", |value| value.u64(ACCURACY));
        })
        // The service beside it.
        .array(8, |units| {
            units
                .record()
                .string(&format!("{unit}.service"))
                .array(8, |properties| {
                    properties.property("Description", "s", |value| value.string(description));
                    properties.property("Type", "s", |value| value.string("oneshot"));
                    properties.property("LogLevelMax", "i", |value| value.i32(LOG_LEVEL));
                    properties.property("CollectMode", "s", |value| {
                        value.string("inactive-or-failed")
                    });
                    properties.property("ExecStart", "a(sasb)", |value| {
                        value.array(8, |commands| {
                            commands.record().string(&command[0]).array(4, |words| {
                                for word in command {
                                    words.string(word);
                                }
                            });
                            commands.bool(false);
                        })
                    });
                });
        });
    client
        .manager("StartTransientUnit", "ssa(sv)a(sa(sv))", body)
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::systemd::BUS_SOCKET;
    use crate::systemd::fake::fake;

    #[test]
    fn a_timer_is_asked_for_and_stopped() {
        let (_dir, host, fake) = fake(BUS_SOCKET);
        start_or_stop(&host, 100, true).unwrap();
        let start = "/org/freedesktop/systemd1 StartTransientUnit ssa(sv)a(sa(sv)) pinfold-threads-100.timer fail";
        assert_eq!(fake.calls().last().unwrap(), start);
        start_or_stop(&host, 100, false).unwrap();
        let stop = "/org/freedesktop/systemd1 StopUnit ss pinfold-threads-100.timer replace";
        assert_eq!(fake.calls().last().unwrap(), stop);
        start_or_stop(&host, 404, false).unwrap();
        let dir = tempfile::tempdir().unwrap();
        assert!(start_or_stop(&Host::new(dir.path()), 100, true).is_err());
    }
}
