//! The resets of PCI devices before a VM starts and after it has stopped.

use std::time::Duration;

use pinfold_core::vm::{VmConf, VmId};

use crate::own_steps::{self, Reset};
use crate::settings::{REMOVE, Settings};

use super::run::Run;

impl Run<'_> {
    /// Resets the VM's PCI functions before it starts, or else after it has stopped. What was not
    /// possible is reported, and stops a start only if the settings require it.
    pub(super) fn reset_devices(
        &mut self,
        vmid: VmId,
        conf: &VmConf,
        settings: &Settings,
        is_before: bool,
    ) -> anyhow::Result<()> {
        let resets = match own_steps::resets(&self.root, vmid, conf, settings, is_before) {
            Ok(resets) => resets,
            Err(error) => {
                let required = settings
                    .listed_resets(is_before)
                    .any(|reset| reset.required);
                return self.not_reset(error.into(), required);
            }
        };
        let deadline = Duration::from_secs(settings.deadlines.pci);
        for Reset {
            functions,
            method,
            required,
        } in resets.iter().filter(|reset| !reset.functions.is_empty())
        {
            let earlier = self.report.failures();
            let done = if method == REMOVE {
                pci_reset::reset(&self.root, functions, false, deadline, self.report)
                    .map_err(anyhow::Error::from)
            } else {
                self.report.step("pci");
                self.open(&settings.deadlines).and_then(|mut store| {
                    own_steps::reset_by_kernel(&mut store, self.report, functions, method, deadline)
                })
            };
            if done.is_ok() && method != REMOVE {
                let names: Vec<String> = functions.iter().map(ToString::to_string).collect();
                let summary = format!("pci: {} reset by {method}", names.join(", "));
                self.report.summary(&summary);
            }
            if let Err(error) = done {
                if !required {
                    self.report.leave_out_failures(earlier);
                }
                self.not_reset(error, *required)?;
            }
        }
        Ok(())
    }

    /// Reports a reset that was not possible; an error if it is required.
    fn not_reset(&mut self, error: anyhow::Error, required: bool) -> anyhow::Result<()> {
        if required {
            return Err(error);
        }
        self.report.note(&format!(
            "{error:#}; the settings do not require it (`required = true` in reset_pci does)"
        ));
        Ok(())
    }
}
