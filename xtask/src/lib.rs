//! Everything a person runs in this repository, as a library for the binary and its tests.

mod cache;
pub mod demo;
pub mod e2e;
pub mod guest;
pub mod lab;
pub mod scale;
pub mod step;
