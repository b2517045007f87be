//! See `observer_fuzz::cilium_maps`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| observer_fuzz::cilium_maps(bytes));
