//! The PCI functions that a VM's settings name.

use std::collections::BTreeSet;

use pinfold_core::sys::pci::{self, PciAddress, PciSelector};
use pinfold_core::vm::{self, VmId};
use pinfold_core::vm::{Contradiction, HostDevices, PciClaim, VmConf};
use pinfold_core::{Error, Host, Result};

/// The functions that selectors match on this host, ascending, each once.
///
/// # Errors
/// [`Error::Unusable`] naming a selector that matches none.
pub fn expand(root: &Host, selectors: &[PciSelector]) -> Result<Vec<PciAddress>> {
    let mut functions = BTreeSet::new();
    for selector in selectors {
        functions.extend(selector.functions(root)?);
    }
    Ok(functions.into_iter().collect())
}

/// The functions of the devices that a VM has to itself (`hostpciN`), ascending. A device of which
/// it has only a slice (`mdev=`) is not among them, since others use it too, and neither is one that
/// keeps its driver (`driver=keep`), which is not to be reset.
///
/// A device that is not present is represented by its first function, as in [`functions_of`];
/// [`reset`](crate::reset()) finds it again.
///
/// Of a mapping's devices it is the one that Proxmox VE has reserved for the VM, or will reserve:
/// the first free one.
///
/// # Errors
/// If sysfs or the reservations cannot be read, or no device of a mapping is free.
pub fn functions_of_vm(root: &Host, vmid: VmId, conf: &VmConf) -> Result<Vec<PciAddress>> {
    let reservations = vm::pci_claims(root)?;
    let mut functions = BTreeSet::new();
    for entry in &conf.hostpci {
        if entry.mdev.is_some() || entry.keep_driver {
            continue;
        }
        functions.extend(match &entry.devices {
            HostDevices::Addresses(selectors) => functions_of(root, selectors)?,
            HostDevices::Mapping(id) => mapped(root, vmid, id, &reservations, &functions)?,
            HostDevices::Refused(_) => Vec::new(),
        });
    }
    Ok(functions.into_iter().collect())
}

/// The functions that a VM has and that keep their driver (`driver=keep`), which are not to be reset.
///
/// # Errors
/// If sysfs cannot be read.
pub fn kept(root: &Host, conf: &VmConf) -> Result<BTreeSet<PciAddress>> {
    let mut kept = BTreeSet::new();
    for entry in conf.hostpci.iter().filter(|entry| entry.keep_driver) {
        match &entry.devices {
            HostDevices::Addresses(selectors) => kept.extend(functions_of(root, selectors)?),
            HostDevices::Mapping(id) => {
                for device in vm::pci_mapping(root, id)? {
                    kept.extend(functions_of(root, &device)?);
                }
            }
            HostDevices::Refused(_) => {}
        }
    }
    Ok(kept)
}

/// What Proxmox VE makes of a VM's `hostpciN` on this host.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PassedThrough {
    /// The functions that it gives to the VM as a whole, ascending.
    pub functions: Vec<PciAddress>,
    /// The entries with which it refuses to start the VM on this host.
    pub refusals: Vec<Contradiction>,
}

/// What Proxmox VE makes of a VM's `hostpciN` on this host, as `parse_hostpci_devices` and
/// `choose_hostpci_devices` in `PVE::QemuServer::PCI` do. A template gets no device.
///
/// # Errors
/// If sysfs or the reservations cannot be read.
pub fn passed_through(root: &Host, vmid: VmId, conf: &VmConf) -> Result<PassedThrough> {
    let mut found = PassedThrough::default();
    if conf.template || conf.hostpci.is_empty() {
        return Ok(found);
    }
    let there = match pci::addresses(root) {
        Err(error) if error.is_gone() => Vec::new(),
        addresses => addresses?,
    };
    let reservations = vm::pci_claims(root)?;
    let mut used = BTreeSet::new();
    for entry in &conf.hostpci {
        let mut refuse = |reason: String| {
            found.refusals.push(Contradiction::HostPci {
                index: entry.index,
                reason,
            });
        };
        let mut functions = Vec::new();
        match &entry.devices {
            HostDevices::Refused(_) => continue,
            HostDevices::Addresses(selectors) => {
                for selector in selectors {
                    let before = functions.len();
                    functions.extend(there.iter().filter(|address| selector.matches(address)));
                    if functions.len() == before {
                        refuse(format!("no device {selector} on this host"));
                    }
                }
            }
            HostDevices::Mapping(id) => match mapped(root, vmid, id, &reservations, &used) {
                Ok(device) => functions.extend(device),
                Err(error) => refuse(error.to_string()),
            },
        }
        if entry.mdev.is_some() && functions.len() > 1 {
            refuse("mdev needs a device with one function".into());
            continue;
        }
        if functions
            .iter()
            .any(|function| entry.is_slice(root, function))
        {
            continue;
        }
        for function in functions {
            if !used.insert(function) {
                refuse(format!("{function} is assigned more than once"));
            }
        }
    }
    found.functions = used.into_iter().collect();
    Ok(found)
}

/// As [`expand`], for devices that settings name: one that is not present may have been removed by
/// an interrupted run, and is represented by its first function.
///
/// # Errors
/// If sysfs cannot be read.
pub fn functions_of(root: &Host, selectors: &[PciSelector]) -> Result<Vec<PciAddress>> {
    let there = pci::addresses(root)?;
    let of_selector = |selector: &PciSelector| {
        let mut found: Vec<_> = there
            .iter()
            .copied()
            .filter(|address| selector.matches(address))
            .collect();
        if found.is_empty() {
            found.push(selector.first());
        }
        found
    };
    Ok(selectors.iter().flat_map(of_selector).collect())
}

fn mapped(
    root: &Host,
    vmid: VmId,
    id: &str,
    reservations: &[PciClaim],
    used: &BTreeSet<PciAddress>,
) -> Result<Vec<PciAddress>> {
    let mut devices = Vec::new();
    for device in vm::pci_mapping(root, id)? {
        let functions = functions_of(root, &device)?;
        if !functions.iter().any(|function| used.contains(function)) {
            devices.push(functions);
        }
    }
    let holder = |function: &PciAddress| {
        reservations
            .iter()
            .find(|held| held.address == *function)
            .map(|held| held.vmid)
    };
    let own = devices.iter().find(|functions| {
        functions
            .iter()
            .all(|function| holder(function) == Some(vmid))
    });
    let free = || {
        devices.iter().find(|functions| {
            functions
                .iter()
                .all(|function| holder(function).is_none_or(|by| by == vmid))
        })
    };
    own.or_else(free).cloned().ok_or_else(|| {
        Error::unusable(
            format!("PCI mapping {id}"),
            "none of its devices on this node is free; other VMs have them",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    /// A node with five functions; VM 100's settings are `conf`, the cluster's mappings and the
    /// reservations as given.
    fn node(conf: &str, mappings: &str, reservations: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap_or(Path::new("/"))).unwrap();
            fs::write(path, text).unwrap();
        };
        for address in [
            "0000:01:00.0",
            "0000:01:00.1",
            "0000:02:00.0",
            "0000:03:00.0",
            "10000:01:00.0",
        ] {
            write(
                &format!("sys/bus/pci/devices/{address}/class"),
                "0x030000\n",
            );
        }
        write("proc/sys/kernel/hostname", "pve1\n");
        write("proc/4711/cmdline", "kvm\0");
        write("etc/pve/qemu-server/100.conf", conf);
        write("etc/pve/mapping/pci.cfg", mappings);
        write("run/qemu-server/pci-id-reservations", reservations);
        dir
    }

    /// The functions of VM 100 on such a node.
    fn functions(
        conf: &str,
        mappings: &str,
        reservations: &str,
    ) -> std::result::Result<Vec<String>, String> {
        let dir = node(conf, mappings, reservations);
        let found = functions_of_vm(
            &Host::new(dir.path()),
            "100".parse().unwrap(),
            &VmConf::parse(conf),
        );
        let shown = |error: Error| {
            error
                .to_string()
                .replace(&dir.path().display().to_string(), "")
        };
        found
            .map(|functions| functions.iter().map(ToString::to_string).collect())
            .map_err(shown)
    }

    const GPUS: &str = "gpu\n\tmap node=pve1,path=0000:01:00\n\tmap node=pve1,path=0000:02:00.0;0000:03:00.0\n\
                        \tmap node=pve2,path=0000:09:00\n";

    #[test]
    fn all_of_the_grammar() {
        for (conf, expected) in [
            ("cores: 2\n", &[] as &[&str]),
            (
                "hostpci0: 01:00,pcie=1\n",
                &["0000:01:00.0", "0000:01:00.1"],
            ),
            (
                "hostpci0: host=0000:02:00.0;01:00.1\nhostpci1: 10000:01:00\n",
                &["0000:01:00.1", "0000:02:00.0", "10000:01:00.0"],
            ),
            (
                "hostpci0: 01:00.0\nhostpci1: 01:00\n[snapshot]\nhostpci2: 03:00\n",
                &["0000:01:00.0", "0000:01:00.1"],
            ),
            ("hostpci0: 01:00.0,mdev=nvidia-63\n", &[]),
            ("hostpci0: 01:00.0,driver=keep\n", &[]),
            ("hostpci0: 01:00.0;x\nhostpci1: pcie=1\n", &[]),
            (
                "hostpci0: 07:00;08:00.1\n",
                &["0000:07:00.0", "0000:08:00.1"],
            ),
        ] {
            assert_eq!(functions(conf, "", "").unwrap(), expected, "{conf:?}");
        }
    }

    #[test]
    fn what_proxmox_passes_through() {
        for (conf, functions, refusals) in [
            ("cores: 2", &[] as &[&str], &[] as &[&str]),
            (
                "hostpci1: 01:00,driver=keep\nhostpci0: 10000:01:00.0;02:00",
                &[
                    "0000:01:00.0",
                    "0000:01:00.1",
                    "0000:02:00.0",
                    "10000:01:00.0",
                ],
                &[],
            ),
            ("hostpci0: 01:00\ntemplate: 1", &[], &[]),
            ("hostpci0: 01:00.1,mdev=nvidia-63", &[], &[]),
            (
                "hostpci0: 02:00.0,mdev=nvidia-63\nhostpci1: 02:00.0,mdev=i915-x",
                &["0000:02:00.0"],
                &[],
            ),
            (
                "hostpci0: 01:00,mdev=nvidia-63",
                &[],
                &["hostpci0: mdev needs a device with one function"],
            ),
            (
                "hostpci0: 01:00.0;07:00\nhostpci2: 01:00",
                &["0000:01:00.0", "0000:01:00.1"],
                &[
                    "hostpci0: no device 0000:07:00 on this host",
                    "hostpci2: 0000:01:00.0 is assigned more than once",
                ],
            ),
            (
                "hostpci0: mapping=nic",
                &[],
                &["hostpci0: PCI mapping nic: it does not exist; see /etc/pve/mapping/pci.cfg"],
            ),
            (
                "hostpci0: mapping=gpu",
                &["0000:01:00.0", "0000:01:00.1"],
                &[],
            ),
        ] {
            let dir = node(conf, GPUS, "");
            fs::create_dir(dir.path().join("sys/bus/pci/devices/0000:02:00.0/nvidia")).unwrap();
            let root = Host::new(dir.path());
            let found =
                passed_through(&root, "100".parse().unwrap(), &VmConf::parse(conf)).unwrap();
            let shown: Vec<_> = found.functions.iter().map(ToString::to_string).collect();
            assert_eq!(shown, functions, "{conf:?}");
            let shown: Vec<_> = found
                .refusals
                .iter()
                .map(|refusal| {
                    let text = refusal.to_string();
                    let text = text.replace(&dir.path().display().to_string(), "");
                    text.replace("Proxmox VE refuses to start: ", "")
                })
                .collect();
            assert_eq!(shown, refusals, "{conf:?}");
        }
    }

    #[test]
    fn of_a_mapping_the_reserved_device_or_the_first_free_one() {
        let first = ["0000:01:00.0", "0000:01:00.1"];
        let second = ["0000:02:00.0", "0000:03:00.0"];
        let conf = "hostpci0: mapping=gpu\n";
        for (reservations, expected) in [
            ("", first),
            (
                "0000:02:00.0 100 pid:4711\n0000:03:00.0 100 pid:4711\n",
                second,
            ),
            ("0000:01:00.1 101 pid:4711\n", second),
            ("0000:01:00.1 101 pid:4712\n", first),
            ("0000:01:00.1 101 time:1\n", first),
            ("0000:01:00.1 101 time:99999999999\n", second),
        ] {
            assert_eq!(
                functions(conf, GPUS, reservations).unwrap(),
                expected,
                "{reservations:?}"
            );
        }
        let both = functions("hostpci0: mapping=gpu\nhostpci1: mapping=gpu\n", GPUS, "").unwrap();
        assert_eq!(both, [first, second].concat());
        for (conf, error) in [
            (
                "hostpci0: mapping=gpu\nhostpci1: mapping=gpu\nhostpci2: mapping=gpu\n",
                "PCI mapping gpu: none of its devices on this node is free; other VMs have them",
            ),
            (
                "hostpci0: mapping=nic\n",
                "PCI mapping nic: it does not exist; see /etc/pve/mapping/pci.cfg",
            ),
        ] {
            assert_eq!(functions(conf, GPUS, "").unwrap_err(), error);
        }
    }
}
