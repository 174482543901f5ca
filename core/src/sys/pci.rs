//! PCI functions: their addresses, and what sysfs reports about them.
//!
//! See the kernel's Documentation/PCI/sysfs-pci.rst and ABI/testing/sysfs-bus-pci.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::sysroot::Sysroot;

/// The folder with a link to the folder of each PCI function.
const DEVICES: &str = "sys/bus/pci/devices";
/// The largest device number in a PCI address: five bits.
const MAX_DEVICE: u8 = 0x1f;
/// The largest function number in a PCI address: three bits.
const MAX_FUNCTION: u8 = 7;

/// The address of one PCI function: `0000:01:00.0`.
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
    /// The PCI domain; 0 if the text has none.
    pub domain: u32,
    /// The bus.
    pub bus: u8,
    /// The device on the bus, at most 1f.
    pub device: u8,
    /// The function; `None` stands for all functions.
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
    /// [`Error::Unusable`] if there are none, [`Error::Io`] if sysfs cannot be read.
    pub fn functions(&self, root: &Sysroot) -> Result<Vec<PciAddress>> {
        let found: Vec<_> = addresses(root)?
            .into_iter()
            .filter(|address| self.matches(address))
            .collect();
        if found.is_empty() {
            return Err(Error::unusable(
                format!("PCI {self}"),
                "no such device on this host; lspci -D lists all devices",
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
                "it is not a PCI address; write one as in 0000:01:00.0 or 01:00",
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

/// A PCI function as sysfs describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciFunction {
    /// Its address.
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
/// [`Error::Io`] if sysfs cannot be read.
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

/// Reads one function from sysfs.
///
/// # Errors
/// One that [is gone](Error::is_gone) if it does not exist, [`Error::Malformed`] if a number
/// cannot be parsed.
pub fn function(root: &Sysroot, address: PciAddress) -> Result<PciFunction> {
    Ok(PciFunction {
        address,
        class: number(root, &address, "class")?,
        vendor: number(root, &address, "vendor")?,
        device: number(root, &address, "device")?,
        driver: root.link_name(file(&address, "driver")),
    })
}

/// The NUMA node that a function is at; `None` if the kernel does not know it (-1).
///
/// # Errors
/// [`Error::Io`] with the path, for anything but a file that does not exist.
pub fn numa_node(root: &Sysroot, address: &PciAddress) -> Result<Option<usize>> {
    let text = root.read_value(file(address, "numa_node"))?;
    Ok(text.and_then(|text| text.parse().ok()))
}

/// Whether a function is a virtual one, which belongs to a physical function (SR-IOV).
pub fn is_virtual(root: &Sysroot, address: &PciAddress) -> bool {
    root.exists(file(address, "physfn"))
}

/// The ways in which the kernel can reset a function, in its order; none if it knows none, or before
/// Linux 5.15.
///
/// # Errors
/// [`Error::Io`] with the path, for anything but a file that does not exist.
pub fn reset_methods(root: &Sysroot, address: &PciAddress) -> Result<Vec<String>> {
    let text = root.read_value(file(address, "reset_method"))?;
    let text = text.unwrap_or_default();
    Ok(text.split_ascii_whitespace().map(str::to_owned).collect())
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
        Error::malformed(
            path,
            format!("{:?} is not a number as in 0x8086", text.trim()),
        )
    })
}

fn file(address: &PciAddress, name: &str) -> String {
    format!("{DEVICES}/{address}/{name}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;
    use std::os::unix::fs::symlink;

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
    fn invalid_addresses_are_refused() {
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
                format!("{text:?}: it is not a PCI address; write one as in 0000:01:00.0 or 01:00")
            );
        }
    }

    #[test]
    fn functions_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join(DEVICES).join("0000:00:04.0");
        fs::create_dir_all(&device).unwrap();
        for (file, text) in [
            ("class", "0x0c0330\n"),
            ("vendor", "0x1033\n"),
            ("device", "0x0194\n"),
        ] {
            fs::write(device.join(file), text).unwrap();
        }
        symlink("../../../bus/pci/drivers/xhci_hcd", device.join("driver")).unwrap();
        let root = Sysroot::new(dir.path());
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
            "PCI 0000:00:09: no such device on this host; lspci -D lists all devices"
        );
    }

    proptest! {
        #[test]
        fn selector_round_trip(
            domain: u32,
            bus: u8,
            device in 0..=MAX_DEVICE,
            function in prop::option::of(0..=MAX_FUNCTION),
        ) {
            let selector = PciSelector { domain, bus, device, function };
            prop_assert_eq!(selector.to_string().parse::<PciSelector>().unwrap(), selector);
        }

        #[test]
        fn no_text_panics(text in "\\PC*") {
            let _ = text.parse::<PciSelector>();
        }
    }
}
