# Makes the files of core/tests/frozen in /tmp/frozen of a lab host: what the programs on PATH write.
set -u
out=/tmp/frozen
rm -rf $out
mkdir -p $out/state $out/saved $out/json /etc/pinfold /var/lib/vz/snippets
cp "$(command -v hook)" /var/lib/vz/snippets/hook

state() { cp /run/pinfold/state.json $out/state/$1.json; }
json() { file=$1; shift; "$@" > $out/json/$file.json 2> /dev/null; }
vm() {
    cat > /etc/pve/qemu-server/$1.conf << CONF
name: vm$1
sockets: 1
cores: $2
memory: 64
scsihw: virtio-scsi-single
bios: halt
$3
scsi0: local:$1/vm-$1-disk-0.raw,iothread=1,size=1G
scsi1: local:$1/vm-$1-disk-1.raw,iothread=1,size=1G
CONF
}
kill_vm() {
    kill -KILL "$(cat /run/qemu-server/$1.pid)"
    while [ -e /run/systemd/transient/$1.scope ]; do sleep 0.1; done
    rm -f /run/qemu-server/$1.*
}

vm 100 12 "tpmstate0: local:100/vm-100-tpm.raw,size=4M,version=v2.0"
vm 101 4 ""
qm start 101

# The tools, with no VM fenced.
for command in "pin-irqs 0-5,12-17" "pin-kthreads 0-5,12-17" "governor set performance 6-7" "cpu-hotplug offline 23" \
    "cg-slice allow 0-5,12-17"; do
    tool=${command%% *}
    json $tool-list $tool --list --json
    json $tool-dry-run $command -n --json -v
    json $tool $command --json -v --save $out/saved/$tool.json
    cp $out/saved/$tool.json /tmp/saved
    json $tool-restore-dry-run $tool --restore /tmp/saved -n --json -v
    json $tool-restore $tool --restore /tmp/saved --json -v
done
pins="pin-vcpu 101 --vcpu 0=6 --vcpu 1=18 --iothread 4 --emulator 0-5"
json pin-vcpu-list pin-vcpu 101 --list --json
json pin-vcpu-dry-run $pins -n --json -v
json pin-vcpu $pins --json -v --save $out/saved/pin-vcpu.json
cp $out/saved/pin-vcpu.json /tmp/saved
json pin-vcpu-restore pin-vcpu --restore /tmp/saved --json -v
json cg-slice-decouple cg-slice decouple 101 --json -v --save $out/saved/cg-slice-decouple.json
json cg-slice-couple cg-slice couple 101 --json -v
mkdir /sys/fs/cgroup/pen
json cg-slice-partition cg-slice partition make pen 7-8 --json -v --save $out/saved/cg-slice-partition.json
json cg-slice-partition-show cg-slice partition show --json
json cg-slice-partition-undo cg-slice partition undo pen --json -v
rmdir /sys/fs/cgroup/pen
slot=$(lspci -D | grep -i usb | head -1 | cut -d' ' -f1)
json pci-reset-list pci-reset --list --json
json pci-reset-dry-run pci-reset --device $slot -n --json -v
json pci-reset pci-reset --device $slot --json -v --save $out/saved/pci-reset.json
json hook-step-stat-interval hook step stat-interval 120 --json -v --save $out/saved/hook-step.json
cp $out/saved/hook-step.json /tmp/saved
json hook-step-restore hook step stat-interval --restore /tmp/saved --json -v
json hook-step-tidy-caches hook step tidy-caches --json -v
json hook-step-idle-vm hook step idle-vm stop 101 --json -v
qm start 101 2> /dev/null

# hook, with no VM fenced.
json hook-layout hook layout --json
json hook-init hook init 100 --json
rm /etc/pinfold/100.toml
json hook-status-unfenced hook status --json
json hook-plan-stopped hook plan 100 --json
json hook-recover-nothing hook recover --json

killed="strace -f -P /proc/irq/default_smp_affinity -o /dev/null -e trace=write -e inject=write:signal=KILL:when=1"
# CPUs that were offline have QEMU's numbering; this gives them that of a 5900X again.
renumber() { /usr/local/lib/pinfold-lab/lab-agent topology; }
for method in hotplug partition; do
    renumber
    printf 'layout = "5900x"\nmethod = "%s"\niothreads = "4-5"\nemulator = "0-3"\ntidy_caches = true\n' $method > /etc/pinfold/100.toml
    json hook-check-all hook check --json
    json hook-pre-start-$method hook 100 pre-start --json -v
    state $method-starting
    json hook-status-$method-starting hook status --json
    qm start 100
    json hook-plan-$method hook plan 100 --json -v
    json hook-post-start-$method hook 100 post-start --json -v
    state $method-isolated
    renumber
    # A stray.
    taskset -pc 11 "$(pgrep -x kswapd0)" > /dev/null 2>&1
    json hook-status-$method hook status --json -v
    json hook-check-$method hook check 100 --json -v
    json hook-layout-$method hook layout --json
    json hook-pre-stop-$method hook 100 pre-stop --json
    json pin-vcpu-list-$method pin-vcpu 100 --list --json
    json cg-slice-list-$method cg-slice --list --json
    kill_vm 100
    json hook-post-stop-$method hook 100 post-stop --json -v

    # Killed in the middle of each way.
    renumber
    hook 100 pre-start -q
    qm start 100
    $killed hook 100 post-start > /dev/null 2>&1
    state $method-isolating
    hook 100 post-start -q
    kill_vm 100
    $killed hook 100 post-stop > /dev/null 2>&1
    state $method-leaving
    json hook-recover-$method hook recover --json -v
done

# Killed by its own call for the idle VM.
renumber
printf 'layout = "5900x"\nmethod = "hotplug"\nidle_vm = 101\n' > /etc/pinfold/100.toml
hook 100 pre-start -q
qm start 100
hook 100 post-start -q
kill_vm 100
mkdir -p /tmp/fake
printf '#!/bin/sh\n[ "$1" = start ] && kill -KILL $PPID\n' > /tmp/fake/qm
chmod 755 /tmp/fake/qm
PATH=/tmp/fake:$PATH hook 100 post-stop > /dev/null 2>&1
state hotplug-idle
json hook-recover-idle hook recover --json -v
