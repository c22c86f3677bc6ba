//! Waiting for a descriptor, with a second one that ends all waiting for good.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll};

/// Ends every wait on it, now and later.
#[derive(Debug)]
pub(super) struct Closer {
    event: OwnedFd,
    /// Says the same to those who do not wait.
    closed: AtomicBool,
}

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Woken {
    /// The descriptor is ready, or has an error to report.
    Ready,
    /// Time is up.
    TimedOut,
    /// [`Closer::close`] was called.
    Closed,
}

impl Closer {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?, closed: AtomicBool::new(false) })
    }

    /// Wakes everyone who waits. The counter is never read back, so the descriptor stays ready.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        // Fails only when the counter is about to overflow, and then the descriptor is ready already.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub(super) fn readable(&self, fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<Woken> {
        self.wait(fd, PollFlags::IN, timeout)
    }

    pub(super) fn writable(&self, fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<Woken> {
        self.wait(fd, PollFlags::OUT, timeout)
    }

    fn wait(&self, fd: BorrowedFd<'_>, interest: PollFlags, timeout: Duration) -> io::Result<Woken> {
        let event = self.event.as_fd();
        let mut fds = [PollFd::from_borrowed_fd(event, PollFlags::IN), PollFd::from_borrowed_fd(fd, interest)];
        // A timeout beyond what the system can express is as good as none.
        let timeout = Timespec::try_from(timeout).ok();
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => Ok(Woken::TimedOut),
            Ok(_) if !fds[0].revents().is_empty() => Ok(Woken::Closed),
            Ok(_) => Ok(Woken::Ready),
            Err(rustix::io::Errno::INTR) => Ok(Woken::TimedOut),
            Err(error) => Err(error.into()),
        }
    }
}

/// Waits for one descriptor, and can be told to leave its readers asleep.
#[derive(Debug)]
pub(super) struct Watch {
    epoll: OwnedFd,
}

impl Watch {
    const CLOSED: u64 = 0;
    const READABLE: u64 = 1;

    /// Watches `fd`, until `closer` ends all waiting.
    pub(super) fn new(fd: BorrowedFd<'_>, closer: &Closer) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &closer.event, epoll::EventData::new_u64(Self::CLOSED), epoll::EventFlags::IN)?;
        epoll::add(&epoll, fd, epoll::EventData::new_u64(Self::READABLE), epoll::EventFlags::IN)?;
        Ok(Self { epoll })
    }

    pub(super) fn wait(&self, timeout: Duration) -> io::Result<Woken> {
        let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 2];
        let timeout = Timespec::try_from(timeout).ok();
        match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
            Ok(0) | Err(rustix::io::Errno::INTR) => Ok(Woken::TimedOut),
            Ok(count) if events[..count].iter().any(|event| event.data.u64() == Self::CLOSED) => Ok(Woken::Closed),
            Ok(_) => Ok(Woken::Ready),
            Err(error) => Err(error.into()),
        }
    }

    /// Leaves waiters asleep whatever `fd` does, or wakes them again, at once if it is readable by now.
    pub(super) fn hush(&self, fd: BorrowedFd<'_>, hushed: bool) -> io::Result<()> {
        let interest = if hushed { epoll::EventFlags::empty() } else { epoll::EventFlags::IN };
        Ok(epoll::modify(&self.epoll, fd, epoll::EventData::new_u64(Self::READABLE), interest)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_is_for_good() {
        let closer = Closer::new().unwrap();
        assert!(!closer.is_closed());
        closer.close();
        closer.close();
        let other = Closer::new().unwrap();
        for _ in 0..2 {
            assert!(closer.is_closed());
            assert_eq!(closer.readable(other.event.as_fd(), Duration::from_secs(60)).unwrap(), Woken::Closed);
        }
        assert_eq!(other.readable(closer.event.as_fd(), Duration::ZERO).unwrap(), Woken::Ready);
        assert_eq!(Closer::new().unwrap().readable(other.event.as_fd(), Duration::ZERO).unwrap(), Woken::TimedOut);
    }

    #[test]
    fn a_hushed_descriptor_wakes_nobody_until_the_hush_is_off() {
        let (closer, ready) = (Closer::new().unwrap(), Closer::new().unwrap());
        let watch = Watch::new(ready.event.as_fd(), &closer).unwrap();
        assert_eq!(watch.wait(Duration::ZERO).unwrap(), Woken::TimedOut);
        watch.hush(ready.event.as_fd(), true).unwrap();
        ready.close();
        assert_eq!(watch.wait(Duration::ZERO).unwrap(), Woken::TimedOut);
        watch.hush(ready.event.as_fd(), false).unwrap();
        assert_eq!(watch.wait(Duration::from_secs(60)).unwrap(), Woken::Ready);
        watch.hush(ready.event.as_fd(), true).unwrap();
        closer.close();
        assert_eq!(watch.wait(Duration::from_secs(60)).unwrap(), Woken::Closed);
    }
}
