//! `hostpciN`: the devices of the host that a VM gets, as `PVE::QemuServer::PCI` reads them.

use std::collections::BTreeMap;

use super::property;
use super::schema::{self, HOSTPCI};
use crate::sys::pci::{PciAddress, PciSelector};
use crate::sysroot::Sysroot;

/// One `hostpciN` entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPci {
    /// The N of `hostpciN`.
    pub index: u32,
    /// Which devices.
    pub devices: HostDevices,
    /// The type of a mediated device (`mdev=`): a slice of the device, which others use too.
    pub mdev: Option<String>,
    /// Whether the device keeps its driver (`driver=keep`): it is not to be reset or bound anew.
    pub keep_driver: bool,
    /// Whether the device is on a PCI Express bus (`pcie=1`), which only the machine type q35 has.
    pub pcie: bool,
}

/// How a `hostpciN` entry names its devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostDevices {
    /// By their addresses.
    Addresses(Vec<PciSelector>),
    /// By the id of a mapping of the cluster, of whose devices one is chosen when the VM starts.
    Mapping(String),
    /// In a way that Proxmox VE reads, and then refuses to start the VM with, for this reason.
    Refused(String),
}

impl HostPci {
    /// Parses the value of a `hostpciN` key; `None` if Proxmox VE passes over it.
    pub(super) fn parse(index: u32, value: &str) -> Option<Self> {
        let values = property::parse(&HOSTPCI, value).ok()?;
        let is_set = |key: &str| values.get(key).is_some_and(|value| value == "1");
        Some(Self {
            index,
            devices: HostDevices::named_by(&values),
            mdev: values.get("mdev").cloned(),
            keep_driver: values.get("driver").is_some_and(|driver| driver == "keep"),
            pcie: is_set("pcie"),
        })
    }

    /// The index in a key, if it is a `hostpciN` key.
    pub(super) fn index_of(key: &str) -> Option<u32> {
        match schema::split_number(key) {
            ("hostpci", index) => index.filter(|index| *index < schema::MAX_HOSTPCI),
            _ => None,
        }
    }

    /// Whether the VM gets only a slice of a device, so that the device itself stays with the host.
    ///
    /// A type of NVIDIA's on a device without the kernel's `mdev_supported_types` is none: since
    /// Linux 6.8 the driver makes the whole function a slice of the GPU.
    pub fn is_slice(&self, root: &Sysroot, function: &PciAddress) -> bool {
        let Some(mdev) = &self.mdev else { return false };
        let is_nvidia = mdev
            .strip_prefix("nvidia-")
            .is_some_and(property::is_digits);
        let has = |folder: &str| root.exists(format!("sys/bus/pci/devices/{function}/{folder}"));
        !(is_nvidia && has("nvidia") && !has("mdev_supported_types"))
    }
}

impl HostDevices {
    fn named_by(values: &BTreeMap<String, String>) -> Self {
        match (values.get("host"), values.get("mapping")) {
            (Some(_), Some(_)) => Self::Refused("both `host` and `mapping` are set".into()),
            (None, Some(id)) => Self::Mapping(id.clone()),
            (None, None) => Self::Refused("neither `host` nor `mapping` is set".into()),
            (Some(host), None) => match selectors(host) {
                Ok(selectors) => Self::Addresses(selectors),
                Err(address) => Self::Refused(format!("there is no device {address}")),
            },
        }
    }
}

/// Addresses with `;` between them; the error is the first that no device can have.
pub(super) fn selectors(text: &str) -> Result<Vec<PciSelector>, &str> {
    text.split(';')
        .map(|address| address.parse().map_err(|_| address))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(value: &str) -> String {
        match HostPci::parse(0, value).unwrap().devices {
            HostDevices::Addresses(selectors) => selectors
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(";"),
            HostDevices::Mapping(id) => format!("mapping {id}"),
            HostDevices::Refused(why) => why,
        }
    }

    #[test]
    fn devices_as_they_are_named() {
        for (value, devices) in [
            ("01:00.0", "0000:01:00.0"),
            ("0000:01:00", "0000:01:00"),
            ("host=01:00,pcie=1", "0000:01:00"),
            ("pcie=1,0a:00.1,x-vga=on,romfile=a=b.rom", "0000:0a:00.1"),
            (
                "01:00.0;01:00.1;10000:02:00",
                "0000:01:00.0;0000:01:00.1;10000:02:00",
            ),
            ("mapping=gpu-1,pcie=1", "mapping gpu-1"),
            ("pcie=1", "neither `host` nor `mapping` is set"),
            (",", "neither `host` nor `mapping` is set"),
            ("01:00,mapping=gpu", "both `host` and `mapping` are set"),
            ("01:00;01:00.f", "there is no device 01:00.f"),
            ("01:ff", "there is no device 01:ff"),
            ("1234567890:01:00", "there is no device 1234567890:01:00"),
        ] {
            assert_eq!(shown(value), devices, "{value:?}");
        }
        for value in ["host=", "01:00.0;", "../../x", "mapping=../x"] {
            assert_eq!(HostPci::parse(0, value), None, "{value:?}");
        }
    }

    #[test]
    fn slices_of_devices() {
        let dir = tempfile::tempdir().unwrap();
        let root = Sysroot::new(dir.path());
        let function: PciAddress = "0000:01:00.4".parse().unwrap();
        let is_slice = |value: &str| HostPci::parse(0, value).unwrap().is_slice(&root, &function);
        assert!(!is_slice("01:00.4"));
        assert!(is_slice("01:00.4,mdev=nvidia-63"));
        let device = dir.path().join("sys/bus/pci/devices/0000:01:00.4");
        std::fs::create_dir_all(device.join("nvidia")).unwrap();
        assert!(!is_slice("01:00.4,mdev=nvidia-63"));
        assert!(is_slice("01:00.4,mdev=i915-GVTg_V5_4"));
        std::fs::create_dir(device.join("mdev_supported_types")).unwrap();
        assert!(is_slice("01:00.4,mdev=nvidia-63"));
    }

    #[test]
    fn indices() {
        for (key, index) in [
            ("hostpci0", Some(0)),
            ("hostpci15", Some(15)),
            ("hostpci16", None),
            ("hostpci01", None),
            ("hostpci", None),
            ("hostpcix", None),
        ] {
            assert_eq!(HostPci::index_of(key), index, "{key}");
        }
    }
}
