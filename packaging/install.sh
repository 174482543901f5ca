#!/bin/sh
# Installs and uninstalls Pinfold: `make install` and `make uninstall` call this with the variables below.
#
# Everything that install makes, folders too, is listed in PREFIX/share/pinfold/installed; uninstall removes what that
# file lists and nothing else. This script is installed beside it, for machines without the source tree:
#     PREFIX=/usr/local sh /usr/local/share/pinfold/install.sh uninstall
set -eu

PREFIX=${PREFIX:-/usr/local}
while [ "$PREFIX" != / ] && [ "${PREFIX%/}" != "$PREFIX" ]; do
    PREFIX=${PREFIX%/}
done
DESTDIR=${DESTDIR:-}
SNIPPETS=${SNIPPETS:-/var/lib/vz/snippets}
BINDIR=${BINDIR:-target/release}
PRODUCT=${PRODUCT:-}
# systemd reads PREFIX/lib/systemd/system for these two prefixes only (systemd.unit(5)).
case $PREFIX in
    /usr | /usr/local) default_units=$PREFIX/lib/systemd/system ;;
    *) default_units=/etc/systemd/system ;;
esac
UNITDIR=${UNITDIR:-$default_units}
UNITS="pinfold-recover.path pinfold-recover.service"
SHARE=$PREFIX/share/pinfold
MANIFEST=$SHARE/installed

say() {
    printf '%s\n' "$*"
}

fail() {
    printf 'pinfold: %s\n' "$*" >&2
    exit 1
}

record() {
    grep -qxF "$1" "$DESTDIR$MANIFEST" 2>/dev/null || printf '%s\n' "$1" >>"$DESTDIR$MANIFEST"
}

# Makes a folder with its parents, and records those that were not there.
folder() {
    made=
    path=$1
    while [ "$path" != / ] && [ ! -d "$DESTDIR$path" ]; do
        made="$path $made"
        path=$(dirname "$path")
    done
    mkdir -p "$DESTDIR$1"
    for path in $made; do
        record "$path"
    done
}

# install_file MODE FROM TO
install_file() {
    install -m "$1" "$2" "$DESTDIR$3"
    record "$3"
}

install_all() {
    case $PREFIX in
        /*[\&\|]* | [!/]*) fail "PREFIX=$PREFIX: not an absolute path without & and |" ;;
    esac
    for tool in $PRODUCT pinfold; do
        [ -f "$BINDIR/$tool" ] || fail "$BINDIR/$tool: not found; run make release first"
    done
    folder "$SHARE"
    record "$MANIFEST"

    folder "$PREFIX/sbin"
    for tool in $PRODUCT pinfold; do
        install_file 0755 "$BINDIR/$tool" "$PREFIX/sbin/$tool"
    done
    install_file 0755 packaging/install.sh "$SHARE/install.sh"
    folder "$UNITDIR"
    for unit in $UNITS; do
        install_file 0644 "packaging/$unit" "$UNITDIR/$unit"
    done
    sed -i "s|/usr/local/sbin|$PREFIX/sbin|" "$DESTDIR$UNITDIR/pinfold-recover.service"

    if [ -n "$DESTDIR" ]; then
        folder "$SNIPPETS"
    fi
    if [ -L "$DESTDIR$SNIPPETS/hook" ]; then
        say "$SNIPPETS/hook: a link to $(readlink "$DESTDIR$SNIPPETS/hook"), left as it is"
    elif [ -e "$DESTDIR$SNIPPETS/hook" ] && ! grep -q 'pinfold hook' "$DESTDIR$SNIPPETS/hook"; then
        say "$SNIPPETS/hook: not Pinfold's, left as it is. Install the hookscript under another name:"
        say "install -m 0755 $PREFIX/sbin/hook $SNIPPETS/pinfold-hook"
    elif [ -d "$DESTDIR$SNIPPETS" ]; then
        install_file 0755 "$BINDIR/hook" "$SNIPPETS/hook"
    else
        say "$SNIPPETS: not found, so the hookscript was not installed. Copy it into the snippets folder of a storage"
        say "that allows snippets: install -m 0755 $PREFIX/sbin/hook STORAGE/snippets/hook"
    fi
    for unit in $UNITS; do
        if [ "$UNITDIR" != /etc/systemd/system ] && [ -f "$DESTDIR/etc/systemd/system/$unit" ]; then
            say "/etc/systemd/system/$unit: overrides $UNITDIR/$unit; remove it unless you made it"
        fi
    done
}

# Prints the ids of guests whose present configuration has hook as its hookscript; snapshots do not count.
users_of_hook() {
    for conf in "$DESTDIR"/etc/pve/qemu-server/*.conf "$DESTDIR"/etc/pve/lxc/*.conf; do
        [ -f "$conf" ] || continue
        volume=$(sed -n '/^\[/q; s|^hookscript:[[:space:]]*\(.*[:/]snippets/hook\)[[:space:]]*$|\1|p' "$conf")
        [ -n "$volume" ] || continue
        # Another script can have that name.
        file=$(pvesm path "$volume" 2>/dev/null) || file=
        if [ -f "$file" ] && ! grep -qa pinfold "$file"; then
            continue
        fi
        basename "$conf" .conf
    done
}

uninstall_all() {
    [ -f "$DESTDIR$MANIFEST" ] || fail "$DESTDIR$MANIFEST: not found; nothing is installed with PREFIX=$PREFIX"
    [ ! -e "$DESTDIR/run/pinfold/state.json" ] || fail "a VM is isolated or was not restored (hook status):" \
        "shut it down, run hook recover, then make uninstall"
    ids=$(users_of_hook | tr '\n' ' ')
    [ -z "$ids" ] || fail "the guests ${ids}have hook as their hookscript and would not start without it:" \
        "run qm set VMID --delete hookscript (containers: pct set), then make uninstall"
    [ ! -e "$DESTDIR/etc/systemd/system/multi-user.target.wants/pinfold-recover.path" ] ||
        fail "pinfold-recover.path is enabled: run systemctl disable --now pinfold-recover.path, then make uninstall"

    # Files before the folders that hold them.
    LC_ALL=C sort -r "$DESTDIR$MANIFEST" | while IFS= read -r path; do
        # The package's link, which was made since.
        if [ -L "$DESTDIR$path" ]; then
            continue
        fi
        if [ -d "$DESTDIR$path" ]; then
            rmdir --ignore-fail-on-non-empty "$DESTDIR$path"
        else
            rm -f "$DESTDIR$path"
        fi
    done
}

case ${1:-} in
    install) install_all ;;
    uninstall) uninstall_all ;;
    *) fail "usage: packaging/install.sh install|uninstall" ;;
esac
