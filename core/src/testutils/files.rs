//! Files of a host, written below a folder.

use std::fs;
use std::path::Path;

/// Writes a file and makes the folders it is in.
///
/// # Panics
/// If that fails.
pub fn write(base: &Path, path: &str, text: &str) {
    let path = base.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

/// VMID.conf of a VM.
pub fn vm_conf(base: &Path, vmid: u32, text: &str) {
    let path = format!("etc/pve/qemu-server/{vmid}.conf");
    write(base, &path, text);
}

/// VMID.conf of a container.
pub fn container_conf(base: &Path, vmid: u32, text: &str) {
    write(base, &format!("etc/pve/lxc/{vmid}.conf"), text);
}

/// A thread that was started 42 ticks after boot and may run on these CPUs; that of a process, too,
/// if `pid` and `tid` are equal. `flags` are the kernel's `PF_*`.
pub fn thread(base: &Path, pid: i32, tid: i32, name: &str, cpus: &str, flags: u32) {
    let stat = format!(
        "{tid} ({name}) S 1 0 0 0 -1 {flags} 0 0 0 0 0 5 0 0 20 0 1 0 42 0 0 \
         18446744073709551615 0 0 0 0 0 0 0 2147483647 0 0 0 0 17 9 0 0 0 0 0 0 0 0 0 0 0 0 0\n"
    );
    let folder = format!("proc/{pid}/task/{tid}");
    write(base, &format!("{folder}/stat"), &stat);
    let status = format!("Name:\t{name}\nCpus_allowed_list:\t{cpus}\n");
    write(base, &format!("{folder}/status"), &status);
    if pid == tid {
        write(base, &format!("proc/{pid}/stat"), &stat);
    }
}
