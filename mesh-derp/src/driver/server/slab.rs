//! The buffers in which bytes come and go.
//!
//! A connection has one only while it has something to read or to write; between times it holds none, however many of
//! them are idle. Packets are handed on as slices of the buffer they were read into, so a buffer is used again once the
//! last of its packets has been written.

use std::cell::RefCell;
use std::collections::VecDeque;

use bytes::BytesMut;

/// How much is read from a connection, or handed to a socket, at once: four TLS records.
pub(super) const UNIT: usize = 64 * 1024;
/// So little is not worth a buffer.
pub(super) const LITTLE: usize = 8 * 1024;
/// Buffers that each thread keeps for later.
const KEPT: usize = 16;
/// How many of them are looked at before a new one is made: the longest unused are the likeliest to be free.
const TRIED: usize = 2;

thread_local! {
    static POOL: RefCell<VecDeque<BytesMut>> = const { RefCell::new(VecDeque::new()) };
}

/// An empty buffer with room for [`UNIT`] bytes.
pub(super) fn take() -> BytesMut {
    let reused = POOL.with_borrow_mut(|pool| {
        for _ in 0..TRIED.min(pool.len()) {
            let mut buffer = pool.pop_front()?;
            if buffer.try_reclaim(UNIT) {
                return Some(buffer);
            }
            pool.push_back(buffer);
        }
        None
    });
    reused.unwrap_or_else(|| BytesMut::with_capacity(UNIT))
}

/// Gives back a buffer that [`take`] has handed out, whatever is still in it or cut off it.
pub(super) fn give_back(mut buffer: BytesMut) {
    buffer.clear();
    POOL.with_borrow_mut(|pool| {
        if pool.len() < KEPT {
            pool.push_back(buffer);
        }
    });
}

/// What has been read, on its way through a connection's decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lent {
    /// The buffer itself.
    Whole,
    /// A copy: it was so little that a packet of it would keep a whole buffer from being used again until it is written.
    Copy,
}

/// Moves what has been read into `buffer`.
pub(super) fn lend(unit: BytesMut, buffer: &mut BytesMut) -> Lent {
    if unit.len() > LITTLE {
        *buffer = unit;
        return Lent::Whole;
    }
    *buffer = BytesMut::from(&unit[..]);
    give_back(unit);
    Lent::Copy
}

/// Leaves in `buffer` no more than what has not been taken from it.
pub(super) fn keep_rest(buffer: &mut BytesMut, lent: Lent) {
    let rest = if buffer.is_empty() { BytesMut::new() } else { BytesMut::from(&buffer[..]) };
    let used = std::mem::replace(buffer, rest);
    if lent == Lent::Whole {
        give_back(used);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_once_its_last_slice_is_gone() {
        let mut first = take();
        first.extend_from_slice(b"packet and rest");
        let at = first.as_ptr();
        let packet = first.split_to(6).freeze();
        keep_rest(&mut first, Lent::Whole);
        assert_eq!(&first[..], b" and rest");
        let second = take();
        assert_ne!(second.as_ptr(), at, "the packet is still somewhere");
        drop(packet);
        assert_eq!(take().as_ptr(), at);
    }

    #[test]
    fn little_leaves_its_buffer_at_once() {
        let mut unit = take();
        unit.extend_from_slice(b"packet");
        let (at, mut buffer) = (unit.as_ptr(), BytesMut::new());
        let lent = lend(unit, &mut buffer);
        let packet = buffer.split_to(6).freeze();
        assert_eq!((lent, take().as_ptr()), (Lent::Copy, at));
        keep_rest(&mut buffer, lent);
        assert_eq!((&packet[..], buffer.capacity()), (&b"packet"[..], 0));
    }

    #[test]
    fn no_more_than_a_few_are_kept() {
        let many: Vec<_> = (0..3 * KEPT).map(|_| take()).collect();
        many.into_iter().for_each(give_back);
        assert_eq!(POOL.with_borrow(VecDeque::len), KEPT);
    }
}
