//! Load for a relay, whichever protocol it speaks: pacing, dropping and counting are the same for all.
//!
//! What differs is how one client connects, sends and receives ([`Relay`], [`Client`]). `benches/src/bin/relay_load.rs` has
//! that for DERP and `benches/peers` for iroh-relay, which includes this file as it stands: it must not name a crate of
//! this workspace.
//!
//! ```text
//! load PAIRS         clients in pairs, one sending 1,400-byte packets to the other. Each line of the input, RATE WARMUP
//!                    SECONDS, offers RATE packets a second over all pairs and prints what was counted meanwhile
//! probe RATE         two clients, one of which sends back what the other sends, RATE times a second. For each line,
//!                    SECONDS, prints the round trips of that time
//! slow RATE          a pair whose receiver reads nothing. Prints a line when it stands, another when the input ends
//! idle COUNT         clients that do nothing. For each line drops them all, connects as many as it says at once, and
//!                    prints how long that took
//! ```
//!
//! Every command prints a line when its clients are connected, and ends with its input. A line of figures is
//! `name=value name=value`.

use std::future::Future;
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines, Stdin};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, sleep_until, timeout};

/// Bytes of a packet of the load.
const PACKET: usize = 1400;
/// Bytes of a packet of the probe: its number and when it was sent.
const PROBE: usize = 64;
/// Packets that wait at a sender; what is due beyond that is dropped there, and counted.
const QUEUE: u64 = 256;
/// Packets that a sender hands over at once; iroh's own sender takes 20.
const BATCH: u64 = 16;
/// Clients that connect at the same time, unless that is what is measured.
const CONNECTING: usize = 32;
/// The longest that a client waits before it tries again to connect.
const PATIENCE: Duration = Duration::from_secs(10);
/// The least time a sender sleeps.
const TICK: Duration = Duration::from_millis(1);

/// How clients of one kind connect.
pub trait Relay: Clone + Send + Sync + 'static {
    /// A connected client.
    type Client: Client;

    /// Connects and logs in as a node that no other has been.
    fn connect(&self) -> impl Future<Output = anyhow::Result<Self::Client>> + Send;
}

/// One connected client.
pub trait Client: Send + Sized + 'static {
    /// What names it.
    type Key: Clone + Send + Sync + 'static;

    /// Its own name.
    fn key(&self) -> Self::Key;

    /// Writes `packets` and returns when the socket has taken all of them.
    fn send(&mut self, to: &Self::Key, packets: &[Bytes]) -> impl Future<Output = anyhow::Result<()>> + Send;

    /// Waits for packets and shows each that has come. Can be cancelled without loss.
    fn receive(&mut self, see: &mut (impl FnMut(&[u8]) + Send)) -> impl Future<Output = anyhow::Result<()>> + Send;
}

/// Carries out a command of the [module's](self) list.
///
/// # Errors
/// If the command is none, or a client fails.
pub fn run<R: Relay>(relay: R, command: &[&str]) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        match command {
            ["load", pairs] => load(relay, pairs.parse()?).await,
            ["probe", rate] => probe(relay, rate.parse()?).await,
            ["slow", rate] => slow(relay, rate.parse()?).await,
            ["idle", count] => idle(relay, count.parse()?).await,
            _ => bail!("load PAIRS | probe RATE | slow RATE | idle COUNT"),
        }
    })
}

/// The clock that everything here goes by.
#[expect(clippy::disallowed_methods, reason = "a load generator lives by the real clock")]
#[must_use]
pub fn now() -> Instant {
    Instant::now()
}

/// Prints a line that a script waits for.
///
/// # Errors
/// If nobody reads it.
pub fn say(line: &str) -> anyhow::Result<()> {
    let mut output = std::io::stdout();
    writeln!(output, "{line}")?;
    output.flush()?;
    Ok(())
}

/// The lines that tell what to do next.
pub fn input() -> Lines<BufReader<Stdin>> {
    BufReader::new(tokio::io::stdin()).lines()
}

/// CPU seconds of this process so far.
fn own_cpu() -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let (_, fields) = stat.rsplit_once(')').context("/proc/self/stat has a name")?;
    let ticks: u64 = fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Ok(ticks as f64 / 100.0)
}

/// Nanoseconds that the server's control group has used so far, if `SERVER_CPU` names the file that tells them.
fn server_cpu() -> anyhow::Result<u64> {
    let Some(file) = std::env::var_os("SERVER_CPU") else { return Ok(0) };
    let text = std::fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
    let microseconds = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
    match microseconds {
        Some(value) => Ok(value.trim().parse::<u64>()? * 1000),
        None => Ok(text.trim().parse()?),
    }
}

/// Connects, as often as it takes: a relay that many ask at once may be slower than it waits for one of them.
async fn connect<R: Relay>(relay: R, failures: Arc<AtomicU64>) -> anyhow::Result<R::Client> {
    let mut wait = Duration::from_millis(100);
    loop {
        match relay.connect().await {
            Ok(client) => return Ok(client),
            Err(error) if wait > PATIENCE => return Err(error),
            Err(_) => failures.fetch_add(1, Ordering::Relaxed),
        };
        sleep(wait).await;
        wait *= 2;
    }
}

async fn connect_all<R: Relay>(
    relay: &R,
    count: usize,
    at_once: usize,
    failures: &Arc<AtomicU64>,
) -> anyhow::Result<Vec<R::Client>> {
    let mut clients = Vec::with_capacity(count);
    let mut connecting = JoinSet::new();
    let mut begun = 0;
    while clients.len() < count {
        while begun < count && connecting.len() < at_once {
            connecting.spawn(connect(relay.clone(), Arc::clone(failures)));
            begun += 1;
        }
        clients.push(connecting.join_next().await.context("a client was being connected")???);
    }
    Ok(clients)
}

#[derive(Default)]
struct Counts {
    sent: AtomicU64,
    dropped: AtomicU64,
    received: AtomicU64,
    received_bytes: AtomicU64,
}

impl Counts {
    fn snapshot(&self) -> [u64; 4] {
        [&self.sent, &self.dropped, &self.received, &self.received_bytes].map(|count| count.load(Ordering::Relaxed))
    }
}

/// Packets that have fallen due at a steady rate and were not sent yet: a sender's queue, without the packets.
struct Due {
    rate: f64,
    since: Instant,
    taken: f64,
}

impl Due {
    /// A queue into which a packet comes every `1 / rate` seconds, the first after `phase` of that time.
    fn new(rate: f64, phase: f64) -> Self {
        Self { rate, since: now(), taken: -phase }
    }

    /// What waits, and what has just been dropped because more than [`QUEUE`] waited.
    #[expect(clippy::cast_possible_truncation, reason = "what is not a whole packet is not due")]
    fn waiting(&mut self) -> (u64, u64) {
        let due = self.since.elapsed().as_secs_f64() * self.rate - self.taken;
        let whole = due.max(0.0) as u64;
        let dropped = whole.saturating_sub(QUEUE);
        self.taken += dropped as f64;
        (whole - dropped, dropped)
    }

    fn take(&mut self, count: u64) {
        self.taken += count as f64;
    }

    /// When the next packet falls due, but not at once.
    fn next(&self) -> Instant {
        let soon = now() + TICK;
        if self.rate <= 0.0 {
            return soon + Duration::from_secs(3600);
        }
        soon.max(self.since + Duration::from_secs_f64(((self.taken + 1.0) / self.rate).max(0.0)))
    }
}

/// Sends to `to` at the rate that `rates` says, until that is closed.
async fn offer<C: Client>(
    mut client: C,
    to: C::Key,
    mut rates: watch::Receiver<f64>,
    phase: f64,
    counts: Arc<Counts>,
) -> anyhow::Result<()> {
    let packets = vec![Bytes::from(vec![0x45; PACKET]); usize::try_from(BATCH)?];
    let mut due = Due::new(*rates.borrow_and_update(), phase);
    let mut nothing = |_: &[u8]| {};
    loop {
        if rates.has_changed().unwrap_or(true) {
            due = Due::new(*rates.borrow_and_update(), phase);
        }
        let (waiting, dropped) = due.waiting();
        counts.dropped.fetch_add(dropped, Ordering::Relaxed);
        if waiting > 0 {
            let count = waiting.min(BATCH);
            client.send(&to, &packets[..usize::try_from(count)?]).await?;
            due.take(count);
            counts.sent.fetch_add(count, Ordering::Relaxed);
            continue;
        }
        tokio::select! {
            read = client.receive(&mut nothing) => read?,
            changed = rates.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                rates.mark_changed();
            }
            () = sleep_until(due.next().into()) => {}
        }
    }
}

async fn count_arrivals<C: Client>(mut client: C, counts: Arc<Counts>) -> anyhow::Result<()> {
    loop {
        let (mut packets, mut bytes) = (0, 0);
        client
            .receive(&mut |packet| {
                packets += 1;
                bytes += packet.len() as u64;
            })
            .await?;
        counts.received.fetch_add(packets, Ordering::Relaxed);
        counts.received_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

async fn load<R: Relay>(relay: R, pairs: usize) -> anyhow::Result<()> {
    let counts = Arc::new(Counts::default());
    let (rate, rates) = watch::channel(0.0);
    let mut clients = connect_all(&relay, 2 * pairs, CONNECTING, &Arc::default()).await?;
    let mut tasks = JoinSet::new();
    for pair in 0..pairs {
        let (Some(sender), Some(receiver)) = (clients.pop(), clients.pop()) else { bail!("two clients a pair") };
        let phase = pair as f64 / pairs as f64;
        tasks.spawn(offer(sender, receiver.key(), rates.clone(), phase, Arc::clone(&counts)));
        tasks.spawn(count_arrivals(receiver, Arc::clone(&counts)));
    }
    drop(rates);
    say("connected")?;
    let mut lines = input();
    loop {
        let line = tokio::select! {
            line = lines.next_line() => line?,
            ended = tasks.join_next() => bail!("a client ended: {ended:?}"),
        };
        let Some(line) = line else { return Ok(()) };
        let numbers: Vec<f64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let [offered, warmup, seconds] = numbers[..] else { bail!("RATE WARMUP SECONDS") };
        rate.send_replace(offered / pairs as f64);
        sleep(Duration::from_secs_f64(warmup)).await;
        let (before, own, server, start) = (counts.snapshot(), own_cpu()?, server_cpu()?, now());
        sleep(Duration::from_secs_f64(seconds)).await;
        let (after, elapsed) = (counts.snapshot(), start.elapsed().as_secs_f64());
        let (own, server) = (own_cpu()? - own, (server_cpu()? - server) as f64 / 1e9);
        rate.send_replace(0.0);
        // What is under way may arrive before anything else is measured.
        sleep(Duration::from_millis(300)).await;
        let [sent, dropped, received, bytes] = [0, 1, 2, 3].map(|at| (after[at] - before[at]) as f64);
        say(&format!(
            "seconds={elapsed:.3} offered={offered} sent={:.0} dropped={:.0} received={:.0} goodput={:.0} \
             server_cpu={server:.6} own_cpu={own:.2}",
            sent / elapsed,
            dropped / elapsed,
            received / elapsed,
            bytes / elapsed,
        ))?;
    }
}

async fn probe<R: Relay>(relay: R, rate: f64) -> anyhow::Result<()> {
    let (mut near, mut far) = (relay.connect().await?, relay.connect().await?);
    let (here, there) = (near.key(), far.key());
    tokio::spawn(async move {
        loop {
            let mut back = Vec::new();
            far.receive(&mut |packet| back.push(Bytes::copy_from_slice(packet))).await?;
            far.send(&here, &back).await?;
        }
        #[expect(unreachable_code, reason = "names the type of the errors above")]
        anyhow::Ok(())
    });
    say("connected")?;
    let begin = now();
    let mut lines = input();
    let mut first = 0;
    while let Some(line) = lines.next_line().await? {
        let end = now() + Duration::from_secs_f64(line.trim().parse()?);
        let mut ticks = interval(Duration::from_secs_f64(1.0 / rate));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut trips = Vec::new();
        let mut number = first;
        let mut see = |packet: &[u8]| {
            let (Some(sent_as), Some(at)) = (packet.first_chunk(), packet.get(8..).and_then(<[u8]>::first_chunk))
            else {
                return;
            };
            if u64::from_be_bytes(*sent_as) >= first {
                let sent = Duration::from_nanos(u64::from_be_bytes(*at));
                trips.push(begin.elapsed().saturating_sub(sent).as_secs_f64() * 1e6);
            }
        };
        while now() < end {
            tokio::select! {
                read = near.receive(&mut see) => read?,
                _ = ticks.tick() => {
                    let mut packet = vec![0; PROBE];
                    packet[..8].copy_from_slice(&u64::to_be_bytes(number));
                    packet[8..16].copy_from_slice(&u64::to_be_bytes(u64::try_from(begin.elapsed().as_nanos())?));
                    number += 1;
                    near.send(&there, &[packet.into()]).await?;
                }
            }
        }
        // The last ones get half a second.
        let _ = timeout(Duration::from_millis(500), async {
            loop {
                near.receive(&mut see).await?;
            }
            #[expect(unreachable_code, reason = "names the type of the errors above")]
            anyhow::Ok(())
        })
        .await;
        let (sent, answered) = (number - first, trips.len());
        first = number;
        trips.sort_by(f64::total_cmp);
        // What is lost took for ever.
        let lost = usize::try_from(sent)?.saturating_sub(answered);
        trips.extend(std::iter::repeat_n(f64::INFINITY, lost));
        let at = |percent: usize| {
            trips.get((percent * trips.len()).div_ceil(100).saturating_sub(1)).copied().unwrap_or(f64::NAN)
        };
        say(&format!("sent={sent} lost={lost} p50={:.0} p90={:.0} p99={:.0}", at(50), at(90), at(99)))?;
    }
    Ok(())
}

async fn slow<R: Relay>(relay: R, rate: f64) -> anyhow::Result<()> {
    let (sender, receiver) = (relay.connect().await?, relay.connect().await?);
    let counts = Arc::new(Counts::default());
    let (keep, rates) = watch::channel(rate);
    tokio::spawn(offer(sender, receiver.key(), rates, 0.0, Arc::clone(&counts)));
    say("connected")?;
    while input().next_line().await?.is_some() {}
    drop(keep);
    let [sent, dropped, ..] = counts.snapshot();
    // It was there all the time, and never read.
    drop(receiver);
    say(&format!("sent={sent} dropped={dropped}"))
}

async fn idle<R: Relay>(relay: R, count: usize) -> anyhow::Result<()> {
    let mut clients = keep_all(connect_all(&relay, count, CONNECTING, &Arc::default()).await?);
    say("connected")?;
    let mut lines = input();
    while let Some(line) = lines.next_line().await? {
        let count: usize = line.trim().parse()?;
        clients.shutdown().await;
        let (start, failures) = (now(), Arc::default());
        clients = keep_all(connect_all(&relay, count, count, &failures).await?);
        let (seconds, failures) = (start.elapsed().as_secs_f64(), failures.load(Ordering::Relaxed));
        say(&format!("seconds={seconds:.3} clients={} failures={failures}", clients.len()))?;
    }
    Ok(())
}

/// Reads what comes, so that the connections stay as they are.
fn keep_all<C: Client>(clients: Vec<C>) -> JoinSet<anyhow::Result<()>> {
    let mut tasks = JoinSet::new();
    for mut client in clients {
        tasks.spawn(async move {
            loop {
                client.receive(&mut |_| {}).await?;
            }
        });
    }
    tasks
}
