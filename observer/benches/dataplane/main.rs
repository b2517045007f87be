//! Speed and size of the dataplane's reader, on rules of 1,000 and 10,000 Services.
//!
//! Run by `cargo xtask bench dataplane`; needs root, and Debian's nftables and iptables. Rules are
//! written by the real tools into network namespaces of the bench's own, which go with it. Both
//! sizes are measured in turn in the same run, so that whatever else the machine does hits both.
//! Prints a table to standard output and exits with 1 when a figure misses its bound.

mod alternatives;
mod followed;
mod measure;
mod memory;
mod place;
mod report;
mod rules;
mod threads;
mod witness;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};
use report::Report;

/// How large the sets of rules are, in Services.
const SIZES: [usize; 2] = [1_000, 10_000];

/// Speed and size of the dataplane's reader.
#[derive(Parser)]
struct Arguments {
    /// Also write the table, and how it was measured, to this file
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Measure only this kind of rules
    #[arg(long, value_name = "KIND", conflicts_with = "save")]
    only: Option<Kind>,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// What wrote the rules.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// kube-proxy's nftables mode
    Nftables,
    /// kube-proxy's iptables mode over `nf_tables`
    IptablesNft,
    /// kube-proxy's iptables mode over the legacy tables
    IptablesLegacy,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Measures and shows; false when a bound was missed.
#[expect(clippy::print_stdout, reason = "the table is what the bench is for")]
fn run(arguments: &Arguments) -> Result<bool> {
    let mut report = Report::default();
    let kinds = [Kind::Nftables, Kind::IptablesNft, Kind::IptablesLegacy];
    for kind in kinds.into_iter().filter(|kind| arguments.only.is_none_or(|only| only == *kind)) {
        match kind {
            Kind::Nftables => measure::nftables(&mut report)?,
            Kind::IptablesNft => measure::iptables_nft(&mut report)?,
            Kind::IptablesLegacy => measure::iptables_legacy(&mut report)?,
        }
    }
    println!("{}", report.table());
    if let Some(file) = &arguments.save {
        fs::write(file, document(&report)?).with_context(|| format!("{}", file.display()))?;
        say(&format!("saved to {}", file.display()));
    }
    for missed in report.missed() {
        say(&format!("bound missed: {missed}"));
    }
    Ok(report.missed().is_empty())
}

/// The saved form: the table with its circumstances.
fn document(report: &Report) -> Result<String> {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").context("which kernel?")?;
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").context("which processor?")?;
    let models = cpuinfo.lines().filter_map(|line| line.strip_prefix("model name"));
    let models: Vec<&str> =
        models.map(|model| model.trim_start_matches([' ', '\t', ':'])).collect();
    let today = jiff::Timestamp::now().strftime("%Y-%m-%d");
    Ok(include_str!("document.md")
        .replace("DATE", &today.to_string())
        .replace("KERNEL", kernel.trim())
        .replace("PROCESSORS", &format!("{} x {}", models.len(), models.first().unwrap_or(&"?")))
        .replace("TABLE\n", &report.table()))
}

/// Progress, and what went wrong.
#[expect(clippy::print_stderr, reason = "progress and errors of a command-line tool")]
fn say(line: &str) {
    eprintln!("{line}");
}
