//! Fuzzes [`mesh_fuzz::disco`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mesh_fuzz::disco(bytes));
