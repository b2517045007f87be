//! What the agents measured of terminations, against what the watcher and the kubelets saw.
//!
//! Both sides hear of a deletion and of a slice by watches of their own, so those differ by how
//! long each takes to be woken; of rules and processes both have the kernel's word.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::ops::RangeInclusive;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::objects::{Behind, Workload};
use super::stage::Stage;
use crate::e2e::kubelet::truth::{Life, Lives};
use crate::e2e::watcher::changes::{self, Change};
use crate::e2e::watcher::slices::Received;
use crate::lab::agent::Agent;

/// How far the agents may be off.
const LIMIT_MS: f64 = 20.0;
/// Seconds in the API are rounded to microseconds; three of them are added up here.
const ROUNDING_MS: f64 = 0.002;
/// Both watchers saw the deletion within this of each other, whatever delayed one of them.
const BEFORE_DELETION_NS: u64 = 1_000_000_000;

/// How far the agents were off, by quantity.
#[derive(Debug, Default)]
pub(super) struct Errors {
    of: Vec<(&'static str, f64)>,
    terminations: usize,
}

impl Errors {
    fn add(&mut self, quantity: &'static str, error_ms: f64, what: &str) -> Result<()> {
        ensure!(
            error_ms.abs() <= LIMIT_MS,
            "{quantity} is {error_ms:.3} ms off, more than {LIMIT_MS}: {what}"
        );
        self.of.push((quantity, error_ms));
        Ok(())
    }

    /// `gap 0.4 / 2.1 ms` and so on: median and largest magnitude.
    pub(super) fn summary(&self) -> String {
        let mut quantities: Vec<&str> = Vec::new();
        for (quantity, _) in &self.of {
            if !quantities.contains(quantity) {
                quantities.push(quantity);
            }
        }
        let mut text = format!("{} terminations, off by (median, most):", self.terminations);
        for quantity in quantities {
            let of = self.of.iter().filter(|(known, _)| *known == quantity);
            let mut magnitudes: Vec<f64> = of.map(|(_, error)| error.abs()).collect();
            magnitudes.sort_by(f64::total_cmp);
            let (median, most) =
                (magnitudes[magnitudes.len() / 2], magnitudes[magnitudes.len() - 1]);
            write!(text, " {quantity} {median:.2}, {most:.2} ms;").ok();
        }
        text
    }
}

/// Compares terminations that are samples, on both nodes.
pub(super) fn samples(
    stage: &Stage,
    workload: &Workload,
    uids: &[String],
    errors: &mut Errors,
) -> Result<()> {
    ensure!(!uids.is_empty(), "no pod of {} went", workload.name);
    let lives = stage.lives()?;
    let measured = measured(stage, uids)?;
    let (received, changes) = (stage.watcher.received()?, stage.watcher.changes()?);
    for (number, uid) in uids.iter().enumerate() {
        let truth =
            Truth { stage, received: &received, changes: &changes, lives: &lives, uid, workload };
        let of: Vec<&Value> = measured.iter().map(|of_node| &of_node[number]).collect();
        truth.compare(&of, errors).with_context(|| {
            let shown: Vec<String> = of.iter().map(|timeline| format!("{timeline:#}")).collect();
            format!("pod {uid}: {}", shown.join("\n"))
        })?;
        errors.terminations += 1;
    }
    Ok(())
}

/// Checks that terminations gave no sample, and that the pod's own node says why. (No other node has
/// a gap of its own; whether the report counts one is checked where it is asked.)
pub(super) fn no_samples(stage: &Stage, uids: &[String], because: &str) -> Result<()> {
    ensure!(!uids.is_empty(), "no pod went");
    let lives = stage.lives()?;
    for uid in uids {
        let life = lives.get(uid).with_context(|| format!("no kubelet ran {uid}"))?;
        let home = stage.agent(&life.node)?;
        let timeline = home.closed(std::slice::from_ref(uid))?.remove(0);
        let censored = timeline["censored"].as_array().context("censored")?;
        let mut reasons = censored.iter().filter_map(Value::as_str);
        let says = reasons.any(|reason| reason.contains(because));
        ensure!(says, "`{because}` is not why it is no sample: {timeline:#}");
    }
    Ok(())
}

/// How many refused connections the agents counted at these pods.
pub(super) fn refused(stage: &Stage, uids: &[String]) -> Result<u64> {
    let measured = measured(stage, uids)?;
    Ok(measured.iter().flatten().filter_map(|timeline| timeline["refused"].as_u64()).sum())
}

/// What two agents made of a termination that something disturbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Both have a sample, and it is right.
    Sample,
    /// One has none, and says why.
    Censored,
    /// The agent of the pod's own node never heard of it.
    Unknown,
}

/// Compares terminations that something disturbed: what an agent has as a sample is right, and
/// where it has none it says why, with one of these reasons among others.
pub(super) fn disturbed(
    stage: &Stage,
    workload: &Workload,
    uids: &[String],
    because: &[&str],
    errors: &mut Errors,
) -> Result<Vec<Verdict>> {
    ensure!(!uids.is_empty(), "no pod of {} went", workload.name);
    let lives = stage.lives()?;
    let of = uids.iter().map(|uid| known(stage, uid)).collect::<Result<Vec<_>>>()?;
    let (received, changes) = (stage.watcher.received()?, stage.watcher.changes()?);
    let verdict = |(uid, of): (&String, &Vec<Value>)| {
        let truth =
            Truth { stage, received: &received, changes: &changes, lives: &lives, uid, workload };
        let verdict = truth.verdict(of, because, errors);
        verdict.with_context(|| format!("pod {uid}: {}", json!(of)))
    };
    uids.iter().zip(&of).map(verdict).collect()
}

/// Of each node in their order, what its agent measured of a pod once it closed it; null where it
/// never heard of the pod.
pub(super) fn known(stage: &Stage, uid: &String) -> Result<Vec<Value>> {
    let of = |agent: &Agent| {
        let known = agent.terminations()?;
        if !known.iter().any(|known| known["pod"]["uid"] == uid.as_str()) {
            return Ok(Value::Null);
        }
        Ok(agent.closed(std::slice::from_ref(uid))?.remove(0))
    };
    stage.cluster.agents.iter().map(of).collect()
}

/// Of each node in their order, what its agent measured of each pod in theirs, once it closed it.
fn measured(stage: &Stage, uids: &[String]) -> Result<Vec<Vec<Value>>> {
    stage.cluster.agents.iter().map(|agent| agent.closed(uids)).collect()
}

/// What is known of one termination without the agents.
struct Truth<'a> {
    stage: &'a Stage,
    received: &'a Received,
    changes: &'a [Change],
    lives: &'a Lives,
    uid: &'a str,
    workload: &'a Workload,
}

impl Truth<'_> {
    fn life(&self) -> Result<&Life> {
        self.lives.get(self.uid).context("no kubelet ran it")
    }

    /// When the deletion was first seen, by the watcher or by the kubelet: whichever was woken
    /// earlier is nearer to the truth.
    fn deleted_ns(&self) -> Result<u64> {
        let seen_ns = [self.received.deletion_seen_ns(self.uid), self.life()?.deletion_seen_ns];
        seen_ns.into_iter().flatten().min().context("nobody saw a deletion")
    }

    /// While the pod's addresses were its own.
    fn span(&self) -> Result<RangeInclusive<u64>> {
        let (life, deleted_ns) = (self.life()?, self.deleted_ns()?);
        let others = self.lives.values().filter(|other| {
            other.addresses == life.addresses && other.started_ns > Some(deleted_ns)
        });
        let until_ns = others.filter_map(|other| other.started_ns).min().unwrap_or(u64::MAX);
        Ok(deleted_ns.saturating_sub(BEFORE_DELETION_NS)..=until_ns)
    }

    /// `of` is of each node, in their order; null where the pod was never heard of.
    fn verdict(&self, of: &[Value], because: &[&str], errors: &mut Errors) -> Result<Verdict> {
        let is_sample = |timeline: &&Value| timeline["censored"] == json!([]);
        if of.iter().all(|timeline| is_sample(&timeline)) {
            self.compare(&of.iter().collect::<Vec<_>>(), errors)?;
            errors.terminations += 1;
            return Ok(Verdict::Sample);
        }
        for (node, timeline) in self.stage.cluster.network.nodes.iter().zip(of) {
            if is_sample(&timeline) {
                self.compare_removals(node.name, timeline, errors)?;
            } else if let Some(reasons) = timeline["censored"].as_array() {
                let mut said = reasons.iter().filter_map(Value::as_str);
                let says = said.any(|reason| because.iter().any(|words| reason.contains(words)));
                ensure!(says, "{} does not say {because:?}, but {reasons:?}", node.name);
            }
        }
        let is_home = |timeline: &Value| timeline["home"] == true;
        Ok(if of.iter().any(is_home) { Verdict::Censored } else { Verdict::Unknown })
    }

    /// When each way of a Service to the pod was closed on a node, sorted.
    fn removals_ns(&self, node: &str, behind: &Behind) -> Result<Vec<u64>> {
        let (life, span) = (self.life()?, self.span()?);
        let addresses = life.addresses.context("the pod had no address")?;
        let mut removals = Vec::new();
        for family in behind.families {
            let address = SocketAddr::new(addresses.of(*family), life.port);
            let removal = changes::removal(self.changes, node, behind.service, address, &span);
            let missing = || {
                format!("the watcher saw no removal of {address} ({}) on {node}", behind.service)
            };
            removals.push(removal.with_context(missing)?.moment.at_ns);
        }
        removals.sort_unstable();
        Ok(removals)
    }

    /// `of` is of each node, in their order.
    fn compare(&self, of: &[&Value], errors: &mut Errors) -> Result<()> {
        let home = of.iter().find(|timeline| timeline["home"] == true).context("no home")?;
        let deleted_ns = self.deleted_ns()?;
        errors.add("deletion", ms(self.at(home, "deletionRequested")?, deleted_ns), "")?;
        self.compare_process(home, errors)?;
        for (node, timeline) in self.stage.cluster.network.nodes.iter().zip(of) {
            let what = node.name;
            ensure!(timeline["censored"] == json!([]), "{what} censors it");
            let removed_ns = self.compare_removals(node.name, timeline, errors)?;
            let gap_ms = self.gap_ms(home, timeline)?;
            errors.add("gap", gap_ms - ms(removed_ns, deleted_ns), what)?;
        }
        Ok(())
    }

    /// The gap as the report computes it, after checking that its parts add up.
    fn gap_ms(&self, home: &Value, timeline: &Value) -> Result<f64> {
        let deleted = self.at(home, "deletionRequested")?;
        let to_slice = ms(self.at(home, "endpointTerminating")?, deleted);
        let listed = self.at(timeline, "endpointTerminating")?;
        let to_removal = ms(self.at(timeline, "backendRemoved")?, listed);
        if timeline["home"] == true {
            let gap = timeline["gapSeconds"].as_f64().context("no gapSeconds")? * 1e3;
            ensure!(
                (gap - to_slice - to_removal).abs() <= ROUNDING_MS,
                "a gap of {gap} ms is not {to_slice} + {to_removal}"
            );
        }
        Ok(to_slice + to_removal)
    }

    /// Compares each Service's removals; gives the last of all.
    fn compare_removals(&self, node: &str, timeline: &Value, errors: &mut Errors) -> Result<u64> {
        let listed = timeline["removals"].as_array().context("removals")?;
        let mut last_ns = 0;
        let mut expected = 0;
        for behind in self.workload.behind {
            let truth = self.removals_ns(node, behind)?;
            let of_service = listed.iter().filter(|r| r["service"] == behind.service_port);
            let mut measured = of_service
                .map(|removal| removal["backendRemoved"]["bootNs"].as_u64())
                .collect::<Option<Vec<u64>>>()
                .with_context(|| format!("{}: a backend is still there", behind.service_port))?;
            measured.sort_unstable();
            self.compare_slice(behind, listed, errors)?;
            ensure!(
                measured.len() == truth.len(),
                "{node}: {} removals of {}, the watcher saw {}",
                measured.len(),
                behind.service_port,
                truth.len()
            );
            for (measured, truth) in measured.iter().zip(&truth) {
                errors.add("removal", ms(*measured, *truth), behind.service_port)?;
            }
            expected += truth.len();
            last_ns = last_ns.max(truth.last().copied().unwrap_or_default());
        }
        ensure!(listed.len() == expected, "{node}: {} removals of {expected}", listed.len());
        Ok(last_ns)
    }

    /// Compares when a Service's slices first said that the pod is not for new connections.
    fn compare_slice(
        &self,
        behind: &Behind,
        removals: &[Value],
        errors: &mut Errors,
    ) -> Result<()> {
        let of_service = removals.iter().filter(|r| r["service"] == behind.service_port);
        let measured = of_service.filter_map(|r| r["endpointTerminating"]["bootNs"].as_u64()).min();
        let measured = measured.with_context(|| format!("{}: no slice", behind.service_port))?;
        let truth = self.received.endpoint_unready_ns(behind.service, self.uid);
        let truth = truth.with_context(|| format!("{} lists it as ready", behind.service))?;
        errors.add("slice", ms(measured, truth), behind.service_port)
    }

    /// What the kubelet did to the process, and what came of it.
    fn compare_process(&self, home: &Value, errors: &mut Errors) -> Result<()> {
        let life = self.life()?;
        for (quantity, instant, truth_ns) in [
            ("SIGTERM", "sigterm", life.sigterm_sent_ns),
            ("close", "listenerClosed", life.listener_closed_ns),
            ("exit", "processExited", life.exited_ns),
        ] {
            if let Some(truth_ns) = truth_ns {
                errors.add(quantity, ms(self.at(home, instant)?, truth_ns), "")?;
            }
        }
        Ok(())
    }

    fn at(&self, timeline: &Value, instant: &str) -> Result<u64> {
        let at = timeline["instants"][instant]["bootNs"].as_u64();
        at.with_context(|| format!("{}: {instant} is not known", self.uid))
    }
}

/// From `from_ns` to `to_ns`, in ms.
#[expect(clippy::cast_precision_loss, reason = "spans of minutes, to microseconds")]
fn ms(to_ns: u64, from_ns: u64) -> f64 {
    to_ns.wrapping_sub(from_ns).cast_signed() as f64 / 1e6
}
