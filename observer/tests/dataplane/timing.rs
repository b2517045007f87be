//! How exact the time of a removal is, with the real tools: 200 removals in each form of rules.
//!
//! The truth is the system call that committed the rules, stamped by the kernel at its start and
//! its end: the rules took effect in between. The error is counted from the call's start, so it
//! is never less than the real one.
//!
//! What is charged is the observer's error, not what else the machine does. A kernel that does
//! not preempt lets both wait for a processor for some 4 ms when others use all of them, so the
//! kernel's record of those waits (of the tool in its call, of the listening thread until it
//! reported) is taken off, and nothing else is. The stated uncertainty has to cover them all the
//! same. Also, these tests run alone among those of this program, and before other processes.

use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use observer::dataplane::{Family, Update};
use observer::facts::{BackendChange, BackendStep, BootNs, Happening, KernelEvent, Protocol};
use observer::kernel::cgroups::Hierarchy;
use observer::kernel::probes::LEGACY_COMMIT;
use observer::kernel::{self, Probes, Started};
use tokio::sync::mpsc;

use super::following::{ROOMY_BYTES, Running, run_in_runtime};
use super::kube_proxy::{Condition, Form, Node, Service};
use super::namespace::alone_in_namespace;
use super::trace::{Call, Events, Trace, covered};

const REMOVALS: u8 = 200;
/// The 99th percentile where the kernel announces commits, and where a kernel program does.
const ANNOUNCED: Duration = Duration::from_millis(1);
const SIGNALLED: Duration = Duration::from_millis(5);
/// A call this short says when its rules took effect; longer ones were held up by the machine.
const SHORT: Duration = Duration::from_millis(1);
/// The thread that listens for commits.
const LISTENER: &str = "netfilter";
/// Before other processes, as the lab's agent.
const NICE: libc::c_int = -20;

/// One removal: the call that made it, and what was reported.
#[derive(Debug)]
struct Removal {
    call: Call,
    at: BootNs,
    uncertainty: Duration,
    /// How long of that the tool or the listening thread waited for a processor.
    waited: Duration,
}

impl Removal {
    /// From the call's start to the reported time.
    fn since_start(&self) -> Duration {
        self.at.since(self.call.entered)
    }

    /// The same without the waits for a processor.
    fn error(&self) -> Duration {
        self.since_start().saturating_sub(self.waited)
    }

    /// Whether the rules took effect within the span stated.
    fn is_covered(&self) -> bool {
        let (from, until) = (self.at.minus(self.uncertainty), self.at);
        let Call { entered, left, .. } = self.call;
        entered <= until && from <= if self.is_short() { entered } else { left }
    }

    fn is_short(&self) -> bool {
        self.call.left.since(self.call.entered) <= SHORT
    }
}

/// The kernel program that tells of legacy commits.
struct Hook {
    events: mpsc::Receiver<KernelEvent>,
    _probes: Probes,
}

impl Hook {
    fn attach() -> Self {
        let hierarchy = Hierarchy::find(Path::new("/sys/fs/cgroup")).expect("cgroups");
        let started = kernel::start(hierarchy).expect("load the programs");
        let Started { mut probes, events, .. } = started;
        let hook = probes.watch(&LEGACY_COMMIT, true).expect("attach");
        assert!(hook.is_some_and(|probe| probe.method.is_some()), "{hook:?}");
        let (sender, received) = mpsc::channel(1024);
        tokio::spawn(events.run(sender));
        Self { events: received, _probes: probes }
    }

    /// When the next legacy commit in this namespace was.
    async fn commit(&mut self) -> BootNs {
        loop {
            let event = self.events.recv().await.expect("it still runs");
            if let Happening::LegacyCommit { .. } = event.happening {
                return event.at;
            }
        }
    }
}

/// Puts this thread, and those and the tools that it starts from now on, before other processes.
#[expect(unsafe_code, reason = "no wrapper for setpriority")]
fn hasten() {
    // SAFETY: a call without pointers; 0 is the calling thread.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
    Errno::result(result).expect("raise the priority: this test needs root");
}

/// Removes one pod after the other, each replaced by a new one in the same sync.
async fn removals(form: Form, trace: &Trace) -> Vec<Removal> {
    let mut node = Node::start(form, Family::V4);
    node.set(Service::new("web", Protocol::Tcp, 1, &[1, 2]));
    node.sync(&["web"]);
    let mut hook = (form == Form::IptablesLegacy).then(Hook::attach);
    let (mut running, _) = Running::start(ROOMY_BYTES).await;
    let mut removals = Vec::new();
    for pod in 1..=REMOVALS {
        node.service("web").unlist(pod);
        node.service("web").list(pod + 2, Condition::Ready);
        trace.clear();
        node.sync(&["web"]);
        let call = trace.events().last_commit();
        if let Some(hook) = &mut hook {
            running.legacy_committed(hook.commit().await, Family::V4).await;
        }
        let (mut removed, mut added) = (None, false);
        while removed.is_none() || !added {
            let Update::Change(change) = running.next().await else { continue };
            added |= change.step == BackendStep::Added;
            removed = removed.or_else(|| (change.step == BackendStep::Removed).then_some(change));
        }
        let removed = removed.expect("seen above");
        assert_eq!(removed.backend.address.to_string(), format!("10.244.0.{pod}"));
        let BackendChange { at, uncertainty, .. } = removed;
        let waited = waited(&trace.events(), &call, at);
        removals.push(Removal { call, at, uncertainty, waited });
    }
    removals
}

/// How long the tool in its call, or the listening thread until it reported, waited to run.
fn waited(events: &Events, call: &Call, at: BootNs) -> Duration {
    let of_tool = events.waits(&call.thread).into_iter().filter(|wait| wait.0 < call.left);
    let listener = events.woken(LISTENER);
    let of_listener = listener.map(|thread| events.waits(&thread)).unwrap_or_default();
    covered(of_tool.chain(of_listener).collect(), (call.entered, at))
}

/// By nearest rank.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() * percent).div_ceil(100) - 1]
}

fn shown(what: &str, mut values: Vec<Duration>) -> String {
    values.sort_unstable();
    let [median, p99, max] = [50, 99, 100].map(|percent| percentile(&values, percent));
    format!("{what}: median {median:?}, p99 {p99:?}, max {max:?}")
}

#[expect(clippy::print_stdout, reason = "what was measured; cargo shows it with --nocapture")]
fn removal_times_are_exact(form: Form, limit: Duration) {
    alone_in_namespace(move || {
        hasten();
        let trace = Trace::start();
        run_in_runtime(async || {
            let removals = removals(form, &trace).await;
            let of = |value: fn(&Removal) -> Duration| removals.iter().map(value).collect();
            let mut errors: Vec<Duration> = of(Removal::error);
            errors.sort_unstable();
            let figures = [
                shown("the call", of(|removal| removal.call.left.since(removal.call.entered))),
                shown("reported after its start", of(Removal::since_start)),
                shown("waits for a processor", of(|removal| removal.waited)),
                shown("error", errors.clone()),
                shown("uncertainty stated", of(|removal| removal.uncertainty)),
            ]
            .join("\n");
            println!("{form:?}\n{figures}");
            let uncovered = removals.iter().filter(|removal| !removal.is_covered());
            let uncovered: Vec<&Removal> = uncovered.collect();
            assert!(uncovered.len() * 100 <= removals.len(), "{form:?}\n{uncovered:#?}");
            let short = removals.iter().filter(|removal| removal.is_short()).count();
            assert!(short * 2 > removals.len(), "only {short} calls tell when the rules changed");
            assert!(percentile(&errors, 99) <= limit, "{form:?}\n{figures}");
        });
    });
}

#[test]
fn removal_times_are_exact_in_nftables_1_36() {
    removal_times_are_exact(Form::Nftables136, ANNOUNCED);
}

#[test]
fn removal_times_are_exact_in_nftables_1_35() {
    removal_times_are_exact(Form::Nftables135, ANNOUNCED);
}

#[test]
fn removal_times_are_exact_in_iptables_nft() {
    removal_times_are_exact(Form::IptablesNft, ANNOUNCED);
}

#[test]
fn removal_times_are_exact_in_iptables_legacy() {
    removal_times_are_exact(Form::IptablesLegacy, SIGNALLED);
}
