//! Parts that go and come back in the middle of a roll: the API server, and an agent.
//!
//! An API server that comes back has forgotten the versions before its start: it answers the
//! agents' watches with 410 whenever something was written meanwhile.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::compare::{Errors, Verdict, disturbed, known, samples};
use super::objects::{Access, Behind, Kind, Workload};
use super::stage::Stage;
use super::{V4, WEB, rights};
use crate::e2e::cluster::Cluster;
use crate::e2e::proxy::Dataplane;
use crate::e2e::until;
use crate::lab::agent::Agent;
use crate::lab::clock;

/// Rolled one pod after the other by [`one_by_one`], so that what cuts the first termination leaves
/// the others. Without a preStop sleep: some connections are refused in each roll.
const ROLLED: Workload = Workload {
    name: "rolled",
    kind: Kind::Deployment,
    replicas: 3,
    linger_ms: 1_500,
    behind: &[Behind {
        service: "default/rolled",
        service_port: "default/rolled:http",
        families: V4,
    }],
};
/// From the API server's end to a 503: the agents hold connections to it, which end with it.
const NOTICED: Duration = Duration::from_secs(2);
/// From the API server's return to a 200: the longest pause of the backoff is 30 s, doubled by its
/// jitter, and the agent lists and watches after that.
const RESUMED: Duration = Duration::from_secs(65);
const AWAY: Duration = Duration::from_mins(1);
/// The first and the longest pause between two attempts, before the jitter, which only adds.
const FIRST_PAUSE: Duration = Duration::from_millis(800);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// After an interruption the agents hold what comes within a second for late; and a deletion, whose
/// time the API has in whole seconds, may have been requested up to a second before it is seen, and
/// the agents look a little further back.
const SETTLED: Duration = Duration::from_millis(2_500);
/// Of one processor, while nothing can be watched: a loop without pauses takes all of one.
const MOST_LOAD: f64 = 0.1;
const COUNTED: Duration = Duration::from_secs(10);
const WATCHES: [(&str, &str); 2] =
    [("pods", "pod watch"), ("endpointslices", "endpointslice watch")];
const MISSED: &[&str] = &["watch may have missed something"];
/// What an agent says of a termination that began before itself.
const BEFORE_START: &[&str] =
    &["already terminating when first seen", "removed before its deletion was seen"];

pub(super) fn play(stage: &mut Stage, dataplane: Dataplane, tell: &dyn Fn(&str)) -> Result<()> {
    let service = stage.expose(&ROLLED, ROLLED.name, Access::NodePort, V4)?;
    stage.create(&ROLLED)?;
    stage.change(&ROLLED, &one_by_one())?;
    // Their watches were cut by the loss of a right.
    std::thread::sleep(SETTLED);
    every_refusal_is_counted(stage, &service, tell).context("the refusals of a roll")?;
    api_server_restarts(stage, tell).context("a restart of the API server")?;
    for (name, end) in ENDS {
        agent_restarts(stage, name, *end, tell).with_context(|| format!("{name} to an agent"))?;
    }
    if dataplane == Dataplane::Nftables {
        api_server_is_away(stage, tell).context("an absence of the API server")?;
    }
    rights::nothing_else_is_used(stage, tell)
}

/// The change that makes a roll end a pod only once the one before it has been replaced for a while.
/// Not a `StatefulSet`: the real scheduler gives up when, across an outage, another pod has the name.
fn one_by_one() -> Value {
    let one = json!({"maxSurge": 0, "maxUnavailable": 1});
    json!({"spec": {"minReadySeconds": 3, "strategy": {"rollingUpdate": one}}})
}

/// How an agent can end.
type End = fn(Agent) -> Result<()>;
const ENDS: &[(&str, End)] = &[("SIGTERM", Agent::stop), ("SIGKILL", killed)];

#[expect(clippy::unnecessary_wraps, reason = "one of several ways to end, and others fail")]
fn killed(agent: Agent) -> Result<()> {
    drop(agent);
    Ok(())
}

/// What the clients saw refused is what both agents counted.
fn every_refusal_is_counted(stage: &mut Stage, service: &Value, tell: &dyn Fn(&str)) -> Result<()> {
    let before = counted(stage, &ROLLED)?;
    let clients = stage.connect(service)?;
    undisturbed(stage, tell)?;
    let seen = clients.stop()?;
    until_counted(stage, &ROLLED, before, seen.refused())?;
    tell(&format!(
        "of {} connections during a roll {} were refused, and counted",
        seen.attempts,
        seen.refused()
    ));
    Ok(())
}

fn until_counted(stage: &Stage, workload: &Workload, before: f64, refused: usize) -> Result<()> {
    until(COUNTED, "the agents have counted every refusal", || {
        let counted = counted(stage, workload)? - before;
        let refused = f64::from(u32::try_from(refused)?);
        ensure!((counted - refused).abs() < 0.5, "the agents counted {counted}, not {refused}");
        Ok(())
    })
}

/// The connections refused at a workload's pods, as both agents count them.
fn counted(stage: &Stage, workload: &Workload) -> Result<f64> {
    let labels = format!("workload=\"{}\"", workload.name);
    let of = |agent: &Agent| agent.metric("observer_pod_refused_connections_total", &labels);
    stage.cluster.agents.iter().map(of).sum()
}

/// The API server is killed and starts again in the middle of a roll.
fn api_server_restarts(stage: &mut Stage, tell: &dyn Fn(&str)) -> Result<()> {
    let mut outage = Outage::default();
    let ended = stage.roll_through(&ROLLED, |cluster| {
        outage.begin(cluster, |cluster| cluster.control_plane.kill_api_server())?;
        outage.end(cluster)
    })?;
    tell(&format!("the API server was killed and restarted in a roll: {}", outage.words()));
    is_told_or_right(stage, &ended, &outage, tell)
}

/// The terminations of a roll that an outage cut: those that it cut are no samples, and say why;
/// the others are right, and so is the next roll.
fn is_told_or_right(
    stage: &mut Stage,
    ended: &[String],
    outage: &Outage,
    tell: &dyn Fn(&str),
) -> Result<()> {
    let mut errors = Errors::default();
    let verdicts = disturbed(stage, &ROLLED, ended, MISSED, &mut errors)?;
    let mut cut = 0;
    for (uid, verdict) in ended.iter().zip(&verdicts) {
        ensure!(*verdict != Verdict::Unknown, "{uid} is not known at its own node");
        if outage.cuts(stage, uid)? {
            ensure!(*verdict == Verdict::Censored, "the outage cut {uid}, which is a sample");
            cut += 1;
        }
    }
    ensure!(cut > 0, "the outage cut no termination");
    let over_ns = outage.over_ns() + clock::nanos(SETTLED);
    let later = later_are_samples(stage, ended, &verdicts, over_ns)?;
    tell(&format!(
        "  it cut {cut}, all censored; {later} began after it; the samples: {}",
        errors.summary()
    ));
    undisturbed(stage, tell)
}

/// Checks that terminations that began after `from_ns` are all samples; gives how many there are.
fn later_are_samples(
    stage: &Stage,
    ended: &[String],
    verdicts: &[Verdict],
    from_ns: u64,
) -> Result<usize> {
    let received = stage.watcher.received()?;
    let is_later = |uid: &String| received.deletion_seen_ns(uid).is_some_and(|at| at > from_ns);
    let mut later = 0;
    for (uid, verdict) in ended.iter().zip(verdicts).filter(|(uid, _)| is_later(uid)) {
        ensure!(
            *verdict == Verdict::Sample,
            "nothing disturbed {uid}, which is {verdict:?}: {}",
            json!(known(stage, uid)?)
        );
        later += 1;
    }
    Ok(later)
}

/// An absence of the API server. Moments are ns of `CLOCK_BOOTTIME`.
#[derive(Clone, Copy, Debug, Default)]
struct Outage {
    began_ns: u64,
    /// Both agents said so.
    noticed_ns: u64,
    returned_ns: u64,
    /// From its return until both agents were ready again.
    resumed_after: Duration,
}

impl Outage {
    /// Ends the API server, and waits until both agents name both watches.
    fn begin(
        &mut self,
        cluster: &mut Cluster,
        end: impl FnOnce(&mut Cluster) -> Result<()>,
    ) -> Result<()> {
        self.began_ns = clock::boot_ns();
        end(cluster)?;
        for agent in &cluster.agents {
            until(NOTICED, "the agent names both watches", || {
                let words = agent.unready()?.context("it is ready without an API server")?;
                let all = WATCHES.iter().all(|(_, name)| words.contains(name));
                ensure!(all, "it says: {words}");
                Ok(())
            })?;
        }
        self.noticed_ns = clock::boot_ns();
        Ok(())
    }

    /// Starts the API server, and waits until both agents are ready again.
    fn end(&mut self, cluster: &mut Cluster) -> Result<()> {
        cluster.control_plane.start_api_server()?;
        self.returned_ns = clock::boot_ns();
        for agent in &mut cluster.agents {
            agent.until_ready(RESUMED)?;
        }
        self.resumed_after = Duration::from_nanos(clock::boot_ns() - self.returned_ns);
        Ok(())
    }

    fn words(&self) -> String {
        format!(
            "503 within {:.2} s, away for {:.1} s, 200 within {:.1} s of its return",
            clock::seconds_between(self.began_ns, self.noticed_ns),
            clock::seconds_between(self.began_ns, self.returned_ns),
            self.resumed_after.as_secs_f64(),
        )
    }

    /// When both agents were ready again.
    fn over_ns(&self) -> u64 {
        self.returned_ns + clock::nanos(self.resumed_after)
    }

    /// Whether a termination was seen to begin before it, and its process ended in it or later.
    fn cuts(&self, stage: &Stage, uid: &str) -> Result<bool> {
        let deleted_ns = stage.watcher.received()?.deletion_seen_ns(uid);
        let exited_ns = stage.lives()?.get(uid).and_then(|life| life.exited_ns);
        let began_before = deleted_ns.is_some_and(|at| at < self.began_ns);
        Ok(began_before && exited_ns.is_none_or(|at| at > self.noticed_ns))
    }
}

/// An agent ends and starts again in the middle of a roll.
fn agent_restarts(stage: &mut Stage, name: &str, end: End, tell: &dyn Fn(&str)) -> Result<()> {
    let mut ended_ns = 0;
    let mut ready_ns = 0;
    let ended = stage.roll_through(&ROLLED, |cluster| {
        ended_ns = clock::boot_ns();
        cluster.restart_agent(0, end)?;
        cluster.agents[0].until_ready(RESUMED)?;
        ready_ns = clock::boot_ns();
        Ok(())
    })?;
    let mut errors = Errors::default();
    let verdicts = disturbed(stage, &ROLLED, &ended, BEFORE_START, &mut errors)?;
    let later = later_are_samples(stage, &ended, &verdicts, ready_ns)?;
    ensure!(later > 0, "no termination began after it was ready");
    let ready_after = clock::seconds_between(ended_ns, ready_ns);
    let count = |wanted| verdicts.iter().filter(|verdict| **verdict == wanted).count();
    tell(&format!(
        "{name} to an agent in a roll: ready again after {ready_after:.1} s; {} terminations \
         censored, {} gone before it knew them; the samples: {}",
        count(Verdict::Censored),
        count(Verdict::Unknown),
        errors.summary()
    ));
    Ok(())
}

/// A roll that nothing disturbs: samples only.
fn undisturbed(stage: &mut Stage, tell: &dyn Fn(&str)) -> Result<()> {
    let ended = stage.roll(&ROLLED)?;
    let mut errors = Errors::default();
    samples(stage, &ROLLED, &ended, &mut errors)?;
    tell(&format!("  an undisturbed roll: {}", errors.summary()));
    Ok(())
}

/// The API server is away for longer than any restart, in the middle of a roll; a pod crashes
/// meanwhile.
fn api_server_is_away(stage: &mut Stage, tell: &dyn Fn(&str)) -> Result<()> {
    let before = efforts(&stage.cluster)?;
    let refused_before = counted(stage, &WEB)?;
    let clients = stage.connect(&stage.admin().get("/api/v1/namespaces/default/services/web")?)?;
    let mut outage = Outage::default();
    let ended = stage.roll_through(&ROLLED, |cluster| {
        outage.begin(cluster, |cluster| cluster.control_plane.stop_api_server())?;
        crash_one(cluster)?;
        clock::sleep_until(outage.began_ns + clock::nanos(AWAY));
        let seconds = clock::seconds_between(outage.began_ns, clock::boot_ns());
        is_patient(&before, &efforts(cluster)?, seconds, tell)?;
        outage.end(cluster)
    })?;
    tell(&format!("the API server was away in a roll: {}", outage.words()));
    let seen = clients.stop()?;
    until_counted(stage, &WEB, refused_before, seen.refused())?;
    ensure!(seen.refused() > 0, "nothing was refused at the pod that crashed");
    tell(&format!("  a pod crashed: {} connections were refused, and counted", seen.refused()));
    for (before, after) in before.iter().zip(efforts(&stage.cluster)?) {
        let gone = after.gone - before.gone;
        ensure!(gone >= WATCHES.len(), "{gone} watches were cut by 410");
    }
    tell("  its return cut both watches of both agents by 410");
    is_told_or_right(stage, &ended, &outage, tell)
}

/// What an agent has spent.
struct Effort {
    /// Attempts of each watch that failed.
    failures: [f64; 2],
    /// Watches that the API server cut by 410.
    gone: usize,
    cpu: Duration,
}

fn efforts(cluster: &Cluster) -> Result<Vec<Effort>> {
    let failures = |agent: &Agent, watch: &str| {
        agent.metric("observer_watch_failures_total", &format!("watch=\"{watch}\""))
    };
    let effort = |agent: &Agent| {
        let [(pods, _), (slices, _)] = WATCHES;
        let failures = [failures(agent, pods)?, failures(agent, slices)?];
        let gone = agent.log().matches("(HTTP 410)").count();
        Ok(Effort { failures, gone, cpu: agent.cpu_time()? })
    };
    cluster.agents.iter().map(effort).collect()
}

/// Whether the agents tried again no more often than the backoff lets them, and did little else.
fn is_patient(
    before: &[Effort],
    after: &[Effort],
    seconds: f64,
    tell: &dyn Fn(&str),
) -> Result<()> {
    let most = most_attempts(seconds);
    for (before, after) in before.iter().zip(after) {
        let [pods, slices] = [0, 1].map(|watch| after.failures[watch] - before.failures[watch]);
        let load = (after.cpu.saturating_sub(before.cpu)).as_secs_f64() / seconds;
        let figures = format!(
            "{pods} and {slices} attempts in {seconds:.0} s, of {most} at most; {:.1} % of a \
             processor",
            load * 100.0
        );
        ensure!(pods.max(slices) <= f64::from(most) && load <= MOST_LOAD, "{figures}");
        ensure!(pods.min(slices) >= 2.0, "it does not try again: {figures}");
        tell(&format!("  an agent without an API server: {figures}"));
    }
    Ok(())
}

/// The failures that the backoff allows within a time: the watch's end, and one after each pause.
fn most_attempts(seconds: f64) -> u32 {
    let (mut attempts, mut pause, mut at) = (1, FIRST_PAUSE, FIRST_PAUSE);
    while at.as_secs_f64() <= seconds {
        attempts += 1;
        pause = (pause * 2).min(LONGEST_PAUSE);
        at += pause;
    }
    attempts
}

/// A pod that no roll ends crashes.
fn crash_one(cluster: &Cluster) -> Result<()> {
    for kubelet in &cluster.kubelets {
        let lives = kubelet.truth()?;
        let mut running = lives.iter().filter(|(_, life)| life.exited_ns.is_none());
        if let Some((uid, _)) = running.find(|(_, life)| life.name.starts_with(WEB.name)) {
            return kubelet.crash(uid);
        }
    }
    bail!("no pod of {} runs", WEB.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minute_allows_seven_attempts() {
        // At 0, 0.8, 2.4, 5.6, 12, 24.8 and 50.4 s.
        assert_eq!((most_attempts(0.5), most_attempts(12.5), most_attempts(60.0)), (1, 5, 7));
    }
}
