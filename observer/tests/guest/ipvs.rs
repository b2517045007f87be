//! IPVS by the real kernel and ipvsadm: what the kernel writes, and how its changes are followed,
//! with the kernel's hook and without.

use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use observer::clock;
use observer::dataplane::{CommitSignal, Counters, SilentTable, ipvs, ipvs_in_use};
use observer::facts::BackendStep;
use observer::kernel::probes::IPVS_COMMIT;
use tokio::sync::mpsc::channel;

use super::following::{Hooked, PATIENCE, Running, shown};
use super::machine::{in_namespace, require_guest, run, runtime};

/// A Service as kube-proxy writes it: one virtual service for its address, one for its node port.
const SERVICE: &str = "-A -t 10.96.0.80:80 -s rr
-a -t 10.96.0.80:80 -r 10.244.0.18:8080 -m -w 1
-a -t 10.96.0.80:80 -r 10.244.0.19:8080 -m -w 1
-A -t 192.0.2.1:30080 -s rr
-a -t 192.0.2.1:30080 -r 10.244.0.18:8080 -m -w 1
-a -t 192.0.2.1:30080 -r 10.244.0.19:8080 -m -w 1
";

/// Services and destinations of every kind.
const KINDS: &str = "-A -u 10.96.0.10:53 -s rr
-a -u 10.96.0.10:53 -r 10.244.0.2:53 -m -w 1
-A -t 10.96.0.80:80 -s wrr -p 10800
-a -t 10.96.0.80:80 -r 10.244.0.18:8080 -m -w 1
-a -t 10.96.0.80:80 -r 10.244.0.19:8080 -m -w 0
-a -t 10.96.0.80:80 -r 10.244.0.20:80 -g -w 65535
-a -t 10.96.0.80:80 -r 10.244.0.21:80 -i -w 1
-a -t 10.96.0.80:80 -r 127.0.0.1:80 -m -w 1
-A -t [fd00:10:96::50]:80 -s rr
-a -t [fd00:10:96::50]:80 -r [fd00:10:244::12]:8080 -m -w 1
-A --sctp-service 10.96.0.90:90 -s sh
-a --sctp-service 10.96.0.90:90 -r 10.244.0.18:9090 -m -w 1
-A -f 7 -s rr
-a -f 7 -r 10.244.0.22:0 -g -w 1
";

/// A backend of the Service at its address, by the last byte of the backend's.
fn inside(pod: u8) -> String {
    format!("10.96.0.80:80 Tcp 10.244.0.{pod} 8080")
}

/// The same at its node port.
fn outside(pod: u8) -> String {
    format!("0.0.0.0:30080 Tcp 10.244.0.{pod} 8080")
}

fn restore(rules: &str) {
    run("ipvsadm -R", rules);
}

#[test]
#[ignore = "runs in a guest: cargo xtask guest"]
fn services_of_every_kind_are_read() {
    require_guest();
    in_namespace(|| {
        assert!(!ipvs_in_use());
        restore(KINDS);
        assert!(ipvs_in_use());
        let counters = Arc::new(Counters::default());
        let table = ipvs::Reader::new(counters.clone()).read().expect("read");
        assert_eq!((table.services, counters.malformed.get()), (5, 0));
        let backends: Vec<String> = table.reached.backends.iter().map(shown).collect();
        assert_eq!(
            backends,
            [
                "10.96.0.10:53 Udp 10.244.0.2 53",
                "10.96.0.80:80 Tcp 10.244.0.18 8080",
                "10.96.0.80:80 Tcp 10.244.0.20 80",
                "10.96.0.80:80 Tcp 10.244.0.21 80",
                "10.96.0.80:80 Tcp 127.0.0.1 80",
                "10.96.0.90:90 Sctp 10.244.0.18 9090",
                "[fd00:10:96::50]:80 Tcp fd00:10:244::12 8080",
            ]
        );
        let draining: Vec<String> = table.reached.draining.iter().map(shown).collect();
        assert_eq!(draining, ["10.96.0.80:80 Tcp 10.244.0.19 8080"]);
        assert_eq!(table.reached.unresolved, 1, "the firewall mark");
    });
}

#[test]
#[ignore = "runs in a guest: cargo xtask guest"]
fn a_node_port_is_one_front_end_until_its_last_address_lets_go() {
    require_guest();
    in_namespace(|| {
        let weights = |weights: [u8; 2]| {
            for (host, weight) in (1..).zip(weights) {
                let at = format!("192.0.2.{host}:30080");
                restore(&format!("-e -t {at} -r 10.244.0.18:8080 -m -w {weight}\n"));
            }
            ipvs::Reader::new(Arc::default()).read().expect("read").reached
        };
        for host in 1..=2 {
            let at = format!("192.0.2.{host}:30080");
            restore(&format!("-A -t {at} -s rr\n-a -t {at} -r 10.244.0.18:8080 -m -w 1\n"));
        }
        for (given, (present, draining)) in [([1, 1], (1, 0)), ([0, 1], (1, 0)), ([0, 0], (0, 1))] {
            let reached = weights(given);
            assert_eq!((reached.backends.len(), reached.draining.len()), (present, draining));
            assert!(
                reached
                    .backends
                    .iter()
                    .chain(&reached.draining)
                    .all(|one| shown(one) == outside(18))
            );
        }
    });
}

#[test]
#[ignore = "runs in a guest: cargo xtask guest"]
fn each_change_is_told_with_the_span_of_its_own_call() {
    use BackendStep::{Added, Draining, Removed};
    require_guest();
    in_namespace(|| {
        runtime().block_on(async {
            restore(SERVICE);
            let mut running = Running::start(Some(&IPVS_COMMIT)).await;
            assert_eq!(running.present, [outside(18), outside(19), inside(18), inside(19)]);

            // kube-proxy's order for a pod that ends: each virtual service by itself.
            let half = "-e -t 10.96.0.80:80 -r 10.244.0.18:8080 -m -w 0\n\
                -a -t 10.96.0.80:80 -r 10.244.0.20:8080 -m -w 1\n";
            running
                .expect(|| restore(half), &[(&inside(18), Draining), (&inside(20), Added)])
                .await;
            let rest = "-e -t 192.0.2.1:30080 -r 10.244.0.18:8080 -m -w 0\n";
            let change = running.expect(|| restore(rest), &[(&outside(18), Draining)]).await;
            println!("one edit: the change is known to {:?}", change[0].uncertainty);
            let back = "-e -t 10.96.0.80:80 -r 10.244.0.18:8080 -m -w 2\n";
            running.expect(|| restore(back), &[(&inside(18), Added)]).await;
            let again = "-e -t 10.96.0.80:80 -r 10.244.0.18:8080 -m -w 0\n";
            running.expect(|| restore(again), &[(&inside(18), Draining)]).await;
            let delete = "-d -t 10.96.0.80:80 -r 10.244.0.18:8080\n\
                -d -t 192.0.2.1:30080 -r 10.244.0.18:8080\n";
            let deleted = [(&*outside(18), Removed), (&*inside(18), Removed)];
            running.expect(|| restore(delete), &deleted).await;

            // Other protocols and families; an edit that changes nothing tells nothing.
            let others = "-e -t 10.96.0.80:80 -r 10.244.0.20:8080 -m -w 1\n\
                -A -u 10.96.0.10:53 -s rr\n-a -u 10.96.0.10:53 -r 10.244.0.2:53 -m -w 1\n\
                -A -t [fd00:10:96::50]:80 -s rr\n\
                -a -t [fd00:10:96::50]:80 -r [fd00:10:244::12]:8080 -m -w 1\n";
            let dns = "10.96.0.10:53 Udp 10.244.0.2 53";
            let six = "[fd00:10:96::50]:80 Tcp fd00:10:244::12 8080";
            let changes = running.expect(|| restore(others), &[(dns, Added), (six, Added)]).await;
            assert_ne!(changes[0].at, changes[1].at, "two calls");
            let gone = "-D -t [fd00:10:96::50]:80\n-d -u 10.96.0.10:53 -r 10.244.0.2:53\n";
            running.expect(|| restore(gone), &[(dns, Removed), (six, Removed)]).await;
            let all = [outside(19), inside(19), inside(20)];
            let all = all.each_ref().map(|backend| (backend.as_str(), Removed));
            running.expect(|| restore("-C\n"), &all).await;
        });
    });
}

#[test]
#[ignore = "runs in a guest: cargo xtask guest"]
fn changes_of_one_burst_are_told_apart() {
    require_guest();
    in_namespace(|| {
        runtime().block_on(async {
            let add = |pod| format!("-a -t 10.96.0.80:80 -r 10.244.0.{pod}:8080 -m -w 1\n");
            let rules: String = (1..=60).map(add).collect();
            restore(&format!("-A -t 10.96.0.80:80 -s rr\n{rules}"));
            let mut running = Running::start(Some(&IPVS_COMMIT)).await;
            let before = clock::now();
            restore(&rules.replace("-a", "-e").replace("-w 1", "-w 0"));
            let after = clock::now();
            let mut changes = running.changes(60).await;
            changes.sort_by_key(|change| change.at);
            let mut last = before;
            for change in &changes {
                assert_eq!(change.step, BackendStep::Draining);
                let from = change.at.minus(change.uncertainty);
                assert!(last < from, "two calls overlap: {last:?} {change:?}");
                last = change.at;
            }
            assert!(last < after);
            let span = changes[59].at.since(changes[0].at);
            let largest = changes.iter().map(|change| change.uncertainty).max();
            println!("60 edits in {span:?}, each known to {largest:?} at most");
        });
    });
}

/// Unloads a module, which what used it may still hold for a moment. Namespaces of earlier tests
/// may hold it for minutes: the test that unloads is the first by name, and they run in that order.
fn unload(module: &str) {
    let until = clock::now().plus(PATIENCE);
    while !Command::new("rmmod").arg(module).status().expect("busybox").success() {
        assert!(clock::now() < until, "{module} stays");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
#[ignore = "runs in a guest: cargo xtask guest"]
fn a_hook_that_ended_with_the_module_is_attached_anew() {
    const MODULES: [&str; 4] = ["ip_vs", "ip_vs_rr", "ip_vs_sh", "ip_vs_wrr"];
    require_guest();
    in_namespace(|| {
        runtime().block_on(async {
            restore(SERVICE);
            let (signals, mut commits) = channel(1024);
            let mut hooked = Hooked::start(&IPVS_COMMIT, signals);
            restore("-e -t 10.96.0.80:80 -r 10.244.0.18:8080 -m -w 0\n-C\n");
            let last = clock::now();
            for module in MODULES.iter().rev() {
                unload(module);
            }
            assert!(!ipvs_in_use(), "the agent detaches the hook when it sees this");
            hooked.detach();
            for module in MODULES {
                run(&format!("insmod /modules/{module}.ko"), "");
            }
            restore(SERVICE);
            assert!(ipvs_in_use(), "the agent attaches the hook when it sees this");
            hooked.attach();
            restore("-e -t 10.96.0.80:80 -r 10.244.0.19:8080 -m -w 0\n");
            let destination = "10.244.0.19:8080".parse().ok();
            loop {
                let signal = tokio::time::timeout(PATIENCE, commits.recv()).await;
                let Ok(Some(CommitSignal::Commit(commit))) = signal else { panic!("{signal:?}") };
                // To unload the module empties the table, which is told too.
                if commit.at > last && commit.destination == destination {
                    break;
                }
            }
        });
    });
}

#[test]
#[ignore = "runs in a guest: cargo xtask guest"]
fn without_a_change_nothing_is_read() {
    require_guest();
    in_namespace(|| {
        runtime().block_on(async {
            restore(SERVICE);
            let mut running = Running::start(Some(&IPVS_COMMIT)).await;
            let reads = running.counters.table_reads.get();
            run("ipvsadm -L -n", "");
            run("ipvsadm -Z", "");
            let one = "-e -t 10.96.0.80:80 -r 10.244.0.18:8080 -m -w 0\n\
                -e -t 192.0.2.1:30080 -r 10.244.0.18:8080 -m -w 0\n";
            restore(one);
            running.changes(2).await;
            let more = running.counters.table_reads.get() - reads;
            assert!((1..=2).contains(&more), "{more} readings after two commits");
        });
    });
}

#[test]
#[ignore = "runs in a guest: cargo xtask guest"]
fn without_the_hook_a_look_tells_the_same_to_the_look_before() {
    require_guest();
    in_namespace(|| {
        runtime().block_on(async {
            restore(SERVICE);
            let mut looked = clock::now();
            let mut running = Running::start(None).await;
            let reads = running.counters.table_reads.get();
            for (rules, step) in [
                (
                    "-e -t 10.96.0.80:80 -r 10.244.0.18:8080 -m -w 0\n\
                     -e -t 192.0.2.1:30080 -r 10.244.0.18:8080 -m -w 0\n",
                    BackendStep::Draining,
                ),
                (
                    "-d -t 10.96.0.80:80 -r 10.244.0.18:8080\n\
                     -d -t 192.0.2.1:30080 -r 10.244.0.18:8080\n",
                    BackendStep::Removed,
                ),
            ] {
                let before = clock::now();
                restore(rules);
                let after = clock::now();
                let look = running.look(SilentTable::Ipvs).await;
                for (change, backend) in
                    running.changes(2).await.iter().zip([outside(18), inside(18)])
                {
                    assert_eq!((shown(&change.backend), change.step), (backend, step));
                    let from = change.at.minus(change.uncertainty);
                    assert!(looked <= from && from <= before, "{looked:?} {change:?} {before:?}");
                    assert!(change.at >= after);
                }
                looked = look;
            }
            let reads = running.counters.table_reads.get() - reads;
            assert_eq!(reads, 2 * 2, "two that agree each time");
        });
    });
}

#[test]
#[ignore = "runs in a guest: cargo xtask guest"]
fn services_of_other_namespaces_hide_none_of_ours() {
    require_guest();
    // So many that the kernel does not hand them out at once.
    let services = |network: &str| -> String {
        let service = |host| {
            let address = format!("{network}.{host}:80");
            format!("-A -t {address} -s rr\n-a -t {address} -r 10.244.0.{host}:8080 -m -w 1\n")
        };
        (1..=200).map(service).collect()
    };
    in_namespace(move || {
        restore(&services("10.96.1"));
        in_namespace(move || {
            restore(&services("10.96.2"));
            let table = ipvs::Reader::new(Arc::default()).read().expect("read");
            assert_eq!(table.services, 200);
            assert_eq!(table.reached.backends.len(), 200);
        });
    });
}
