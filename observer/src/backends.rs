//! `observer backends`: what this node sends new connections to at this moment, by Service.
//!
//! Needs no running agent: reads the node's rules once, in the network namespace it is called in,
//! just as the agent does. A shell around [`Listing`], which is pure.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write;
use std::net::SocketAddr;

use anyhow::{Context as _, bail};
use serde::Serialize;

use crate::dataplane::{self, Settings, Snapshot};
use crate::facts::{Backend, Protocol};
use crate::report::Output;

/// Stands for the Service in the table where the dataplane does not name it.
const UNNAMED: &str = "(not named)";

/// What is printed as JSON.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Listing {
    /// The dataplane that serves Services.
    serving: &'static str,
    /// All that have backends.
    in_use: Vec<&'static str>,
    /// Reachable rules whose destination cannot be told.
    unresolved: usize,
    /// Sorted by Service, protocol and address.
    backends: Vec<Line>,
}

/// One backend.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Line {
    /// `namespace/name:port`; `address:port` of a front end where the dataplane knows no names;
    /// null when it does not say.
    service: Option<String>,
    protocol: Protocol,
    backend: SocketAddr,
    /// Kept for the connections it has; no new ones are sent to it.
    draining: bool,
}

impl Listing {
    /// Of the rules as they were read.
    ///
    /// # Errors
    /// When no dataplane is found.
    pub fn new(snapshot: &Snapshot) -> anyhow::Result<Self> {
        let status = &snapshot.status;
        let Some(serving) = status.serving else { bail!("{status}") };
        let line = |backend: &Backend, draining| Line {
            service: backend.service.as_ref().map(ToString::to_string),
            protocol: backend.protocol,
            backend: SocketAddr::new(backend.address, backend.port),
            draining,
        };
        let present = snapshot.backends.iter().map(|backend| line(backend, false));
        let draining = snapshot.draining.iter().map(|backend| line(backend, true));
        let mut backends: Vec<Line> = present.chain(draining).collect();
        backends.sort();
        Ok(Self {
            serving: serving.name(),
            in_use: status.in_use.iter().map(|dataplane| dataplane.name()).collect(),
            unresolved: status.unresolved,
            backends,
        })
    }

    /// For a person: each Service with its backends below.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::new();
        let mut by_service: BTreeMap<(&str, Protocol), Vec<&Line>> = BTreeMap::new();
        for line in &self.backends {
            let service = line.service.as_deref().unwrap_or(UNNAMED);
            by_service.entry((service, line.protocol)).or_default().push(line);
        }
        for ((service, protocol), lines) in by_service {
            let _infallible = writeln!(text, "{service} {protocol}");
            for line in lines {
                let draining = if line.draining { "  draining" } else { "" };
                let _infallible = writeln!(text, "  {}{draining}", line.backend);
            }
        }
        if self.unresolved > 0 {
            let _infallible =
                writeln!(text, "Rules whose destination cannot be told: {}", self.unresolved);
        }
        text
    }
}

/// Prints what is present to `out`; which dataplane serves, and which others there are, to `notes`.
///
/// # Errors
/// When the rules cannot be read (`CAP_NET_ADMIN` or `CAP_NET_RAW` is missing), no dataplane is
/// found, or a writer fails.
pub async fn run(
    settings: Settings,
    output: Output,
    out: &mut dyn Write,
    notes: &mut dyn Write,
) -> anyhow::Result<()> {
    let snapshot = dataplane::read(&settings).await?;
    let listing = Listing::new(&snapshot)?;
    let writing = "writing the backends";
    match output {
        Output::Table => {
            writeln!(notes, "{}", snapshot.status).context(writing)?;
            out.write_all(listing.table().as_bytes()).context(writing)
        }
        Output::Json => {
            serde_json::to_writer_pretty(&mut *out, &listing).context(writing)?;
            writeln!(out).context(writing)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::{Dataplane, Status};
    use crate::facts::{ServiceName, ServicePort};

    fn backend(service: Option<&str>, protocol: Protocol, address: &str, port: u16) -> Backend {
        let service = service.map(|name| ServiceName::Port(ServicePort(name.into())));
        Backend { service, protocol, address: address.parse().expect("an address"), port }
    }

    fn snapshot(serving: Option<Dataplane>) -> Snapshot {
        Snapshot {
            status: Status {
                serving,
                in_use: serving.into_iter().collect(),
                backends: 4,
                unresolved: 1,
                unreadable: Vec::new(),
            },
            backends: [
                backend(Some("shop/web:http"), Protocol::Tcp, "10.1.0.2", 80),
                backend(Some("shop/web:http"), Protocol::Tcp, "fd00::2", 80),
                backend(Some("kube-system/dns:dns"), Protocol::Udp, "10.1.0.3", 53),
                backend(None, Protocol::Tcp, "10.1.0.9", 9000),
            ]
            .into(),
            draining: [backend(Some("shop/web:http"), Protocol::Tcp, "10.1.0.1", 80)].into(),
        }
    }

    #[test]
    fn backends_stand_below_their_service() {
        let listing = Listing::new(&snapshot(Some(Dataplane::Nftables))).expect("found");
        let expected = "\
(not named) TCP
  10.1.0.9:9000
kube-system/dns:dns UDP
  10.1.0.3:53
shop/web:http TCP
  10.1.0.1:80  draining
  10.1.0.2:80
  [fd00::2]:80
Rules whose destination cannot be told: 1
";
        assert_eq!(listing.table(), expected);
    }

    #[test]
    fn json_names_every_field_and_says_null_for_an_unknown_service() {
        let listing = Listing::new(&snapshot(Some(Dataplane::Ipvs))).expect("found");
        let json = serde_json::to_value(&listing).expect("serializable");
        assert_eq!(json["serving"], "ipvs");
        assert_eq!(json["backends"].as_array().map(Vec::len), Some(5));
        assert_eq!(json["backends"][0]["service"], serde_json::Value::Null);
        assert_eq!(json["backends"][0]["backend"], "10.1.0.9:9000");
    }

    #[test]
    fn without_a_dataplane_it_says_where_to_look() {
        let error = Listing::new(&snapshot(None)).expect_err("nothing found").to_string();
        assert!(error.contains("no dataplane is found"), "{error}");
    }
}
