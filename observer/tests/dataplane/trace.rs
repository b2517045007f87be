//! When the kernel ran the system calls that commit rules, and when a thread was ready to run and
//! had to wait for a processor, by the kernel's own stamps: tracefs, which is no part of the
//! observer. This thread and what it starts are traced, and nothing else of the machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use observer::facts::BootNs;

/// The calls that commit rules, and what becomes of threads.
const EVENTS: [&str; 6] = [
    "syscalls/sys_enter_sendmsg",
    "syscalls/sys_exit_sendmsg",
    "syscalls/sys_enter_setsockopt",
    "syscalls/sys_exit_setsockopt",
    "sched/sched_waking",
    "sched/sched_switch",
];
/// How the calls begin and end in the trace: netlink's, and `IPT_SO_SET_REPLACE` (64).
const COMMITS: [(&str, &str); 2] =
    [("sys_sendmsg(", "sys_sendmsg ->"), ("sys_setsockopt(", "sys_setsockopt ->")];
const REPLACE: &str = "optname: 0x40,";
/// What our instances of the tracing facility are called, with the process after it.
const INSTANCE: &str = "observer-test-";
/// Stamps are printed in microseconds, rounded down.
const STAMP_NS: u64 = 1_000;

/// A system call: rules that it committed took effect between the two.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    /// The kernel's number of the thread that made it.
    pub(crate) thread: String,
    pub(crate) entered: BootNs,
    pub(crate) left: BootNs,
}

/// A span of time.
pub(crate) type Span = (BootNs, BootNs);

/// A running trace.
pub(crate) struct Trace {
    instance: PathBuf,
    mounted: tempfile::TempDir,
}

impl Trace {
    /// Traces this thread and what it starts from now on. The facility is mounted in a mount
    /// namespace that this thread and those it starts have to themselves.
    pub(crate) fn start() -> Self {
        unshare(CloneFlags::CLONE_NEWNS).expect("make a mount namespace: this test needs root");
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("keep mounts private");
        let mounted = tempfile::tempdir().expect("a directory");
        mount(Some("tracefs"), mounted.path(), Some("tracefs"), MsFlags::empty(), None::<&str>)
            .expect("mount tracefs: this test needs a kernel with CONFIG_FTRACE_SYSCALLS");
        remove_left_behind(&mounted.path().join("instances"));
        let own = format!("instances/{INSTANCE}{}", std::process::id());
        let trace = Self { instance: mounted.path().join(own), mounted };
        fs::create_dir(&trace.instance).expect("make an instance of the tracing facility");
        trace.set("trace_clock", "boot");
        trace.set("options/event-fork", "1");
        trace.set("set_event_pid", &trace.own_thread());
        for event in EVENTS {
            trace.set(&format!("events/{event}/enable"), "1");
        }
        trace
    }

    /// This thread's number as the kernel has it, which in a container is not the one we see.
    fn own_thread(&self) -> String {
        self.set("trace_marker", "here");
        let text = self.text();
        let line = text.lines().find(|line| line.ends_with("here")).expect("our own mark");
        let task = line.split(" [").next().expect("a task before its processor");
        task.rsplit('-').next().expect("a number").trim().to_owned()
    }

    /// Forgets what was traced.
    pub(crate) fn clear(&self) {
        self.set("trace", "");
    }

    /// What was traced since then.
    pub(crate) fn events(&self) -> Events {
        let text = self.text();
        Events(text.lines().filter_map(Event::read).collect())
    }

    fn set(&self, file: &str, value: &str) {
        let path = self.instance.join(file);
        fs::write(&path, value).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    fn text(&self) -> String {
        fs::read_to_string(self.instance.join("trace")).expect("read the trace")
    }
}

/// One line of a trace.
struct Event {
    at_ns: u64,
    /// The thread it happened in.
    thread: String,
    text: String,
}

impl Event {
    /// `  nft-32522   [001] .....  2495.392548: sys_sendmsg(fd: 3, …)`
    fn read(line: &str) -> Option<Self> {
        let (head, text) = line.split_once(": ").filter(|_| !line.starts_with('#'))?;
        let (task, rest) = head.split_once('[')?;
        let thread = task.trim().rsplit('-').next()?.to_owned();
        let at_ns = stamp_ns(rest.rsplit(' ').next()?);
        Some(Self { at_ns, thread, text: text.to_owned() })
    }

    fn field(&self, key: &str) -> Option<&str> {
        self.text.split(' ').find_map(|field| field.strip_prefix(key)?.strip_prefix('='))
    }
}

/// What was traced, in order.
pub(crate) struct Events(Vec<Event>);

impl Events {
    /// The last call that committed rules.
    pub(crate) fn last_commit(&self) -> Call {
        let (mut begun, mut last) = ([None; 2], None);
        for Event { at_ns, thread, text } in &self.0 {
            for ((enter, leave), begun) in COMMITS.iter().zip(&mut begun) {
                if text.starts_with(enter) && (*enter == COMMITS[0].0 || text.contains(REPLACE)) {
                    *begun = Some(BootNs(*at_ns));
                } else if let (true, Some(entered)) = (text.starts_with(leave), *begun) {
                    let left = BootNs(at_ns + STAMP_NS);
                    last = Some(Call { thread: thread.clone(), entered, left });
                    *begun = None;
                }
            }
        }
        last.expect("the tool committed rules")
    }

    /// The thread of this name that was woken.
    pub(crate) fn woken(&self, name: &str) -> Option<String> {
        let mut wakes = self.0.iter().filter(|event| event.text.starts_with("sched_waking: "));
        let wake = wakes.find(|event| event.text.contains(&format!("comm={name} ")))?;
        wake.field("pid").map(str::to_owned)
    }

    /// When a thread was ready to run and did not.
    pub(crate) fn waits(&self, thread: &str) -> Vec<Span> {
        let (mut since, mut waits) = (None, Vec::new());
        for event in &self.0 {
            let at = BootNs(event.at_ns);
            let is = |key| event.field(key) == Some(thread);
            if event.text.starts_with("sched_waking: ") && is("pid") {
                since.get_or_insert(at);
            } else if is("next_pid") {
                waits.extend(since.take().map(|since| (since, at)));
            } else if is("prev_pid")
                && event.field("prev_state").is_some_and(|s| s.starts_with('R'))
            {
                since = Some(at);
            } else if is("prev_pid") {
                // Woken before it slept: it did not wait.
                since = None;
            }
        }
        waits
    }
}

/// How much of a span these cover together.
pub(crate) fn covered(mut spans: Vec<Span>, within: Span) -> Duration {
    spans.sort_unstable();
    let (mut sum, mut until) = (Duration::ZERO, within.0);
    for (from, to) in spans {
        let (from, to) = (from.max(until), to.min(within.1));
        sum += to.since(from);
        until = until.max(to);
    }
    sum
}

impl Drop for Trace {
    fn drop(&mut self) {
        for cleared in [
            fs::remove_dir(&self.instance),
            umount2(self.mounted.path(), MntFlags::MNT_DETACH).map_err(Into::into),
        ] {
            assert!(
                thread::panicking() || cleared.is_ok(),
                "{}: {cleared:?}",
                self.instance.display()
            );
        }
    }
}

/// Removes the instances of test processes that were killed.
fn remove_left_behind(instances: &Path) {
    for entry in fs::read_dir(instances).expect("list the instances").flatten() {
        let name = entry.file_name();
        let Some(process) = name.to_str().and_then(|name| name.strip_prefix(INSTANCE)) else {
            continue;
        };
        if !Path::new("/proc").join(process).exists() {
            fs::remove_dir(entry.path()).expect("remove an instance that nobody uses");
        }
    }
}

/// `2495.392548`, seconds since boot.
fn stamp_ns(text: &str) -> u64 {
    let (seconds, micros) = text.split_once('.').expect("a fraction");
    let number = |part: &str| part.parse::<u64>().expect("a number");
    number(seconds) * 1_000_000_000 + number(micros) * STAMP_NS
}
