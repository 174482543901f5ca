//! What on the host would be lost with a PCI function: mounted disks, swap, interfaces that are up,
//! the boot display and virtual functions.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use pinfold_core::pci::{PciAddress, addresses};
use pinfold_core::{Result, Sysroot};

/// Where every PCI function has a link to its folder.
const DEVICES: &str = "sys/bus/pci/devices";
/// Where every disk and partition has one.
const BLOCK: &str = "sys/class/block";
/// Where every network interface has one.
const NET: &str = "sys/class/net";
/// IFF_UP of `sys/class/net/*/flags`, see netdevice(7).
const IFF_UP: u32 = 1;

fn file(address: &PciAddress, name: &str) -> String {
    format!("{DEVICES}/{address}/{name}")
}

/// What the host would lose if the function, and all that is behind it, were removed: a reason
/// each, for people.
///
/// Empty means that nothing here knows a reason against it. Filesystems and swap are followed
/// through partitions, device mapper, md, btrfs and NVMe multipath; other holders of a disk (ZFS)
/// show by the kernel's exclusive open, which needs root.
///
/// # Errors
/// [`Error::Io`] where /proc or sysfs cannot be read.
pub(crate) fn guards(root: &Sysroot, address: &PciAddress) -> Result<Vec<String>> {
    let mut reasons = disk_guards(root, address)?;
    reasons.extend(net_guards(root, address)?);
    for behind in behind(root, address)? {
        let set = |name: &str| {
            root.read_value(file(&behind, name))
                .map(|value| value.is_some_and(|value| value != "0"))
        };
        let it = if behind == *address {
            "it".to_owned()
        } else {
            behind.to_string()
        };
        if set("boot_vga")? {
            reasons.push(format!("{it} is the boot display"));
        }
        // The PF makes its VFs: no rescan finds a VF again, and none is left when its PF goes.
        if root.exists(file(&behind, "physfn")) {
            reasons.push(format!(
                "{it} is a virtual function, which a rescan does not bring back"
            ));
        }
        if set("sriov_numvfs")? {
            reasons.push(format!(
                "{it} has virtual functions, which a rescan does not bring back"
            ));
        }
    }
    Ok(reasons)
}

/// The function and those behind it, where it is a bridge.
///
/// # Errors
/// [`Error::Io`] where sysfs cannot be read.
pub(crate) fn behind(root: &Sysroot, address: &PciAddress) -> Result<Vec<PciAddress>> {
    let is_behind = |other: &PciAddress| {
        other == address || link(root, &file(other, "")).is_some_and(|path| passes(&path, address))
    };
    Ok(addresses(root)?.into_iter().filter(is_behind).collect())
}

/// Interfaces that are up, ports of a bridge or a bond too: the kernel keeps those up.
fn net_guards(root: &Sysroot, address: &PciAddress) -> Result<Vec<String>> {
    let mut reasons = Vec::new();
    for name in names(root, NET)? {
        let on_device =
            link(root, &format!("{NET}/{name}")).is_some_and(|path| passes(&path, address));
        if on_device
            && root
                .read_value(format!("{NET}/{name}/flags"))?
                .is_some_and(|flags| is_up(&flags))
        {
            reasons.push(format!("network interface {name} is up"));
        }
    }
    Ok(reasons)
}

/// Whether the text of an interface's `flags` says up; text that cannot be read counts as up, to be
/// safe.
fn is_up(flags: &str) -> bool {
    let bits = flags
        .trim()
        .strip_prefix("0x")
        .and_then(|digits| u32::from_str_radix(digits, 16).ok());
    bits.is_none_or(|bits| bits & IFF_UP != 0)
}

/// Disks that something on the host uses.
fn disk_guards(root: &Sysroot, address: &PciAddress) -> Result<Vec<String>> {
    let mut disks = Vec::new();
    for name in names(root, BLOCK)? {
        if rests_on(root, &name, address, &mut BTreeSet::new())? {
            disks.push(Disk::read(root, name)?);
        }
    }
    if disks.is_empty() {
        return Ok(Vec::new());
    }
    let mut reasons = Vec::new();
    let mounts = parse_mounts(&root.read("proc/self/mountinfo")?);
    for mount in &mounts {
        if let Some(disk) = disks
            .iter()
            .find(|disk| disk.is(&mount.source) || disk.number == mount.number)
        {
            reasons.push(format!("{} is mounted on {}", disk.name, mount.target));
        }
    }
    for source in parse_swaps(&root.read_value("proc/swaps")?.unwrap_or_default()) {
        if let Some(disk) = disks.iter().find(|disk| disk.is(&source)) {
            reasons.push(format!("{} is swap", disk.name));
        }
    }
    // A btrfs of several disks names only one of them as its source.
    for id in names(root, "sys/fs/btrfs")? {
        for name in names(root, &format!("sys/fs/btrfs/{id}/devices"))? {
            if disks.iter().any(|disk| disk.name == name)
                && !reasons.iter().any(|reason| reason.starts_with(&name))
            {
                reasons.push(format!("{name} is part of a mounted btrfs"));
            }
        }
    }
    if reasons.is_empty() && root.is_live() {
        reasons.extend(
            disks
                .iter()
                .filter(|disk| is_claimed(root, &disk.name))
                .map(|disk| {
                    format!(
                        "{} is in use (ZFS, LVM, md or another that holds the disk for itself)",
                        disk.name
                    )
                }),
        );
    }
    Ok(reasons)
}

/// A disk or partition under the names by which /proc speaks of it.
struct Disk {
    /// The kernel's: `dm-0`.
    name: String,
    /// Major and minor number: `253:0`.
    number: String,
    /// The device mapper's: `pve-root`.
    mapped: Option<String>,
}

impl Disk {
    fn read(root: &Sysroot, name: String) -> Result<Self> {
        Ok(Self {
            number: root
                .read_value(format!("{BLOCK}/{name}/dev"))?
                .unwrap_or_default(),
            mapped: root.read_value(format!("{BLOCK}/{name}/dm/name"))?,
            name,
        })
    }

    fn is(&self, source: &str) -> bool {
        match source.strip_prefix("/dev/") {
            Some(name) => {
                name == self.name
                    || name
                        .strip_prefix("mapper/")
                        .is_some_and(|name| self.mapped.as_deref() == Some(name))
            }
            None => false,
        }
    }
}

/// Whether a disk is on the PCI function, by itself or by one of those that it is made of.
fn rests_on(
    root: &Sysroot,
    name: &str,
    address: &PciAddress,
    seen: &mut BTreeSet<String>,
) -> Result<bool> {
    if !seen.insert(name.to_owned()) {
        return Ok(false);
    }
    let Some(path) = link(root, &format!("{BLOCK}/{name}")) else {
        return Ok(false);
    };
    if passes(&path, address) {
        return Ok(true);
    }
    let parts: Vec<&str> = path.split('/').collect();
    // With NVMe multipath the disk is virtual, and the subsystem's folder has links to its
    // controllers.
    if let Some(at) = parts.iter().position(|part| *part == "nvme-subsystem") {
        let subsystem = format!(
            "sys/class/nvme-subsystem/{}",
            parts.get(at + 1).unwrap_or(&"")
        );
        for controller in names(root, &subsystem)? {
            if link(root, &format!("{subsystem}/{controller}"))
                .is_some_and(|path| passes(&path, address))
            {
                return Ok(true);
            }
            let class = format!("sys/class/nvme/{controller}");
            if link(root, &class).is_some_and(|path| passes(&path, address)) {
                return Ok(true);
            }
        }
    }
    // A partition of an md or mapped disk rests on what that disk rests on.
    let whole = match *parts {
        [.., whole, _] if root.exists(format!("{BLOCK}/{name}/partition")) => {
            Some(whole.to_owned())
        }
        _ => None,
    };
    for below in names(root, &format!("{BLOCK}/{name}/slaves"))?
        .into_iter()
        .chain(whole)
    {
        if rests_on(root, &below, address, seen)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether the kernel gives nobody else the disk for himself: O_EXCL on a block device, see
/// open(2).
fn is_claimed(root: &Sysroot, name: &str) -> bool {
    let flags = nix::libc::O_EXCL | nix::libc::O_NONBLOCK;
    let open = fs::OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(root.path(format!("dev/{name}")));
    matches!(open, Err(error) if error.kind() == io::ErrorKind::ResourceBusy)
}

/// A mounted filesystem.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    /// Major and minor number of its device: `8:1`.
    number: String,
    /// Where it is mounted.
    target: String,
    /// What it is mounted from: `/dev/sda1`, a pool, anything.
    source: String,
}

/// Parses /proc/self/mountinfo, see proc_pid_mountinfo(5); lines that are none are left out.
fn parse_mounts(text: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let (head, tail) = line.split_once(" - ")?;
        let mut head = head.split(' ').skip(2);
        let number = head.next()?.to_owned();
        let target = unescape(head.nth(1)?);
        let source = unescape(tail.split(' ').nth(1)?);
        Some(Mount {
            number,
            target,
            source,
        })
    };
    text.lines().filter_map(mount).collect()
}

/// Parses /proc/swaps into what is swapped to; see proc(5).
fn parse_swaps(text: &str) -> Vec<String> {
    text.lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .map(unescape)
        .collect()
}

/// Undoes the kernel's `\040` for characters that would break a table.
fn unescape(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        plain.push_str(before);
        let code = after
            .get(..3)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok())
            .filter(u8::is_ascii);
        match code {
            Some(code) => {
                plain.push(char::from(code));
                rest = &after[3..];
            }
            None => {
                plain.push('\\');
                rest = after;
            }
        }
    }
    plain.push_str(rest);
    plain
}

/// Whether a device's path in sysfs leads over the PCI function.
fn passes(path: &str, address: &PciAddress) -> bool {
    let address = address.to_string();
    path.split('/').any(|part| part == address)
}

/// Where a link in sysfs points at, as it is written there.
fn link(root: &Sysroot, path: &str) -> Option<String> {
    let target = fs::read_link(root.path(path.trim_end_matches('/'))).ok()?;
    Some(target.to_string_lossy().into_owned())
}

/// The names in a folder that a host need not have.
fn names(root: &Sysroot, path: &str) -> Result<Vec<String>> {
    match root.names(path) {
        Err(error) if error.is_gone() => Ok(Vec::new()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    #[test]
    fn mounts_are_read() {
        let text = "22 1 253:0 / / rw,relatime shared:1 - ext4 /dev/mapper/pve-root rw\n\
                    30 22 0:31 /sub /mnt/a\\040b rw - btrfs /dev/sdb1 rw\n\
                    garbage\n\n31 22 0:32 / /x rw\n - \n";
        let mounts = parse_mounts(text);
        assert_eq!(mounts.len(), 2, "{mounts:?}");
        assert_eq!(
            (mounts[0].number.as_str(), mounts[0].source.as_str()),
            ("253:0", "/dev/mapper/pve-root")
        );
        assert_eq!(mounts[1].target, "/mnt/a b");
        assert!(parse_mounts("").is_empty());
    }

    #[test]
    fn swaps_and_escapes_are_read() {
        let text =
            "Filename\tType\tSize\n/dev/dm-1 partition 8 0 -2\n/swap\\040file file 8 0 -3\n\n";
        assert_eq!(parse_swaps(text), ["/dev/dm-1", "/swap file"]);
        assert!(parse_swaps("").is_empty());
        for (text, plain) in [
            ("\\", "\\"),
            ("a\\04", "a\\04"),
            ("\\é40", "\\é40"),
            ("\\777", "\\777"),
            ("\\134", "\\"),
        ] {
            assert_eq!(unescape(text), plain);
        }
    }

    #[test]
    fn flags_tell_up() {
        for (flags, up) in [
            ("0x1003\n", true),
            ("0x1002", false),
            ("", true),
            ("garbage", true),
        ] {
            assert_eq!(is_up(flags), up, "{flags:?}");
        }
    }

    /// A host with a bridge, behind it a disk that carries LVM; a NIC; a VGA; an idle USB
    /// controller.
    fn host() -> (tempfile::TempDir, Sysroot) {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path();
        let write = |path: &str, text: &str| {
            let path = base.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let link = |path: &str, target: &str| {
            let path = base.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            symlink(Path::new(target), path).unwrap();
        };
        for (address, path) in [
            ("0000:00:01.0", "0000:00:01.0"),
            ("0000:01:00.0", "0000:00:01.0/0000:01:00.0"),
            ("0000:00:02.0", "0000:00:02.0"),
            ("0000:00:03.0", "0000:00:03.0"),
            ("0000:00:04.0", "0000:00:04.0"),
            ("0000:00:05.0", "0000:00:05.0"),
        ] {
            write(
                &format!("sys/devices/pci0000:00/{path}/class"),
                "0x0c0330\n",
            );
            write(&format!("sys/devices/pci0000:00/{path}/vendor"), "0x1033\n");
            write(&format!("sys/devices/pci0000:00/{path}/device"), "0x0194\n");
            link(
                &format!("sys/bus/pci/devices/{address}"),
                &format!("../../../devices/pci0000:00/{path}"),
            );
        }
        write("sys/devices/pci0000:00/0000:00:03.0/boot_vga", "1\n");
        link(
            "sys/devices/pci0000:00/0000:00:04.0/driver",
            "../../../bus/pci/drivers/xhci_hcd",
        );
        let nic = "devices/pci0000:00/0000:00:02.0/net/eth0";
        write(&format!("sys/{nic}/flags"), "0x1003\n");
        link("sys/class/net/eth0", &format!("../../{nic}"));
        let disk = "devices/pci0000:00/0000:00:01.0/0000:01:00.0/nvme/nvme0/nvme0n1";
        write(&format!("sys/{disk}/dev"), "259:0\n");
        write(&format!("sys/{disk}/nvme0n1p3/dev"), "259:3\n");
        write(&format!("sys/{disk}/nvme0n1p3/partition"), "3\n");
        link("sys/class/block/nvme0n1", &format!("../../{disk}"));
        link(
            "sys/class/block/nvme0n1p3",
            &format!("../../{disk}/nvme0n1p3"),
        );
        for (name, mapped) in [("dm-0", "pve-root"), ("dm-1", "pve-swap")] {
            let path = format!("devices/virtual/block/{name}");
            write(&format!("sys/{path}/dev"), &format!("253:{}\n", &name[3..]));
            write(&format!("sys/{path}/dm/name"), &format!("{mapped}\n"));
            link(
                &format!("sys/{path}/slaves/nvme0n1p3"),
                "../../../../whatever",
            );
            link(&format!("sys/class/block/{name}"), &format!("../../{path}"));
        }
        write(
            "proc/self/mountinfo",
            "22 1 253:0 / / rw - ext4 /dev/mapper/pve-root rw\n",
        );
        write(
            "proc/swaps",
            "Filename Type Size Used Priority\n/dev/dm-1 partition 8 0 -2\n",
        );
        let root = Sysroot::new(base);
        (dir, root)
    }

    #[test]
    fn guards_name_what_would_be_lost() {
        let (_dir, root) = host();
        let guards = |address: &str| guards(&root, &address.parse().unwrap()).unwrap();
        assert_eq!(
            guards("0000:01:00.0"),
            ["dm-0 is mounted on /", "dm-1 is swap"]
        );
        assert_eq!(
            guards("0000:00:01.0"),
            guards("0000:01:00.0"),
            "a bridge takes along what is behind it"
        );
        assert_eq!(guards("0000:00:02.0"), ["network interface eth0 is up"]);
        assert_eq!(guards("0000:00:03.0"), ["it is the boot display"]);
        assert!(guards("0000:00:04.0").is_empty());
    }

    #[test]
    fn disks_are_followed_through_btrfs_md_and_nvme_multipath() {
        let (dir, root) = host();
        let base = dir.path();
        let usb = "0000:00:04.0".parse().unwrap();
        let device = base.join("sys/devices/pci0000:00/0000:00:04.0/usb2/sdb");
        fs::create_dir_all(&device).unwrap();
        fs::write(device.join("dev"), "8:16\n").unwrap();
        symlink(
            "../../devices/pci0000:00/0000:00:04.0/usb2/sdb",
            base.join("sys/class/block/sdb"),
        )
        .unwrap();
        assert!(guards(&root, &usb).unwrap().is_empty());
        fs::create_dir_all(base.join("sys/fs/btrfs/1234/devices/sdb")).unwrap();
        assert_eq!(
            guards(&root, &usb).unwrap(),
            ["sdb is part of a mounted btrfs"]
        );
        fs::remove_dir_all(base.join("sys/fs/btrfs")).unwrap();

        let md = base.join("sys/devices/virtual/block/md0");
        fs::create_dir_all(md.join("slaves/sdb")).unwrap();
        fs::create_dir_all(md.join("md0p1")).unwrap();
        fs::write(md.join("md0p1/partition"), "1\n").unwrap();
        fs::write(md.join("md0p1/dev"), "259:9\n").unwrap();
        symlink(
            "../../devices/virtual/block/md0",
            base.join("sys/class/block/md0"),
        )
        .unwrap();
        symlink(
            "../../devices/virtual/block/md0/md0p1",
            base.join("sys/class/block/md0p1"),
        )
        .unwrap();
        fs::write(
            base.join("proc/self/mountinfo"),
            "1 1 259:9 / /srv rw - ext4 /dev/md0p1 rw\n",
        )
        .unwrap();
        assert_eq!(guards(&root, &usb).unwrap(), ["md0p1 is mounted on /srv"]);

        let nvme: PciAddress = "0000:00:05.0".parse().unwrap();
        let head = base.join("sys/devices/virtual/nvme-subsystem/nvme-subsys1/nvme1n1");
        fs::create_dir_all(&head).unwrap();
        fs::write(head.join("dev"), "259:20\n").unwrap();
        symlink(
            "../../devices/virtual/nvme-subsystem/nvme-subsys1/nvme1n1",
            base.join("sys/class/block/nvme1n1"),
        )
        .unwrap();
        fs::create_dir_all(base.join("sys/class/nvme-subsystem")).unwrap();
        symlink(
            "../../devices/virtual/nvme-subsystem/nvme-subsys1",
            base.join("sys/class/nvme-subsystem/nvme-subsys1"),
        )
        .unwrap();
        symlink(
            "../../../pci0000:00/0000:00:05.0/nvme/nvme1",
            head.parent().unwrap().join("nvme1"),
        )
        .unwrap();
        fs::write(
            base.join("proc/self/mountinfo"),
            "1 1 259:20 / /fast rw - xfs /dev/nvme1n1 rw\n",
        )
        .unwrap();
        assert_eq!(
            guards(&root, &nvme).unwrap(),
            ["nvme1n1 is mounted on /fast"]
        );
    }

    #[test]
    fn virtual_functions_do_not_come_back() {
        let (dir, root) = host();
        let device = dir.path().join("sys/devices/pci0000:00/0000:00:04.0");
        fs::write(device.join("sriov_numvfs"), "0\n").unwrap();
        let address = "00:04.0".parse().unwrap();
        assert!(guards(&root, &address).unwrap().is_empty());
        fs::write(device.join("sriov_numvfs"), "2\n").unwrap();
        assert_eq!(guards(&root, &address).unwrap().len(), 1);
        symlink("../0000:00:05.0", device.join("physfn")).unwrap();
        assert_eq!(guards(&root, &address).unwrap().len(), 2);
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC*") {
            let _ = parse_mounts(&text);
            let _ = parse_swaps(&text);
            let _ = unescape(&text);
        }
    }
}
