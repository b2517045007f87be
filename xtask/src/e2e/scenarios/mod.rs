//! What a team does to a cluster, and whether the agents measured it.

mod compare;
mod objects;
mod outages;
mod requests;
mod rights;
mod stage;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::e2e::cluster::Cluster;
use crate::e2e::proxy::Dataplane;
use crate::e2e::watcher::Watcher;
use crate::lab::agent;
use crate::lab::network::Family;
use crate::step::say;
use compare::Errors;
use objects::{Access, Behind, Kind, Workload};
use stage::Stage;

const V4: &[Family] = &[Family::V4];

/// A pod that stays for so long is listed as terminating first: the endpoint controller takes 0.1 to
/// 0.5 s. One that is gone before is no longer listed at once, and another node cannot tell that from
/// a changed label.
const LISTED_MS: u32 = 1_000;
/// Under load; its pods stay for a while after SIGTERM and refuse what still comes.
const WEB: Workload = Workload {
    name: "web",
    kind: Kind::Deployment,
    replicas: 4,
    linger_ms: 2_000,
    behind: &[behind("default/web", "default/web:http", V4)],
};
const SINGLE: Workload = Workload {
    name: "single",
    kind: Kind::Recreate,
    replicas: 1,
    linger_ms: 0,
    behind: &[behind("default/single", "default/single:http", V4)],
};
const STATEFUL: Workload = Workload {
    name: "db",
    kind: Kind::StatefulSet,
    replicas: 2,
    linger_ms: LISTED_MS,
    behind: &[behind("default/db-read", "default/db-read:http", V4)],
};
/// Behind three Services: with client affinity, of both families, and headless.
const MANY: Workload = Workload {
    name: "many",
    kind: Kind::Deployment,
    replicas: 3,
    linger_ms: LISTED_MS,
    behind: &[
        behind("default/sticky", "default/sticky:http", V4),
        behind("default/both", "default/both:http", &Family::BOTH),
    ],
};

const fn behind(
    service: &'static str,
    service_port: &'static str,
    families: &'static [Family],
) -> Behind {
    Behind { service, service_port, families }
}

/// Plays everything on a cluster that has just been started.
pub(super) fn play(
    cluster: Cluster,
    dataplane: Dataplane,
    observer: &Path,
    outages: bool,
) -> Result<()> {
    let watcher = Watcher::start(&cluster.control_plane.admin, &cluster.network, dataplane)?;
    let mut stage = Stage::new(cluster, watcher, observer);
    let tell = |what: &str| say(&format!("e2e: {}: {what}", dataplane.name()));
    let web = rolls_under_load(&mut stage, &tell)?;
    ends_of_every_kind(&mut stage, &tell)?;
    no_refusal_with_the_recommended_sleep(&mut stage, &web, &tell)?;
    rights::play(&mut stage, &tell).context("the agents' rights")?;
    if outages { outages::play(&mut stage, dataplane, &tell) } else { Ok(()) }
}

/// A Deployment is rolled, scaled and drained, with clients of its Service.
fn rolls_under_load(stage: &mut Stage, tell: &dyn Fn(&str)) -> Result<Value> {
    let web = stage.expose(&WEB, "web", Access::NodePort, V4)?;
    stage.create(&WEB)?;
    let clients = stage.connect(&web)?;
    let mut ended = stage.roll(&WEB).context("a roll")?;
    ensure!(ended.len() == 4, "{} of 4 pods were replaced", ended.len());
    ended.extend(stage.scale(&WEB, 2).context("scaling down")?);
    stage.scale(&WEB, 4).context("scaling up")?;
    ended.extend(stage.drain(&WEB, "node-2").context("a drain")?);
    let mut errors = Errors::default();
    compare::samples(stage, &WEB, &ended, &mut errors)?;
    let seen = clients.stop()?;
    let counted = compare::refused(stage, &ended)?;
    tell(&format!("rolled, scaled and drained: {}", errors.summary()));
    tell(&format!(
        "of {} connections {} were refused, {} lost; the agents counted {counted}",
        seen.attempts,
        seen.refused(),
        seen.lost
    ));
    ensure!(seen.refused() > 0, "the rules followed too soon to refuse anything");
    ensure!(u64::try_from(seen.refused())? == counted, "refused, clients and agents");
    Ok(web)
}

/// Ends that are samples, and ends that are none.
fn ends_of_every_kind(stage: &mut Stage, tell: &dyn Fn(&str)) -> Result<()> {
    let mut errors = Errors::default();
    stage.expose(&STATEFUL, "db", Access::Headless, V4)?;
    stage.expose(&STATEFUL, "db-read", Access::NodePort, V4)?;
    stage.create(&STATEFUL)?;
    let ended = stage.roll(&STATEFUL).context("the roll of a StatefulSet")?;
    compare::samples(stage, &STATEFUL, &ended, &mut errors).context("a StatefulSet")?;

    stage.expose(&MANY, "sticky", Access::ClientIp, V4)?;
    stage.expose(&MANY, "both", Access::NodePort, &Family::BOTH)?;
    stage.expose(&MANY, "bare", Access::Headless, V4)?;
    stage.create(&MANY)?;
    let ended = stage.roll(&MANY).context("the roll behind several Services")?;
    compare::samples(stage, &MANY, &ended, &mut errors).context("several Services")?;
    tell(&format!("a StatefulSet, and pods behind several Services: {}", errors.summary()));

    let forced = stage.delete_one(&MANY, &json!({"gracePeriodSeconds": 0})).context("by force")?;
    compare::no_samples(stage, &forced, "grace period of 0")?;
    stage.expose(&SINGLE, "single", Access::NodePort, V4)?;
    stage.create(&SINGLE)?;
    let alone = stage.roll(&SINGLE).context("the roll of a single replica")?;
    compare::no_samples(stage, &alone, "no other endpoint")?;
    for (workload, wanted) in [(&MANY, MANY.replicas), (&SINGLE, 0)] {
        let report = stage.report(workload)?;
        let samples = &report["recommendation"]["samples"];
        ensure!(*samples == wanted, "{samples} samples, not {wanted}: {report:#}");
    }
    tell("a forced deletion and the roll of a single replica are no samples");
    Ok(())
}

/// The recommendation is applied, and holds.
fn no_refusal_with_the_recommended_sleep(
    stage: &mut Stage,
    web: &Value,
    tell: &dyn Fn(&str),
) -> Result<()> {
    let seconds = agent::recommended_sleep(&stage.report(&WEB)?)?;
    stage.change(&WEB, &Workload::pre_stop_sleep(seconds)).context("applying the sleep")?;
    let clients = stage.connect(web)?;
    let ended = stage.roll(&WEB).context("the roll with the sleep")?;
    let mut errors = Errors::default();
    compare::samples(stage, &WEB, &ended, &mut errors)?;
    let seen = clients.stop()?;
    tell(&format!(
        "with the recommended preStop sleep of {seconds} s, of {} connections {} were refused: {}",
        seen.attempts,
        seen.refused(),
        errors.summary()
    ));
    ensure!(seen.refused() == 0 && seen.lost == 0, "connections failed: {seen:?}");
    Ok(())
}
