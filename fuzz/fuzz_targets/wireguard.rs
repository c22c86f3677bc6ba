//! Fuzzes [`mesh_fuzz::wireguard`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mesh_fuzz::wireguard(bytes));
