//! Parses the command line, runs one command, and turns its outcome into an exit code.

use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use observer::cli::{BackendsArgs, Cli, Command, LogFormat, ReportArgs, RunArgs};
use observer::dataplane::Settings;
use observer::kernel::{self, StartError};
use observer::{agent, backends, logging, memory, report};

/// The daemon waits far more than it works, and the node's cores belong to its pods: a thread per
/// core would only cost memory.
const WORKERS: usize = 2;

/// This machine or its permissions cannot do it.
const UNSUPPORTED: u8 = 3;

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Run(args) => run(args),
        Command::Report(args) => print_report(&args),
        Command::Backends(args) => print_backends(&args),
    };
    let Err(error) = outcome else { return ExitCode::SUCCESS };
    // Where even this cannot be written, the exit code still tells.
    let _unwritable = writeln!(io::stderr(), "error: {error:#}");
    match error.downcast_ref::<StartError>() {
        Some(StartError::NoBtf(_) | StartError::NoPermission(_)) => ExitCode::from(UNSUPPORTED),
        Some(StartError::Failed(_)) | None => ExitCode::FAILURE,
    }
}

fn run(args: RunArgs) -> anyhow::Result<()> {
    memory::give_back_early();
    logging::install(args.log_format, &args.log_level)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(agent::run(agent::Settings {
        node: args.node_name,
        kubeconfig: args.kubeconfig,
        listen: args.listen,
        cgroup_root: args.cgroup_root,
        cluster: args.cluster_cidr,
        dataplane: args.rules.dataplane.only(),
        cilium_maps: args.rules.cilium_maps,
    }))
}

fn print_backends(args: &BackendsArgs) -> anyhow::Result<()> {
    // What could not be read, and why.
    logging::install(LogFormat::Text, "warn")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let settings = Settings {
        dataplane: args.rules.dataplane.only(),
        cilium_maps: args.rules.cilium_maps.clone(),
        ..Settings::default()
    };
    let (mut out, mut notes) = (io::stdout().lock(), io::stderr().lock());
    let printed = backends::run(settings, args.output, &mut out, &mut notes);
    runtime.context("cannot start the runtime")?.block_on(printed).map_err(permission)
}

/// A lack of permissions has an exit code of its own.
fn permission(error: anyhow::Error) -> anyhow::Error {
    if kernel::is_permission_error(&error) { StartError::NoPermission(error).into() } else { error }
}

fn print_report(args: &ReportArgs) -> anyhow::Result<()> {
    let (mut out, mut errors) = (io::stdout().lock(), io::stderr().lock());
    report::run(&args.urls, args.output, args.margin, &mut out, &mut errors)
}
