//! Fuzzes [`mesh_fuzz::channel`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mesh_fuzz::channel(bytes));
