//! QEMU's command line.

use std::collections::BTreeMap;
use std::path::PathBuf;

/// Parses /proc/PID/cmdline: arguments, each ended by a NUL; empty for a kernel thread or a zombie.
pub(super) fn parse_cmdline(text: &str) -> Vec<String> {
    text.split_terminator('\0').map(str::to_owned).collect()
}

/// Whether the program is QEMU by the name Proxmox VE starts it under: `kvm`, or `qemu-system-…`.
pub(super) fn is_qemu(args: &[String]) -> bool {
    let program = args
        .first()
        .map_or("", String::as_str)
        .rsplit('/')
        .next()
        .unwrap_or_default();
    program.ends_with("kvm") || program.starts_with("qemu-system-")
}

/// The values of an option, `-name VALUE` or `--name VALUE`.
pub(super) fn options<'a>(args: &'a [String], name: &'a str) -> impl Iterator<Item = &'a str> {
    let is_option = move |arg: &str| {
        arg.strip_prefix('-')
            .is_some_and(|rest| rest.strip_prefix('-').unwrap_or(rest) == name)
    };
    args.windows(2)
        .filter(move |pair| is_option(&pair[0]))
        .map(|pair| pair[1].as_str())
}

/// A path below /run without its leading part: Proxmox VE writes /var/run, which is a link to /run.
pub(super) fn in_run(path: &str) -> String {
    let path = PathBuf::from(path);
    let relative = path
        .strip_prefix("/var")
        .or_else(|_| path.strip_prefix("/"))
        .unwrap_or(&path);
    relative.display().to_string()
}

/// The path of the QMP socket: of a `-chardev socket` that a `-mon …,mode=control` uses, or of
/// `-qmp unix:…`.
pub(super) fn monitor(args: &[String]) -> Option<String> {
    let fields = |text: &'_ str| -> BTreeMap<String, String> {
        text.split(',')
            .filter_map(|field| field.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect()
    };
    let monitors: Vec<_> = options(args, "mon")
        .map(fields)
        .filter(|mon| mon.get("mode").is_some_and(|mode| mode == "control"))
        .collect();
    // The first one: Proxmox VE's second is for events, and its daemon keeps it.
    let by_chardev = monitors.iter().find_map(|mon| {
        let chardev = options(args, "chardev")
            .map(fields)
            .find(|chardev| chardev.get("id") == mon.get("chardev"))?;
        chardev.get("path").cloned()
    });
    by_chardev.or_else(|| {
        let path = options(args, "qmp")
            .find_map(|text| text.strip_prefix("unix:"))?
            .split(',')
            .next()?;
        Some(path.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn qemu_by_its_arguments() {
        for (program, qemu) in [
            ("/usr/bin/kvm", true),
            ("kvm", true),
            ("/usr/bin/qemu-system-x86_64", true),
            ("qemu-kvm", true),
            ("/usr/bin/qemu-img", false),
            ("/kvm/bash", false),
            ("", false),
        ] {
            assert_eq!(is_qemu(&args(program)), qemu, "{program}");
        }
        assert!(!is_qemu(&[]));
        assert_eq!(
            parse_cmdline("kvm\0-name\0\0x\0"),
            ["kvm", "-name", "", "x"]
        );
        assert!(parse_cmdline("").is_empty());
        let line = args("kvm -pidfile /var/run/a.pid --pidfile b -pidfile");
        assert_eq!(
            options(&line, "pidfile").collect::<Vec<_>>(),
            ["/var/run/a.pid", "b"]
        );
        assert_eq!(
            in_run("/var/run/qemu-server/100.pid"),
            "run/qemu-server/100.pid"
        );
        assert_eq!(
            in_run("/run/qemu-server/100.pid"),
            "run/qemu-server/100.pid"
        );
    }

    #[test]
    fn monitors_by_arguments() {
        for (line, path) in [
            (
                "kvm -chardev socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on,wait=off \
                 -mon chardev=qmp,mode=control \
                 -chardev socket,id=qmp-event,path=/var/run/qmeventd.sock -mon chardev=qmp-event,mode=control",
                Some("/var/run/qemu-server/100.qmp"),
            ),
            (
                "kvm -chardev socket,id=hmp,path=/a -mon chardev=hmp,mode=readline -qmp unix:/b,server,nowait",
                Some("/b"),
            ),
            ("kvm -qmp tcp:localhost:4444", None),
            ("kvm -mon chardev=x,mode=control", None),
            ("kvm", None),
        ] {
            assert_eq!(monitor(&args(line)).as_deref(), path, "{line}");
        }
    }
}
