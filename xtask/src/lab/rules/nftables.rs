//! kube-proxy's nftables mode: table `kube-proxy`, verdict maps from Service address to chain.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::{Dataplane, ServicePort, Sync, hash, line, usable};
use crate::lab::network::Family;

const MASQUERADE: &str = "0x00004000";

/// `ip` or `ip6`: the table family, and the keyword of address matches.
fn ip(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

pub(super) fn base(dataplane: Dataplane, family: Family) -> String {
    let ip = ip(family);
    let address = if family == Family::V4 { "ipv4_addr" } else { "ipv6_addr" };
    let cluster = family.cluster_cidr();
    let services = family.service_cidr();
    let masquerading = if dataplane == Dataplane::Nftables {
        format!(
            "set hairpin-connections {{ type {address} . {address} . inet_proto . inet_service; comment \"service hairpin connections\"; }}
chain masquerading {{
 meta mark & {MASQUERADE} != 0x00000000 meta mark set meta mark ^ {MASQUERADE} masquerade fully-random
 ct status dnat {ip} saddr . {ip} daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random
}}
chain services {{
 {ip} daddr @cluster-ips {ip} saddr != {cluster} meta mark set meta mark | {MASQUERADE} comment \"masquerade clusterIP traffic from outside cluster\"
}}"
        )
    } else {
        format!(
            "chain mark-for-masquerade {{ meta mark set meta mark | {MASQUERADE}; }}
chain masquerading {{
 meta mark & {MASQUERADE} == 0x00000000 return
 meta mark set meta mark ^ {MASQUERADE}
 masquerade fully-random
}}"
        )
    };
    format!(
        "table {ip} kube-proxy {{
comment \"rules for kube-proxy\"
set cluster-ips {{ type {address}; comment \"Active ClusterIPs\"; }}
set nodeport-ips {{ type {address}; comment \"IPs that accept NodePort traffic\"; }}
map no-endpoint-services {{ type {address} . inet_proto . inet_service : verdict; comment \"vmap to drop or reject packets to services with no endpoints\"; }}
map no-endpoint-nodeports {{ type inet_proto . inet_service : verdict; comment \"vmap to drop or reject packets to service nodeports with no endpoints\"; }}
map firewall-ips {{ type {address} . inet_proto . inet_service : verdict; comment \"destinations that are subject to LoadBalancerSourceRanges\"; }}
map service-ips {{ type {address} . inet_proto . inet_service : verdict; comment \"ClusterIP, ExternalIP and LoadBalancer IP traffic\"; }}
map service-nodeports {{ type inet_proto . inet_service : verdict; comment \"NodePort traffic\"; }}
{masquerading}
chain reject-chain {{ comment \"helper for @no-endpoint-services / @no-endpoint-nodeports\"; reject; }}
chain nodeport-endpoints-check {{ {ip} daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }}
chain service-endpoints-check {{ {ip} daddr . meta l4proto . th dport vmap @no-endpoint-services; }}
chain firewall-check {{ {ip} daddr . meta l4proto . th dport vmap @firewall-ips; }}
chain services {{
 {ip} daddr . meta l4proto . th dport vmap @service-ips
 {ip} daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
}}
chain cluster-ips-check {{
 {ip} daddr @cluster-ips reject comment \"Reject traffic to invalid ports of ClusterIPs\"
 {ip} daddr {services} drop comment \"Drop traffic to unallocated ClusterIPs\"
}}
chain filter-prerouting-pre-dnat {{ type filter hook prerouting priority dstnat - 10; policy accept; ct state new jump firewall-check; }}
chain filter-output-pre-dnat {{ type filter hook output priority -110; policy accept; ct state new jump firewall-check; }}
chain filter-input {{ type filter hook input priority filter; policy accept; ct state new jump nodeport-endpoints-check; ct state new jump service-endpoints-check; }}
chain filter-forward {{ type filter hook forward priority filter; policy accept; ct state new jump service-endpoints-check; ct state new jump cluster-ips-check; }}
chain filter-output {{ type filter hook output priority filter; policy accept; ct state new jump service-endpoints-check; ct state new jump cluster-ips-check; }}
chain nat-prerouting {{ type nat hook prerouting priority dstnat; policy accept; jump services; }}
chain nat-output {{ type nat hook output priority -100; policy accept; jump services; }}
chain nat-postrouting {{ type nat hook postrouting priority srcnat; policy accept; jump masquerading; }}
}}
"
    )
}

/// kube-proxy 1.36: the service chain picks from an anonymous address map.
pub(super) fn sync(family: Family, sync: &Sync) -> String {
    let ip = ip(family);
    let mut text = String::new();
    for (before, after) in sync.changes() {
        let chain = service_chain(after);
        switch(&mut text, family, before, after);
        if !after.backends.is_empty() {
            let choices =
                choices(after, |backend| format!("{} . {}", backend.ip(), backend.port()));
            let count = after.backends.len();
            line(&mut text, &format!("flush chain {ip} kube-proxy {chain}"));
            line(
                &mut text,
                &format!(
                    "add rule {ip} kube-proxy {chain} meta l4proto tcp dnat {ip} to numgen random mod {count} map {{ {choices} }}"
                ),
            );
        }
    }
    let (before, after) = (hairpins(&sync.before), hairpins(&sync.after));
    for (verb, elements) in [("add", &after - &before), ("delete", &before - &after)] {
        for element in elements {
            line(
                &mut text,
                &format!("{verb} element {ip} kube-proxy hairpin-connections {{ {element} }}"),
            );
        }
    }
    text
}

/// kube-proxy 1.35: the service chain goes to one chain per endpoint; the chains of removed
/// endpoints are emptied now and deleted by a later sync.
pub(super) fn sync_135(family: Family, sync: &Sync) -> String {
    let ip = ip(family);
    let mut text = String::new();
    for (before, after) in sync.changes() {
        let chain = service_chain(after);
        switch(&mut text, family, before, after);
        for backend in &after.backends {
            let endpoint = endpoint_chain(after, *backend);
            line(&mut text, &format!("add chain {ip} kube-proxy {endpoint}"));
        }
        for backend in after.backends.iter().chain(usable(before)) {
            let endpoint = endpoint_chain(after, *backend);
            line(&mut text, &format!("flush chain {ip} kube-proxy {endpoint}"));
        }
        if after.backends.is_empty() {
            continue;
        }
        line(&mut text, &format!("flush chain {ip} kube-proxy {chain}"));
        let (address, cluster) = (after.address, family.cluster_cidr());
        line(
            &mut text,
            &format!(
                "add rule {ip} kube-proxy {chain} {ip} daddr {address} {ip} saddr != {cluster} jump mark-for-masquerade"
            ),
        );
        let choices = choices(after, |backend| format!("goto {}", endpoint_chain(after, backend)));
        let count = after.backends.len();
        line(
            &mut text,
            &format!(
                "add rule {ip} kube-proxy {chain} numgen random mod {count} vmap {{ {choices} }}"
            ),
        );
        for backend in &after.backends {
            let endpoint = endpoint_chain(after, *backend);
            let source = backend.ip();
            line(
                &mut text,
                &format!(
                    "add rule {ip} kube-proxy {endpoint} {ip} saddr {source} jump mark-for-masquerade"
                ),
            );
            line(
                &mut text,
                &format!("add rule {ip} kube-proxy {endpoint} meta l4proto tcp dnat to {backend}"),
            );
        }
    }
    text
}

pub(super) fn stale_chains(sync: &Sync) -> BTreeSet<String> {
    let gone = |(before, after): (Option<&ServicePort>, &ServicePort)| -> Vec<String> {
        let removed = usable(before).iter().filter(|backend| !after.backends.contains(backend));
        removed.map(|backend| endpoint_chain(after, *backend)).collect()
    };
    sync.changes().flat_map(gone).collect()
}

pub(super) fn delete_chains(family: Family, chains: &BTreeSet<String>) -> String {
    let ip = ip(family);
    let mut text = String::new();
    for chain in chains {
        line(&mut text, &format!("delete chain {ip} kube-proxy {chain}"));
    }
    text
}

/// Leads the Service's address to its chain, to a reject, or from one to the other.
fn switch(text: &mut String, family: Family, before: Option<&ServicePort>, after: &ServicePort) {
    let ip = ip(family);
    let chain = service_chain(after);
    let key = format!("{} . tcp . {}", after.address, after.port);
    let served = !usable(before).is_empty();
    let usable_now = !after.backends.is_empty();
    let mut element = |verb, map, verdict: &str| {
        line(text, &format!("{verb} element {ip} kube-proxy {map} {{ {key} : goto {verdict} }}"));
    };
    if served && !usable_now {
        element("delete", "service-ips", &chain);
    }
    if before.is_some() && !served && usable_now {
        element("delete", "no-endpoint-services", "reject-chain");
    }
    if !usable_now && (served || before.is_none()) {
        element("add", "no-endpoint-services", "reject-chain");
    }
    if before.is_none() {
        let address = after.address;
        line(text, &format!("add element {ip} kube-proxy cluster-ips {{ {address} }}"));
    }
    line(text, &format!("add chain {ip} kube-proxy {chain}"));
    if usable_now && !served {
        line(text, &format!("add element {ip} kube-proxy service-ips {{ {key} : goto {chain} }}"));
    }
    if served && !usable_now {
        line(text, &format!("flush chain {ip} kube-proxy {chain}"));
    }
}

fn choices(port: &ServicePort, shown: impl Fn(SocketAddr) -> String) -> String {
    let numbered = port.backends.iter().enumerate();
    let choices = numbered.map(|(number, backend)| format!("{number} : {}", shown(*backend)));
    choices.collect::<Vec<_>>().join(", ")
}

/// All of the lab's endpoints are local, so each may connect to itself through a Service.
fn hairpins(ports: &[ServicePort]) -> BTreeSet<String> {
    let backends = ports.iter().flat_map(|port| &port.backends);
    backends.map(|backend| format!("{0} . {0} . tcp . {1}", backend.ip(), backend.port())).collect()
}

fn service_chain(port: &ServicePort) -> String {
    let (namespace, service, name) = (&port.namespace, &port.service, &port.port_name);
    format!("service-{}-{namespace}/{service}/tcp/{name}", hash(&port.name(), 8))
}

fn endpoint_chain(port: &ServicePort, backend: SocketAddr) -> String {
    let (namespace, service, name) = (&port.namespace, &port.service, &port.port_name);
    let address = backend.ip().to_string().replace(':', ".");
    let hash = hash(&format!("{}{backend}", port.name()), 8);
    format!("endpoint-{hash}-{namespace}/{service}/tcp/{name}__{address}/{}", backend.port())
}
