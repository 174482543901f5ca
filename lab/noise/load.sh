#!/bin/bash
# A light load as any host has it: some computing, timers, writes that reach the disk, new processes, packets.
# Heavier, and a host whose CPUs share one or two real ones has nothing left for the VM.
never() { exec 9<> <(:); }

for _ in 1 2 3; do
    (
        never
        while :; do
            for ((n = 0; n < 3000; n++)); do :; done
            read -r -t 0.05 -u 9
        done
    ) &
done
for _ in 1 2 3 4; do
    (
        never
        while :; do read -r -t 0.01 -u 9; done
    ) &
done
(while :; do dd if=/dev/zero of=/var/tmp/load bs=64k count=8 conv=fsync status=none; sleep 0.2; done) &
(while :; do /bin/true; sleep 0.1; done) &
(
    never
    ip link set lo up
    while :; do
        echo packet >/dev/udp/127.0.0.1/9
        read -r -t 0.02 -u 9
    done
) &
wait
