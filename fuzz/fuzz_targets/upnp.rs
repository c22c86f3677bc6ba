//! Fuzzes [`mesh_fuzz::upnp`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| mesh_fuzz::upnp(bytes));
