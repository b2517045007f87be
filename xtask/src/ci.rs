//! `cargo xtask ci`: what must pass before a merge, with the time each part took.

use std::process::Command;

use anyhow::{Context as _, Result};

use crate::{setup, step};

/// The parts. A real Kubernetes comes last: the first time it has to be compiled. The other
/// dataplanes on it, and outages, are left to a person's `cargo xtask e2e`.
const PARTS: [&[&str]; 4] =
    [&["lint"], &["test"], &["demo"], &["e2e", "--dataplane", "iptables-nft", "--without-outages"]];

/// Runs the parts as a person would, one command each.
///
/// # Errors
/// The first part that fails.
pub(crate) fn run() -> Result<()> {
    setup::run(setup::Task::Everything)?;
    // Tells a missing root before the first part is built.
    setup::run(setup::Task::Test)?;
    let this = std::env::current_exe().context("cannot tell which program this is")?;
    let mut times = Vec::new();
    for part in PARTS {
        let started = step::now();
        step::shown(Command::new(&this).args(part))?;
        times.push(format!("{} {:.0} s", part[0], started.elapsed().as_secs_f64()));
    }
    step::say(&format!("ci: passed: {}", times.join(", ")));
    Ok(())
}
