//! What really happened to a node's pods, as the kubelet that did it recorded it.

use std::collections::BTreeMap;

use crate::lab::container::{Event, Exit};
use crate::lab::network::Addresses;

/// The life of one pod. Moments are ns of `CLOCK_BOOTTIME`; those of a process are of its last run
/// if it was restarted.
#[derive(Clone, Debug, Default)]
pub struct Life {
    /// `metadata.namespace`
    pub namespace: String,
    /// `metadata.name`
    pub name: String,
    /// `spec.nodeName`
    pub node: String,
    /// Its addresses, once it has them; the node's own for a pod in the host's network.
    pub addresses: Option<Addresses>,
    /// The port of its server.
    pub port: u16,
    /// Whether it shares the node's network.
    pub host_network: bool,
    /// Its process.
    pub pid: i32,
    /// `containerStatuses[0].restartCount`
    pub restarts: u32,
    /// Just before the process was started.
    pub started_ns: Option<u64>,
    /// The process's own report: its listener accepts. The first time in its last run.
    pub listening_ns: Option<u64>,
    /// The kubelet's watch showed the deletion request.
    pub deletion_seen_ns: Option<u64>,
    /// The kubelet's watch showed that the object is gone.
    pub vanished_seen_ns: Option<u64>,
    /// Just before the signal was sent.
    pub sigterm_sent_ns: Option<u64>,
    /// The process's own report of the signal.
    pub sigterm_ns: Option<u64>,
    /// The process's own report, just after the close; the last one in its run.
    pub listener_closed_ns: Option<u64>,
    /// Just before the signal was sent.
    pub sigkill_sent_ns: Option<u64>,
    /// When the process's end was seen.
    pub exited_ns: Option<u64>,
    /// How it ended: its exit code, 128 + the signal that ended it, `None` if the kernel did not say.
    pub exit_code: Option<i32>,
    /// From here on another pod could get the address; never for the node's own.
    pub address_free_ns: Option<u64>,
}

/// By `metadata.uid`.
pub type Lives = BTreeMap<String, Life>;

impl Life {
    /// A run begins: nothing of the last one's process holds.
    pub(super) fn begin_run(&mut self, started_ns: u64, restarts: u32) {
        *self = Self {
            namespace: std::mem::take(&mut self.namespace),
            name: std::mem::take(&mut self.name),
            node: std::mem::take(&mut self.node),
            addresses: self.addresses,
            port: self.port,
            host_network: self.host_network,
            restarts,
            started_ns: Some(started_ns),
            ..Self::default()
        };
    }

    pub(super) fn enter(&mut self, event: Event) {
        match event {
            Event::Listening(at_ns) => {
                self.listening_ns.get_or_insert(at_ns);
            }
            Event::Sigterm(at_ns) => self.sigterm_ns = Some(at_ns),
            Event::ListenerClosed(at_ns) => self.listener_closed_ns = Some(at_ns),
            Event::Exited(at_ns, exit) => {
                self.exited_ns = Some(at_ns);
                self.exit_code = exit_code(exit);
            }
        }
    }
}

/// What a shell, and containerd, add to the number of the signal that ended a process.
const SIGNAL_OFFSET: i32 = 128;

/// As a container's status says it; `None` when the kernel did not say.
pub(super) fn exit_code(exit: Exit) -> Option<i32> {
    match exit {
        Exit::Code(code) => Some(code),
        Exit::Killed(signal) => Some(SIGNAL_OFFSET + signal as i32),
        Exit::Unknown => None,
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::Signal;

    use super::*;

    #[test]
    fn a_new_run_knows_nothing_of_the_last_ones_process() {
        let mut life = Life { name: "web".to_owned(), port: 8080, ..Life::default() };
        life.begin_run(10, 0);
        life.enter(Event::Listening(11));
        life.enter(Event::Listening(12));
        assert_eq!(life.listening_ns, Some(11));
        life.enter(Event::Exited(13, Exit::Killed(Signal::SIGKILL)));
        assert_eq!((life.exited_ns, life.exit_code), (Some(13), Some(137)));
        life.begin_run(14, 1);
        assert_eq!((life.listening_ns, life.exited_ns, life.exit_code), (None, None, None));
        assert_eq!((life.name.as_str(), life.port, life.restarts), ("web", 8080, 1));
    }
}
