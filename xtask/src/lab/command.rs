//! Runs the real tools (`ip`, `nft`, `iptables-*-restore`); whatever they print on stderr becomes
//! the error.

use std::io::Write;
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, bail};

use super::netns::Namespace;

/// A tool that was run to its end.
pub(crate) struct Finished {
    /// Its process id, which the kernel reports with the rules it committed.
    pub(crate) pid: u32,
    /// What it printed.
    pub(crate) stdout: String,
}

/// Runs a tool with `input` on stdin, inside `namespace` when one is given.
pub(crate) fn run(
    namespace: Option<&Namespace>,
    command: &mut Command,
    input: &str,
) -> Result<Finished> {
    let shown = shown(command);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = match namespace {
        Some(namespace) => namespace.spawn(command),
        None => command.spawn().map_err(Into::into),
    };
    let child = child.with_context(|| format!("cannot start `{shown}`: is it installed?"))?;
    let pid = child.id();
    let output = feed(child, input).with_context(|| format!("`{shown}`"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("`{shown}` failed ({}): {}", output.status, stderr.trim());
    }
    Ok(Finished { pid, stdout: String::from_utf8_lossy(&output.stdout).into_owned() })
}

/// Writes the whole input before reading: inputs are far smaller than what the tools buffer.
fn feed(mut child: Child, input: &str) -> Result<Output> {
    if let Some(mut stdin) = child.stdin.take() {
        // A tool that refuses early closes its stdin; its own message says more than EPIPE.
        stdin.write_all(input.as_bytes()).or_else(|error| match error.kind() {
            std::io::ErrorKind::BrokenPipe => Ok(()),
            _ => Err(error),
        })?;
    }
    Ok(child.wait_with_output()?)
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
