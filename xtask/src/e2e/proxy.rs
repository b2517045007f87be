//! kube-proxy on one node, in the mode and with the iptables that a test asks for.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use nix::sys::signal::Signal;

use super::binaries::Binaries;
use super::network::Node;
use crate::lab::agent::http_get;
use crate::lab::daemon::Daemon;
use crate::lab::network::CLUSTER_CIDRS;

/// The first sync takes a second; a machine that compiles at the same time needs far longer.
const READY_LIMIT: Duration = Duration::from_mins(1);
/// Of the node's own loopback.
const HEALTH: &str = "127.0.0.1:10256";
/// Those that kube-proxy runs.
const TOOLS: [&str; 3] = ["", "-save", "-restore"];

/// What writes a node's rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dataplane {
    /// nftables.
    Nftables,
    /// iptables over the `nf_tables` kernel interface.
    IptablesNft,
    /// iptables over its own kernel interface.
    IptablesLegacy,
}

impl Dataplane {
    /// All, in the order of the command line's help.
    pub const ALL: [Self; 3] = [Self::Nftables, Self::IptablesNft, Self::IptablesLegacy];

    /// The name as in command lines.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::IptablesNft => "iptables-nft",
            Self::IptablesLegacy => "iptables-legacy",
        }
    }

    /// kube-proxy's `--proxy-mode`, and which iptables come first in its search path.
    fn mode(self) -> (&'static str, &'static str) {
        match self {
            // Only to clean up after other modes.
            Self::Nftables => ("nftables", "nft"),
            Self::IptablesNft => ("iptables", "nft"),
            Self::IptablesLegacy => ("iptables", "legacy"),
        }
    }
}

/// Starts it on a node that is registered, and waits until it has written its first rules.
pub(crate) fn start(
    binaries: &Binaries,
    node: &Node,
    dataplane: Dataplane,
    kubeconfig: &Path,
    directory: &Path,
) -> Result<Daemon> {
    let (mode, backend) = dataplane.mode();
    let name = format!("kube-proxy-{}", node.name);
    let tools = directory.join(format!("{name}.tools"));
    link_tools(&tools, backend)?;
    let mut command = Daemon::command(&binaries.program("kube-proxy"), Signal::SIGKILL);
    command.env("PATH", with_first(&tools)?);
    // Its own: nobody outside waits for it.
    command.env("XTABLES_LOCKFILE", directory.join(format!("{name}.lock")));
    command.arg("--kubeconfig").arg(kubeconfig).args(["--hostname-override", node.name]);
    command.args(["--proxy-mode", mode, "--cluster-cidr", &CLUSTER_CIDRS.join(",")]);
    command.args(["--healthz-bind-address", HEALTH]);
    // The machine's limits stay as they are.
    command.args(["--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0"]);
    command.arg("--conntrack-tcp-timeout-close-wait=0");
    let log = directory.join(format!("{name}.log"));
    let mut proxy = Daemon::start(&name, &node.namespace, command, log)?;
    proxy.wait_until(READY_LIMIT, || {
        let (status, body) = http_get(&node.namespace, &format!("http://{HEALTH}/healthz"))?;
        ensure!(status == 200, "{status}: {}", body.trim());
        Ok(())
    })?;
    Ok(proxy)
}

/// A directory in which `iptables` is the one of this backend.
fn link_tools(directory: &Path, backend: &str) -> Result<()> {
    fs::create_dir(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    for family in ["iptables", "ip6tables"] {
        for tool in TOOLS {
            let program = find(&format!("{family}-{backend}{tool}"))?;
            symlink(program, directory.join(format!("{family}{tool}")))?;
        }
    }
    Ok(())
}

fn find(program: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut files = env::split_paths(&path).map(|directory| directory.join(program));
    files.find(|file| file.is_file()).with_context(|| format!("{program} is not in PATH"))
}

fn with_first(directory: &Path) -> Result<std::ffi::OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    let others = env::split_paths(&path);
    Ok(env::join_paths(std::iter::once(directory.to_owned()).chain(others))?)
}
