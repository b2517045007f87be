//! The nftables mode.

use std::collections::BTreeSet;

use observer::dataplane::Family;

use super::{Form, Layout, Service, address, hash, joined};

/// `ip` or `ip6`: the table's family and the keyword of address matches.
fn ip(version: Family) -> &'static str {
    if version == Family::V4 { "ip" } else { "ip6" }
}

/// The table without Services.
pub(super) fn base(version: Family) -> String {
    let ip = ip(version);
    let of_service = format!("type {ip}v4_addr . inet_proto . inet_service : verdict");
    let of_service = of_service.replace("ip6v4", "ipv6");
    format!(
        "table {ip} kube-proxy {{
            map service-ips {{ {of_service}; }}
            map no-endpoint-services {{ {of_service}; }}
            map service-nodeports {{ type inet_proto . inet_service : verdict; }}
            map no-endpoint-nodeports {{ type inet_proto . inet_service : verdict; }}
            chain mark-for-masquerade {{ meta mark set meta mark | 0x00004000; }}
            chain reject-chain {{ reject; }}
            chain nodeport-endpoints-check {{
                meta l4proto . th dport vmap @no-endpoint-nodeports
            }}
            chain service-endpoints-check {{
                {ip} daddr . meta l4proto . th dport vmap @no-endpoint-services
            }}
            chain services {{
                {ip} daddr . meta l4proto . th dport vmap @service-ips
                fib daddr type local meta l4proto . th dport vmap @service-nodeports
            }}
            chain filter-input {{
                type filter hook input priority filter;
                ct state new jump nodeport-endpoints-check
                ct state new jump service-endpoints-check
            }}
            chain nat-prerouting {{ type nat hook prerouting priority dstnat; jump services; }}
            chain nat-output {{ type nat hook output priority -100; jump services; }}
        }}"
    )
}

/// One Service's chains and where they are entered.
pub(super) fn layout(form: Form, version: Family, service: &Service) -> Layout {
    let mut layout = Layout::default();
    let pods = service.of_cluster();
    let own = key(version, "service", service);
    let outside = key(version, "load balancer", service);
    let node_port = format!("{} . {}", service.protocol_name(), service.node_port_number());
    let mut lead = |map, key: &str, chain: &str| {
        layout.elements.insert((map, key.to_owned()), format!("goto {chain}"));
    };
    if pods.is_empty() {
        lead("no-endpoint-services", &own, "reject-chain");
        if service.node_port {
            lead("no-endpoint-nodeports", &node_port, "reject-chain");
        }
        return layout;
    }
    let external = chain("external", service);
    lead("service-ips", &own, &chain("service", service));
    if service.load_balancer {
        lead("service-ips", &outside, &external);
    }
    if service.node_port {
        lead("service-nodeports", &node_port, &external);
    }
    choose(&mut layout, form, version, service, &chain("service", service), &pods);
    if service.external() {
        external_chain(&mut layout, form, version, service);
    }
    layout
}

fn external_chain(layout: &mut Layout, form: Form, version: Family, service: &Service) {
    let (external, own) = (chain("external", service), chain("service", service));
    if !service.local_only {
        layout.add(&external, "jump mark-for-masquerade");
        layout.add(&external, format!("goto {own}"));
        return;
    }
    layout.add(&external, format!("fib saddr type local goto {own} comment \"short-circuit\""));
    let local = service.of_node();
    if !local.is_empty() {
        layout.add(&external, format!("goto {}", chain("local", service)));
        choose(layout, form, version, service, &chain("local", service), &local);
    }
}

/// A chain that picks one of the pods, and what it needs.
fn choose(
    layout: &mut Layout,
    form: Form,
    version: Family,
    service: &Service,
    chain: &str,
    pods: &[u8],
) {
    let (ip, protocol, port) = (ip(version), service.protocol_name(), service.pod_port());
    let numbered = |shown: &dyn Fn(u8) -> String| -> String {
        let choices = pods.iter().enumerate();
        let choices: Vec<String> =
            choices.map(|(number, pod)| format!("{number} : {}", shown(*pod))).collect();
        choices.join(", ")
    };
    let count = pods.len();
    if form == Form::Nftables136 && !service.affinity {
        let map = numbered(&|pod| format!("{} . {port}", address(version, "pod", pod)));
        layout.add(
            chain,
            format!(
                "meta l4proto {protocol} dnat {ip} to numgen random mod {count} map {{ {map} }}"
            ),
        );
        return;
    }
    for &pod in pods {
        let endpoint = endpoint("endpoint", version, service, pod);
        let clients = endpoint_clients(version, service, pod);
        let mut rules =
            vec![format!("{ip} saddr {} jump mark-for-masquerade", address(version, "pod", pod))];
        if service.affinity {
            layout.add(chain, format!("{ip} saddr @{clients} goto {endpoint}"));
            rules.push(format!("update @{clients} {{ {ip} saddr }}"));
            layout.clients.insert(clients);
        }
        rules.push(format!("meta l4proto {protocol} dnat to {}", joined(version, pod, port)));
        layout.chains.insert(endpoint, rules);
    }
    let map = numbered(&|pod| format!("goto {}", endpoint("endpoint", version, service, pod)));
    layout.add(chain, format!("numgen random mod {count} vmap {{ {map} }}"));
}

fn key(version: Family, kind: &str, service: &Service) -> String {
    let address = address(version, kind, service.number);
    format!("{address} . {} . 80", service.protocol_name())
}

fn chain(kind: &str, service: &Service) -> String {
    let (name, protocol) = (service.name, service.protocol_name());
    format!("{kind}-{}-ns/{name}/{protocol}/p", hash(&service.port_name(), 8))
}

fn endpoint(kind: &str, version: Family, service: &Service, pod: u8) -> String {
    let (name, protocol, port) = (service.name, service.protocol_name(), service.pod_port());
    let address = address(version, "pod", pod);
    let hash = hash(&format!("{}{address}", service.port_name()), 8);
    let address = address.replace(':', ".");
    format!("{kind}-{hash}-ns/{name}/{protocol}/p__{address}/{port}")
}

fn endpoint_clients(version: Family, service: &Service, pod: u8) -> String {
    endpoint("affinity", version, service, pod)
}

/// One sync: makes what is wanted of what was written. The chains of touched Services are written
/// again, also when nothing of them differs. kube-proxy empties those that are not wanted any more;
/// in the 1.36 form they are left full until their deletion, so that only what leads there tells.
pub(super) fn change(
    form: Form,
    version: Family,
    written: &Layout,
    wanted: &Layout,
    rewritten: &BTreeSet<String>,
) -> String {
    let table = format!("{} kube-proxy", ip(version));
    let mut lines = Vec::new();
    let address = if version == Family::V4 { "ipv4_addr" } else { "ipv6_addr" };
    for clients in wanted.clients.difference(&written.clients) {
        let kind = format!("type {address}; flags dynamic, timeout; timeout 10800s;");
        lines.push(format!("add set {table} {clients} {{ {kind} }}"));
    }
    for chain in wanted.chains.keys().filter(|chain| rewritten.contains(*chain)) {
        lines.push(format!("add chain {table} {chain}"));
        lines.push(format!("flush chain {table} {chain}"));
    }
    for ((map, key), verdict) in &written.elements {
        if wanted.elements.get(&(*map, key.clone())) != Some(verdict) {
            lines.push(format!("delete element {table} {map} {{ {key} }}"));
        }
    }
    for ((map, key), verdict) in &wanted.elements {
        if written.elements.get(&(*map, key.clone())) != Some(verdict) {
            lines.push(format!("add element {table} {map} {{ {key} : {verdict} }}"));
        }
    }
    let dropped = written.chains.keys().filter(|chain| !wanted.chains.contains_key(*chain));
    for chain in dropped.filter(|_| form == Form::Nftables135) {
        lines.push(format!("flush chain {table} {chain}"));
    }
    for (chain, rules) in wanted.chains.iter().filter(|(chain, _)| rewritten.contains(*chain)) {
        lines.extend(rules.iter().map(|rule| format!("add rule {table} {chain} {rule}")));
    }
    lines.join("\n")
}

/// Deletes what a sync dropped, unless it is wanted again.
pub(super) fn deletion(version: Family, stale: &Layout, wanted: &Layout) -> String {
    let table = format!("{} kube-proxy", ip(version));
    let chains = stale.chains.keys().filter(|chain| !wanted.chains.contains_key(*chain));
    let emptied = chains.clone().map(|chain| format!("flush chain {table} {chain}"));
    let chains = emptied.chain(chains.map(|chain| format!("delete chain {table} {chain}")));
    let clients = stale.clients.difference(&wanted.clients);
    let clients = clients.map(|clients| format!("delete set {table} {clients}"));
    chains.chain(clients).collect::<Vec<_>>().join("\n")
}
