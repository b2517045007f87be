//! `cargo xtask build`: the kernel programs and the daemon that carries them.

use std::{ffi::OsString, process::Command};

use anyhow::Result;

use crate::{setup, step};

/// What to build.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Optimised, as it is shipped.
    #[arg(long)]
    release: bool,
}

/// Cargo's build profiles.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Profile {
    /// Quick to build: for tests and the demo.
    Dev,
    /// Optimised.
    Release,
}

/// Builds, and says where the program is.
///
/// # Errors
/// A missing tool, or a failed build.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::run(setup::Task::Build)?;
    observer(if args.release { Profile::Release } else { Profile::Dev })?;
    let directory = if args.release { "release" } else { "debug" };
    let compiler = if setup::has_debian_compiler() { "Debian's rustc" } else { "rustup's nightly" };
    step::say(&format!("built target/{directory}/observer (kernel programs by {compiler})"));
    Ok(())
}

/// Builds the daemon on a machine that is set up.
///
/// # Errors
/// A failed build; cargo has said why.
pub(crate) fn observer(profile: Profile) -> Result<()> {
    let mut build = cargo("build");
    // Not this program too: it runs, and starts copies of itself by its path.
    build.arg("--package=observer");
    if let Profile::Release = profile {
        build.arg("--release");
    }
    step::shown(&mut build)
}

/// The cargo that runs this program, in the workspace, as if a person had called it.
///
/// What `cargo run` tells this program about its own package must not reach the build scripts of
/// others: ring's reads it, and would be built anew on each change between `cargo build` and this.
pub(crate) fn cargo(command: &str) -> Command {
    let mut cargo = Command::new(cargo_path());
    cargo.arg(command).current_dir(root());
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            cargo.env_remove(&name);
        }
    }
    cargo
}

/// That cargo's path; outside of `cargo xtask`, the one in the search path.
pub(crate) fn cargo_path() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// The workspace's directory, wherever this was called from.
pub(crate) fn root() -> &'static str {
    concat!(env!("CARGO_MANIFEST_DIR"), "/..")
}
