//! Installs what the lab needs.

use crate::cache::{self, Cache};
use crate::tool;
use anyhow::{Context, Result, bail};
use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Programs that the lab and `make fuzz` run, each with the Debian package it comes from.
const PROGRAMS: [(&str, &str); 9] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("mmdebstrap", "mmdebstrap"),
    ("iasl", "acpica-tools"),
    ("mke2fs", "e2fsprogs"),
    ("setsid", "util-linux"),
    ("cp", "coreutils"),
    ("tar", "tar"),
    // For libFuzzer, which is C++.
    ("c++", "g++"),
];
/// The keys that sign the guests' packages.
const KEYRING: (&str, &str) = (
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "debian-archive-keyring",
);
/// Sources for a Debian 12 machine, which has QEMU 7.2: used for this one call, not left behind.
const BACKPORTS: [&str; 3] = ["bookworm", "bookworm-updates", "bookworm-backports"];

/// Installs the packages that are missing; fast and without root when there are none.
/// Returns their names.
pub fn ensure(cache: &Cache) -> Result<Vec<&'static str>> {
    let _one_at_a_time = cache.lock("setup.lock", Duration::from_secs(900))?;
    let missing = missing();
    if missing.is_empty() {
        return Ok(missing);
    }
    let needed = || format!("the lab needs the packages {}", missing.join(" "));
    install(cache, &missing).with_context(needed)?;
    match self::missing().as_slice() {
        [] => Ok(missing),
        still => bail!(
            "the lab needs the packages {}: apt-get installed them, but their programs are not on PATH",
            still.join(" ")
        ),
    }
}

fn missing() -> Vec<&'static str> {
    let programs = PROGRAMS
        .iter()
        .filter(|(program, _)| !on_path(program))
        .map(|(_, package)| *package);
    let keyring = (!Path::new(KEYRING.0).exists()).then_some(KEYRING.1);
    programs.chain(keyring).collect()
}

/// Searches also the folders of root's programs, which an ordinary user's PATH lacks.
fn on_path(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(Into::into);
    env::split_paths(&path)
        .chain(system)
        .any(|folder| folder.join(program).is_file())
}

fn install(cache: &Cache, packages: &[&str]) -> Result<()> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    if release
        .lines()
        .any(|line| line == "VERSION_CODENAME=bookworm")
        && from_backports(cache, packages).is_ok()
    {
        return Ok(());
    }
    apt(&[], &["update".to_owned()])?;
    apt(&[], &install_words(packages, &[]))
}

fn from_backports(cache: &Cache, packages: &[&str]) -> Result<()> {
    let folder = cache.path("apt");
    cache::make(&folder.join("lists/partial"))?;
    let sources = BACKPORTS.map(|suite| {
        format!(
            "deb [signed-by={}] http://deb.debian.org/debian {suite} main\n",
            KEYRING.0
        )
    });
    cache::write(&folder.join("sources.list"), sources.concat())?;
    let folder = folder.display();
    let options = [
        format!("-oDir::Etc::SourceList={folder}/sources.list"),
        "-oDir::Etc::SourceParts=/dev/null".to_owned(),
        format!("-oDir::State::Lists={folder}/lists"),
        "-oDir::Cache::pkgcache=".to_owned(),
        "-oDir::Cache::srcpkgcache=".to_owned(),
        // The cache may lie in a home that apt's own user may not enter.
        "-oAPT::Sandbox::User=root".to_owned(),
    ];
    apt(&options, &["update".to_owned()])?;
    apt(
        &options,
        &install_words(packages, &["qemu-system-x86", "qemu-utils"]),
    )
}

/// `install` and its arguments; of the packages, those in `backported` are taken from backports.
fn install_words(packages: &[&str], backported: &[&str]) -> Vec<String> {
    let from = |package: &&str| {
        if backported.contains(package) {
            format!("{package}/bookworm-backports")
        } else {
            (*package).to_owned()
        }
    };
    let words = ["install", "-y", "--no-install-recommends"].map(str::to_owned);
    let target = (!backported.is_empty()).then(|| "-tbookworm-backports".to_owned());
    words
        .into_iter()
        .chain(target)
        .chain(packages.iter().map(from))
        .collect()
}

fn apt(options: &[String], words: &[String]) -> Result<()> {
    let mut command = tool::as_root("env")?;
    command.args([
        "DEBIAN_FRONTEND=noninteractive",
        "apt-get",
        "-qq",
        "-oDPkg::Lock::Timeout=300",
    ]);
    tool::run(command.args(options).args(words))?;
    Ok(())
}

/// A command with root's programs in PATH too.
pub fn command(program: &str) -> Command {
    let path = env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program);
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_qemu_comes_from_backports() {
        let words = install_words(&["qemu-utils", "mmdebstrap"], &["qemu-utils"]);
        let wanted = "install -y --no-install-recommends -tbookworm-backports qemu-utils/bookworm-backports mmdebstrap";
        assert_eq!(words.join(" "), wanted);
        assert_eq!(
            install_words(&["tar"], &[]).join(" "),
            "install -y --no-install-recommends tar"
        );
    }
}
