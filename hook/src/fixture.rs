//! A made-up host for tests, with what hook keeps on it.

use std::fs;
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use pinfold_core::cli::Output;
use pinfold_core::state::Store;
use pinfold_core::sys::task;
use pinfold_core::vm::{self, VmId};
use pinfold_core::{Host, Knob, testutils};

use crate::settings;
use crate::state::reservation::{Isolation, Phase, Reservation};

/// What a command on a host gets that is to print errors only.
pub(crate) fn quiet(root: &Host) -> Output {
    Output {
        json: false,
        verbose: false,
        quiet: true,
        sysroot: root.path(""),
    }
}

/// core's made-up host, with settings and reservations.
pub(crate) struct MadeUpHost(testutils::MadeUpHost);

impl Deref for MadeUpHost {
    type Target = testutils::MadeUpHost;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl MadeUpHost {
    /// A host with a machine's CPUs and what every host has.
    pub(crate) fn new(machine: &str) -> Self {
        Self(testutils::MadeUpHost::new(machine))
    }

    /// A VM's settings, which only root may write.
    pub(crate) fn settings(&self, vmid: u32, text: &str) {
        let path = format!("etc/pinfold/{vmid}.toml");
        self.file(&path, text);
        self.mode(&path, 0o644);
    }

    /// Sets a file's mode.
    pub(crate) fn mode(&self, path: &str, mode: u32) {
        fs::set_permissions(self.root.path(path), fs::Permissions::from_mode(mode)).unwrap();
    }

    /// The state that hook has for a VM, with its threads' CPUs as those that hook has set.
    pub(crate) fn reserve(&self, vmid: u32, phase: Phase, settings: &str) {
        let mut store: Store<Reservation> =
            Store::open(&self.root, Duration::from_secs(1)).unwrap();
        let qemu = vm::find(&self.root, VmId::try_from(vmid).unwrap())
            .unwrap()
            .map(|qemu| qemu.id);
        let settings = settings::resolve(&self.root, settings, "test", 1).unwrap();
        for task in qemu
            .iter()
            .flat_map(|qemu| task::tasks(&self.root, qemu.pid).unwrap())
        {
            let found = task::affinity(&self.root, &task.id).unwrap();
            let object = pinfold_core::Setting::new(Knob::Thread(task.id), "", found.clone());
            store.baseline.plan(vec![object], |_, _| (&found).into());
        }
        let isolation = Isolation::Hotplug;
        let reservation = Reservation {
            qemu,
            ..Reservation::new(phase, isolation, settings)
        };
        store.reservations.insert(vmid, reservation);
        store.save().unwrap();
    }
}
