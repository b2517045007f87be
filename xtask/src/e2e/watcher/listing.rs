//! What the real tools say a node's rules are: which chain of which Service leads to which backend.
//! Pure: from the tools' output.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::lab::network::Family;

/// One way from a Service to an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Backend {
    /// `namespace/name` of the Service; the chain when the rules do not say it.
    pub service: String,
    /// The chain that chooses among the Service's endpoints.
    pub chain: String,
    /// Where it sends a connection.
    pub address: SocketAddr,
    /// What the kernel's messages name it by.
    pub(super) token: Vec<u8>,
}

/// The table of kube-proxy in nftables mode.
pub(super) const NFTABLES_TABLE: &str = "kube-proxy";
/// The table of its Services in iptables mode.
pub(super) const IPTABLES_TABLE: &str = "nat";
/// Chains that choose an endpoint, in nftables mode.
const NFTABLES_CHAINS: [&str; 2] = ["service-", "local-"];
/// Chains that choose an endpoint, in iptables mode.
const IPTABLES_CHAINS: [&str; 2] = ["KUBE-SVC-", "KUBE-SVL-"];
const ENDPOINT_CHAIN: &str = "endpoint-";

/// The backends of one family in the output of `nft -j list ruleset`.
pub(super) fn of_nftables(output: &str, family: Family) -> Result<BTreeSet<Backend>> {
    let ruleset: Value = serde_json::from_str(output).context("`nft -j` printed no JSON")?;
    let objects = ruleset["nftables"].as_array().context("`nft -j` printed no ruleset")?;
    let name = if family == Family::V4 { "ip" } else { "ip6" };
    let mut backends = BTreeSet::new();
    for rule in objects.iter().map(|object| &object["rule"]) {
        let chain = rule["chain"].as_str().unwrap_or_default();
        let chooses = NFTABLES_CHAINS.iter().any(|prefix| chain.starts_with(prefix));
        if rule["family"] == name && rule["table"] == NFTABLES_TABLE && chooses {
            collect_nftables(&rule["expr"], chain, &mut backends);
        }
    }
    Ok(backends)
}

/// Looks for address and port of a `dnat`, and for endpoints' chains, anywhere in a rule.
fn collect_nftables(value: &Value, chain: &str, backends: &mut BTreeSet<Backend>) {
    let mut add = |address: SocketAddr, token: Vec<u8>| {
        let (service, chain) = (nftables_service(chain), chain.to_owned());
        backends.insert(Backend { service, chain, address, token });
    };
    match value {
        Value::Object(fields) => {
            if let Some(address) = concatenated(&value["concat"]) {
                add(address, map_data(address));
            } else if let Some(target) = value["target"].as_str()
                && let Some(address) = endpoint_of_chain(target)
            {
                add(address, terminated(target));
            }
            for field in fields.values() {
                collect_nftables(field, chain, backends);
            }
        }
        Value::Array(items) => {
            for item in items {
                collect_nftables(item, chain, backends);
            }
        }
        _ => {}
    }
}

fn concatenated(value: &Value) -> Option<SocketAddr> {
    let [address, port] = value.as_array()?.as_slice() else { return None };
    let address: IpAddr = address.as_str()?.parse().ok()?;
    Some(SocketAddr::new(address, u16::try_from(port.as_u64()?).ok()?))
}

/// An address and port as data of a map: each padded to 4 bytes.
fn map_data(address: SocketAddr) -> Vec<u8> {
    let mut data = match address.ip() {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    data.extend(address.port().to_be_bytes());
    data.extend([0, 0]);
    data
}

/// `endpoint-HASH-ns/name/proto/port__ADDRESS/PORT`, where `.` stands for `:` in an IPv6 address.
fn endpoint_of_chain(chain: &str) -> Option<SocketAddr> {
    let (_, endpoint) = chain.strip_prefix(ENDPOINT_CHAIN)?.rsplit_once("__")?;
    let (address, port) = endpoint.rsplit_once('/')?;
    let parsed: Result<IpAddr, _> = address.parse();
    let address = parsed.or_else(|_no_ipv4| address.replace('.', ":").parse()).ok()?;
    Some(SocketAddr::new(address, port.parse().ok()?))
}

/// `ns/name` of `service-HASH-ns/name/proto/port`.
fn nftables_service(chain: &str) -> String {
    let named = || {
        let (_, rest) = chain.split_once('-')?;
        let (_, rest) = rest.split_once('-')?;
        let mut parts = rest.split('/');
        Some(format!("{}/{}", parts.next()?, parts.next()?))
    };
    named().unwrap_or_else(|| chain.to_owned())
}

/// The backends in the output of `iptables-save -t nat` or `ip6tables-save -t nat`.
pub(super) fn of_iptables(output: &str) -> BTreeSet<Backend> {
    let rules: Vec<Rule<'_>> = output.lines().filter_map(Rule::parse).collect();
    let addresses: BTreeMap<&str, SocketAddr> = rules
        .iter()
        .filter_map(|rule| Some((rule.chain, rule.value("--to-destination")?.parse().ok()?)))
        .collect();
    let services = service_names(&rules);
    let chooses = |rule: &&Rule<'_>| IPTABLES_CHAINS.iter().any(|p| rule.chain.starts_with(p));
    let backend = |rule: &Rule<'_>| {
        let endpoint = rule.value("-j")?;
        Some(Backend {
            service: services.get(endpoint).copied().unwrap_or(rule.chain).to_owned(),
            chain: rule.chain.to_owned(),
            address: *addresses.get(endpoint)?,
            token: terminated(endpoint),
        })
    };
    rules.iter().filter(chooses).filter_map(backend).collect()
}

/// The Services of the endpoints' chains, by their rules' comments `ns/name:port`; kube-proxy
/// leaves comments out above 1,000 endpoints.
fn service_names<'a>(rules: &[Rule<'a>]) -> BTreeMap<&'a str, &'a str> {
    let of_endpoint = |rule: &Rule<'a>| {
        let comment = rule.value("--comment")?.trim_matches('"');
        rule.value("--to-destination")?;
        Some((rule.chain, comment.split(':').next()?))
    };
    rules.iter().filter_map(of_endpoint).collect()
}

fn terminated(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

/// A rule as `iptables-save` writes it.
struct Rule<'a> {
    chain: &'a str,
    words: Vec<&'a str>,
}

impl<'a> Rule<'a> {
    /// `None` for a line that is no rule. Words of a comment with spaces stay apart: none of those
    /// that are looked for has any.
    fn parse(line: &'a str) -> Option<Self> {
        let mut words = line.split_whitespace();
        words.find(|word| *word == "-A")?;
        Some(Self { chain: words.next()?, words: words.collect() })
    }

    fn value(&self, option: &str) -> Option<&'a str> {
        let at = self.words.iter().position(|word| *word == option)?;
        self.words.get(at + 1).copied()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ruleset(chain: &str, expression: &Value) -> String {
        json!({"nftables": [
            {"metainfo": {}},
            {"rule": {"family": "ip", "table": "kube-proxy", "chain": chain, "expr": [expression]}},
            {"rule": {"family": "ip6", "table": "kube-proxy", "chain": chain, "expr": [expression]}},
            {"rule": {"family": "ip", "table": "other", "chain": chain, "expr": [expression]}},
        ]})
        .to_string()
    }

    fn shown(backends: &BTreeSet<Backend>) -> Vec<(String, String)> {
        let shown = |backend: &Backend| (backend.service.clone(), backend.address.to_string());
        backends.iter().map(shown).collect()
    }

    #[test]
    fn a_map_of_addresses_names_the_backends() {
        let map =
            json!([[0, {"concat": ["10.244.1.2", 8080]}], [1, {"concat": ["10.244.2.2", 8080]}]]);
        let dnat = json!({"dnat": {"addr": {"map": {"key": {}, "data": {"set": map}}}}});
        let output = ruleset("service-SUSTUHLJ-default/web-app/tcp/http", &dnat);
        let backends = of_nftables(&output, Family::V4).expect("a ruleset");
        assert_eq!(
            shown(&backends),
            [("10.244.1.2:8080"), ("10.244.2.2:8080")]
                .map(|address| ("default/web-app".to_owned(), address.to_owned()))
        );
        let tokens: Vec<_> = backends.iter().map(|backend| backend.token.clone()).collect();
        assert_eq!(tokens[0], [10, 244, 1, 2, 0x1f, 0x90, 0, 0]);
        let output = ruleset("services", &dnat);
        assert!(of_nftables(&output, Family::V4).expect("a ruleset").is_empty());
    }

    #[test]
    fn a_verdict_map_names_the_endpoints_chains() {
        let chain = "endpoint-EK3DTP7L-default/web/tcp/http__10.244.0.35/8080";
        let vmap = json!({"vmap": {"data": {"set": [[0, {"goto": {"target": chain}}]]}}});
        let output = ruleset("service-SUSTUHLJ-default/web/tcp/http", &vmap);
        let backends = of_nftables(&output, Family::V4).expect("a ruleset");
        assert_eq!(shown(&backends), [("default/web".to_owned(), "10.244.0.35:8080".to_owned())]);
        let ipv6 = "endpoint-A-default/web/tcp/http__fd00.10.244.1..2/8080";
        assert_eq!(endpoint_of_chain(ipv6), "[fd00:10:244:1::2]:8080".parse().ok());
    }

    #[test]
    fn iptables_rules_lead_from_a_service_over_a_chain_to_an_address() {
        let output = r#"
*nat
:KUBE-SVC-CDGG - [0:0]
[0:0] -A KUBE-SEP-DH2V -s 10.244.0.22/32 -m comment --comment "default/web:http" -j KUBE-MARK-MASQ
[0:0] -A KUBE-SEP-DH2V -p tcp -m comment --comment "default/web:http" -m tcp -j DNAT --to-destination 10.244.0.22:8080
-A KUBE-SEP-DEAD -p tcp -m tcp -j DNAT --to-destination 10.244.0.23:8080
-A KUBE-SVC-CDGG ! -s 10.244.0.0/16 -d 10.96.182.10/32 -p tcp -m comment --comment "default/web:http cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-CDGG -m comment --comment "default/web:http -> 10.244.0.22:8080" -j KUBE-SEP-DH2V
-A KUBE-SERVICES -d 10.96.182.10/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-CDGG
COMMIT
"#;
        let backends = of_iptables(output);
        assert_eq!(shown(&backends), [("default/web".to_owned(), "10.244.0.22:8080".to_owned())]);
        let tokens: Vec<_> = backends.into_iter().map(|backend| backend.token).collect();
        assert_eq!(tokens, [b"KUBE-SEP-DH2V\0".to_vec()]);
    }

    #[test]
    fn output_that_is_no_ruleset_is_an_error() {
        of_nftables("", Family::V4).expect_err("no JSON");
        of_nftables("{}", Family::V4).expect_err("no ruleset");
    }
}
