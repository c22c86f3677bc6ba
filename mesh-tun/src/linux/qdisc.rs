//! The queueing discipline of a TUN device: none.
//!
//! A TUN device never tells its queueing discipline to wait (before Linux 7.3), so the discipline queues nothing: what does
//! not fit the device's ring is dropped behind its back, and a local sender learns of it only a round trip later. With
//! `noqueue` the drop is the sender's return value: TCP slows down at once and sends the segment again without having
//! lost it.
//!
//! The request is `RTM_NEWQDISC` (rtnetlink(7)), integers in the host's byte order:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 16 | `nlmsghdr`: length, type, flags, sequence, port |
//! | 16 | 20 | `tcmsg`: family, padding, interface index, handle, parent (root), info |
//! | 36 | 4 | `rtattr`: length 12, type 1 (`TCA_KIND`) |
//! | 40 | 8 | `noqueue`, ended by a zero |

use std::io;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with};

use super::kernel;

const LENGTH: usize = 48;
const ANSWER_HEADER: usize = 16;

/// Whether the running kernel's TUN devices give their queueing discipline no sign when they are full.
pub(super) fn is_blind() -> bool {
    kernel::running().is_some_and(|version| version < (7, 3, 0))
}

/// Takes the queueing discipline off the interface with this index.
pub(super) fn remove(index: u32) -> io::Result<()> {
    let kernel = SocketAddrNetlink::new(0, 0);
    // No protocol is protocol 0, NETLINK_ROUTE.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    sendto(&socket, &request(index), SendFlags::empty(), &kernel)?;
    let mut answer = [0; 128];
    let (len, _) = recv(&socket, &mut answer, RecvFlags::empty())?;
    // The kernel acknowledges with an error message: the header, a code (0 or a negated errno), our header.
    match answer[..len].get(ANSWER_HEADER..).and_then(|body| body.first_chunk()).map(|code| i32::from_ne_bytes(*code)) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn request(index: u32) -> [u8; LENGTH] {
    const ROOT: u32 = 0xffff_ffff;
    let mut bytes = [0; LENGTH];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
    put(0, &48_u32.to_ne_bytes());
    put(4, &libc::RTM_NEWQDISC.to_ne_bytes());
    put(6, &u16::try_from(flags).unwrap_or(0).to_ne_bytes());
    put(20, &index.to_ne_bytes());
    put(28, &ROOT.to_ne_bytes());
    put(36, &12_u16.to_ne_bytes());
    put(38, &1_u16.to_ne_bytes());
    put(40, b"noqueue\0");
    bytes
}
