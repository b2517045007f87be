//! The kernel programs against real connections, in a network namespace of the test's own.
//!
//! Needs root: without it the test fails.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use observer::clock;
use observer::facts::{BootNs, Happening, KernelEvent, Origin, Outcome};
use observer::kernel::addresses::Range;
use observer::kernel::cgroups::Hierarchy;
use observer::kernel::probes::LEGACY_COMMIT;
use observer::kernel::{self, Started};
use tokio::sync::mpsc;

/// Enough for every event of a test; the channel is drained at the end.
const CAPACITY: usize = 4_096;

/// The programs see the whole machine: one test at a time.
fn lock() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

fn hierarchy() -> Hierarchy {
    Hierarchy::find(Path::new("/sys/fs/cgroup")).expect("cgroups")
}

/// Runs `test` on a thread with an own network namespace and loopback up; the namespace ends with
/// the thread.
fn isolated<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    let _alone = lock();
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("needs root: cannot make a network namespace");
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status();
        assert!(up.expect("ip (package iproute2)").success());
        test()
    });
    match thread.join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Starts the kernel side, runs `act`, and returns the events that arrived with the final parts.
fn observe(local: &[IpAddr], act: impl FnOnce()) -> (Vec<KernelEvent>, kernel::counters::Reading) {
    let local = local.iter().copied().collect::<BTreeSet<_>>();
    observe_with(|kernel| kernel.addresses.set_local(&local).expect("addresses"), act)
}

fn observe_with(
    prepare: impl FnOnce(&mut Started),
    act: impl FnOnce(),
) -> (Vec<KernelEvent>, kernel::counters::Reading) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let mut kernel = kernel::start(hierarchy()).expect("kernel side starts");
        prepare(&mut kernel);
        let Started { probes, events, counters, addresses: _addresses, .. } = kernel;
        for probe in probes.states() {
            assert!(probe.method.is_some(), "{} is off: {:?}", probe.signal, probe.problem);
        }
        let (sender, mut receiver) = mpsc::channel(CAPACITY);
        let reader = tokio::spawn(events.run(sender));
        act();
        let until = clock::now();
        let mut seen = Vec::new();
        // The ring is ordered per CPU only: read until nothing more comes for a while.
        while let Ok(Some(event)) =
            tokio::time::timeout(Duration::from_millis(200), receiver.recv()).await
        {
            if event.at < until {
                seen.push(event);
            }
        }
        reader.abort();
        (seen, counters.read().expect("counters"))
    })
}

fn refused(address: SocketAddr) {
    let error = TcpStream::connect(address).expect_err("nobody listens");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
}

fn count(reading: &kernel::counters::Reading, address: IpAddr, port: u16, outcome: Outcome) -> u64 {
    reading
        .arrivals
        .iter()
        .filter(|arrivals| {
            (arrivals.address, arrivals.port, arrivals.outcome) == (address, port, outcome)
        })
        .map(|arrivals| {
            assert_eq!(arrivals.origin, Origin::SameNode);
            arrivals.count
        })
        .sum()
}

#[test]
fn refusals_and_accepts_are_counted_exactly_over_both_families() {
    for address in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        let (events, reading) = isolated(move || {
            observe(&[address], || {
                let open = TcpListener::bind((address, 8080)).expect("bind");
                for _ in 0..300 {
                    refused(SocketAddr::new(address, 8081));
                    drop(TcpStream::connect((address, 8080)).expect("accepted"));
                    drop(open.accept().expect("accept"));
                }
            })
        });
        assert_eq!(count(&reading, address, 8081, Outcome::Refused), 300, "{address}");
        assert_eq!(count(&reading, address, 8080, Outcome::Accepted), 300, "{address}");

        let details: Vec<&KernelEvent> = events
            .iter()
            .filter(|event| event.local == SocketAddr::new(address, 8081))
            .filter(|event| event.happening == Happening::Refused)
            .collect();
        assert!(!details.is_empty() && details.len() < 300, "{} details", details.len());
        assert!(details.iter().all(|event| event.counted));
        let failed = events
            .iter()
            .filter(|event| event.remote == SocketAddr::new(address, 8081))
            .filter(|event| event.happening == Happening::ConnectFailed { errno: 111 });
        assert!(failed.count() > 0);
    }
}

#[test]
fn the_kubelets_probes_are_neither_arrivals_nor_refusals() {
    // Loopback's own address is where connections to the other come from.
    let (node, pod) = (IpAddr::from([127, 0, 0, 1]), IpAddr::from([127, 0, 0, 2]));
    let (events, reading) = isolated(move || {
        let prepare = |kernel: &mut Started| {
            let addresses = &mut kernel.addresses;
            addresses.set_local(&BTreeSet::from([pod])).expect("addresses");
            addresses.classify(Range::host(node), Origin::Node).expect("range");
            addresses.set_probed(&BTreeSet::from([(pod, 8080)])).expect("probed port");
        };
        observe_with(prepare, || {
            for port in [8080, 9090] {
                let open = TcpListener::bind((pod, port)).expect("bind");
                drop(TcpStream::connect((pod, port)).expect("accepted"));
                drop(open);
                refused(SocketAddr::new(pod, port));
            }
        })
    });
    let mut counted: Vec<(u16, Outcome, Origin, u64)> = reading
        .arrivals
        .iter()
        .map(|arrivals| (arrivals.port, arrivals.outcome, arrivals.origin, arrivals.count))
        .collect();
    counted.sort_by_key(|(_, outcome, _, _)| *outcome);
    assert_eq!(
        counted,
        [(9090, Outcome::Accepted, Origin::Node, 1), (9090, Outcome::Refused, Origin::Node, 1)]
    );
    let ports = events.iter().filter(|event| event.happening == Happening::Refused);
    let ports: Vec<u16> =
        ports.filter(|event| event.local.ip() == pod).map(|event| event.local.port()).collect();
    assert_eq!(ports, [9090]);
}

#[test]
fn a_dual_stack_listener_counts_ipv4_peers_by_their_ipv4_address() {
    let v4 = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let (events, reading) = isolated(move || {
        observe(&[v4], || {
            let open = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 8080)).expect("bind");
            drop(TcpStream::connect((v4, 8080)).expect("accepted"));
            drop(open.accept().expect("accept"));
        })
    });
    assert_eq!(count(&reading, v4, 8080, Outcome::Accepted), 1);
    // Other namespaces use the loopback address too, at the same time.
    let own = reading.arrivals.iter().find(|arrivals| arrivals.port == 8080).expect("counted");
    let mut listener: Vec<(BootNs, Happening)> = events
        .iter()
        .filter(|event| event.netns_cookie == own.netns_cookie && event.local.port() == 8080)
        .map(|event| (event.at, event.happening))
        .filter(|(_, happening)| {
            matches!(happening, Happening::ListenerOpened | Happening::ListenerClosed)
        })
        .collect();
    // The ring is ordered per CPU only.
    listener.sort_unstable();
    let listener: Vec<Happening> = listener.into_iter().map(|(_, happening)| happening).collect();
    assert_eq!(listener, [Happening::ListenerOpened, Happening::ListenerClosed]);
}

#[test]
fn a_terminated_process_shows_its_signal_before_its_exit() {
    let (events, pid) = isolated(|| {
        let mut pid = 0;
        let (events, _) = observe(&[], || {
            let mut sleeper = Command::new("sleep").arg("60").spawn().expect("sleep");
            pid = sleeper.id();
            let target = nix::unistd::Pid::from_raw(i32::try_from(pid).expect("pid"));
            nix::sys::signal::kill(target, nix::sys::signal::Signal::SIGTERM).expect("kill");
            sleeper.wait().expect("wait");
        });
        (events, pid)
    });
    let happenings: Vec<Happening> =
        events.iter().filter(|event| event.pid == pid).map(|event| event.happening).collect();
    assert_eq!(happenings, [Happening::Signalled { number: 15 }, Happening::Exited]);
}

#[test]
fn legacy_commits_are_seen_in_the_own_namespace_and_only_changes_count() {
    let run = |program: &str, arguments: &str| {
        let status = Command::new(program).args(arguments.split(' ')).status();
        assert!(status.expect("iptables-legacy (package iptables)").success(), "{program}");
    };
    let (elsewhere, here) = isolated(move || {
        let commits = |attached, act: &dyn Fn()| {
            let prepare = |kernel: &mut Started| {
                kernel.probes.watch(&LEGACY_COMMIT, attached).expect("attach or detach");
            };
            let (events, _) = observe_with(prepare, act);
            let happenings = events.into_iter().map(|event| event.happening);
            happenings.filter(|what| matches!(what, Happening::LegacyCommit { .. })).collect()
        };
        let change = || {
            run("iptables-legacy", "-t nat -A OUTPUT -d 198.51.100.1 -j RETURN");
            run("ip6tables-legacy", "-t nat -A OUTPUT -d 2001:db8::1 -j RETURN");
            run("iptables-legacy", "-t nat -S");
            run("iptables-legacy", "-t filter -A OUTPUT -d 198.51.100.1 -j RETURN");
        };
        let unattached: Vec<Happening> = commits(false, &change);
        assert_eq!(unattached, []);
        let elsewhere: Vec<Happening> = commits(true, &|| {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    unshare(CloneFlags::CLONE_NEWNET).expect("needs root");
                    change();
                });
            });
        });
        (elsewhere, commits(true, &change))
    });
    assert_eq!(elsewhere, [], "another namespace's tables are not this node's");
    assert_eq!(here, [4, 6].map(|family| Happening::LegacyCommit { family, call_ns: 0 }));
}

#[test]
fn nothing_stays_open_when_the_parts_are_dropped() {
    let _alone = lock();
    // The kernel detaches and frees a program when its last descriptor closes: nothing is pinned.
    let open = || {
        std::fs::read_dir("/proc/self/fd")
            .expect("own descriptors")
            .flatten()
            .filter_map(|entry| std::fs::read_link(entry.path()).ok())
            .filter(|target| target.to_string_lossy().contains("bpf"))
            .count()
    };
    assert_eq!(open(), 0);
    let started = kernel::start(hierarchy()).expect("kernel side starts");
    assert!(open() > 0);
    drop(started);
    assert_eq!(open(), 0);
}
