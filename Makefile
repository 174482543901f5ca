# make demo: a real 24-CPU host under QEMU, a VM on it, and a CCD fenced off for the VM: before, during, after.
# make test: every check, the lab's too. Both install what they need (Debian 12, root or sudo; Rust by rustup).

CARGO ?= cargo
PRODUCT = cg-slice cpu-hotplug governor hook pci-reset pin-irqs pin-kthreads pin-vcpu
export RUSTFLAGS ?=
LAB = $(CARGO) run --quiet --release -p pinfold-lab --bin lab --

.PHONY: all demo test check lint docs unit fuzz fuzz-short lab torture selftest bench picture setup release install uninstall clean

all: release

release:
	$(CARGO) build --release --workspace

# What the lab needs: QEMU and the tools that make its hosts' images; and a C++ compiler for the fuzzer.
setup:
	$(LAB) setup

demo: setup release
	$(LAB) demo

test: check fuzz-short lab

# Everything that needs no lab.
check: lint docs unit

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

docs:
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps

unit:
	$(CARGO) test --workspace --exclude pinfold-lab
	$(CARGO) test -p pinfold-lab --lib --bins

# Every parser of what others wrote, FUZZ_SECONDS each, FUZZ_JOBS at a time. What libFuzzer finds on its way is kept from
# run to run in FUZZ_WORK, out of git's sight; an input that breaks a promise is named and lies in fuzz/artifacts.
#
# No sanitizer: there is no unsafe code of ours, and so the stable toolchain does. A parser's own memory is held to 64 MiB
# by the allocator in fuzz/src/lib.rs, which libFuzzer's share is not counted in. -rss_limit_mb is but the net below that:
# libFuzzer starts at 28 MiB and was seen at 40 with the 3000 inputs of a minute's run of settings, so its own share is
# given 128. (-malloc_limit_mb needs a sanitizer.)
FUZZ_SECONDS ?= 600
FUZZ_JOBS ?= $(shell nproc)
FUZZ_WORK ?= target/fuzz
FUZZ_TARGETS = $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))
FUZZ_BUILD = --sanitizer none --codegen-units 8
FUZZ_LIMITS = -max_total_time=$(FUZZ_SECONDS) -timeout=10 -max_len=65536 -rss_limit_mb=192
fuzz: setup
	$(CARGO) fuzz --version || $(CARGO) install cargo-fuzz --locked
	$(CARGO) fuzz build $(FUZZ_BUILD)
	mkdir -p $(addprefix $(FUZZ_WORK)/,$(FUZZ_TARGETS))
	printf '%s\n' $(FUZZ_TARGETS) | xargs -P $(FUZZ_JOBS) -I@ \
		$(CARGO) fuzz run $(FUZZ_BUILD) @ $(FUZZ_WORK)/@ fuzz/corpus/@ -- $(FUZZ_LIMITS) -verbosity=0 -print_final_stats=1

# The corpus in the tree, then a moment of each: for CI.
fuzz-short:
	$(CARGO) fmt --manifest-path fuzz/Cargo.toml --check
	$(CARGO) clippy --manifest-path fuzz/Cargo.toml --locked --all-targets --no-default-features -- -D warnings
	$(CARGO) test --manifest-path fuzz/Cargo.toml --locked --no-default-features
	$(MAKE) fuzz FUZZ_SECONDS=10

# The stories on real hosts; they print what was asserted where.
lab: setup release
	$(CARGO) test --release -p pinfold-lab --test stories -- --test-threads 2
	$(LAB) down

# Every call of hook killed, every call failing in every way, 300 steps of three VMs, 200 cycles: hours. PINFOLD_TORTURE=40
# takes that many of each, 41-80 a part.
torture: setup release
	PINFOLD_TORTURE=$${PINFOLD_TORTURE:-full} $(CARGO) test --release -p pinfold-lab --test stories torture -- --test-threads 2 --nocapture
	$(LAB) down

# The lab's own proof, on both guests.
selftest: setup release
	$(CARGO) test --release -p pinfold-lab --test selftest -- --test-threads 1

# docs/status.svg, from what hook status shows in the lab.
picture: setup release
	$(LAB) picture docs/status.svg

# hook against the same steps done by a shell script, in one boot.
bench: setup release
	$(LAB) bench

# Copies the tools to PREFIX/sbin, hook also to the snippets folder of the storage `local`, and the units that call
# `hook recover` to a folder that systemd reads. Builds, enables and starts nothing. With DESTDIR everything goes below
# that folder. uninstall removes exactly what install made, and refuses if a VM still needs it.
PREFIX ?= /usr/local
SNIPPETS ?= /var/lib/vz/snippets
BINDIR ?= target/release
INSTALL = PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' SNIPPETS='$(SNIPPETS)' BINDIR='$(BINDIR)' UNITDIR='$(UNITDIR)' \
	PRODUCT='$(PRODUCT)' sh packaging/install.sh
install:
	@$(INSTALL) install

uninstall:
	@$(INSTALL) uninstall

clean:
	$(CARGO) clean
