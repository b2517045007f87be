//! The agent where a termination is no sample.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
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
