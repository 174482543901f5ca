#!/bin/bash
# Prints what happens on all CPUs within some seconds: the kernel's counters before and after, and, counted by the kernel
# in a trace instance of its own, every switch to a thread, every function that another CPU has asked for, every timer.
# usage: count.sh SECONDS VMID
instance=/sys/kernel/tracing/instances/lab-noise
mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
mkdir "$instance" || exit
events=$instance/events
echo 'hist:keys=common_cpu,next_pid,next_comm:size=8192 if next_pid != 0' >"$events/sched/sched_switch/trigger" || exit
echo 'hist:keys=common_cpu,func.sym:size=8192' >"$events/csd/csd_function_entry/trigger" || exit
for timer in hrtimer_expire_entry timer_expire_entry; do
    echo 'hist:keys=common_cpu,function.sym:size=8192' >"$events/timer/$timer/trigger" || exit
done
begin=${EPOCHREALTIME/./}
before=$(</proc/interrupts)$'\n=\n'$(</proc/softirqs)
read -r -t "$1" <> <(:)
after=$(</proc/interrupts)$'\n=\n'$(</proc/softirqs)
switches=$(<"$events/sched/sched_switch/hist")
causes=$(cat "$events"/csd/csd_function_entry/hist "$events"/timer/*timer_expire_entry/hist)
end=${EPOCHREALTIME/./}
rmdir "$instance"
echo "$before"
echo =
echo "$after"
echo =
echo "$switches"
echo =
echo "$causes"
echo =
echo $((end - begin))
ps -e -o pid=,ppid= | awk '$1 == 2 || $2 == 2 { printf "%s ", $1 } END { print "" }'
ls -x -w 0 "/proc/$(</run/qemu-server/"$2".pid)/task"
