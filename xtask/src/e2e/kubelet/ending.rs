//! The end of a pod's life: asked to stop, killed when it does not, removed.

use anyhow::{Result, bail};
use nix::sys::signal::Signal;

use super::lock;
use super::pod::{End, Note, Worker};
use super::spec::Deletion;
use super::status::{Phase, State, Terminated};
use crate::lab::clock;
use crate::lab::kubelet::{
    FORCED_GRACE, LEAST_GRACE, REACTION, REMOVAL_PAUSE, SIGKILL_LIMIT, STATUS_PAUSE,
};

impl Worker {
    pub(super) fn end(&mut self, end: &End) -> Result<()> {
        match *end {
            End::Deleted(deletion, seen_ns) => self.terminate(deletion, seen_ns),
            End::Forced => {
                std::thread::sleep(REACTION);
                self.kill_ns = clock::boot_ns() + clock::nanos(FORCED_GRACE);
                self.stop_container()
            }
            End::Stopped => Ok(()),
        }
    }

    /// The recorded order: preStop, SIGTERM, SIGKILL; the place goes, then the final status is
    /// written, then the object is removed.
    fn terminate(&mut self, deletion: Deletion, seen_ns: u64) -> Result<()> {
        self.kill_ns = seen_ns.saturating_add(clock::nanos(deletion.grace));
        std::thread::sleep(REACTION);
        if self.is_running() && !self.spec.pre_stop_sleep.is_zero() {
            let over_ns = clock::boot_ns() + clock::nanos(self.spec.pre_stop_sleep);
            self.pass(|worker| over_ns.min(worker.kill_ns))?;
        }
        let least = if self.gone { FORCED_GRACE } else { LEAST_GRACE };
        self.kill_ns = self.kill_ns.max(clock::boot_ns() + clock::nanos(least));
        self.stop_container()?;
        self.detach()?;
        std::thread::sleep(STATUS_PAUSE);
        if let State::Waiting { .. } = self.status.state
            && let Some(last) = self.status.last.clone()
        {
            // It was to be started again.
            self.status.state = State::Terminated(last);
        }
        self.status.phase = match &self.status.state {
            State::Terminated(terminated) => final_phase(terminated),
            // It never ran.
            State::Waiting { .. } | State::Running { .. } => Phase::Failed,
        };
        self.report()?;
        std::thread::sleep(REMOVAL_PAUSE);
        if self.gone { Ok(()) } else { self.shared.remove(&self.identity) }
    }

    /// SIGTERM, and SIGKILL when it is due.
    fn stop_container(&mut self) -> Result<()> {
        let Some(container) = self.container.clone() else { return Ok(()) };
        if self.is_running() {
            let sent_ns = clock::boot_ns();
            self.record(|life| life.sigterm_sent_ns = Some(sent_ns));
            self.asked = true;
            container.signal(Signal::SIGTERM);
            self.pass(|worker| if worker.is_running() { worker.kill_ns } else { 0 })?;
        }
        if self.is_running() {
            let sent_ns = clock::boot_ns();
            self.record(|life| life.sigkill_sent_ns = Some(sent_ns));
            container.signal(Signal::SIGKILL);
            let limit_ns = sent_ns + clock::nanos(SIGKILL_LIMIT);
            self.pass(|worker| if worker.is_running() { limit_ns } else { 0 })?;
        }
        if self.is_running() {
            bail!("its process does not end by SIGKILL");
        }
        Ok(())
    }

    /// Takes notes until `until_ns` of itself, which each note can change.
    fn pass(&mut self, until_ns: impl Fn(&Self) -> u64) -> Result<()> {
        while let Some(note) = self.next(until_ns(self)) {
            match note {
                Note::Exited(exit) => {
                    self.exited(exit);
                    // The end that was asked for is written with the final phase.
                    if !self.asked {
                        self.report()?;
                    }
                }
                Note::Ready(run, ready) => self.readiness(run, ready)?,
                // A later request can only shorten the grace.
                Note::Deletion(deletion, at_ns) => {
                    let grace = deletion.grace.max(FORCED_GRACE);
                    let kill_ns = at_ns.saturating_add(clock::nanos(grace));
                    self.kill_ns = self.kill_ns.min(kill_ns);
                }
                Note::Vanished(at_ns) => {
                    self.kill_ns = self.kill_ns.min(at_ns + clock::nanos(FORCED_GRACE));
                }
                Note::Stop => self.kill_ns = 0,
            }
        }
        Ok(())
    }

    /// Gives its place back, once its process is gone.
    pub(super) fn detach(&mut self) -> Result<()> {
        self.prober = None;
        if let Some(container) = self.container.take()
            && !container.wait_for_end(clock::boot_ns() + clock::nanos(SIGKILL_LIMIT))
        {
            bail!("its process does not end");
        }
        if let Some(sandbox) = self.sandbox.take() {
            let owned = sandbox.owns_addresses();
            sandbox.remove(&self.shared)?;
            let free_ns = clock::boot_ns();
            self.record(|life| life.address_free_ns = owned.then_some(free_ns));
        }
        Ok(())
    }

    /// Whatever ended its life: no process stays.
    pub(super) fn clear(&mut self) -> Result<()> {
        lock(&self.shared.containers).remove(&self.identity.uid);
        if let Some(container) = &self.container {
            container.signal(Signal::SIGKILL);
        }
        self.detach()
    }
}

/// The phase of a pod whose last run is over.
pub(super) fn final_phase(terminated: &Terminated) -> Phase {
    if terminated.succeeded() { Phase::Succeeded } else { Phase::Failed }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::container::Exit;

    #[test]
    fn only_an_exit_code_of_zero_is_a_success() {
        let phase = |exit| final_phase(&Terminated::new(exit, 1, 2, "id"));
        assert_eq!(phase(Exit::Code(0)), Phase::Succeeded);
        assert_eq!(phase(Exit::Code(1)), Phase::Failed);
        assert_eq!(phase(Exit::Killed(Signal::SIGKILL)), Phase::Failed);
        assert_eq!(phase(Exit::Unknown), Phase::Failed);
    }
}
