//! Fuzzes [`mesh_fuzz::coalesce`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mesh_fuzz::coalesce(bytes));
