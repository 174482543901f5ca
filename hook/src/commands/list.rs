//! `hook list`: the VMs that use hook, on this node and the others.

use pinfold_core::cli::Output;
use pinfold_core::cli::terminal::{print, print_json};
use pinfold_core::state::Store;
use pinfold_core::vm::{self, VmId};
use pinfold_core::{Exit, Host, Table};
use serde::Serialize;
use serde_json::json;

use super::check;
use crate::checks::script;
use crate::checks::shared_readings::SharedReadings;
use crate::settings::{self, Loaded, Method};
use crate::snippet;
use crate::state::reservation::{Isolation, Phase, Reservation};

/// A VM that uses hook.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(rename = "vm")]
    vmid: u32,
    node: Option<String>,
    /// The file of its settings.
    settings: Option<String>,
    /// How its CPUs are isolated, or would be.
    method: Option<&'static str>,
    state: &'static str,
    hookscript: Option<String>,
    /// The version of the hook that Proxmox VE calls.
    hook_version: Option<String>,
}

/// The command's whole run.
///
/// # Errors
/// If the state or the list of VMs cannot be read.
pub(crate) fn run(output: &Output) -> anyhow::Result<Exit> {
    let rows = rows(&output.root())?;
    if output.json {
        print_json(&json!({"vms": rows}))?;
        return Ok(Exit::Success);
    }
    let text = if rows.is_empty() {
        "no VM has settings or uses hook as its hookscript\n".to_owned()
    } else {
        let mut table = Table::new(&[
            "vmid",
            "node",
            "settings",
            "method",
            "state",
            "hookscript",
            "version",
        ]);
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        for row in rows {
            table.row([
                row.vmid.to_string(),
                or_dash(row.node),
                or_dash(row.settings),
                row.method.unwrap_or("-").to_owned(),
                row.state.to_owned(),
                or_dash(row.hookscript),
                or_dash(row.hook_version),
            ]);
        }
        table.to_text()
    };
    print(&text)?;
    Ok(Exit::Success)
}

fn rows(root: &Host) -> anyhow::Result<Vec<Row>> {
    let reserved = Store::<Reservation>::peek(root)?
        .unwrap_or_default()
        .reservations;
    let node = vm::node(root);
    let mut rows = Vec::new();
    for vmid in check::managed_vms(&SharedReadings::new(root))? {
        rows.push(row(root, vmid, node.clone(), reserved.get(&vmid.into()))?);
    }
    for guest in vm::guests(root) {
        let Some(other) = guest.node.filter(|_| !guest.is_here && !guest.is_container) else {
            continue;
        };
        let file = settings::file_on(root, &other, guest.vmid);
        let named = guest
            .hookscript
            .as_deref()
            .and_then(|it| it.rsplit('/').next());
        if file.is_none() && named != Some(snippet::NAME) {
            continue;
        }
        rows.push(Row {
            vmid: guest.vmid.into(),
            node: Some(other),
            settings: file.map(|file| file.display().to_string()),
            method: None,
            state: "on another node",
            hookscript: guest.hookscript,
            hook_version: None,
        });
    }
    Ok(rows)
}

fn row(
    root: &Host,
    vmid: VmId,
    node: Option<String>,
    reservation: Option<&Reservation>,
) -> anyhow::Result<Row> {
    let conf = vm::conf(root, vmid).ok();
    let threads = conf.as_ref().map_or(1, vm::VmConf::threads_per_core);
    let loaded = match settings::load(root, vmid, threads, &[]) {
        Ok(Loaded::Fenced(settings) | Loaded::Unfenced { settings, .. }) => Some(settings),
        Err(_) => None,
    };
    let method = match (reservation, &loaded) {
        (Some(reservation), _) if reservation.is_fenced() => Some(match reservation.isolation {
            Isolation::Hotplug => "hotplug",
            Isolation::Partition => "partition",
        }),
        (_, Some(settings)) => Some(match settings.method {
            Method::Hotplug => "hotplug",
            Method::Partition => "partition",
            Method::Auto => "auto",
        }),
        (_, None) => None,
    };
    let state = match reservation.map(|reservation| reservation.phase) {
        Some(Phase::Isolated) => "isolated",
        Some(Phase::Isolating) => "isolating",
        Some(Phase::Starting) => "starting",
        Some(Phase::Unfenced) => "without isolated CPUs",
        Some(Phase::Leaving) => "releasing",
        Some(Phase::Idle) => "released",
        None if vm::find(root, vmid)?.is_some() => "not isolated",
        None => "stopped",
    };
    let hookscript = conf.and_then(|conf| conf.hookscript);
    let own = settings::own_file(root, vmid).map(|file| file.display().to_string());
    Ok(Row {
        vmid: vmid.into(),
        node,
        settings: loaded.map(|settings| settings.source).or(own),
        method,
        state,
        hook_version: hookscript.as_ref().and_then(|volume| {
            let (_, path) = vm::snippet(root, volume)?;
            script::version(root, &path)
        }),
        hookscript,
    })
}
