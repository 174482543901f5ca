//! `lab bench`: hook's post-start against the same steps done by a plain shell script, in one boot.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::{Guest, Host, VmSpec};

/// The script that hook is measured against.
pub(crate) const SCRIPT: &str = include_str!("../bench/post-start.sh");
const ROUNDS: usize = 5;

/// The steps of the script, each with the names of hook's steps in its JSON.
const STEPS: [(&str, &[&str]); 8] = [
    ("slices", &["slices", "baseline", "tasks"]),
    ("offline", &["offline"]),
    ("irqs", &["irqs"]),
    ("kthreads", &["kthreads"]),
    ("online", &["online"]),
    ("tuning", &["pace"]),
    ("decouple", &["decouple"]),
    ("pins", &["pins"]),
];

/// What undoes the script, which has no undo that is worth waiting for.
const UNDO: &str = "pin-irqs -q 0-23; pin-kthreads -q 0-23; \
    cg-slice allow -q 0-23 init.scope system.slice user.slice qemu.slice; \
    governor -q set schedutil 0-23; hook step stat-interval -q 1; \
    rmdir /sys/fs/cgroup/qemu-decoupled.slice/* /sys/fs/cgroup/qemu-decoupled.slice";

/// The same for the bare program: what the VM's end has not undone.
const UNDO_PARTITION: &str = "pin-irqs -q 0-23; pin-kthreads -q 0-23; \
    governor -q set schedutil 0-23; hook step stat-interval -q 1";

type Times = BTreeMap<String, f64>;

/// hook by partition, and the bare program: microseconds on the last line.
const PARTITION: &str = "layout = \"5900x\"\nmethod = \"partition\"\n";
const BARE: &str = "/usr/local/lib/pinfold-lab/lab-agent bare 100";

/// The bounds of the method partition: how many times as fast as the script post-start is,
/// and how many times as long as the bare system calls it takes.
const PARTITION_BOUNDS: [f64; 2] = [20.0, 0.7];

/// The bounds: how many times as fast hook is in all, and without the kernel's own time
/// for hotplug.
const BOUNDS: [f64; 2] = [2.0, 10.0];

/// Measures both, `ROUNDS` times each in turn, and writes the table; an error if hook is slower
/// than it must be.
pub fn run(bins: &Path, out: &mut impl Write) -> Result<()> {
    let mut host = Host::acquire(Guest::Trixie, bins)?;
    host.reset_in_parallel()?;
    host.put("/tmp/post-start.sh", SCRIPT.as_bytes(), 0o755)?;
    let vm = VmSpec {
        busy: true,
        ..VmSpec::new(100)
    };
    let (mut script, mut hook) = (Vec::new(), Vec::new());
    let (mut partition, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        host.start_vm(&vm)?;
        let text = host.ok("s=$EPOCHREALTIME; /tmp/post-start.sh 100 2>/dev/null")?;
        script.push(script_times(&text)?);
        host.kill_vm(100)?;
        host.cleanup_vm(100, false)?;
        host.sh(UNDO)?;

        host.start_vm(&vm)?;
        host.ok("hook 100 pre-start -q")?;
        let text = host.ok(
            "s=$(cut -d' ' -f1 /proc/uptime); hook 100 post-start --json; echo \"$s $(cut -d' ' -f1 /proc/uptime)\"",
        )?;
        hook.push(hook_times(&text)?);
        host.kill_vm(100)?;
        host.cleanup_vm(100, false)?;
        host.ok("hook 100 post-stop -q")?;

        host.ok("mkdir -p /etc/pinfold")?;
        host.put("/etc/pinfold/100.toml", PARTITION.as_bytes(), 0o644)?;
        for (program, times) in [("hook 100 post-start", &mut partition), (BARE, &mut bare)] {
            host.ok("hook 100 pre-start -q")?;
            host.start_vm(&vm)?;
            times.push(seconds(&host, program)?);
            host.kill_vm(100)?;
            host.cleanup_vm(100, false)?;
            host.ok("hook 100 post-stop -q")?;
            host.sh(UNDO_PARTITION)?;
        }
        host.ok("rm /etc/pinfold/100.toml")?;
    }
    let (text, ratios) = table(&script, &hook);
    out.write_all(text.as_bytes())?;
    let (script, partition, bare) = (
        STEPS.iter().map(|(step, _)| median(&script, step)).sum(),
        middle(partition),
        middle(bare),
    );
    let (text, by_partition) = partition_table(script, partition, bare);
    out.write_all(text.as_bytes())?;
    let kept = ratios
        .iter()
        .zip(BOUNDS)
        .all(|(ratio, bound)| *ratio >= bound);
    ensure!(
        kept,
        "hook must be {:.0}x as fast in all and {:.0}x without the kernel's hotplug",
        BOUNDS[0],
        BOUNDS[1]
    );
    let [faster, of_bare] = PARTITION_BOUNDS;
    ensure!(
        by_partition[0] >= faster && by_partition[1] <= of_bare,
        "partition must be {faster:.0}x as fast as the script and take at most {of_bare:.1}x the bare calls' time"
    );
    Ok(())
}

/// How long a command takes, its start too.
fn seconds(host: &Host, command: &str) -> Result<f64> {
    let timed = format!(
        "s=${{EPOCHREALTIME/./}}; {command} >/dev/null 2>/dev/null || exit; echo $((${{EPOCHREALTIME/./}} - s))"
    );
    host.put("/tmp/timed.sh", timed.as_bytes(), 0o755)?;
    let microseconds: f64 = host
        .ok("bash /tmp/timed.sh")?
        .trim()
        .parse()
        .context("no time")?;
    Ok(microseconds / 1e6)
}

fn partition_table(script: f64, partition: f64, bare: f64) -> (String, [f64; 2]) {
    let ratios = [script / partition, partition / bare];
    let text = format!(
        "{:<34}{script:>10.3}{partition:>10.3}{:>7.1}x\n{:<34}{bare:>10.3}{partition:>10.3}{:>7.2}x the time\n",
        "by partition, against the script",
        ratios[0],
        "by partition, against bare calls",
        ratios[1]
    );
    (text, ratios)
}

/// The script's own lines, `step seconds`.
fn script_times(text: &str) -> Result<Times> {
    let times: Times = text
        .lines()
        .filter_map(|line| {
            let (step, seconds) = line.split_once(' ')?;
            Some((step.to_owned(), seconds.parse().ok()?))
        })
        .collect();
    ensure!(
        times.len() == STEPS.len() + 1,
        "the script printed {} times, not {}: {text}",
        times.len(),
        STEPS.len() + 1
    );
    Ok(times)
}

/// hook's report, and behind it when it began and ended. What is in no step (its start, looking,
/// the state) is `rest`.
fn hook_times(text: &str) -> Result<Times> {
    let (report, clock) = text
        .trim_end()
        .rsplit_once('\n')
        .context("hook printed nothing")?;
    let report: serde_json::Value = serde_json::from_str(report).context("hook's report")?;
    let clock: Vec<f64> = clock
        .split(' ')
        .filter_map(|seconds| seconds.parse().ok())
        .collect();
    let [began, ended] = clock[..] else {
        anyhow::bail!("no two times in {text}")
    };
    let mut times = Times::new();
    let mut sum = 0.0;
    for step in report["steps"]
        .as_array()
        .context("the report has no steps")?
    {
        let (name, seconds) = (
            step["step"].as_str().unwrap_or_default(),
            step["seconds"].as_f64().unwrap_or_default(),
        );
        sum += seconds;
        let ours = STEPS
            .iter()
            .find(|(_, names)| names.contains(&name))
            .map_or("rest", |(step, _)| *step);
        *times.entry(ours.to_owned()).or_default() += seconds;
    }
    *times.entry("rest".into()).or_default() += (ended - began - sum).max(0.0);
    Ok(times)
}

fn median(rounds: &[Times], step: &str) -> f64 {
    middle(
        rounds
            .iter()
            .map(|times| times.get(step).copied().unwrap_or_default())
            .collect(),
    )
}

fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn table(script: &[Times], hook: &[Times]) -> (String, [f64; 2]) {
    let mut text = format!(
        "{:<34}{:>10}{:>10}{:>8}\n",
        format!("post-start, medians of {ROUNDS}"),
        "script s",
        "hook s",
        "ratio"
    );
    let mut line = |name: &str, script: f64, hook: f64| {
        text += &format!(
            "{name:<34}{script:>10.3}{hook:>10.3}{:>7.1}x\n",
            script / hook
        );
        script / hook
    };
    let (mut script_sum, mut hook_sum) = (0.0, 0.0);
    for (step, _) in STEPS {
        let (by_script, by_hook) = (median(script, step), median(hook, step));
        script_sum += by_script;
        hook_sum += by_hook;
        line(step, by_script, by_hook);
    }
    let rest = median(hook, "rest");
    hook_sum += rest;
    line("start, looking, saving", 0.0, rest);
    let in_all = line("in all", script_sum, hook_sum);
    // hook's offline and online steps are writes to the kernel and little else.
    let (by_script, by_hook) = (
        median(script, "hotplug-kernel"),
        median(hook, "offline") + median(hook, "online"),
    );
    line("of that the kernel's hotplug", by_script, by_hook);
    let without_hotplug = line(
        "without the kernel's hotplug",
        script_sum - by_script,
        hook_sum - by_hook,
    );
    (text, [in_all, without_hotplug])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_medians_taken() {
        let script = "slices 1.5\noffline 2\nirqs 1\nkthreads 1\nonline 1\ntuning 1\n\
                      decouple 1\npins 1\nhotplug-kernel 2.5\n";
        let script = script_times(script).unwrap();
        assert!(script_times("slices 1\n").is_err());
        let hook = "{\"steps\": [{\"step\": \"baseline\", \"seconds\": 0.5}, \
                    {\"step\": \"slices\", \"seconds\": 0.25}]}\n1.0 2.0\n";
        let hook = hook_times(hook).unwrap();
        assert_eq!((hook["slices"], hook["rest"]), (0.75, 0.25));
        let of = |n: f64| Times::from([("slices".to_owned(), n)]);
        assert_eq!(median(&[of(3.0), of(1.0), of(2.0)], "slices"), 2.0);
        assert!(
            table(&[script], &[hook])
                .0
                .contains("slices                                 1.500     0.750    2.0x")
        );
    }
}
