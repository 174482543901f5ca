//! The custom CPU models of a cluster.

use super::paths;
use crate::sysroot::Sysroot;

/// The flags of a custom CPU model, by the name without `custom-`; none if there is no such model.
pub fn cpu_model_flags(root: &Sysroot, name: &str) -> Option<String> {
    parse_flags(&root.read(paths::CPU_MODELS).ok()?, name)
}

/// Parses cpu-models.conf: `cpu-model: NAME`, then indented lines of a key and a value.
fn parse_flags(text: &str, name: &str) -> Option<String> {
    let is_head = |line: &&str| !line.starts_with([' ', '\t']) && line.contains(':');
    let is_it = |line: &str| {
        line.strip_prefix("cpu-model:")
            .is_some_and(|model| model.trim() == name)
    };
    let mut lines = text.lines().skip_while(|line| !is_it(line));
    lines.next()?;
    let mut own = lines.take_while(|line| !is_head(line));
    let flags = own.find_map(|line| line.trim().strip_prefix("flags")?.strip_prefix([' ', '\t']));
    Some(flags.unwrap_or_default().trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_models() {
        let text = "cpu-model: a\n    flags +topoext;-x\n    reported-model host\n\ncpu-model: b\n\treported-model kvm64\n";
        for (name, flags) in [("a", Some("+topoext;-x")), ("b", Some("")), ("c", None)] {
            assert_eq!(parse_flags(text, name).as_deref(), flags, "{name}");
        }
        assert_eq!(parse_flags("", "a"), None);
        assert_eq!(parse_flags("cpu-model:a", "a").as_deref(), Some(""));
    }
}
