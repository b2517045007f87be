//! The code under test: a follower of one place's rules, its cost and its answers.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use observer::clock;
use observer::dataplane::{Counters, Settings, Update, run};
use observer::facts::{BackendStep, BootNs};
use tokio::sync::mpsc;

use crate::memory;
use crate::place::{Place, own_cpu};
use crate::rules;
use crate::threads::Threads;
use crate::witness::Witness;

/// Nothing here takes longer; it ends a wait that would never end.
const PATIENCE: Duration = Duration::from_mins(1);
/// Updates that may wait; a start sends two.
const UPDATES: usize = 1024;

/// A running follower.
pub(crate) struct Followed {
    updates: Receiver<(BootNs, Update)>,
    threads: Threads,
    witness: Witness,
    pub(crate) counters: Arc<Counters>,
    pub(crate) start: Start,
}

/// What starting took.
#[derive(Clone, Copy)]
pub(crate) struct Start {
    pub(crate) elapsed: Duration,
    pub(crate) cpu: Duration,
    /// Heap that the model keeps.
    pub(crate) kept_bytes: usize,
    /// The most heap while it was read.
    pub(crate) peak_bytes: usize,
}

/// One commit.
#[derive(Clone, Copy)]
pub(crate) struct Sample {
    /// From the last message's delivery to the report; 0 when the report came first.
    pub(crate) known_after: Duration,
    pub(crate) cpu: Duration,
}

impl Followed {
    /// Starts it in a place, which has to show so many Services.
    pub(crate) fn start(place: &Place, services: usize) -> Result<Self> {
        place.enter()?;
        let witness = Witness::start()?;
        let counters = Arc::new(Counters::default());
        let settings = Settings { counters: counters.clone(), ..Settings::default() };
        let (updates_in, mut updates_out) = mpsc::channel(UPDATES);
        let (stamped_in, stamped) = sync_channel(UPDATES);
        thread::Builder::new().name("receiver".to_owned()).spawn(move || {
            while let Some(update) = updates_out.blocking_recv() {
                if stamped_in.send((clock::now(), update)).is_err() {
                    return;
                }
            }
        })?;
        let others = Threads::of_this_process()?;
        let heap_before = memory::in_use_bytes();
        memory::take_peak_bytes();
        let (began, cpu_before) = (clock::now(), own_cpu()?);
        thread::Builder::new().name("follower".to_owned()).spawn(move || {
            let (_legacy, signals) = mpsc::channel(1);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(run(settings, signals, updates_in))
        })?;
        let (at, present) =
            stamped.recv_timeout(PATIENCE).context("no answer from the follower")?;
        let Update::Present { backends, .. } = present else {
            bail!("what is present comes first")
        };
        let (found, expected) = (backends.len(), services * rules::BACKENDS);
        ensure!(found == expected, "{found} of {expected} backends were read");
        drop(backends);
        let mut threads = Threads::of_this_process()?.without(&others);
        threads.cpu_at_rest();
        let start = Start {
            elapsed: at.since(began),
            cpu: own_cpu()?.saturating_sub(cpu_before),
            kept_bytes: memory::in_use_bytes().saturating_sub(heap_before),
            peak_bytes: memory::take_peak_bytes().saturating_sub(heap_before),
        };
        Ok(Self { updates: stamped, threads, witness, counters, start })
    }

    /// Runs `commit`, which removes or adds the first backend of a Service, and waits for the report.
    pub(crate) fn measure(
        &mut self,
        service: usize,
        step: BackendStep,
        commit: impl FnOnce() -> Result<()>,
    ) -> Result<Sample> {
        let cpu_before = self.threads.cpu_at_rest();
        self.witness.forget();
        commit()?;
        let known_at = loop {
            let (at, update) =
                self.updates.recv_timeout(PATIENCE).context("the change was not reported")?;
            if let Update::Change(change) = update {
                let expected = rules::pod(service, 0);
                ensure!(
                    (change.backend.address, change.step) == (expected.into(), step),
                    "{change:?}, not {step:?} {expected}"
                );
                break at;
            }
        };
        let cpu = self.threads.cpu_at_rest().saturating_sub(cpu_before);
        Ok(Sample { known_after: known_at.since(self.witness.delivered_at()?), cpu })
    }
}
