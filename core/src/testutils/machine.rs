//! Machines: a text file each, with a line per part, that is expanded to the files of sysfs that
//! describe it.
//!
//! ```text
//! present CPUS                 the present CPUs
//! offline CPUS                 those of them that are offline: without folders, and in no list
//! package ID CPUS              any ID may be -1, as the kernel has it for unknown
//! die ID CPUS
//! pairs CPUS +N                cores of two threads: each of these CPUs, and the one N further
//! single CPUS                  cores of one thread
//! cache LEVEL ID SIZE CPUS     a cache, shared by these; - for a value that is missing
//! private LEVEL SIZE CPUS      a cache of that level for each core of these; two for level 1
//! node ID CPUS
//! pmu NAME CPUS                as cpu_core and cpu_atom of hybrid machines
//! capacity N CPUS
//! maxfreq KHZ CPUS             cpufreq's cpuinfo_max_freq
//! file PATH TEXT               anything else
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::cpuset::CpuSet;

/// The captured machines, in core/tests/machines: name and text.
///
/// # Panics
/// If they cannot be read.
pub fn all() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/machines");
    let mut machines: Vec<(String, String)> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            (
                path.file_stem().unwrap().to_str().unwrap().to_owned(),
                fs::read_to_string(path).unwrap(),
            )
        })
        .collect();
    machines.sort();
    machines
}

/// The text of a captured machine.
///
/// # Panics
/// If there is no such machine.
pub fn text(machine: &str) -> String {
    let (_, text) = all().into_iter().find(|(name, _)| name == machine).unwrap();
    text
}

/// Writes a machine's files below `root`.
///
/// # Panics
/// If `text` has a line that is not one of those above, or a file cannot be written.
pub fn expand(text: &str, root: &Path) {
    let mut files: BTreeMap<PathBuf, String> = BTreeMap::new();
    let mut present = CpuSet::new();
    let mut online = CpuSet::new();
    let mut cores: Vec<CpuSet> = Vec::new();
    let mut caches = BTreeMap::new();
    let mut add_cache = |files: &mut BTreeMap<_, _>,
                         level: &str,
                         id: &str,
                         size: &str,
                         kind: &str,
                         cpus: &CpuSet| {
        let list = cpus.to_string();
        let attributes = [
            ("level", level),
            ("id", id),
            ("size", size),
            ("type", kind),
            ("shared_cpu_list", list.as_str()),
        ];
        for cpu in cpus.iter() {
            let index = caches.entry(cpu).or_insert(0);
            for (file, value) in attributes.into_iter().filter(|(_, value)| *value != "-") {
                files.insert(
                    cpu_file(cpu, &format!("cache/index{index}/{file}")),
                    value.to_owned(),
                );
            }
            *index += 1;
        }
    };
    for line in text
        .lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
    {
        let words: Vec<&str> = line.split_whitespace().collect();
        let online_of = |word: usize| &words[word].parse::<CpuSet>().unwrap() & &online;
        match words[0] {
            "present" => {
                present = words[1].parse().unwrap();
                online = present.clone();
            }
            "offline" => online = &online - &words[1].parse().unwrap(),
            "package" => {
                let cpus = online_of(2);
                place(&mut files, "physical_package_id", words[1], &cpus);
                place(&mut files, "package_cpus_list", &cpus.to_string(), &cpus);
            }
            "die" => place(&mut files, "die_id", words[1], &online_of(2)),
            "pairs" => {
                let apart: usize = words[2].trim_start_matches('+').parse().unwrap();
                let pair = |cpu| &[cpu, cpu + apart].into_iter().collect::<CpuSet>() & &online;
                cores.extend(
                    words[1]
                        .parse::<CpuSet>()
                        .unwrap()
                        .iter()
                        .map(pair)
                        .filter(|core| !core.is_empty()),
                );
            }
            "single" => cores.extend(online_of(1).iter().map(|cpu| [cpu].into_iter().collect())),
            "cache" => add_cache(
                &mut files,
                words[1],
                words[2],
                words[3],
                "Unified",
                &online_of(4),
            ),
            "private" => {
                let cpus = online_of(3);
                let kinds = if words[1] == "1" {
                    &["Data", "Instruction"][..]
                } else {
                    &["Unified"]
                };
                for core in cores.iter().filter(|core| core.is_subset(&cpus)) {
                    let id = core.first().unwrap().to_string();
                    for kind in kinds {
                        add_cache(&mut files, words[1], &id, words[2], kind, core);
                    }
                }
            }
            "node" => {
                let file = format!("sys/devices/system/node/node{}/cpulist", words[1]);
                files.insert(file.into(), online_of(2).to_string());
            }
            "pmu" => {
                let file = format!("sys/devices/{}/cpus", words[1]);
                files.insert(file.into(), online_of(2).to_string());
            }
            "capacity" => {
                for cpu in online_of(2).iter() {
                    files.insert(cpu_file(cpu, "cpu_capacity"), words[1].into());
                }
            }
            "maxfreq" => {
                for cpu in online_of(2).iter() {
                    files.insert(cpu_file(cpu, "cpufreq/cpuinfo_max_freq"), words[1].into());
                }
            }
            "file" => {
                files.insert(words[1].into(), words[2..].join(" "));
            }
            other => panic!("{other}: unknown line"),
        }
    }
    for core in &cores {
        place(&mut files, "thread_siblings_list", &core.to_string(), core);
    }
    files.insert("sys/devices/system/cpu/present".into(), present.to_string());
    files.insert("sys/devices/system/cpu/online".into(), online.to_string());
    let mut folder = PathBuf::new();
    for (path, value) in files {
        let path = root.join(path);
        if path.parent() != Some(&folder) {
            folder = path.parent().unwrap().to_owned();
            fs::create_dir_all(&folder).unwrap();
        }
        fs::write(path, value + "\n").unwrap();
    }
}

fn cpu_file(cpu: usize, file: &str) -> PathBuf {
    format!("sys/devices/system/cpu/cpu{cpu}/{file}").into()
}

fn place(files: &mut BTreeMap<PathBuf, String>, file: &str, value: &str, cpus: &CpuSet) {
    for cpu in cpus.iter() {
        let path = cpu_file(cpu, &format!("topology/{file}"));
        files.insert(path, value.to_owned());
    }
}
