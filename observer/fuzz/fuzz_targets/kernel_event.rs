//! See `observer_fuzz::kernel_event`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| observer_fuzz::kernel_event(bytes));
