//! Files that earlier versions saved can still be restored.

#[test]
fn files_of_earlier_versions_are_restored() {
    pinfold_core::testutils::assert_restored("pin-irqs", env!("CARGO_BIN_EXE_pin-irqs"), &[]);
}
