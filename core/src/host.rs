//! The host as a whole: its files, its systemd, and whether it may be changed.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::Result;
use crate::sysroot::Sysroot;
use crate::systemd::journal::{self, Entry};
use crate::systemd::{ScopeProperties, Session};

/// A host: the root of its files, a session with its systemd, and the dry-run flag.
///
/// Code that only reads files takes a [`Sysroot`], which a host dereferences to. Code that calls
/// systemd, applies changes or plans them takes a host.
#[derive(Debug, Clone, Default)]
pub struct Host {
    root: Sysroot,
    systemd: Session,
    /// The properties of scopes that systemd may have to recreate, by name.
    scopes: Arc<BTreeMap<String, ScopeProperties>>,
    dry_run: bool,
}

impl Host {
    /// The host with its files below `root`, with the default timeouts for systemd.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: Sysroot::new(root),
            ..Self::default()
        }
    }

    /// The same host with another systemd session.
    pub fn with_session(self, systemd: Session) -> Self {
        Self { systemd, ..self }
    }

    /// The same host; a scope in the map gets these properties if it has to be recreated.
    pub fn with_scopes(self, scopes: BTreeMap<String, ScopeProperties>) -> Self {
        Self {
            scopes: Arc::new(scopes),
            ..self
        }
    }

    /// The properties of a scope if it has to be recreated.
    pub(crate) fn scope(&self, name: &str) -> Option<&ScopeProperties> {
        self.scopes.get(name)
    }

    /// The same host for a dry run: [`apply_one`](crate::apply_one) plans changes instead of making
    /// them, and a [`Store`](crate::state::store::Store) neither locks nor saves. So the code that
    /// makes the changes also lists them.
    pub fn for_dry_run(self) -> Self {
        Self {
            dry_run: true,
            ..self
        }
    }

    /// Whether nothing may be changed.
    pub fn dry_run(&self) -> bool {
        self.dry_run
    }

    /// The session with this host's systemd.
    pub fn systemd(&self) -> &Session {
        &self.systemd
    }

    /// Sends a message to this host's journal. In a dry run, and if it has no journal, nothing is
    /// sent.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) if the journal does not take it within a second.
    pub fn journal(&self, entry: &Entry<'_>) -> Result<()> {
        if self.dry_run {
            return Ok(());
        }
        journal::send(&self.root, entry)
    }
}

impl Deref for Host {
    type Target = Sysroot;

    fn deref(&self) -> &Sysroot {
        &self.root
    }
}
