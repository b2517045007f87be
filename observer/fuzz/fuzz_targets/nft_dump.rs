//! See `observer_fuzz::nft_dump`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| observer_fuzz::nft_dump(bytes));
