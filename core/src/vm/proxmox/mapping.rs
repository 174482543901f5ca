//! The cluster's PCI mappings: /etc/pve/mapping/pci.cfg; the grammar is that of pve-guest-common's
//! `PVE::Mapping::PCI`.

use super::hostpci::selectors;
use crate::error::{Error, Result};
use crate::sys::pci::PciSelector;
use crate::sysroot::Sysroot;

/// The devices that a mapping offers on a node, from /etc/pve/mapping/pci.cfg; of them one is
/// chosen at the VM's start.
///
/// `None` if there is no such mapping. A device may be several functions (`path=A;B`).
pub fn parse_pci_mapping(text: &str, id: &str, node: &str) -> Option<Vec<Vec<PciSelector>>> {
    let mut lines = text.lines().skip_while(|line| line.trim_end() != id);
    lines.next()?;
    let devices = lines
        .take_while(|line| line.starts_with([' ', '\t']))
        .filter_map(|line| line.trim().strip_prefix("map"))
        .filter(|map| map.starts_with([' ', '\t']))
        .filter_map(|map| {
            let value = |key: &str| {
                map.trim()
                    .split(',')
                    .find_map(|part| part.trim().strip_prefix(key)?.strip_prefix('='))
            };
            if value("node")? == node {
                selectors(value("path")?).ok()
            } else {
                None
            }
        });
    Some(devices.collect())
}

/// The devices that a mapping of the cluster offers on this node: of them one is chosen when a VM
/// starts.
///
/// # Errors
/// [`Error::Unusable`] if there is no such mapping, or none for this node.
pub fn pci_mapping(root: &Sysroot, id: &str) -> Result<Vec<Vec<PciSelector>>> {
    let path = "etc/pve/mapping/pci.cfg";
    let node = root.read("proc/sys/kernel/hostname")?;
    let node = node.trim().split('.').next().unwrap_or_default().to_owned();
    let text = match root.read(path) {
        Err(error) if error.is_gone() => String::new(),
        other => other?,
    };
    match parse_pci_mapping(&text, id, &node) {
        Some(devices) if !devices.is_empty() => Ok(devices),
        found => {
            let lacks = if found.is_some() {
                format!("has no device on node {node}")
            } else {
                "does not exist".into()
            };
            Err(Error::unusable(
                format!("PCI mapping {id}"),
                format!("it {lacks}; see {}", root.path(path).display()),
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testutils::write;
    use crate::vm::fixture::{any_selector, host, joined};
    use proptest::prelude::*;

    #[test]
    fn mappings_of_this_node() {
        let (dir, root) = host();
        write(dir.path(), "proc/sys/kernel/hostname", "pve1.example.org\n");
        let error = |id: &str| pci_mapping(&root, id).unwrap_err().to_string();
        let file = dir
            .path()
            .join("etc/pve/mapping/pci.cfg")
            .display()
            .to_string();
        assert_eq!(
            error("gpu"),
            format!("PCI mapping gpu: it does not exist; see {file}")
        );
        write(
            dir.path(),
            "etc/pve/mapping/pci.cfg",
            "gpu\n\tmap node=pve1,path=0000:01:00\n\nnic\n\tmap node=x,path=0000:01:00\n",
        );
        assert_eq!(
            pci_mapping(&root, "gpu").unwrap(),
            [["01:00".parse().unwrap()]]
        );
        assert_eq!(
            error("nic"),
            format!("PCI mapping nic: it has no device on node pve1; see {file}")
        );
    }

    #[test]
    fn mappings_are_read() {
        let text = "nic\n\tmap id=8086:1521,node=pve1,path=0000:05:00.0\n\ngpu\n\tdescription map node=pve1\n\tmdev 0\n\
                    \tmap id=10de:2204,iommugroup=2,node=pve1,path=0000:01:00,subsystem-id=1:2\n\
                    \tmap id=10de:2204,node=pve2,path=0000:41:00\n\tmap node=pve1,path=0000:02:00.0;0000:02:00.1\n\
                    \tmap node=pve1,path=garbage\n\tmap\n\nother\n\tmap node=pve1,path=0000:09:00\n";
        let shown = |id: &str, node: &str| {
            parse_pci_mapping(text, id, node).map(|devices| {
                let show = |device: &Vec<PciSelector>| {
                    device
                        .iter()
                        .map(ToString::to_string)
                        .collect::<Vec<_>>()
                        .join(";")
                };
                devices.iter().map(show).collect::<Vec<_>>()
            })
        };
        assert_eq!(
            shown("gpu", "pve1").unwrap(),
            ["0000:01:00", "0000:02:00.0;0000:02:00.1"]
        );
        assert_eq!(shown("gpu", "pve2").unwrap(), ["0000:41:00"]);
        assert_eq!(shown("gpu", "pve3").unwrap(), [""; 0]);
        assert_eq!(shown("none", "pve1"), None);
        assert_eq!(parse_pci_mapping("", "gpu", "pve1"), None);
        assert_eq!(parse_pci_mapping("gpu", "gpu", "pve1"), Some(vec![]));
    }

    proptest! {
        #[test]
        fn mapping_round_trip(
            devices in prop::collection::vec(prop::collection::vec(any_selector(), 1..4), 0..5),
        ) {
            let maps: String = devices
                .iter()
                .map(|device| format!("\tmap id=1:2,node=pve1,path={}\n", joined(device)))
                .collect();
            let text = format!(
                "nic\n\tmap node=pve1,path=01:00\n\ngpu\n{maps}\nlast\n\
                 \tmap node=pve1,path=02:00\n"
            );
            prop_assert_eq!(parse_pci_mapping(&text, "gpu", "pve1").unwrap(), devices);
        }

        #[test]
        fn no_text_panics(text in "(hostpci[0-9]*|cores|gpu|\tmap|\\PC)[:= ]\\PC*\n?\\PC*") {
            let _ = parse_pci_mapping(&text, "gpu", "pve1");
        }
    }
}
