//! Cilium's maps against the real kernel: made, pinned and written here as cilium-agent does, in a
//! mount and network namespace of each test's own. Needs root; fails without.

mod agent;
mod following;
mod hooked;
mod maps;
mod reading;
mod running;
mod scale;
