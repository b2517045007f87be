//! See `observer_fuzz::names`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| observer_fuzz::names(bytes));
