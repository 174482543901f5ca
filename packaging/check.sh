#!/bin/sh
# Checks the package that deb.sh built: `make package` calls this.
set -eu

failed=0
complain() {
    echo "$*" >&2
    failed=1
}

manual=target/deb/manual
pages=0
for page in "$manual"/man/man*/*; do
    output=$(groff -ww -man -Tutf8 -z "$page" 2>&1)
    [ -z "$output" ] || complain "$page: $output"
    pages=$((pages + 1))
done
[ "$pages" -gt 25 ] || complain "only $pages man pages"
for shell in bash zsh fish; do
    for file in "$manual/$shell"/*; do
        "$shell" -n "$file" || complain "$file: $shell does not parse it"
    done
done

# Completions in real shells, with a host of two VMs.
host=$PWD/target/deb/host
mkdir -p "$host/etc/pve/qemu-server" "$host/bin"
touch "$host/etc/pve/qemu-server/100.conf" "$host/etc/pve/qemu-server/4711.conf"
printf '#!/bin/sh\nexec "%s" --sysroot "%s" "$@"\n' "$PWD/target/deb/pinfold/usr/sbin/hook" "$host" >"$host/bin/hook"
chmod 755 "$host/bin/hook"
expect_vm() {
    case $2 in
        *4711*) ;;
        *) complain "$1 does not complete a VM: $2" ;;
    esac
}
# Every function that a script calls is defined: each program once, with nothing typed.
for file in "$manual"/bash/*; do
    program=${file##*/}
    output=$(PATH=$host/bin:$PATH bash --norc -c '
        source "$1"
        COMP_WORDS=("$2" --) COMP_CWORD=1 COMP_LINE="$2 --" COMP_POINT=$((${#2} + 3))
        function=$(complete -p "$2" | sed "s/.*-F \([^ ]*\).*/\1/")
        "$function" "$2" -- "$2"
        echo "${COMPREPLY[*]}"' bash "$file" "$program" 2>&1)
    case $output in
        *--help*) ;;
        *) complain "bash does not complete the options of $program: $output" ;;
    esac
done
expect_vm bash "$(PATH=$host/bin:$PATH bash --norc -c '
    source target/deb/manual/bash/hook
    COMP_WORDS=(hook check 47) COMP_CWORD=2 COMP_LINE="hook check 47" COMP_POINT=13
    function=$(complete -p hook | sed "s/.*-F \([^ ]*\).*/\1/")
    "$function" hook 47 check
    echo "${COMPREPLY[*]}"')"
expect_vm fish "$(PATH=$host/bin:$PATH HOME=$host fish --no-config -c '
    source target/deb/manual/fish/hook.fish
    complete -C "hook check 47"')"
# zsh completes only on a terminal: what is typed, and what has to appear.
in_zsh() {
    PATH=$host/bin:$PATH zsh -f -c '
        zmodload zsh/zpty
        zpty terminal "zsh -f -i"
        zpty -w terminal "fpath=($PWD/target/deb/manual/zsh \$fpath); autoload -Uz compinit; compinit -u -D; print re\"\"ady"
        expect() {
            local text part
            repeat 200; do
                while zpty -rt terminal part; do text+=$part; done
                [[ $text == *$1* ]] && return
                sleep 0.1
            done
            return 1
        }
        expect ready
        zpty -w -n terminal "$1$(printf "\t")"
        expect "$2" && print -r -- "$2"' zsh "$1" "$2"
}
expect_vm zsh "$(in_zsh 'hook check 47' 4711)"
[ -n "$(in_zsh 'hook stat' status)" ] || complain "zsh does not complete the commands of hook"

package=$(ls target/pinfold_*.deb)
output=$(lintian --allow-root --fail-on warning "$package" 2>&1) || complain "$output"
[ "$failed" = 0 ] || exit 1
echo "$package: $pages man pages, completions for bash, zsh and fish, lintian: no warning"
