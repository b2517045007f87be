//! The lab without the agent: what it builds really serves, and what it removes is really gone.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use xtask::lab::api::Gone;
use xtask::lab::clock::seconds_between;
use xtask::lab::load::{Attempt, Outcome};
use xtask::lab::network::{Family, Place};
use xtask::lab::pod::AtSigterm;
use xtask::lab::rules::Dataplane;
use xtask::lab::{Behaviour, Lab, Listen, Options, PodPlan, RunningPod};

const SOON: Duration = Duration::from_secs(10);
const LATE_RULES: Duration = Duration::from_millis(200);

fn build(dataplane: Dataplane) -> Result<Lab> {
    Lab::build(Options {
        pod_program: PathBuf::from(env!("CARGO_BIN_EXE_xtask")),
        dataplane,
        slice_delay: Duration::from_millis(5),
        rules_delay: Duration::ZERO,
    })
}

/// A lab with a dual-stack Service and some ready pods that are its backends.
fn with_pods(dataplane: Dataplane, count: usize) -> Result<(Lab, Vec<RunningPod>)> {
    let lab = build(dataplane)?;
    lab.add_service("web", "web", &Family::BOTH)?;
    let pods: Vec<RunningPod> =
        (0..count).map(|_| lab.start_pod(&PodPlan::of("web"))).collect::<Result<_>>()?;
    lab.wait_for_backends(&Family::BOTH, &pods)?;
    Ok((lab, pods))
}

fn servers(attempts: &[Attempt]) -> BTreeSet<&str> {
    attempts
        .iter()
        .filter_map(|attempt| match &attempt.outcome {
            Outcome::Served(name) => Some(name.as_str()),
            _ => None,
        })
        .collect()
}

fn count(attempts: &[Attempt], outcome: &Outcome) -> usize {
    attempts.iter().filter(|attempt| attempt.outcome == *outcome).count()
}

/// One pod of two is deleted while clients connect; the rules follow late.
fn a_removal_stops_new_connections(dataplane: Dataplane) -> Result<()> {
    let (lab, pods) = with_pods(dataplane, 2)?;
    lab.set_rules_delay(LATE_RULES);
    for family in Family::BOTH {
        let target = lab.service_address("web", family)?;
        let attempt = lab.attempt(Place::Outside, target)?;
        assert!(matches!(attempt.outcome, Outcome::Served(_)), "from outside: {attempt:?}");
    }
    let loads: Vec<_> = Family::BOTH
        .into_iter()
        .map(|family| {
            Ok(lab.start_load(Place::Client, lab.service_address("web", family)?, 200, 2))
        })
        .collect::<Result<_>>()?;
    std::thread::sleep(Duration::from_millis(300));
    lab.delete_pod(&pods[0]).wait()?;
    lab.wait_for_backends(&Family::BOTH, &pods[1..])?;
    std::thread::sleep(Duration::from_millis(300));
    let truth = lab.truth();
    let victim = &truth.pods[&pods[0].uid];
    let requested_ns = victim.deletion_requested_ns.context("the deletion is recorded")?;
    let closed_ns = victim.listener_closed_ns.context("the close is recorded")?;
    let removed_ns = truth.backend_removed_ns(&pods[0].uid).context("the removal is recorded")?;
    let gap = seconds_between(requested_ns, removed_ns);
    assert!((0.2..0.5).contains(&gap), "{dataplane:?}: gap {gap} s");
    for load in loads {
        let attempts = load.stop()?;
        let during = |from_ns: u64, until_ns: u64| -> Vec<Attempt> {
            let inside = |attempt: &&Attempt| (from_ns..until_ns).contains(&attempt.started_ns);
            attempts.iter().filter(inside).cloned().collect()
        };
        let before = during(0, requested_ns);
        assert_eq!(servers(&before).len(), 2, "{dataplane:?}: both pods serve");
        assert_eq!(count(&before, &Outcome::Refused), 0);
        let between = during(closed_ns, removed_ns - 30_000_000);
        let refused = count(&between, &Outcome::Refused);
        assert!(refused > 5, "{dataplane:?}: {refused} of {} refused", between.len());
        let after = during(removed_ns + 5_000_000, u64::MAX);
        assert!(after.len() > 30, "{dataplane:?}: {} after", after.len());
        assert_eq!(servers(&after), BTreeSet::from([pods[1].name.as_str()]), "{dataplane:?}");
        assert_eq!(count(&after, &Outcome::Refused), 0, "{dataplane:?}");
    }
    Ok(())
}

#[test]
fn a_removal_stops_new_connections_nftables() -> Result<()> {
    a_removal_stops_new_connections(Dataplane::Nftables)
}

#[test]
fn a_removal_stops_new_connections_nftables_135() -> Result<()> {
    a_removal_stops_new_connections(Dataplane::Nftables135)
}

#[test]
fn a_removal_stops_new_connections_iptables_nft() -> Result<()> {
    a_removal_stops_new_connections(Dataplane::IptablesNft)
}

#[test]
fn a_removal_stops_new_connections_iptables_legacy() -> Result<()> {
    a_removal_stops_new_connections(Dataplane::IptablesLegacy)
}

#[test]
fn without_endpoints_the_rules_refuse_and_a_new_pod_can_take_the_address() -> Result<()> {
    for dataplane in [
        Dataplane::Nftables,
        Dataplane::Nftables135,
        Dataplane::IptablesNft,
        Dataplane::IptablesLegacy,
    ] {
        let (lab, pods) = with_pods(dataplane, 1)?;
        let target = lab.service_address("web", Family::V4)?;
        lab.delete_pod(&pods[0]).wait()?;
        lab.wait_for_backends(&Family::BOTH, &[])?;
        assert_eq!(lab.attempt(Place::Node, target)?.outcome, Outcome::Refused, "{dataplane:?}");
        let heir = PodPlan { addresses: Some(pods[0].addresses), ..PodPlan::of("web") };
        let heir = lab.start_pod(&heir)?;
        assert_ne!(heir.uid, pods[0].uid);
        lab.wait_for_backends(&Family::BOTH, std::slice::from_ref(&heir))?;
        for family in Family::BOTH {
            let attempt = lab.attempt(Place::Client, lab.service_address("web", family)?)?;
            assert_eq!(attempt.outcome, Outcome::Served(heir.name.clone()), "{dataplane:?}");
        }
    }
    Ok(())
}

/// Connections that the pod accepted, by the count of its own network namespace.
fn accepted(lab: &Lab, pod: &RunningPod) -> Result<u64> {
    let pid = lab.truth().pods[&pod.uid].pid;
    let counts = std::fs::read_to_string(format!("/proc/{pid}/net/snmp"))?;
    let mut tcp = counts.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = tcp.next().zip(tcp.next()).context("the counts of TCP")?;
    let mut pairs = names.split(' ').zip(values.split(' '));
    let (_, count) = pairs.find(|(name, _)| *name == "PassiveOpens").context("PassiveOpens")?;
    Ok(count.parse()?)
}

#[test]
fn the_kubelet_probes_a_pod_until_it_ends() -> Result<()> {
    let lab = build(Dataplane::Nftables)?;
    let pod = lab.start_pod(&PodPlan {
        probe_period: Some(Duration::from_millis(50)),
        pre_stop_sleep_seconds: Some(1),
        ..PodPlan::of("web")
    })?;
    let unprobed = lab.start_pod(&PodPlan::of("web"))?;
    let listed = list(&lab, PODS)?;
    let containers = listed["items"].as_array().context("pods")?.iter().map(|listed| {
        let uid = listed["metadata"]["uid"].as_str().unwrap_or_default();
        (uid, &listed["spec"]["containers"][0])
    });
    let containers: std::collections::BTreeMap<&str, &Value> = containers.collect();
    let probe = &containers[pod.uid.as_str()]["readinessProbe"];
    assert_eq!(*probe, serde_json::json!({"tcpSocket": {"port": "http"}}));
    assert_eq!(containers[unprobed.uid.as_str()]["readinessProbe"], Value::Null);

    let termination = lab.delete_pod(&pod);
    let at_deletion = accepted(&lab, &pod)?;
    std::thread::sleep(Duration::from_millis(600));
    let while_terminating = accepted(&lab, &pod)? - at_deletion;
    assert!((4..=13).contains(&while_terminating), "{while_terminating} probes in 0.6 s");
    assert_eq!(accepted(&lab, &unprobed)?, 0);
    termination.wait()
}

fn direct(pod: &RunningPod) -> SocketAddr {
    (pod.addresses.v6, 8080).into()
}

#[test]
fn pods_end_as_they_are_told_to() -> Result<()> {
    let lab = build(Dataplane::Nftables)?;
    let start = |behaviour: Behaviour| {
        lab.start_pod(&PodPlan { behaviour, grace_seconds: 1, ..PodPlan::of("web") })
    };
    let life = |pod: &RunningPod| lab.truth().pods.remove(&pod.uid).context("the pod's truth");

    let ignores = start(Behaviour { at_sigterm: AtSigterm::Ignore, ..Behaviour::default() })?;
    let lingers = start(Behaviour { linger: Duration::from_millis(300), ..Behaviour::default() })?;
    let holds = start(Behaviour { hold_streams: true, ..Behaviour::default() })?;
    let mut held = lab.connect(Place::Client, direct(&holds))?;
    let mut name = [0; 5];
    held.read_exact(&mut name)?;
    for termination in [&ignores, &lingers, &holds].map(|pod| lab.delete_pod(pod)) {
        termination.wait()?;
    }
    let unmoved = life(&ignores)?;
    ensure!(unmoved.sigterm_ns.is_some() && unmoved.listener_closed_ns.is_none(), "{unmoved:?}");
    ensure!(unmoved.sigkill_sent_ns.is_some() && unmoved.exited_ns.is_some(), "{unmoved:?}");
    let lingered = life(&lingers)?;
    let closed_ns = lingered.listener_closed_ns.context("it closed its listener")?;
    let drain = seconds_between(closed_ns, lingered.exited_ns.context("it exited")?);
    assert!((0.29..0.6).contains(&drain), "it stayed {drain} s");
    assert_eq!(lingered.sigkill_sent_ns, None);
    let held_open = life(&holds)?;
    ensure!(held_open.listener_closed_ns.is_some() && held_open.sigkill_sent_ns.is_some());
    Ok(())
}

#[test]
fn pods_crash_restart_their_listener_and_listen_late_or_never() -> Result<()> {
    let lab = build(Dataplane::Nftables)?;
    let start = |listen: Listen| {
        lab.start_pod(&PodPlan {
            behaviour: Behaviour { listen, ..Behaviour::default() },
            ..PodPlan::of("web")
        })
    };
    let never = start(Listen::Never)?;
    let late = start(Listen::Late(Duration::from_millis(400)))?;
    assert_eq!(lab.attempt(Place::Client, direct(&late))?.outcome, Outcome::Refused);
    assert_eq!(lab.attempt(Place::Client, direct(&never))?.outcome, Outcome::Refused);
    lab.wait_for("it listens", SOON, |truth| truth.pods[&late.uid].listening_ns)?;
    assert_eq!(
        lab.attempt(Place::Client, direct(&late))?.outcome,
        Outcome::Served(late.name.clone())
    );
    late.restart_listener()?;
    lab.wait_for("it closes", SOON, |truth| truth.pods[&late.uid].listener_closed_ns)?;
    assert_eq!(lab.attempt(Place::Client, direct(&late))?.outcome, Outcome::Refused);
    let crashes = start(Listen::AtOnce)?;
    crashes.crash()?;
    lab.wait_for("it exits", SOON, |truth| truth.pods[&crashes.uid].exited_ns)?;
    let life = &lab.truth().pods[&crashes.uid];
    ensure!(life.sigterm_ns.is_none() && life.listener_closed_ns.is_none(), "{life:?}");
    Ok(())
}

/// A watch over a raw connection, read line by line.
fn watch(lab: &Lab, path: &str) -> Result<BufReader<std::net::TcpStream>> {
    let mut stream = lab.connect(Place::Node, "127.0.0.1:6443".parse()?)?;
    stream.set_read_timeout(Some(SOON))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: lab\r\n\r\n")?;
    Ok(BufReader::new(stream))
}

/// The next event; chunk sizes and headers are not JSON and passed over. `None` at the end.
fn next_event(watch: &mut BufReader<std::net::TcpStream>) -> Result<Option<Value>> {
    let mut line = String::new();
    while watch.read_line(&mut line)? > 0 {
        if line.starts_with('{') {
            return Ok(Some(serde_json::from_str(&line)?));
        }
        if line == "0\r\n" {
            break;
        }
        line.clear();
    }
    Ok(None)
}

fn list(lab: &Lab, path: &str) -> Result<Value> {
    let (status, body) = lab.http_get(&format!("{}{path}", lab.api().url()))?;
    ensure!(status == 200, "{path}: {status} {body}");
    Ok(serde_json::from_str(&body)?)
}

const PODS: &str = "/api/v1/pods?fieldSelector=spec.nodeName%3Dnode-1";

#[test]
fn the_api_lists_and_watches_a_termination_as_a_real_one_shows_it() -> Result<()> {
    let (lab, pods) = with_pods(Dataplane::Nftables, 2)?;
    let listed = list(&lab, PODS)?;
    assert_eq!(listed["items"].as_array().map(Vec::len), Some(2));
    assert_eq!(
        list(&lab, "/api/v1/pods?fieldSelector=spec.nodeName%3Dother")?["items"],
        Value::Array(vec![])
    );
    let version = listed["metadata"]["resourceVersion"].as_str().context("a version")?;
    let mut pod_watch = watch(
        &lab,
        &format!("{PODS}&watch=true&allowWatchBookmarks=true&resourceVersion={version}"),
    )?;
    let slices = "/apis/discovery.k8s.io/v1/endpointslices";
    let mut slice_watch = watch(&lab, &format!("{slices}?watch=true&resourceVersion={version}"))?;
    lab.delete_pod(&pods[0]).wait()?;

    let mut seen = Vec::new();
    loop {
        let event = next_event(&mut pod_watch)?.context("the watch goes on")?;
        let object = &event["object"];
        let grace = object["metadata"]["deletionGracePeriodSeconds"].as_i64();
        let phase = object["status"]["phase"].as_str().unwrap_or("-");
        let kind = event["type"].as_str().context("a type")?;
        seen.push(format!(
            "{kind} {phase} {}",
            grace.map_or("-".to_owned(), |grace| grace.to_string())
        ));
        if kind == "BOOKMARK" && seen.iter().any(|line| line.starts_with("DELETED")) {
            break;
        }
    }
    seen.retain(|line| !line.starts_with("BOOKMARK"));
    assert_eq!(
        seen,
        [
            "MODIFIED Running 30",
            "MODIFIED Running 30",
            "MODIFIED Succeeded 30",
            "MODIFIED Succeeded 0",
            "DELETED Succeeded 0"
        ]
    );
    let first = next_event(&mut slice_watch)?.context("a slice change")?;
    let endpoints = first["object"]["endpoints"].as_array().context("endpoints")?;
    let victim = endpoints
        .iter()
        .find(|endpoint| endpoint["targetRef"]["uid"] == pods[0].uid.as_str())
        .context("the victim's endpoint")?;
    assert_eq!(
        victim["conditions"],
        serde_json::json!({"ready": false, "serving": true, "terminating": true})
    );
    assert_eq!(first["object"]["metadata"]["annotations"], Value::Null, "no trigger time");
    Ok(())
}

#[test]
fn watches_are_cut_expire_and_are_refused_on_demand() -> Result<()> {
    let (lab, _pods) = with_pods(Dataplane::Nftables, 1)?;
    let version =
        |list: &Value| list["metadata"]["resourceVersion"].as_str().unwrap_or("").to_owned();
    let old = version(&list(&lab, PODS)?);
    let url = |version: &str| format!("{PODS}&watch=true&resourceVersion={version}");

    let mut cut = watch(&lab, &url(&old))?;
    let mut status = String::new();
    cut.read_line(&mut status)?;
    assert_eq!(status.trim(), "HTTP/1.1 200 OK");
    lab.api().cut_watches();
    assert_eq!(next_event(&mut cut)?, None, "the stream ends");

    lab.api().expire_watches(Gone::Status);
    let mut gone = watch(&lab, &url(&old))?;
    let mut status = String::new();
    gone.read_line(&mut status)?;
    assert_eq!(status.trim(), "HTTP/1.1 410 Gone");

    lab.api().expire_watches(Gone::InStream);
    let error = next_event(&mut watch(&lab, &url(&old))?)?.context("an event")?;
    assert_eq!((&error["type"], &error["object"]["code"]), (&"ERROR".into(), &410.into()));

    lab.api().stop();
    lab.http_get(&lab.api().url()).err().context("refused while stopped")?;
    lab.api().start()?;
    let fresh = version(&list(&lab, PODS)?);
    let mut resumed = watch(&lab, &url(&fresh))?;
    let mut status = String::new();
    resumed.read_line(&mut status)?;
    assert_eq!(status.trim(), "HTTP/1.1 200 OK");
    Ok(())
}
