//! A TUN device with two queues, in a network namespace of its own.
//!
//! Needs root: `unshare -n cargo test -p mesh-tun --test queues -- --ignored`.
#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "helpers outside test functions, in a test")]

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

use mesh_tun::batch::Batch;
use mesh_tun::device::Device;
use mesh_tun::linux::tun::{Config, Tun};
use mesh_tun::packet::{Packet, Transport};

const FLOWS: usize = 32;

#[test]
#[ignore = "needs root and a network namespace of its own"]
fn a_flow_stays_on_its_queue_whichever_its_answers_are_written_to() {
    let mut config = Config::named("meshqueue%d");
    config.queues = 2;
    let tun = Tun::open(&config).unwrap();
    let queues = tun.queues();
    assert_eq!(queues.len(), 1, "beside the device itself");
    let queues: [&dyn Device; 2] = [&tun, &*queues[0]];
    ip(&["addr", "add", "100.64.0.1/10", "dev", tun.name()]);
    ip(&["link", "set", tun.name(), "up"]);
    let sockets: Vec<_> = (0..FLOWS).map(|_| UdpSocket::bind("100.64.0.1:0").unwrap()).collect();
    let mut home = BTreeMap::new();
    for round in 0..6 {
        for socket in &sockets {
            socket.send_to(b"question", "100.64.0.2:53").unwrap();
        }
        let mut seen = 0;
        for (number, queue) in queues.iter().enumerate() {
            for mut packet in questions(*queue) {
                let flow = u16::from_be_bytes([packet[20], packet[21]]);
                assert_eq!(*home.entry(flow).or_insert(number), number, "flow {flow} in round {round}");
                seen += 1;
                // Swapped addresses and ports leave the checksums right.
                packet[12..20].rotate_left(4);
                packet[20..24].rotate_left(2);
                let mut batch = Batch::new(1, packet.len());
                assert!(batch.push(&packet));
                assert_eq!(queues[round % 2].write_batch(&mut batch).unwrap(), 1);
            }
        }
        assert_eq!(seen, FLOWS, "nothing is lost");
        for socket in &sockets {
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            assert_eq!(socket.recv_from(&mut [0; 100]).unwrap().0, 8);
        }
    }
    let first = home.values().filter(|number| **number == 0).count();
    assert!(first > 0 && first < FLOWS, "{first} of {FLOWS} flows on the first queue");

    // The MTU is that of the device, and so is the end.
    ip(&["link", "set", tun.name(), "mtu", "1270"]);
    queues[1].refresh().unwrap();
    assert_eq!((tun.mtu(), queues[1].mtu()), (1270, 1270));
    tun.close();
    let mut batch = Batch::new(1, 1280);
    for queue in queues {
        let error = queue.read_batch(&mut batch, Duration::from_secs(60)).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    }
}

/// What is there for port 53.
fn questions(queue: &dyn Device) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    let mut batch = Batch::new(64, 1280);
    loop {
        batch.clear();
        if queue.read_batch(&mut batch, Duration::from_millis(50)).unwrap() == 0 {
            return found;
        }
        let is_question = |bytes: &&[u8]| {
            Packet::parse(bytes).is_ok_and(|packet| matches!(packet.transport, Transport::Udp { destination: 53, .. }))
        };
        found.extend(batch.iter().filter(is_question).map(<[u8]>::to_vec));
    }
}

fn ip(arguments: &[&str]) {
    assert!(Command::new("ip").args(arguments).status().unwrap().success(), "ip {arguments:?}");
}
