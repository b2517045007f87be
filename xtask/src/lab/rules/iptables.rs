//! kube-proxy's iptables mode: KUBE-SERVICES, KUBE-SVC-* and KUBE-SEP-* chains, as `iptables-restore
//! --noflush` takes them. Both backends read the same text.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::{ServicePort, Sync, hash, line, usable};
use crate::lab::network::Family;

/// The chains of the filter table that every sync writes anew.
const FILTER_CHAINS: [&str; 6] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-FORWARD",
    "KUBE-NODEPORTS",
    "KUBE-PROXY-FIREWALL",
    "KUBE-FIREWALL",
];

/// The same for the nat table.
const NAT_CHAINS: [&str; 4] =
    ["KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ"];

const FILTER_JUMPS: &str = r#"-A INPUT -j KUBE-FIREWALL
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
"#;

const NAT_JUMPS: &str = r#"-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
"#;

/// As kube-proxy writes them where the kernel has no nfacct object to count with.
const FILTER_RULES: &str = r#"-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x00004000/0x00004000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
"#;

const LOCALNET_RULE: &str = r#"-A KUBE-FIREWALL -m comment --comment "block incoming localnet connections" -d 127.0.0.0/8 ! -s 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
"#;

const NAT_RULES: &str = r#"-A KUBE-POSTROUTING -m mark ! --mark 0x00004000/0x00004000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x00004000
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --or-mark 0x00004000
"#;

const NODEPORT_RULE: &str = r#"-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
"#;

pub(super) fn base(family: Family) -> String {
    let canary = ":KUBE-PROXY-CANARY - [0:0]\n";
    let filter = chain_lines(&FILTER_CHAINS);
    let nat = chain_lines(&NAT_CHAINS);
    format!(
        "*mangle\n{canary}COMMIT\n*filter\n{canary}{filter}{FILTER_JUMPS}COMMIT\n\
         *nat\n{canary}{nat}{NAT_JUMPS}COMMIT\n{}",
        sync(family, &Sync { before: vec![], after: vec![], touched: BTreeSet::new() })
    )
}

pub(super) fn sync(family: Family, sync: &Sync) -> String {
    let mut chains = String::new();
    let mut rules = String::new();
    let mut deletions = String::new();
    for port in &sync.after {
        let touched = sync.touched.contains(&port.service);
        if !port.backends.is_empty() {
            rules += &portal(port);
        }
        if touched && !port.backends.is_empty() {
            chains += &chain_lines(&[&service_chain(port)]);
            rules += &service_rules(family, port);
        }
        for backend in port.backends.iter().filter(|_| touched) {
            chains += &chain_lines(&[&endpoint_chain(port, *backend)]);
            rules += &endpoint_rules(port, *backend);
        }
    }
    for chain in dead_chains(sync) {
        chains += &chain_lines(&[&chain]);
        line(&mut deletions, &format!("-X {chain}"));
    }
    let localnet = if family == Family::V4 { LOCALNET_RULE } else { "" };
    let rejects: String =
        sync.after.iter().filter(|port| port.backends.is_empty()).map(reject).collect();
    let (filter, nat) = (chain_lines(&FILTER_CHAINS), chain_lines(&NAT_CHAINS));
    format!(
        "*filter\n{filter}{rejects}{localnet}{FILTER_RULES}COMMIT\n\
         *nat\n{nat}{chains}{NAT_RULES}{rules}{deletions}{NODEPORT_RULE}COMMIT\n"
    )
}

fn dead_chains(sync: &Sync) -> Vec<String> {
    let mut dead = Vec::new();
    for (before, after) in sync.changes() {
        let removed = usable(before).iter().filter(|backend| !after.backends.contains(backend));
        dead.extend(removed.map(|backend| endpoint_chain(after, *backend)));
        if after.backends.is_empty() && !usable(before).is_empty() {
            dead.push(service_chain(after));
        }
    }
    dead
}

fn chain_lines(chains: &[&str]) -> String {
    let mut text = String::new();
    for chain in chains {
        line(&mut text, &format!(":{chain} - [0:0]"));
    }
    text
}

fn destination(port: &ServicePort) -> String {
    format!("-m tcp -p tcp -d {} --dport {}", port.address, port.port)
}

fn reject(port: &ServicePort) -> String {
    let (name, destination) = (port.name(), destination(port));
    format!(
        "-A KUBE-SERVICES -m comment --comment \"{name} has no endpoints\" {destination} -j REJECT\n"
    )
}

fn portal(port: &ServicePort) -> String {
    let (name, destination, chain) = (port.name(), destination(port), service_chain(port));
    format!(
        "-A KUBE-SERVICES -m comment --comment \"{name} cluster IP\" {destination} -j {chain}\n"
    )
}

fn service_rules(family: Family, port: &ServicePort) -> String {
    let (name, destination, chain) = (port.name(), destination(port), service_chain(port));
    let cluster = family.cluster_cidr();
    let mut rules = format!(
        "-A {chain} -m comment --comment \"{name} cluster IP\" {destination} ! -s {cluster} -j KUBE-MARK-MASQ\n"
    );
    for (chosen, backend) in port.backends.iter().enumerate() {
        let remaining = u32::try_from(port.backends.len() - chosen).unwrap_or(u32::MAX);
        let endpoint = endpoint_chain(port, *backend);
        let chance = if remaining == 1 {
            String::new()
        } else {
            format!("-m statistic --mode random --probability {:.10} ", 1.0 / f64::from(remaining))
        };
        let comment = format!("\"{name} -> {backend}\"");
        line(
            &mut rules,
            &format!("-A {chain} -m comment --comment {comment} {chance}-j {endpoint}"),
        );
    }
    rules
}

fn endpoint_rules(port: &ServicePort, backend: SocketAddr) -> String {
    let (name, chain, source) = (port.name(), endpoint_chain(port, backend), backend.ip());
    format!(
        "-A {chain} -m comment --comment {name} -s {source} -j KUBE-MARK-MASQ\n\
         -A {chain} -m comment --comment {name} -m tcp -p tcp -j DNAT --to-destination {backend}\n"
    )
}

fn service_chain(port: &ServicePort) -> String {
    format!("KUBE-SVC-{}", hash(&port.name(), 16))
}

fn endpoint_chain(port: &ServicePort, backend: SocketAddr) -> String {
    format!("KUBE-SEP-{}", hash(&format!("{}{backend}", port.name()), 16))
}

#[cfg(test)]
mod tests {
    use super::super::tests::change;
    use super::*;

    #[test]
    fn each_backend_gets_an_equal_share() {
        let text = sync(Family::V4, &change(&[], &[2, 3, 4]));
        let shares: Vec<&str> = text
            .lines()
            .filter(|line| line.contains(" -> "))
            .map(|line| line.split("--probability ").nth(1).map_or("rest", |rest| &rest[..12]))
            .collect();
        assert_eq!(shares, ["0.3333333333", "0.5000000000", "rest"]);
    }

    #[test]
    fn the_chain_of_a_removed_backend_is_deleted_in_the_same_restore() {
        let text = sync(Family::V4, &change(&[2, 3], &[3]));
        assert_eq!(text.lines().filter(|line| line.starts_with("-X KUBE-SEP-")).count(), 1);
    }
}
