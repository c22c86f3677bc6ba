//! Fuzzes [`mesh_fuzz::portmap`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mesh_fuzz::portmap(bytes));
