//! The keys of a settings file, the layouts that come with hook, and what they are resolved to.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use pinfold_core::knob::POLICY_DEADLINE;
use pinfold_core::selector::Resolver;
use pinfold_core::sys::cpu;
use pinfold_core::sys::pci::PciSelector;
use pinfold_core::sys::sched::SchedPolicy;
use pinfold_core::sys::topology::{Kind, Topology};
use pinfold_core::{CpuSet, Host, Result};
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{self, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::deadlines::{Bounds, Deadlines};
use super::pins::Pins;
use crate::choice::{self, Cell};

/// The layout for the machine that the documented order is for, used if no settings file is
/// found.
pub(super) const DEFAULT_LAYOUT: &str = "5900x";

/// What `source` begins with for settings without a file.
pub(super) const BUILT_IN: &str = "the built-in layout";

/// The layouts that come with hook.
const LAYOUTS: [(&str, &str); 1] = [("5900x", include_str!("../../layouts/5900x.toml"))];

/// The CPUs of a VM on one kind of machine.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MachineLayout {
    /// The CPUs the machine must have.
    present: CpuSet,
    /// Its L3 domains.
    llcs: Vec<CpuSet>,
    /// Its cores.
    cores: Vec<CpuSet>,
    pub(super) isolated: CpuSet,
    pub(super) pins: Pins,
}

impl MachineLayout {
    /// Why a host is not such a machine, if it is not. Offline CPUs are only known to be
    /// present.
    ///
    /// # Errors
    /// If the host's topology cannot be read.
    pub(super) fn misfit(&self, root: &Host, host: &Resolver<'_>) -> Result<Option<String>> {
        let present = cpu::present(root)?;
        if present != self.present {
            let why = format!("a host with CPU {}; this one has {present}", self.present);
            return Ok(Some(why));
        }
        let topology = host.topology()?;
        let online = |sets: &[CpuSet]| -> BTreeSet<CpuSet> {
            let sets = sets.iter().map(|cpus| cpus & &topology.online);
            sets.filter(|cpus| !cpus.is_empty()).collect()
        };
        let domains = topology.domains(Kind::Llc).iter();
        let llcs: Vec<CpuSet> = domains
            .filter(|domain| domain.extent.is_cache())
            .map(|domain| domain.cpus.clone())
            .collect();
        if online(&llcs) != online(&self.llcs) {
            let why = format!(
                "a host with an L3 for each of CPU {}; this one has {}",
                listed(&self.llcs),
                match llcs.as_slice() {
                    [] => "no known L3".to_owned(),
                    [one] => format!("one for CPU {one}"),
                    several => format!("one for each of CPU {}", listed(several)),
                }
            );
            return Ok(Some(why));
        }
        let wanted = online(&self.cores);
        if let Some(core) = topology.cores.iter().find(|core| !wanted.contains(core)) {
            let why = format!(
                "a host with the cores {} and so on; this one has core {core}",
                listed(&self.cores[..self.cores.len().min(2)])
            );
            return Ok(Some(why));
        }
        Ok(None)
    }
}

/// CPU sets in words.
fn listed(sets: &[CpuSet]) -> String {
    let sets: Vec<String> = sets.iter().map(ToString::to_string).collect();
    sets.join(" and ")
}

/// A settings file. Unknown keys are refused. CPUs are texts here, so that errors can
/// name their key.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub(super) required: Option<bool>,
    pub(super) layout: Option<String>,
    pub(super) isolated: Option<String>,
    pub(super) pins: Option<Pins>,
    pub(super) emulator: Option<String>,
    pub(super) iothreads: Option<Iothreads>,
    pub(super) method: Option<Method>,
    pub(super) governor: Option<String>,
    pub(super) energy_preference: Option<String>,
    pub(super) max_latency_us: Option<u32>,
    pub(super) halt_poll_ns: Option<u32>,
    pub(super) vcpu_policy: Option<String>,
    pub(super) housekeeping_governor: Option<String>,
    pub(super) housekeeping_energy_preference: Option<String>,
    pub(super) stat_interval: Option<u32>,
    pub(super) idle_vm: Option<u32>,
    pub(super) reset_pci: Option<ResetPci>,
    pub(super) tidy_caches: Option<bool>,
    pub(super) min_housekeeping: Option<usize>,
    #[serde(default)]
    pub(super) chain: Vec<String>,
    #[serde(default)]
    pub(super) ignore: Vec<String>,
    #[serde(default)]
    pub(super) deadlines: Deadlines,
}

/// What the keys are if a file does not set them; the deadlines' defaults are in deadlines.rs.
pub(crate) mod default {
    use super::Method;

    pub(crate) const REQUIRED: bool = true;
    pub(crate) const METHOD: Method = Method::Auto;

    /// Also of a method that only a later version knows.
    pub(super) fn method() -> Method {
        METHOD
    }

    pub(crate) const GOVERNOR: &str = "performance";
    pub(crate) const STAT_INTERVAL: u32 = 120;
    pub(crate) const RESET_PCI: bool = false;
    pub(crate) const MIN_HOUSEKEEPING: usize = 1;
}

impl File {
    /// Whether it has a key about the VM's CPUs.
    pub(super) fn has_cpus(&self) -> bool {
        self.layout.is_some() || self.isolated.is_some() || self.pins.is_some()
    }
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
    /// By partition if this host supports it, otherwise by hotplug.
    Auto,
}

/// Which PCI functions are reset for the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub(crate) enum ResetPci {
    /// All of the VM's hostpci devices, or none.
    OfVm(bool),
    /// These.
    Listed(Vec<PciReset>),
}

impl Default for ResetPci {
    fn default() -> Self {
        Self::OfVm(default::RESET_PCI)
    }
}

/// By hand, so that an error names what is wrong in an entry.
impl<'de> Deserialize<'de> for ResetPci {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Form;

        impl<'de> Visitor<'de> for Form {
            type Value = ResetPci;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "true, false or a list of PCI addresses, as in [\"0000:01:00\", \"02:00.1\"]",
                )
            }

            fn visit_bool<E>(self, value: bool) -> std::result::Result<ResetPci, E> {
                Ok(ResetPci::OfVm(value))
            }

            fn visit_seq<A: SeqAccess<'de>>(
                self,
                entries: A,
            ) -> std::result::Result<ResetPci, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(entries)).map(ResetPci::Listed)
            }
        }

        deserializer.deserialize_any(Form)
    }
}

/// The way of resetting a function that is not the kernel's: it is removed, and the bus rescanned.
pub(crate) const REMOVE: &str = "remove";

/// One device to be reset: its address only, or a table with what else is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PciReset {
    /// The device.
    pub device: PciSelector,
    /// When.
    pub when: When,
    /// How: [`REMOVE`], or a name of the kernel's reset_method.
    pub method: String,
    /// Whether the VM must not start without it.
    pub required: bool,
}

/// When a device is reset.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum When {
    /// Before the VM starts.
    #[default]
    Before,
    /// After it has stopped.
    After,
    /// Both.
    Both,
}

impl When {
    /// Whether it is reset before the VM starts, or else after it has stopped.
    pub(crate) fn includes(self, is_before: bool) -> bool {
        match self {
            Self::Before => is_before,
            Self::After => !is_before,
            Self::Both => true,
        }
    }
}

/// [`PciReset`] as a table.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ResetTable {
    device: PciSelector,
    #[serde(default)]
    when: When,
    #[serde(default = "remove")]
    method: String,
    #[serde(default)]
    required: bool,
}

fn remove() -> String {
    REMOVE.to_owned()
}

impl Serialize for PciReset {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let Self {
            device,
            when,
            method,
            required,
        } = self.clone();
        // As earlier versions read it.
        if when == When::Before && method == REMOVE && !required {
            return device.serialize(serializer);
        }
        let table = ResetTable {
            device,
            when,
            method,
            required,
        };
        table.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for PciReset {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Form;

        impl<'de> Visitor<'de> for Form {
            type Value = PciReset;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a PCI address, as in \"0000:01:00\", or a table, as in \
                     { device = \"01:00\", method = \"bus\" }",
                )
            }

            fn visit_str<E: de::Error>(self, text: &str) -> std::result::Result<PciReset, E> {
                Ok(PciReset {
                    device: text.parse().map_err(E::custom)?,
                    when: When::default(),
                    method: remove(),
                    required: false,
                })
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                table: A,
            ) -> std::result::Result<PciReset, A::Error> {
                let ResetTable {
                    device,
                    when,
                    method,
                    required,
                } = ResetTable::deserialize(MapAccessDeserializer::new(table))?;
                let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
                if method.is_empty() || !method.chars().all(is_name) {
                    let why = format!(
                        "{method:?} is not a reset method; `pci-reset --list` lists those of each device"
                    );
                    return Err(de::Error::custom(why));
                }
                Ok(PciReset {
                    device,
                    when,
                    method,
                    required,
                })
            }
        }

        deserializer.deserialize_any(Form)
    }
}

/// A VM's settings, resolved: kept with its reservation, since the file may change or go while the
/// VM runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settings {
    /// The file they were read from, for messages.
    pub source: String,
    /// The VM's CPUs. None if the VM may run without and the settings give it none here.
    pub isolated: CpuSet,
    /// Whether the VM must not start without them.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub required: bool,
    /// The CPUs of each vCPU, by its number.
    pub pins: Vec<CpuSet>,
    /// The threads of the guest's cores that hook has ordered the pins for; none if the settings
    /// give the order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_pins: Option<usize>,
    /// The CPUs of the NUMA nodes of the isolated ones; none if there are no other nodes.
    #[serde(default, skip_serializing_if = "CpuSet::is_empty")]
    pub near: CpuSet,
    /// The CPUs of emulator threads; if none, the housekeeping CPUs of the VM's NUMA nodes.
    pub emulator: Option<CpuSet>,
    /// The CPUs of iothreads that are not named below; those of the emulator if none.
    pub iothreads: Option<CpuSet>,
    /// The CPUs of iothreads by id.
    pub iothread: BTreeMap<String, CpuSet>,
    /// How CPUs are isolated.
    #[serde(default = "default::method")]
    pub method: Method,
    /// The governor of the isolated CPUs; unchanged if none.
    pub governor: Option<String>,
    /// The energy_performance_preference of the isolated CPUs; what the governor makes of it if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy_preference: Option<String>,
    /// The longest that the isolated CPUs may take to wake up, in microseconds; unchanged if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_latency_us: Option<u32>,
    /// For how long KVM polls at most before a halted vCPU gives its CPU away, in nanoseconds; unchanged
    /// if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub halt_poll_ns: Option<u32>,
    /// The scheduling policy of the vCPU threads; unchanged if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpu_policy: Option<SchedPolicy>,
    /// The governor of the housekeeping CPUs while the VM runs; unchanged if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub housekeeping_governor: Option<String>,
    /// The energy_performance_preference of the housekeeping CPUs while the VM runs; unchanged if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub housekeeping_energy_preference: Option<String>,
    /// vm.stat_interval in seconds; unchanged if none.
    pub stat_interval: Option<u32>,
    /// The VM that runs while this one does not.
    pub idle_vm: Option<u32>,
    /// The PCI functions that are reset for the VM.
    #[serde(default)]
    pub reset_pci: ResetPci,
    /// Whether caches are dropped and memory is compacted before the VM starts; where none, as far
    /// as its huge pages need it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tidy_caches: Option<bool>,
    /// How many housekeeping CPUs must stay.
    pub min_housekeeping: usize,
    /// Other hookscripts of the VM, as volumes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chain: Vec<String>,
    /// The keys of the warnings of `hook check` that are muted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignore: Vec<String>,
    /// How long each wait may take.
    pub deadlines: Deadlines,
}

fn yes() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_yes(value: &bool) -> bool {
    *value
}

impl Settings {
    /// Whether there is no file for them.
    pub(crate) fn is_built_in(&self) -> bool {
        self.source.starts_with(BUILT_IN)
    }

    /// The CPUs that are the only one of several vCPUs, with these.
    pub(crate) fn sharing(&self, vcpus: usize) -> BTreeMap<usize, CpuSet> {
        let mut by_cpu: BTreeMap<usize, CpuSet> = BTreeMap::new();
        for (vcpu, pin) in self.pins.iter().take(vcpus).enumerate() {
            if let Some(cpu) = pin.first().filter(|_| pin.len() == 1) {
                by_cpu.entry(cpu).or_default().insert(vcpu);
            }
        }
        by_cpu.retain(|_, vcpus| vcpus.len() > 1);
        by_cpu
    }

    /// The devices of a list that are reset before the VM starts, or else after it has stopped.
    pub(crate) fn listed_resets(&self, is_before: bool) -> impl Iterator<Item = &PciReset> {
        let listed = match &self.reset_pci {
            ResetPci::OfVm(_) => &[][..],
            ResetPci::Listed(resets) => resets,
        };
        listed
            .iter()
            .filter(move |reset| reset.when.includes(is_before))
    }

    /// The longest that each phase may take: what follows from the deadlines, and resets of PCI
    /// functions beyond the one that these count (removed before the start).
    pub(crate) fn bounds(&self, others: usize) -> Bounds {
        let mut bounds = self.deadlines.bounds(others, self.chain.len());
        let waits = |is_before| {
            let methods: BTreeSet<&str> = self
                .listed_resets(is_before)
                .map(|reset| reset.method.as_str())
                .collect();
            let removes = u64::from(methods.contains(REMOVE));
            let by_kernel = methods.len() as u64 - removes;
            // The lock is taken to set the methods.
            (removes * 2 + by_kernel) * self.deadlines.pci + by_kernel * self.deadlines.lock
        };
        bounds.pre_start += waits(true).saturating_sub(2 * self.deadlines.pci);
        bounds.post_stop += waits(false);
        if self.vcpu_policy.is_some() {
            let policies = self.pins.len() as u64 * POLICY_DEADLINE.as_secs();
            bounds.post_start += policies;
            bounds.post_stop += policies;
        }
        bounds
    }

    /// Orders the pins for a guest with so many threads per core, if that is left to hook and
    /// was done for another.
    ///
    /// # Errors
    /// If the host's topology cannot be read.
    pub(crate) fn fit_guest(
        &mut self,
        root: &Host,
        threads_per_core: usize,
        cells: &[Cell],
    ) -> Result<()> {
        let is_for_another = |threads| threads != threads_per_core;
        match self.auto_pins.is_some_and(is_for_another) {
            true => {
                self.order_pins(&Topology::read(root)?, threads_per_core, cells);
                Ok(())
            }
            false => Ok(()),
        }
    }

    /// Orders the pins for the NUMA cells of the guest too, if the order is left to hook.
    ///
    /// # Errors
    /// If the host's topology cannot be read.
    pub(super) fn fit_cells(&mut self, host: &Resolver<'_>, cells: &[Cell]) -> Result<()> {
        if let Some(threads) = self.auto_pins.filter(|_| !cells.is_empty()) {
            self.order_pins(host.topology()?, threads, cells);
        }
        Ok(())
    }

    fn order_pins(&mut self, topology: &Topology, threads: usize, cells: &[Cell]) {
        self.pins = choice::in_vcpu_order(topology, &self.isolated, threads, cells);
        self.auto_pins = Some(threads);
    }
}

/// The value of `governor` that leaves it as it is.
pub(super) const KEEP: &str = "keep";

pub(super) fn layout(name: &str) -> std::result::Result<MachineLayout, String> {
    let known = || LAYOUTS.map(|(name, _)| name).join(", ");
    let (_, text) = LAYOUTS
        .iter()
        .find(|(known, _)| *known == name)
        .ok_or_else(|| format!("layout: no {name:?}; available: {}", known()))?;
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
