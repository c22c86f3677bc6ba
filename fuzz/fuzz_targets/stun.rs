//! Fuzzes [`mesh_fuzz::stun`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mesh_fuzz::stun(bytes));
