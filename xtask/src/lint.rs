//! `cargo xtask lint`: everything that can be found wrong without running the product.

use std::process::Command;

use anyhow::Result;

use crate::{
    build::{cargo, cargo_path, root},
    setup, step,
};

/// Runs all checks; stops at the first that fails.
///
/// # Errors
/// A missing tool, or a finding; the check has shown it.
pub(crate) fn run() -> Result<()> {
    setup::run(setup::Task::Lint)?;
    step::say("lint: format");
    step::shown(cargo("fmt").args(["--all", "--check"]))?;
    // Its own workspace, as it takes a nightly; what it fuzzes is linted with the corpus test.
    step::shown(cargo("fmt").args(["--check", "--manifest-path", "observer/fuzz/Cargo.toml"]))?;
    step::say("lint: clippy, host crates");
    step::shown(
        cargo("clippy")
            .args(["--workspace", "--exclude=observer-ebpf", "--all-targets"])
            .args(["--", "--deny=warnings"]),
    )?;
    step::say("lint: clippy, kernel programs");
    step::shown(&mut kernel_clippy())?;
    step::say("lint: dependencies");
    // Not `advisories`: its database is a git repository, and a check may only need the registry.
    step::shown(cargo("deny").args(["--log-level=error", "check", "bans", "licenses", "sources"]))?;
    step::say("lint: alert rules");
    step::shown(
        Command::new("promtool")
            .args(["check", "rules", "deploy/prometheus-rules.yaml"])
            .current_dir(root()),
    )
}

/// Clippy for the kernel programs, of the release whose `core` for BPF is there.
fn kernel_clippy() -> Command {
    let mut clippy;
    if setup::has_debian_compiler() {
        clippy = Command::new(setup::DEBIAN_CLIPPY);
        // aya-ebpf needs one unstable feature; no other crate gets any.
        clippy
            .env("CARGO", cargo_path())
            .env("RUSTC", setup::DEBIAN_RUSTC)
            .env("RUSTC_BOOTSTRAP", "aya_ebpf")
            .arg("clippy");
    } else {
        clippy = Command::new("rustup");
        clippy.args(["run", "nightly", "cargo", "clippy", "-Zbuild-std=core"]);
        clippy.env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO");
    }
    let machine = std::env::consts::ARCH;
    clippy
        .args(["--package=observer-ebpf", "--bin=observer-programs"])
        .args(["--target=bpfel-unknown-none", "--target-dir=target/kernel-lint"])
        .args(["--", "--deny=warnings"])
        .env("CARGO_ENCODED_RUSTFLAGS", format!("--cfg=bpf_target_arch=\"{machine}\""))
        .current_dir(root());
    clippy
}
