#!/bin/sh
# Last customize hook of mmdebstrap: `pack.sh ROOT` makes OUT/vmlinuz, OUT/initrd and OUT/root.raw of SIZE.
set -eu
root=$1
cp -L "$root/vmlinuz" "$OUT/vmlinuz"
cp -L "$root/initrd.img" "$OUT/initrd"
rm -f "$root"/boot/initrd.img-*
# A plain bind mount shows the tree without the /proc and /sys that are mounted on it just now.
export root
unshare -m sh -eu -c '
	mount --bind "$root" /mnt
	mke2fs -q -t ext4 -m 0 -L root -d /mnt "$OUT/root.raw" "$SIZE"'
