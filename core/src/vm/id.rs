//! A VM's number.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A VM's number: 100 to 999999999, as in Proxmox VE (`pve-vmid` in `PVE::JSONSchema`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct VmId(u32);

impl VmId {
    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for VmId {
    type Error = Error;

    fn try_from(number: u32) -> Result<Self> {
        if (100..=999_999_999).contains(&number) {
            Ok(Self(number))
        } else {
            Err(Error::malformed(
                number.to_string(),
                "not a VM number (100 to 999999999)",
            ))
        }
    }
}

impl From<VmId> for u32 {
    fn from(vmid: VmId) -> Self {
        vmid.0
    }
}

impl FromStr for VmId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        // Only one spelling, so that file names contain the id as it was typed.
        match text.parse::<u32>() {
            Ok(number) if number.to_string() == text => number.try_into(),
            _ => Err(Error::malformed(
                format!("{text:?}"),
                "not a VM number (100 to 999999999)",
            )),
        }
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vm_numbers() {
        for text in ["100", "999999999"] {
            assert_eq!(text.parse::<VmId>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "99",
            "0100",
            "+100",
            " 100",
            "100\n",
            "1000000000",
            "-1",
            "../100",
            "100/..",
            "1e3",
            "١٠٠",
        ] {
            let error = text.parse::<VmId>().unwrap_err().to_string();
            assert!(
                error.ends_with("not a VM number (100 to 999999999)"),
                "{error}"
            );
        }
        assert_eq!(serde_json::to_string(&VmId(100)).unwrap(), "100");
        assert!(serde_json::from_str::<VmId>("7").is_err());
    }
}
