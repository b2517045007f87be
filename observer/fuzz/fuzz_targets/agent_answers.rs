//! See `observer_fuzz::agent_answers`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| observer_fuzz::agent_answers(bytes));
