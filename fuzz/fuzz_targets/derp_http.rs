//! Fuzzes [`mesh_fuzz::derp_http`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mesh_fuzz::derp_http(bytes));
