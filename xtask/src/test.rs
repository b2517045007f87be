//! `cargo xtask test`: all tests, the alert rules' own, and those of another kernel.

use std::process::Command;

use anyhow::Result;

use crate::{
    build::{self, cargo, root},
    guest_tests, setup, step,
};

/// Which tests to run.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only tests whose names contain one of these; default all, the alert rules and the guest.
    filters: Vec<String>,
}

/// Runs the tests. Those that share this machine's kernel take turns by a lock of their own.
///
/// # Errors
/// A missing tool, or a failed test; cargo has shown it.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::run(setup::Task::Test)?;
    // The lab's tests run the daemon as a program.
    build::observer(build::Profile::Dev)?;
    step::shown(
        cargo("test").args(["--workspace", "--exclude=observer-ebpf", "--"]).args(&args.filters),
    )?;
    if args.filters.is_empty() {
        step::say("test: alert rules");
        step::shown(
            Command::new("promtool")
                .args(["test", "rules", "prometheus-rules.test.yaml"])
                .current_dir(format!("{}/deploy", root())),
        )?;
        step::say("test: another kernel, in a guest");
        guest_tests::run_default()?;
    }
    Ok(())
}
