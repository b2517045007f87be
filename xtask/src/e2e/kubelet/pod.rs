//! The life of one pod, on a thread of its own: start, restarts, end.
//!
//! Whatever happens comes as a note in one channel, so that nothing is missed while it waits for
//! something else.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::time::Duration;

use anyhow::{Context, Result};

use super::ending::final_phase;
use super::probe::Prober;
use super::sandbox::{Sandbox, remove_run};
use super::spec::{Deletion, Identity, PodSpec, RestartPolicy};
use super::status::{Phase, State, Status, Terminated};
use super::truth::Life;
use super::{Shared, is_gone, lock};
use crate::e2e::api::Patch;
use crate::lab::clock;
use crate::lab::container::{Container, Event, Exit, Process};
use crate::lab::kubelet::random_uuid;

/// Before the second restart, doubled for each further one: a kubelet with the feature gate
/// `ReduceDefaultCrashLoopBackOffDecay`. Without it they are 10 s and 300 s: a test would wait.
const FIRST_BACK_OFF: Duration = Duration::from_secs(1);
const LONGEST_BACK_OFF: Duration = Duration::from_mins(1);
/// How often a pod that waits for an address looks whether it is free.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// What a pod's thread is told.
#[derive(Debug)]
pub(super) enum Note {
    /// The watch shows a deletion request, since a moment.
    Deletion(Deletion, u64),
    /// The watch shows that the object is gone, since a moment.
    Vanished(u64),
    /// The process ended.
    Exited(Exit),
    /// The readiness of a run (by its number) changed.
    Ready(u32, bool),
    /// The kubelet stops.
    Stop,
}

/// Why a pod's life ends.
pub(super) enum End {
    /// On request, with the grace left from a moment on.
    Deleted(Deletion, u64),
    /// By force: there is no object any more, or soon not.
    Forced,
    Stopped,
}

/// A pod and all that belongs to it.
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) identity: Identity,
    pub(super) spec: PodSpec,
    pub(super) status: Status,
    teller: SyncSender<Note>,
    notes: Receiver<Note>,
    pub(super) sandbox: Option<Sandbox>,
    pub(super) container: Option<Arc<Container>>,
    pub(super) prober: Option<Prober>,
    /// Once it is to end: when SIGKILL is due.
    pub(super) kill_ns: u64,
    /// SIGTERM was sent.
    pub(super) asked: bool,
    /// Nobody is there to read its status.
    pub(super) gone: bool,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        identity: Identity,
        spec: PodSpec,
        teller: SyncSender<Note>,
        notes: Receiver<Note>,
    ) -> Self {
        let status = Status::new(shared.node().addresses, clock::wall_seconds());
        let life = Life {
            namespace: identity.namespace.clone(),
            name: identity.name.clone(),
            node: shared.node().name.to_owned(),
            port: spec.port,
            host_network: spec.host_network,
            ..Life::default()
        };
        lock(&shared.lives).insert(identity.uid.clone(), life);
        Self {
            shared,
            identity,
            spec,
            status,
            teller,
            notes,
            sandbox: None,
            container: None,
            prober: None,
            kill_ns: u64::MAX,
            asked: false,
            gone: false,
        }
    }

    /// From here to the removal of the object.
    pub(super) fn run(mut self) {
        let outcome = self.live().and_then(|end| self.end(&end));
        let cleared = self.clear();
        if let Err(error) = outcome.and(cleared) {
            let Identity { namespace, name, .. } = &self.identity;
            self.shared.fail(&error.context(format!("pod {namespace}/{name}")));
        }
    }

    fn live(&mut self) -> Result<End> {
        self.report()?;
        if let Some(end) = self.attach()? {
            return Ok(end);
        }
        self.start_container()?;
        let mut restart_ns = None;
        loop {
            match self.next(restart_ns.unwrap_or(u64::MAX)) {
                None => {
                    restart_ns = None;
                    self.restart()?;
                }
                Some(Note::Exited(exit)) => restart_ns = self.exited_alive(exit)?,
                Some(Note::Ready(run, ready)) => self.readiness(run, ready)?,
                Some(other) => {
                    if let Some(end) = end_by(&other) {
                        return Ok(end);
                    }
                }
            }
        }
    }

    /// The next note, or `None` at `until_ns`. Deletions are recorded when they are first read.
    pub(super) fn next(&mut self, until_ns: u64) -> Option<Note> {
        let left = Duration::from_nanos(until_ns.saturating_sub(clock::boot_ns()));
        let note = match self.notes.recv_timeout(left) {
            Ok(note) => note,
            Err(RecvTimeoutError::Timeout) => return None,
            // It holds a sender itself.
            Err(RecvTimeoutError::Disconnected) => Note::Stop,
        };
        match note {
            Note::Deletion(_, at_ns) => self.record(|life| {
                life.deletion_seen_ns.get_or_insert(at_ns);
            }),
            Note::Vanished(at_ns) => {
                self.gone = true;
                self.record(|life| life.vanished_seen_ns = Some(at_ns));
            }
            Note::Exited(_) | Note::Ready(..) | Note::Stop => {}
        }
        Some(note)
    }

    /// Gives it its place; waits for the address that it asks for, unless its life ends before.
    fn attach(&mut self) -> Result<Option<End>> {
        loop {
            if let Some(sandbox) = Sandbox::make(&self.shared, &self.identity, &self.spec)? {
                let addresses = Some(sandbox.addresses);
                self.record(|life| life.addresses = addresses);
                self.status.addresses = addresses;
                self.sandbox = Some(sandbox);
                return Ok(None);
            }
            let note = self.next(clock::boot_ns() + clock::nanos(LOOK_AGAIN));
            if let Some(end) = note.as_ref().and_then(end_by) {
                return Ok(Some(end));
            }
        }
    }

    fn start_container(&mut self) -> Result<()> {
        let sandbox = self.sandbox.as_ref().context("a pod without a place")?;
        let id = format!("{}{}", random_uuid()?, random_uuid()?).replace('-', "");
        let (started_ns, restarts) = (clock::boot_ns(), self.status.restarts);
        self.record(|life| life.begin_run(started_ns, restarts));
        let layout = self.shared.options.cgroup_layout;
        let process = Process {
            program: &self.shared.options.pod_program,
            cgroup: &sandbox.run(layout, &id),
            namespace: &sandbox.namespace,
            name: &self.identity.name,
            port: self.spec.port,
            behaviour: self.spec.behaviour,
        };
        let (shared, uid) = (Arc::clone(&self.shared), self.identity.uid.clone());
        let teller = self.teller.clone();
        let container = Container::start(&process, move |event| {
            if let Some(life) = lock(&shared.lives).get_mut(&uid) {
                life.enter(event);
            }
            if let Event::Exited(_, exit) = event {
                // A pod whose life is over needs no telling.
                teller.send(Note::Exited(exit)).ok();
            }
        })?;
        let pid = container.pid();
        self.record(|life| life.pid = pid);
        lock(&self.shared.containers).insert(self.identity.uid.clone(), Arc::clone(&container));
        if let Some(delay) = self.spec.crash_after {
            crash_later(Arc::clone(&container), started_ns + clock::nanos(delay));
        }
        self.container = Some(container);
        self.status.container_id = Some(id);
        self.status.phase = Phase::Running;
        self.status.state = State::Running { since: clock::wall_seconds() };
        self.status.ready = self.spec.probe.is_none();
        self.start_probes();
        self.report()
    }

    fn start_probes(&mut self) {
        let (Some(probe), Some(addresses)) = (&self.spec.probe, self.status.addresses) else {
            return;
        };
        let (teller, run) = (self.teller.clone(), self.status.restarts);
        let tell = move |ready| {
            // A pod whose life is over needs no telling.
            teller.send(Note::Ready(run, ready)).ok();
        };
        let node = &self.shared.node().namespace;
        self.prober = Some(Prober::start(node, addresses.v4.into(), probe.clone(), tell));
    }

    fn restart(&mut self) -> Result<()> {
        if let State::Terminated(last) = &self.status.state {
            self.status.last = Some(last.clone());
        }
        self.status.restarts += 1;
        self.start_container()
    }

    /// The process ended though nobody asked it to; returns when to start it again.
    fn exited_alive(&mut self, exit: Exit) -> Result<Option<u64>> {
        let terminated = self.exited(exit);
        if let (Some(sandbox), Some(id)) = (&self.sandbox, &self.status.container_id) {
            remove_run(&sandbox.run(self.shared.options.cgroup_layout, id))?;
        }
        let again = match self.spec.restart {
            RestartPolicy::Always => true,
            RestartPolicy::OnFailure => !terminated.succeeded(),
            RestartPolicy::Never => false,
        };
        let pause = back_off(self.status.restarts);
        if !again {
            self.status.phase = final_phase(&terminated);
            self.detach()?;
        } else if !pause.is_zero() {
            self.status.last = Some(terminated);
            let message = format!("back-off {}s restarting failed container", pause.as_secs());
            self.status.state = State::Waiting { reason: "CrashLoopBackOff", message };
        }
        self.report()?;
        Ok(again.then(|| clock::boot_ns() + clock::nanos(pause)))
    }

    /// Enters the end of the process into the status.
    pub(super) fn exited(&mut self, exit: Exit) -> Terminated {
        self.prober = None;
        lock(&self.shared.containers).remove(&self.identity.uid);
        let now = clock::wall_seconds();
        let started = match self.status.state {
            State::Running { since } => since,
            _ => now,
        };
        let id = self.status.container_id.as_deref().unwrap_or_default();
        let terminated = Terminated::new(exit, started, now, id);
        self.status.state = State::Terminated(terminated.clone());
        self.status.ready = false;
        terminated
    }

    pub(super) fn readiness(&mut self, run: u32, ready: bool) -> Result<()> {
        if run != self.status.restarts || !self.is_running() {
            return Ok(());
        }
        self.status.ready = ready;
        self.report()
    }

    pub(super) fn is_running(&self) -> bool {
        matches!(self.status.state, State::Running { .. })
    }

    /// Writes the status, unless the object is gone.
    pub(super) fn report(&mut self) -> Result<()> {
        if self.gone {
            return Ok(());
        }
        let patch = self.status.patch(&self.identity, &self.spec, clock::wall_seconds());
        let status = format!("{}/status", self.identity.path());
        match self.shared.options.api.patch(&status, Patch::Strategic, &patch) {
            Err(error) if is_gone(&error) => self.gone = true,
            outcome => {
                outcome?;
            }
        }
        Ok(())
    }

    pub(super) fn record(&self, entry: impl FnOnce(&mut Life)) {
        if let Some(life) = lock(&self.shared.lives).get_mut(&self.identity.uid) {
            entry(life);
        }
    }
}

fn end_by(note: &Note) -> Option<End> {
    match *note {
        Note::Deletion(deletion, _) if deletion.grace.is_zero() => Some(End::Forced),
        Note::Deletion(deletion, at_ns) => Some(End::Deleted(deletion, at_ns)),
        Note::Vanished(_) => Some(End::Forced),
        Note::Stop => Some(End::Stopped),
        Note::Exited(_) | Note::Ready(..) => None,
    }
}

/// The pause before the next restart: the first comes at once.
fn back_off(restarts: u32) -> Duration {
    let Some(doublings) = restarts.checked_sub(1) else { return Duration::ZERO };
    let factor = 2_u32.checked_pow(doublings).unwrap_or(u32::MAX);
    FIRST_BACK_OFF.saturating_mul(factor).min(LONGEST_BACK_OFF)
}

/// The process exits by itself, unless it has ended by then.
fn crash_later(container: Arc<Container>, at_ns: u64) {
    std::thread::spawn(move || {
        if !container.wait_for_end(at_ns) {
            // It may end just now.
            container.command("crash").ok();
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deletion_without_grace_is_a_forced_one() {
        let deletion =
            |seconds| Note::Deletion(Deletion { grace: Duration::from_secs(seconds) }, 1);
        assert!(matches!(end_by(&deletion(0)), Some(End::Forced)));
        assert!(matches!(end_by(&deletion(1)), Some(End::Deleted(_, 1))));
        assert!(matches!(end_by(&Note::Vanished(1)), Some(End::Forced)));
        assert!(end_by(&Note::Exited(Exit::Code(0))).is_none());
    }

    #[test]
    fn the_first_restart_comes_at_once_and_the_others_later_and_later() {
        let seconds = [0, 1, 2, 3, 7, 8, 40].map(|restarts| back_off(restarts).as_secs());
        assert_eq!(seconds, [0, 1, 2, 4, 60, 60, 60]);
    }
}
