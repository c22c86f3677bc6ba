//! Fuzzes [`mesh_fuzz::uapi`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mesh_fuzz::uapi(bytes));
