//! Fuzzes [`mesh_fuzz::mtu`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mesh_fuzz::mtu(bytes));
