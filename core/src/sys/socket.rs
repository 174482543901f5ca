//! Connections to the sockets of other programs.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, socket};

/// Connects without waiting: with the queue of new clients full, connect(2) would, for as long as
/// it likes.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] if the queue is full.
pub(crate) fn connect(path: &Path) -> io::Result<UnixStream> {
    let fd: OwnedFd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    let address = UnixAddr::new(path)?;
    nix::sys::socket::connect(fd.as_raw_fd(), &address).map_err(|errno| match errno {
        Errno::EAGAIN => io::ErrorKind::WouldBlock.into(),
        errno => io::Error::from(errno),
    })?;
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false)?;
    Ok(stream)
}
