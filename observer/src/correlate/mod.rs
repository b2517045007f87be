//! Facts in any order to one timeline per termination.
//!
//! Pure: time is an argument, nothing is read or written.

mod timeline;

pub use timeline::{Instant, Source, Timeline};
