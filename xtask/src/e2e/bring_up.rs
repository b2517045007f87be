//! Whether the cluster is one: a Service made by hand is reached over both nodes' rules, and is
//! refused there once it has no endpoint.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::api::Api;
use super::network::{Network, Node};
use super::until;
use crate::lab::netns::Namespace;
use crate::lab::network::{Addresses, Family};

/// kube-proxy follows within two seconds; a machine that compiles at the same time needs longer.
const RULES_LIMIT: Duration = Duration::from_secs(30);
/// Longer than the second after which a SYN is sent again: the node's own first one over IPv6 is not
/// refused when the rules' answer comes while the socket is still being connected.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
const PORT: u16 = 8080;
const SERVICES: &str = "/api/v1/namespaces/default/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
const NAME: &str = "by-hand";

/// Makes the Service, connects to it, takes its endpoints away, and removes it.
pub(super) fn check(admin: &Api, network: &Network) -> Result<()> {
    let [first, _] = &network.nodes;
    let listener = |address: IpAddr| -> Result<TcpListener> {
        first.client.enter(|| Ok(TcpListener::bind((address, PORT))?))
    };
    let addresses = first.client_addresses();
    let _listeners = [listener(addresses.v4.into())?, listener(addresses.v6.into())?];
    let service = admin.create(SERVICES, &service())?;
    for family in Family::BOTH {
        admin.create(SLICES, &slice(family, addresses, first))?;
    }
    let paths = paths(&service, network)?;
    for (place, target) in &paths {
        until(RULES_LIMIT, &format!("{} reaches {target}", place.name()), || {
            connect(place, *target).map(drop).map_err(Into::into)
        })?;
    }
    for family in Family::BOTH {
        admin.delete(&format!("{SLICES}/{}", slice_name(family)), &json!({}))?;
    }
    for (place, target) in &paths {
        until(RULES_LIMIT, &format!("{} is refused at {target}", place.name()), || {
            let outcome = connect(place, *target);
            ensure!(is_refused(&outcome), "the outcome is {outcome:?}");
            Ok(())
        })?;
    }
    admin.delete(&format!("{SERVICES}/{NAME}"), &json!({}))?;
    Ok(())
}

fn service() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": NAME},
        "spec": {
            "type": "NodePort", "ipFamilyPolicy": "RequireDualStack",
            "ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
        },
    })
}

fn slice(family: Family, addresses: Addresses, node: &Node) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": slice_name(family), "labels": {"kubernetes.io/service-name": NAME},
        },
        "addressType": family.address_type(),
        "ports": [{"name": "http", "port": PORT, "protocol": "TCP"}],
        "endpoints": [{
            "addresses": [addresses.of(family)], "nodeName": node.name,
            "conditions": {"ready": true, "serving": true, "terminating": false},
        }],
    })
}

fn slice_name(family: Family) -> String {
    format!("{NAME}-{}", family.address_type().to_lowercase())
}

/// The cluster address of one family.
pub(super) fn cluster_address(service: &Value, family: Family) -> Result<IpAddr> {
    let addresses = service["spec"]["clusterIPs"].as_array().context("no cluster addresses")?;
    let mut parsed = addresses.iter().filter_map(|address| address.as_str()?.parse().ok());
    let address = parsed.find(|address| Family::of(*address) == family);
    address.with_context(|| format!("no {}", family.address_type()))
}

/// From both nodes and the second one's client to the cluster addresses, and from outside to the
/// port that the second node has for it.
fn paths<'a>(service: &Value, network: &'a Network) -> Result<Vec<(&'a Namespace, SocketAddr)>> {
    let [first, second] = &network.nodes;
    let node_port = service["spec"]["ports"][0]["nodePort"].as_u64().context("no node port")?;
    let mut paths = Vec::new();
    for family in Family::BOTH {
        let address = cluster_address(service, family)?;
        for place in [&first.namespace, &second.namespace, &second.client] {
            paths.push((place, SocketAddr::new(address, 80)));
        }
        let node = second.addresses.of(family);
        paths.push((&network.outside, SocketAddr::new(node, u16::try_from(node_port)?)));
    }
    Ok(paths)
}

fn connect(from: &Namespace, target: SocketAddr) -> std::io::Result<TcpStream> {
    let connect = || Ok(TcpStream::connect_timeout(&target, CONNECT_LIMIT));
    from.enter(connect).unwrap_or_else(|error| Err(std::io::Error::other(error)))
}

fn is_refused(outcome: &std::io::Result<TcpStream>) -> bool {
    let refused = std::io::ErrorKind::ConnectionRefused;
    outcome.as_ref().is_err_and(|error| error.kind() == refused)
}
