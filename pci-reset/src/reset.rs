//! Removing functions, rescanning, and waiting until all are back.

use std::thread;
use std::time::{Duration, Instant};

use pinfold_core::knob::{ABSENT, NO_DRIVER, PRESENT, Value};
use pinfold_core::sys::pci::{self, PciAddress};
use pinfold_core::{
    Applied, Change, Error, Host, Knob, Outcome, Report, Result, Setting, apply_one,
};

use crate::in_use::InUse;

/// How often the presence of functions is polled.
const INTERVAL: Duration = Duration::from_millis(10);

/// How long a function that had a driver may be without one after a rescan: some are probed later.
const PROBE_DEADLINE: Duration = Duration::from_secs(1);

/// The driver for passing devices through. Proxmox VE binds it at each start of a VM.
const VFIO: &str = "vfio-pci";

/// Checks that the functions are not in use.
///
/// # Errors
/// [`Error::Unusable`] naming the function and all reasons against it.
pub fn check(root: &Host, functions: &[PciAddress]) -> Result<()> {
    let in_use = InUse::read(root, functions)?;
    for address in functions {
        let reasons = in_use.reasons(address);
        if !reasons.is_empty() {
            let why = format!(
                "not removed: {}; use pci-reset --force to remove it anyway",
                reasons.join("; ")
            );
            return Err(Error::unusable(format!("PCI {address}"), why));
        }
    }
    Ok(())
}

/// What prevents functions from being removed: each with all reasons against it.
///
/// # Errors
/// If /proc or sysfs cannot be read.
pub fn obstacles(root: &Host, functions: &[PciAddress]) -> Result<Vec<(PciAddress, String)>> {
    let in_use = InUse::read(root, functions)?;
    let reasons = functions
        .iter()
        .map(|address| (*address, in_use.reasons(address).join("; ")));
    Ok(reasons.filter(|(_, reasons)| !reasons.is_empty()).collect())
}

/// The removals, the last function first, so that functions behind a bridge go before it.
pub fn plan(root: &Host, functions: &[PciAddress]) -> Vec<Change> {
    let mut functions: Vec<_> = functions
        .iter()
        .filter(|address| pci::is_present(root, address))
        .collect();
    functions.sort_unstable();
    functions.dedup();
    functions
        .into_iter()
        .rev()
        .map(|address| setting(root, address).want(ABSENT))
        .collect()
}

/// The change that undoes a removal.
pub(crate) fn back(removal: &Change) -> Change {
    let Change {
        knob,
        label,
        found,
        wanted,
    } = removal.clone();
    Change {
        knob,
        label,
        found: wanted,
        wanted: found,
    }
}

fn setting(root: &Host, address: &PciAddress) -> Setting {
    let knob = Knob::PciFunction(address.to_string());
    let label = match driver(root, address).as_str() {
        NO_DRIVER => knob.to_string(),
        driver => format!("{knob} ({driver})"),
    };
    Setting::new(knob, label, PRESENT)
}

/// A function as it was before.
struct Before {
    address: PciAddress,
    object: Setting,
    /// Not known of a function that was not there.
    driver: Option<String>,
}

impl Before {
    fn to_be_back(&self) -> Change {
        Setting {
            found: ABSENT,
            ..self.object.clone()
        }
        .want(PRESENT)
    }

    fn lost(&self, deadline: Duration) -> String {
        let seconds = deadline.as_secs_f32();
        match self.driver {
            Some(_) => format!("not back {seconds} s after a rescan; it may need a power cycle"),
            None => format!("not found within {seconds} s of a rescan; lspci -D lists all devices"),
        }
    }
}

/// Removes functions one after the other, rescans once, and waits until all that were on the host
/// are back with the drivers they had. `deadline` is for the functions to go, and again for them to
/// come back. Changes and failures go to `report`.
///
/// Functions that are not present count as removed: the rescan finds them again.
///
/// # Errors
/// As [`check`], unless `force`: nothing has been changed then. [`Error::Unusable`] with the count
/// where functions could not be removed or are not back, which has been reported one by one.
pub fn reset(
    root: &Host,
    functions: &[PciAddress],
    force: bool,
    deadline: Duration,
    report: &mut Report,
) -> Result<()> {
    if !force {
        check(root, functions)?;
    }
    let failures = report.failures();
    // Siblings and functions behind a bridge may be removed too, so all of the host's functions are
    // checked afterwards.
    let mut addresses = pci::addresses(root)?;
    addresses.extend(functions);
    addresses.sort_unstable();
    addresses.dedup();
    let before: Vec<Before> = addresses
        .into_iter()
        .map(|address| Before {
            address,
            object: setting(root, &address),
            driver: pci::is_present(root, &address).then(|| driver(root, &address)),
        })
        .collect();
    remove(root, plan(root, functions), deadline, report);
    let missing = bring_back(root, &before, deadline, report);
    bind(root, &missing, report);
    match report.failures() - failures {
        0 => Ok(()),
        1 => Err(Error::unusable("PCI reset", "one function was not reset")),
        count => Err(Error::unusable(
            "PCI reset",
            format!("{count} functions were not reset"),
        )),
    }
}

/// Removes one function after the other. If one does not go in time, the rest is not removed: the
/// kernel is still working on that one.
fn remove(root: &Host, removals: Vec<Change>, deadline: Duration, report: &mut Report) {
    let until = Instant::now() + deadline;
    let all = removals.len();
    for (number, removal) in removals.into_iter().enumerate() {
        report.progress("PCI removal", number, all);
        let knob = removal.knob.clone();
        let mut done = apply_one(root, removal);
        let went = || matches!(knob.read(root), Ok(Some(value)) if value == ABSENT);
        let late = done.outcome == Outcome::Changed && !wait(until, went);
        if late {
            done.outcome = Outcome::Failed(format!(
                "it is still there after {} s",
                deadline.as_secs_f32()
            ));
        }
        report.changes(&[done]);
        if late {
            return;
        }
    }
}

/// Rescans the bus. Returns the functions that were missing before.
fn bring_back<'a>(
    root: &Host,
    all: &'a [Before],
    deadline: Duration,
    report: &mut Report,
) -> Vec<&'a Before> {
    let is_missing = |before: &&Before| !pci::is_present(root, &before.address);
    let mut missing: Vec<&Before> = all.iter().filter(is_missing).collect();
    let Some(first) = missing.first() else {
        return missing;
    };
    let rescan = apply_one(root, first.to_be_back());
    let (mut last, of) = (None, missing.len());
    wait(Instant::now() + deadline, || {
        let left = all.iter().filter(is_missing).count();
        // Once per change, not per poll.
        if last.replace(left) != Some(left) {
            report.progress("PCI rescan", of.saturating_sub(left), of);
        }
        left == 0
    });
    // One that went late.
    missing.extend(
        all.iter()
            .filter(is_missing)
            .filter(|late| !missing.iter().any(|before| before.address == late.address))
            .collect::<Vec<_>>(),
    );
    for before in &missing {
        let outcome = match &rescan.outcome {
            _ if !is_missing(before) => Outcome::Changed,
            Outcome::Failed(why) => Outcome::Failed(why.clone()),
            _ => Outcome::Failed(before.lost(deadline)),
        };
        report.changes(&[Applied {
            change: before.to_be_back(),
            outcome,
        }]);
    }
    missing
}

/// Gives functions that are back the drivers they had.
fn bind(root: &Host, functions: &[&Before], report: &mut Report) {
    let had: Vec<(&PciAddress, &str)> = functions
        .iter()
        .filter(|before| pci::is_present(root, &before.address))
        .filter_map(|before| Some((&before.address, before.driver.as_deref()?)))
        .collect();
    wait(Instant::now() + PROBE_DEADLINE, || {
        had.iter()
            .all(|(address, had)| *had == NO_DRIVER || driver(root, address) != NO_DRIVER)
    });
    for (address, had) in had {
        let found = driver(root, address);
        if had == VFIO && found != VFIO {
            report.note(&format!(
                "PCI {address}: its driver was {VFIO} and is now {found}; a VM's start binds it again"
            ));
        } else if found != had {
            let object = Setting::new(
                Knob::PciDriver(address.to_string()),
                format!("driver of PCI {address}"),
                Value::text(found),
            );
            report.changes(&[apply_one(root, object.want(Value::text(had)))]);
        }
    }
}

fn driver(root: &Host, address: &PciAddress) -> String {
    Knob::PciDriver(address.to_string())
        .read(root)
        .ok()
        .flatten()
        .map_or_else(|| NO_DRIVER.into(), |driver| driver.to_string())
}

/// Polls a condition until a deadline. Returns whether it holds.
fn wait(until: Instant, mut is_so: impl FnMut() -> bool) -> bool {
    loop {
        if is_so() {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        thread::sleep(INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinfold_core::{Exit, Verbosity};
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    const DEADLINE: Duration = Duration::from_secs(20);

    fn device(base: &Path, address: &str) -> PathBuf {
        base.join("sys/bus/pci/devices").join(address)
    }

    fn add(base: &Path, address: &str) {
        let device = device(base, address);
        fs::create_dir_all(&device).unwrap();
        fs::write(device.join("remove"), "").unwrap();
    }

    /// A host whose kernel removes a function, and its `siblings` some time later, and finds all
    /// but the `lost` again.
    struct Kernel {
        dir: tempfile::TempDir,
        stop: Arc<AtomicBool>,
        thread: Option<thread::JoinHandle<Vec<String>>>,
    }

    const ALL: [&str; 4] = [
        "0000:01:00.0",
        "0000:01:00.1",
        "0000:02:00.0",
        "0000:03:00.0",
    ];

    impl Kernel {
        fn start(siblings: &'static [&'static str], lost: &'static [&'static str]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            for address in ALL {
                add(dir.path(), address);
            }
            fs::write(dir.path().join("sys/bus/pci/rescan"), "").unwrap();
            fs::create_dir_all(dir.path().join("proc/self")).unwrap();
            fs::write(dir.path().join("proc/self/mountinfo"), "").unwrap();
            let stop = Arc::new(AtomicBool::new(false));
            let (base, stopped) = (dir.path().to_owned(), Arc::clone(&stop));
            let work = move || {
                let mut log = Vec::new();
                let asked = |path: &Path| fs::read_to_string(path).is_ok_and(|text| text == "1");
                let rescan = base.join("sys/bus/pci/rescan");
                while !stopped.load(Ordering::Relaxed) {
                    for address in ALL {
                        if asked(&device(&base, address).join("remove")) {
                            log.push(format!("remove {address}"));
                            thread::sleep(INTERVAL);
                            fs::remove_dir_all(device(&base, address)).unwrap();
                            for sibling in siblings {
                                thread::sleep(INTERVAL);
                                let _ = fs::remove_dir_all(device(&base, sibling));
                            }
                        }
                    }
                    if asked(&rescan) {
                        log.push("rescan".into());
                        fs::write(&rescan, "").unwrap();
                        thread::sleep(INTERVAL);
                        for address in ALL.iter().filter(|address| !lost.contains(address)) {
                            add(&base, address);
                        }
                    }
                    thread::sleep(INTERVAL / 10);
                }
                log
            };
            let thread = Some(thread::spawn(work));
            Self { dir, stop, thread }
        }

        fn reset(&self, functions: &[&str], deadline: Duration) -> (Result<()>, Exit) {
            let functions: Vec<PciAddress> = functions
                .iter()
                .map(|address| address.parse().unwrap())
                .collect();
            let mut report = Report::new("test", Verbosity::Quiet, false);
            let done = reset(
                &Host::new(self.dir.path()),
                &functions,
                false,
                deadline,
                &mut report,
            );
            (done, report.finish())
        }

        fn log(mut self) -> Vec<String> {
            self.stop.store(true, Ordering::Relaxed);
            self.thread.take().unwrap().join().unwrap()
        }
    }

    #[test]
    fn one_after_the_other_then_one_rescan() {
        let kernel = Kernel::start(&[], &[]);
        let (done, exit) = kernel.reset(
            &[
                "0000:01:00.0",
                "0000:02:00.0",
                "0000:01:00.1",
                "0000:01:00.1",
            ],
            DEADLINE,
        );
        done.unwrap();
        assert_eq!(exit, Exit::Success);
        assert!(device(kernel.dir.path(), "0000:01:00.1").exists());
        assert_eq!(
            kernel.log(),
            [
                "remove 0000:02:00.0",
                "remove 0000:01:00.1",
                "remove 0000:01:00.0",
                "rescan"
            ]
        );
    }

    #[test]
    fn siblings_may_go_along() {
        let kernel = Kernel::start(&["0000:01:00.0", "0000:03:00.0"], &[]);
        kernel
            .reset(&["0000:01:00.0", "0000:01:00.1"], DEADLINE)
            .0
            .unwrap();
        assert!(device(kernel.dir.path(), "0000:03:00.0").exists());
        assert_eq!(kernel.log().last().map(String::as_str), Some("rescan"));
    }

    #[test]
    fn one_that_was_gone_already_is_found_again() {
        let kernel = Kernel::start(&[], &[]);
        fs::remove_dir_all(device(kernel.dir.path(), "0000:02:00.0")).unwrap();
        kernel.reset(&["0000:02:00.0"], DEADLINE).0.unwrap();
        assert!(device(kernel.dir.path(), "0000:02:00.0").exists());
        assert_eq!(kernel.log(), ["rescan"]);
    }

    #[test]
    fn the_driver_for_guests_is_left_to_their_start() {
        let kernel = Kernel::start(&[], &[]);
        let link = device(kernel.dir.path(), "0000:02:00.0").join("driver");
        std::os::unix::fs::symlink("../../../bus/pci/drivers/vfio-pci", link).unwrap();
        let (done, exit) = kernel.reset(&["0000:02:00.0"], DEADLINE);
        done.unwrap();
        assert_eq!(exit, Exit::Success);
    }

    #[test]
    fn one_that_is_lost_is_missed() {
        let kernel = Kernel::start(&[], &["0000:02:00.0"]);
        let (done, exit) = kernel.reset(&["0000:02:00.0", "0000:03:00.0"], Duration::from_secs(2));
        assert_eq!(
            done.unwrap_err().to_string(),
            "PCI reset: one function was not reset"
        );
        assert_eq!(exit, Exit::Partial);
        assert!(device(kernel.dir.path(), "0000:03:00.0").exists());
    }

    #[test]
    fn while_one_does_not_go_nothing_else_is_removed() {
        let mut kernel = Kernel::start(&[], &[]);
        kernel.stop.store(true, Ordering::Relaxed);
        kernel.thread.take().unwrap().join().unwrap();
        let (done, exit) =
            kernel.reset(&["0000:02:00.0", "0000:03:00.0"], Duration::from_millis(50));
        assert!(done.is_err());
        assert_eq!(exit, Exit::Failed);
        let asked = |address| {
            fs::read_to_string(device(kernel.dir.path(), address).join("remove")).unwrap()
        };
        assert_eq!(
            (
                asked("0000:03:00.0").as_str(),
                asked("0000:02:00.0").as_str()
            ),
            ("1", "")
        );
    }

    #[test]
    fn what_is_in_use_is_not_removed() {
        let kernel = Kernel::start(&[], &[]);
        let base = kernel.dir.path();
        fs::create_dir_all(base.join("run/qemu-server")).unwrap();
        fs::create_dir_all(base.join("proc/4711")).unwrap();
        fs::write(
            base.join("run/qemu-server/pci-id-reservations"),
            "0000:01:00.1 101 pid:4711\n",
        )
        .unwrap();
        fs::write(device(base, "0000:01:00.0").join("boot_vga"), "1\n").unwrap();
        let error = |address| {
            kernel
                .reset(&[address], DEADLINE)
                .0
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            error("0000:01:00.1"),
            "PCI 0000:01:00.1: not removed: VM 101 runs with it; use pci-reset --force to remove it anyway"
        );
        assert_eq!(
            error("0000:01:00.0"),
            "PCI 0000:01:00.0: not removed: it is the boot display; use pci-reset --force to remove it anyway"
        );
        assert!(kernel.log().is_empty());
    }
}
