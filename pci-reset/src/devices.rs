//! The PCI functions that a VM's settings name.

use std::collections::BTreeSet;

use pinfold_core::sys::pci::{self, PciAddress, PciSelector};
use pinfold_core::vm::{self, VmId};
use pinfold_core::vm::{HostDevices, PciClaim};
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

/// The functions of the devices that are passed through to a VM (`hostpciN`), ascending. A device
/// that it shares (`mdev=`) is not among them.
///
/// A device that is not present is represented by its first function, as in [`functions_of`];
/// [`reset`](crate::reset()) finds it again.
///
/// Of a mapping's devices it is the one that Proxmox VE has reserved for the VM, or will reserve:
/// the first free one.
///
/// # Errors
/// If the VM's settings cannot be read, or no device of a mapping is free.
pub fn functions_of_vm(root: &Host, vmid: VmId) -> Result<Vec<PciAddress>> {
    let entries = vm::conf(root, vmid)?.hostpci;
    let reservations = vm::pci_claims(root)?;
    let mut functions = BTreeSet::new();
    for entry in entries.iter().filter(|entry| !entry.shared) {
        functions.extend(match &entry.devices {
            HostDevices::Addresses(selectors) => functions_of(root, selectors)?,
            HostDevices::Mapping(id) => mapped(root, vmid, id, &reservations, &functions)?,
        });
    }
    Ok(functions.into_iter().collect())
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
    fn functions(
        conf: &str,
        mappings: &str,
        reservations: &str,
    ) -> std::result::Result<Vec<String>, String> {
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
        let found = functions_of_vm(&Host::new(dir.path()), "100".parse().unwrap());
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
            (
                "hostpci0: 07:00;08:00.1\n",
                &["0000:07:00.0", "0000:08:00.1"],
            ),
        ] {
            assert_eq!(functions(conf, "", "").unwrap(), expected, "{conf:?}");
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
                "PCI mapping nic: it is not there; see /etc/pve/mapping/pci.cfg",
            ),
        ] {
            assert_eq!(functions(conf, GPUS, "").unwrap_err(), error);
        }
    }
}
