//! Whether the other nodes of the cluster have what a VM needs to start there: hook in its storage,
//! and settings. Only what /etc/pve has can be seen.

use std::collections::BTreeMap;

use pinfold_core::Host;
use pinfold_core::vm::{self, Storage, VmConf, VmId};

use super::finding::Finding;
use super::script;
use crate::settings;

const CHECK: &str = "other nodes";

/// What can be seen of something on another node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Seen {
    /// It is there.
    Yes(String),
    /// It cannot be seen, for this reason.
    Unknown(String),
}

/// The findings about the other nodes; none if there are none, or if hook is not the VM's hookscript.
pub(crate) fn findings(root: &Host, vmid: VmId, conf: &VmConf) -> Vec<Finding> {
    let nodes = vm::other_nodes(root);
    let Some(volume) = conf.hookscript.as_deref().filter(|_| !nodes.is_empty()) else {
        return Vec::new();
    };
    let in_storage = vm::snippet(root, volume);
    let is_hook = match &in_storage {
        Some((_, path)) => script::is_hook(root, path) || script::is_hook_by_name(volume),
        None => script::is_hook_by_name(volume),
    };
    if !is_hook || conf.template {
        return Vec::new();
    }
    let storage = in_storage.as_ref().map(|(storage, _)| storage);
    let lacks = |node: &&String| storage.is_some_and(|storage| !storage.is_on(node));
    let (lacking, having): (Vec<&String>, Vec<&String>) = nodes.iter().partition(lacks);
    let mut findings = Vec::new();
    if let Some(storage) = storage.filter(|_| !lacking.is_empty()) {
        findings.extend(not_on(vmid, storage, &lacking));
    }
    let script = script_on(root, volume, in_storage.as_ref());
    let mut alike: BTreeMap<Seen, Vec<&str>> = BTreeMap::new();
    for node in having {
        let settings = match settings::any_file_on(root, node, vmid) {
            Some(file) => Seen::Yes(file.display().to_string()),
            None => Seen::Unknown("settings in /etc/pinfold are local to each node".to_owned()),
        };
        alike.entry(settings).or_default().push(node);
    }
    for (settings, nodes) in alike {
        findings.push(seen_on(root, vmid, &nodes, &script, &settings));
    }
    findings
}

/// That the hookscript's storage is not on some nodes; nothing if it is not on this one either.
fn not_on(vmid: VmId, storage: &Storage, lacking: &[&String]) -> Option<Finding> {
    // A storage that is switched off is on no node.
    let is_limited = !storage.nodes.is_empty() && storage.nodes.iter().any(|it| storage.is_on(it));
    let names: Vec<&str> = lacking.iter().map(|node| node.as_str()).collect();
    let all: Vec<&str> = storage.nodes.iter().map(String::as_str).collect();
    let finding = || {
        Finding::warn(
            CHECK,
            format!(
                "storage {} is not on {}: VM {vmid} cannot start there",
                storage.id,
                names.join(", ")
            ),
            format!(
                "pvesm set {} --nodes {}",
                storage.id,
                [all, names.clone()].concat().join(",")
            ),
        )
    };
    is_limited.then(finding)
}

/// What can be seen of the hookscript on nodes that have its storage.
fn script_on(root: &Host, volume: &str, in_storage: Option<&(Storage, String)>) -> Seen {
    let Some((storage, path)) = in_storage else {
        return Seen::Unknown(format!("the storage of {volume} is unknown"));
    };
    if !storage.shared {
        return Seen::Unknown(format!("storage {} is not shared", storage.id));
    }
    match root.path(path).read_link() {
        Ok(target) if target.is_absolute() => Seen::Unknown(format!(
            "{volume} is a link to {}, which is local to each node",
            target.display()
        )),
        _ => Seen::Yes(volume.to_owned()),
    }
}

fn seen_on(root: &Host, vmid: VmId, nodes: &[&str], script: &Seen, settings: &Seen) -> Finding {
    let names = nodes.join(", ");
    let has = if nodes.len() == 1 { "has" } else { "have" };
    let (mut known, mut unknown) = (Vec::new(), Vec::new());
    for seen in [script, settings] {
        match seen {
            Seen::Yes(what) => known.push(what.as_str()),
            Seen::Unknown(why) => unknown.push(why.as_str()),
        }
    }
    if unknown.is_empty() {
        return Finding::ok(CHECK, format!("{names} {has} {}", known.join(" and ")));
    }
    let what = match (script, settings) {
        (Seen::Unknown(_), Seen::Unknown(_)) => "hook and settings",
        (Seen::Unknown(_), _) => "hook",
        _ => "settings",
    };
    let unseen = format!(
        "whether {names} {has} {what} cannot be seen from here: {}",
        unknown.join(", and ")
    );
    if !vm::is_highly_available(root, vmid) {
        return Finding::ok(CHECK, unseen);
    }
    let shared = format!("/{}/pinfold/{vmid}.toml", vm::SHARED_FOLDER);
    let fix = match settings {
        Seen::Unknown(_) => {
            format!("on each: `hook list`, `hook install`; settings for all nodes go to {shared}")
        }
        Seen::Yes(_) => "on each: `hook list`, `hook install`".to_owned(),
    };
    Finding::warn(
        CHECK,
        format!("{unseen}; high availability may start the VM there, which fails without"),
        fix,
    )
}
