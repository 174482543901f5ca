//! What the stories share.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;

use pinfold_lab::{Guest, Host, HostState, Strays, VmSpec};

/// The CPUs of the layout 5900x.
pub(crate) const ISOLATED: &str = "6-11,18-23";
pub(crate) const HOUSEKEEPING: &str = "0-5,12-17";

/// The vCPUs' CPUs of the layout 5900x, in vCPU order.
pub(crate) const PINS: [usize; 12] = [6, 18, 7, 19, 8, 20, 9, 21, 10, 22, 11, 23];

/// The cgroup of the helper beside a VM's QEMU. (On Linux 6.1 a kernel thread of KVM's is in the
/// VM's cgroup too.)
pub(crate) const HELPER_CGROUP: &str = "cat /proc/$(pgrep -x swtpm)/cgroup";

/// Runs a story on a fresh host of a guest; once more if the emulator broke the host.
pub(crate) fn run(guest: Guest, story: fn(&mut Host)) {
    if let Ok(guests) = std::env::var("PINFOLD_LAB_GUESTS")
        && !guests.split(',').any(|name| name == guest.to_string())
    {
        println!("left out: PINFOLD_LAB_GUESTS={guests} has no {guest}");
        return;
    }
    let mut host =
        Host::acquire(guest, &bins()).unwrap_or_else(|error| panic!("{guest}: no host: {error:#}"));
    let Err(why) = catch_unwind(AssertUnwindSafe(|| story(&mut host))) else {
        return;
    };
    let Some(oops) = host.emulator_fault() else {
        resume_unwind(why)
    };
    println!("running again: the emulator broke the host's kernel:\n{oops}");
    host.reset().unwrap();
    story(&mut host);
}

/// The folder with the product's programs: where this test was built.
fn bins() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent()
        .and_then(|deps| deps.parent())
        .unwrap()
        .to_owned()
}

/// VM 100 as a user would have it: 12 vCPUs, one of them busy, hook as its hookscript.
pub(crate) fn vm() -> VmSpec {
    VmSpec {
        busy: true,
        hookscript: Some("local:snippets/hook".into()),
        ..VmSpec::new(100)
    }
}

/// Puts hook into the folder in which Proxmox VE looks for it.
pub(crate) fn install_hook(host: &Host) {
    host.ok("mkdir -p /var/lib/vz/snippets && cp $(command -v hook) /var/lib/vz/snippets/hook")
        .unwrap();
}

/// A command that must end with an exit code, and its stdout and stderr.
pub(crate) fn expect(host: &Host, command: &str, code: i32) -> (String, String) {
    let output = host.sh(command).unwrap();
    let (signal, late) = (output.signal, output.timed_out);
    assert_eq!(
        output.code,
        Some(code),
        "{command} (signal: {signal:?}, timed out: {late})\nstdout: {}\nstderr: {}",
        output.stdout,
        output.stderr
    );
    (output.stdout, output.stderr)
}

/// A command under strace's fault injection, as in `inject` of strace(1), `write:error=EIO:when=3`.
/// It stops only at that call; at every call it takes ten times as long.
pub(crate) fn injected(inject: &str, command: &str) -> String {
    let call = inject.split(':').next().unwrap();
    format!("strace -f --seccomp-bpf -o /dev/null -e trace={call} -e inject={inject} {command}")
}

/// Kills a command as it enters a system call: held there for a minute by strace, it is the one
/// that stands still. (strace's own `signal=` needs a stop at every call.)
const KILL_AT: &str = r#"my ($call, $nth, @command) = @ARGV;
my $strace = fork // die $!;
if (!$strace) {
    my $inject = "inject=$call:delay_enter=60000000:when=$nth";
    exec "strace", "-f", "--seccomp-bpf", "-o", "/dev/null", "-e", "trace=$call", "-e", $inject, @command;
}
my $last = "";
until (waitpid $strace, 1) {
    select undef, undef, undef, 0.3;
    open my $children, "<", "/proc/$strace/task/$strace/children" or next;
    my ($pid) = split " ", <$children> // "" or next;
    my $text = "";
    for my $file (glob "/proc/$pid/task/*/status") {
        open my $status, "<", $file or next;
        my $thread = join "", grep { /^State:\s+t|ctxt/ } <$status>;
        $text .= "$file $thread" if $thread =~ /^State/;
    }
    if ($text && $text eq $last) {
        # strace would sit its minute out.
        kill "KILL", $pid, $strace;
        select undef, undef, undef, 0.1 while -e "/proc/$pid";
    }
    $last = $text;
}
exit($? & 127 ? 128 + ($? & 127) : $? >> 8);
"#;

/// A system call of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Call {
    /// Its name.
    pub(crate) name: String,
    /// Which one of that name of its thread's, from 1.
    pub(crate) nth: usize,
    /// The file it writes to, if it is made by another thread than the first; strace counts by
    /// thread.
    pub(crate) file: Option<String>,
}

impl Call {
    /// One of the first thread's.
    pub(crate) fn nth(name: &str, nth: usize) -> Self {
        Self {
            name: name.to_owned(),
            nth,
            file: None,
        }
    }

    /// As `when=` and the command behind it.
    fn of(&self, command: &str) -> (usize, String) {
        match &self.file {
            None => (self.nth, command.to_owned()),
            Some(file) => (1, format!("-P {file} {command}")),
        }
    }

    /// A command that has this call answered with an error.
    pub(crate) fn failing(&self, error: &str, command: &str) -> String {
        let (when, command) = self.of(command);
        injected(
            &format!("{}:error={error}:when={when}", self.name),
            &command,
        )
    }
}

/// Runs a command that is killed as it enters this call; false if it ended before.
pub(crate) fn kill_at(host: &Host, call: &Call, command: &str) -> bool {
    host.put("/tmp/kill-at.pl", KILL_AT.as_bytes(), 0o644)
        .unwrap();
    let (name, (when, what)) = (&call.name, call.of(command));
    let output = host
        .sh(&format!(
            "perl /tmp/kill-at.pl {name} {when} {what} > /dev/null"
        ))
        .unwrap();
    match output.code {
        Some(137) => true,
        Some(0) => false,
        _ => panic!("{command}, killed at {call:?}: {output:?}"),
    }
}

/// The same for the calls that have to do with a file.
pub(crate) fn injected_at(path: &str, inject: &str, command: &str) -> String {
    injected(inject, &format!("-P {path} {command}"))
}

/// A command that fails with exactly this message.
pub(crate) fn refuses(host: &Host, command: &str, code: i32, words: &str) {
    let (_, stderr) = expect(host, command, code);
    assert_eq!(stderr.trim_end(), words, "{command}");
}

/// `name -> CPUs` of every thread of a VM's QEMU, as the kernel shows it.
pub(crate) fn threads(host: &Host, vmid: u32) -> Vec<(String, String)> {
    let script = format!(
        "for t in /proc/$(cat /run/qemu-server/{vmid}.pid)/task/*; do \
         echo \"$(cat $t/comm)|$(sed -n 's/^Cpus_allowed_list:\t//p' $t/status)\"; done"
    );
    let text = host.ok(&script).unwrap();
    text.lines()
        .map(|line| {
            line.split_once('|')
                .map(|(a, b)| (a.to_owned(), b.to_owned()))
                .unwrap()
        })
        .collect()
}

/// Asserts that nothing on the host differs from before, line for line.
pub(crate) fn assert_restored(host: &Host, before: &pinfold_lab::HostState) {
    let after = host.snapshot().unwrap();
    let difference = before.not_restored(&after);
    assert!(
        difference.is_empty(),
        "the host is not what it was:\n{difference}"
    );
}

/// What may run on these CPUs and could be elsewhere, but for the vCPUs of these VMs.
pub(crate) fn strays(host: &Host, cpus: &str, vms: &[u32]) -> Strays {
    let vms: Vec<(u32, &str)> = vms.iter().map(|vm| (*vm, cpus)).collect();
    strays_of(host, cpus, &vms)
}

/// The same for VMs with these CPUs each: their vCPUs are on these and on no other.
pub(crate) fn strays_of(host: &Host, cpus: &str, vms: &[(u32, &str)]) -> Strays {
    let mut strays = host.strays_of(cpus, vms).unwrap();
    if host.guest == Guest::Bookworm {
        // On Linux 6.1 idle unbound workers keep the mask of the pool they were made in; new work
        // goes by the new mask.
        strays.kworkers.clear();
    }
    if !host
        .sh("cat /sys/fs/cgroup/cpuset.cpus.isolated")
        .unwrap()
        .stdout
        .trim()
        .is_empty()
    {
        // If no CPU goes offline, an IRQ without interrupt remapping moves with its next
        // interrupt.
        strays.moving.clear();
    }
    strays
}

/// Asserts that there is nothing of it.
pub(crate) fn assert_clean(host: &Host, cpus: &str, vms: &[u32]) {
    let strays = strays(host, cpus, vms);
    assert!(strays.is_clean(), "strays on CPU {cpus}: {strays:#?}");
}

/// Asserts that VM 100 is fenced completely, as the kernel shows it.
pub(crate) fn assert_fenced(host: &Host) {
    for (name, cpus) in threads(host, 100) {
        let vcpu = name
            .strip_prefix("CPU ")
            .and_then(|rest| rest.split('/').next())
            .and_then(|n| n.parse::<usize>().ok());
        match vcpu {
            Some(vcpu) => assert_eq!(cpus, PINS[vcpu].to_string(), "{name}"),
            None => assert_eq!(cpus, HOUSEKEEPING, "{name}"),
        }
    }
    assert_clean(host, ISOLATED, &[100]);
    let value = |file: &str| host.ok(&format!("cat {file}")).unwrap().trim().to_owned();
    assert_eq!(value("/sys/devices/system/cpu/online"), "0-23");
    assert_eq!(value("/proc/sys/vm/stat_interval"), "120");
    assert_eq!(value("/proc/irq/default_smp_affinity"), "03f03f");
    assert_eq!(value("/sys/devices/virtual/workqueue/cpumask"), "03f03f");
    for cpu in PINS {
        assert_eq!(
            value(&format!(
                "/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor"
            )),
            "performance",
            "CPU {cpu}"
        );
    }
    assert_ne!(
        value("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "performance"
    );
}

/// VMs 100 and 101, with a CPU each, which were fenced once and are not now.
pub(crate) fn two_small_vms(host: &Host) -> HostState {
    host.ok("mkdir -p /etc/pinfold").unwrap();
    // Of one leaf of RCU's tree (12-23), whose worker is kept off both.
    for (id, cpus) in [(100, "17"), (101, "18")] {
        let settings = format!(
            "isolated = \"{cpus}\"\npins = [\"{cpus}\", \"{cpus}\"]\nmethod = \"hotplug\"\n[deadlines]\nqemu_exit = 0\n"
        );
        host.put(
            &format!("/etc/pinfold/{id}.toml"),
            settings.as_bytes(),
            0o644,
        )
        .unwrap();
        host.start_vm(&VmSpec {
            cores: 2,
            ..VmSpec::new(id)
        })
        .unwrap();
    }
    // The scopes that systemd is asked for on the way back have another description than PVE's.
    for phase in ["post-start", "post-stop"] {
        expect(
            host,
            &format!("hook 100 {phase} -q && hook 101 {phase} -q"),
            0,
        );
    }
    host.snapshot().unwrap()
}

/// Gives the host network queues with CPUs: two interfaces that hand packets on, one of them to isolated
/// CPUs only.
pub(crate) fn with_network_queues(host: &Host) {
    host.ok(
        "cd /sys/class/net; test -d many0 || ip link add many0 numtxqueues 2 numrxqueues 2 type dummy; \
         echo ffffff > lo/queues/rx-0/rps_cpus; echo 040040 > many0/queues/rx-1/rps_cpus;",
    )
    .unwrap();
}

/// The CPUs of these queues.
pub(crate) fn network_queues(host: &Host) -> String {
    host.ok("cd /sys/class/net; cat lo/queues/rx-0/rps_cpus many0/queues/rx-*/rps_cpus")
        .unwrap()
        .replace('\n', " ")
}
