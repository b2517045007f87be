//! The agent where a termination is no sample.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use xtask::lab::api::Gone;
use xtask::lab::clock::{boot_ns, nanos};
use xtask::lab::network::Family;
use xtask::lab::rules::Dataplane;
use xtask::lab::{Lab, Options, PodPlan};

#[test]
fn a_forced_delete_is_seen_and_is_no_sample() -> Result<()> {
    let program = PathBuf::from(env!("CARGO_BIN_EXE_xtask"));
    let lab = Lab::build(Options {
        pod_program: program.clone(),
        dataplane: Dataplane::Nftables,
        slice_delay: Duration::from_millis(10),
        rules_delay: Duration::ZERO,
    })?;
    lab.add_service("web", "web", &[Family::V4])?;
    let agent = lab.start_agent(&Path::new(&program).with_file_name("observer"))?;
    let stays = lab.start_pod(&PodPlan::of("web"))?;
    let forced = lab.start_pod(&PodPlan::of("web"))?;
    lab.wait_for_backends(&[Family::V4], &[stays.clone(), forced.clone()])?;
    lab.force_delete_pod(&forced).wait()?;
    lab.wait_for_backends(&[Family::V4], &[stays])?;

    let measured = &agent.closed(&[forced.uid])?[0];
    let censored = measured["censored"].to_string();
    ensure!(censored.contains("grace period of 0"), "{measured:#}");
    ensure!(measured["instants"]["sigterm"].is_object(), "{measured:#}");
    let report = agent.report("table")?;
    ensure!(report.contains("1 censored, not counted"), "{report}");
    agent.stop()
}

/// Long enough for a pod to end meanwhile, and for the agent to try again in vain.
const OUTAGE: Duration = Duration::from_secs(8);
const SOON: Duration = Duration::from_secs(30);

/// The API server goes while a pod ends, and comes back without the history that was missed.
#[test]
fn an_outage_of_the_api_server_censors_what_it_overlaps_and_nothing_else() -> Result<()> {
    let program = PathBuf::from(env!("CARGO_BIN_EXE_xtask"));
    let lab = Lab::build(Options {
        pod_program: program.clone(),
        dataplane: Dataplane::Nftables,
        slice_delay: Duration::from_millis(10),
        rules_delay: Duration::ZERO,
    })?;
    lab.add_service("web", "web", &[Family::V4])?;
    let agent = lab.start_agent(&Path::new(&program).with_file_name("observer"))?;
    let pods = (0..4).map(|_| lab.start_pod(&PodPlan::of("web"))).collect::<Result<Vec<_>>>()?;
    lab.wait_for_backends(&[Family::V4], &pods)?;
    let before = lab.api().served();
    ensure!((before.watches, before.open_watches) == (2, 2), "two watches: {before:?}");

    lab.delete_pod(&pods[0]).wait()?;
    agent.closed(&[pods[0].uid.clone()])?;
    let during = lab.delete_pod(&pods[1]);
    lab.api().stop();
    during.wait()?;
    std::thread::sleep(OUTAGE);
    let error = format!("{:#}", agent.get("/readyz").err().context("ready without an API server")?);
    ensure!(error.contains("pod watch") && error.contains("endpointslice watch"), "{error}");
    lab.api().expire_watches(Gone::Status);
    lab.api().start()?;
    wait_until(|| agent.get("/readyz").is_ok())?;
    // Events right after a watch is back may still be of the outage.
    std::thread::sleep(Duration::from_secs(2));
    lab.delete_pod(&pods[2]).wait()?;

    let uids: Vec<String> = pods[..3].iter().map(|pod| pod.uid.clone()).collect();
    let measured = agent.closed(&uids)?;
    let censored: Vec<bool> =
        measured.iter().map(|one| one["censored"] != serde_json::json!([])).collect();
    ensure!(censored == [false, true, false], "{measured:#?}");
    let after = lab.api().served();
    ensure!(after.open_watches == 2, "two watches again: {after:?}");
    ensure!(after.watches <= 8, "no busy loop: {after:?}");
    ensure!(agent.terminations()?.len() == 3, "every termination once");
    let pages = after.pages;
    lab.delete_pod(&pods[3]).wait()?;
    ensure!(lab.api().served().pages == pages, "nothing is polled");
    agent.stop()
}

fn wait_until(done: impl Fn() -> bool) -> Result<()> {
    let until_ns = boot_ns() + nanos(SOON);
    while !done() {
        ensure!(boot_ns() < until_ns, "not within {SOON:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
