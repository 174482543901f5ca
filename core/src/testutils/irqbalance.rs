//! A double of irqbalance.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::files;
use crate::cpuset::CpuSet;

/// An irqbalance that answers at its socket as irqbalance 1.9 does (irqbalance.c, `sock_handle`),
/// and uses what was set from its next round on.
#[derive(Debug, Clone)]
pub struct FakeIrqbalance {
    bans: Arc<Mutex<Bans>>,
}

#[derive(Debug, Default)]
struct Bans {
    default: CpuSet,
    set: Option<CpuSet>,
    in_use: CpuSet,
    commands: Vec<String>,
}

impl FakeIrqbalance {
    /// Starts one as process `pid` on the host in `root`; `banned` are the CPUs of its environment.
    ///
    /// # Panics
    /// If the socket cannot be made.
    pub fn start(root: &Path, pid: i32, banned: &str) -> Self {
        files::thread(root, pid, pid, "irqbalance", "0", 0);
        let folder = root.join("run/irqbalance");
        std::fs::create_dir_all(&folder).unwrap();
        let socket = folder.join(format!("irqbalance{pid}.sock"));
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(socket).unwrap();
        let banned = CpuSet::from_kernel_list(banned).unwrap();
        let fake = Self {
            bans: Arc::new(Mutex::new(Bans {
                default: banned.clone(),
                in_use: banned,
                ..Bans::default()
            })),
        };
        let served = fake.clone();
        std::thread::spawn(move || {
            for mut client in listener.incoming().flatten() {
                let mut command = [0; 500];
                let Ok(read) = client.read(&mut command) else {
                    continue;
                };
                let command = String::from_utf8_lossy(&command[..read]).into_owned();
                let answer = served.bans.lock().unwrap().answer(&command);
                let _ = client.write_all(answer.as_bytes());
            }
        });
        fake
    }

    /// Its next round: what was set is in use.
    ///
    /// # Panics
    /// If the double has panicked.
    pub fn round(&self) {
        let mut bans = self.bans.lock().unwrap();
        bans.in_use = bans.set.clone().unwrap_or_else(|| bans.default.clone());
    }

    /// The CPUs that it will ban in its next round.
    ///
    /// # Panics
    /// If the double has panicked.
    pub fn banned(&self) -> String {
        self.round();
        self.bans.lock().unwrap().in_use.to_string()
    }

    /// The commands that it was sent, without those that ask.
    ///
    /// # Panics
    /// If the double has panicked.
    pub fn commands(&self) -> Vec<String> {
        self.bans.lock().unwrap().commands.clone()
    }
}

impl Bans {
    fn answer(&mut self, command: &str) -> String {
        match command.strip_prefix("settings cpus ") {
            Some("NULL") => self.set = None,
            Some(list) => self.set = list.parse().ok(),
            None if command == "setup" => {
                return format!("SLEEP 10 BANNED {}", self.in_use.to_mask());
            }
            None => {}
        }
        self.commands.push(command.to_owned());
        String::new()
    }
}
