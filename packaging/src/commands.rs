//! The commands, with what their command lines do not define: examples, files and other pages.

/// Examples by page: a command line, and what it does.
pub(crate) const EXAMPLES: &[(&str, &[(&str, &str)])] = &[
    (
        "cg-slice",
        &[
            (
                "cg-slice allow 0-5,12-17",
                "Restrict the host's slices to these CPUs.",
            ),
            ("cg-slice partition show", "List the cpuset partitions."),
        ],
    ),
    (
        "cpu-hotplug",
        &[
            ("cpu-hotplug --list", "List the CPUs and their state."),
            (
                "cpu-hotplug offline 6-11,18-23",
                "Take these CPUs offline, one after the other.",
            ),
        ],
    ),
    (
        "governor",
        &[
            ("governor --list", "List the governor of each policy."),
            (
                "governor set performance llc:1",
                "Set the governor of all CPUs of the second LLC domain.",
            ),
        ],
    ),
    (
        "hook",
        &[
            (
                "hook install 100",
                "Set VM 100 up, with settings and hookscript.",
            ),
            (
                "hook status",
                "Show which VM owns each CPU and what can still run on it.",
            ),
            (
                "hook 100 post-start",
                "Isolate the CPUs of VM 100 now, if it runs.",
            ),
        ],
    ),
    (
        "hook-blame",
        &[
            (
                "hook blame 100 --seconds 10",
                "Show what ran on the CPUs of VM 100 within ten seconds.",
            ),
            (
                "hook blame 100 --trace",
                "The same, by each switch that the kernel records: exact, and short-lived threads too.",
            ),
        ],
    ),
    (
        "hook-check",
        &[(
            "hook check 100",
            "Check the settings of VM 100 and this host.",
        )],
    ),
    (
        "hook-init",
        &[
            (
                "hook init 100",
                "Choose CPUs for VM 100 and write /etc/pinfold/100.toml.",
            ),
            (
                "hook init 100 --print",
                "Print the settings and write nothing.",
            ),
            (
                "hook init 100 --cpus llc:1",
                "Use the CPUs of the second LLC domain.",
            ),
        ],
    ),
    (
        "hook-install",
        &[
            (
                "hook install 100",
                "Write settings, link the hookscript and set it for VM 100.",
            ),
            ("hook install 100 -n", "Print the steps and change nothing."),
        ],
    ),
    ("hook-list", &[("hook list", "List the VMs that use hook.")]),
    (
        "hook-remove",
        &[
            (
                "hook remove 100",
                "Release the CPUs of VM 100 and set its earlier hookscript again.",
            ),
            (
                "hook remove --all --purge",
                "Do so for all VMs of this node, and remove their settings.",
            ),
        ],
    ),
    (
        "hook-layout",
        &[("hook layout", "List this host's CPUs and their names.")],
    ),
    (
        "hook-plan",
        &[(
            "hook plan 100",
            "List every change that the next start of VM 100 would make.",
        )],
    ),
    (
        "hook-recover",
        &[(
            "hook recover",
            "Release the CPUs of VMs that have stopped, and complete interrupted runs.",
        )],
    ),
    (
        "hook-jitter",
        &[
            (
                "hook jitter 100",
                "Measure the CPUs of VM 100 before it starts.",
            ),
            (
                "hook jitter --cpus llc:1 --seconds 30",
                "Measure the CPUs of the second LLC domain.",
            ),
            (
                "hook jitter 100 --compare --svg /root/jitter.svg",
                "Measure the CPUs of VM 100 as they are and isolated, and draw both.",
            ),
        ],
    ),
    (
        "hook-report",
        &[(
            "hook report 100",
            "Collect what a report of a bug with VM 100 needs.",
        )],
    ),
    (
        "hook-status",
        &[
            (
                "hook status --watch 5",
                "Repeat the status every five seconds.",
            ),
            ("hook status --json", "Print it for programs."),
            (
                "hook status --metrics",
                "Print metrics for node_exporter's textfile collector.",
            ),
        ],
    ),
    (
        "hook-step",
        &[(
            "hook step stat-interval 120",
            "Set vm.stat_interval to two minutes.",
        )],
    ),
    (
        "pci-reset",
        &[
            (
                "pci-reset --list",
                "List the PCI functions and what uses them.",
            ),
            (
                "pci-reset 100",
                "Remove and rescan the devices of VM 100's hostpci entries.",
            ),
        ],
    ),
    (
        "pin-irqs",
        &[
            (
                "pin-irqs --save /root/irqs llc:0",
                "Move all IRQs to the first LLC domain and save their old CPUs.",
            ),
            ("pin-irqs --restore /root/irqs", "Restore them."),
        ],
    ),
    (
        "pin-kthreads",
        &[(
            "pin-kthreads 0-5,12-17",
            "Move kernel threads and unbound workqueues to these CPUs.",
        )],
    ),
    (
        "pin-vcpu",
        &[
            (
                "pin-vcpu 100 --list",
                "List the threads of VM 100, their roles and CPUs.",
            ),
            (
                "pin-vcpu 100 --vcpu 0=6 --vcpu 1=18 --emulator 0-5,12-17",
                "Pin two vCPUs and the emulator's threads.",
            ),
        ],
    ),
];

/// Files, for the pages of hook.
pub(crate) const FILES: &[(&str, &str)] = &[
    (
        "/etc/pinfold/VMID.toml",
        "Settings of a VM on this node; see pinfold.toml(5) for the other places.",
    ),
    (
        "/run/pinfold/state.json",
        "Reservations and the values to restore, while a VM is isolated.",
    ),
    (
        "/run/pinfold/lock",
        "Held by the one hook process that changes the host.",
    ),
];

/// The exit status of every program, as in its help.
pub(crate) const EXIT_STATUS: &str = pinfold_core::cli::EXIT_CODES;
