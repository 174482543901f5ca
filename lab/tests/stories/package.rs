//! The Debian package: installed, upgraded while a VM is fenced, kept while it is needed, removed without a trace.

use std::fs;
use std::path::{Path, PathBuf};

use pinfold_lab::{Guest, Host};

use crate::stories;
use crate::support::{assert_fenced, assert_restored, expect, run, vm};

stories![
    installed_upgraded_and_purged,
    from_nothing_to_a_fence_and_back
];

/// Every file that a package may have made. dpkg's own records remain by design.
const FILES: &str = "find /etc /usr /var /run/pinfold -xdev -not -path '/var/lib/dpkg/*' -not -path '/var/log/*' \
                     -not -path '/var/cache/*' -not -path '/var/tmp/*' -not -path '/etc/pve/*' 2>/dev/null | sort";

/// What `make deb` has built.
pub(crate) fn package() -> Vec<u8> {
    package_in("../target")
}

fn package_in(folder: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut packages: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .collect();
    assert_eq!(packages.len(), 1, "run make deb: {packages:?}");
    fs::read(packages.remove(0)).unwrap()
}

/// `make upgrade` builds the earlier package.
#[test]
#[ignore = "needs the programs of an earlier version: make upgrade"]
fn upgraded_from_earlier() {
    for guest in [Guest::Trixie, Guest::Bookworm] {
        run(guest, upgraded_under_a_vm);
    }
}

fn upgraded_under_a_vm(host: &mut Host) {
    host.ok("mkdir -p /var/lib/vz/snippets && rm -f /usr/sbin/policy-rc.d")
        .unwrap();
    host.start_vm(&pinfold_lab::VmSpec::new(101)).unwrap();
    let earlier = package_in("../target/earlier");
    host.put("/tmp/earlier.deb", &earlier, 0o644).unwrap();
    host.put("/tmp/pinfold.deb", &package(), 0o644).unwrap();
    let program = |host: &Host| expect(host, "sha256sum < /usr/sbin/hook", 0).0;
    expect(host, "dpkg -i /tmp/earlier.deb", 0);
    let earlier = program(host);
    let before = host.snapshot().unwrap();
    host.start_vm(&vm()).unwrap();
    assert_fenced(host);

    expect(host, "dpkg -i /tmp/pinfold.deb", 0);
    assert_ne!(program(host), earlier);
    assert_fenced(host);
    host.stop_vm(100).unwrap();
    assert_restored(host, &before);
}

fn installed_upgraded_and_purged(host: &mut Host) {
    // It is left from the image's making, and keeps packages from starting units.
    host.ok("mkdir -p /var/lib/vz/snippets && rm -f /usr/sbin/policy-rc.d")
        .unwrap();
    host.start_vm(&pinfold_lab::VmSpec::new(101)).unwrap();
    host.put("/tmp/pinfold.deb", &package(), 0o644).unwrap();
    let files = host.ok(FILES).unwrap();
    let before = host.snapshot().unwrap();

    expect(host, "dpkg -i /tmp/pinfold.deb", 0);
    expect(host, "systemctl is-active pinfold-recover.path", 0);
    expect(host, "systemctl is-enabled pinfold-recover.path", 0);
    let (link, _) = expect(host, "readlink /var/lib/vz/snippets/hook", 0);
    assert_eq!(link.trim(), "/usr/sbin/hook");
    for program in ["hook", "pin-irqs", "pinfold"] {
        expect(host, &format!("/usr/sbin/{program} --version"), 0);
    }
    let (layout, _) = expect(host, "/usr/sbin/pinfold layout", 0);
    assert!(layout.contains("llc:1"), "{layout}");
    assert_eq!(
        expect(host, "/usr/sbin/pinfold pin-irqs --list", 0).0,
        expect(host, "/usr/sbin/pin-irqs --list", 0).0
    );

    host.start_vm(&vm()).unwrap();
    assert_fenced(host);
    // The same version again is what an upgrade does: prerm upgrade, postinst configure.
    expect(host, "dpkg -i /tmp/pinfold.deb", 0);
    assert_fenced(host);
    let (_, why) = expect(host, "dpkg -r pinfold", 1);
    assert!(
        why.contains("a VM is isolated or was not restored"),
        "{why}"
    );
    assert_fenced(host);

    host.stop_vm(100).unwrap();
    let (_, why) = expect(host, "dpkg -r pinfold", 1);
    assert!(
        why.contains(
            "these guests have hook as their hookscript and would not start without it: 100"
        ),
        "{why}"
    );
    host.ok("sed -i /^hookscript:/d /etc/pve/qemu-server/100.conf")
        .unwrap();
    expect(host, "dpkg -r pinfold", 0);
    // This node's settings go, those of the cluster stay.
    host.ok("for folder in /etc/pinfold /etc/pve/local/pinfold /etc/pve/pinfold; do mkdir -p $folder; touch $folder/100.toml; done")
        .unwrap();
    let (shown, _) = expect(host, "dpkg -P pinfold", 0);
    assert!(
        shown.contains("/etc/pve/pinfold belongs to the whole cluster"),
        "{shown}"
    );
    host.ok("test ! -e /etc/pve/local/pinfold && rm -r /etc/pve/pinfold")
        .unwrap();
    assert_eq!(host.ok(FILES).unwrap(), files);
    assert_restored(host, &before);
}

/// README.md, "Install", "Set up a VM" and "Undo and uninstall", command by command.
fn from_nothing_to_a_fence_and_back(host: &mut Host) {
    host.ok("mkdir -p /var/lib/vz/snippets && rm -f /usr/sbin/policy-rc.d")
        .unwrap();
    host.start_vm(&pinfold_lab::VmSpec::new(101)).unwrap();
    // A VM with a hookscript of its own.
    let old = "#!/bin/sh\necho \"old script: $1 $2\"\n";
    host.put("/var/lib/vz/snippets/old.sh", old.as_bytes(), 0o755)
        .unwrap();
    let spec = pinfold_lab::VmSpec {
        hookscript: Some("local:snippets/old.sh".into()),
        ..vm()
    };
    host.put(&spec.conf_path(), spec.conf().as_bytes(), 0o640)
        .unwrap();
    host.put("/tmp/pinfold.deb", &package(), 0o644).unwrap();
    let conf = format!("sort {}", spec.conf_path());
    let (files, conf_before) = (host.ok(FILES).unwrap(), host.ok(&conf).unwrap());
    let before = host.snapshot().unwrap();

    expect(host, "dpkg -i /tmp/pinfold.deb", 0);
    let (plan, _) = expect(host, "/usr/sbin/hook install 100 -n", 0);
    assert!(
        plan.contains("qm set 100 --hookscript local:snippets/hook"),
        "{plan}"
    );
    let (shown, _) = expect(host, "/usr/sbin/hook install 100", 0);
    assert!(shown.contains("\nchanged: true\n"), "{shown}");
    let (shown, _) = expect(host, "/usr/sbin/hook install 100", 0);
    assert!(shown.contains("changed: false\n"), "{shown}");
    let (log, _) = expect(host, "qm start 100 2>&1", 0);
    for line in ["old script: 100 pre-start", "old script: 100 post-start"] {
        assert!(log.contains(line), "{line}: {log}");
    }
    let (status, _) = expect(host, "/usr/sbin/hook status", 0);
    assert!(
        status.contains("strays (could be elsewhere): 0"),
        "{status}"
    );
    let (list, _) = expect(host, "/usr/sbin/hook list", 0);
    assert!(
        list.contains("isolated") && list.contains("/etc/pinfold/100.toml"),
        "{list}"
    );

    // Out again, while the VM runs.
    expect(host, "/usr/sbin/hook remove --all --purge", 0);
    let (status, _) = expect(host, "/usr/sbin/hook status", 0);
    assert!(status.contains("no CPU is isolated"), "{status}");
    assert_eq!(host.ok(&conf).unwrap(), conf_before);
    expect(host, "dpkg -P pinfold", 0);
    let log = host.stop_vm(100).unwrap();
    assert!(log.contains("old script: 100 post-stop"), "{log}");
    assert_eq!(host.ok(FILES).unwrap(), files);
    assert_restored(host, &before);
}
