//! What isolating a VM by partition takes at the least: the system calls of hook's post-start and
//! nothing else, for `lab bench` to measure hook against. No state is kept, nothing is checked,
//! nothing can be put back.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::cpus::Cpus;
use crate::proc::read;
use crate::qmp::Qmp;

const CGROUPS: &str = "/sys/fs/cgroup";
const ISOLATED: &str = "6-11,18-23";
const HOUSEKEEPING: &str = "0-5,12-17";
const HOUSEKEEPING_MASK: &str = "03f03f";
const PINS: [u32; 12] = [6, 18, 7, 19, 8, 20, 9, 21, 10, 22, 11, 23];

const QMP_PATIENCE: Duration = Duration::from_secs(5);

/// Isolates a VM that runs in a delegated scope.
pub fn isolate(vmid: &str) -> Result<()> {
    let (isolated, housekeeping): (Cpus, Cpus) = (ISOLATED.parse()?, HOUSEKEEPING.parse()?);
    let threads = vcpu_threads(vmid)?;
    pin(2, &housekeeping)?;

    let slice = format!("{CGROUPS}/qemu.slice");
    let scope = format!("{slice}/{vmid}.scope");
    let vcpus = format!("{scope}/vcpu");
    fs::create_dir(&vcpus).with_context(|| format!("{vcpus}: cannot make"))?;
    write(&format!("{vcpus}/cgroup.type"), "threaded")?;
    write(&format!("{scope}/cgroup.subtree_control"), "+cpuset")?;
    for cgroup in [&slice, &scope, &vcpus] {
        write(&format!("{cgroup}/cpuset.cpus.exclusive"), ISOLATED)?;
    }
    write(&format!("{vcpus}/cpuset.cpus"), ISOLATED)?;
    let partition = format!("{vcpus}/cpuset.cpus.partition");
    write(&partition, "isolated")?;
    match read(&partition).as_deref() {
        Some("isolated") => {}
        other => bail!("{partition}: {other:?}"),
    }
    for (tid, cpu) in threads.into_iter().zip(PINS) {
        write(&format!("{vcpus}/cgroup.threads"), &tid.to_string())?;
        pin(tid, &Cpus([cpu].into()))?;
    }

    write("/proc/irq/default_smp_affinity", HOUSEKEEPING_MASK)?;
    for entry in fs::read_dir("/proc/irq").context("/proc/irq: cannot list")? {
        let file = entry
            .context("/proc/irq: cannot list")?
            .path()
            .join("smp_affinity_list");
        if let Some(list) = read(&file)
            && list.parse::<Cpus>()?.meets(&isolated)
        {
            // Those that the kernel keeps are refused.
            let _ = fs::write(&file, HOUSEKEEPING);
        }
    }
    for pid in read("/proc/2/task/2/children")
        .unwrap_or_default()
        .split_whitespace()
    {
        let pid: i32 = pid.parse()?;
        let Some(stat) = read(format!("/proc/{pid}/stat")) else {
            continue;
        };
        let flags: u32 = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.split_whitespace().nth(6)?.parse().ok())
            .unwrap_or(0);
        let movable = flags & 0x0400_0000 == 0;
        if movable && isolated.0.iter().any(|cpu| may_run(pid, *cpu)) {
            let _ = pin(pid, &housekeeping);
        }
    }
    for cpu in PINS {
        write(
            &format!("/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor"),
            "performance",
        )?;
    }
    write("/proc/sys/vm/stat_interval", "120")
}

/// The vCPUs' threads in their order, asked of QEMU.
fn vcpu_threads(vmid: &str) -> Result<Vec<i32>> {
    let socket = format!("/run/qemu-server/{vmid}.qmp");
    let mut qmp = Qmp::connect(Path::new(&socket), QMP_PATIENCE)?;
    let answer = qmp.execute("query-cpus-fast", serde_json::json!({}))?;
    let mut threads: Vec<(i64, i64)> = (answer.as_array().into_iter().flatten())
        .filter_map(|cpu| Some((cpu["cpu-index"].as_i64()?, cpu["thread-id"].as_i64()?)))
        .collect();
    threads.sort_unstable();
    threads
        .into_iter()
        .map(|(_, tid)| Ok(i32::try_from(tid)?))
        .collect()
}

fn write(path: &str, text: &str) -> Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .open(path)
        .with_context(|| format!("{path}: cannot open"))?;
    file.write_all(text.as_bytes())
        .with_context(|| format!("{path}: cannot write {text}"))
}

fn pin(tid: i32, cpus: &Cpus) -> Result<()> {
    let mut set = CpuSet::new();
    for cpu in &cpus.0 {
        set.set(usize::try_from(*cpu)?)?;
    }
    sched_setaffinity(Pid::from_raw(tid), &set).with_context(|| format!("thread {tid}: cannot pin"))
}

fn may_run(tid: i32, cpu: u32) -> bool {
    let set = sched_getaffinity(Pid::from_raw(tid));
    set.is_ok_and(|set| usize::try_from(cpu).is_ok_and(|cpu| set.is_set(cpu).unwrap_or(false)))
}
