//! What the host would lose if PCI functions were removed: mounted disks, swap, network interfaces
//! that are up, the boot display, virtual functions, and the devices of running VMs.
//!
//! sysfs and /proc are read once for all functions of a run.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use pinfold_core::knob::NO_DRIVER;
use pinfold_core::sys::pci::{self, PciAddress};
use pinfold_core::vm;
use pinfold_core::vm::PciHolder;
use pinfold_core::{Host, Knob, Result};

/// Has a link for each PCI function.
const DEVICES: &str = "sys/bus/pci/devices";
/// Has a link for each disk and partition.
const BLOCK: &str = "sys/class/block";
/// Has a link for each network interface.
const NET: &str = "sys/class/net";
/// IFF_UP of `sys/class/net/*/flags`, see netdevice(7).
const IFF_UP: u32 = 1;

/// The reasons against removing PCI functions, in words.
#[derive(Debug, Default)]
pub(crate) struct InUse(BTreeMap<PciAddress, Vec<String>>);

impl InUse {
    /// Finds what the host would lose if these functions, and all functions behind them, were
    /// removed.
    ///
    /// Filesystems and swap are followed through partitions, device mapper, md, btrfs and NVMe
    /// multipath. Other users of a disk (ZFS) are found by an exclusive open, which needs root.
    ///
    /// # Errors
    /// [`Error::Io`](pinfold_core::Error::Io) if /proc or sysfs cannot be read.
    pub(crate) fn read(root: &Host, functions: &[PciAddress]) -> Result<Self> {
        let mut in_use = Self(functions.iter().map(|it| (*it, Vec::new())).collect());
        in_use.add_disks(root)?;
        in_use.add_interfaces(root)?;
        let removed_with = in_use.removed_with(root)?;
        in_use.add_functions(root, &removed_with)?;
        in_use.add_vms(root, &removed_with)?;
        Ok(in_use)
    }

    /// Why the function should not be removed; empty if no reason is known.
    pub(crate) fn reasons(&self, address: &PciAddress) -> &[String] {
        self.0.get(address).map_or(&[], Vec::as_slice)
    }

    fn add(&mut self, address: &PciAddress, reason: String) {
        if let Some(reasons) = self.0.get_mut(address) {
            reasons.push(reason);
        }
    }

    /// All functions of the host, each with those asked for whose removal takes it along: itself,
    /// and the bridges it is behind.
    fn removed_with(&self, root: &Host) -> Result<BTreeMap<PciAddress, BTreeSet<PciAddress>>> {
        let mut removed_with = BTreeMap::new();
        for address in pci::addresses(root)? {
            let path = link(root, &format!("{DEVICES}/{address}")).unwrap_or_default();
            let mut removed = BTreeSet::from_iter(functions_in(&path).chain([address]));
            removed.retain(|address| self.0.contains_key(address));
            if !removed.is_empty() {
                removed_with.insert(address, removed);
            }
        }
        Ok(removed_with)
    }

    /// The boot display, and virtual functions.
    fn add_functions(
        &mut self,
        root: &Host,
        removed_with: &BTreeMap<PciAddress, BTreeSet<PciAddress>>,
    ) -> Result<()> {
        // Without root or a console there are no names in it.
        let iomem = root
            .read_value("proc/iomem")
            .ok()
            .flatten()
            .unwrap_or_default();
        for (function, removed) in removed_with {
            for reason in reasons_of_function(root, function, &iomem)? {
                for address in removed {
                    self.add(address, format!("{} {reason}", name(function, address)));
                }
            }
        }
        Ok(())
    }

    /// Removing a function from a running guest blocks in the kernel until the guest has ended.
    fn add_vms(
        &mut self,
        root: &Host,
        removed_with: &BTreeMap<PciAddress, BTreeSet<PciAddress>>,
    ) -> Result<()> {
        let mut claims = match vm::pci_claims(root) {
            // Only root and www-data can read it; what is listed without root is not reset.
            Err(error) if error.is_denied() => return Ok(()),
            claims => claims?,
        };
        claims.retain(|claim| matches!(claim.holder, PciHolder::Pid(_)));
        for claim in claims {
            for address in removed_with.get(&claim.address).into_iter().flatten() {
                let used = name(&claim.address, address);
                self.add(address, format!("VM {} runs with {used}", claim.vmid));
            }
        }
        Ok(())
    }

    /// Network interfaces that are up. The kernel keeps the ports of a bridge or bond up too.
    fn add_interfaces(&mut self, root: &Host) -> Result<()> {
        for name in names(root, NET)? {
            let path = link(root, &format!("{NET}/{name}")).unwrap_or_default();
            let above: Vec<_> = functions_in(&path)
                .filter(|address| self.0.contains_key(address))
                .collect();
            if above.is_empty() {
                continue;
            }
            let flags = root.read_value(format!("{NET}/{name}/flags"))?;
            if flags.is_some_and(|flags| is_up(&flags)) {
                for address in above {
                    self.add(&address, format!("network interface {name} is up"));
                }
            }
        }
        Ok(())
    }

    fn add_disks(&mut self, root: &Host) -> Result<()> {
        let disks = Disks::read(root, &self.0)?;
        if disks.list.is_empty() {
            return Ok(());
        }
        for mount in parse_mounts(&root.read("proc/self/mountinfo")?) {
            let users = disks.of_mount(&mount);
            self.add_use(&users, |disk| {
                format!("{disk} is mounted on {}", mount.target)
            });
        }
        for source in parse_swaps(&root.read_value("proc/swaps")?.unwrap_or_default()) {
            let users = disks.of_source(&source);
            self.add_use(&users, |disk| format!("{disk} is swap"));
        }
        self.add_btrfs(root, &disks)?;
        if root.is_live() {
            self.add_claims(root, &disks);
        }
        Ok(())
    }

    /// Adds one use of a disk to every function that it is on. If several disks match, each
    /// function gets the first one that is on it.
    fn add_use(&mut self, disks: &[&Disk], reason: impl Fn(&str) -> String) {
        let mut done = BTreeSet::new();
        for disk in disks {
            for address in &disk.functions {
                if done.insert(*address) {
                    self.add(address, reason(&disk.name));
                }
            }
        }
    }

    /// A btrfs of several disks has only one of them as its mount source.
    fn add_btrfs(&mut self, root: &Host, disks: &Disks) -> Result<()> {
        for id in names(root, "sys/fs/btrfs")? {
            for name in names(root, &format!("sys/fs/btrfs/{id}/devices"))? {
                let Some(disk) = disks.by_name(&name) else {
                    continue;
                };
                for address in &disk.functions {
                    let known = self.reasons(address);
                    if !known.iter().any(|reason| reason.starts_with(&name)) {
                        self.add(address, format!("{name} is part of a mounted btrfs"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Disks that are opened exclusively, on functions without a reason so far.
    fn add_claims(&mut self, root: &Host, disks: &Disks) {
        let unused = |address: &&PciAddress| self.reasons(address).is_empty();
        let asked: Vec<(&Disk, Vec<PciAddress>)> = disks
            .list
            .iter()
            .map(|disk| {
                (
                    disk,
                    disk.functions.iter().filter(unused).copied().collect(),
                )
            })
            .filter(|(_, functions): &(_, Vec<_>)| !functions.is_empty())
            .collect();
        for (disk, functions) in asked {
            if !is_claimed(root, &disk.name) {
                continue;
            }
            for address in functions {
                let reason = format!(
                    "{} is in use (ZFS, LVM, md or another exclusive user)",
                    disk.name
                );
                self.add(&address, reason);
            }
        }
    }
}

/// How a reason against removing `removed` refers to a function.
fn name(function: &PciAddress, removed: &PciAddress) -> String {
    if function == removed {
        "it".to_owned()
    } else {
        function.to_string()
    }
}

/// What would be lost with a single function, as the end of a sentence.
fn reasons_of_function(root: &Host, address: &PciAddress, iomem: &str) -> Result<Vec<String>> {
    let path = |name: &str| format!("{DEVICES}/{address}/{name}");
    let is_set = |name: &str| {
        root.read_value(path(name))
            .map(|value| value.is_some_and(|value| value != "0"))
    };
    let mut reasons = Vec::new();
    if is_set("boot_vga")? {
        let driver = Knob::PciDriver(address.to_string()).read(root)?;
        let driver = driver.map_or_else(|| NO_DRIVER.into(), |driver| driver.to_string());
        reasons.push(boot_display(&driver, framebuffer(iomem, address)));
    }
    // The PF makes its VFs: no rescan finds a VF again, and removing the PF removes its VFs.
    if root.exists(path("physfn")) {
        reasons.push("is a virtual function, which a rescan does not bring back".into());
    }
    if is_set("sriov_numvfs")? {
        reasons.push("has virtual functions, which a rescan does not bring back".into());
    }
    Ok(reasons)
}

/// The boot display, with what holds it and how to keep that off it.
fn boot_display(driver: &str, framebuffer: Option<&str>) -> String {
    let mut text = "is the boot display".to_owned();
    if let Some(framebuffer) = framebuffer {
        text += &format!(
            ", and the kernel's framebuffer {framebuffer} holds it (to keep that off: \
             initcall_blacklist=sysfb_init on the kernel's command line)"
        );
    }
    if !["vfio-pci", NO_DRIVER].contains(&driver) {
        text += &format!(
            ", and the driver {driver} holds it (to keep that off: `softdep {driver} pre: vfio-pci` and \
             `options vfio-pci ids=` in /etc/modprobe.d)"
        );
    }
    text
}

/// The kernel's framebuffer (efifb, vesafb, simplefb) in a function's memory, as /proc/iomem names
/// it: the firmware's framebuffer is `BOOTFB` until a driver takes it, and with simpledrm.
fn framebuffer<'a>(iomem: &'a str, address: &PciAddress) -> Option<&'a str> {
    const NAMES: [&str; 6] = [
        "efifb",
        "vesafb",
        "simplefb",
        "simpledrm",
        "BOOTFB",
        "vga16fb",
    ];
    let address = address.to_string();
    // The depth of the function's memory, while what is within it is read.
    let mut within = None;
    for line in iomem.lines() {
        let depth = line.len() - line.trim_start().len();
        let Some((_, name)) = line.split_once(" : ") else {
            continue;
        };
        if within.is_some_and(|outer| depth <= outer) {
            within = None;
        }
        if within.is_some() && NAMES.contains(&name) {
            return Some(name);
        }
        if name == address {
            within = Some(depth);
        }
    }
    None
}

/// Whether the text of an interface's `flags` means up; text that cannot be read counts as up, to
/// be safe.
fn is_up(flags: &str) -> bool {
    let bits = flags
        .trim()
        .strip_prefix("0x")
        .and_then(|digits| u32::from_str_radix(digits, 16).ok());
    bits.is_none_or(|bits| bits & IFF_UP != 0)
}

/// The disks and partitions on a set of PCI functions, by the names that /proc uses for them.
struct Disks {
    /// Sorted as [`Host::names`] sorts.
    list: Vec<Disk>,
    /// Indices into `list`.
    by_name: BTreeMap<String, usize>,
    by_number: BTreeMap<String, Vec<usize>>,
    by_mapped: BTreeMap<String, Vec<usize>>,
}

/// A disk or partition.
struct Disk {
    /// The kernel's name: `dm-0`.
    name: String,
    /// The functions it is on, directly or by the disks that it is made of.
    functions: BTreeSet<PciAddress>,
}

impl Disks {
    fn read(root: &Host, functions: &BTreeMap<PciAddress, Vec<String>>) -> Result<Self> {
        let names = names(root, BLOCK)?;
        let mut stack = Stack::default();
        for name in &names {
            stack.read(root, name)?;
        }
        let mut disks = Self {
            list: Vec::new(),
            by_name: BTreeMap::new(),
            by_number: BTreeMap::new(),
            by_mapped: BTreeMap::new(),
        };
        for name in names {
            let mut under = stack.functions(&name);
            under.retain(|address| functions.contains_key(address));
            if under.is_empty() {
                continue;
            }
            let index = disks.list.len();
            if let Some(number) = root.read_value(format!("{BLOCK}/{name}/dev"))? {
                disks.by_number.entry(number).or_default().push(index);
            }
            if let Some(mapped) = root.read_value(format!("{BLOCK}/{name}/dm/name"))? {
                disks.by_mapped.entry(mapped).or_default().push(index);
            }
            disks.by_name.insert(name.clone(), index);
            disks.list.push(Disk {
                name,
                functions: under,
            });
        }
        Ok(disks)
    }

    fn by_name(&self, name: &str) -> Option<&Disk> {
        self.by_name.get(name).map(|index| &self.list[*index])
    }

    /// The disks that a mount or swap source such as `/dev/mapper/pve-root` may be.
    fn of_source(&self, source: &str) -> Vec<&Disk> {
        self.at(self.indices(source))
    }

    fn of_mount(&self, mount: &Mount) -> Vec<&Disk> {
        let mut indices = self.indices(&mount.source);
        indices.extend(self.by_number.get(&mount.number).into_iter().flatten());
        self.at(indices)
    }

    fn at(&self, indices: BTreeSet<usize>) -> Vec<&Disk> {
        indices.into_iter().map(|index| &self.list[index]).collect()
    }

    fn indices(&self, source: &str) -> BTreeSet<usize> {
        let Some(name) = source.strip_prefix("/dev/") else {
            return BTreeSet::new();
        };
        let mapped = name
            .strip_prefix("mapper/")
            .and_then(|name| self.by_mapped.get(name));
        let named = self.by_name.get(name);
        named
            .into_iter()
            .chain(mapped.into_iter().flatten())
            .copied()
            .collect()
    }
}

/// How disks are stacked: partitions on disks, mapped disks on partitions.
#[derive(Default)]
struct Stack {
    layers: BTreeMap<String, Layer>,
    /// The PCI functions of NVMe subsystems, by subsystem.
    nvme: BTreeMap<String, Vec<PciAddress>>,
}

/// What sysfs reports about one disk or partition.
#[derive(Default)]
struct Layer {
    functions: Vec<PciAddress>,
    /// The names of the disks it is made of.
    below: Vec<String>,
}

impl Stack {
    /// Reads one disk and all that it is made of.
    fn read(&mut self, root: &Host, name: &str) -> Result<()> {
        if self.layers.contains_key(name) {
            return Ok(());
        }
        let layer = self.layer(root, name)?;
        let below = layer.below.clone();
        self.layers.insert(name.to_owned(), layer);
        for name in &below {
            self.read(root, name)?;
        }
        Ok(())
    }

    fn layer(&mut self, root: &Host, name: &str) -> Result<Layer> {
        let Some(path) = link(root, &format!("{BLOCK}/{name}")) else {
            return Ok(Layer::default());
        };
        let mut functions: Vec<_> = functions_in(&path).collect();
        let parts: Vec<&str> = path.split('/').collect();
        if let Some(at) = parts.iter().position(|part| *part == "nvme-subsystem") {
            functions.extend(self.nvme(root, parts.get(at + 1).unwrap_or(&""))?);
        }
        let mut below = names(root, &format!("{BLOCK}/{name}/slaves"))?;
        // A partition of an md or mapped disk is on what that disk is on.
        if let [.., whole, _] = *parts
            && root.exists(format!("{BLOCK}/{name}/partition"))
        {
            below.push(whole.to_owned());
        }
        Ok(Layer { functions, below })
    }

    /// With NVMe multipath the disk is virtual, and the subsystem's folder has links to its
    /// controllers.
    fn nvme(&mut self, root: &Host, subsystem: &str) -> Result<Vec<PciAddress>> {
        if let Some(known) = self.nvme.get(subsystem) {
            return Ok(known.clone());
        }
        let folder = format!("sys/class/nvme-subsystem/{subsystem}");
        let mut functions = Vec::new();
        for controller in names(root, &folder)? {
            let links = [
                format!("{folder}/{controller}"),
                format!("sys/class/nvme/{controller}"),
            ];
            for path in links.iter().filter_map(|path| link(root, path)) {
                functions.extend(functions_in(&path));
            }
        }
        self.nvme.insert(subsystem.to_owned(), functions.clone());
        Ok(functions)
    }

    /// The functions that a disk is on.
    fn functions(&self, name: &str) -> BTreeSet<PciAddress> {
        let mut functions = BTreeSet::new();
        let mut seen = BTreeSet::new();
        let mut rest = vec![name];
        while let Some(name) = rest.pop() {
            let layer = self.layers.get(name).filter(|_| seen.insert(name));
            if let Some(layer) = layer {
                functions.extend(&layer.functions);
                rest.extend(layer.below.iter().map(String::as_str));
            }
        }
        functions
    }
}

/// Whether another user has the disk open exclusively: O_EXCL on a block device, see open(2).
#[expect(clippy::disallowed_methods, reason = "opens for reading only")]
fn is_claimed(root: &Host, name: &str) -> bool {
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
    /// Its mount point.
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

/// The PCI functions that a device's path in sysfs leads through.
fn functions_in(path: &str) -> impl Iterator<Item = PciAddress> {
    path.split('/')
        .filter(|part| part.len() >= "0000:00:00.0".len())
        .filter_map(|part| part.parse().ok())
}

/// The target of a link in sysfs, as it is stored.
fn link(root: &Host, path: &str) -> Option<String> {
    let target = fs::read_link(root.path(path)).ok()?;
    Some(target.to_string_lossy().into_owned())
}

/// The names in a folder that a host need not have.
fn names(root: &Host, path: &str) -> Result<Vec<String>> {
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
    fn interface_flags() {
        for (flags, up) in [
            ("0x1003\n", true),
            ("0x1002", false),
            ("", true),
            ("garbage", true),
        ] {
            assert_eq!(is_up(flags), up, "{flags:?}");
        }
    }

    fn guards(root: &Host, address: &PciAddress) -> Result<Vec<String>> {
        Ok(InUse::read(root, &[*address])?.reasons(address).to_vec())
    }

    /// A host with a bridge, behind it a disk that carries LVM; a NIC; a VGA; an idle USB
    /// controller.
    fn host() -> (tempfile::TempDir, Host) {
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
        let root = Host::new(base);
        (dir, root)
    }

    #[test]
    fn reasons_name_what_would_be_lost() {
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
    fn what_holds_the_boot_display_is_named() {
        let iomem = "00000000-00000fff : Reserved\n\
            c0000000-dfffffff : PCI Bus 0000:00\n\
            \x20 c0000000-cfffffff : PCI Bus 0000:01\n\
            \x20   c0000000-cfffffff : 0000:01:00.0\n\
            \x20     c0000000-c02fffff : BOOTFB\n\
            \x20       c0000000-c02fffff : efifb\n\
            \x20 d0000000-d0ffffff : 0000:02:00.0\n\
            \x20   d0000000-d0000fff : nvidia\n\
            \x20 d1000000-d1ffffff : efifb\n";
        for (address, expected) in [
            ("01:00.0", Some("BOOTFB")),
            ("02:00.0", None),
            ("03:00.0", None),
        ] {
            assert_eq!(framebuffer(iomem, &address.parse().unwrap()), expected);
        }
        let hidden = iomem.replace(|c: char| c.is_ascii_hexdigit(), "0");
        assert_eq!(framebuffer(&hidden, &"01:00.0".parse().unwrap()), None);
        for garbage in ["", "\n\n", "x", " : ", "0-1 : 0000:01:00.0"] {
            assert_eq!(framebuffer(garbage, &"01:00.0".parse().unwrap()), None);
        }

        let (dir, root) = host();
        let device = dir.path().join("sys/devices/pci0000:00/0000:00:04.0");
        fs::write(device.join("boot_vga"), "1\n").unwrap();
        let address: PciAddress = "00:04.0".parse().unwrap();
        let reported = |expected: &str| {
            assert_eq!(
                guards(&root, &address).unwrap(),
                [format!("it is the boot display{expected}")]
            );
        };
        let _ = fs::remove_file(device.join("driver"));
        reported("");
        symlink("../../../bus/pci/drivers/vfio-pci", device.join("driver")).unwrap();
        reported("");
        let memory = " d0000000-d0ffffff : 0000:00:04.0\n  d0000000-d0000fff : efifb\n";
        fs::write(dir.path().join("proc/iomem"), memory).unwrap();
        let framebuffer = ", and the kernel's framebuffer efifb holds it (to keep that off: \
                           initcall_blacklist=sysfb_init on the kernel's command line)";
        reported(framebuffer);
        fs::remove_file(device.join("driver")).unwrap();
        symlink("../../../bus/pci/drivers/amdgpu", device.join("driver")).unwrap();
        reported(&format!(
            "{framebuffer}, and the driver amdgpu holds it (to keep that off: \
             `softdep amdgpu pre: vfio-pci` and `options vfio-pci ids=` in /etc/modprobe.d)"
        ));
    }

    #[test]
    fn virtual_functions_are_a_reason() {
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
