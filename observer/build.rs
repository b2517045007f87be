//! Compiles the kernel programs and leaves them in `OUT_DIR/observer-programs`.

use std::path::Path;

use aya_build::{Package, Toolchain};

/// Where Debian's `libstd-rust-web-dev-bpf` puts a `core` compiled for BPF.
const DEBIAN_BPF_CORE: &str = "/usr/lib/rustlib/bpfel-unknown-none";

fn main() -> anyhow::Result<()> {
    let toolchain = if Path::new(DEBIAN_BPF_CORE).exists() {
        Toolchain::Custom("/usr")
    } else {
        Toolchain::Nightly
    };
    let root_dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../observer-ebpf");
    aya_build::build_ebpf(
        [Package { name: "observer-ebpf", root_dir, ..Package::default() }],
        toolchain,
    )
}
