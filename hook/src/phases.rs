//! The phases of a VM's life, as Proxmox VE calls them; see docs/design.md, "The phases".

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::unistd::Pid;
use pinfold_core::knob::PRESENT;
use pinfold_core::state::store::{self, Store};
use pinfold_core::sys::{cgroup, task};
use pinfold_core::vm::{self, Qemu, VmId};
use pinfold_core::{CpuSet, Exit, Host, Report, TaskId};

use crate::checks::required;
use crate::reconcile::Reconcile;
use crate::settings::{self, Deadlines, ResetPci, Settings};
use crate::state::reservation::{Isolation, Phase, Reservation};
use crate::state::step_times;
use crate::steps;

/// How often hook checks whether a QEMU has ended.
const EXIT_INTERVAL: Duration = Duration::from_millis(20);

/// The run state of a QEMU that was started only for a backup and will never run its guest.
const NEVER_RUNS: &str = "prelaunch";

/// One call of hook.
pub(crate) struct Run<'a> {
    /// The host.
    pub root: Host,
    /// The output for results.
    pub report: &'a mut Report,
}

/// Runs a phase. A failure in pre-start stops the VM's start; in the other phases PVE only warns.
/// What hook does not handle succeeds, so that it does not stop a start.
///
/// # Errors
/// If the phase could not do its work.
pub(crate) fn run(root: Host, report: Report, vmid: VmId, phase: &str) -> anyhow::Result<Exit> {
    // A full disk below the task log stops no VM.
    let mut report = report.for_log();
    if vm::is_container(&root, vmid) {
        report.note(&format!(
            "{vmid} is a container; only VMs have vCPUs to isolate, nothing to do"
        ));
        return Ok(report.finish());
    }
    let mut run = Run {
        root,
        report: &mut report,
    };
    match phase {
        "pre-start" => run.pre_start(vmid),
        "post-start" => run.post_start(vmid),
        // Not run when the guest powers itself off or QEMU dies: nothing may depend on it.
        "pre-stop" => Ok(report.finish()),
        "post-stop" => run.post_stop(vmid),
        other => {
            report.note(&format!(
                "{other:?} is not a phase that hook knows (pre-start, post-start, pre-stop, post-stop); nothing to do"
            ));
            Ok(report.finish())
        }
    }
}

impl Run<'_> {
    /// Before QEMU is started: checks everything that could fail later, because only this phase can
    /// stop the start. Then does what has to be done before QEMU takes its devices and memory.
    pub(crate) fn pre_start(&mut self, vmid: VmId) -> anyhow::Result<Exit> {
        let conf = vm::conf(&self.root, vmid)?;
        let deadlines = settings::deadlines(&self.root, vmid);
        self.use_deadlines(&deadlines);
        let mut store = self.open(&deadlines)?;
        self.drop_dead(&mut store, Some(vmid))?;
        // Under the lock: the kernel does not report the core and cache of a CPU that another hook
        // has taken offline.
        let settings = settings::load(&self.root, vmid, conf.threads_per_core())?;
        for note in required::before_start(&self.root, vmid, &conf, &settings)? {
            self.report.note(&note);
        }
        let isolation = self.reserve(store, vmid, &settings)?;
        // Without the lock: stopping the idle VM runs its own hook.
        let prepared = self.prepare(vmid, &settings, isolation);
        if prepared.is_err() {
            // No post-stop follows a start that this phase aborts.
            self.release(vmid, &settings.deadlines)
                .context("taking back the reservation")?;
        }
        prepared?;
        self.report.line(&format!(
            "CPU {} reserved for VM {vmid}, from {}",
            settings.isolated, settings.source
        ));
        Ok(self.report.finish())
    }

    fn reserve(
        &mut self,
        mut store: Store<Reservation>,
        vmid: VmId,
        settings: &Settings,
    ) -> anyhow::Result<Isolation> {
        required::no_overlap(&store.reservations, vmid, settings)?;
        let to_restart = idle_vm_to_restart(&store, vmid);
        let isolation = self.isolation(&store, vmid, settings, None)?;
        let reservation = Reservation {
            phase: Phase::Starting,
            isolation,
            settings: settings.clone(),
            qemu: None,
            starter: task(&self.root, Pid::parent()),
            idle_vm_stopped: match settings.idle_vm {
                Some(idle) => to_restart || steps::idle_vm_runs(&self.root, idle)?,
                None => false,
            },
        };
        store.reservations.insert(vmid.into(), reservation);
        store.save()?;
        Ok(isolation)
    }

    /// How the VM's CPUs are to be isolated; reported if the settings leave it open.
    fn isolation(
        &mut self,
        store: &Store<Reservation>,
        vmid: VmId,
        settings: &Settings,
        qemu: Option<&Qemu>,
    ) -> anyhow::Result<Isolation> {
        let (isolation, note) =
            required::isolation(&self.root, &store.reservations, vmid, settings, qemu)?;
        if let Some(note) = note {
            self.report.line(&note);
        }
        Ok(isolation)
    }

    fn prepare(
        &mut self,
        vmid: VmId,
        settings: &Settings,
        isolation: Isolation,
    ) -> anyhow::Result<()> {
        if isolation == Isolation::Partition {
            self.report.step("delegation");
            let change = cg_slice::partition::delegation(&self.root, vmid, PRESENT)?;
            self.report.changes(&pinfold_core::apply(
                &self.root,
                change.into_iter().collect(),
            ));
            ensure!(
                self.report.failures() == 0,
                "without delegation systemd would remove the partition"
            );
        }
        if let Some(idle) = settings.idle_vm {
            steps::stop_idle_vm(
                &self.root,
                self.report,
                idle,
                Duration::from_secs(settings.deadlines.idle_vm),
            )?;
        }
        let functions = match &settings.reset_pci {
            ResetPci::OfVm(false) => Vec::new(),
            ResetPci::OfVm(true) => pci_reset::functions_of_vm(&self.root, vmid)?,
            ResetPci::Listed(devices) => pci_reset::functions_of(&self.root, devices)?,
        };
        if !functions.is_empty() {
            let deadline = Duration::from_secs(settings.deadlines.pci);
            pci_reset::reset(&self.root, &functions, false, deadline, self.report)?;
        }
        if settings.tidy_caches {
            steps::tidy_caches(&self.root, self.report);
        }
        Ok(())
    }

    /// After QEMU has started: isolates its CPUs. On a VM that is isolated already it repairs what
    /// has changed and pins new threads.
    pub(crate) fn post_start(&mut self, vmid: VmId) -> anyhow::Result<Exit> {
        let qemu = vm::require_running(&self.root, vmid)?;
        self.fence_vm(vmid, Some(&qemu))?;
        Ok(self.report.finish())
    }

    /// What post-start does, without finishing the report. Only a plan may be made without a QEMU.
    /// Returns the VM's isolated CPUs.
    pub(crate) fn fence_vm(&mut self, vmid: VmId, qemu: Option<&Qemu>) -> anyhow::Result<CpuSet> {
        let task = qemu.map(|qemu| qemu.id);
        let deadlines = self.deadlines(vmid)?;
        self.use_deadlines(&deadlines);
        let mut store = self.open(&deadlines)?;
        self.drop_dead(&mut store, Some(vmid))?;
        let mut reservation = match store.reservations.get(&vmid.into()) {
            Some(claim)
                if claim.is_claim() && claim.qemu.is_none_or(|known| task == Some(known)) =>
            {
                claim.clone()
            }
            // pre-start did not run, or for an earlier QEMU: run its checks now.
            _ => {
                let conf = vm::conf(&self.root, vmid)?;
                let threads_per_core =
                    qemu.map_or_else(|| conf.threads_per_core(), |qemu| qemu.threads_per_core);
                let settings = settings::load(&self.root, vmid, threads_per_core)?;
                required::before_start(&self.root, vmid, &conf, &settings)?;
                required::no_overlap(&store.reservations, vmid, &settings)?;
                let isolation = self.isolation(&store, vmid, &settings, qemu)?;
                let idle_vm_stopped = idle_vm_to_restart(&store, vmid);
                Reservation {
                    phase: Phase::Starting,
                    isolation,
                    settings,
                    qemu: None,
                    starter: None,
                    idle_vm_stopped,
                }
            }
        };
        if let Some(qemu) = qemu {
            let threads = vm::threads(
                &self.root,
                qemu,
                Duration::from_secs(reservation.settings.deadlines.qmp),
            )?;
            if threads.status.as_deref() == Some(NEVER_RUNS) {
                self.give_back(&mut store, &[vmid], task)?;
                self.report.note(&format!(
                    "VM {vmid} is in state {NEVER_RUNS}, as for a backup: its guest will not run, nothing is isolated"
                ));
                return Ok(CpuSet::new());
            }
            // VMID.conf may have changed since pre-start read it, or lack what QEMU was started with.
            reservation
                .settings
                .fit_guest(&self.root, qemu.threads_per_core)?;
            let vcpus = threads.vcpus();
            required::pins_suffice(&reservation.settings, vcpus.len(), vcpus.last())?;
        }
        if reservation.phase == Phase::Starting {
            reservation.phase = Phase::Isolating;
        }
        reservation.qemu = task;
        let isolated = reservation.settings.isolated.clone();
        store.reservations.insert(vmid.into(), reservation);
        store.save()?;

        self.report
            .line(&format!("isolating CPU {isolated} for VM {vmid}"));
        self.fence(&mut store, vmid, qemu)?;
        Ok(isolated)
    }

    /// Isolates the CPUs of a VM that has a reservation with its QEMU in the store. If that fails,
    /// the VM keeps running on any CPUs and everything that was done is undone.
    fn fence(
        &mut self,
        store: &mut Store<Reservation>,
        vmid: VmId,
        qemu: Option<&Qemu>,
    ) -> anyhow::Result<()> {
        let earlier = self.report.steps().len();
        let whole = store
            .reservations
            .get(&vmid.into())
            .is_some_and(|claim| claim.phase == Phase::Isolating);
        let fenced = Reconcile::new(&self.root, store, self.report)
            .and_then(|mut reconcile| reconcile.isolate(vmid, qemu))
            .and_then(|()| match store.reservations.get_mut(&vmid.into()) {
                Some(reservation) if self.report.failures() == 0 => {
                    reservation.phase = Phase::Isolated;
                    store.save()
                }
                _ => Ok(()),
            });
        if self.root.dry_run() {
            return Ok(fenced?);
        }
        if let Err(cause) = &fenced {
            self.report.error(&cause.to_string());
        }
        if self.report.failures() > 0 {
            self.give_back(store, &[vmid], qemu.map(|qemu| qemu.id))?;
            self.report.finish();
            bail!("VM {vmid} runs without isolated CPUs: all changes have been undone");
        }
        if whole
            && let Err(error) = step_times::keep(store, vmid, &self.report.seconds()[earlier..])
        {
            // The VM has its CPUs; only `hook plan` will not know how long it took.
            self.report.note(&error.to_string());
        }
        Ok(())
    }

    /// After the VM has stopped: returns its CPUs to the host.
    pub(crate) fn post_stop(&mut self, vmid: VmId) -> anyhow::Result<Exit> {
        let Some(reservation) = self.peek(vmid)? else {
            return self.recover();
        };
        let deadlines = reservation.settings.deadlines;
        self.use_deadlines(&deadlines);
        if let Some(task) = &reservation.qemu {
            self.wait_for_exit(vmid, task, Duration::from_secs(deadlines.qemu_exit));
        }
        self.release(vmid, &deadlines)?;
        Ok(self.report.finish())
    }

    fn wait_for_exit(&mut self, vmid: VmId, task: &TaskId, deadline: Duration) {
        let until = Instant::now() + deadline;
        let own = cg_slice::decoupled_cgroup(vmid);
        // QEMU's helpers (swtpm) end a moment after it.
        let running = || {
            task::check_start(&self.root, task).is_ok()
                || cgroup::processes(&self.root, &own).is_ok_and(|pids| !pids.is_empty())
        };
        while running() {
            if Instant::now() >= until {
                self.report.note(&format!(
                    "VM {vmid}: one of its processes still runs after {} s",
                    deadline.as_secs()
                ));
                return;
            }
            std::thread::sleep(EXIT_INTERVAL);
        }
    }

    /// Drops a VM's reservation, settles the host for the remaining VMs, and starts its idle VM.
    fn release(&mut self, vmid: VmId, deadlines: &Deadlines) -> anyhow::Result<()> {
        let mut store = self.open(deadlines)?;
        let mut dropped = self.drop_dead(&mut store, Some(vmid))?;
        dropped.extend(self.give_back(&mut store, &[vmid], own_task(&self.root))?);
        for reservation in dropped
            .iter()
            .filter(|(id, reservation)| *id == vmid && reservation.is_fenced())
        {
            self.report.line(&format!(
                "CPU {} released by VM {vmid}",
                reservation.1.settings.isolated
            ));
        }
        self.start_idle(store, &dropped)
    }

    /// Drops the reservations of VMs that have stopped, and settles the host for the remaining VMs.
    pub(crate) fn recover(&mut self) -> anyhow::Result<Exit> {
        let deadlines = Deadlines::default();
        if Store::<Reservation>::peek(&self.root)?.is_none() {
            return Ok(self.report.finish());
        }
        let mut store = self.open(&deadlines)?;
        let mut dead = self.drop_dead(&mut store, None)?;
        // Under the lock no other hook runs: the hook of a half isolated VM was killed.
        let half: Vec<VmId> = (store.reservations.iter())
            .filter(|(_, reservation)| reservation.phase == Phase::Isolating)
            .filter_map(|(id, _)| VmId::try_from(*id).ok())
            .collect();
        for vmid in &half {
            if let Some(qemu) = vm::find(&self.root, *vmid)? {
                self.fence(&mut store, *vmid, Some(&qemu))?;
            }
        }
        if dead.is_empty() && half.is_empty() {
            self.give_back(&mut store, &[], None)?;
        }
        // The path unit does not see a pid file that is removed while its service runs.
        loop {
            let mut since = self.drop_dead(&mut store, None)?;
            // One with an idle VM stays in the state, and below --sysroot no process is known that
            // starts it.
            since.retain(|(vmid, ..)| dead.iter().all(|(known, ..)| known != vmid));
            if since.is_empty() {
                break;
            }
            dead.extend(since);
        }
        self.start_idle(store, &dead)?;
        Ok(self.report.finish())
    }

    /// Removes a state that cannot be trusted.
    pub(crate) fn discard(&mut self) -> anyhow::Result<Exit> {
        if store::discard(&self.root, Duration::from_secs(Deadlines::default().lock))? {
            self.report
                .note("removed the saved state; the host stays as it is now until the next boot");
        }
        Ok(self.report.finish())
    }

    /// A VM's reservation, read without the lock.
    fn peek(&self, vmid: VmId) -> anyhow::Result<Option<Reservation>> {
        Ok(Store::<Reservation>::peek(&self.root)?
            .and_then(|(mut reservations, _)| reservations.remove(&vmid.into())))
    }

    /// A VM's deadlines, as they were at its pre-start.
    fn deadlines(&self, vmid: VmId) -> anyhow::Result<Deadlines> {
        Ok(match self.peek(vmid)? {
            Some(reservation) => reservation.settings.deadlines,
            None => settings::deadlines(&self.root, vmid),
        })
    }

    /// Makes later calls to systemd keep these deadlines.
    fn use_deadlines(&mut self, deadlines: &Deadlines) {
        self.root = self.root.clone().with_session(deadlines.systemd_session());
    }

    fn open(&self, deadlines: &Deadlines) -> anyhow::Result<Store<Reservation>> {
        Ok(Store::open(
            &self.root,
            Duration::from_secs(deadlines.lock),
        )?)
    }

    /// Drops the reservations of VMs that have stopped, except that of `but`, which is in a phase.
    fn drop_dead(
        &mut self,
        store: &mut Store<Reservation>,
        but: Option<VmId>,
    ) -> anyhow::Result<Vec<Dropped>> {
        let mut dead = Vec::new();
        for (id, reservation) in &store.reservations {
            let vmid = VmId::try_from(*id)?;
            if reservation.is_alive(&self.root) || (but == Some(vmid) && reservation.is_claim()) {
                continue;
            }
            let note = if reservation.is_claim() {
                format!("VM {vmid} stopped without calling post-stop; releasing its CPUs")
            } else {
                format!("VM {vmid}: completing an interrupted post-stop")
            };
            self.report.note(&note);
            dead.push(vmid);
        }
        if dead.is_empty() {
            Ok(Vec::new())
        } else {
            self.give_back(store, &dead, own_task(&self.root))
        }
    }

    /// Drops the reservations of VMs that are `gone`, settles the host for the others, and returns
    /// the dropped ones. One with an idle VM to be started stays in the state until then
    /// ([`start_idle`](Self::start_idle)); once the process `until` has ended, any hook may start it.
    fn give_back(
        &mut self,
        store: &mut Store<Reservation>,
        gone: &[VmId],
        until: Option<TaskId>,
    ) -> anyhow::Result<Vec<Dropped>> {
        let mut dropped = Vec::new();
        for vmid in gone {
            if let Some(reservation) = store.reservations.get_mut(&(*vmid).into()) {
                dropped.push((*vmid, reservation.clone()));
                reservation.phase = Phase::Leaving;
            }
        }
        if !dropped.is_empty()
            && let Err(error) = store.save()
        {
            // A full disk must not keep hook from releasing CPUs.
            self.report.note(&error.to_string());
        }
        let mut reconcile = Reconcile::new(&self.root, store, self.report)?;
        reconcile.settle();
        for vmid in gone {
            reconcile.undo_vm(*vmid);
        }
        reconcile.forget(until)?;
        Ok(dropped)
    }

    /// Starts the idle VMs that were stopped for VMs that are gone; without the lock, because that
    /// runs their own hook.
    fn start_idle(&mut self, store: Store<Reservation>, dropped: &[Dropped]) -> anyhow::Result<()> {
        drop(store);
        let owed = || {
            dropped
                .iter()
                .filter(|(_, reservation)| reservation.idle_vm_stopped)
        };
        for (_, Reservation { settings, .. }) in owed() {
            let Some(idle) = settings.idle_vm else {
                continue;
            };
            let deadline = Duration::from_secs(settings.deadlines.idle_vm);
            // Tried once: hook cannot repair what keeps it from starting.
            if let Err(error) = steps::start_idle_vm(&self.root, self.report, idle, deadline) {
                self.report.error(&format!("{error:#}"));
            }
        }
        let Some((_, last)) = owed().next_back() else {
            return Ok(());
        };
        let mut store = self.open(&last.settings.deadlines)?;
        for (vmid, _) in owed() {
            if store
                .reservations
                .get(&(*vmid).into())
                .is_some_and(|reservation| reservation.phase == Phase::Idle)
            {
                store.reservations.remove(&(*vmid).into());
            }
        }
        store.save()?;
        Ok(())
    }
}

/// Whether an earlier hook has stopped the VM's idle VM and has not started it again yet.
fn idle_vm_to_restart(store: &Store<Reservation>, vmid: VmId) -> bool {
    store
        .reservations
        .get(&vmid.into())
        .is_some_and(|earlier| earlier.idle_vm_stopped)
}

/// A reservation as it was, with its VM.
type Dropped = (VmId, Reservation);

fn own_task(root: &Host) -> Option<TaskId> {
    task(root, Pid::this())
}

/// A process by pid and start time, so that a reused pid is not mistaken for it.
fn task(root: &Host, pid: Pid) -> Option<TaskId> {
    task::task(root, pid.as_raw(), pid.as_raw())
        .ok()
        .map(|task| task.id)
}
