//! Moves a process into a cgroup; a scope that systemd has dropped is started again.

use std::io;
use std::time::{Duration, Instant};

use super::file;
use crate::error::into_io;
use crate::host::Host;
use crate::sys::cgroup;
use crate::sys::task::TaskId;
use crate::systemd::{ScopeProperties, Writer};

/// How often a process is checked for having been moved into a scope that systemd has started.
const MOVED_INTERVAL: Duration = Duration::from_millis(10);

/// Moves a process with all its threads. A scope that systemd has dropped, because it was empty, is
/// started again.
pub(super) fn move_process(host: &Host, task: &TaskId, cgroup: &str) -> io::Result<()> {
    match file::write(
        host,
        cgroup::file(cgroup, "cgroup.procs"),
        &task.pid.to_string(),
    ) {
        Err(error) if cgroup.ends_with(".scope") && !host.exists(cgroup::path(cgroup)) => {
            let mut path = cgroup.rsplit('/');
            match (path.next(), path.next()) {
                (Some(scope), Some(slice)) if slice.ends_with(".slice") => {
                    start_scope(host, scope, slice, task.pid)?
                }
                _ => return Err(error),
            }
            wait_until_in(host, task.pid, cgroup)
        }
        other => other,
    }
}

/// Starts a scope for a running process, with the properties that Proxmox VE gives its VMs' scopes
/// (PVE/QemuServer.pm, `vm_start`): stopping it signals only QEMU and never kills. systemd replies
/// before the process is in it.
fn start_scope(host: &Host, scope: &str, slice: &str, pid: i32) -> io::Result<()> {
    let session = host.systemd();
    let failed =
        |error| into_io(session.failed(format!("make {scope} around process {pid}"))(error));
    let process = u32::try_from(pid).map_err(io::Error::other)?;
    let client = session.connect(host, session.timeouts().call);
    let Some(mut client) = client.map_err(failed)? else {
        return Err(io::Error::other(
            "scopes can be made on the running host only, not under --sysroot",
        ));
    };
    let mut body = Writer::default();
    body.string(scope).string("fail").array(8, |properties| {
        properties.property("PIDs", "au", |value| {
            value.array(4, |pids| {
                pids.u32(process);
            })
        });
        properties.property("Slice", "s", |value| value.string(slice));
        properties.property("KillMode", "s", |value| value.string("process"));
        properties.property("SendSIGKILL", "b", |value| value.bool(false));
        properties.property("TimeoutStopUSec", "t", |value| value.u64(u64::MAX));
        if let Some(had) = host.scope(scope) {
            add_properties(properties, had);
        }
    });
    // No further units.
    body.array(8, |_| {});
    client
        .manager("StartTransientUnit", "ssa(sv)a(sa(sv))", body)
        .map(drop)
        .map_err(failed)
}

/// What the scope had before: Proxmox VE's weight and limit of CPU time, and the order at shutdown; and
/// what is started when it has ended.
fn add_properties(properties: &mut Writer, had: &ScopeProperties) {
    if let Some(description) = &had.description {
        properties.property("Description", "s", |value| value.string(description));
    }
    let dependencies = [
        ("After", &had.after),
        ("Before", &had.before),
        ("OnSuccess", &had.on_success),
    ];
    for (name, units) in dependencies {
        if !units.is_empty() {
            properties.property(name, "as", |value| {
                value.array(4, |list| {
                    for unit in units {
                        list.string(unit);
                    }
                })
            });
        }
    }
    for (name, number) in [
        ("CPUWeight", had.cpu_weight),
        ("CPUQuotaPerSecUSec", had.cpu_quota_usec),
    ] {
        if let Some(number) = number {
            properties.property(name, "t", |value| value.u64(number));
        }
    }
}

/// Waits until systemd has moved a process into a cgroup.
fn wait_until_in(host: &Host, pid: i32, cgroup: &str) -> io::Result<()> {
    let until = Instant::now() + host.systemd().timeouts().call;
    while cgroup::of_process(host, pid)
        .map_err(into_io)?
        .trim_start_matches('/')
        != cgroup.trim_start_matches('/')
    {
        if Instant::now() >= until {
            return Err(io::Error::other(format!(
                "systemd created the scope but did not move process {pid} into it"
            )));
        }
        std::thread::sleep(MOVED_INTERVAL);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::systemd::BUS_SOCKET;
    use crate::systemd::fake::fake;

    #[test]
    fn a_scope_is_asked_for() {
        let (_dir, host, fake) = fake(BUS_SOCKET);
        start_scope(&host, "100.scope", "qemu.slice", 4711).unwrap();
        let call = "/org/freedesktop/systemd1 StartTransientUnit ssa(sv)a(sa(sv)) 100.scope fail";
        assert_eq!(fake.calls().last().unwrap(), call);
        assert!(start_scope(&host, "100.scope", "qemu.slice", -1).is_err());
    }

    #[test]
    fn it_has_what_it_had() {
        let mut body = Writer::default();
        add_properties(
            &mut body,
            &ScopeProperties {
                description: Some("Proxmox VE VM 100".into()),
                after: vec!["dbus.service".into()],
                before: vec!["pve-ha-lrm.service".into(), "pve-guests.service".into()],
                cpu_weight: Some(0x1234),
                cpu_quota_usec: Some(1_500_000),
                on_success: vec!["pinfold-recover.service".into()],
            },
        );
        for text in [
            "Description",
            "Proxmox VE VM 100",
            "After",
            "dbus.service",
            "Before",
            "pve-ha-lrm.service",
            "pve-guests.service",
            "CPUWeight",
            "CPUQuotaPerSecUSec",
            "OnSuccess",
            "pinfold-recover.service",
        ] {
            assert!(body.has(text.as_bytes()), "{text}");
        }
        for number in [0x1234_u64, 1_500_000] {
            assert!(body.has(&number.to_le_bytes()), "{number}");
        }
    }
}
