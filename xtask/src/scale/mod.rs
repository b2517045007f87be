//! `cargo xtask bench cluster`: what an agent takes on a node of a large cluster.
//!
//! In the lab: the API server serves a generated cluster's EndpointSlices, the node has the rules of
//! all its Services as kube-proxy writes them, and both follow pods that are replaced all the time. The
//! agent is the optimised build, unchanged. It fails when a figure misses its bound.

mod churn;
mod plan;
mod process;
mod report;

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, BufWriter, Write as _};
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::lab::agent::Agent;
use crate::lab::api::Served;
use crate::lab::network::Family;
use crate::lab::rules::{Dataplane, Sync};
use crate::lab::store::Kind;
use crate::lab::{Lab, Options, clock};
use crate::step::say;

use churn::Churn;
use plan::Plan;
use process::Memory;

/// What writes the rules: one table for all, which the tool takes in at once.
const DATAPLANE: Dataplane = Dataplane::Nftables;
/// How long changes go on: long enough for CPU to the tenth of a percent.
const CHURN: Duration = Duration::from_mins(1);
const CHANGES_PER_SECOND: u32 = 50;
/// kube-proxy's `--iptables-min-sync-period` and its like.
const SYNC: Duration = Duration::from_secs(1);

/// A size of cluster, and what an agent may take there.
struct Size {
    name: &'static str,
    plan: Plan,
    /// What may be resident at any time.
    resident_mb: u64,
    /// Whether time and CPU are bounded too.
    large: bool,
}

const SIZES: [Size; 2] = [
    Size {
        name: "1,000 Services, 5,000 endpoints",
        plan: Plan { nodes: 200, services: 1_000, endpoints: 5_000 },
        resident_mb: 40,
        large: false,
    },
    Size {
        name: "10,000 Services, 150,000 endpoints",
        plan: Plan { nodes: 5_000, services: 10_000, endpoints: 150_000 },
        resident_mb: 150,
        large: true,
    },
];

/// What was measured at one size.
struct Figures {
    slices: usize,
    ready_seconds: f64,
    synced: (Memory, Served),
    churned: (Memory, Served),
    sync_cpu: Duration,
    cpu_percent: f64,
}

/// Measures all sizes with the agent `observer`; prints a table, and writes it to `save`.
///
/// # Errors
/// When a figure misses its bound, or something fails on the way.
pub fn run(observer: &Path, save: Option<&Path>) -> Result<()> {
    let mut table = String::from("| figure | bound | measured | |\n| --- | --- | --- | --- |\n");
    let mut missed = 0;
    for size in &SIZES {
        say(&format!("{}: some minutes", size.name));
        let figures = measure(observer, size.plan).context(size.name)?;
        missed += report::add(&mut table, size, &figures)?;
    }
    writeln!(std::io::stdout().lock(), "{table}")?;
    if let Some(file) = save {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let document = include_str!("document.md")
            .replace("DATE", &clock::rfc3339(clock::wall_seconds())[..10])
            .replace("KERNEL", kernel.trim())
            .replace("TABLE\n", &table);
        fs::write(file, document).with_context(|| format!("cannot write {}", file.display()))?;
    }
    ensure!(missed == 0, "{missed} figures miss their bounds");
    Ok(())
}

fn measure(observer: &Path, plan: Plan) -> Result<Figures> {
    let lab = Lab::build(Options {
        pod_program: std::env::current_exe().context("where is this program?")?,
        dataplane: DATAPLANE,
        slice_delay: Duration::ZERO,
        rules_delay: Duration::ZERO,
    })?;
    let slices = plan.slices();
    let count = slices.len();
    let file = tempfile::NamedTempFile::new().context("no temporary file for the cluster")?;
    write_cluster(file.path(), plan, &slices)?;
    serve_cluster(file.path(), &lab)?;
    let mut churn = Churn::new(plan, slices);
    write_rules(&lab, &churn.first_sync())?;
    let began_ns = clock::boot_ns();
    let agent = lab.start_agent(observer)?;
    let ready_seconds = clock::seconds_between(began_ns, clock::boot_ns());
    let sync_cpu = agent.cpu_time()?;
    let synced = (process::memory(agent.pid())?, lab.api().served());
    let cpu_percent = follow(&lab, &agent, &mut churn)?;
    let churned = (process::memory(agent.pid())?, lab.api().served());
    agent.get("/readyz").context("the agent did not keep up")?;
    agent.stop()?;
    Ok(Figures { slices: count, ready_seconds, synced, churned, sync_cpu, cpu_percent })
}

/// The cluster as a file: one object on each line.
fn write_cluster(path: &Path, plan: Plan, slices: &[plan::Slice]) -> Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    for object in plan.pods(slices) {
        writeln!(file, "{object}")?;
    }
    for slice in slices {
        writeln!(file, "{}", plan.slice_object(slice))?;
    }
    file.flush().context("cannot write the cluster")
}

fn serve_cluster(path: &Path, lab: &Lab) -> Result<()> {
    for line in BufReader::new(File::open(path)?).lines() {
        let object: Value = serde_json::from_str(&line?)?;
        let kind = if object["kind"] == "Pod" { Kind::Pod } else { Kind::EndpointSlice };
        lab.api().change(|store| store.put(kind, object));
    }
    Ok(())
}

/// kube-proxy's rules for these Services. That a pod may connect to itself is left out: it concerns
/// the node's own pods only, and the lab takes every pod for one.
fn write_rules(lab: &Lab, sync: &Sync) -> Result<()> {
    let rules = DATAPLANE.sync(Family::V4, sync);
    let lines = rules.lines().filter(|line| !line.contains("hairpin-connections"));
    let rules: String = lines.flat_map(|line| [line, "\n"]).collect();
    lab.write_rules(DATAPLANE, &rules).context("cannot write the node's rules")
}

/// Changes the cluster and the rules for [`CHURN`]; the agent's CPU meanwhile, in percent of a core.
fn follow(lab: &Lab, agent: &Agent, churn: &mut Churn) -> Result<f64> {
    // One sync may wait while the tool writes another.
    let (syncs, due) = sync_channel::<Sync>(1);
    std::thread::scope(|scope| {
        let proxy = scope.spawn(move || due.iter().try_for_each(|sync| write_rules(lab, &sync)));
        let (began_ns, before) = (clock::boot_ns(), agent.cpu_time()?);
        let pause_ns = clock::nanos(Duration::from_secs(1)) / u64::from(CHANGES_PER_SECOND);
        let changes = CHURN.as_secs() * u64::from(CHANGES_PER_SECOND);
        let per_sync = SYNC.as_secs() * u64::from(CHANGES_PER_SECOND);
        for change in 1..=changes {
            churn.change(lab.api())?;
            if change % per_sync == 0 && syncs.send(churn.next_sync()).is_err() {
                break;
            }
            clock::sleep_until(began_ns + change * pause_ns);
        }
        drop(syncs);
        let spent = agent.cpu_time()?.saturating_sub(before);
        let seconds = clock::seconds_between(began_ns, clock::boot_ns());
        proxy.join().map_err(|_panic| anyhow::anyhow!("the thread of the rules panicked"))??;
        Ok(100.0 * spent.as_secs_f64() / seconds)
    })
}
