//! pin-vcpu: pins the threads of a VM's QEMU by their roles.
//!
//! A vCPU thread that stays on one CPU keeps that CPU's caches, and if the guest's cores are the
//! host's, the guest's scheduler decides correctly. Iothreads and emulator threads run elsewhere, so
//! that they do not delay a vCPU.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

use std::process::ExitCode;

use clap::{ArgGroup, Parser};
use pinfold_core::cli::{self, Common};
use pinfold_core::knob::Value;
use pinfold_core::sys::cpu;
use pinfold_core::sys::sched::SchedPolicy;
use pinfold_core::vm::{self, Qemu, VmId, qmp};
use pinfold_core::{Exit, Host, Knob, Selector, Table};

mod pins;

pub use pins::{Asked, IothreadPin, Pins, VcpuPin, plan, policy_setting, setting};

const TOOL: &str = "pin-vcpu";

/// Pin a VM's threads by their roles: vCPUs, iothreads, emulator
///
/// The roles come from QEMU's monitor. If it does not answer, a warning is printed and the vCPUs are
/// found by their threads' names. CPUS are logical numbers, as in 0-5,12-17, or selectors, as in
/// llc:1; see `hook layout`.
#[derive(Debug, Parser)]
#[command(name = TOOL, version, after_help = cli::EXIT_CODES)]
#[command(group(ArgGroup::new("what").required(true).multiple(true)
    .args(["vcpu", "iothread", "emulator", "policy", "list", "restore"])))]
pub struct Args {
    /// The VM's number
    #[arg(required_unless_present_any = ["pid", "restore"])]
    vmid: Option<VmId>,

    /// The process id of a QEMU that Proxmox VE did not start, instead of VMID
    #[arg(long, conflicts_with = "vmid", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,

    /// Pin vCPU number N to CPUs, as in 0=6, 0=6,18 or 0=core:6; may be repeated
    #[arg(long, value_name = "N=CPUS")]
    vcpu: Vec<VcpuPin>,

    /// Pin iothreads to CPUs: the one with this id, or all that are not named; may be repeated
    #[arg(long, value_name = "[ID=]CPUS")]
    iothread: Vec<IothreadPin>,

    /// Pin all other threads to CPUs
    #[arg(long, value_name = "CPUS")]
    emulator: Option<Selector>,

    /// Give all vCPU threads a scheduling policy: other, fifo:N or rr:N with a priority of 1 to 99
    ///
    /// With fifo or rr nothing that must run on a vCPU's CPU runs there while the vCPU computes, but
    /// for the share of kernel.sched_rt_runtime_us.
    #[arg(long, value_name = "POLICY", value_parser = parse_policy)]
    policy: Option<SchedPolicy>,

    #[command(flatten)]
    common: Common,
}

fn parse_policy(text: &str) -> Result<SchedPolicy, String> {
    match text.parse()? {
        SchedPolicy::Deadline | SchedPolicy::Ext => {
            Err("it can be set by other programs only".into())
        }
        policy => Ok(policy),
    }
}

/// Whether a knob is one that this tool sets.
fn is_own(knob: &Knob) -> bool {
    matches!(knob, Knob::Thread(_) | Knob::ThreadPolicy(_))
}

/// Runs the command. `commit` is that of the program, for `--version`.
pub fn main(commit: Option<&str>) -> ExitCode {
    cli::main(TOOL, commit, run)
}

fn run(args: Args) -> anyhow::Result<Exit> {
    let Args {
        vmid,
        pid,
        vcpu,
        iothread,
        emulator,
        policy,
        common,
    } = args;
    let root = common.output.root();
    let mut report = common.output.report(TOOL);
    if let Some(exit) = common.restore(&root, &mut report, TOOL, is_own)? {
        return Ok(exit);
    }
    let asked = match Asked::new(vcpu, iothread, emulator) {
        Ok(asked) => asked,
        Err(why) => {
            report.error(&why);
            return Ok(Exit::Usage);
        }
    };
    let pins = asked.resolve(&root)?;
    for cpus in pins.cpus() {
        cpu::check_online(&root, cpus)?;
    }
    let qemu = find(&root, vmid, pid)?;
    let found = vm::threads(&root, &qemu, qmp::DEFAULT_BUDGET)?;
    for note in &found.notes {
        report.note(note);
    }
    if common.list {
        return Ok(cli::listed(&mut report, &list(&root, &found.threads)?));
    }
    let mut changes = plan(&found.threads, &pins)?;
    if let Some(policy) = policy {
        // Pinned first: a real-time thread must not run on other CPUs.
        for thread in vcpus(&found.threads) {
            let setting = policy_setting(&root, thread)?;
            changes.extend(setting.map(|it| it.want(Value::text(policy.to_string()))));
        }
    }
    common.carry_out(&root, &mut report, TOOL, changes)
}

fn find(root: &Host, vmid: Option<VmId>, pid: Option<i32>) -> anyhow::Result<Qemu> {
    Ok(match (vmid, pid) {
        (Some(vmid), _) => vm::require_running(root, vmid)?,
        (None, Some(pid)) => vm::by_pid(root, pid)?,
        (None, None) => anyhow::bail!("no VM given; name it by number or --pid"),
    })
}

/// The vCPU threads in their order.
fn vcpus(threads: &[vm::QemuThread]) -> Vec<&vm::QemuThread> {
    let is_vcpu = |thread: &&vm::QemuThread| matches!(thread.role, vm::Role::Vcpu(_));
    let mut vcpus: Vec<_> = threads.iter().filter(is_vcpu).collect();
    vcpus.sort_by_key(|thread| (&thread.role, thread.id.tid));
    vcpus
}

fn list(root: &Host, threads: &[vm::QemuThread]) -> pinfold_core::Result<Table> {
    let mut threads: Vec<_> = threads.iter().collect();
    threads.sort_by_key(|thread| (&thread.role, thread.id.tid));
    let mut table = Table::new(&["thread", "role", "name", "cpus", "last cpu", "policy"]);
    for thread in threads {
        let policy = Knob::ThreadPolicy(thread.id).read(root)?;
        table.row([
            thread.id.tid.to_string(),
            thread.role.to_string(),
            thread.name.clone(),
            thread.allowed.to_string(),
            thread.last_cpu.to_string(),
            policy.map(|policy| policy.to_string()).unwrap_or_default(),
        ]);
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn command_line_is_valid() {
        super::Args::command().debug_assert();
    }
}
