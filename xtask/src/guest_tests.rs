//! `cargo xtask guest`: the observer's tests that need another kernel, run under one.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail, ensure};
use xtask::guest::kernels::Release;
use xtask::guest::{Guest, MODULES, PROGRAMS};

use crate::{
    build::{cargo, root},
    setup,
};

/// Which kernel, and which tests.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Debian's kernel of this series: 5.10, 6.1, 6.12, 6.18 or 7.2. The tests are made for the
    /// default.
    #[arg(long, default_value = DEFAULT_RELEASE)]
    kernel: Release,
    /// For the test program: names of tests, `--nocapture`, `--list`.
    #[arg(last = true)]
    arguments: Vec<String>,
}

/// The oldest of Debian's kernels whose hooks tell everything that the observer asks.
const DEFAULT_RELEASE: &str = "6.12";

/// The test program, of the package `observer`. Its tests are ignored elsewhere.
const TESTS: &str = "guest";

/// Builds the tests, boots, and runs them.
///
/// # Errors
/// A missing tool or kernel, a failed build, a guest that crashed, or a failed test.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::run(setup::Task::Guest)?;
    let guest = Guest {
        release: args.kernel,
        modules: MODULES.iter().map(|&name| name.to_owned()).collect(),
        programs: PROGRAMS.iter().map(|&name| name.to_owned()).collect(),
        program: build()?,
        // The tests have one machine, and change it.
        arguments: ["--ignored", "--test-threads=1"]
            .into_iter()
            .chain(args.arguments.iter().map(String::as_str))
            .map(str::to_owned)
            .collect(),
        directory: PathBuf::from(root()).join("target/guest"),
    };
    match guest.run()? {
        0 => Ok(()),
        code => bail!("a test failed under Linux {} (exit code {code})", args.kernel),
    }
}

/// All tests, under the default kernel.
///
/// # Errors
/// As [`run`].
pub(crate) fn run_default() -> Result<()> {
    let kernel = DEFAULT_RELEASE.parse().map_err(anyhow::Error::msg)?;
    run(&Args { kernel, arguments: Vec::new() })
}

/// Builds the test program as `cargo xtask test` does, so that nothing is compiled twice, and
/// returns its path.
fn build() -> Result<PathBuf> {
    let output = cargo("test")
        .args(["--workspace", "--exclude=observer-ebpf", "--test", TESTS, "--no-run"])
        .arg("--message-format=json-render-diagnostics")
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cargo did not start")?;
    ensure!(output.status.success(), "the guest's tests do not compile");
    built(&String::from_utf8_lossy(&output.stdout)).context("cargo built no test program")
}

/// The test program among cargo's messages, one JSON object per line.
fn built(messages: &str) -> Option<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str(line).ok());
    messages
        .filter(|message: &serde_json::Value| message["target"]["name"] == TESTS)
        .find_map(|message| Some(message["executable"].as_str()?.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_release_is_a_known_one() {
        assert_eq!(DEFAULT_RELEASE.parse::<Release>().map(|it| it.to_string()), Ok("6.12".into()));
    }

    #[test]
    fn the_test_program_is_told_from_other_artifacts() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"observer"},"executable":"/o"}
{"reason":"compiler-artifact","target":{"name":"guest"},"executable":"/t/guest-1"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(built(messages), Some("/t/guest-1".into()));
        assert_eq!(built("Compiling\n"), None);
    }
}
