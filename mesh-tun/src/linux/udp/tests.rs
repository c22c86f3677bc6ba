use super::*;

const SOON: Duration = Duration::from_secs(5);

#[test]
fn a_batch_arrives_whole_and_in_order() {
    for bind in ["127.0.0.1:0", "[::1]:0"] {
        let Ok(receiver) = UdpBatch::bind(&Config::bound_to(bind.parse().unwrap())) else {
            assert!(bind.starts_with('['), "IPv4 loopback is always there");
            continue;
        };
        let sender = UdpBatch::bind(&Config::bound_to(bind.parse().unwrap())).unwrap();
        let mut batch = Batch::new(100, 2048);
        let outgoing: Vec<_> = (0..100)
            .map(|index| {
                assert!(batch.push(&vec![u8::try_from(index).unwrap(); 10 + index]));
                Outgoing { to: receiver.local_addr(), index }
            })
            .collect();
        assert_eq!(sender.send_batch(&batch, &outgoing), Sent { sent: 100, failed: 0, dropped: 0 });
        let (mut room, mut seen) = (receiver.recv_room(64), 0);
        while seen < 100 {
            let count = receiver.recv_batch(&mut room, SOON).unwrap();
            assert_ne!(count, 0, "{seen} of 100 arrived");
            for index in 0..count {
                assert_eq!(room.batch().packet(index), batch.packet(seen));
                assert_eq!(room.source(index), sender.local_addr());
                seen += 1;
            }
        }
    }
}

/// Loopback sockets in every combination of what the kernel may do for us.
fn pairs() -> impl Iterator<Item = (Arc<UdpBatch>, Arc<UdpBatch>)> {
    let modes = [Segmentation::Off, Segmentation::Equal, Segmentation::Full];
    modes.into_iter().flat_map(|segmentation| [false, true].map(|gather| (segmentation, gather))).map(
        |(segmentation, gather)| {
            let loopback = Config::bound_to("127.0.0.1:0".parse().unwrap());
            let sender = UdpBatch::bind(&Config { segmentation, ..loopback.clone() }).unwrap();
            (sender, UdpBatch::bind(&Config { gather, ..loopback }).unwrap())
        },
    )
}

/// Sends datagrams of these lengths and checks that they arrive whole and in order.
fn exchange(sender: &UdpBatch, receiver: &UdpBatch, lens: &[usize]) {
    let mut batch = Batch::new(lens.len(), 2048);
    let mut outgoing = Vec::new();
    for (index, len) in lens.iter().enumerate() {
        let fill: Vec<_> = (0..*len).map(|at| u8::try_from((at + 31 * index) % 251).unwrap()).collect();
        assert!(batch.push(&fill));
        outgoing.push(Outgoing { to: receiver.local_addr(), index });
    }
    assert_eq!(sender.send_batch(&batch, &outgoing), Sent { sent: lens.len(), failed: 0, dropped: 0 });
    let (mut room, mut seen) = (receiver.recv_room(64), 0);
    while seen < lens.len() {
        let count = receiver.recv_batch(&mut room, SOON).unwrap();
        assert_ne!(count, 0, "{seen} of {} arrived", lens.len());
        assert_eq!(count, room.len());
        for index in 0..count {
            assert_eq!(room.batch().packet(index), batch.packet(seen), "datagram {seen}");
            assert_eq!(room.source(index), sender.local_addr());
            seen += 1;
        }
    }
}

#[test]
fn whatever_the_kernel_does_for_us_datagrams_are_the_same() {
    for (sender, receiver) in pairs() {
        let asked = sender.segmentation();
        exchange(&sender, &receiver, &[1312; 60]);
        exchange(&sender, &receiver, &[1312, 1312, 1312, 400, 1312, 1312, 64, 64, 64, 65, 1312, 1311, 1312]);
        exchange(&sender, &receiver, &[&[32; 200][..], &[2048; 40], &[1], &[2, 1]].concat());
        assert_eq!(sender.segmentation(), asked, "nothing was refused");
    }
}

#[test]
fn runs_end_with_receiver_length_and_what_the_kernel_takes() {
    let mut batch = Batch::new(200, 2048);
    let lens = [&[1000; 70][..], &[400, 400, 500], &[1500; 50]].concat();
    let to = |index| SocketAddr::from(([127, 0, 0, 1], if index == 1 { 9 } else { 8 }));
    let outgoing: Vec<_> = lens
        .iter()
        .enumerate()
        .map(|(index, len)| {
            assert!(batch.push(&vec![0; *len]));
            Outgoing { to: to(index), index }
        })
        .collect();
    let runs = |segmentation| {
        let runs = Runs { batch: &batch, rest: &outgoing, segmentation };
        runs.map(|run| (run.datagrams.len(), run.segment.unwrap_or(0))).collect::<Vec<_>>()
    };
    assert_eq!(
        runs(Segmentation::Full),
        [(1, 0), (1, 0), (64, 1000), (5, 1000), (1, 0), (1, 0), (43, 1500), (7, 1500)]
    );
    assert_eq!(
        runs(Segmentation::Equal),
        [(1, 0), (1, 0), (64, 1000), (4, 1000), (2, 400), (1, 0), (43, 1500), (7, 1500)]
    );
    assert_eq!(runs(Segmentation::Off), vec![(1, 0); lens.len()]);
}

#[test]
fn refused_segments_are_sent_again_one_by_one_for_good() {
    // Loopback segments in software unless the socket sends without checksums: that, EIO refuses.
    let sender = UdpBatch::bind(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap();
    let receiver = UdpBatch::bind(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap();
    sys::set_no_check(sender.socket.as_fd()).unwrap();
    exchange(&sender, &receiver, &[700; 20]);
    assert_eq!(sender.segmentation(), Segmentation::Off);
    exchange(&sender, &receiver, &[700; 20]);
}

#[test]
fn kernels_that_damage_a_shorter_last_segment_are_known() {
    for (release, expected) in [
        ("6.18.44-fc-v669", Segmentation::Full),
        ("7.0.0", Segmentation::Equal),
        ("7.0-rc3", Segmentation::Equal),
        ("7.1.4-1-arch", Segmentation::Equal),
        ("7.1.5", Segmentation::Full),
        ("7.2.0", Segmentation::Full),
        ("", Segmentation::Full),
    ] {
        assert_eq!(Segmentation::of_kernel(kernel::version(release)), expected, "{release}");
    }
}

#[test]
fn too_long_datagrams_are_dropped_and_counted() {
    for gather in [false, true] {
        too_long_datagrams(gather);
    }
}

fn too_long_datagrams(gather: bool) {
    let loopback = Config::bound_to("127.0.0.1:0".parse().unwrap());
    let receiver = UdpBatch::bind(&Config { gather, ..loopback }).unwrap();
    let sender = UdpBatch::bind(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap();
    sender.send_to(&[1; 4000], receiver.local_addr()).unwrap();
    let mut room = receiver.recv_room(4);
    assert_eq!(receiver.recv_batch(&mut room, SOON).unwrap(), 1);
    assert_eq!((room.batch().packet(0), room.truncated()), (b"".as_slice(), 1));
}

#[test]
fn closing_wakes_a_blocked_receiver_for_good() {
    let socket = UdpBatch::bind(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap();
    std::thread::scope(|scope| {
        let blocked = scope.spawn(|| socket.recv_batch(&mut socket.recv_room(1), Duration::from_secs(3600)));
        socket.close();
        assert_eq!(blocked.join().unwrap().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    });
    assert!(socket.recv_batch(&mut socket.recv_room(1), SOON).is_err());
}

#[test]
fn an_idle_socket_times_out() {
    let socket = UdpBatch::bind(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap();
    assert_eq!(socket.recv_batch(&mut socket.recv_room(1), Duration::from_millis(1)).unwrap(), 0);
}

#[test]
fn a_taken_port_says_so_and_what_to_do() {
    let taken = UdpBatch::bind(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap();
    let error = UdpBatch::bind(&Config::bound_to(taken.local_addr())).unwrap_err();
    assert!(matches!(error, Error::AddressInUse { .. }), "{error}");
    assert!(error.to_string().contains("--port"), "{error}");
}

#[test]
fn senders_keep_to_one_of_the_sockets_on_an_address() {
    let config = Config { sockets: 3, ..Config::bound_to("127.0.0.1:0".parse().unwrap()) };
    let group = UdpBatch::bind(&config).unwrap();
    assert_eq!(group.others().len(), 2);
    let members: Vec<_> = (0..3).map(|number| group.member(number)).collect();
    assert!(members.iter().all(|member| member.local_addr() == group.local_addr()));
    assert!(std::ptr::eq(group.member(4), group.member(1)));
    let taken = UdpBatch::bind(&Config { bind: group.local_addr(), ..config }).unwrap_err();
    assert!(matches!(taken, Error::AddressInUse { .. }), "another group does not mix with this one: {taken}");
    let senders: Vec<_> = (0..24).map(|_| std::net::UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    for sequence in 0..5_u8 {
        for sender in &senders {
            sender.send_to(&[sequence], group.local_addr()).unwrap();
        }
    }
    let mut heard = std::collections::BTreeMap::<_, Vec<_>>::new();
    for (number, member) in members.iter().enumerate() {
        let mut room = member.recv_room(64);
        while member.recv_batch(&mut room, Duration::from_millis(20)).unwrap() > 0 {
            for index in 0..room.len() {
                let sequence = room.batch().packet(index)[0];
                heard.entry(room.source(index)).or_default().push((number, sequence));
            }
        }
    }
    assert_eq!(heard.len(), senders.len());
    for (sender, heard) in &heard {
        let expected: Vec<_> = (0..5).map(|sequence| (heard[0].0, sequence)).collect();
        assert_eq!(*heard, expected, "{sender}");
    }
    let used: std::collections::BTreeSet<_> = heard.values().map(|heard| heard[0].0).collect();
    assert!(used.len() > 1, "the kernel spreads senders");
    // Answers come from the common port, whichever socket sends them.
    members[2].send_to(b"answer", senders[0].local_addr().unwrap()).unwrap();
    assert_eq!(senders[0].recv_from(&mut [0; 9]).unwrap().1, group.local_addr());
    group.close();
    for member in members {
        assert!(member.recv_batch(&mut member.recv_room(1), Duration::from_secs(60)).is_err());
    }
}

#[test]
fn a_refused_datagram_does_not_hold_up_the_others() {
    let socket = UdpBatch::bind(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap();
    let mut batch = Batch::new(2, 64);
    assert!(batch.push(b"one") && batch.push(b"two"));
    let to_v6 = Outgoing { to: "[::1]:9".parse().unwrap(), index: 0 };
    let good = Outgoing { to: socket.local_addr(), index: 1 };
    assert_eq!(socket.send_batch(&batch, &[to_v6, good]), Sent { sent: 1, failed: 1, dropped: 0 });
    let mut room = socket.recv_room(2);
    assert_eq!(socket.recv_batch(&mut room, SOON).unwrap(), 1);
    assert_eq!(room.batch().packet(0), b"two");
}

#[test]
fn a_port_that_nobody_listens_on_does_not_end_the_socket() {
    let socket = UdpBatch::bind(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap();
    let gone = UdpBatch::bind(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap().local_addr();
    socket.send_to(b"anyone?", gone).unwrap();
    socket.send_to(b"me", socket.local_addr()).unwrap();
    let mut room = socket.recv_room(2);
    let count = (0..3).map(|_| socket.recv_batch(&mut room, SOON).unwrap()).find(|count| *count > 0);
    assert_eq!((count, room.batch().packet(0)), (Some(1), b"me".as_slice()));
}

#[test]
fn an_adopted_socket_has_its_address_and_what_it_had_received() {
    let bound = plain(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap();
    let sender = UdpBatch::bind(&Config::bound_to("127.0.0.1:0".parse().unwrap())).unwrap();
    sender.send_to(b"early", bound.local_addr().unwrap()).unwrap();
    let adopted = UdpBatch::adopt(&bound, &Config::default()).unwrap();
    assert_eq!(adopted.local_addr(), bound.local_addr().unwrap());
    drop(bound);
    let mut room = adopted.recv_room(4);
    assert_eq!(adopted.recv_batch(&mut room, SOON).unwrap(), 1);
    assert_eq!(room.batch().packet(0), b"early");
}
