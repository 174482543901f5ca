//! PCI functions: their addresses, what sysfs tells of them, and what on the host would be lost
//! with one.
//!
//! See the kernel's Documentation/PCI/sysfs-pci.rst and ABI/testing/sysfs-bus-pci.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::sysroot::Sysroot;

/// Where every PCI function has a link to its folder.
const DEVICES: &str = "sys/bus/pci/devices";
/// Where every disk and partition has one.
const BLOCK: &str = "sys/class/block";
/// Where every network interface has one.
const NET: &str = "sys/class/net";
/// The largest device number in a PCI address: five bits.
const MAX_DEVICE: u8 = 0x1f;
/// The largest function number in a PCI address: three bits.
const MAX_FUNCTION: u8 = 7;
/// IFF_UP of `sys/class/net/*/flags`, see netdevice(7).
const IFF_UP: u32 = 1;

/// Where one PCI function sits: `0000:01:00.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// The PCI domain, 0 on most machines; Intel VMD makes ones beyond 16 bits.
    pub domain: u32,
    /// The bus.
    pub bus: u8,
    /// The device on the bus, at most 1f.
    pub device: u8,
    /// The function of the device, at most 7.
    pub function: u8,
}

/// A PCI device as Proxmox VE's settings name it: one function, or with none given all functions of
/// the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciSelector {
    /// The PCI domain; 0 where the text has none.
    pub domain: u32,
    /// The bus.
    pub bus: u8,
    /// The device on the bus, at most 1f.
    pub device: u8,
    /// The function; `None` stands for all there are.
    pub function: Option<u8>,
}

impl PciSelector {
    /// Whether the address is one that is selected.
    pub fn matches(&self, address: &PciAddress) -> bool {
        (self.domain, self.bus, self.device) == (address.domain, address.bus, address.device)
            && self
                .function
                .is_none_or(|function| function == address.function)
    }

    /// The function that is selected, or the device's first one, which every device has.
    pub fn first(&self) -> PciAddress {
        let Self {
            domain,
            bus,
            device,
            function,
        } = *self;
        PciAddress {
            domain,
            bus,
            device,
            function: function.unwrap_or(0),
        }
    }

    /// The functions on this host that are selected, ascending.
    ///
    /// # Errors
    /// [`Error::Unusable`] where there is none, [`Error::Io`] where sysfs cannot be read.
    pub fn functions(&self, root: &Sysroot) -> Result<Vec<PciAddress>> {
        let found: Vec<_> = addresses(root)?
            .into_iter()
            .filter(|address| self.matches(address))
            .collect();
        if found.is_empty() {
            return Err(Error::unusable(
                format!("PCI {self}"),
                "no such device on this host; lspci -D lists those there are",
            ));
        }
        Ok(found)
    }
}

impl FromStr for PciSelector {
    type Err = Error;

    /// Reads `[[DOMAIN:]BUS:DEVICE[.FUNCTION]]`, all hexadecimal, as `PVE::QemuServer::PCI` does.
    fn from_str(text: &str) -> Result<Self> {
        let bad = || {
            Error::malformed(
                format!("{text:?}"),
                "it is no PCI address; write one as in 0000:01:00.0 or 01:00",
            )
        };
        let hex = |digits: &str, most: usize| {
            let good =
                (1..=most).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
            if good {
                u32::from_str_radix(digits, 16).map_err(|_| bad())
            } else {
                Err(bad())
            }
        };
        let (slot, function) = match text.split_once('.') {
            Some((slot, function)) => (slot, Some(hex(function, 1)?)),
            None => (text, None),
        };
        let (domain, bus, device) = match *slot.split(':').collect::<Vec<_>>() {
            [bus, device] => (0, bus, device),
            [domain, bus, device] if domain.len() >= 4 => (hex(domain, 8)?, bus, device),
            _ => return Err(bad()),
        };
        if bus.len() != 2 || device.len() != 2 {
            return Err(bad());
        }
        let byte = |number: u32, most: u8| {
            u8::try_from(number)
                .ok()
                .filter(|byte| *byte <= most)
                .ok_or_else(bad)
        };
        Ok(Self {
            domain,
            bus: byte(hex(bus, 2)?, u8::MAX)?,
            device: byte(hex(device, 2)?, MAX_DEVICE)?,
            function: function
                .map(|function| byte(function, MAX_FUNCTION))
                .transpose()?,
        })
    }
}

impl fmt::Display for PciSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:04x}:{:02x}:{:02x}",
            self.domain, self.bus, self.device
        )?;
        match self.function {
            Some(function) => write!(f, ".{function}"),
            None => Ok(()),
        }
    }
}

impl FromStr for PciAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let PciSelector {
            domain,
            bus,
            device,
            function,
        } = text.parse()?;
        let function = function
            .ok_or_else(|| Error::malformed(format!("{text:?}"), "the PCI function is missing"))?;
        Ok(Self {
            domain,
            bus,
            device,
            function,
        })
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            domain,
            bus,
            device,
            function,
        } = *self;
        PciSelector {
            domain,
            bus,
            device,
            function: Some(function),
        }
        .fmt(f)
    }
}

impl Serialize for PciSelector {
    fn serialize<S: serde::Serializer>(
        &self,
        serializer: S,
    ) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PciSelector {
    fn deserialize<D: serde::Deserializer<'de>>(
        deserializer: D,
    ) -> std::result::Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// What sysfs tells of a PCI function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciFunction {
    /// Where it sits.
    pub address: PciAddress,
    /// Class, subclass and interface: 0x030000 is a VGA controller.
    pub class: u32,
    /// The vendor's number.
    pub vendor: u16,
    /// The vendor's number for the device.
    pub device: u16,
    /// The driver that it is bound to.
    pub driver: Option<String>,
}

/// The addresses of all PCI functions, ascending.
///
/// # Errors
/// [`Error::Io`] where sysfs cannot be read.
pub fn addresses(root: &Sysroot) -> Result<Vec<PciAddress>> {
    let mut addresses: Vec<PciAddress> = root
        .names(DEVICES)?
        .iter()
        .filter_map(|name| name.parse().ok())
        .collect();
    addresses.sort_unstable();
    Ok(addresses)
}

/// Whether the function is there.
pub fn is_present(root: &Sysroot, address: &PciAddress) -> bool {
    root.exists(file(address, ""))
}

/// What sysfs tells of one function.
///
/// # Errors
/// One that [is gone](Error::is_gone) where it is not there, [`Error::Malformed`] where a number is
/// none.
pub fn function(root: &Sysroot, address: PciAddress) -> Result<PciFunction> {
    Ok(PciFunction {
        address,
        class: number(root, &address, "class")?,
        vendor: number(root, &address, "vendor")?,
        device: number(root, &address, "device")?,
        driver: root.link_name(file(&address, "driver")),
    })
}

/// Reads a function's attribute of the form `0x8086`.
fn number<N: TryFrom<u32>>(root: &Sysroot, address: &PciAddress, name: &str) -> Result<N> {
    let path = file(address, name);
    let text = root.read_record(&path)?;
    let digits = text.trim().strip_prefix("0x");
    let number = digits
        .and_then(|digits| u32::from_str_radix(digits, 16).ok())
        .and_then(|number| N::try_from(number).ok());
    number.ok_or_else(|| {
        Error::malformed(path, format!("{:?} is no number as in 0x8086", text.trim()))
    })
}

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
pub fn guards(root: &Sysroot, address: &PciAddress) -> Result<Vec<String>> {
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
pub fn behind(root: &Sysroot, address: &PciAddress) -> Result<Vec<PciAddress>> {
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
    fn selectors_are_read_and_printed() {
        for (text, canonical) in [
            ("01:00.0", "0000:01:00.0"),
            ("0000:01:00", "0000:01:00"),
            ("0000:0A:1f.7", "0000:0a:1f.7"),
            ("10000:e1:00.0", "10000:e1:00.0"),
            ("00:02", "0000:00:02"),
        ] {
            assert_eq!(
                text.parse::<PciSelector>().unwrap().to_string(),
                canonical,
                "{text:?}"
            );
        }
        assert_eq!(
            "01:00.1".parse::<PciAddress>().unwrap().to_string(),
            "0000:01:00.1"
        );
        assert!("01:00".parse::<PciAddress>().is_err());
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "\n",
            "01",
            "1:0.0",
            "01:00.",
            "01:00.8",
            "01:20.0",
            "01:00.0\n",
            " 01:00.0",
            "000:01:00.0",
            "01:00.00",
            "0000:01:00.0.0",
            "../../etc",
            "+1:00.0",
            "123456789:01:00.0",
            "::",
            "01:00.0;02:00.0",
            "é1:00",
        ] {
            let error = text.parse::<PciSelector>().unwrap_err().to_string();
            assert_eq!(
                error,
                format!("{text:?}: it is no PCI address; write one as in 0000:01:00.0 or 01:00")
            );
        }
    }

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

    #[test]
    fn functions_are_read() {
        let (_dir, root) = host();
        let address = "00:04.0".parse().unwrap();
        let found = function(&root, address).unwrap();
        assert_eq!(
            (found.class, found.vendor, found.device),
            (0x0c_0330, 0x1033, 0x0194)
        );
        assert_eq!(found.driver.as_deref(), Some("xhci_hcd"));
        assert!(
            function(&root, "00:09.0".parse().unwrap())
                .unwrap_err()
                .is_gone()
        );
        let all: PciSelector = "00:04".parse().unwrap();
        assert_eq!(all.functions(&root).unwrap(), [address]);
        let none: PciSelector = "00:09".parse().unwrap();
        assert_eq!(
            none.functions(&root).unwrap_err().to_string(),
            "PCI 0000:00:09: no such device on this host; lspci -D lists those there are"
        );
    }

    proptest! {
        #[test]
        fn selector_round_trip(domain: u32, bus: u8, device in 0..=MAX_DEVICE, function in prop::option::of(0..=MAX_FUNCTION)) {
            let selector = PciSelector { domain, bus, device, function };
            prop_assert_eq!(selector.to_string().parse::<PciSelector>().unwrap(), selector);
        }

        #[test]
        fn no_text_panics(text in "\\PC*") {
            let _ = text.parse::<PciSelector>();
            let _ = parse_mounts(&text);
            let _ = parse_swaps(&text);
            let _ = unescape(&text);
        }
    }
}
