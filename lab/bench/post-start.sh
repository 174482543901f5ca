#!/bin/bash
# The documented post-start steps for the 5900X layout as a plain shell script, for comparison: one taskset per thread,
# one echo per IRQ, one systemctl per unit. Prints "step seconds" lines; "hotplug-kernel" is the share of the offline
# and online steps that the kernel itself took.
# usage: post-start.sh VMID
set -u
vmid=$1
housekeeping=0-5,12-17
isolated="6 7 8 9 10 11 18 19 20 21 22 23"
pins="6 18 7 19 8 20 9 21 10 22 11 23"
hotplug_kernel=0

now() { printf -v "$1" %s "${EPOCHREALTIME/./}"; }
step() {
    now end
    if [ -n "${name:-}" ]; then echo "$name $(((end - begin) / 1000000)).$(printf %06d $(((end - begin) % 1000000)))"; fi
    name=$1
    now begin
}

qemu_pid() { cat "/run/qemu-server/$vmid.pid"; }

allow() { systemctl set-property --runtime -- "$1" "AllowedCPUs=$2"; }

cpu_state() {
    local file=/sys/devices/system/cpu/cpu$1/online
    if [ "$(cat "$file")" != "$2" ]; then
        now before
        echo "$2" >"$file"
        now after
        hotplug_kernel=$((hotplug_kernel + after - before))
    fi
}

set_governor() {
    local file=/sys/devices/system/cpu/cpu$1/cpufreq/scaling_governor
    if [ "$(cat "$file")" != "$2" ]; then echo "$2" >"$file"; fi
}

step slices
for unit in init.scope system.slice user.slice qemu.slice; do allow "$unit" "$housekeeping"; done

step offline
for cpu in $isolated; do cpu_state "$cpu" 0; done

step irqs
for file in /proc/irq/*/smp_affinity_list; do
    irq=$(echo "$file" | grep -o -E '[0-9]+')
    echo "$housekeeping" 2>/dev/null >"$file" && : "$irq"
done 2>/dev/null

step kthreads
for file in /proc/[0-9]*/stat; do
    stat=
    read -r stat 2>/dev/null <"$file" || continue
    pid=${stat%% *}
    rest=${stat##*) }
    set -- $rest
    if ((($7 & 0x00200000) == 0)); then continue; fi
    taskset --cpu-list --pid "$housekeeping" "$pid" >/dev/null 2>&1
done

step online
for cpu in $isolated; do cpu_state "$cpu" 1; done

step tuning
for cpu in $isolated; do set_governor "$cpu" performance; done
sysctl -q vm.stat_interval=120

step decouple
mkdir -p "/sys/fs/cgroup/qemu-decoupled.slice/$vmid.scope"
qemu_pid >"/sys/fs/cgroup/qemu-decoupled.slice/$vmid.scope/cgroup.procs"

step pins
vcpu=0
for cpu in $pins; do
    pid=$(qemu_pid)
    tid=$(grep -l "^CPU $vcpu/" /proc/"$pid"/task/*/comm | cut -d/ -f5)
    taskset --cpu-list --pid "$cpu" "$tid" >/dev/null
    vcpu=$((vcpu + 1))
done
pid=$(qemu_pid)
for tid in $(grep -L '^CPU [0-9]' /proc/"$pid"/task/*/comm | cut -d/ -f5); do
    comm=$(cat "/proc/$pid/task/$tid/comm")
    taskset --cpu-list --pid "$housekeeping" "$tid" >/dev/null 2>&1 || echo "refused: $comm" >&2
done
step ''
echo "hotplug-kernel $((hotplug_kernel / 1000000)).$(printf %06d $((hotplug_kernel % 1000000)))"
