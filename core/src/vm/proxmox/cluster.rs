//! The nodes of a cluster, and the guests of all of them.

use serde_json::Value;

use super::paths;
use crate::sysroot::Sysroot;
use crate::vm::id::VmId;

/// A VM or a container, on any node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// Its number.
    pub vmid: VmId,
    /// The node that has it; none if that is not known.
    pub node: Option<String>,
    /// Whether this node has it.
    pub is_here: bool,
    /// Whether it is a container.
    pub is_container: bool,
    /// Its name, or a container's host name.
    pub name: Option<String>,
    /// The volume of its hookscript.
    pub hookscript: Option<String>,
}

/// This node's name.
pub fn node(root: &Sysroot) -> Option<String> {
    let link = root.path(paths::NODE_FOLDER).read_link().ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}

/// The other nodes of the cluster, by name: its members, or if these are not known the nodes that have
/// a folder.
pub fn other_nodes(root: &Sysroot) -> Vec<String> {
    let here = node(root);
    let mut names: Vec<String> = match members(root)["nodelist"].as_object() {
        Some(nodes) => nodes.keys().cloned().collect(),
        None => root.names(paths::NODES).unwrap_or_default(),
    };
    names.retain(|name| here.as_ref() != Some(name) && is_name(name));
    names.sort_unstable();
    names
}

/// Whether a text can be the name of a node, and no path.
fn is_name(text: &str) -> bool {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-';
    !text.is_empty() && text.chars().all(is_part)
}

/// Whether high availability starts a VM, so that it may start on other nodes.
pub fn is_highly_available(root: &Sysroot, vmid: VmId) -> bool {
    let text = root.read(paths::HA_RESOURCES).unwrap_or_default();
    let named = text.lines().filter_map(|line| line.strip_prefix("vm:"));
    named.map(str::trim).any(|name| name == vmid.to_string())
}

/// The state of the cluster; null if there is none.
fn members(root: &Sysroot) -> Value {
    let text = root.read(paths::MEMBERS).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

/// Whether the cluster has no quorum, so that /etc/pve cannot be written. A node that is not in a
/// cluster always can.
pub fn lacks_quorum(root: &Sysroot) -> bool {
    members(root)["cluster"]["quorate"] == 0
}

/// The VMs and containers of all nodes; those whose settings cannot be read are left out.
pub fn guests(root: &Sysroot) -> Vec<Guest> {
    let here = node(root);
    let mut guests = Vec::new();
    for (folder, is_container) in [(paths::CONFS, false), (paths::CONTAINERS, true)] {
        guests.extend(guests_in(root, folder, here.as_deref(), true, is_container));
    }
    for name in root.names(paths::NODES).unwrap_or_default() {
        if here.as_ref() == Some(&name) {
            continue;
        }
        for (folder, is_container) in [("qemu-server", false), ("lxc", true)] {
            let folder = format!("{}/{name}/{folder}", paths::NODES);
            guests.extend(guests_in(root, &folder, Some(&name), false, is_container));
        }
    }
    guests.sort_by_key(|guest| (!guest.is_here, guest.node.clone(), guest.vmid));
    guests
}

fn guests_in(
    root: &Sysroot,
    folder: &str,
    node: Option<&str>,
    is_here: bool,
    is_container: bool,
) -> Vec<Guest> {
    let guest = |name: &String| {
        let vmid = name.strip_suffix(".conf")?.parse().ok()?;
        let text = root.read(format!("{folder}/{name}")).ok()?;
        Some(Guest {
            vmid,
            node: node.map(str::to_owned),
            is_here,
            is_container,
            name: value(&text, if is_container { "hostname" } else { "name" }),
            hookscript: value(&text, "hookscript"),
        })
    };
    let names = root.names(folder).unwrap_or_default();
    names.iter().filter_map(guest).collect()
}

/// The value of a key in a guest's settings, before the sections of its snapshots.
fn value(text: &str, key: &str) -> Option<String> {
    let now = text.lines().take_while(|line| !line.starts_with('['));
    let values = now.filter_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    values.last().map(|value| value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testutils::write;

    #[test]
    fn guests_of_all_nodes_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let root = Sysroot::new(folder.path());
        assert!(guests(&root).is_empty() && node(&root).is_none() && !lacks_quorum(&root));
        let hook = "name: a\nhookscript: local:snippets/hook\n[old]\nname: b\nhookscript: local:snippets/x\n";
        for (path, text) in [
            ("etc/pve/nodes/pve1/qemu-server/100.conf", hook),
            ("etc/pve/nodes/pve1/lxc/101.conf", "hostname: c\n"),
            ("etc/pve/nodes/pve2/qemu-server/102.conf", hook),
            ("etc/pve/nodes/pve2/qemu-server/note", hook),
            ("etc/pve/.members", "{\"cluster\": {\"quorate\": 0}}"),
        ] {
            write(folder.path(), path, text);
        }
        let link = |from: &str, to: &str| {
            std::os::unix::fs::symlink(from, folder.path().join(to)).unwrap();
        };
        link("nodes/pve1", "etc/pve/local");
        link("nodes/pve1/qemu-server", "etc/pve/qemu-server");
        link("nodes/pve1/lxc", "etc/pve/lxc");
        let shown: Vec<String> = guests(&root)
            .iter()
            .map(|guest| {
                let node = guest.node.as_deref().unwrap_or("-");
                let name = guest.name.as_deref().unwrap_or("-");
                let hookscript = guest.hookscript.as_deref().unwrap_or("-");
                let is_container = guest.is_container;
                format!("{} {node} {is_container} {name} {hookscript}", guest.vmid)
            })
            .collect();
        assert_eq!(
            shown,
            [
                "100 pve1 false a local:snippets/hook",
                "101 pve1 true c -",
                "102 pve2 false a local:snippets/hook"
            ]
        );
        assert!(lacks_quorum(&root));
        assert_eq!(other_nodes(&root), ["pve2"], "by the folders");
        write(
            folder.path(),
            "etc/pve/.members",
            "{\"cluster\": {\"quorate\": 1}}",
        );
        assert!(!lacks_quorum(&root));
    }

    #[test]
    fn other_nodes_are_the_members() {
        let folder = tempfile::tempdir().unwrap();
        let root = Sysroot::new(folder.path());
        assert!(other_nodes(&root).is_empty());
        // That of a node that has left the cluster.
        write(folder.path(), "etc/pve/nodes/gone/lxc/x", "");
        write(folder.path(), "etc/pve/nodes/pve1/lxc/x", "");
        let local = folder.path().join("etc/pve/local");
        std::os::unix::fs::symlink("nodes/pve1", local).unwrap();
        assert_eq!(other_nodes(&root), ["gone"]);
        for (members, nodes) in [
            (
                r#"{"nodelist": {"pve3": {"online": 0}, "pve1": {}, "pve2": {}}}"#,
                &["pve2", "pve3"][..],
            ),
            (
                r#"{"nodelist": {"pve1": {}, "..": {}, "a/b": {}, "": {}}}"#,
                &[],
            ),
            (r#"{"nodelist": []}"#, &["gone"]),
            ("garbage", &["gone"]),
        ] {
            write(folder.path(), "etc/pve/.members", members);
            assert_eq!(other_nodes(&root), nodes, "{members}");
        }
    }

    #[test]
    fn high_availability_names_its_guests() {
        let folder = tempfile::tempdir().unwrap();
        let root = Sysroot::new(folder.path());
        let is = |vmid: &str| is_highly_available(&root, vmid.parse().unwrap());
        assert!(!is("100"));
        let text = "ct: 101\n\tstate started\n\nvm: 100\n\tgroup x\n\tcomment vm: 103\n";
        write(folder.path(), "etc/pve/ha/resources.cfg", text);
        assert!(is("100") && !is("101") && !is("1000") && !is("103"));
    }
}
