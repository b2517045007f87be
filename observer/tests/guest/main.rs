//! The observer under another kernel, on a machine that is its own: `cargo xtask guest` boots one
//! and runs these there.
//!
//! For what a build machine's kernel may lack (IPVS, modules). Each test is `#[ignore]`d, so that
//! it runs nowhere else, and begins with [`machine::require_guest`], because it may load modules
//! and write rules without taking them back. Everything is emulated: keep tests light.

mod cgroups;
mod following;
mod ipvs;
mod kernel;
mod legacy;
mod machine;
mod modules;
mod nftables;
#[path = "../cgroups/pods.rs"]
mod pods;
