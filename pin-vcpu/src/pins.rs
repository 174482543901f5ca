//! The CPUs of each role, and the changes that pin its threads.

use std::collections::BTreeMap;
use std::str::FromStr;

use pinfold_core::selector::{Resolver, SelectorError};
use pinfold_core::vm::{QemuThread, Role};
use pinfold_core::{Change, CpuSet, Error, Host, Knob, Result, Selector, Setting};

/// `N=CPUS`: a vCPU and its CPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VcpuPin {
    /// The vCPU's number.
    pub vcpu: usize,
    /// CPUs by logical number or selector.
    pub cpus: Selector,
}

impl FromStr for VcpuPin {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (number, cpus) = text
            .split_once('=')
            .ok_or("write a vCPU's number and CPUs, as in 0=6")?;
        let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        let vcpu = is_number.then(|| number.parse().ok()).flatten();
        Ok(Self {
            vcpu: vcpu
                .ok_or_else(|| format!("{number:?} is not a vCPU number; write as in 0=6"))?,
            cpus: cpus
                .parse()
                .map_err(|error: SelectorError| error.to_string())?,
        })
    }
}

/// `[ID=]CPUS`: an iothread, or all of them, and their CPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IothreadPin {
    /// The iothread's id; `None` stands for all that no other pin names.
    pub id: Option<String>,
    /// CPUs by logical number or selector.
    pub cpus: Selector,
}

impl FromStr for IothreadPin {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (id, cpus) = match text.rsplit_once('=') {
            Some(("", _)) => return Err("the iothread's id before \"=\" is empty".into()),
            Some((id, cpus)) => (Some(id.to_owned()), cpus),
            None => (None, text),
        };
        Ok(Self {
            id,
            cpus: cpus
                .parse()
                .map_err(|error: SelectorError| error.to_string())?,
        })
    }
}

/// The CPUs of a VM's threads as typed, each thread at most once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Asked {
    vcpus: BTreeMap<usize, Selector>,
    iothreads: BTreeMap<Option<String>, Selector>,
    emulator: Option<Selector>,
}

impl Asked {
    /// Puts pins together.
    ///
    /// # Errors
    /// A message if a thread is pinned twice.
    pub fn new(
        vcpus: Vec<VcpuPin>,
        iothreads: Vec<IothreadPin>,
        emulator: Option<Selector>,
    ) -> std::result::Result<Self, String> {
        let mut asked = Self {
            emulator,
            ..Self::default()
        };
        for VcpuPin { vcpu, cpus } in vcpus {
            if asked.vcpus.insert(vcpu, cpus).is_some() {
                return Err(format!(
                    "vCPU {vcpu}: pinned twice; write its CPUs as one list, as in {vcpu}=6,18"
                ));
            }
        }
        for IothreadPin { id, cpus } in iothreads {
            let name = id.clone().unwrap_or_else(|| "without an id".into());
            if asked.iothreads.insert(id, cpus).is_some() {
                return Err(format!(
                    "iothread {name}: pinned twice; write its CPUs as one list"
                ));
            }
        }
        Ok(asked)
    }

    /// The pins on this host.
    ///
    /// # Errors
    /// As [`Resolver::resolve`].
    pub fn resolve(self, root: &Host) -> Result<Pins> {
        let host = Resolver::new(root);
        let mut pins = Pins::default();
        for (vcpu, cpus) in self.vcpus {
            pins.vcpus.insert(vcpu, host.resolve(&cpus)?);
        }
        for (id, cpus) in self.iothreads {
            pins.iothreads.insert(id, host.resolve(&cpus)?);
        }
        pins.emulator = self.emulator.map(|cpus| host.resolve(&cpus)).transpose()?;
        Ok(pins)
    }
}

/// The CPUs of a VM's threads by role; roles that are not in it are not changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pins {
    /// By vCPU number.
    pub vcpus: BTreeMap<usize, CpuSet>,
    /// By iothread id; the key `None` is for all that are not named.
    pub iothreads: BTreeMap<Option<String>, CpuSet>,
    /// All threads that are neither.
    pub emulator: Option<CpuSet>,
}

impl Pins {
    /// All sets of CPUs that are asked for.
    pub fn cpus(&self) -> impl Iterator<Item = &CpuSet> {
        self.vcpus
            .values()
            .chain(self.iothreads.values())
            .chain(&self.emulator)
    }

    /// The CPUs of a role; `None` if it is not changed.
    pub fn of(&self, role: &Role) -> Option<&CpuSet> {
        match role {
            Role::Vcpu(number) => self.vcpus.get(number),
            Role::Iothread(id) => self
                .iothreads
                .get(&Some(id.clone()))
                .or_else(|| self.iothreads.get(&None)),
            Role::Emulator => self.emulator.as_ref(),
        }
    }
}

/// The setting of a thread's CPUs.
pub fn setting(thread: &QemuThread) -> Setting {
    let tid = thread.id.tid;
    let label = match &thread.role {
        Role::Emulator => format!("emulator thread {tid} ({})", thread.name),
        role => format!("{role} (thread {tid})"),
    };
    Setting::new(Knob::Thread(thread.id), label, &thread.allowed)
}

/// The setting of a thread's scheduling policy; none if it has ended.
///
/// # Errors
/// If it cannot be read.
pub fn policy_setting(root: &Host, thread: &QemuThread) -> Result<Option<Setting>> {
    let knob = Knob::ThreadPolicy(thread.id);
    let label = format!("policy of {} (thread {})", thread.role, thread.id.tid);
    let found = knob.read(root)?;
    Ok(found.map(|found| Setting::new(knob, label, found)))
}

/// The changes that pin threads: vCPUs by number, iothreads, then the emulator's, its first thread
/// foremost, so that workers born meanwhile have its pin already.
///
/// # Errors
/// [`Error::Unusable`] if there is no such vCPU or iothread, with those that exist.
pub fn plan(threads: &[QemuThread], pins: &Pins) -> Result<Vec<Change>> {
    let numbers: CpuSet = vcpu_numbers(threads).collect();
    if let Some(vcpu) = pins.vcpus.keys().find(|vcpu| !numbers.contains(**vcpu)) {
        let there_are = if numbers.is_empty() {
            "none are known".into()
        } else {
            format!("there are {numbers}")
        };
        return Err(Error::unusable(
            format!("vCPU {vcpu}"),
            format!("the VM has no such vCPU; {there_are}"),
        ));
    }
    let ids: Vec<&str> = iothread_ids(threads).collect();
    if let Some(id) = pins
        .iothreads
        .keys()
        .flatten()
        .find(|id| !ids.contains(&id.as_str()))
    {
        let there_are = if ids.is_empty() {
            "none are known".into()
        } else {
            format!("there are {}", ids.join(", "))
        };
        return Err(Error::unusable(
            format!("iothread {id}"),
            format!("the VM has no such iothread; {there_are}"),
        ));
    }
    let mut pinned: Vec<_> = threads
        .iter()
        .filter_map(|thread| Some((thread, pins.of(&thread.role)?)))
        .collect();
    pinned.sort_by_key(|(thread, _)| (&thread.role, thread.id.tid != thread.id.pid, thread.id.tid));
    Ok(pinned
        .into_iter()
        .map(|(thread, cpus)| setting(thread).want(cpus))
        .collect())
}

fn vcpu_numbers(threads: &[QemuThread]) -> impl Iterator<Item = usize> {
    threads.iter().filter_map(|thread| {
        if let Role::Vcpu(number) = thread.role {
            Some(number)
        } else {
            None
        }
    })
}

fn iothread_ids(threads: &[QemuThread]) -> impl Iterator<Item = &str> {
    threads.iter().filter_map(|thread| {
        if let Role::Iothread(id) = &thread.role {
            Some(id.as_str())
        } else {
            None
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinfold_core::TaskId;

    fn thread(tid: i32, role: Role) -> QemuThread {
        let id = TaskId {
            pid: 100,
            tid,
            start: 1,
        };
        QemuThread {
            id,
            role,
            name: "kvm".into(),
            allowed: "0-23".parse().unwrap(),
            last_cpu: 0,
        }
    }

    fn threads() -> Vec<QemuThread> {
        vec![
            thread(99, Role::Emulator),
            thread(100, Role::Emulator),
            thread(101, Role::Iothread("io1".into())),
            thread(102, Role::Iothread("io2".into())),
            thread(104, Role::Vcpu(0)),
            thread(103, Role::Vcpu(1)),
        ]
    }

    fn pins(
        vcpus: &[&str],
        iothreads: &[&str],
        emulator: Option<&str>,
    ) -> std::result::Result<Pins, String> {
        let asked = Asked::new(
            vcpus.iter().map(|text| text.parse().unwrap()).collect(),
            iothreads.iter().map(|text| text.parse().unwrap()).collect(),
            emulator.map(|text| text.parse().unwrap()),
        )?;
        Ok(asked.resolve(&Host::new("/nonexistent")).unwrap())
    }

    fn planned(pins: &Pins) -> Vec<String> {
        plan(&threads(), pins)
            .unwrap()
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn roles_go_to_their_cpus() {
        let all = pins(&["1=18", "0=6,7"], &["0-5", "io2=1"], Some("2-5")).unwrap();
        assert_eq!(
            planned(&all),
            [
                "vCPU 0 (thread 104): 0-23 -> 6-7",
                "vCPU 1 (thread 103): 0-23 -> 18",
                "iothread io1 (thread 101): 0-23 -> 0-5",
                "iothread io2 (thread 102): 0-23 -> 1",
                "emulator thread 100 (kvm): 0-23 -> 2-5",
                "emulator thread 99 (kvm): 0-23 -> 2-5",
            ]
        );
        let one = pins(&["1=18"], &[], None).unwrap();
        assert_eq!(planned(&one), ["vCPU 1 (thread 103): 0-23 -> 18"]);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let error = |pins: Pins| plan(&threads(), &pins).unwrap_err().to_string();
        assert_eq!(
            error(pins(&["2=6"], &[], None).unwrap()),
            "vCPU 2: the VM has no such vCPU; there are 0-1"
        );
        assert_eq!(
            error(pins(&[], &["io3=6"], None).unwrap()),
            "iothread io3: the VM has no such iothread; there are io1, io2"
        );
        let none = plan(&[], &pins(&["0=6"], &[], None).unwrap())
            .unwrap_err()
            .to_string();
        assert_eq!(none, "vCPU 0: the VM has no such vCPU; none are known");
    }

    #[test]
    fn twice_is_refused() {
        assert_eq!(
            pins(&["0=6", "0=18"], &[], None).unwrap_err(),
            "vCPU 0: pinned twice; write its CPUs as one list, as in 0=6,18"
        );
        assert!(pins(&[], &["0", "1"], None).is_err());
        assert!(pins(&[], &["a=0", "1", "b=2"], None).is_ok());
    }

    #[test]
    fn pins_are_read() {
        for text in [
            "",
            "0",
            "=6",
            "0=",
            "x=6",
            "-1=6",
            "+1=6",
            "0=5-3",
            "0=x",
            "0=6=7",
            "0=llc",
            "0=llc:x",
            "99999999999999999999=1",
        ] {
            assert!(text.parse::<VcpuPin>().is_err(), "{text:?}");
        }
        for text in ["", "=6", "io=", "io=x", "5-3"] {
            assert!(text.parse::<IothreadPin>().is_err(), "{text:?}");
        }
        assert_eq!(
            "0=core:6&online"
                .parse::<VcpuPin>()
                .unwrap()
                .cpus
                .to_string(),
            "core:6&online"
        );
        assert_eq!(
            "io1=!llc:1".parse::<IothreadPin>().unwrap().id.as_deref(),
            Some("io1")
        );
        assert_eq!("llc:0".parse::<IothreadPin>().unwrap().id, None);
        assert_eq!(
            "a=b=6".parse::<IothreadPin>().unwrap().id.as_deref(),
            Some("a=b")
        );
    }
}
