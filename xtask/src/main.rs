//! Everything a person runs in this repository: one command, one file.
//!
//! Must build on a machine that has nothing but rustup, git, gcc and make, so it never depends on
//! the observer itself, which needs what `setup` installs.

mod bench;
mod build;
mod ci;
mod guest_tests;
mod lint;
mod setup;
mod test;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use xtask::step;

/// Builds, checks and shows the observer. Each command first installs what it lacks.
#[derive(Parser)]
#[command(
    name = "cargo xtask",
    version,
    after_help = "Exit codes: 0 done, 1 failed, 2 cannot start here (what to install or change is \
                  said), 129, 130 and 143 interrupted."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what all commands need, and nothing that is there already.
    Setup,
    /// Build the kernel programs and the observer.
    Build(build::Args),
    /// Check format, lints (host and kernel programs), dependencies and alert rules.
    Lint,
    /// Run all tests, those that need root and the kernel too.
    Test(test::Args),
    /// Run the tests that need another kernel, in an emulated guest.
    Guest(guest_tests::Args),
    /// Watch pods being replaced, without a preStop sleep and with the recommended one.
    Demo(xtask::demo::Args),
    /// Start a real Kubernetes of two nodes, with the observer on each.
    E2e(xtask::e2e::Args),
    /// Measure speed and size, and compare them with what they may be.
    Bench(bench::Args),
    /// lint, test, demo and e2e on iptables-nft, each timed: what must pass before a merge.
    Ci,
    /// The server inside one of the lab's pods.
    #[command(hide = true)]
    LabPod(xtask::lab::pod::Args),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Setup => setup::run(setup::Task::Everything),
        Command::Build(args) => build::run(&args),
        Command::Lint => lint::run(),
        Command::Test(args) => test::run(&args),
        Command::Guest(args) => guest_tests::run(&args),
        Command::Demo(args) => demo(&args),
        Command::E2e(args) => e2e(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Ci => ci::run(),
        Command::LabPod(args) => xtask::lab::pod::run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            step::say(&format!("error: {error:#}"));
            ExitCode::from(if error.is::<setup::Unmet>() { 2 } else { 1 })
        }
    }
}

fn demo(args: &xtask::demo::Args) -> anyhow::Result<()> {
    setup::run(setup::Task::Network)?;
    build::observer(build::Profile::Dev)?;
    xtask::demo::run(args)
}

fn e2e(args: &xtask::e2e::Args) -> anyhow::Result<()> {
    if args.compiles() {
        setup::run(setup::Task::Kubernetes)
            .context("Kubernetes is compiled first, unless `--binaries DIR` has it")?;
    } else {
        setup::run(setup::Task::Network)?;
    }
    build::observer(build::Profile::Dev)?;
    xtask::e2e::run(args)
}
