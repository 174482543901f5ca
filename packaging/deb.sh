#!/bin/sh
# Builds target/pinfold_VERSION_ARCH.deb from the release build: `make deb` calls this.
#
# Plain dpkg-deb: cargo-deb would be one more program to build, and would need the same generated man pages, completions
# and maintainer scripts beside it.
set -eu

BINDIR=${BINDIR:-target/release}
PRODUCT=${PRODUCT:?}
DEB_FOLDER=${DEB_FOLDER:-target}
# Proxmox VE 8 has glibc 2.36, Proxmox VE 9 has 2.41; control says 2.34, and nothing here may need a newer one.
MAX_GLIBC=2.34

version=${DEB_VERSION:-$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)}
arch=$(dpkg --print-architecture)
root=target/deb/pinfold
rm -rf target/deb
mkdir -p "$root"

programs="$PRODUCT pinfold"
for program in $programs; do
    install -D -m 0755 "$BINDIR/$program" "$root/usr/sbin/$program"
    strip --strip-unneeded "$root/usr/sbin/$program"
    newest=$(objdump -T "$root/usr/sbin/$program" | grep -o 'GLIBC_[0-9.]*' | sed 's/GLIBC_//' | sort -uV | tail -1)
    if [ "$(printf '%s\n%s\n' "$newest" "$MAX_GLIBC" | sort -V | tail -1)" != "$MAX_GLIBC" ]; then
        echo "$program: needs glibc $newest, newer than $MAX_GLIBC; build on Debian 12" >&2
        exit 1
    fi
done

for unit in pinfold-recover.path pinfold-recover.service; do
    install -D -m 0644 "packaging/$unit" "$root/usr/lib/systemd/system/$unit"
done
sed -i 's|/usr/local/sbin|/usr/sbin|' "$root/usr/lib/systemd/system/pinfold-recover.service"

"$BINDIR/manual" target/deb/manual
for page in target/deb/manual/man/man*/*; do
    section=${page##*.}
    install -D -m 0644 "$page" "$root/usr/share/man/man$section/${page##*/}"
    gzip -9n "$root/usr/share/man/man$section/${page##*/}"
done
for file in target/deb/manual/bash/*; do
    install -D -m 0644 "$file" "$root/usr/share/bash-completion/completions/${file##*/}"
done
for file in target/deb/manual/zsh/*; do
    install -D -m 0644 "$file" "$root/usr/share/zsh/vendor-completions/${file##*/}"
done
for file in target/deb/manual/fish/*; do
    install -D -m 0644 "$file" "$root/usr/share/fish/vendor_completions.d/${file##*/}"
done

doc=$root/usr/share/doc/pinfold
install -D -m 0644 packaging/debian/copyright "$doc/copyright"
install -D -m 0644 docs/example.toml "$doc/examples/100.toml"
# hook blame and hook check refer to it.
install -D -m 0644 docs/noise.md "$doc/noise.md"
# The release's own date, so that the same commit makes the same package.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH
cat >target/deb/changelog <<END
pinfold ($version) unstable; urgency=medium

  * See /usr/share/doc/pinfold/NEWS.gz.

 -- The Pinfold authors <pinfold@example.org>  $(LC_ALL=C date -u -R -d "@$SOURCE_DATE_EPOCH")
END
install -m 0644 target/deb/changelog "$doc/changelog"
install -m 0644 CHANGELOG.md "$doc/NEWS"
gzip -9n "$doc/changelog" "$doc/NEWS"

mkdir -p "$root/DEBIAN"
size=$(du -ks --exclude=DEBIAN "$root" | cut -f1)
sed -e "s/@VERSION@/$version/; s/@ARCH@/$arch/; s/@SIZE@/$size/" packaging/debian/control >"$root/DEBIAN/control"
# Which guests have hook as their hookscript is asked by prerm as well.
guests=$(sed -n '/^users_of_hook() {/,/^}/p' packaging/install.sh)
[ -n "$guests" ]
for script in postinst prerm postrm; do
    {
        sed '/^# @USERS_OF_HOOK@$/,$d' "packaging/debian/$script"
        if grep -q '^# @USERS_OF_HOOK@$' "packaging/debian/$script"; then
            printf 'DESTDIR=\n%s\n' "$guests"
            sed '1,/^# @USERS_OF_HOOK@$/d' "packaging/debian/$script"
        fi
    } >"$root/DEBIAN/$script"
    chmod 0755 "$root/DEBIAN/$script"
done
(cd "$root" && find usr -type f -print0 | LC_ALL=C sort -z | xargs -0 md5sum) >"$root/DEBIAN/md5sums"

dpkg-deb --root-owner-group -Zxz --build "$root" "$DEB_FOLDER/pinfold_${version}_$arch.deb"
