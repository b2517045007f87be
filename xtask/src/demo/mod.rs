//! `cargo xtask demo`: the question and its answer on one machine, in less than 90 seconds.
//!
//! A Service of three pods is rolled under load while the rules follow late: first without a
//! preStop sleep, then with the one that the agent's report recommends. Everything printed is what
//! the agent measured, except the refusals, which the clients counted. It fails when the first roll
//! refused nobody (nothing was shown) or the second did.

mod waterfall;

use std::fs::Metadata;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::lab::load::{Attempt, Outcome};
use crate::lab::network::{Family, Place};
use crate::lab::rules::Dataplane;
use crate::lab::{Lab, Options, PodPlan, RunningPod};

/// Between a quiet small cluster (tens of ms) and a large busy one (5 to 27 s).
const RULES_DELAY: Duration = Duration::from_millis(1500);
const SLICE_DELAY: Duration = Duration::from_millis(10);
const PODS: usize = 3;
const CONNECTS_PER_SECOND: u32 = 200;
const CLIENT_THREADS: u32 = 4;

/// Arguments of `cargo xtask demo`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// What writes the node's rules
    #[arg(long, value_enum, default_value_t = Dataplane::Nftables)]
    dataplane: Dataplane,
    /// The agent to run [default: `observer` beside this program]
    #[arg(long, value_name = "FILE", value_parser = program)]
    observer: Option<PathBuf>,
}

/// Checked with the command line: what builds and lays out the lab takes a while.
fn program(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    let runs = |file: &Metadata| file.is_file() && file.permissions().mode() & 0o111 != 0;
    match path.metadata() {
        Ok(file) if runs(&file) => Ok(path),
        Ok(_) => Err("not a program".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Runs the demo; removes everything it made, whatever happens.
///
/// # Errors
/// When nobody was refused before, anybody after, or something fails on the way.
pub fn run(args: &Args) -> Result<()> {
    let this_program = std::env::current_exe().context("where is this program?")?;
    let observer = args.observer.clone().unwrap_or_else(|| this_program.with_file_name("observer"));
    let out = &mut std::io::stdout().lock();
    let name = args.dataplane.name();
    writeln!(
        out,
        "A node with {name} rules, a Service of {PODS} pods, {CONNECTS_PER_SECOND} connections a second."
    )?;
    let lab = Lab::build(Options {
        pod_program: this_program,
        dataplane: args.dataplane,
        slice_delay: SLICE_DELAY,
        rules_delay: Duration::ZERO,
    })?;
    lab.add_service("web", "web", &[Family::V4])?;
    let agent = lab.start_agent(&observer)?;
    let mut deployment = Deployment { lab: &lab, pods: Vec::new() };
    deployment.replace_quietly(None)?;

    let late = RULES_DELAY.as_secs_f64();
    writeln!(out, "Rolling all pods; the rules follow {late} s late; no preStop sleep ...")?;
    let (uids, before) = deployment.roll_under_load(None)?;
    let measured = agent.closed(&uids)?;
    let refused_before = refused(&before);
    let worst = measured.iter().max_by_key(|measured| measured["refused"].as_u64());
    writeln!(out, "\n{}", waterfall::render(worst.context("no termination was measured")?))?;
    writeln!(out, "{}", agent.report("table")?)?;

    let sleep_seconds = agent.recommended_sleep()?;
    deployment.replace_quietly(Some(sleep_seconds))?;
    writeln!(out, "Rolling all pods again; preStop sleep {sleep_seconds} s, as recommended ...")?;
    let (_, after) = deployment.roll_under_load(Some(sleep_seconds))?;
    let refused_after = refused(&after);
    agent.stop()?;

    writeln!(out, "\nrefused before: {refused_before:>5} of {} connections", before.len())?;
    writeln!(out, "refused after:  {refused_after:>5} of {} connections", after.len())?;
    ensure!(refused_before > 0, "nobody was refused before: there was nothing to show");
    ensure!(refused_after == 0, "{refused_after} connections were refused after");
    Ok(())
}

/// The pods of the Deployment `web`.
struct Deployment<'lab> {
    lab: &'lab Lab,
    pods: Vec<RunningPod>,
}

impl Deployment<'_> {
    /// Replaces all pods at once, with the rules following at once and nobody connecting.
    fn replace_quietly(&mut self, sleep_seconds: Option<u64>) -> Result<()> {
        self.lab.set_rules_delay(Duration::ZERO);
        let old = std::mem::take(&mut self.pods);
        for _ in 0..PODS {
            self.pods.push(self.lab.start_pod(&plan(sleep_seconds))?);
        }
        let terminations: Vec<_> = old.iter().map(|pod| self.lab.delete_pod(pod)).collect();
        for termination in terminations {
            termination.wait()?;
        }
        self.lab.wait_for_backends(&[Family::V4], &self.pods)?;
        self.lab.set_rules_delay(RULES_DELAY);
        Ok(())
    }

    /// A rolling update, one pod after the other, each new pod in the rules before the next is
    /// taken; returns the UIDs of the replaced pods and what the clients saw.
    fn roll_under_load(&mut self, sleep: Option<u64>) -> Result<(Vec<String>, Vec<Attempt>)> {
        let target = self.lab.service_address("web", Family::V4)?;
        let load = self.lab.start_load(Place::Client, target, CONNECTS_PER_SECOND, CLIENT_THREADS);
        let mut uids = Vec::new();
        for _ in 0..PODS {
            let old = self.pods.remove(0);
            self.pods.push(self.lab.start_pod(&plan(sleep))?);
            self.lab.delete_pod(&old).wait()?;
            self.lab.wait_for_backends(&[Family::V4], &self.pods)?;
            uids.push(old.uid);
        }
        Ok((uids, load.stop()?))
    }
}

fn plan(pre_stop_sleep_seconds: Option<u64>) -> PodPlan {
    PodPlan { pre_stop_sleep_seconds, ..PodPlan::of("web") }
}

fn refused(attempts: &[Attempt]) -> usize {
    attempts.iter().filter(|attempt| attempt.outcome == Outcome::Refused).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_observer_that_is_none_is_refused_with_the_command_line() {
        program("/no/such/file").expect_err("it is missing");
        program("/etc/passwd").expect_err("it does not run");
        program("/etc").expect_err("it is a directory");
        assert_eq!(program("/bin/sh"), Ok(PathBuf::from("/bin/sh")));
    }
}
