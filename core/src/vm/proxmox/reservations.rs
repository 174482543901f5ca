//! The PCI devices that VMs have reserved: /run/qemu-server/pci-id-reservations.

use std::time::{SystemTime, UNIX_EPOCH};

use super::paths;
use crate::error::Result;
use crate::sys::pci::PciAddress;
use crate::sysroot::Sysroot;
use crate::vm::id::VmId;

/// A line of /run/qemu-server/pci-id-reservations: a PCI function that a VM holds or is about to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciClaim {
    /// The function.
    pub address: PciAddress,
    /// Whose it is.
    pub vmid: VmId,
    /// What the reservation lives by.
    pub holder: PciHolder,
}

/// What a PCI reservation lives by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PciHolder {
    /// A running QEMU, by its process id.
    Pid(i32),
    /// A VM that is being started: until this time, in seconds since 1970.
    Until(u64),
}

/// Parses /run/qemu-server/pci-id-reservations (`ADDRESS VMID pid:N` or `ADDRESS VMID time:N`).
///
/// Lines of another form are passed over, as Proxmox VE does.
pub fn parse_pci_claims(text: &str) -> Vec<PciClaim> {
    let reservation = |line: &str| {
        let [address, vmid, holder] = line
            .split_whitespace()
            .collect::<Vec<_>>()
            .try_into()
            .ok()?;
        let holder = match holder.split_once(':')? {
            ("pid", pid) => PciHolder::Pid(pid.parse().ok()?),
            ("time", time) => PciHolder::Until(time.parse().ok()?),
            _ => return None,
        };
        Some(PciClaim {
            address: address.parse().ok()?,
            vmid: vmid.parse().ok()?,
            holder,
        })
    };
    text.lines().filter_map(reservation).collect()
}

/// The PCI functions that VMs hold or are about to, by Proxmox VE's own file; stale lines are left
/// out.
///
/// # Errors
/// If the file cannot be read. A missing file is empty.
pub fn pci_claims(root: &Sysroot) -> Result<Vec<PciClaim>> {
    let path = paths::pci_claims();
    let mut reservations = match root.read(&path) {
        Ok(text) => parse_pci_claims(&text),
        Err(error) if error.is_gone() => Vec::new(),
        Err(error) => return Err(error),
    };
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    reservations.retain(|reservation| match reservation.holder {
        PciHolder::Pid(pid) => root.exists(format!("proc/{pid}")),
        PciHolder::Until(time) => time > now,
    });
    Ok(reservations)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testutils::write;
    use crate::vm::fixture::host;
    use proptest::prelude::*;

    #[test]
    fn reservations_of_this_node() {
        let (dir, root) = host();
        assert!(pci_claims(&root).unwrap().is_empty());
        write(
            dir.path(),
            "run/qemu-server/pci-id-reservations",
            "0000:01:00.0 100 pid:4711\n0000:02:00.0 102 pid:5555\n0000:03:00.0 102 time:1\n\
             0000:04:00.0 102 time:99999999999\n",
        );
        let held: Vec<_> = pci_claims(&root)
            .unwrap()
            .iter()
            .map(|held| held.address.to_string())
            .collect();
        assert_eq!(held, ["0000:01:00.0", "0000:04:00.0"]);
    }

    #[test]
    fn reservations_are_read() {
        let text = "0000:01:00.0 100 pid:4711\n0000:01:00.1 101 time:1700000000\n\
                    garbage\n0000:02:00.0 100 pid:x\n0000:02:00.0 ../x pid:1\n0000:02:00.0 100\n\
                    0000:02:00.0 100 pid:1 x\n\n";
        let found = parse_pci_claims(text);
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(found[0].holder, PciHolder::Pid(4711));
        assert_eq!(found[1].holder, PciHolder::Until(1_700_000_000));
        assert_eq!(
            (
                found[1].address.to_string().as_str(),
                found[1].vmid.to_string().as_str()
            ),
            ("0000:01:00.1", "101")
        );
        assert!(parse_pci_claims("").is_empty());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(hostpci[0-9]*|cores|gpu|\tmap|\\PC)[:= ]\\PC*\n?\\PC*") {
            let _ = parse_pci_claims(&text);
        }
    }
}
