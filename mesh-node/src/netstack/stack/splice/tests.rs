//! Two stacks, and a program at each end.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Poll, Wake};
use std::time::Duration;

use super::*;
use crate::netstack::{Bind, Config};

/// A socket whose program is the test.
#[derive(Debug, Default)]
struct Program {
    /// What it has written, and whether it has ended.
    said: Mutex<(VecDeque<u8>, bool)>,
    heard: Mutex<Vec<u8>>,
    /// Bytes that it takes before it is to be waited for.
    room: AtomicUsize,
    told_end: AtomicUsize,
}

impl Local for Program {
    fn read(&self, room: &mut [u8]) -> io::Result<usize> {
        let mut said = self.said.lock().unwrap();
        if said.0.is_empty() && !said.1 {
            return Err(ErrorKind::WouldBlock.into());
        }
        let len = said.0.len().min(room.len());
        room.iter_mut().zip(said.0.drain(..len)).for_each(|(to, from)| *to = from);
        Ok(len)
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let len = bytes.len().min(self.room.load(Ordering::Relaxed));
        if len == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        self.room.fetch_sub(len, Ordering::Relaxed);
        self.heard.lock().unwrap().extend_from_slice(&bytes[..len]);
        Ok(len)
    }

    fn end(&self) -> io::Result<()> {
        self.told_end.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

#[derive(Default)]
struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Two stacks with one connection, spliced to a program at each end.
struct Pair {
    now: Instant,
    stacks: [Stack; 2],
    ids: [ConnId; 2],
    programs: [Arc<Program>; 2],
    wakes: [Arc<Count>; 2],
    ended: [bool; 2],
}

impl Pair {
    #[expect(clippy::disallowed_methods, reason = "a point to count from")]
    fn new() -> Self {
        let now = Instant::now();
        let stack =
            |address: &str, seed| Stack::new(now, Config::with_addresses([address.parse().unwrap()]), [seed; 32]);
        let mut stacks = [stack("100.64.0.1", 1), stack("100.64.0.2", 2)];
        stacks[1].listen(Bind::port(80), 1).unwrap();
        let dialed = stacks[0].connect("100.64.0.2:80".parse().unwrap()).unwrap();
        let programs: [Arc<Program>; 2] = Default::default();
        programs.iter().for_each(|program| program.room.store(usize::MAX, Ordering::Relaxed));
        let mut pair = Self { now, stacks, ids: [dialed; 2], programs, wakes: Default::default(), ended: [false; 2] };
        pair.run();
        let Poll::Ready(Ok((accepted, _))) = pair.stacks[1].poll_accept(Bind::port(80), Waker::noop()) else {
            panic!("nobody has connected");
        };
        pair.ids[1] = accepted;
        for side in 0..2 {
            pair.stacks[side].splice(pair.ids[side], Arc::clone(&pair.programs[side]) as Arc<dyn Local>);
        }
        pair
    }

    fn poll(&mut self, side: usize) -> io::Result<(Half, Half)> {
        let waker = Waker::from(Arc::clone(&self.wakes[side]));
        let halves = self.stacks[side].poll_splice(self.now, self.ids[side], &waker)?;
        if halves == (Halves { inward: Half::Done, outward: Half::Done }) {
            self.stacks[side].unsplice(self.ids[side]);
            self.ended[side] = true;
        }
        Ok((halves.inward, halves.outward))
    }

    /// Has packets cross, and time pass; tasks do what they are woken for. Says how often each was.
    fn run(&mut self) -> [usize; 2] {
        let mut woken = [0; 2];
        for _ in 0..2000 {
            for (side, woken) in woken.iter_mut().enumerate() {
                self.stacks[side].handle_timeout(self.now);
                self.stacks[side].take_woken().into_iter().for_each(Waker::wake);
                if self.wakes[side].0.swap(0, Ordering::Relaxed) > 0 {
                    *woken += 1;
                    while self.poll(side).is_ok_and(|halves| halves.0 == Half::Turn || halves.1 == Half::Turn) {}
                }
                while let Some(parcel) = self.stacks[side].poll_transmit() {
                    let (mut cutting, mut room) = (parcel.cut(), [0; 1500]);
                    while let Some(len) = cutting.write_next(&mut room) {
                        self.stacks[1 - side].handle_packet(self.now, &room[..len]);
                    }
                }
            }
            self.now += Duration::from_micros(100);
        }
        woken
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| ((at * 31 + at / 251) % 251).to_le_bytes()[0]).collect()
}

#[test]
fn bytes_pass_without_a_task_and_the_end_is_told() {
    let mut pair = Pair::new();
    let sent = pattern(5 << 20);
    pair.programs[0].said.lock().unwrap().0.extend(&sent);
    assert_eq!(pair.poll(0).unwrap(), (Half::Mesh, Half::Turn), "more than is moved at once");
    assert_eq!(pair.poll(1).unwrap(), (Half::Mesh, Half::Local));
    let woken = pair.run();
    assert!(*pair.programs[1].heard.lock().unwrap() == sent, "bytes changed on the way");
    let turns = sent.len() / MOST_AT_ONCE;
    assert!(woken.iter().all(|woken| *woken <= turns), "woken {woken:?} times to move much, never to move a little");
    pair.programs[0].said.lock().unwrap().1 = true;
    assert_eq!(pair.poll(0).unwrap(), (Half::Mesh, Half::Done));
    assert_eq!(pair.run(), [0, 1]);
    assert_eq!(pair.programs[1].told_end.load(Ordering::Relaxed), 1);
    // The other way is still open.
    pair.programs[1].said.lock().unwrap().0.extend(b"answer");
    pair.programs[1].said.lock().unwrap().1 = true;
    assert_eq!(pair.poll(1).unwrap(), (Half::Done, Half::Done));
    assert_eq!(pair.run(), [1, 0]);
    assert_eq!(*pair.programs[0].heard.lock().unwrap(), b"answer");
    assert_eq!(pair.ended, [true; 2]);
}

#[test]
fn a_slow_program_is_waited_for_and_holds_the_peer_up() {
    let mut pair = Pair::new();
    let sent = pattern(16 << 20);
    pair.programs[1].room.store(1000, Ordering::Relaxed);
    pair.programs[0].said.lock().unwrap().0.extend(&sent);
    pair.poll(0).unwrap();
    pair.poll(1).unwrap();
    for _ in 0..20 {
        pair.run();
    }
    assert_eq!(pair.programs[1].heard.lock().unwrap().len(), 1000);
    let left = pair.programs[0].said.lock().unwrap().0.len();
    assert!(left > 4 << 20, "{left} bytes wait with the program that wrote them, the rest in buffers");
    while pair.programs[1].heard.lock().unwrap().len() < sent.len() {
        pair.programs[1].room.fetch_add(700_000, Ordering::Relaxed);
        pair.poll(1).unwrap();
        pair.run();
    }
    assert!(*pair.programs[1].heard.lock().unwrap() == sent, "bytes changed on the way");
}

#[test]
fn a_reset_is_told_to_the_task() {
    let mut pair = Pair::new();
    pair.poll(0).unwrap();
    pair.poll(1).unwrap();
    pair.stacks[0].reset(pair.ids[0]);
    let [ours, theirs] = pair.run();
    assert!(ours > 0 && theirs > 0, "woken {ours} and {theirs} times");
    for side in 0..2 {
        assert_eq!(pair.poll(side).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}
