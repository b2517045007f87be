//! kube-proxy's rules as text for the real tools: from what a family's Services were to what they
//! are now. Pure: `proxy` runs the tools.
//!
//! The layouts are those that kube-proxy 1.35 and 1.36 were recorded to write. Only the hashes in
//! chain names differ (the real ones are SHA-256), and only ClusterIP Services over TCP exist.

mod iptables;
mod nftables;

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use clap::ValueEnum;

use super::network::Family;

/// What writes the node's rules, and in which layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dataplane {
    /// nftables as kube-proxy 1.36 lays it out: one address map per Service.
    Nftables,
    /// nftables as kube-proxy 1.35 does: one chain per endpoint.
    #[value(name = "nftables-1.35")]
    Nftables135,
    /// iptables over the `nf_tables` kernel interface.
    IptablesNft,
    /// iptables over its own kernel interface.
    IptablesLegacy,
}

impl Dataplane {
    /// The name as in command lines.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Nftables135 => "nftables-1.35",
            Self::IptablesNft => "iptables-nft",
            Self::IptablesLegacy => "iptables-legacy",
        }
    }

    /// The tool that takes this layout's text on stdin.
    pub(crate) fn tool(self, family: Family) -> Command {
        let (program, arguments): (_, &[&str]) = match (self, family) {
            (Self::Nftables | Self::Nftables135, _) => ("nft", &["-f", "-"]),
            (Self::IptablesNft, Family::V4) => ("iptables-nft-restore", RESTORE),
            (Self::IptablesNft, Family::V6) => ("ip6tables-nft-restore", RESTORE),
            (Self::IptablesLegacy, Family::V4) => ("iptables-legacy-restore", RESTORE),
            (Self::IptablesLegacy, Family::V6) => ("ip6tables-legacy-restore", RESTORE),
        };
        let mut command = Command::new(program);
        command.args(arguments);
        command
    }

    /// Whether each change makes the kernel send a notice that names the tool's process.
    pub(crate) fn announces_commits(self) -> bool {
        self != Self::IptablesLegacy
    }

    /// The rules that do not depend on any Service.
    pub(crate) fn base(self, family: Family) -> String {
        match self {
            Self::Nftables | Self::Nftables135 => nftables::base(self, family),
            Self::IptablesNft | Self::IptablesLegacy => iptables::base(family),
        }
    }

    /// The text of one sync.
    pub(crate) fn sync(self, family: Family, sync: &Sync) -> String {
        match self {
            Self::Nftables => nftables::sync(family, sync),
            Self::Nftables135 => nftables::sync_135(family, sync),
            Self::IptablesNft | Self::IptablesLegacy => iptables::sync(family, sync),
        }
    }

    /// The chains that a sync empties and a later one deletes.
    pub(crate) fn stale_chains(self, sync: &Sync) -> BTreeSet<String> {
        if self == Self::Nftables135 { nftables::stale_chains(sync) } else { BTreeSet::new() }
    }

    /// The text that deletes such chains.
    pub(crate) fn delete_chains(family: Family, chains: &BTreeSet<String>) -> String {
        nftables::delete_chains(family, chains)
    }
}

const RESTORE: &[&str] = &["-w", "5", "--noflush", "--counters"];

/// One port of a Service as one family's rules know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServicePort {
    pub(crate) namespace: String,
    pub(crate) service: String,
    /// The port's name.
    pub(crate) port_name: String,
    /// The cluster address.
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
    /// Where new connections may be sent, sorted.
    pub(crate) backends: Vec<SocketAddr>,
}

impl ServicePort {
    /// `namespace/name:port`, as kube-proxy's comments say it.
    fn name(&self) -> String {
        format!("{}/{}:{}", self.namespace, self.service, self.port_name)
    }
}

/// A change from one state of a family's Services to another.
#[derive(Debug)]
pub(crate) struct Sync {
    pub(crate) before: Vec<ServicePort>,
    pub(crate) after: Vec<ServicePort>,
    /// The Services whose slices changed: they are rewritten even when nothing differs.
    pub(crate) touched: BTreeSet<String>,
}

impl Sync {
    /// The touched Services: what they were, if they were, and what they are.
    fn changes(&self) -> impl Iterator<Item = (Option<&ServicePort>, &ServicePort)> {
        self.after
            .iter()
            .filter(|port| self.touched.contains(&port.service))
            .map(|port| (self.before.iter().find(|before| before.name() == port.name()), port))
    }
}

fn usable(port: Option<&ServicePort>) -> &[SocketAddr] {
    port.map_or(&[], |port| &port.backends)
}

fn line(text: &mut String, line: &str) {
    text.push_str(line);
    text.push('\n');
}

/// Letters and digits as kube-proxy's chain names have them: the same for the same text.
fn hash(text: &str, length: u8) -> String {
    const BASE32: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let letter = |position: u8| {
        let mut hasher = DefaultHasher::new();
        (text, position).hash(&mut hasher);
        char::from(BASE32[usize::from(hasher.finish().to_be_bytes()[0] & 31)])
    };
    (0..length).map(letter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn web(backends: &[u8]) -> ServicePort {
        ServicePort {
            namespace: "default".to_owned(),
            service: "web".to_owned(),
            port_name: "http".to_owned(),
            address: Family::V4.service_address(10),
            port: 80,
            backends: backends.iter().map(|last| ([10, 244, 0, *last], 8080).into()).collect(),
        }
    }

    pub(super) fn change(before: &[u8], after: &[u8]) -> Sync {
        Sync {
            before: vec![web(before)],
            after: vec![web(after)],
            touched: BTreeSet::from(["web".to_owned()]),
        }
    }

    #[test]
    fn different_endpoints_get_different_chains() {
        let hashes: BTreeSet<String> =
            (0..250).map(|n| hash(&format!("10.244.0.{n}"), 8)).collect();
        assert_eq!(hashes.len(), 250);
    }

    #[test]
    fn a_removed_backend_is_nowhere_in_the_new_rules_but_in_their_removal() {
        for dataplane in [Dataplane::Nftables, Dataplane::IptablesNft] {
            let text = dataplane.sync(Family::V4, &change(&[2, 3], &[3]));
            let named = text.lines().filter(|line| line.contains("10.244.0.2"));
            assert!(
                named.clone().all(|line| line.starts_with("delete element")),
                "{}",
                named.collect::<String>()
            );
            assert!(text.contains("10.244.0.3"), "{text}");
        }
    }

    #[test]
    fn the_last_backend_gone_rejects_the_service() {
        let text = Dataplane::Nftables.sync(Family::V4, &change(&[2], &[]));
        assert!(text.contains("add element ip kube-proxy no-endpoint-services"), "{text}");
        assert!(text.contains("delete element ip kube-proxy service-ips"), "{text}");
        let text = Dataplane::IptablesLegacy.sync(Family::V4, &change(&[2], &[]));
        assert!(
            text.contains("has no endpoints\" -m tcp -p tcp -d 10.96.0.10 --dport 80 -j REJECT")
        );
    }

    #[test]
    fn an_emptied_chain_of_the_old_layout_stays_until_it_is_deleted() {
        let sync = change(&[2, 3], &[3]);
        let stale = Dataplane::Nftables135.stale_chains(&sync);
        assert_eq!(stale.len(), 1);
        let text = Dataplane::Nftables135.sync(Family::V4, &sync);
        let chain = stale.iter().next().map_or("", String::as_str);
        assert!(text.contains(&format!("flush chain ip kube-proxy {chain}\n")), "{text}");
        assert!(!text.contains("delete chain"), "{text}");
    }
}
