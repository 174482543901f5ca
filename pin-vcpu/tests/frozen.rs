//! Files that earlier versions saved can still be restored.

#[test]
fn files_of_earlier_versions_are_restored() {
    pinfold_core::testutils::assert_restored("pin-vcpu", env!("CARGO_BIN_EXE_pin-vcpu"), &[]);
}
