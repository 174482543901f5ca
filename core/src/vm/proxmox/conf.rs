//! Proxmox VE's files about a VM: its settings, the PCI devices reserved, the cluster's PCI
//! mappings.
//!
//! The grammar is that of qemu-server's `PVE::QemuServer::parse_vm_config`, `PVE::QemuServer::PCI`
//! and pve-guest-common's `PVE::Mapping::PCI`.

use crate::error::{Error, Result, is_gone};
use crate::sys::pci::PciSelector;
use crate::sysroot::Sysroot;
use crate::vm::cmdline;
use crate::vm::guest_topology;
use crate::vm::id::VmId;

/// The number of hostpci entries that a VM may have.
const MAX_HOSTPCI: u32 = 16;

/// What Pinfold needs of a VM's settings: those of the running VM, neither pending ones nor a
/// snapshot's.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VmConf {
    /// The VM's name.
    pub name: Option<String>,
    /// CPU sockets; Proxmox VE takes 1 where it is not set.
    pub sockets: Option<u32>,
    /// Cores per socket; Proxmox VE takes 1 where it is not set.
    pub cores: Option<u32>,
    /// vCPUs that the VM starts with, where not all.
    pub vcpus: Option<u32>,
    /// Arguments for QEMU, as they are written; Proxmox VE puts them behind its own.
    pub args: Option<String>,
    /// Proxmox VE's own pinning of the whole process, as it is written: a CPU list.
    pub affinity: Option<String>,
    /// The huge pages' size: `2`, `1024` or `any`.
    pub hugepages: Option<String>,
    /// The host's PCI devices that are passed through, by index.
    pub hostpci: Vec<HostPci>,
    /// Whether it is a template, which never runs.
    pub template: bool,
    /// The volume of the hook script: `local:snippets/hook`.
    pub hookscript: Option<String>,
    /// Whether it has a TPM, for which swtpm runs beside QEMU.
    pub tpm: bool,
    /// Whether it shares a folder, for each of which virtiofsd runs beside QEMU.
    pub virtiofs: bool,
}

/// One `hostpciN` entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPci {
    /// The N of `hostpciN`.
    pub index: u32,
    /// Which devices.
    pub devices: HostDevices,
    /// Whether only a slice of the device is passed through (`mdev=`), so that others use it too.
    pub shared: bool,
}

/// How a `hostpciN` entry names its devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostDevices {
    /// By their addresses.
    Addresses(Vec<PciSelector>),
    /// By the id of a mapping of the cluster, of whose devices one is chosen when the VM starts.
    Mapping(String),
}

impl VmConf {
    /// Parses VMID.conf. Keys that Pinfold has no use for are passed over, as is what is no `key:
    /// value` line.
    ///
    /// # Errors
    /// [`Error::Malformed`] with the key and the value.
    pub fn parse(text: &str) -> Result<Self> {
        let mut conf = Self::default();
        for (key, value) in text
            .lines()
            .take_while(|line| !is_section(line))
            .filter_map(key_and_value)
        {
            let text = || Some(value.to_owned());
            let count = || match value.parse::<u32>() {
                Ok(count @ 1..) => Ok(Some(count)),
                _ => Err(Error::malformed(key, format!("{value:?} is no count"))),
            };
            match key {
                "name" => conf.name = text(),
                "sockets" => conf.sockets = count()?,
                "cores" => conf.cores = count()?,
                "vcpus" => conf.vcpus = count()?,
                "args" => conf.args = text(),
                "affinity" => conf.affinity = text(),
                "hugepages" => conf.hugepages = text(),
                "hookscript" => conf.hookscript = text(),
                "tpmstate0" => conf.tpm = true,
                "template" => conf.template = matches!(value, "1" | "on" | "yes" | "true"),
                _ => {
                    conf.virtiofs |=
                        key.trim_end_matches(|c: char| c.is_ascii_digit()) == "virtiofs";
                    if let Some(index) = key.strip_prefix("hostpci").and_then(hostpci_index) {
                        let entry = parse_hostpci(index, value)?;
                        conf.hostpci.retain(|other| other.index != index);
                        conf.hostpci.push(entry);
                    }
                }
            }
        }
        conf.hostpci.sort_by_key(|entry| entry.index);
        Ok(conf)
    }

    /// The number of vCPUs that the VM starts with.
    pub fn vcpus(&self) -> u32 {
        self.vcpus.unwrap_or_else(|| self.max_vcpus())
    }

    /// The number of vCPUs that the VM can have, those that can be plugged in among them.
    pub fn max_vcpus(&self) -> u32 {
        self.sockets
            .unwrap_or(1)
            .saturating_mul(self.cores.unwrap_or(1))
    }

    /// The threads of each core of the guest: one with Proxmox VE's own settings, unless `args` has
    /// a `-smp` that says more.
    pub fn threads_per_core(&self) -> usize {
        let (sockets, cores) = (self.sockets.unwrap_or(1), self.cores.unwrap_or(1));
        let own = format!(
            "{},sockets={sockets},cores={cores},maxcpus={}",
            self.vcpus(),
            self.max_vcpus()
        );
        let words = self.args.as_deref().unwrap_or_default().split_whitespace();
        let words: Vec<String> = words
            .map(|word| word.trim_matches(['\'', '"']).to_owned())
            .collect();
        guest_topology::threads_per_core(
            [own.as_str()]
                .into_iter()
                .chain(cmdline::options(&words, "smp")),
        )
    }
}

/// Whether the line opens `[PENDING]`, `[special:…]` or a snapshot, with which the running VM's
/// settings end.
fn is_section(line: &str) -> bool {
    line.starts_with('[')
}

/// A setting; `None` for the description (`#`), empty lines and anything else.
fn key_and_value(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once(':')?;
    let letters = key.trim_end_matches(|c: char| c.is_ascii_digit());
    let named = letters.starts_with(|c: char| c.is_ascii_lowercase())
        && letters.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    let value = value.trim();
    (named && !value.is_empty()).then_some((key, value))
}

fn hostpci_index(digits: &str) -> Option<u32> {
    let index: u32 = digits.parse().ok().filter(|index| *index < MAX_HOSTPCI)?;
    // `hostpci00` is no key of Proxmox VE's.
    (digits == index.to_string()).then_some(index)
}

/// Parses the value of a `hostpciN` key: `[host=]ADDRESS[;ADDRESS…]` or `mapping=ID`, and options.
fn parse_hostpci(index: u32, value: &str) -> Result<HostPci> {
    let bad =
        |why: &str| Error::malformed(format!("hostpci{index}"), format!("{why} in {value:?}"));
    let (mut host, mut mapping, mut shared) = (None, None, false);
    for part in value
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        match part.split_once('=') {
            None => host = Some(part),
            Some(("host", addresses)) => host = Some(addresses),
            Some(("mapping", id)) => mapping = Some(id),
            Some(("mdev", _)) => shared = true,
            Some(_) => {}
        }
    }
    let devices = match (host, mapping) {
        (Some(addresses), None) => {
            HostDevices::Addresses(selectors(addresses).ok_or_else(|| bad("no PCI address"))?)
        }
        (None, Some(id)) if is_mapping_id(id) => HostDevices::Mapping(id.to_owned()),
        (None, Some(_)) => return Err(bad("no mapping's name")),
        (Some(_), Some(_)) => return Err(bad("both host and mapping")),
        (None, None) => return Err(bad("neither host nor mapping")),
    };
    Ok(HostPci {
        index,
        devices,
        shared,
    })
}

/// Addresses with `;` between them.
pub(super) fn selectors(text: &str) -> Option<Vec<PciSelector>> {
    text.split(';')
        .map(|address| address.parse().ok())
        .collect()
}

/// Whether the text is a name as Proxmox VE takes it for sections (`pve-configid`).
fn is_mapping_id(id: &str) -> bool {
    id.len() >= 2
        && id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

/// Where Proxmox VE keeps the VMs' settings.
const CONFS: &str = "etc/pve/qemu-server";

/// A VM's settings.
///
/// # Errors
/// [`Error::Unusable`] where it is a container or where there is no such VM, [`Error::Malformed`]
/// where a setting cannot be read.
pub fn conf(root: &Sysroot, vmid: VmId) -> Result<VmConf> {
    check_exists(root, vmid)?;
    let path = conf_path(vmid);
    VmConf::parse(&root.read(&path)?)
        .map_err(|error| Error::malformed(root.path(path).display().to_string(), error.to_string()))
}

/// The VMs of this node, by their numbers; none where it is no node of Proxmox VE.
pub fn all(root: &Sysroot) -> Vec<VmId> {
    let names = root.names(CONFS).unwrap_or_default();
    names
        .iter()
        .filter_map(|name| name.strip_suffix(".conf")?.parse().ok())
        .collect()
}

/// Makes sure that the number is a VM's.
///
/// # Errors
/// [`Error::Unusable`] where it is a container's, or nobody's on this node.
pub fn check_exists(root: &Sysroot, vmid: VmId) -> Result<()> {
    if is_container(root, vmid) {
        return Err(Error::unusable(
            vmid.to_string(),
            "it is a container; only VMs have a QEMU",
        ));
    }
    let path = root.path(conf_path(vmid));
    match path.symlink_metadata() {
        Ok(_) => Ok(()),
        Err(error) if is_gone(&error) => {
            let why = format!("no such VM on this node: there is no {}", path.display());
            Err(Error::unusable(format!("VM {vmid}"), why))
        }
        Err(error) => Err(Error::io(path, "look", error)),
    }
}

/// Whether the number is a container's.
pub fn is_container(root: &Sysroot, vmid: VmId) -> bool {
    root.exists(format!("etc/pve/lxc/{vmid}.conf"))
}

fn conf_path(vmid: VmId) -> String {
    format!("{CONFS}/{vmid}.conf")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::fixture::{any_selector, host, joined, write};
    use proptest::prelude::*;

    fn hostpci(value: &str) -> Result<Vec<String>> {
        let conf = VmConf::parse(&format!("hostpci0: {value}\n"))?;
        Ok(conf
            .hostpci
            .iter()
            .flat_map(|entry| match &entry.devices {
                HostDevices::Addresses(devices) => {
                    devices.iter().map(ToString::to_string).collect()
                }
                HostDevices::Mapping(id) => vec![format!("mapping {id}")],
            })
            .collect())
    }

    #[test]
    fn the_running_vm_ends_at_the_first_section() {
        let conf = VmConf::parse(
            "#cores: 99\n#hostpci0%3A 09:00\naffinity: 6-11,18-23\ncores: 6\nhookscript: local:snippets/hook\n\
             hostpci0: 0000:01:00,pcie=1,x-vga=1\nhugepages: 1024\nmemory: 16384\nname: gaming\nsockets: 2\n\n\
             [PENDING]\ncores: 8\n\n[special:cloudinit]\nname: x\n\n[before]\n#snapshot\nhostpci1: 02:00\nvcpus: 1\n",
        )
        .unwrap();
        assert_eq!(
            (conf.name.as_deref(), conf.cores, conf.sockets, conf.vcpus),
            (Some("gaming"), Some(6), Some(2), None)
        );
        assert_eq!(conf.vcpus(), 12);
        assert_eq!(conf.affinity.as_deref(), Some("6-11,18-23"));
        assert_eq!(conf.hugepages.as_deref(), Some("1024"));
        assert_eq!(conf.hookscript.as_deref(), Some("local:snippets/hook"));
        assert_eq!(conf.hostpci.len(), 1);
        assert!(!conf.template);
    }

    #[test]
    fn settings_are_read_as_proxmox_reads_them() {
        for (text, vcpus) in [
            ("", 1),
            ("\n", 1),
            (
                "garbage\nmore : garbage\n: x\n1cores: 5\nCores: 5\n cores: 5\n",
                1,
            ),
            ("cores: 4", 4),
            ("cores:4\r\n", 4),
            ("cores:   4   \n", 4),
            ("cores: 2\ncores: 3\n", 3),
            ("cores: 4\nsockets: 2\nvcpus: 3\n", 3),
            ("cores: 4294967295\nsockets: 4294967295\n", u32::MAX),
            ("cores:\n", 1),
        ] {
            assert_eq!(VmConf::parse(text).unwrap().vcpus(), vcpus, "{text:?}");
        }
        assert!(VmConf::parse("template: 1\n").unwrap().template);
        let conf = VmConf::parse("args: -smp 12,threads=2\ntpmstate0: local:x\nvirtiofs3: share\n")
            .unwrap();
        assert_eq!(
            (conf.args.as_deref(), conf.tpm, conf.virtiofs),
            (Some("-smp 12,threads=2"), true, true)
        );
        let conf = VmConf::parse("tpmstate1: x\nvirtiofsx: y\n[PENDING]\nargs: z\ntpmstate0: x\n")
            .unwrap();
        assert_eq!(conf, VmConf::default());
        assert!(!VmConf::parse("template: 0\n").unwrap().template);
        for (text, message) in [
            ("cores: x", "cores: \"x\" is no count"),
            ("cores: 0", "cores: \"0\" is no count"),
            ("vcpus: -1", "vcpus: \"-1\" is no count"),
            (
                "sockets: 99999999999",
                "sockets: \"99999999999\" is no count",
            ),
        ] {
            assert_eq!(VmConf::parse(text).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn threads_of_the_guests_cores() {
        for (text, threads) in [
            ("", 1),
            ("cores: 12\nsockets: 2\n", 1),
            ("cores: 12\nargs: -smp 12,sockets=1,cores=6,threads=2\n", 2),
            (
                "cores: 12\nargs: -cpu host --smp '12,sockets=1,cores=6,threads=2' -S\n",
                2,
            ),
            ("cores: 12\nargs: -smp cores=6\n", 2),
            ("cores: 12\nvcpus: 4\nargs: -smp cores=4\n", 3),
            ("cores: 12\nargs: -smp\n", 1),
            ("cores: 12\nargs: -device x,threads=2\n", 1),
            ("cores: 12\n[before]\nargs: -smp threads=2\n", 1),
            ("cores: 4294967295\nsockets: 4294967295\n", 1),
        ] {
            assert_eq!(
                VmConf::parse(text).unwrap().threads_per_core(),
                threads,
                "{text:?}"
            );
        }
    }

    #[test]
    fn hostpci_has_all_of_its_grammar() {
        for (value, devices) in [
            ("01:00.0", &["0000:01:00.0"] as &[&str]),
            ("0000:01:00", &["0000:01:00"]),
            ("host=01:00,pcie=1", &["0000:01:00"]),
            (
                "pcie=1,host=0A:00.1,x-vga=on,romfile=a=b.rom",
                &["0000:0a:00.1"],
            ),
            (
                "01:00.0;01:00.1;10000:02:00",
                &["0000:01:00.0", "0000:01:00.1", "10000:02:00"],
            ),
            ("mapping=gpu-1,pcie=1", &["mapping gpu-1"]),
        ] {
            assert_eq!(hostpci(value).unwrap(), devices, "{value:?}");
        }
        for (value, message) in [
            ("pcie=1", "hostpci0: neither host nor mapping in \"pcie=1\""),
            (",", "hostpci0: neither host nor mapping in \",\""),
            ("host=", "hostpci0: no PCI address in \"host=\""),
            ("01:00.0;", "hostpci0: no PCI address in \"01:00.0;\""),
            ("../../x", "hostpci0: no PCI address in \"../../x\""),
            (
                "mapping=../x",
                "hostpci0: no mapping's name in \"mapping=../x\"",
            ),
            (
                "01:00,mapping=gpu",
                "hostpci0: both host and mapping in \"01:00,mapping=gpu\"",
            ),
        ] {
            assert_eq!(hostpci(value).unwrap_err().to_string(), message);
        }
        let conf =
            VmConf::parse("hostpci10: 05:00\nhostpci2: 03:00,mdev=nvidia-63\nhostpci16: 09:00\nhostpci01: 08:00\n")
                .unwrap();
        let entries: Vec<_> = conf
            .hostpci
            .iter()
            .map(|entry| (entry.index, entry.shared))
            .collect();
        assert_eq!(entries, [(2, true), (10, false)]);
    }

    fn any_hostpci() -> impl Strategy<Value = Vec<HostPci>> {
        let devices = prop_oneof![
            prop::collection::vec(any_selector(), 1..4).prop_map(HostDevices::Addresses),
            "[a-zA-Z][a-zA-Z0-9_-]{1,9}".prop_map(HostDevices::Mapping),
        ];
        prop::collection::btree_map(0..MAX_HOSTPCI, (devices, any::<bool>()), 0..5).prop_map(
            |entries| {
                entries
                    .into_iter()
                    .map(|(index, (devices, shared))| HostPci {
                        index,
                        devices,
                        shared,
                    })
                    .collect()
            },
        )
    }

    fn render(conf: &VmConf) -> String {
        let mut lines = Vec::new();
        for (key, count) in [
            ("sockets", conf.sockets),
            ("cores", conf.cores),
            ("vcpus", conf.vcpus),
        ] {
            lines.extend(count.map(|count| format!("{key}: {count}\n")));
        }
        for (key, text) in [
            ("name", &conf.name),
            ("hookscript", &conf.hookscript),
            ("args", &conf.args),
        ] {
            lines.extend(text.as_ref().map(|text| format!("{key}: {text}\n")));
        }
        for HostPci {
            index,
            devices,
            shared,
        } in &conf.hostpci
        {
            let devices = match devices {
                HostDevices::Addresses(selectors) => joined(selectors),
                HostDevices::Mapping(id) => format!("mapping={id}"),
            };
            let shared = if *shared { ",mdev=nvidia-63" } else { "" };
            lines.push(format!("hostpci{index}: {devices},pcie=1{shared}\n"));
        }
        lines.push(format!("template: {}\n", u8::from(conf.template)));
        lines.reverse();
        lines.concat()
    }

    proptest! {
        #[test]
        fn conf_round_trip(
            name in prop::option::of("[a-z][a-z0-9.-]{0,20}[a-z]"),
            hookscript in prop::option::of("local:snippets/[a-z:#\\[\\]]{1,9}"),
            args in prop::option::of("-smp [0-9]{1,3},threads=[0-9]"),
            counts in prop::array::uniform3(prop::option::of(1u32..)),
            hostpci in any_hostpci(),
            template: bool,
            rest in "(\\[PENDING\\]\n|\\[before\\]\n)((cores|name|hostpci0): \\PC*\n){0,3}",
        ) {
            let [sockets, cores, vcpus] = counts;
            let conf = VmConf { name, sockets, cores, vcpus, args, hostpci, template, hookscript, ..VmConf::default() };
            prop_assert_eq!(VmConf::parse(&(render(&conf) + &rest)).unwrap(), conf);
        }

        #[test]
        fn no_text_panics(text in "(hostpci[0-9]*|cores|gpu|\tmap|\\PC)[:= ]\\PC*\n?\\PC*") {
            let _ = VmConf::parse(&text);
        }
    }

    fn id(number: u32) -> VmId {
        number.try_into().unwrap()
    }

    #[test]
    fn settings_of_a_vm() {
        let (dir, root) = host();
        assert_eq!(super::conf(&root, id(100)).unwrap().vcpus(), 2);
        assert_eq!(
            super::conf(&root, id(102)).unwrap_err().to_string(),
            format!(
                "{}: cores: \"x\" is no count",
                dir.path().join("etc/pve/qemu-server/102.conf").display()
            )
        );
        assert!(super::conf(&root, id(101)).is_err());
        write(dir.path(), "etc/pve/qemu-server/99.conf.tmp", "");
        assert_eq!(all(&root), [id(100), id(102)]);
        assert!(all(&Sysroot::new("/nonexistent")).is_empty());
    }
}
