//! Fuzzes [`mesh_fuzz::agent`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mesh_fuzz::agent(bytes));
