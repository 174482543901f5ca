# Starts each shell on a terminal, types the start of a VM's number, presses Tab and prints what the shell made of it.
zmodload zsh/zpty
export TERM=xterm
print 'autoload -Uz compinit; compinit' >~/.zshrc

# Waits until a shell has printed a text.
expect() {
	local text part
	repeat 600; do
		while zpty -rt terminal part; do text+=$part; done
		[[ $text == *$1* ]] && return
		sleep 0.1
	done
	print -r -- "no $1 in: $text"
	exit 1
}

# -e: readline prints what is typed only on a terminal that echoes.
for shell in bash zsh fish; do
	zpty -e terminal $shell -i
	[[ $shell != bash ]] || zpty -w terminal 'source /usr/share/bash-completion/bash_completion'
	# The echo of what is typed is not what is waited for.
	zpty -w terminal 'echo re""ady'
	expect ready
	zpty -w -n terminal $'hook check 47\t'
	expect 4711
	print "$shell: 4711"
	zpty -d terminal
done
