//! A VM in the lab host, as Proxmox VE's `VMID.conf` describes it.

use std::fmt::Write;

/// What stands in `/etc/pve/qemu-server/VMID.conf`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmSpec {
    /// The VMID.
    pub id: u32,
    /// Its name; QEMU's first argument after `-name`.
    pub name: String,
    /// Virtual sockets.
    pub sockets: u32,
    /// Cores of each socket.
    pub cores: u32,
    /// vCPUs plugged in at the start; none means all of sockets × cores.
    pub vcpus: Option<u32>,
    /// Memory in MiB.
    pub memory: u32,
    /// Disks with an iothread of their own.
    pub iothreads: u32,
    /// With a helper process beside QEMU, as swtpm is.
    pub tpm: bool,
    /// vCPU 0 computes, as SeaBIOS has it when it finds nothing to boot; else all vCPUs halt at
    /// once, and the lab is faster.
    pub busy: bool,
    /// `local:snippets/NAME`, or an absolute path.
    pub hookscript: Option<String>,
    /// CPUs for the whole process, as PVE's own `affinity:` has it.
    pub affinity: Option<String>,
    /// More lines, such as `hostpci0: …` or a snapshot section.
    pub more: String,
}

impl VmSpec {
    /// A small idle VM with 12 vCPUs and two iothreads.
    pub fn new(id: u32) -> Self {
        Self {
            id,
            name: format!("vm{id}"),
            sockets: 1,
            cores: 12,
            vcpus: None,
            memory: 64,
            iothreads: 2,
            tpm: false,
            busy: false,
            hookscript: None,
            affinity: None,
            more: String::new(),
        }
    }

    /// The path of its description.
    pub fn conf_path(&self) -> String {
        format!("/etc/pve/qemu-server/{}.conf", self.id)
    }

    /// The text of its description.
    pub fn conf(&self) -> String {
        let Self {
            name,
            sockets,
            cores,
            memory,
            ..
        } = self;
        let mut conf = format!(
            "name: {name}\nsockets: {sockets}\ncores: {cores}\nmemory: {memory}\nscsihw: virtio-scsi-single\n"
        );
        let optional = [
            ("bios", (!self.busy).then(|| "halt".to_owned())),
            ("vcpus", self.vcpus.map(|n| n.to_string())),
            ("hookscript", self.hookscript.clone()),
            ("affinity", self.affinity.clone()),
            (
                "tpmstate0",
                self.tpm.then(|| {
                    format!(
                        "local:{}/vm-{}-tpm.raw,size=4M,version=v2.0",
                        self.id, self.id
                    )
                }),
            ),
        ];
        let disks = (0..self.iothreads).map(|n| {
            (
                format!("scsi{n}"),
                format!("local:{0}/vm-{0}-disk-{n}.raw,iothread=1,size=1G", self.id),
            )
        });
        let lines = optional
            .into_iter()
            .filter_map(|(key, value)| Some((key.to_owned(), value?)))
            .chain(disks);
        for (key, value) in lines {
            // Writing to a String cannot fail.
            let _ = writeln!(conf, "{key}: {value}");
        }
        conf + &self.more
    }
}
