//! Boots another kernel in an emulator and runs one program there.
//!
//! For what this machine's kernel lacks: modules (IPVS), and older versions. Needs neither root nor
//! virtualisation: everything is emulated, slowly, so what runs in a guest has to be light. In the
//! order of a run: [`kernels`] fetches a Debian kernel once, [`image`] packs it a root file system
//! from this machine's programs, [`emulator`] boots both and returns the program's exit code.
//! x86-64 only, as are the kernels.

mod apt;
pub mod emulator;
pub mod image;
pub mod kernels;
mod modules;
mod programs;
pub(crate) mod work;

use std::path::PathBuf;

use anyhow::Result;

use crate::step;
use kernels::{Kernel, Release};
use work::Work;

/// Everything that kube-proxy's modes and Debian's tools for them ask a kernel for, and the
/// devices that tests build networks of. Their dependencies come along.
pub const MODULES: &[&str] = &[
    "nf_conntrack",
    "nf_nat",
    "nf_tables",
    "nft_chain_nat",
    "nft_compat",
    "nft_ct",
    "nft_fib",
    "nft_fib_inet",
    "nft_fib_ipv4",
    "nft_fib_ipv6",
    "nft_hash",
    "nft_masq",
    "nft_nat",
    "nft_numgen",
    "nft_reject",
    "nft_reject_inet",
    "nft_reject_ipv4",
    "nft_reject_ipv6",
    "x_tables",
    "ip_tables",
    "ip6_tables",
    "iptable_filter",
    "ip6table_filter",
    "iptable_nat",
    "ip6table_nat",
    "xt_addrtype",
    "xt_comment",
    "xt_conntrack",
    "xt_mark",
    "xt_MASQUERADE",
    "xt_nat",
    "xt_recent",
    "xt_statistic",
    "xt_tcpudp",
    "ip_vs",
    "ip_vs_rr",
    "ip_vs_sh",
    "ip_vs_wrr",
    "bridge",
    "dummy",
    "veth",
];

/// The tools that write the rules under test.
pub const PROGRAMS: &[&str] = &[
    "ip",
    "ip6tables-legacy",
    "ip6tables-legacy-restore",
    "ip6tables-nft",
    "ip6tables-nft-restore",
    "iptables-legacy",
    "iptables-legacy-restore",
    "iptables-nft",
    "iptables-nft-restore",
    "ipvsadm",
    "nft",
];

/// One program to run under another kernel.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Which kernel.
    pub release: Release,
    /// Loaded before the program starts, with what they depend on; see [`MODULES`].
    pub modules: Vec<String>,
    /// This machine's programs that the guest needs, by name; see [`PROGRAMS`].
    pub programs: Vec<String>,
    /// The program to run: any of this machine's, its shared libraries come along.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Where the image is built; whatever is there is removed.
    pub directory: PathBuf,
}

impl Guest {
    /// Boots, runs the program, shows what it prints, and returns its exit code.
    ///
    /// # Errors
    /// No kernel, no image, or a guest that ended without an exit code.
    pub fn run(&self) -> Result<u8> {
        let kernel = Kernel::get(self.release)?;
        let work = Work::begin(&self.directory)?;
        let started = step::now();
        let image = image::build(self, &kernel, work.path())?;
        let size_mb = image.metadata()?.len() / 1_000_000;
        step::say(&format!(
            "guest: Linux {}, image of {size_mb} MB built in {:.1} s",
            kernel.version,
            started.elapsed().as_secs_f64()
        ));
        emulator::run(&kernel.image, &image, work.path())
    }
}
