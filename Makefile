# make demo  boots a 24-CPU host under QEMU, starts a VM on it and isolates a CCD for it: before, during, after.
# make test  runs every check, including those on hosts under QEMU.
# Both install what they need (Debian 12, root or sudo; Rust from rustup).

CARGO ?= cargo
PRODUCT = cg-slice cpu-hotplug governor hook pci-reset pin-irqs pin-kthreads pin-vcpu
export RUSTFLAGS ?=
LAB = $(CARGO) run --locked --quiet --release -p pinfold-lab --bin lab --

.PHONY: all demo test check lint spell docs unit msrv audit audit-advisories fuzz fuzz-short properties lab torture upgrade selftest bench noise scale picture maps setup release \
	deb package install uninstall clean

all: release

# The programs name their commit. Only their main.rs depend on it, so that another commit links them again and compiles
# nothing else.
release: export PINFOLD_COMMIT = $(shell git describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null)
release:
	$(CARGO) build --locked --release --workspace

# Installs what the lab needs (QEMU and the programs that make its disk images) and the fuzzer's C++ compiler.
setup:
	$(LAB) setup

demo: setup release
	$(LAB) demo

test: check msrv audit fuzz-short lab

# Every check that does not need the lab.
check: lint spell docs unit

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

docs:
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --workspace --no-deps

# Made-up hosts are thousands of small files: in memory, where programs can be run from there.
SHM = $(shell test -w /dev/shm && ! grep -q ' /dev/shm .*noexec' /proc/mounts && echo TMPDIR=/dev/shm)
unit: export PROPTEST_RNG_SEED = 1
unit:
	$(SHM) $(CARGO) test --locked --workspace --exclude pinfold-lab
	$(SHM) $(CARGO) test --locked -p pinfold-lab --lib --bins

# The property tests with other inputs every time, and more of them: make unit gives them the same ones, so that it fails
# for what a change broke and not by chance.
properties: export PROPTEST_CASES ?= 10000
properties:
	$(SHM) $(CARGO) test --locked --workspace --exclude pinfold-lab --lib --test machines

# Spelling. PyPI has typos as a prebuilt program; without pip it is built from crates.io.
TYPOS_VERSION = 1.52.0
TYPOS = target/typos-$(TYPOS_VERSION)/bin/typos
spell: $(TYPOS)
	$(TYPOS)

$(TYPOS):
	python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps \
		--target target/typos-$(TYPOS_VERSION) typos==$(TYPOS_VERSION) || \
		$(CARGO) install --locked --root target/typos-$(TYPOS_VERSION) typos-cli@$(TYPOS_VERSION)

# Builds the programs with the oldest Rust that Cargo.toml allows, if rustup can install it.
MSRV = $(shell sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
msrv:
	@if rustup toolchain install $(MSRV) --profile minimal --no-self-update >/dev/null 2>&1; then \
		set -x; $(CARGO) +$(MSRV) check --locked --workspace --target-dir target/msrv; \
	else \
		echo "Rust $(MSRV) cannot be installed: checked by clippy (incompatible_msrv) only"; \
	fi

# Licences, duplicate crates and sources of all dependencies, of the fuzzer's too.
DENY_VERSION = 0.20.2
DENY = target/cargo-deny-$(DENY_VERSION)/bin/cargo-deny
audit: $(DENY)
	$(DENY) --locked check licenses bans sources
	$(DENY) --manifest-path fuzz/Cargo.toml --locked --config deny.toml check licenses bans sources

# Known vulnerabilities. Not part of make test: it fetches the RustSec database from the network.
audit-advisories: $(DENY)
	$(DENY) check advisories
	$(DENY) --manifest-path fuzz/Cargo.toml --config deny.toml check advisories

# A debug build without optional features takes two minutes of CPU time.
$(DENY):
	$(CARGO) install --locked --debug --no-default-features --root target/cargo-deny-$(DENY_VERSION) \
		cargo-deny@$(DENY_VERSION)

# Fuzzes every parser for FUZZ_SECONDS, FUZZ_JOBS at a time, from another seed each time. FUZZ_WORK keeps the inputs that
# libFuzzer collects, outside git. An input that violates an assertion is printed and saved in fuzz/artifacts.
#
# There is no sanitizer, since the code has no `unsafe`, so the stable toolchain suffices. The allocator in
# fuzz/src/lib.rs limits a parser to 64 MiB, not counting libFuzzer's own memory. -rss_limit_mb is the limit for both:
# libFuzzer starts with 28 MiB and was seen at 40 with the 3000 inputs of one minute of `settings`, so it gets 128.
# (-malloc_limit_mb needs a sanitizer.)
FUZZ_SECONDS ?= 600
FUZZ_LENGTH ?= -max_total_time=$(FUZZ_SECONDS)
FUZZ_JOBS ?= $(shell nproc)
FUZZ_WORK ?= target/fuzz
FUZZ_TARGETS = $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))
FUZZ_BUILD = --sanitizer none --codegen-units 8
FUZZ_LIMITS = $(FUZZ_LENGTH) -timeout=10 -max_len=65536 -rss_limit_mb=192
CARGO_FUZZ_VERSION = 0.13.2
fuzz: setup
	$(CARGO) fuzz --version || $(CARGO) install --locked cargo-fuzz@$(CARGO_FUZZ_VERSION)
	$(CARGO) fuzz build $(FUZZ_BUILD)
	mkdir -p $(addprefix $(FUZZ_WORK)/,$(FUZZ_TARGETS))
	printf '%s\n' $(FUZZ_TARGETS) | xargs -P $(FUZZ_JOBS) -I@ \
		$(CARGO) fuzz run $(FUZZ_BUILD) @ $(FUZZ_WORK)/@ fuzz/corpus/@ -- $(FUZZ_LIMITS) -verbosity=0 -print_final_stats=1

# Replays the corpus, then gives each parser the same inputs every time, so that it fails for what a change broke and not
# by chance: what CI runs. Faults that are there already are looked for by make fuzz.
FUZZ_RUNS ?= 100000
fuzz-short:
	$(CARGO) fmt --manifest-path fuzz/Cargo.toml --check
	$(CARGO) clippy --manifest-path fuzz/Cargo.toml --locked --all-targets --no-default-features -- -D warnings
	$(CARGO) test --manifest-path fuzz/Cargo.toml --locked --no-default-features
	rm -rf target/fuzz-short
	$(MAKE) fuzz FUZZ_WORK=target/fuzz-short FUZZ_LENGTH='-seed=1 -runs=$(FUZZ_RUNS)'

# The stories: end-to-end tests on hosts under QEMU. Each prints what it asserted.
lab: setup package
	$(CARGO) test --locked --release -p pinfold-lab --test stories -- --test-threads 2
	$(LAB) down

# Kills hook at every call, fails every call in every way, takes 300 random steps with three VMs and runs 200 cycles of
# start and stop: hours. PINFOLD_TORTURE=40 takes 40 of each, PINFOLD_TORTURE=41-80 the 41st to the 80th.
torture: setup release
	PINFOLD_TORTURE=$${PINFOLD_TORTURE:-full} \
		$(CARGO) test --locked --release -p pinfold-lab --test stories torture -- --test-threads 2 --nocapture
	$(LAB) down

# Upgrades the package under a running VM, from the programs of the commit EARLIER, on both guests. EARLIER is the first
# version whose files every later one reads (core/tests/frozen).
EARLIER ?= 68c7916
EARLIER_TREE = target/earlier/tree
upgrade: setup deb
	rm -rf target/earlier/bin $(EARLIER_TREE) && git worktree prune && mkdir -p target/earlier/bin
	git worktree add --force --detach $(EARLIER_TREE) $(EARLIER)
	$(CARGO) build --locked --release --workspace --bins --manifest-path $(EARLIER_TREE)/Cargo.toml --target-dir target/earlier/build
	git worktree remove --force $(EARLIER_TREE)
	cp $(addprefix target/release/,pinfold manual) $(addprefix target/earlier/build/release/,$(PRODUCT)) target/earlier/bin
	BINDIR=target/earlier/bin PRODUCT='$(PRODUCT)' DEB_VERSION=0.0.1 DEB_FOLDER=target/earlier sh packaging/deb.sh
	$(MAKE) deb
	$(CARGO) test --locked --release -p pinfold-lab --test stories -- --test-threads 2 --ignored upgraded_from_earlier
	$(LAB) down

# Tests the lab itself, on both guests.
selftest: setup release
	$(CARGO) test --locked --release -p pinfold-lab --test selftest -- --test-threads 1

# Draws the pictures in docs/: the maps, and docs/status.svg from the output of hook status in the lab.
picture: maps setup release
	$(LAB) picture docs/status.svg

# Draws docs/map-*.svg, what hook init --map prints on captured machines. Needs no lab.
maps:
	PINFOLD_PICTURES=1 $(CARGO) test --locked -p pinfold-hook --test pictures

# Compares hook with the same steps in a shell script, in one boot.
bench: setup release
	$(LAB) bench

# Counts what runs on a VM's CPUs beside its vCPUs: with nothing done, with the shell script, and isolated (docs/noise.md).
noise: setup release
	$(LAB) noise

# Counts system calls, instructions and peak memory on made-up hosts of up to 2,048 CPUs (docs/performance.md), and fails
# if a cost grows faster than the host. Needs no lab; strace and valgrind.
scale: release
	$(LAB) scale

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

# Builds target/pinfold_VERSION_ARCH.deb; on Debian 12 it serves Proxmox VE 8 and 9.
deb: release
	BINDIR='$(BINDIR)' PRODUCT='$(PRODUCT)' sh packaging/deb.sh

# Builds the package and checks it: lintian, and each man page and completion by the program that will read it.
PACKAGE_TOOLS = lintian groff zsh fish
SUDO = $(shell test "$$(id -u)" = 0 || echo sudo)
package: deb
	dpkg-query -W $(PACKAGE_TOOLS) >/dev/null 2>&1 || { $(SUDO) apt-get update -qq && \
		$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(PACKAGE_TOOLS); }
	sh packaging/check.sh

clean:
	$(CARGO) clean
