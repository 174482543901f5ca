#!/bin/sh
# Essential hook of mmdebstrap, run before the kernel is installed: its initramfs then holds
# just what finds the root disk, which saves seconds of emulated unpacking at every boot.
set -eu
root=$1
mkdir -p "$root/etc/initramfs-tools/conf.d"
printf 'MODULES=list\nCOMPRESS=lz4\nRESUME=none\n' >"$root/etc/initramfs-tools/conf.d/lab"
printf 'virtio_pci\nvirtio_blk\next4\n' >"$root/etc/initramfs-tools/modules"
