//! See `observer_fuzz::slices`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| observer_fuzz::slices(bytes));
