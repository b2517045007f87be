//! Everything a person runs in this repository.

use anyhow::Result;
use clap::Parser;

#[derive(Parser)]
enum Command {
    #[command(hide = true)]
    LabPod(xtask::lab::pod::Args),
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::LabPod(args) => xtask::lab::pod::run(args),
    }
}
