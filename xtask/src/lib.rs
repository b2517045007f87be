//! Everything a person runs in this repository, as a library for the binary and its tests.

pub mod lab;
