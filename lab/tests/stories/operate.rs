//! What a user does with the package beside starting VMs: shells, manual, automation, a report of a fault.

use std::time::Duration;

use pinfold_lab::{Host, VmSpec};

use crate::package::package;
use crate::support::{assert_fenced, expect, install_hook, vm};

crate::stories![only trixie: shells_and_man_know_the_package, a_playbook_changes_nothing_twice, a_report_of_a_running_vm];

/// Types a command into interactive shells and presses Tab.
const SHELLS: &str = include_str!("shells.zsh");

/// The playbook of the documentation.
const PLAYBOOK: &[u8] = include_bytes!("../../../docs/ansible.yml");

fn put_package(host: &Host) {
    // policy-rc.d is left from the image's making, and keeps packages from starting units.
    host.ok("mkdir -p /var/lib/vz/snippets && rm -f /usr/sbin/policy-rc.d")
        .unwrap();
    host.put("/root/pinfold.deb", &package(), 0o644).unwrap();
}

fn put_vm(host: &Host, spec: &VmSpec) {
    host.put(&spec.conf_path(), spec.conf().as_bytes(), 0o640)
        .unwrap();
}

fn shells_and_man_know_the_package(host: &mut Host) {
    put_package(host);
    put_vm(host, &VmSpec::new(4711));
    expect(host, "dpkg -i /root/pinfold.deb", 0);
    host.put("/root/shells.zsh", SHELLS.as_bytes(), 0o644)
        .unwrap();
    let (completed, _) = expect(host, "zsh -f /root/shells.zsh", 0);
    assert_eq!(completed, "bash: 4711\nzsh: 4711\nfish: 4711\n");
    for (page, has) in [
        ("8 hook", "EXIT STATUS"),
        ("8 hook-install", "EXAMPLES"),
        ("8 pin-irqs", "SEE ALSO"),
        ("8 pinfold", "GETTING STARTED"),
        ("5 pinfold.toml", "isolated"),
        ("7 pinfold-selectors", "llc:"),
    ] {
        let (text, _) = expect(host, &format!("MANWIDTH=100 man -P cat {page}"), 0);
        assert!(text.contains(has), "{page} without {has}: {text}");
    }
}

fn a_playbook_changes_nothing_twice(host: &mut Host) {
    put_package(host);
    let spec = VmSpec {
        hookscript: None,
        ..vm()
    };
    put_vm(host, &spec);
    host.put("/root/ansible.yml", PLAYBOOK, 0o644).unwrap();
    let play = "ansible-playbook -i localhost, -c local -e package=/root/pinfold.deb -e '{\"vms\": [100]}' \
                /root/ansible.yml 2>&1";
    let run = || {
        let job = host
            .spawn(&["/bin/sh", "-c", play], Duration::from_secs(600))
            .unwrap();
        let output = job.wait().unwrap();
        assert_eq!(output.code, Some(0), "{}", output.stdout);
        output.stdout
    };
    let first = run();
    assert!(
        first.contains("changed=3 ") && first.contains("failed=0"),
        "{first}"
    );
    let second = run();
    assert!(
        second.contains("changed=0 ") && second.contains("failed=0"),
        "{second}"
    );
    expect(host, "qm start 100", 0);
    let (status, _) = expect(host, "hook status", 0);
    assert!(
        status.contains("strays (could be elsewhere): 0"),
        "{status}"
    );
}

fn a_report_of_a_running_vm(host: &mut Host) {
    install_hook(host);
    host.start_vm(&vm()).unwrap();
    host.stop_vm(100).unwrap();
    host.start_vm(&vm()).unwrap();
    assert_fenced(host);
    let (report, _) = expect(host, "hook report 100", 0);
    assert!(!report.contains("(not read"), "{report}");
    let (_, journal) = report.split_once("\n## journal\n").unwrap();
    assert!(journal.contains("pinfold"), "{report}");
    let (summary, _) = expect(host, "journalctl -q -o cat -t pinfold VMID=100", 0);
    let summary = summary.lines().next().unwrap();
    assert!(journal.contains(summary), "{summary}: {report}");
}
