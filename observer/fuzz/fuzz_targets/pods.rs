//! See `observer_fuzz::pods`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| observer_fuzz::pods(bytes));
