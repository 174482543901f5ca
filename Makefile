# make demo: a real 24-CPU host under QEMU, a VM on it, and a CCD fenced off for the VM: before, during, after.
# make test: every check, the lab's too. Both install what they need (Debian 12, root or sudo; Rust by rustup).

CARGO ?= cargo
PRODUCT = cg-slice cpu-hotplug governor hook pci-reset pin-irqs pin-kthreads pin-vcpu
export RUSTFLAGS ?=
LAB = $(CARGO) run --quiet --release -p pinfold-lab --bin lab --

.PHONY: all demo test check lint docs unit lab torture selftest bench setup release install clean

all: release

release:
	$(CARGO) build --release --workspace

# What the lab needs: QEMU and the tools that make its hosts' images.
setup:
	$(LAB) setup

demo: setup release
	$(LAB) demo

test: check lab

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

# The stories on real hosts; they print what was asserted where.
lab: setup release
	$(CARGO) test --release -p pinfold-lab --test stories -- --test-threads 2
	$(LAB) down

# Every call of hook killed, every call failing in every way, 300 steps of three VMs, 200 cycles: hours. PINFOLD_TORTURE=40
# takes that many of each.
torture: setup release
	PINFOLD_TORTURE=$${PINFOLD_TORTURE:-full} $(CARGO) test --release -p pinfold-lab --test stories torture -- --test-threads 2 --nocapture
	$(LAB) down

# The lab's own proof, on both guests.
selftest: setup release
	$(CARGO) test --release -p pinfold-lab --test selftest -- --test-threads 1

# hook against the same steps done by a shell script, in one boot.
bench: setup release
	$(LAB) bench

# The tools go to PREFIX/sbin, hook to where Proxmox VE looks for hookscripts as well, and the units that call
# `hook recover` to PREFIX's folder of systemd units. Nothing is built, enabled or started here.
PREFIX ?= /usr/local
SNIPPETS ?= /var/lib/vz/snippets
install:
	install -d $(DESTDIR)$(PREFIX)/sbin $(DESTDIR)$(PREFIX)/lib/systemd/system
	install -m 0755 $(addprefix target/release/,$(PRODUCT)) $(DESTDIR)$(PREFIX)/sbin
	install -m 0644 packaging/pinfold-recover.path packaging/pinfold-recover.service $(DESTDIR)$(PREFIX)/lib/systemd/system
	sed -i 's|/usr/local/sbin|$(PREFIX)/sbin|' $(DESTDIR)$(PREFIX)/lib/systemd/system/pinfold-recover.service
	install -d $(DESTDIR)/etc/systemd/system
	install -m 0644 packaging/pinfold-recover.path packaging/pinfold-recover.service $(DESTDIR)/etc/systemd/system
	if [ -d $(DESTDIR)$(SNIPPETS) ]; then install -m 0755 target/release/hook $(DESTDIR)$(SNIPPETS)/hook; fi

clean:
	$(CARGO) clean
