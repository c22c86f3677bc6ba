//! The system calls that no safe crate offers: one a function, each with its argument for being sound.
#![expect(unsafe_code, reason = "recvmmsg and sendmmsg have no safe wrapper that keeps its buffers")]

use std::io;
use std::mem::{self, MaybeUninit};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

/// The most datagrams that one call moves.
pub(super) const MAX_MESSAGES: usize = 64;

#[expect(clippy::cast_possible_truncation, reason = "address families are small numbers")]
const AF_INET: libc::sa_family_t = libc::AF_INET as libc::sa_family_t;
#[expect(clippy::cast_possible_truncation, reason = "address families are small numbers")]
const AF_INET6: libc::sa_family_t = libc::AF_INET6 as libc::sa_family_t;

/// A socket address as the kernel writes it: IPv4 or IPv6, told apart by the family that both begin with.
#[derive(Clone, Copy)]
#[repr(C)]
union Address {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

/// One datagram to send.
#[derive(Debug, Clone, Copy)]
pub(super) struct Message<'a> {
    pub(super) to: SocketAddr,
    pub(super) datagram: &'a [u8],
}

/// One datagram received into the buffer of the same index.
#[derive(Debug, Clone, Copy)]
pub(super) struct Received {
    pub(super) from: Option<SocketAddr>,
    pub(super) len: usize,
    pub(super) truncated: bool,
}

/// Receives up to [`MAX_MESSAGES`] datagrams without waiting, one into each of `buffers`, reporting each to `each`.
pub(super) fn recvmmsg<'a>(
    fd: BorrowedFd<'_>,
    buffers: impl Iterator<Item = &'a mut [u8]>,
    mut each: impl FnMut(Received),
) -> io::Result<usize> {
    let mut names = [MaybeUninit::<Address>::uninit(); MAX_MESSAGES];
    let mut parts = [MaybeUninit::<libc::iovec>::uninit(); MAX_MESSAGES];
    let mut headers = [MaybeUninit::<libc::mmsghdr>::uninit(); MAX_MESSAGES];
    let mut count = 0;
    for (((buffer, name), part), header) in buffers.zip(&mut names).zip(&mut parts).zip(&mut headers) {
        let part = part.write(libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() });
        header.write(header_for(name.as_mut_ptr(), part));
        count += 1;
    }
    if count == 0 {
        return Ok(0);
    }
    let flags = libc::MSG_DONTWAIT as _;
    let wanted = u32::try_from(count).unwrap_or(0);
    // SAFETY: the first `count` headers are initialised; each points to a name and an iovec in arrays that outlive the
    // call and are used by that header only, and each iovec to a buffer that this function borrows exclusively until it
    // returns, since `buffers` yields disjoint `&mut` slices. No timeout is given.
    let received =
        unsafe { libc::recvmmsg(fd.as_raw_fd(), headers.as_mut_ptr().cast(), wanted, flags, std::ptr::null_mut()) };
    let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    for (header, name) in headers.iter().zip(&names).take(received.min(count)) {
        // SAFETY: `received` headers at most `count` were initialised above and then updated by the kernel.
        let header = unsafe { header.assume_init_ref() };
        let from = address(name, header.msg_hdr.msg_namelen);
        let truncated = header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0;
        each(Received { from, len: header.msg_len as usize, truncated });
    }
    Ok(received)
}

/// Sends up to [`MAX_MESSAGES`] datagrams without waiting and returns how many went out; an error is about the first.
pub(super) fn sendmmsg<'a>(fd: BorrowedFd<'_>, messages: impl Iterator<Item = Message<'a>>) -> io::Result<usize> {
    let mut names = [MaybeUninit::<Address>::uninit(); MAX_MESSAGES];
    let mut parts = [MaybeUninit::<libc::iovec>::uninit(); MAX_MESSAGES];
    let mut headers = [MaybeUninit::<libc::mmsghdr>::uninit(); MAX_MESSAGES];
    let mut count = 0;
    for (((message, name), part), header) in messages.zip(&mut names).zip(&mut parts).zip(&mut headers) {
        let (address, len) = raw(message.to);
        let name = name.write(address);
        let part = part.write(libc::iovec {
            iov_base: message.datagram.as_ptr().cast_mut().cast(),
            iov_len: message.datagram.len(),
        });
        header.write(header_for(name, part)).msg_hdr.msg_namelen = len;
        count += 1;
    }
    if count == 0 {
        return Ok(0);
    }
    let flags = (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as _;
    let wanted = u32::try_from(count).unwrap_or(0);
    // SAFETY: the first `count` headers are initialised, and so are the names and iovecs they point to, which outlive
    // the call. The iovecs point into `&'a [u8]` slices that live beyond this function; the kernel only reads them,
    // whatever the pointer type says.
    let sent = unsafe { libc::sendmmsg(fd.as_raw_fd(), headers.as_mut_ptr().cast(), wanted, flags) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

fn header_for(name: *mut Address, part: *mut libc::iovec) -> libc::mmsghdr {
    // SAFETY: `mmsghdr` is plain data for which zero bytes are valid: null pointers, no control data, no flags.
    let mut header: libc::mmsghdr = unsafe { mem::zeroed() };
    header.msg_hdr.msg_name = name.cast();
    header.msg_hdr.msg_namelen = socklen::<Address>();
    header.msg_hdr.msg_iov = part;
    header.msg_hdr.msg_iovlen = 1;
    header
}

fn socklen<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).unwrap_or(0)
}

fn raw(address: SocketAddr) -> (Address, libc::socklen_t) {
    match address {
        SocketAddr::V4(v4) => {
            let address = libc::sockaddr_in {
                sin_family: AF_INET,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                sin_zero: [0; 8],
            };
            (Address { v4: address }, socklen::<libc::sockaddr_in>())
        }
        SocketAddr::V6(v6) => {
            let address = libc::sockaddr_in6 {
                sin6_family: AF_INET6,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            };
            (Address { v6: address }, socklen::<libc::sockaddr_in6>())
        }
    }
}

fn address(name: &MaybeUninit<Address>, len: libc::socklen_t) -> Option<SocketAddr> {
    if len >= socklen::<libc::sockaddr_in6>() {
        // SAFETY: the kernel reports that it wrote a whole `sockaddr_in6`, for which any bytes are valid.
        let v6 = unsafe { name.assume_init_ref().v6 };
        return (v6.sin6_family == AF_INET6).then(|| {
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            SocketAddrV6::new(ip, u16::from_be(v6.sin6_port), v6.sin6_flowinfo, v6.sin6_scope_id).into()
        });
    }
    if len < socklen::<libc::sockaddr_in>() {
        return None;
    }
    // SAFETY: the kernel reports that it wrote at least a whole `sockaddr_in`, for which any bytes are valid. Reading
    // the field copies no more than those bytes.
    let v4 = unsafe { (*name.as_ptr()).v4 };
    (v4.sin_family == AF_INET).then(|| {
        let ip = Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes());
        SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_kernel_form() {
        for text in ["127.0.0.1:1", "[2001:db8::1]:65535", "[fe80::1%3]:9"] {
            let expected: SocketAddr = text.parse().unwrap();
            let (raw, len) = raw(expected);
            assert_eq!(address(&MaybeUninit::new(raw), len), Some(expected));
        }
    }

    #[test]
    fn an_absent_address_is_none() {
        assert_eq!(address(&MaybeUninit::uninit(), 0), None);
    }
}
