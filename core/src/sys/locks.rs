//! Who holds a lock on a file: /proc/locks, see proc_locks(5).

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

use crate::error::Result;
use crate::sysroot::Sysroot;

/// The process that holds a lock of flock(2) on a file, if the kernel shows it: not one of another
/// pid namespace.
///
/// # Errors
/// If /proc/locks cannot be read.
pub(crate) fn holder(root: &Sysroot, file: &Metadata) -> Result<Option<i32>> {
    let (major, minor) = (
        nix::sys::stat::major(file.dev()),
        nix::sys::stat::minor(file.dev()),
    );
    let object = format!("{major:02x}:{minor:02x}:{}", file.ino());
    Ok(parse(&root.read("proc/locks")?, &object))
}

/// The process of the lock on `object`, `fd:00:1234`; not one that waits for it (`1: -> FLOCK`).
fn parse(text: &str, object: &str) -> Option<i32> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        if words.next()? != "FLOCK" {
            return None;
        }
        let pid = words.nth(2)?.parse().ok().filter(|pid| *pid > 0)?;
        (words.next()? == object).then_some(pid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_empty_garbage_hostile() {
        let text = "1: POSIX  ADVISORY  WRITE 500 00:19:1234 0 EOF\n\
                    2: FLOCK  ADVISORY  WRITE 4711 00:19:1234 0 EOF\n\
                    2: -> FLOCK  ADVISORY  WRITE 4712 00:19:1234 0 EOF\n\
                    3: FLOCK  ADVISORY  WRITE -1 00:19:99 0 EOF\n\
                    4: FLOCK  ADVISORY\n\
                    5:\n";
        assert_eq!(parse(text, "00:19:1234"), Some(4711));
        assert_eq!(parse(text, "00:19:99"), None);
        assert_eq!(parse(text, "00:19:123"), None);
        assert_eq!(parse("", "00:19:1234"), None);
    }
}
