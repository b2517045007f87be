//! What kube-proxy writes for many Services of five backends each, as text for the real tools.
//!
//! The layouts are those of the recordings in `tests/captures` (nftables: kube-proxy 1.36). Only the
//! hashes in chain names differ, and only ClusterIP Services over TCP exist. Rules of endpoints have no
//! comments: kube-proxy leaves them out in iptables mode above 1,000 endpoints, and here are more.

use std::net::Ipv4Addr;
use std::ops::Range;

/// Backends of each Service.
pub(crate) const BACKENDS: usize = 5;
/// The port they listen on.
pub(crate) const PORT: u16 = 8080;
/// Services of one `iptables-restore` at set-up: the tool's time grows with the square of the
/// chains it is given at once (60,000 took it more than 4 minutes, 1,500 take 0.1 s).
const SERVICES_AT_ONCE: usize = 250;
const FIRST_CLUSTER_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
const FIRST_POD: Ipv4Addr = Ipv4Addr::new(10, 128, 0, 1);
const CLUSTER_CIDR: &str = "10.128.0.0/9";

fn address(first: Ipv4Addr, number: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(first.to_bits() + u32::try_from(number).unwrap_or(u32::MAX))
}

/// The address of one of a Service's backends.
pub(crate) fn pod(service: usize, backend: usize) -> Ipv4Addr {
    address(FIRST_POD, service * BACKENDS + backend)
}

fn cluster_ip(service: usize) -> Ipv4Addr {
    address(FIRST_CLUSTER_IP, service)
}

/// `namespace/name:port`, as comments say it.
fn name(service: usize) -> String {
    format!("default/service-{service}:http")
}

/// In place of kube-proxy's hashes: spread as evenly, so that chains come in no order.
fn hash(number: usize) -> u64 {
    /// Odd, so that no two numbers meet; 2^64 divided by the golden ratio.
    const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
    u64::try_from(number).unwrap_or(u64::MAX).wrapping_mul(SPREAD)
}

fn line(text: &mut String, line: &str) {
    text.push_str(line);
    text.push('\n');
}

/// kube-proxy's nftables mode.
pub(crate) mod nftables {
    use super::{BACKENDS, PORT, Range, cluster_ip, hash, line, pod};

    fn chain(service: usize) -> String {
        format!("service-{:08X}-default/service-{service}/tcp/http", hash(service) >> 32)
    }

    /// All rules of so many Services.
    pub(crate) fn all(services: usize) -> String {
        let mut text = String::from(
            "table ip kube-proxy {
set cluster-ips { type ipv4_addr; }
map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
chain services { ip daddr . meta l4proto . th dport vmap @service-ips; }
chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
chain nat-output { type nat hook output priority -100; jump services; }
}
",
        );
        for service in 0..services {
            let (chain, address) = (chain(service), cluster_ip(service));
            line(&mut text, &format!("add element ip kube-proxy cluster-ips {{ {address} }}"));
            text += &sync(service, 0..BACKENDS);
            line(
                &mut text,
                &format!(
                    "add element ip kube-proxy service-ips {{ {address} . tcp . 80 : goto {chain} }}"
                ),
            );
        }
        text
    }

    /// A Service whose backends are now these.
    pub(crate) fn sync(service: usize, backends: Range<usize>) -> String {
        let (chain, count) = (chain(service), backends.len());
        let choices = backends
            .enumerate()
            .map(|(number, backend)| format!("{number} : {} . {PORT}", pod(service, backend)));
        let choices = choices.collect::<Vec<_>>().join(", ");
        format!(
            "add chain ip kube-proxy {chain}
flush chain ip kube-proxy {chain}
add rule ip kube-proxy {chain} meta l4proto tcp dnat ip to numgen random mod {count} map {{ {choices} }}
"
        )
    }
}

/// kube-proxy's iptables mode, either backend.
pub(crate) mod iptables {
    use super::{
        BACKENDS, CLUSTER_CIDR, PORT, Range, SERVICES_AT_ONCE, cluster_ip, hash, line, name, pod,
    };

    fn service_chain(service: usize) -> String {
        format!("KUBE-SVC-{:016X}", hash(service))
    }

    fn endpoint_chain(service: usize, backend: usize) -> String {
        format!("KUBE-SEP-{:016X}", hash(service * BACKENDS + backend))
    }

    /// All rules of so many Services, in parts that the tool takes in one after another.
    pub(crate) fn all(services: usize) -> impl Iterator<Item = String> {
        let base = "*nat
:KUBE-SERVICES - [0:0]
:KUBE-MARK-MASQ - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A KUBE-MARK-MASQ -j MARK --or-mark 0x00004000
COMMIT
";
        let parts = (0..services).step_by(SERVICES_AT_ONCE).map(move |first| {
            let part = first..services.min(first + SERVICES_AT_ONCE);
            restore(part.map(|service| (service, 0..BACKENDS)), "")
        });
        std::iter::once(base.to_owned()).chain(parts).chain([restore([], &portals(services))])
    }

    /// A Service whose backends are now these: its own chains and nothing else.
    pub(crate) fn own_chains(service: usize, backends: Range<usize>) -> String {
        restore([(service, backends)], "")
    }

    /// The same as kube-proxy does it: `KUBE-SERVICES` is written anew each time.
    pub(crate) fn sync(services: usize, service: usize, backends: Range<usize>) -> String {
        restore([(service, backends)], &portals(services))
    }

    /// `KUBE-SERVICES`, whole.
    fn portals(services: usize) -> String {
        let mut text = ":KUBE-SERVICES - [0:0]\n".to_owned();
        for service in 0..services {
            let (name, address, chain) =
                (name(service), cluster_ip(service), service_chain(service));
            line(
                &mut text,
                &format!(
                    "-A KUBE-SERVICES -m comment --comment \"{name} cluster IP\" -m tcp -p tcp \
                 -d {address} --dport 80 -j {chain}"
                ),
            );
        }
        text
    }

    /// One commit: Services with their backends, of which those missing are deleted.
    fn restore(services: impl IntoIterator<Item = (usize, Range<usize>)>, portals: &str) -> String {
        let (mut chains, mut rules) = (String::new(), String::new());
        for (service, backends) in services {
            line(&mut chains, &format!(":{} - [0:0]", service_chain(service)));
            rules += &service_rules(service, backends.clone());
            for backend in 0..BACKENDS {
                let chain = endpoint_chain(service, backend);
                line(&mut chains, &format!(":{chain} - [0:0]"));
                if backends.contains(&backend) {
                    rules += &endpoint_rules(service, backend);
                } else {
                    line(&mut rules, &format!("-X {chain}"));
                }
            }
        }
        format!("*nat\n{chains}{portals}{rules}COMMIT\n")
    }

    fn service_rules(service: usize, backends: Range<usize>) -> String {
        let (name, address, chain) = (name(service), cluster_ip(service), service_chain(service));
        let mut rules = String::new();
        line(
            &mut rules,
            &format!(
                "-A {chain} -m comment --comment \"{name} cluster IP\" -m tcp -p tcp -d {address} \
             --dport 80 ! -s {CLUSTER_CIDR} -j KUBE-MARK-MASQ"
            ),
        );
        for backend in backends.clone() {
            let remaining = u32::try_from(backends.end - backend).unwrap_or(u32::MAX);
            let chance = if remaining == 1 {
                String::new()
            } else {
                let chance = 1.0 / f64::from(remaining);
                format!("-m statistic --mode random --probability {chance:.10} ")
            };
            let endpoint = endpoint_chain(service, backend);
            line(&mut rules, &format!("-A {chain} {chance}-j {endpoint}"));
        }
        rules
    }

    fn endpoint_rules(service: usize, backend: usize) -> String {
        let (pod, chain) = (pod(service, backend), endpoint_chain(service, backend));
        format!(
            "-A {chain} -s {pod} -j KUBE-MARK-MASQ
-A {chain} -m tcp -p tcp -j DNAT --to-destination {pod}:{PORT}
"
        )
    }
}
