//! Disco: sealed path probes between nodes, and the requests to send some.
//!
//! There is no RFC; this is the whole format. A datagram is an envelope around a NaCl box:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 6 | magic `54 53 F0 9F 92 AC` |
//! | 6 | 32 | sender's disco public key |
//! | 38 | 24 | nonce, random |
//! | 62 | 16 + n | box: Poly1305 tag, then the sealed message |
//!
//! and a message is type (1 byte), version (1 byte, zero), body. Integers are big-endian; an address is 16 bytes
//! (IPv4 as `::ffff:a.b.c.d`) and a port of 2. What follows a body of fixed size is ignored.
//!
//! | type | message | body | bytes | carried on |
//! |---|---|---|---|---|
//! | 01 | ping | transaction 12, node key 32, zero padding | 44 + n; 12 from ancient peers | UDP, relay |
//! | 02 | pong | transaction 12, address the ping came from 18 | 30 | as the ping |
//! | 03 | call-me-maybe | addresses | 18 k | relay only |
//! | 04 | bind | VNI 4, generation 4, other client's disco key 32, challenge 32 | 72 | peer relay, control |
//! | 05 | bind challenge | as 04 | 72 | peer relay, control |
//! | 06 | bind answer | as 04 | 72 | peer relay, control |
//! | 07 | call-me-maybe-via | relay endpoint | 124 + 18 k, k ≥ 1 | relay only |
//! | 08 | allocate request | two client disco keys 64, generation 4 | 68 | relay only |
//! | 09 | allocate response | generation 4, relay endpoint | 128 + 18 k, k ≥ 1 | relay only |
//! | C0 | punch, [ours alone](crate::hard::message) | | 40 to 552 | relay only |
//!
//! A relay endpoint is: server's disco key 32, two client disco keys 64, Lamport id 8, VNI 4, bind lifetime 8 and
//! steady-state lifetime 8 (signed nanoseconds), then addresses.

pub mod message;
pub mod seal;

pub use message::{DecodeError, Message, TxId};
