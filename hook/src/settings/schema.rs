//! The keys of a settings file, the layouts that come with hook, and what they are resolved to.

use std::collections::BTreeMap;

use pinfold_core::sys::pci::PciSelector;
use pinfold_core::sys::topology::Topology;
use pinfold_core::{CpuSet, Host, Result};
use serde::{Deserialize, Serialize};

use super::deadlines::Deadlines;
use super::pins::{self, Pins};

/// The layout for the machine that the documented order is for, used where no settings file is
/// found.
pub(super) const DEFAULT_LAYOUT: &str = "5900x";

/// The layouts that come with hook.
const LAYOUTS: [(&str, &str); 1] = [("5900x", include_str!("../../layouts/5900x.toml"))];

/// What a machine of one kind gives a VM.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MachineLayout {
    /// The CPUs the machine must have.
    pub(super) present: CpuSet,
    pub(super) isolated: CpuSet,
    pub(super) pins: Pins,
}

/// A settings file. Unknown keys are refused. CPUs are texts here, so that what is said of them can
/// name their key.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub(super) layout: Option<String>,
    pub(super) isolated: Option<String>,
    pub(super) pins: Option<Pins>,
    pub(super) emulator: Option<String>,
    pub(super) iothreads: Option<Iothreads>,
    pub(super) method: Option<Method>,
    pub(super) governor: Option<String>,
    pub(super) stat_interval: Option<u32>,
    pub(super) idle_vm: Option<u32>,
    pub(super) reset_pci: Option<ResetPci>,
    pub(super) tidy_caches: Option<bool>,
    pub(super) min_housekeeping: Option<usize>,
    #[serde(default)]
    pub(super) deadlines: Deadlines,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(
    untagged,
    expecting = "CPUs, as in \"4-5\", or CPUs by iothread, as in { iothread-virtioscsi0 = \"4\" }"
)]
pub(super) enum Iothreads {
    All(String),
    ById(BTreeMap<String, String>),
}

/// How CPUs are to be isolated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Method {
    /// The documented order: slices narrowed, CPUs taken offline and online again.
    Hotplug,
    /// A cpuset partition in the VM's scope.
    Partition,
    /// By partition where this host can, else by hotplug.
    Auto,
}

/// Which PCI functions are reset before the VM starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "true, false or a list of PCI addresses, as in [\"0000:01:00\", \"02:00.1\"]"
)]
pub(crate) enum ResetPci {
    /// All of the VM's hostpci devices, or none.
    OfVm(bool),
    /// These.
    Listed(Vec<PciSelector>),
}

/// A VM's settings, resolved: kept with its reservation, since the file may change or go while the
/// VM runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settings {
    /// Where they come from, for messages.
    pub source: String,
    /// The VM's CPUs.
    pub isolated: CpuSet,
    /// The CPUs of each vCPU, by its number.
    pub pins: Vec<CpuSet>,
    /// The threads of the guest's cores that hook has ordered the pins for; none where the settings
    /// give the order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_pins: Option<usize>,
    /// The CPUs of emulator threads; all housekeeping CPUs where none.
    pub emulator: Option<CpuSet>,
    /// The CPUs of iothreads that are not named below; those of the emulator where none.
    pub iothreads: Option<CpuSet>,
    /// The CPUs of iothreads by id.
    pub iothread: BTreeMap<String, CpuSet>,
    /// How CPUs are isolated.
    pub method: Method,
    /// The governor of the isolated CPUs; unchanged where none.
    pub governor: Option<String>,
    /// vm.stat_interval in seconds; unchanged where none.
    pub stat_interval: Option<u32>,
    /// The VM that runs while this one does not.
    pub idle_vm: Option<u32>,
    /// The PCI functions reset before the VM starts.
    pub reset_pci: ResetPci,
    /// Whether caches are dropped and memory is compacted before the VM starts.
    pub tidy_caches: bool,
    /// How many housekeeping CPUs must stay.
    pub min_housekeeping: usize,
    /// How long each wait may take.
    pub deadlines: Deadlines,
}

impl Settings {
    /// Orders the pins for a guest with so many threads per core, where that is left to hook and
    /// was done for another.
    ///
    /// # Errors
    /// Where the host's topology cannot be read.
    pub(crate) fn fit_guest(&mut self, root: &Host, threads_per_core: usize) -> Result<()> {
        if self
            .auto_pins
            .is_some_and(|threads| threads != threads_per_core)
        {
            self.pins = pins::auto(&Topology::read(root)?, &self.isolated, threads_per_core);
            self.auto_pins = Some(threads_per_core);
        }
        Ok(())
    }
}

/// The value of `governor` that leaves it as it is.
pub(super) const KEEP: &str = "keep";

pub(super) fn layout(name: &str) -> std::result::Result<MachineLayout, String> {
    let known = || LAYOUTS.map(|(name, _)| name).join(", ");
    let (_, text) = LAYOUTS
        .iter()
        .find(|(known, _)| *known == name)
        .ok_or_else(|| format!("layout: no {name:?}; there is {}", known()))?;
    toml::from_str(text).map_err(|error| format!("layout {name}: {error}"))
}

/// Every key there is: what serde answers to an unknown one names them.
#[cfg(test)]
pub(crate) fn known_keys() -> Vec<String> {
    let mut keys = Vec::new();
    for unknown in ["unknown = 1\n", "[deadlines]\nunknown = 1\n"] {
        let answer = toml::from_str::<File>(unknown).unwrap_err().to_string();
        let known = answer.split("expected one of").nth(1).unwrap();
        keys.extend(known.split('`').skip(1).step_by(2).map(str::to_owned));
    }
    keys
}
