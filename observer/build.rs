//! Compiles the kernel programs and leaves them in `OUT_DIR/observer-programs`.
//!
//! That takes a compiler with a `core` for BPF. Two are known, and the first one found is used:
//! Debian's rustc with its ready-made library, and a rustup nightly that builds `core` from source.
//! Quiet on success; `cargo build -vv` shows which was used. Refuses to guess: with neither, or
//! without the linker, the build stops with the command that installs them.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Where Debian's `libstd-rust-web-dev-bpf` puts a `core` compiled for BPF.
const DEBIAN_BPF_CORE: &str = "/usr/lib/rustlib/bpfel-unknown-none";
/// Debian's compiler, of the release that `DEBIAN_BPF_CORE` was compiled by.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
/// Little-endian BPF: both supported machines, `x86_64` and `aarch64`, are.
const TARGET: &str = "bpfel-unknown-none";

enum Toolchain {
    Debian,
    Nightly,
}

fn main() {
    if let Err(reason) = build() {
        println!("cargo::error={reason}");
    }
}

fn build() -> Result<(), String> {
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR")?).join("..");
    for source in ["observer-ebpf", "observer-common", "Cargo.lock", "Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", root.join(source).display());
    }

    let path = search_path()?;
    let linker = env::split_paths(&path)
        .map(|directory| directory.join("bpf-linker"))
        .find(|file| file.is_file())
        .ok_or("bpf-linker is not installed: run `cargo xtask setup`")?;
    println!("cargo::rerun-if-changed={}", linker.display());

    let toolchain = choose()?;
    let out = PathBuf::from(variable("OUT_DIR")?);
    let output = cargo(&toolchain)?
        .args(["--quiet", "--release", "--package=observer-ebpf", "--bin=observer-programs"])
        .args(["--target", TARGET, "--target-dir"])
        .arg(out.join("programs"))
        .current_dir(&root)
        .env("PATH", &path)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags()?)
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .output()
        .map_err(|error| format!("cargo did not start for the kernel programs: {error}"))?;
    let messages = String::from_utf8_lossy(&output.stderr);
    let level = if output.status.success() { "warning" } else { "error" };
    for line in messages.lines() {
        println!("cargo::{level}={line}");
    }
    if !output.status.success() {
        return Err("the kernel programs do not compile: the compiler's words are above".into());
    }
    let built = out.join("programs").join(TARGET).join("release/observer-programs");
    fs::copy(&built, out.join("observer-programs"))
        .map_err(|error| format!("cannot copy {}: {error}", built.display()))?;
    Ok(())
}

/// The toolchain to use, told to `cargo build -vv`.
fn choose() -> Result<Toolchain, String> {
    if Path::new(DEBIAN_BPF_CORE).exists() && Path::new(DEBIAN_RUSTC).exists() {
        println!("kernel programs: compiled by Debian's {DEBIAN_RUSTC}");
        println!("cargo::rerun-if-changed={DEBIAN_RUSTC}");
        return Ok(Toolchain::Debian);
    }
    let rustc = Command::new("rustup")
        .args(["which", "--toolchain", "nightly", "rustc"])
        .env("RUSTUP_AUTO_INSTALL", "0")
        .output();
    if let Ok(rustc) = rustc
        && let Some(toolchain) =
            Path::new(String::from_utf8_lossy(&rustc.stdout).trim()).ancestors().nth(2)
        && toolchain.join("lib/rustlib/src/rust/library/core").exists()
    {
        println!("kernel programs: compiled by rustup's {}", toolchain.display());
        return Ok(Toolchain::Nightly);
    }
    Err("no compiler for BPF (Debian's libstd-rust-web-dev-bpf, or a rustup nightly with \
         rust-src): run `cargo xtask setup`"
        .into())
}

fn cargo(toolchain: &Toolchain) -> Result<Command, String> {
    let mut cargo;
    match toolchain {
        Toolchain::Debian => {
            cargo = Command::new(variable("CARGO")?);
            // aya-ebpf needs one unstable feature; no other crate gets any.
            cargo.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "aya_ebpf").arg("build");
        }
        Toolchain::Nightly => {
            cargo = Command::new("rustup");
            cargo.args(["run", "nightly", "cargo", "build", "-Zbuild-std=core"]);
            cargo.env_remove("RUSTC").env_remove("RUSTC_BOOTSTRAP");
        }
    }
    Ok(cargo)
}

/// The flags aya needs: the machine whose registers are read, and type information for the kernel.
fn rustflags() -> Result<String, String> {
    let machine = variable("CARGO_CFG_TARGET_ARCH")?;
    let machine = format!("--cfg=bpf_target_arch=\"{machine}\"");
    // The separator that cargo documents for CARGO_ENCODED_RUSTFLAGS.
    Ok([machine.as_str(), "-Cdebuginfo=2", "-Clink-arg=--btf"].join("\x1f"))
}

/// `PATH`, then the directory where `cargo install` leaves programs: not everyone has it in `PATH`.
fn search_path() -> Result<std::ffi::OsString, String> {
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    let path = env::var_os("PATH").unwrap_or_default();
    let installed = cargo_home.map(|home| home.join("bin"));
    env::join_paths(env::split_paths(&path).chain(installed)).map_err(|error| error.to_string())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}
