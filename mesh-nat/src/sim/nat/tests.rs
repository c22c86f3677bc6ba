use rand::SeedableRng;

use super::*;

struct Bench {
    now: Instant,
    rng: StdRng,
    nat: Nat,
}

impl Bench {
    fn new(config: NatConfig) -> Self {
        #[expect(clippy::disallowed_methods, reason = "tests start from any instant")]
        let now = Instant::now();
        Self { now, rng: StdRng::seed_from_u64(1), nat: Nat::new(config) }
    }

    fn out(&mut self, inside: u16, to: &str) -> u16 {
        self.out_from([10, 0, 0, 2], inside, to).unwrap()
    }

    fn out_from(&mut self, host: [u8; 4], inside: u16, to: &str) -> Option<u16> {
        self.nat.outbound(self.now, &mut self.rng, (host, inside).into(), to.parse().unwrap())
    }

    fn comes_in(&mut self, port: u16, from: &str) -> bool {
        self.nat.inbound(self.now, port, from.parse().unwrap()).is_some()
    }
}

const X: &str = "192.0.2.1:1000";
const X2: &str = "192.0.2.1:2000";
const Y: &str = "192.0.2.9:1000";

#[test]
fn mappings_depend_on_what_they_say() {
    use Mapping::{AddressAndPortDependent, AddressDependent, EndpointIndependent};
    for (mapping, same_address, other_address) in
        [(EndpointIndependent, true, true), (AddressDependent, true, false), (AddressAndPortDependent, false, false)]
    {
        let mut bench = Bench::new(NatConfig { mapping, ..NatConfig::hard() });
        let first = bench.out(5, X);
        assert_eq!(bench.out(5, X), first);
        assert_eq!(bench.out(5, X2) == first, same_address, "{mapping:?}");
        assert_eq!(bench.out(5, Y) == first, other_address, "{mapping:?}");
        assert_ne!(bench.out(6, X), first, "another socket has another port");
    }
}

#[test]
fn filters_let_in_whom_they_say() {
    use Filtering::{AddressAndPortDependent, AddressDependent, EndpointIndependent};
    for (filtering, other_port, other_address) in
        [(EndpointIndependent, true, true), (AddressDependent, true, false), (AddressAndPortDependent, false, false)]
    {
        let mut bench = Bench::new(NatConfig { filtering, ..NatConfig::easy() });
        let port = bench.out(5000, X);
        assert_eq!(port, 5000);
        assert!(bench.comes_in(port, X));
        assert_eq!(bench.comes_in(port, X2), other_port);
        assert_eq!(bench.comes_in(port, Y), other_address);
        assert!(!bench.comes_in(port + 1, X), "nobody has this port");
    }
}

#[test]
fn ports_are_given_as_they_say() {
    let mut preserving = Bench::new(NatConfig { overload: false, ..NatConfig::hard() });
    preserving.nat.config.allocation = Allocation::Preserving;
    assert_eq!([preserving.out(7000, X), preserving.out(7000, Y)], [7000, 7001], "the next where it is taken");

    let mut overloading = Bench::new(NatConfig { allocation: Allocation::Preserving, ..NatConfig::hard() });
    assert_eq!([overloading.out(7000, X), overloading.out(7000, Y)], [7000, 7000]);
    assert_eq!(overloading.out_from([10, 0, 0, 3], 7000, X), Some(7001), "but not for the same destination");

    let mut sequential =
        Bench::new(NatConfig { allocation: Allocation::Sequential { stride: 2 }, ..NatConfig::hard() });
    let first = sequential.out(1, X);
    assert_eq!([sequential.out(1, X2), sequential.out(1, Y)].map(|port| port.wrapping_sub(first)), [2, 4]);

    let mut block = Bench::new(NatConfig { allocation: Allocation::Block, ..NatConfig::hard() });
    let ports: Vec<u16> = (1..=2000).map(|port| block.out(port, X)).take(400).collect();
    let (low, high) = (ports.iter().min().unwrap(), ports.iter().max().unwrap());
    assert!(high - low < 512 && high - low > 450, "{low} to {high}");
    let other = block.out_from([10, 0, 0, 3], 1, X).unwrap();
    assert!(!(*low..=*high).contains(&other), "another subscriber has another block");
}

#[test]
fn a_block_without_overloading_runs_out_and_one_with_it_does_not() {
    for (overload, fits) in [(false, 512), (true, 2000)] {
        let mut bench = Bench::new(NatConfig { allocation: Allocation::Block, overload, ..NatConfig::hard() });
        let given =
            (1..=2000).filter(|port| bench.out_from([10, 0, 0, 2], 9, &format!("192.0.2.1:{port}")).is_some()).count();
        assert_eq!(given, fits);
        assert_eq!(bench.nat.counters().exhausted, 2000 - fits as u64);
        assert!(bench.nat.counters().peak_ports <= 512);
    }
}

#[test]
fn overloaded_ports_lead_to_whoever_sent_to_the_sender() {
    let mut bench = Bench::new(NatConfig { allocation: Allocation::Preserving, ..NatConfig::hard() });
    assert_eq!(bench.out_from([10, 0, 0, 2], 7000, X), Some(7000));
    assert_eq!(bench.out_from([10, 0, 0, 3], 7000, Y), Some(7000));
    let inside = |bench: &mut Bench, from: &str| bench.nat.inbound(bench.now, 7000, from.parse().unwrap());
    assert_eq!(inside(&mut bench, X), Some(([10, 0, 0, 2], 7000).into()));
    assert_eq!(inside(&mut bench, Y), Some(([10, 0, 0, 3], 7000).into()));
    assert_eq!(inside(&mut bench, X2), None);
}

#[test]
fn silence_ends_a_mapping_and_traffic_keeps_it() {
    let mut bench = Bench::new(NatConfig::hard());
    let port = bench.out(5, X);
    for _ in 0..4 {
        bench.now += Duration::from_secs(20);
        assert!(bench.comes_in(port, X));
    }
    bench.now += Duration::from_secs(30);
    assert!(!bench.comes_in(port, X));
    assert_ne!(bench.out(5, X), port, "a new one");
    assert_eq!(bench.nat.mappings(bench.now), 1);

    let mut strict = Bench::new(NatConfig { refreshed_by_inbound: false, ..NatConfig::hard() });
    let port = strict.out(5, X);
    strict.now += Duration::from_secs(20);
    assert!(strict.comes_in(port, X));
    strict.now += Duration::from_secs(20);
    assert!(!strict.comes_in(port, X));
}

#[test]
fn a_forward_lets_everyone_in_and_names_what_goes_out() {
    let mut bench = Bench::new(NatConfig::hard());
    let inside: SocketAddr = "10.0.0.2:5".parse().unwrap();
    assert!(bench.nat.forward(bench.now, 4000, inside, Some(Duration::from_secs(60))));
    assert!(!bench.nat.forward(bench.now, 4000, "10.0.0.3:5".parse().unwrap(), None), "it is taken");
    assert!(bench.comes_in(4000, Y));
    assert_eq!(bench.out(5, X), 4000);
    bench.now += Duration::from_secs(60);
    assert!(!bench.comes_in(4000, Y));
    assert_eq!(bench.nat.forwarded(bench.now, inside), None);
}

#[test]
fn a_full_nat_opens_nothing_until_something_ends() {
    let mut bench = Bench::new(NatConfig { capacity: 3, ..NatConfig::hard() });
    assert_eq!((1..=5).filter(|port| bench.out_from([10, 0, 0, 2], *port, X).is_some()).count(), 3);
    bench.now += Duration::from_secs(31);
    assert!(bench.out_from([10, 0, 0, 2], 9, X).is_some());
}
