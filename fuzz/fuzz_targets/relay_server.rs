//! Fuzzes [`mesh_fuzz::relay_server`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mesh_fuzz::relay_server(bytes));
