//! See `observer_fuzz::legacy_table`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| observer_fuzz::legacy_table(bytes));
