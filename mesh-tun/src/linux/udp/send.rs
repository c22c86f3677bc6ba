//! Datagrams cut into messages: neighbours for one receiver and of one length leave as one.

use std::io;
use std::net::SocketAddr;

use super::{MAX_SEGMENTED, MAX_SEGMENTS, Outgoing, Segmentation};
use crate::batch::Batch;
use crate::linux::sys;

/// What is to be sent, cut into messages.
#[derive(Clone)]
pub(super) struct Runs<'a> {
    pub(super) batch: &'a Batch,
    pub(super) rest: &'a [Outgoing],
    pub(super) segmentation: Segmentation,
}

/// Datagrams that leave in one message.
pub(super) struct Run<'a> {
    to: SocketAddr,
    pub(super) datagrams: &'a [Outgoing],
    pub(super) segment: Option<u16>,
}

impl Runs<'_> {
    /// Whether the system refused to segment the first run, rather than one of its datagrams.
    pub(super) fn is_refused(&self, error: &io::Error) -> bool {
        let code = error.raw_os_error();
        matches!(code, Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE | libc::EOPNOTSUPP))
            && self.clone().next().is_some_and(|run| run.segment.is_some())
    }
}

impl<'a> Iterator for Runs<'a> {
    type Item = Run<'a>;

    fn next(&mut self) -> Option<Run<'a>> {
        let first = self.rest.first()?;
        let segment = self.batch.range(first.index).len();
        let (mut count, mut total) = (1, segment);
        if self.segmentation != Segmentation::Off {
            for next in &self.rest[1..] {
                let len = self.batch.range(next.index).len();
                let shorter = len != segment;
                let fits = next.to == first.to && count < MAX_SEGMENTS && total + len <= MAX_SEGMENTED;
                if !fits || len > segment || len == 0 || (shorter && self.segmentation == Segmentation::Equal) {
                    break;
                }
                (count, total) = (count + 1, total + len);
                if shorter {
                    break;
                }
            }
        }
        let (datagrams, rest) = self.rest.split_at(count);
        self.rest = rest;
        let segment = u16::try_from(segment).ok().filter(|_| count > 1);
        Some(Run { to: first.to, datagrams, segment })
    }
}

impl<'a> Run<'a> {
    pub(super) fn message(self, batch: &'a Batch) -> sys::Message<impl ExactSizeIterator<Item = &'a [u8]>> {
        let datagrams = self.datagrams.iter().map(|outgoing| &batch.storage()[batch.range(outgoing.index)]);
        sys::Message { to: self.to, datagrams, segment: self.segment }
    }
}
