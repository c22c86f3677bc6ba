//! WireGuard between two interfaces in virtual time, and between ours and boringtun.

mod boringtun_peer;
mod chaos;
mod cost;
mod handshake;
mod pair;
mod roaming;
mod timers;
