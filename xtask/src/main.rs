//! Everything a person runs in this repository.

use anyhow::Result;
use clap::Parser;

#[derive(Parser)]
enum Command {
    /// Watch pods being replaced, without a preStop sleep and with the recommended one.
    Demo(xtask::demo::Args),
    #[command(hide = true)]
    LabPod(xtask::lab::pod::Args),
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Demo(args) => xtask::demo::run(&args),
        Command::LabPod(args) => xtask::lab::pod::run(&args),
    }
}
