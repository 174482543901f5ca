//! Captured machines with devices and VMs, for the map of `hook layout` and `hook init`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use pinfold_core::testutils::{machine, vm_conf, write};

/// A machine with devices and VMs.
pub(crate) struct Drawn {
    /// Its name among the captured machines.
    pub(crate) machine: &'static str,
    /// PCI functions: address, class and NUMA node.
    devices: &'static [(&'static str, u32, i32)],
    /// VMID.conf by VM.
    vms: &'static [(u32, &'static str)],
    /// The settings of some of them.
    settings: &'static [(u32, &'static str)],
    /// What is in the picture in docs/, if there is one.
    #[allow(dead_code)]
    pub(crate) picture: Option<&'static str>,
}

const GPU: u32 = 0x03_0000;
const DISPLAY: u32 = 0x03_8000;
const AUDIO: u32 = 0x04_0300;
const NVME: u32 = 0x01_0802;
const SATA: u32 = 0x01_0601;
const NETWORK: u32 = 0x02_0000;
const WIRELESS: u32 = 0x02_8000;
const USB: u32 = 0x0c_0330;
const BRIDGE: u32 = 0x06_0400;

pub(crate) const DRAWN: &[Drawn] = &[
    Drawn {
        machine: "5900x",
        devices: &[],
        vms: &[
            (100, "cores: 6\n"),
            (101, "cores: 4\naffinity: 2-3,14-15\n"),
        ],
        settings: &[(100, "isolated = \"llc:1\"\npins = \"auto\"\n")],
        picture: None,
    },
    Drawn {
        machine: "7950x3d",
        devices: &[
            ("0000:00:01.1", BRIDGE, -1),
            ("0000:01:00.0", GPU, -1),
            ("0000:01:00.1", AUDIO, -1),
            ("0000:02:00.0", NVME, -1),
            ("0000:05:00.0", NETWORK, -1),
            ("0000:06:00.0", WIRELESS, -1),
            ("0000:0c:00.0", USB, -1),
            ("0000:0e:00.0", SATA, -1),
            ("0000:10:00.0", DISPLAY, -1),
            ("0000:10:00.3", USB, -1),
        ],
        vms: &[
            (
                100,
                "cores: 14\nargs: -cpu host,topoext=on -smp 14,sockets=1,cores=7,threads=2,maxcpus=14\n\
                 hostpci0: 0000:01:00,pcie=1\n",
            ),
            (101, "cores: 4\nhookscript: local:snippets/hook\n"),
        ],
        settings: &[(101, "isolated = \"12-15,28-31\"\npins = \"auto\"\n")],
        picture: Some("init 100 --vcache --map"),
    },
    Drawn {
        machine: "13900k",
        devices: &[
            ("0000:00:02.0", GPU, -1),
            ("0000:00:14.0", USB, -1),
            ("0000:01:00.0", GPU, -1),
            ("0000:02:00.0", NVME, -1),
            ("0000:04:00.0", NETWORK, -1),
        ],
        vms: &[
            (
                100,
                "cores: 12\nargs: -smp 12,sockets=1,cores=6,threads=2,maxcpus=12\nhostpci0: 0000:01:00,pcie=1\n",
            ),
            (101, "cores: 8\n"),
            (102, "cores: 2\naffinity: 24-25\n"),
        ],
        settings: &[(101, "isolated = \"16-23\"\npins = \"auto\"\n")],
        picture: Some("init 100 --map"),
    },
    Drawn {
        machine: "epyc2x7313",
        devices: &[
            ("0000:01:00.0", NVME, 0),
            ("0000:02:00.0", NVME, 0),
            ("0000:41:00.0", NETWORK, 0),
            ("0000:41:00.1", NETWORK, 0),
            ("0000:81:00.0", GPU, 1),
            ("0000:82:00.0", GPU, 1),
            ("0000:c1:00.0", NVME, 1),
            ("0001:01:00.0", USB, -1),
        ],
        vms: &[
            (
                100,
                "cores: 8\ncpu: EPYC-Milan\nargs: -smp 8,sockets=1,cores=4,threads=2,maxcpus=8\n\
                 memory: 32768\nnuma: 1\nnuma0: cpus=0-7,hostnodes=1,memory=32768,policy=bind\n\
                 hostpci0: 0000:81:00,pcie=1\n",
            ),
            (101, "cores: 4\n"),
        ],
        settings: &[(101, "isolated = \"llc:4\"\npins = \"auto\"\n")],
        picture: Some("init 100 --map"),
    },
    Drawn {
        machine: "512-cpus",
        devices: &[("0000:81:00.0", GPU, 1)],
        vms: &[(100, "cores: 12\nhostpci0: 0000:81:00,pcie=1\n")],
        settings: &[],
        picture: None,
    },
    Drawn {
        machine: "dgx-gb10",
        devices: &[("000f:01:00.0", GPU, -1), ("0004:01:00.0", NVME, -1)],
        vms: &[(100, "cores: 8\n")],
        settings: &[],
        picture: None,
    },
];

impl Drawn {
    /// Makes it, below a folder.
    pub(crate) fn make(&self, root: &Path) {
        machine::expand(&machine::text(self.machine), root);
        for (address, class, node) in self.devices {
            let file = |name: &str| format!("sys/bus/pci/devices/{address}/{name}");
            write(root, &file("class"), &format!("{class:#08x}\n"));
            write(root, &file("vendor"), "0x1002\n");
            write(root, &file("device"), "0x744c\n");
            write(root, &file("numa_node"), &format!("{node}\n"));
        }
        for (vmid, conf) in self.vms {
            vm_conf(root, *vmid, conf);
        }
        for (vmid, text) in self.settings {
            let path = format!("etc/pinfold/{vmid}.toml");
            write(root, &path, text);
            fs::set_permissions(root.join(path), fs::Permissions::from_mode(0o644)).unwrap();
        }
    }
}
