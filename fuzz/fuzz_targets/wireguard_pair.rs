//! Fuzzes [`mesh_fuzz::wireguard_pair`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mesh_fuzz::wireguard_pair(bytes));
