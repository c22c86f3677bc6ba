//! The system calls that no safe crate offers: one a function, each with its argument for being sound.
#![expect(unsafe_code, reason = "no safe wrapper keeps the buffers of recvmmsg and sendmmsg, or knows these options")]

use std::io;
use std::mem::{self, MaybeUninit};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

/// The most messages that one call moves.
pub(super) const MAX_MESSAGES: usize = 64;

/// The most pieces of memory that the messages of one call are gathered from.
const MAX_PARTS: usize = 256;

#[expect(clippy::cast_possible_truncation, reason = "address families are small numbers")]
const AF_INET: libc::sa_family_t = libc::AF_INET as libc::sa_family_t;
#[expect(clippy::cast_possible_truncation, reason = "address families are small numbers")]
const AF_INET6: libc::sa_family_t = libc::AF_INET6 as libc::sa_family_t;

#[expect(clippy::cast_possible_truncation, reason = "flags of an interface are 16 bits")]
const DETACH_QUEUE: libc::c_short = libc::IFF_DETACH_QUEUE as libc::c_short;

/// A socket address as the kernel writes it: IPv4 or IPv6, told apart by the family that both begin with.
#[derive(Clone, Copy)]
#[repr(C)]
union Address {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

/// The kernel's answer with `UDP_GRO`: the length of each datagram but the last in what was received.
#[derive(Clone, Copy)]
#[repr(C)]
struct GatherControl {
    header: libc::cmsghdr,
    segment: libc::c_int,
    /// Room for the padding that `CMSG_SPACE` asks for.
    _padding: [u8; 12],
}

/// Our wish with `UDP_SEGMENT`: the length of each datagram but the last in what is sent.
#[derive(Clone, Copy)]
#[repr(C)]
struct SegmentControl {
    header: libc::cmsghdr,
    segment: u16,
    /// Room for the padding that `CMSG_SPACE` asks for.
    _padding: [u8; 6],
}

/// Datagrams to send to one receiver.
#[derive(Debug, Clone, Copy)]
pub(super) struct Message<D> {
    pub(super) to: SocketAddr,
    /// The datagrams, in pieces of memory; more than one needs `segment`.
    pub(super) datagrams: D,
    /// With several datagrams, the length of each but the last, which may be shorter.
    pub(super) segment: Option<u16>,
}

/// What was received into the buffer of the same index.
#[derive(Debug, Clone, Copy)]
pub(super) struct Received {
    pub(super) from: Option<SocketAddr>,
    pub(super) len: usize,
    /// The length of each datagram but the last, if there is more than one.
    pub(super) segment: Option<usize>,
    pub(super) truncated: bool,
}

/// Receives into up to [`MAX_MESSAGES`] of `buffers` without waiting, reporting each to `each`.
pub(super) fn recvmmsg<'a>(
    fd: BorrowedFd<'_>,
    buffers: impl Iterator<Item = &'a mut [u8]>,
    mut each: impl FnMut(Received),
) -> io::Result<usize> {
    let mut names = [MaybeUninit::<Address>::uninit(); MAX_MESSAGES];
    let mut parts = [MaybeUninit::<libc::iovec>::uninit(); MAX_MESSAGES];
    let mut controls = [MaybeUninit::<GatherControl>::uninit(); MAX_MESSAGES];
    let mut headers = [MaybeUninit::<libc::mmsghdr>::uninit(); MAX_MESSAGES];
    let mut count = 0;
    let room = names.iter_mut().zip(&mut parts).zip(&mut controls).zip(&mut headers);
    for (buffer, (((name, part), control), header)) in buffers.zip(room) {
        let part = part.write(libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() });
        let header = header.write(header_for(name.as_mut_ptr(), part, 1));
        header.msg_hdr.msg_control = control.as_mut_ptr().cast();
        header.msg_hdr.msg_controllen = size_of::<GatherControl>() as _;
        count += 1;
    }
    if count == 0 {
        return Ok(0);
    }
    let flags = libc::MSG_DONTWAIT as _;
    let wanted = u32::try_from(count).unwrap_or(0);
    // SAFETY: the first `count` headers are initialised; each points to a name, a control buffer and an iovec in arrays
    // that outlive the call and are used by that header only, with the lengths they have, and each iovec to a buffer that
    // this function borrows exclusively until it returns, since `buffers` yields disjoint `&mut` slices. No timeout is
    // given.
    let received =
        unsafe { libc::recvmmsg(fd.as_raw_fd(), headers.as_mut_ptr().cast(), wanted, flags, std::ptr::null_mut()) };
    let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    for ((header, name), control) in headers.iter().zip(&names).zip(&controls).take(received.min(count)) {
        // SAFETY: `received` headers at most `count` were initialised above and then updated by the kernel.
        let header = unsafe { header.assume_init_ref() };
        let from = address(name, header.msg_hdr.msg_namelen);
        let truncated = header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0;
        let segment = gathered(control, header.msg_hdr.msg_controllen);
        each(Received { from, len: header.msg_len as usize, segment, truncated });
    }
    Ok(received)
}

/// Sends up to [`MAX_MESSAGES`] messages without waiting and returns how many went out; an error is about the first.
pub(super) fn sendmmsg<'a, D: ExactSizeIterator<Item = &'a [u8]>>(
    fd: BorrowedFd<'_>,
    messages: impl Iterator<Item = Message<D>>,
) -> io::Result<usize> {
    let mut names = [MaybeUninit::<Address>::uninit(); MAX_MESSAGES];
    let mut parts = [MaybeUninit::<libc::iovec>::uninit(); MAX_PARTS];
    let mut controls = [MaybeUninit::<SegmentControl>::uninit(); MAX_MESSAGES];
    let mut headers = [MaybeUninit::<libc::mmsghdr>::uninit(); MAX_MESSAGES];
    let (mut count, mut free) = (0, parts.as_mut_slice());
    for (message, ((name, control), header)) in messages.zip(names.iter_mut().zip(&mut controls).zip(&mut headers)) {
        let Some((mine, others)) = mem::take(&mut free).split_at_mut_checked(message.datagrams.len()) else { break };
        free = others;
        let mut written = 0;
        for (part, datagram) in mine.iter_mut().zip(message.datagrams) {
            part.write(libc::iovec { iov_base: datagram.as_ptr().cast_mut().cast(), iov_len: datagram.len() });
            written += 1;
        }
        let (address, len) = raw(message.to);
        let header = header.write(header_for(name.write(address), mine.as_mut_ptr().cast(), written));
        header.msg_hdr.msg_namelen = len;
        if let Some(segment) = message.segment {
            header.msg_hdr.msg_control = std::ptr::from_mut(control.write(segment_control(segment))).cast();
            header.msg_hdr.msg_controllen = size_of::<SegmentControl>() as _;
        }
        count += 1;
    }
    if count == 0 {
        return Ok(0);
    }
    let flags = (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as _;
    let wanted = u32::try_from(count).unwrap_or(0);
    // SAFETY: the first `count` headers are initialised, and so are the names and the control messages they point to,
    // and as many iovecs as they say, each used by one header; all outlive the call. The iovecs point into `&'a [u8]`
    // slices that live beyond this function; the kernel only reads them, whatever the pointer type says.
    let sent = unsafe { libc::sendmmsg(fd.as_raw_fd(), headers.as_mut_ptr().cast(), wanted, flags) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Asks the kernel to hand over neighbouring datagrams of one sender as one (`UDP_GRO`, Linux 5.0).
pub(super) fn set_udp_gro(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let value = libc::c_int::from(on);
    // SAFETY: the option's value is an int, and the pointer and length given are those of one that outlives the call.
    let outcome = unsafe {
        let value = std::ptr::from_ref(&value).cast();
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_UDP, libc::UDP_GRO, value, socklen::<libc::c_int>())
    };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sends with "don't fragment", up to the MTU of the interface whatever the path is thought to carry
/// (`IP_PMTUDISC_PROBE`): longer datagrams are refused with `EMSGSIZE`, and none is fragmented.
pub(super) fn set_dont_fragment(fd: BorrowedFd<'_>, v6: bool) -> io::Result<()> {
    let options: &[_] = if v6 {
        &[
            (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE),
            (libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, 1),
        ]
    } else {
        &[(libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)]
    };
    for (level, option, value) in options {
        // SAFETY: the options' values are ints, and the pointer and length given are those of one that outlives the call.
        let outcome = unsafe {
            let value = std::ptr::from_ref::<libc::c_int>(value).cast();
            libc::setsockopt(fd.as_raw_fd(), *level, *option, value, socklen::<libc::c_int>())
        };
        if outcome != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Sends without UDP checksums: the kernel then refuses to segment, as drivers may.
#[cfg(test)]
pub(super) fn set_no_check(fd: BorrowedFd<'_>) -> io::Result<()> {
    let value: libc::c_int = 1;
    // SAFETY: the option's value is an int, and the pointer and length given are those of one that outlives the call.
    let outcome = unsafe {
        let value = std::ptr::from_ref(&value).cast();
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_NO_CHECK, value, socklen::<libc::c_int>())
    };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What a TUN device with virtio headers may hand us (`TUN_F_…`).
pub(super) fn set_tun_offload(fd: BorrowedFd<'_>, mask: libc::c_uint) -> io::Result<()> {
    // SAFETY: this request takes its argument by value and touches no memory of ours.
    let outcome = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD as _, libc::c_ulong::from(mask)) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Takes the queue of this descriptor of a TUN device out of use: it can be written to, and nothing is read from it.
pub(super) fn detach_tun_queue(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: `ifreq` is plain data for which zero bytes are valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    request.ifr_ifru.ifru_flags = DETACH_QUEUE;
    // SAFETY: this request reads an `ifreq`, and the pointer given is to one that outlives the call.
    let outcome = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETQUEUE as _, std::ptr::from_ref(&request)) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn segment_control(segment: u16) -> SegmentControl {
    // SAFETY: `cmsghdr` is plain data for which zero bytes are valid.
    let mut header: libc::cmsghdr = unsafe { mem::zeroed() };
    header.cmsg_level = libc::SOL_UDP;
    header.cmsg_type = libc::UDP_SEGMENT;
    header.cmsg_len = (mem::offset_of!(SegmentControl, segment) + size_of::<u16>()) as _;
    SegmentControl { header, segment, _padding: [0; 6] }
}

/// What the control message of `len` bytes says, if it is the one asked for.
fn gathered(control: &MaybeUninit<GatherControl>, len: usize) -> Option<usize> {
    let end = mem::offset_of!(GatherControl, segment) + size_of::<libc::c_int>();
    if len < end {
        return None;
    }
    // SAFETY: the kernel reports that it wrote at least up to the end of `segment`. The fields are read through the
    // pointer, so the padding, which may not be written, is not touched; any bytes are valid for them.
    let (header, segment) = unsafe { ((*control.as_ptr()).header, (*control.as_ptr()).segment) };
    let ours = header.cmsg_level == libc::SOL_UDP && header.cmsg_type == libc::UDP_GRO && header.cmsg_len >= end;
    usize::try_from(segment).ok().filter(|segment| ours && *segment > 0)
}

fn header_for(name: *mut Address, parts: *mut libc::iovec, count: usize) -> libc::mmsghdr {
    // SAFETY: `mmsghdr` is plain data for which zero bytes are valid: null pointers, no control data, no flags.
    let mut header: libc::mmsghdr = unsafe { mem::zeroed() };
    header.msg_hdr.msg_name = name.cast();
    header.msg_hdr.msg_namelen = socklen::<Address>();
    header.msg_hdr.msg_iov = parts;
    header.msg_hdr.msg_iovlen = count as _;
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
