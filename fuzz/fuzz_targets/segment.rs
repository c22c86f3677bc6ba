//! Fuzzes [`mesh_fuzz::segment`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mesh_fuzz::segment(bytes));
