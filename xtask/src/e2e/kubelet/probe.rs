//! Readiness: connects to a pod's port from the node, again and again, and says when the outcome
//! has changed for good.

use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use super::spec::Probe;
use crate::lab::netns::Namespace;

/// Counts outcomes in a row against the thresholds.
#[derive(Debug, Default)]
struct Judge {
    ready: bool,
    /// Outcomes in a row that contradict it.
    against: u64,
}

impl Judge {
    /// Returns the new readiness when this outcome changes it.
    fn hear(&mut self, probe: &Probe, success: bool) -> Option<bool> {
        if success == self.ready {
            self.against = 0;
            return None;
        }
        self.against += 1;
        let threshold = if success { probe.success_threshold } else { probe.failure_threshold };
        if self.against < threshold {
            return None;
        }
        *self = Self { ready: success, against: 0 };
        Some(success)
    }
}

/// Probes of one run of a container. Dropping it ends them.
#[derive(Debug)]
pub(super) struct Prober {
    _alive: SyncSender<()>,
}

impl Prober {
    /// Probes `address` from the node; `tell` is told each change, first when it becomes ready.
    pub(super) fn start(
        node: &Namespace,
        address: std::net::IpAddr,
        probe: Probe,
        tell: impl FnMut(bool) + Send + 'static,
    ) -> Self {
        let (alive, ended) = sync_channel(0);
        node.thread(move || run(SocketAddr::new(address, probe.port), &probe, &ended, tell));
        Self { _alive: alive }
    }
}

fn run(target: SocketAddr, probe: &Probe, ended: &Receiver<()>, mut tell: impl FnMut(bool)) {
    let mut judge = Judge::default();
    let mut pause = probe.initial_delay;
    while is_wanted_after(ended, pause) {
        let success = TcpStream::connect_timeout(&target, probe.timeout).is_ok();
        if let Some(ready) = judge.hear(probe, success) {
            tell(ready);
        }
        pause = probe.period;
    }
}

/// Waits; returns whether the pod is still there.
fn is_wanted_after(ended: &Receiver<()>, pause: Duration) -> bool {
    ended.recv_timeout(pause) == Err(RecvTimeoutError::Timeout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_changes_at_its_thresholds() {
        let probe = Probe {
            port: 1,
            initial_delay: Duration::ZERO,
            period: Duration::ZERO,
            timeout: Duration::ZERO,
            success_threshold: 1,
            failure_threshold: 2,
        };
        let mut judge = Judge::default();
        let outcomes = [false, true, false, true, false, false, false];
        let changes = outcomes.map(|success| judge.hear(&probe, success));
        assert_eq!(changes, [None, Some(true), None, None, None, Some(false), None]);
    }
}
