//! A scratch network namespace for one test, and the real tools that write rules into it.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::{PoisonError, RwLock};
use std::thread;

use nix::sched::{CloneFlags, unshare};
use observer::dataplane::legacy::Reader;
use observer::dataplane::nft::follow::Follow;
use observer::dataplane::nft::{Arrival, Dumper, Subscription};
use observer::dataplane::{Counters, Family};
use observer::facts::Backend;

/// Held by every test, and alone by those that measure times.
static RUNNING: RwLock<()> = RwLock::new(());

/// Runs `test` on a thread of its own in a new network namespace, which goes with the thread.
pub(crate) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let _with_others = RUNNING.read().unwrap_or_else(PoisonError::into_inner);
    in_new_namespace(test);
}

/// As [`in_namespace`], while no other test of this program runs.
pub(crate) fn alone_in_namespace(test: impl FnOnce() + Send + 'static) {
    let _alone = RUNNING.write().unwrap_or_else(PoisonError::into_inner);
    in_new_namespace(test);
}

fn in_new_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("make a network namespace: this test needs root");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// An async runtime whose threads are all in this thread's namespace.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("build a runtime")
}

/// What the address of every backend begins with that only marks a moment.
pub(crate) const MARKERS: &str = "192.0.2.";

/// Feeds `input` to a tool in this thread's namespace; it has to succeed.
pub(crate) fn feed(command: &[&str], input: &str) {
    let (program, arguments) = command.split_first().expect("a program");
    // The machine's own lock is not this namespace's business.
    let lock = tempfile::NamedTempFile::new().expect("a file to lock");
    let mut child = Command::new(program)
        .args(arguments)
        .env("XTABLES_LOCKFILE", lock.path())
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error} (apt-get install nftables iptables)"));
    child.stdin.take().expect("stdin").write_all(input.as_bytes()).expect("write the rules");
    let output = child.wait_with_output().expect("wait for the tool");
    assert!(
        output.status.success(),
        "{command:?} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Makes one commit to the `nf_tables` rules.
pub(crate) fn nft(commands: &str) {
    feed(&["nft", "-f", "-"], commands);
}

/// A table's rules as `nft` lists them, with handles.
pub(crate) fn listed(table: &str) -> String {
    let output = Command::new("nft").args(["-a", "list", "table", "ip", table]).output();
    let output = output.expect("run nft (apt-get install nftables)");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// A recorded state.
pub(crate) fn captured(path: &str) -> String {
    let path = format!("{}/tests/captures/{path}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The states of every recording, in order.
pub(crate) const STATES: [&str; 8] = [
    "0-before",
    "1-terminating",
    "2-unready",
    "3-gone",
    "4-all-terminating",
    "5-all-unready",
    "6-none",
    "7-back",
];

/// `service protocol address port`, sorted.
pub(crate) fn shown<'b>(backends: impl IntoIterator<Item = &'b Backend>) -> BTreeSet<String> {
    let show = |backend: &Backend| {
        let service = backend.service.as_ref();
        let service = service.map_or("-".to_owned(), ToString::to_string);
        format!("{service} {:?} {} {}", backend.protocol, backend.address, backend.port)
    };
    backends.into_iter().map(show).collect()
}

/// What the recordings have when these pods (by last byte of their address) are backends: each
/// behind three Services, beside what never changes.
pub(crate) fn expected(pods: &[u8], constant: &[&str]) -> BTreeSet<String> {
    let of_pod = |pod: &u8| {
        [
            format!("default/web:http Tcp 10.244.0.{pod} 8080"),
            format!("default/np:http Tcp 10.244.0.{pod} 8080"),
            format!("default/udp:u Udp 10.244.0.{pod} 5353"),
        ]
    };
    let constant = constant.iter().map(|&backend| backend.to_owned());
    pods.iter().flat_map(of_pod).chain(constant).collect()
}

/// The next netlink datagram.
pub(crate) fn next(subscription: &mut Subscription) -> Arrival {
    runtime().block_on(subscription.next()).expect("read notifications")
}

/// All rules of this namespace.
pub(crate) fn dump(counters: &Counters) -> Follow {
    Dumper::open()
        .and_then(|dumper| dumper.dump(counters).map_err(|fault| anyhow::anyhow!("{fault:?}")))
        .expect("dump all rules")
}

/// The backends of all tables.
pub(crate) fn reached(follow: &Follow) -> BTreeSet<String> {
    let reached: Vec<_> =
        follow.ruleset().tables().map(|(id, _)| follow.ruleset().reached(id)).collect();
    shown(reached.iter().flat_map(|reached| &reached.backends))
}

/// The backends of the legacy nat table of an IP version.
pub(crate) fn legacy_backends(family: Family) -> BTreeSet<String> {
    let reader = Reader::open(family).expect("open").expect("this IP version");
    let reached = reader.read().expect("read the legacy nat table").evaluated.reached;
    assert_eq!(reached.unresolved, 0);
    shown(&reached.backends)
}
