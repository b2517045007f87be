//! The iptables mode: one text for both backends and IP versions, filter table first.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use observer::dataplane::Family;

use super::{Layout, Service, address, hash, joined};

/// The chains that every sync writes anew.
const ALWAYS: [&str; 3] = ["KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-MARK-MASQ"];

/// The tables without Services.
pub(super) fn base() -> String {
    let chains = chain_lines(ALWAYS);
    format!(
        "*filter\n:KUBE-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
COMMIT
*nat\n{chains}-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A KUBE-MARK-MASQ -j MARK --or-mark 0x00004000
COMMIT
"
    )
}

fn chain_lines<'c>(chains: impl IntoIterator<Item = &'c str>) -> String {
    chains.into_iter().fold(String::new(), |mut lines, chain| {
        writeln!(lines, ":{chain} - [0:0]").expect("memory");
        lines
    })
}

/// One Service's chains; those of [`ALWAYS`] are left to [`change`].
pub(super) fn layout(version: Family, service: &Service) -> Layout {
    let mut layout = Layout::default();
    let pods = service.of_cluster();
    if pods.is_empty() {
        return layout;
    }
    let (name, own) = (service.port_name(), chain("SVC", service));
    choose(&mut layout, version, service, &own, &pods);
    if !service.external() {
        return layout;
    }
    let external = chain("EXT", service);
    if service.local_only {
        let comment = format!("\"route LOCAL traffic for {name} external destinations\"");
        let rule = format!("-m comment --comment {comment} -m addrtype --src-type LOCAL -j {own}");
        layout.add(&external, rule);
        let local = service.of_node();
        if !local.is_empty() {
            let chain = chain("SVL", service);
            layout.add(&external, format!("-j {chain}"));
            choose(&mut layout, version, service, &chain, &local);
        }
    } else {
        let comment = format!("\"masquerade traffic for {name} external destinations\"");
        layout.add(&external, format!("-m comment --comment {comment} -j KUBE-MARK-MASQ"));
        layout.add(&external, format!("-j {own}"));
    }
    layout
}

/// A chain that picks one of the pods, and their chains.
fn choose(layout: &mut Layout, version: Family, service: &Service, chain: &str, pods: &[u8]) {
    let (name, protocol) = (service.port_name(), service.protocol_name());
    let described = |pod| {
        let to = joined(version, pod, service.pod_port());
        format!("-m comment --comment \"{name} -> {to}\"")
    };
    for &pod in pods.iter().filter(|_| service.affinity) {
        let endpoint = endpoint(version, service, pod);
        let recent = format!("-m recent --name {endpoint} --rcheck --seconds 10800 --reap");
        layout.add(chain, format!("{} {recent} --rsource -j {endpoint}", described(pod)));
    }
    for (number, &pod) in pods.iter().enumerate() {
        let left = u32::try_from(pods.len() - number).expect("few pods");
        let chance = match left {
            1 => String::new(),
            _ => format!("-m statistic --mode random --probability {:.10} ", 1.0 / f64::from(left)),
        };
        let endpoint = endpoint(version, service, pod);
        layout.add(chain, format!("{} {chance}-j {endpoint}", described(pod)));

        let comment = format!("-m comment --comment {name}");
        let recent = if service.affinity {
            format!("-m recent --name {endpoint} --set --rsource ")
        } else {
            String::new()
        };
        let (from, to) = (address(version, "pod", pod), joined(version, pod, service.pod_port()));
        let rules = vec![
            format!("{comment} -s {from} -j KUBE-MARK-MASQ"),
            format!("{comment} {recent}-m {protocol} -p {protocol} -j DNAT --to-destination {to}"),
        ];
        layout.chains.insert(endpoint, rules);
    }
}

fn chain(kind: &str, service: &Service) -> String {
    format!("KUBE-{kind}-{}", hash(&service.port_name(), 16))
}

fn endpoint(version: Family, service: &Service, pod: u8) -> String {
    let to = joined(version, pod, service.pod_port());
    format!("KUBE-SEP-{}", hash(&format!("{}{to}", service.port_name()), 16))
}

/// One sync: two tables, of which each is a commit of its own. Chains that are not wanted any more
/// are deleted at once.
pub(super) fn change(
    version: Family,
    services: &[&Service],
    written: &Layout,
    wanted: &Layout,
    rewritten: &BTreeSet<String>,
) -> String {
    let dead: Vec<&str> = written
        .chains
        .keys()
        .filter(|chain| !wanted.chains.contains_key(*chain))
        .map(String::as_str)
        .collect();
    let again = wanted.chains.iter().filter(|(chain, _)| rewritten.contains(*chain));
    let mut nat = chain_lines(ALWAYS)
        + &chain_lines(again.clone().map(|(chain, _)| chain.as_str()))
        + &chain_lines(dead.iter().copied())
        + "-A KUBE-MARK-MASQ -j MARK --or-mark 0x00004000\n";
    let mut filter = chain_lines(["KUBE-SERVICES"]);
    for service in services {
        let rules = portals(version, service);
        if service.of_cluster().is_empty() { &mut filter } else { &mut nat }.push_str(&rules);
    }
    for (chain, rules) in again {
        for rule in rules {
            writeln!(nat, "-A {chain} {rule}").expect("memory");
        }
    }
    for chain in dead {
        writeln!(nat, "-X {chain}").expect("memory");
    }
    let node_ports = "nodeports; NOTE: this must be the last rule in this chain";
    format!(
        "*filter\n{filter}COMMIT\n*nat\n{nat}-A KUBE-SERVICES -m comment --comment \
         \"kubernetes service {node_ports}\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\nCOMMIT\n"
    )
}

/// Where a Service is entered: in the nat table, or where it is rejected in the filter table.
fn portals(version: Family, service: &Service) -> String {
    let (name, protocol) = (service.port_name(), service.protocol_name());
    let to = |kind| address(version, kind, service.number);
    let rule = |comment: &str, to: &str, chain: &str| {
        format!(
            "-A KUBE-SERVICES -m comment --comment \"{name} {comment}\" \
             -m {protocol} -p {protocol} -d {to} --dport 80 -j {chain}\n"
        )
    };
    if service.of_cluster().is_empty() {
        return rule("has no endpoints", &to("service"), "REJECT");
    }
    let external = chain("EXT", service);
    let mut rules = rule("cluster IP", &to("service"), &chain("SVC", service));
    if service.load_balancer {
        rules += &rule("loadbalancer IP", &to("load balancer"), &external);
    }
    if service.node_port {
        let port = service.node_port_number();
        let port = format!("-m {protocol} -p {protocol} --dport {port}");
        rules += "-A KUBE-NODEPORTS -m comment --comment ";
        writeln!(rules, "{name} {port} -j {external}").expect("memory");
    }
    rules
}
