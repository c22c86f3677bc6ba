//! Fuzzes [`mesh_fuzz::ip_packet`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mesh_fuzz::ip_packet(bytes));
