//! The guests' root images: built once per recipe and kept.

use crate::cache::{self, Cache};
use crate::guest::Guest;
use crate::progress::Progress;
use crate::{setup, tool};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What every guest has installed beside Debian's minimal set and its own packages.
const PACKAGES: &[&str] = &[
    "systemd",
    "systemd-sysv",
    "libpam-systemd",
    "udev",
    "dbus",
    "passwd",
    "util-linux",
    "kmod",
    "procps",
    "iproute2",
    "pciutils",
    "strace",
    "less",
    "irqbalance",
    // With the drivers that a cloud kernel lacks: acpi-cpufreq, kvm-amd, xhci.
    "linux-image-amd64",
    "lz4",
    "qemu-system-x86",
    "seabios",
];
const SIZE: &str = "3G";
const MIRROR: &str = "http://deb.debian.org/debian";
/// A build takes one to two minutes; a slow mirror may take many.
const BUILD_PATIENCE: Duration = Duration::from_secs(1800);

/// Hooks of mmdebstrap, in the order they run.
const HOOKS: [(&str, &str, &str); 3] = [
    (
        "essential",
        "initramfs.sh",
        include_str!("../image/initramfs.sh"),
    ),
    (
        "customize",
        "customize.sh",
        include_str!("../image/customize.sh"),
    ),
    ("customize", "pack.sh", include_str!("../image/pack.sh")),
];

/// A built image.
#[derive(Debug, Clone)]
pub struct Image {
    /// What it was made from.
    pub key: String,
    folder: PathBuf,
}

impl Image {
    /// The image of this guest: the kept one, or built now. Builders of the same image wait for one
    /// another.
    pub fn ensure(cache: &Cache, guest: Guest) -> Result<Self> {
        let recipe = HOOKS
            .map(|(_, _, text)| text)
            .into_iter()
            .chain(PACKAGES.iter().chain(guest.packages()).copied());
        let key = cache::key(
            recipe
                .chain([guest.image(), SIZE])
                .chain(guest.suites().iter().skip(1).copied()),
        );
        let name = guest.image();
        let folder = cache.path(format!("images/{name}-{key}"));
        let image = Self { key, folder };
        if !image.disk().exists() {
            let _builder = cache.lock(&format!("images/{name}.lock"), BUILD_PATIENCE)?;
            if !image.disk().exists() {
                setup::ensure(cache)?;
                let _progress = Progress::start(&format!("{name}: building its image"));
                image
                    .build(guest)
                    .with_context(|| format!("{guest}: cannot build its image"))?;
            }
        }
        Ok(image)
    }

    /// The root disk, to be overlaid.
    pub fn disk(&self) -> PathBuf {
        self.folder.join("root.qcow2")
    }

    /// The kernel it boots.
    pub fn kernel(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    /// The kernel's initial RAM disk.
    pub fn initrd(&self) -> PathBuf {
        self.folder.join("initrd")
    }

    fn build(&self, guest: Guest) -> Result<()> {
        cache::make(&self.folder)?;
        let mut command = tool::as_root("env")?;
        command.arg(format!(
            "PATH={}:/usr/sbin:/sbin",
            std::env::var("PATH").unwrap_or_default()
        ));
        command.args([
            &format!("OUT={}", self.folder.display()),
            &format!("SIZE={SIZE}"),
            "mmdebstrap",
        ]);
        command.args([
            "--quiet",
            "--mode=root",
            "--variant=minbase",
            "--format=null",
        ]);
        command.arg("--aptopt=APT::Install-Recommends \"false\"");
        command.arg(format!(
            "--include={}",
            [PACKAGES, guest.packages()].concat().join(",")
        ));
        for (phase, name, text) in HOOKS {
            let path = self.folder.join(name);
            cache::write(&path, text)?;
            make_executable(&path)?;
            command.arg(format!("--{phase}-hook={}", path.display()));
        }
        let mirror = std::env::var("PINFOLD_LAB_MIRROR").unwrap_or_else(|_| MIRROR.to_owned());
        let suites = guest.suites();
        let (Some(first), Some(last)) = (suites.first(), suites.last()) else {
            bail!("{guest}: no suite")
        };
        let pin = format!("Package: linux-*\nPin: release n={last}\nPin-Priority: 990\n");
        cache::write(&self.folder.join("kernel.pref"), pin)?;
        let pin = format!(
            "copy-in {}/kernel.pref /etc/apt/preferences.d",
            self.folder.display()
        );
        command
            .arg("--setup-hook=mkdir -p \"$1/etc/apt/preferences.d\"")
            .arg(format!("--setup-hook={pin}"));
        command.args([first, "/dev/null"]).args(
            suites
                .iter()
                .map(|suite| format!("deb {mirror} {suite} main")),
        );
        tool::run(&mut command)?;
        let own = format!("{}:{}", nix::unistd::getuid(), nix::unistd::getgid());
        tool::run(tool::as_root("chown")?.args(["-R", &own]).arg(&self.folder))?;
        let raw = self.folder.join("root.raw");
        let part = self.folder.join("root.part");
        tool::run(
            setup::command("qemu-img")
                .args(["convert", "-O", "qcow2"])
                .args([&raw, &part]),
        )?;
        fs::remove_file(&raw).with_context(|| format!("{}: cannot remove", raw.display()))?;
        // The last step, so that an image that exists is complete.
        fs::rename(&part, self.disk()).with_context(|| format!("{}: cannot rename", part.display()))
    }
}

fn make_executable(path: &Path) -> Result<()> {
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(path, mode)
        .with_context(|| format!("{}: cannot make executable", path.display()))
}
