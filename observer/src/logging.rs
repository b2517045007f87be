//! Where the log goes: stderr, as text or JSON.
//!
//! The subscriber also takes what speaks `log` (the kernel programs' own log does), once: the
//! bridge is part of its installation.

use std::io::{IsTerminal as _, stderr};

use anyhow::anyhow;
use tracing_subscriber::EnvFilter;

use crate::cli::LogFormat;

/// The client logs each failed request without saying which; the watches say it with their name.
/// A directive of the same target in `--log-level` comes later and wins.
const SAID_BETTER: &str = "kube_client::client::builder=off";

/// Installs the log for the whole process.
///
/// # Errors
/// When `level` is not a filter, or a log is installed already.
pub fn install(format: LogFormat, level: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::builder().parse(format!("{SAID_BETTER},{level}"))?;
    // A log that cannot be written would otherwise be reported on stderr, which is where it goes:
    // the daemon would panic when whoever reads it ends.
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr)
        .log_internal_errors(false);
    let installed = match format {
        LogFormat::Text => log.with_ansi(stderr().is_terminal()).try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    installed.map_err(|error| anyhow!("cannot install the log: {error}"))
}
