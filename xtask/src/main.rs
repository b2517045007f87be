//! Everything a person runs in this repository.
fn main() {}
