//! How long the steps of a VM's last post-start took: under /run/pinfold, for `hook plan`.

use std::collections::BTreeMap;

use pinfold_core::state::store::{self, Store};
use pinfold_core::vm::VmId;
use pinfold_core::{Error, Host, Result};

use super::reservation::Reservation;

/// The file beside the state.
const FILE: &str = "times.json";

/// Steps in their order, with seconds.
pub(crate) type Times = Vec<(String, f64)>;

/// Saves the times of a VM's steps in place of earlier ones.
///
/// # Errors
/// If the file cannot be written. One that cannot be read is replaced.
pub(crate) fn keep(
    store: &Store<Reservation>,
    vmid: VmId,
    steps: &[(&'static str, f64)],
) -> Result<()> {
    let mut all = all(store.root()).unwrap_or_default();
    let times = steps
        .iter()
        .map(|(step, seconds)| ((*step).to_owned(), (seconds * 1000.0).round() / 1000.0));
    all.insert(vmid.into(), times.collect());
    let text =
        serde_json::to_string(&all).map_err(|error| Error::io(FILE, "save", error.into()))?;
    store.keep(FILE, &text)
}

/// The times of a VM's steps; empty if they are unknown.
///
/// # Errors
/// If the file exists and cannot be parsed.
pub(crate) fn last(root: &Host, vmid: VmId) -> Result<Times> {
    Ok(all(root)?.remove(&vmid.into()).unwrap_or_default())
}

fn all(root: &Host) -> Result<BTreeMap<u32, Times>> {
    let Some(text) = store::kept(root, FILE)? else {
        return Ok(BTreeMap::new());
    };
    parse(&text).map_err(|why| Error::malformed(FILE, why))
}

fn parse(text: &str) -> std::result::Result<BTreeMap<u32, Times>, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_empty_garbage_hostile() {
        let times = parse("{\"100\":[[\"slices\",0.61],[\"irqs\",1.5],[\"irqs\",0]]}\n").unwrap();
        assert_eq!(times[&100][1], ("irqs".to_owned(), 1.5));
        assert!(parse("{}").unwrap().is_empty());
        for text in [
            "",
            "[]",
            "{\"100\":1}",
            "{\"-1\":[]}",
            "{\"100\":[[\"a\",1e999]]}",
            "{\"100\":[[\"a\"]]}",
        ] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }
}
