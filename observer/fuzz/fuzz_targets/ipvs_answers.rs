//! See `observer_fuzz::ipvs_answers`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| observer_fuzz::ipvs_answers(bytes));
