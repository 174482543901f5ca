#!/bin/sh
# Customize hook of mmdebstrap: `customize.sh ROOT` turns a fresh Debian tree into a lab guest.
set -eu
root=$1
unit() { cat >"$root/etc/systemd/system/$1"; }

echo lab >"$root/etc/hostname"
echo '127.0.0.1 localhost lab' >"$root/etc/hosts"
echo '/dev/vda / ext4 rw,noatime 0 1' >"$root/etc/fstab"
chroot "$root" passwd -d root >/dev/null
: >"$root/etc/machine-id"

# The hardware that tests look at: real cpufreq policies and nested KVM.
printf 'kvm-amd\nacpi-cpufreq\ncpufreq-powersave\n' >"$root/etc/modules-load.d/lab.conf"

# The agent comes on a disk of its own: a newer one needs no new image.
mkdir -p "$root/usr/local/lib/pinfold-lab" "$root/opt/pinfold/bin" "$root/etc/pve/qemu-server"
ln -s ../local/lib/pinfold-lab/lab-agent "$root/usr/sbin/qm"
ln -sf qemu-system-x86_64 "$root/usr/bin/kvm"
unit lab-agent.service <<'U'
[Unit]
Description=Lab agent, the host's way in
After=systemd-modules-load.service

[Service]
# The disk's content changes under the page cache.
ExecStartPre=/sbin/blockdev --flushbufs /dev/vdb
ExecStartPre=/bin/tar -C / -xf /dev/vdb
ExecStart=/usr/local/lib/pinfold-lab/lab-agent serve
Environment=PATH=/opt/pinfold/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
Environment=LANG=C.UTF-8 HOME=/root
OOMScoreAdjust=-900
TasksMax=infinity
KillMode=process

[Install]
WantedBy=multi-user.target
U
chroot "$root" systemctl -q enable lab-agent.service

# Firmware for VMs that do nothing: at the reset vector 0xfffffff0 stands `hlt` with interrupts off, and a jump back to it.
{ head -c 65520 /dev/zero; printf '\364\353\375'; head -c 13 /dev/zero; } >"$root/usr/local/lib/pinfold-lab/halt.rom"

# A root shell on the serial console, for `lab console`; it also makes a user session in user.slice.
mkdir -p "$root/etc/systemd/system/serial-getty@ttyS0.service.d"
unit serial-getty@ttyS0.service.d/lab.conf <<'U'
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200 %I vt220
U

# Nothing may run by itself between two looks at the host.
for name in apt-daily.timer apt-daily-upgrade.timer man-db.timer e2scrub_all.timer e2scrub_reap.service \
	fstrim.timer logrotate.timer dpkg-db-backup.timer systemd-tmpfiles-clean.timer \
	irqbalance.service getty@tty1.service systemd-timesyncd.service systemd-networkd.service \
	systemd-networkd-wait-online.service systemd-resolved.service systemd-firstboot.service systemd-pstore.service \
	systemd-binfmt.service keyboard-setup.service console-setup.service qemu-kvm.service run-qemu.mount; do
	ln -sf /dev/null "$root/etc/systemd/system/$name"
done
# daemon-reload runs them all; these make no unit here, and took half of its time.
mkdir -p "$root/etc/systemd/system-generators"
for generator in "$root"/usr/lib/systemd/system-generators/*; do
	case ${generator##*/} in
	systemd-fstab-generator | systemd-getty-generator) ;;
	*) ln -s /dev/null "$root/etc/systemd/system-generators/${generator##*/}" ;;
	esac
done
mkdir -p "$root/etc/systemd/journald.conf.d" "$root/etc/systemd/system.conf.d"
printf '[Journal]\nStorage=volatile\nRuntimeMaxUse=16M\nRateLimitIntervalSec=0\n' >"$root/etc/systemd/journald.conf.d/lab.conf"
# Everything is slow under emulation: no start may time out, no watchdog may fire.
printf '[Manager]\nDefaultTimeoutStartSec=10min\nDefaultDeviceTimeoutSec=10min\n' >"$root/etc/systemd/system.conf.d/lab.conf"
for name in systemd-journald systemd-udevd systemd-logind; do
	mkdir -p "$root/etc/systemd/system/$name.service.d"
	printf '[Service]\nWatchdogSec=0\n' >"$root/etc/systemd/system/$name.service.d/lab.conf"
done

# No index of man pages is made whenever a package is installed.
rm -f "$root/var/lib/man-db/auto-update"
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/* "$root"/usr/share/doc/* "$root"/usr/share/man/* "$root"/usr/share/locale/*
# The image is as it shall be: nothing to update at the first boot.
touch "$root/etc/.updated" "$root/var/.updated"
