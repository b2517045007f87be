//! Where the log goes: stderr, as text or JSON.
//!
//! The subscriber also takes what speaks `log` (the kernel programs' own log does), once: the
//! bridge is part of its installation.

use std::io::{IsTerminal as _, stderr};

use anyhow::anyhow;
use tracing_subscriber::EnvFilter;

use crate::cli::LogFormat;

/// Installs the log for the whole process.
///
/// # Errors
/// When `level` is not a filter, or a log is installed already.
pub fn install(format: LogFormat, level: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::builder().parse(level)?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr);
    let installed = match format {
        LogFormat::Text => log.with_ansi(stderr().is_terminal()).try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    installed.map_err(|error| anyhow!("cannot install the log: {error}"))
}
