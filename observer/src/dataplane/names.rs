//! Which Service port a chain or a comment of kube-proxy, or a front end, belongs to.
//!
//! kube-proxy names nftables chains `service-HASH-namespace/name/protocol/port` (also `local-`,
//! `external-`, `firewall-`), and `endpoint-…__ADDRESS/PORT` up to 1.35; iptables chains are
//! hashes, so there the rules' comments tell. With more than 1,000 endpoints kube-proxy leaves
//! the comment out of the endpoints' rules and only `KUBE-SERVICES` has it. Refuses whatever
//! looks different, rather than guess. IPVS and Cilium have no names, only front ends.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use crate::facts::{Protocol, ServiceName, ServicePort};

const CHAIN_KINDS: [&str; 5] = ["service-", "endpoint-", "local-", "external-", "firewall-"];
/// What may follow the Service port in a comment.
const COMMENT_TAILS: [&str; 5] = ["", "cluster IP", "external IP", "loadbalancer IP", "-> "];
/// kube-apiserver's default `--service-node-port-range`. A cluster with another loses nothing but
/// memory.
const NODE_PORTS: RangeInclusive<u16> = 30_000..=32_767;

/// The Service port and protocol in the name of a kube-proxy chain. `None` when it is no such
/// chain, or its name was cut short (128 bytes, ending in `...`) before the port's end.
#[must_use]
pub(crate) fn of_chain(chain: &str) -> Option<(ServicePort, Protocol)> {
    let hashed = CHAIN_KINDS.iter().find_map(|kind| chain.strip_prefix(kind))?;
    let (_hash, path) = hashed.split_once('-')?;
    let path = match path.split_once("__") {
        Some((service, _endpoint)) => service,
        None if path.ends_with("...") => return None,
        None => path,
    };
    let mut parts = path.split('/');
    let (namespace, name, protocol, port) =
        (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        _ => return None,
    };
    if namespace.is_empty() || name.is_empty() || parts.next().is_some() {
        return None;
    }
    let separator = if port.is_empty() { "" } else { ":" };
    Some((ServicePort(format!("{namespace}/{name}{separator}{port}").into()), protocol))
}

/// The Service port that a kube-proxy rule's comment starts with.
#[must_use]
pub(crate) fn of_comment(comment: &str) -> Option<ServicePort> {
    start_of_comment(comment).map(|service| ServicePort(service.into()))
}

/// As [`of_comment`], in place.
#[must_use]
pub(crate) fn start_of_comment(comment: &str) -> Option<&str> {
    let (service, tail) = comment.split_once(' ').unwrap_or((comment, ""));
    let known = COMMENT_TAILS.iter().any(|known| match known.strip_suffix(' ') {
        Some(_) => tail.starts_with(known),
        None => tail == *known,
    });
    let (namespace, rest) = service.split_once('/')?;
    let well_formed = !namespace.is_empty() && !rest.is_empty() && !rest.contains('/');
    (known && well_formed).then_some(service)
}

/// What to call the Service port that is reached at a front end. A node port is one Service port's
/// on every address of the node, of which there may be hundreds: together they are one front end.
#[must_use]
pub(crate) fn of_front_end(address: IpAddr, port: u16) -> ServiceName {
    let any = match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let address = if NODE_PORTS.contains(&port) { any } else { address };
    ServiceName::FrontEnd { address, port }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(name: &str) -> Option<(String, Protocol)> {
        of_chain(name).map(|(service, protocol)| (service.0.to_string(), protocol))
    }

    fn comment(text: &str) -> Option<String> {
        of_comment(text).map(|service| service.0.to_string())
    }

    #[test]
    fn every_kind_of_chain_names_its_service_port() {
        let web = Some(("default/web:http".to_owned(), Protocol::Tcp));
        assert_eq!(chain("service-SUSTUHLJ-default/web/tcp/http"), web);
        assert_eq!(chain("local-SUSTUHLJ-default/web/tcp/http"), web);
        assert_eq!(chain("endpoint-EK3DTP7L-default/web/tcp/http__10.244.0.35/8080"), web);
        assert_eq!(chain("endpoint-EK3DTP7L-default/web/tcp/http__fd00..23/80"), web);
        assert_eq!(
            chain("service-VJ5RZ5CJ-a/b-c/udp/"),
            Some(("a/b-c".to_owned(), Protocol::Udp)),
            "a port without a name"
        );
    }

    #[test]
    fn a_chain_that_is_not_kube_proxys_or_is_cut_short_names_nothing() {
        for name in [
            "services",
            "service-",
            "service-endpoints-check",
            "KUBE-SVC-CDGGSHYLG3RE2FKL",
            "service-SUSTUHLJ-default/web/tcp/ht...",
            "service-SUSTUHLJ-default/web/icmp/x",
            "service-SUSTUHLJ-default/web/tcp/x/y",
        ] {
            assert_eq!(chain(name), None, "{name}");
        }
        assert!(chain("endpoint-EK3DTP7L-a/b/tcp/c__fd00..23...").is_some());
    }

    #[test]
    fn a_node_port_is_one_front_end_on_all_addresses_and_others_are_not() {
        let shown = |address: &str, port| {
            of_front_end(address.parse().expect("an address"), port).to_string()
        };
        assert_eq!(shown("10.96.0.10", 80), "10.96.0.10:80");
        assert_eq!(shown("fd00::10", 29_999), "[fd00::10]:29999");
        assert_eq!(shown("192.0.2.1", 30_000), "0.0.0.0:30000");
        assert_eq!(shown("192.0.2.2", 32_767), "0.0.0.0:32767");
        assert_eq!(shown("fd00::1", 30_080), "[::]:30080");
        assert_eq!(shown("192.0.2.1", 32_768), "192.0.2.1:32768");
    }

    #[test]
    fn comments_name_the_service_port_and_nothing_else_does() {
        let web = Some("default/web:http".to_owned());
        assert_eq!(comment("default/web:http"), web);
        assert_eq!(comment("default/web:http -> 10.244.0.22:8080"), web);
        assert_eq!(comment("default/web:http cluster IP"), web);
        assert_eq!(comment("default/web"), Some("default/web".to_owned()));
        for text in [
            "",
            "/",
            "kubernetes service portals",
            "pod traffic for default/np:http external destinations",
            "default/web:http has no endpoints",
            "a/b/c",
        ] {
            assert_eq!(comment(text), None, "{text}");
        }
    }
}
