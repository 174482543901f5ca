//! What guests see of their CPUs: what the order of pins relies on (docs/design.md, "The order of pins").

use pinfold_lab::Guest;
use pinfold_lab::inside::{Cpu, look};

/// As Proxmox VE and `args: -smp ...` start QEMU: six cores of two threads.
const SMT: [&str; 2] = ["-smp", "12,sockets=1,cores=6,threads=2,maxcpus=12"];

fn cpu(cpu: usize, core: usize, socket: usize, node: usize) -> Cpu {
    Cpu {
        cpu,
        core,
        socket,
        node,
    }
}

/// vCPUs 0 and 1 are the threads of the first core, and so on.
#[test]
fn siblings_of_an_intel_guest() {
    let model = ["-cpu", "Skylake-Client"];
    let expected: Vec<Cpu> = (0..12).map(|n| cpu(n, n / 2, 0, 0)).collect();
    for guest in [Guest::Trixie, Guest::Bookworm] {
        let view = look(guest, &[model, SMT].concat()).unwrap();
        assert_eq!(view.cpus, expected, "{guest}");
        assert!(
            !view.warnings.contains("hyperthreading"),
            "{}",
            view.warnings
        );
    }
}

/// Each cell has the vCPUs that `numaN: cpus=` names, and the siblings of a core are in one.
#[test]
fn cells_of_a_guest_with_two_nodes() {
    let options = [
        "-cpu",
        "Skylake-Client",
        "-smp",
        "8,sockets=2,cores=2,threads=2,maxcpus=8",
        "-object",
        "memory-backend-ram,id=ram-node0,size=512M",
        "-numa",
        "node,nodeid=0,cpus=0-3,memdev=ram-node0",
        "-object",
        "memory-backend-ram,id=ram-node1,size=512M",
        "-numa",
        "node,nodeid=1,cpus=4-7,memdev=ram-node1",
    ];
    let view = look(Guest::Trixie, &options).unwrap();
    let expected: Vec<Cpu> = (0..8).map(|n| cpu(n, n / 2, n / 4, n / 4)).collect();
    assert_eq!(view.cpus, expected);
}

/// QEMU does not turn topoext on by itself, and warns; a guest with Linux 6.1 then sees a core for each vCPU. (6.12 reads
/// leaf 0xb on AMD as well and sees the threads; TCG has no topoext, so only AMD hardware can show a guest that has it.)
#[test]
fn threads_of_an_amd_guest_without_topoext() {
    let options = [["-cpu", "EPYC-v1,-topoext"], SMT].concat();
    let view = look(Guest::Bookworm, &options).unwrap();
    let one_each: Vec<Cpu> = (0..12).map(|n| cpu(n, n, 0, 0)).collect();
    assert_eq!(view.cpus, one_each);
    assert!(
        view.warnings.contains("doesn't support hyperthreading(2)")
            && view.warnings.contains("try enabling topoext feature"),
        "{}",
        view.warnings
    );
    let newer = look(Guest::Trixie, &options).unwrap();
    let pairs: Vec<Cpu> = (0..12).map(|n| cpu(n, n / 2, 0, 0)).collect();
    assert_eq!(newer.cpus, pairs);
}
