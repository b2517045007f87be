//! Doors to the private parsers of foreign bytes, for `observer/fuzz` and its corpus.
//!
//! Not part of the API: each function hands its bytes to the parser that the daemon uses, and
//! nothing else calls it. Parsers that are public anyway have no door here.

use std::io;

use crate::api::terminations::Terminations;
use crate::clock::WallOffset;
use crate::dataplane::nft::{Fault, Ruleset};
use crate::dataplane::{Counters, Family, ipvs, legacy, names, nft};
use crate::facts::{BootNs, ClusterFact, PodUid, Protocol, ServicePort};
use crate::{cluster, kernel, report};

/// The rules in the answers to dump requests that were numbered from 1.
///
/// # Errors
/// When the answers say that the rules changed, or are errors themselves.
pub fn dump(answers: &[u8], counters: &Counters) -> Result<Ruleset, Fault> {
    nft::replay(answers, counters)
}

/// The commits that a datagram of notifications ends: their numbers and messages.
#[must_use]
pub fn commits(datagram: &[u8]) -> Vec<(u32, &[u8])> {
    nft::follow::ended(datagram)
}

/// The legacy nat table of this network namespace: its `ipt_getinfo` and its entries.
///
/// # Errors
/// Those of the system calls.
pub fn legacy_table(family: Family) -> io::Result<(Vec<u8>, Vec<u8>)> {
    legacy::raw(family)
}

/// The virtual services in the answers to requests for them and for their destinations; `None` when
/// one is not understood.
#[must_use]
pub fn ipvs_table(answers: &[u8]) -> Option<ipvs::Table> {
    ipvs::replay(answers)
}

/// The Service port in a chain's name.
#[must_use]
pub fn of_chain(chain: &str) -> Option<(ServicePort, Protocol)> {
    names::of_chain(chain)
}

/// The Service port in a rule's comment.
#[must_use]
pub fn of_comment(comment: &str) -> Option<ServicePort> {
    names::of_comment(comment)
}

/// The pod in the name of a cgroup's directory.
#[must_use]
pub fn of_directory(name: &str) -> Option<PodUid> {
    kernel::cgroups::pod_of_directory(name)
}

/// The facts in a page of a list of pods, or in an event of their watch.
#[must_use]
pub fn pods(body: &[u8], at: BootNs, offset: WallOffset) -> Vec<ClusterFact> {
    cluster::replay_pods(body, at, offset)
}

/// The facts in a page of a list of EndpointSlices, or in an event of their watch.
#[must_use]
pub fn slices(body: &[u8], at: BootNs, offset: WallOffset) -> Vec<ClusterFact> {
    cluster::replay_slices(body, at, offset)
}

/// An agent's answer to the report.
///
/// # Errors
/// When it is no agent's, or another version's.
pub fn answer(body: &str) -> anyhow::Result<Terminations> {
    report::read_answer(body)
}
