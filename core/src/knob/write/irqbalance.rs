//! Changes of the CPUs that irqbalance moves IRQs to, by its socket.

use std::io;

use crate::cpuset::CpuSet;
use crate::error::into_io;
use crate::host::Host;
use crate::sys::task::{self, TaskId};
use crate::sys::{cpu, irqbalance};

/// Has irqbalance leave all other CPUs out, from its next round on. `NULL` for none takes it back to
/// those of its environment (irqbalance 1.9, cputree.c, `setup_banned_cpus`).
pub(super) fn use_cpus(host: &Host, task: &TaskId, cpus: &CpuSet) -> io::Result<()> {
    task::check_start(host, task).map_err(into_io)?;
    let banned = &cpu::present(host).map_err(into_io)? - cpus;
    let list = if banned.is_empty() {
        "NULL".to_owned()
    } else {
        banned.to_string()
    };
    irqbalance::send(host, task, &format!("settings cpus {list}")).map(drop)
}
