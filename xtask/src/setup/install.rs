//! Installing, on Debian 12 as root: packages in one go, then crates, then single programs.

use std::{fs, process::Command};

use anyhow::{Context as _, Result};

use super::tool::{LLVM_PREFIX, Source, Tool};
use crate::{build::cargo, step};

/// Where single programs go: in everyone's path, and not the package manager's.
const PROGRAMS: &str = "/usr/local/bin";

/// Installs the tools; those that others need come first in `missing`.
///
/// # Errors
/// Names the command that failed, after its last lines of output.
pub(super) fn all(missing: &[&Tool]) -> Result<()> {
    let packages: Vec<&str> = missing
        .iter()
        .flat_map(|tool| match tool.source {
            Source::Packages(packages) => packages,
            Source::Crate(..) | Source::OneProgram { .. } => &[],
        })
        .copied()
        .collect();
    if missing.iter().any(|tool| !matches!(tool.source, Source::Crate(..))) {
        step::titled("setup: refreshing the package lists", apt().args(["update", "-q"]))?;
    }
    if !packages.is_empty() {
        step::titled(
            &format!("setup: installing {}", packages.join(" ")),
            apt().args(["install", "-q", "-y", "--no-install-recommends"]).args(&packages),
        )?;
    }
    for tool in missing {
        match tool.source {
            Source::Packages(_) => {}
            Source::Crate(name, version, arguments) => from_registry(name, version, arguments)?,
            Source::OneProgram { package, program } => one_program(package, program)?,
        }
    }
    Ok(())
}

/// Where Debian's package tools look; `su` without `-` leaves the `sbin`s out, and dpkg fails.
const PACKAGE_TOOLS: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Waits for another `apt-get` instead of failing, and asks nothing.
fn apt() -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive").env("PATH", PACKAGE_TOOLS);
    apt.args(["-o", "DPkg::Lock::Timeout=600"]);
    apt
}

fn from_registry(name: &str, version: &str, arguments: &[&str]) -> Result<()> {
    step::titled(
        &format!("setup: compiling {name} {version} (minutes, once)"),
        cargo("install")
            .args(["--locked", "--force", "--version", version, name])
            .args(arguments)
            .env("LLVM_PREFIX", LLVM_PREFIX)
            // Not this workspace's configuration.
            .current_dir("/"),
    )
}

/// Takes one program out of a package, so that no service, account or configuration comes along.
fn one_program(package: &str, program: &str) -> Result<()> {
    let directory = tempfile::tempdir().context("no temporary directory for a package")?;
    step::titled(
        &format!("setup: fetching {program} of the package {package}"),
        apt().args(["download", "-q", package]).current_dir(&directory),
    )?;
    let archive = fs::read_dir(&directory)?
        .next()
        .with_context(|| format!("apt-get left no file of {package}"))??
        .path();
    step::titled(
        &format!("setup: unpacking {program}"),
        Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(directory.path()),
    )?;
    let source = directory.path().join(program);
    let name = source.file_name().with_context(|| format!("{program} names no file"))?;
    // Renamed into place, so that an interrupted copy is never taken for the program.
    let target = std::path::Path::new(PROGRAMS).join(name);
    let partial = target.with_extension("partial");
    fs::copy(&source, &partial).with_context(|| format!("cannot write {}", partial.display()))?;
    fs::rename(&partial, &target).with_context(|| format!("cannot write {}", target.display()))
}
