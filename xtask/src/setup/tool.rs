//! The tools: who needs them, how to tell that they are there, where they come from.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::Task;

/// Where Debian's `libstd-rust-web-dev-bpf` puts a `core` compiled for BPF.
pub(crate) const DEBIAN_BPF_CORE: &str = "/usr/lib/rustlib/bpfel-unknown-none";
/// The compiler it was compiled by.
pub(crate) const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
/// Clippy of the same release as [`DEBIAN_RUSTC`]; only that one can read its `core`.
pub(crate) const DEBIAN_CLIPPY: &str = "/usr/bin/cargo-clippy";
/// The LLVM of Debian's rustc 1.96; bpf-linker must read what that compiler writes.
pub(super) const LLVM_PREFIX: &str = "/usr/lib/llvm-22";

/// Something a task runs.
pub(super) struct Tool {
    /// What a person calls it.
    pub(super) name: &'static str,
    pub(super) proof: Proof,
    pub(super) source: Source,
    /// Where to get it on a system that is not Debian 12.
    pub(super) elsewhere: &'static str,
    pub(super) tasks: &'static [Task],
}

/// How to tell that a tool is there, in less than a tenth of a second.
pub(super) enum Proof {
    /// All of these are in the search path.
    Programs(&'static [&'static str]),
    /// This program's `--version` begins with these words.
    Version(&'static str, &'static str),
    /// Debian's compiler with a `core` for BPF, or a rustup nightly with `rust-src`.
    BpfCompiler,
    /// Clippy for whichever of the two compiles the kernel programs.
    BpfClippy,
    /// The LLVM to build bpf-linker with, needed only while bpf-linker itself is missing.
    Llvm,
}

/// Where a tool comes from on Debian 12.
pub(super) enum Source {
    /// Debian packages.
    Packages(&'static [&'static str]),
    /// The Rust crate registry: name, version, further arguments.
    Crate(&'static str, &'static str, &'static [&'static str]),
    /// One program out of a Debian package that would also install a running service.
    OneProgram { package: &'static str, program: &'static str },
}

const BUILDING: &[Task] =
    &[Task::Build, Task::Lint, Task::Network, Task::Kubernetes, Task::Guest, Task::Test];
const RUNNING: &[Task] = &[Task::Network, Task::Kubernetes, Task::Guest, Task::Test];
const EMULATING: &[Task] = &[Task::Guest, Task::Test];

/// In the order in which they are installed: bpf-linker needs LLVM.
pub(super) static TOOLS: &[Tool] = &[
    Tool {
        name: "a compiler for BPF",
        proof: Proof::BpfCompiler,
        source: Source::Packages(&["rustc-web", "libstd-rust-web-dev-bpf"]),
        elsewhere: "rustup toolchain install nightly --component rust-src,clippy",
        tasks: BUILDING,
    },
    Tool {
        name: "LLVM 22",
        proof: Proof::Llvm,
        source: Source::Packages(&["llvm-22-dev", "libclang-22-dev"]),
        elsewhere: "the LLVM 22 development files, to build bpf-linker with",
        tasks: BUILDING,
    },
    Tool {
        name: "bpf-linker 0.13",
        proof: Proof::Version("bpf-linker", "bpf-linker 0.13."),
        source: Source::Crate(
            "bpf-linker",
            "0.13.0",
            &["--no-default-features", "--features", "llvm-22"],
        ),
        elsewhere: "cargo install bpf-linker@0.13.0 --locked --no-default-features --features \
                    llvm-22, with LLVM_PREFIX set to where LLVM 22 is",
        tasks: BUILDING,
    },
    Tool {
        name: "nft",
        proof: Proof::Programs(&["nft"]),
        source: Source::Packages(&["nftables"]),
        elsewhere: "nftables 1.0.6 or newer",
        tasks: RUNNING,
    },
    Tool {
        name: "iptables, both backends",
        proof: Proof::Programs(&["iptables-nft-restore", "iptables-legacy-restore"]),
        source: Source::Packages(&["iptables"]),
        elsewhere: "iptables 1.8 with its nft and its legacy programs",
        tasks: RUNNING,
    },
    Tool {
        name: "conntrack",
        proof: Proof::Programs(&["conntrack"]),
        source: Source::Packages(&["conntrack"]),
        elsewhere: "conntrack-tools",
        tasks: RUNNING,
    },
    Tool {
        name: "ip",
        proof: Proof::Programs(&["ip"]),
        source: Source::Packages(&["iproute2"]),
        elsewhere: "iproute2",
        tasks: RUNNING,
    },
    Tool {
        name: "setpriv",
        proof: Proof::Programs(&["setpriv"]),
        source: Source::Packages(&["util-linux"]),
        elsewhere: "setpriv of util-linux 2.33 or newer",
        tasks: RUNNING,
    },
    Tool {
        name: "Go",
        proof: Proof::Programs(&["go"]),
        // Too old for Kubernetes, and able to fetch one that is not.
        source: Source::Packages(&["golang-go"]),
        elsewhere: "Go 1.19 or newer; or give `cargo xtask e2e --binaries DIR` Kubernetes' \
                    programs that you have",
        tasks: &[Task::Kubernetes],
    },
    Tool {
        name: "ipvsadm",
        proof: Proof::Programs(&["ipvsadm"]),
        source: Source::Packages(&["ipvsadm"]),
        elsewhere: "ipvsadm 1.31 or newer",
        tasks: EMULATING,
    },
    Tool {
        name: "qemu",
        proof: Proof::Programs(&["qemu-system-x86_64"]),
        source: Source::Packages(&["qemu-system-x86"]),
        elsewhere: "qemu-system-x86_64 7.2 or newer",
        tasks: EMULATING,
    },
    Tool {
        name: "busybox",
        proof: Proof::Programs(&["busybox"]),
        source: Source::Packages(&["busybox-static"]),
        elsewhere: "busybox",
        tasks: EMULATING,
    },
    Tool {
        name: "cpio, xz and depmod",
        proof: Proof::Programs(&["cpio", "xz", "depmod"]),
        source: Source::Packages(&["cpio", "xz-utils", "kmod"]),
        elsewhere: "GNU cpio, xz, and depmod of kmod",
        tasks: EMULATING,
    },
    Tool {
        name: "promtool",
        proof: Proof::Programs(&["promtool"]),
        source: Source::OneProgram { package: "prometheus", program: "usr/bin/promtool" },
        elsewhere: "promtool of Prometheus 2.42 or newer, in PATH",
        tasks: &[Task::Lint, Task::Test],
    },
    Tool {
        name: "clippy for BPF",
        proof: Proof::BpfClippy,
        source: Source::Packages(&["rust-web-clippy"]),
        elsewhere: "rustup component add clippy --toolchain nightly",
        tasks: &[Task::Lint],
    },
    Tool {
        name: "cargo-deny",
        proof: Proof::Programs(&["cargo-deny"]),
        source: Source::Crate("cargo-deny", "0.20.2", &[]),
        elsewhere: "cargo install cargo-deny@0.20.2 --locked",
        tasks: &[Task::Lint],
    },
];

impl Tool {
    /// Looks for it on this machine.
    pub(super) fn is_present(&self) -> bool {
        match self.proof {
            Proof::Programs(programs) => programs.iter().all(|program| find(program).is_some()),
            Proof::Version(program, words) => has_version(program, words),
            Proof::BpfCompiler => has_debian_compiler() || nightly().is_some(),
            Proof::BpfClippy => {
                let nightly_clippy =
                    || nightly().is_some_and(|at| at.join("bin/cargo-clippy").exists());
                if has_debian_compiler() {
                    Path::new(DEBIAN_CLIPPY).exists()
                } else {
                    nightly_clippy()
                }
            }
            Proof::Llvm => {
                Path::new(LLVM_PREFIX).join("bin/llvm-config").exists()
                    || has_version("bpf-linker", "bpf-linker 0.13.")
            }
        }
    }

    /// The command that installs it on Debian 12.
    pub(super) fn debian(&self) -> String {
        match self.source {
            Source::Packages(packages) => {
                format!("apt-get install --no-install-recommends {}", packages.join(" "))
            }
            Source::Crate(..) => self.elsewhere.replace("where LLVM 22 is", LLVM_PREFIX),
            Source::OneProgram { package, .. } => {
                format!("apt-get install --no-install-recommends {package}")
            }
        }
    }
}

/// Whether the kernel programs are compiled by Debian's compiler; `observer/build.rs` chooses
/// alike.
pub(crate) fn has_debian_compiler() -> bool {
    Path::new(DEBIAN_BPF_CORE).exists() && Path::new(DEBIAN_RUSTC).exists()
}

/// The rustup nightly, if it can build `core`. Never installs one.
fn nightly() -> Option<PathBuf> {
    let rustc = Command::new("rustup")
        .args(["which", "--toolchain", "nightly", "rustc"])
        .env("RUSTUP_AUTO_INSTALL", "0")
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let toolchain = PathBuf::from(String::from_utf8(rustc.stdout).ok()?.trim());
    let toolchain = toolchain.ancestors().nth(2)?;
    toolchain.join("lib/rustlib/src/rust/library/core").exists().then(|| toolchain.to_owned())
}

fn has_version(program: &str, words: &str) -> bool {
    let Some(program) = find(program) else { return false };
    let output = Command::new(program).arg("--version").stderr(Stdio::null()).output();
    output.is_ok_and(|output| output.stdout.starts_with(words.as_bytes()))
}

/// A program in `PATH` or where `cargo install` leaves programs.
fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(cargo_home().map(|home| home.join("bin")))
        .map(|directory| directory.join(program))
        .find(|file| file.is_file())
}

fn cargo_home() -> Option<PathBuf> {
    let home = || Some(PathBuf::from(env::var_os("HOME")?).join(".cargo"));
    env::var_os("CARGO_HOME").map(PathBuf::from).or_else(home)
}
