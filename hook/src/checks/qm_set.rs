//! Changes of a VM's settings, as `qm set` takes them.

use pinfold_core::vm::VmId;

/// What `qm set` changes of a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct QmSet {
    /// Keys of VMID.conf with their new values.
    set: Vec<(String, String)>,
    /// Keys that are removed.
    delete: Vec<String>,
}

impl QmSet {
    /// With another key set.
    pub(crate) fn set(mut self, key: &str, value: impl Into<String>) -> Self {
        let value = value.into();
        match self.set.iter_mut().find(|(known, _)| known == key) {
            Some((_, known)) => *known = value,
            None => self.set.push((key.to_owned(), value)),
        }
        self
    }

    /// With another key removed, if it `is_there`.
    pub(crate) fn delete(mut self, key: &str, is_there: bool) -> Self {
        if is_there {
            self.delete.push(key.to_owned());
        }
        self
    }

    /// Both, what `later` sets last.
    pub(crate) fn and(mut self, later: Self) -> Self {
        for (key, value) in later.set {
            self = self.set(&key, value);
        }
        self.delete.extend(later.delete);
        self
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.set.is_empty() && self.delete.is_empty()
    }

    /// The arguments of `qm`.
    pub(crate) fn words(&self, vmid: VmId) -> Vec<String> {
        let mut words = vec!["set".to_owned(), vmid.to_string()];
        for (key, value) in &self.set {
            words.extend([format!("--{key}"), value.clone()]);
        }
        if !self.delete.is_empty() {
            words.extend(["--delete".to_owned(), self.delete.join(",")]);
        }
        words
    }

    /// The command for a shell.
    pub(crate) fn command(&self, vmid: VmId) -> String {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_,.:=/+".contains(c);
        let words = self.words(vmid).into_iter().map(|word| {
            match !word.is_empty() && word.chars().all(is_plain) {
                true => word,
                false => quoted(&word),
            }
        });
        format!("qm {}", words.collect::<Vec<_>>().join(" "))
    }

    /// What VMID.conf will be after it, as far as the VM's own settings go.
    pub(crate) fn applied_to(&self, conf: &str) -> String {
        let is_section = |line: &&str| line.starts_with('[');
        let kept = conf.lines().take_while(|line| !is_section(line));
        let changes = |line: &&str| {
            let key = line.split(':').next().unwrap_or_default();
            let is_set = self.set.iter().any(|(set, _)| set == key);
            is_set || self.delete.iter().any(|delete| delete == key)
        };
        let kept = kept.filter(|line| !changes(line)).map(str::to_owned);
        let set = self
            .set
            .iter()
            .map(|(key, value)| format!("{key}: {value}"));
        kept.chain(set).map(|line| line + "\n").collect()
    }
}

/// A word for a shell.
pub(crate) fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}
