//! Fuzzes [`mesh_fuzz::masquerade`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mesh_fuzz::masquerade(bytes));
