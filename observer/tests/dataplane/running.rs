//! The whole follower: what it reports as rules come, change, go and get lost.

use std::collections::BTreeSet;
use std::future::Future;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use observer::clock;
use observer::dataplane::{Dataplane, Family, Update};
use observer::facts::{Blindness, BootNs};

use super::following::{ROOMY_BYTES, Running, in_runtime, run_in_runtime};
use super::namespace::{captured, expected, feed, in_namespace, nft};

const API: &[&str] = &["default/kubernetes:https Tcp 10.99.0.1 6443"];

/// As [`in_runtime`], with the tools and all threads on one processor, which the tools keep for as
/// long as they run: what one commits at once is then not read meanwhile. Without that the kernel,
/// which yields to the reader of a full socket, often lets it keep up.
fn in_crowded_runtime<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    in_namespace(move || {
        let this = Pid::from_raw(0);
        let allowed = sched_getaffinity(this).expect("ask for the processors");
        let first = (0..CpuSet::count()).find(|cpu| allowed.is_set(*cpu) == Ok(true));
        let mut one = CpuSet::new();
        one.set(first.expect("a processor")).expect("within the set");
        sched_setaffinity(this, &one).expect("keep to one processor");
        run_in_runtime(async || {
            // The runtime's threads are there already.
            keep_the_processor();
            test().await;
        });
    });
}

/// Puts the calling thread, and what it starts from now on, before all threads that are not real
/// time: it does not even yield to them.
#[expect(unsafe_code, reason = "no wrapper for sched_setscheduler")]
fn keep_the_processor() {
    let lowest = libc::sched_param { sched_priority: 1 };
    // SAFETY: it points to what the call reads; 0 is the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const lowest) };
    Errno::result(result).expect("become real time: this test needs CAP_SYS_NICE");
}

fn nftables(state: &str) -> String {
    captured(&format!("nftables-1.36/{state}.nft"))
}

#[test]
fn each_commit_gives_its_changes_and_no_others() {
    in_runtime(async || {
        nft(&nftables("0-before"));
        let (mut running, present) = Running::start(ROOMY_BYTES).await;
        assert_eq!(present, expected(&[18, 19, 20], API), "present, not added");

        let from = clock::now();
        nft(&format!("delete table ip kube-proxy\n{}", nftables("1-terminating")));
        let until = clock::now();
        let reported = running.reported().await;
        assert_eq!(reported.removed(), expected(&[20], &[]));
        assert_eq!(reported.added(), expected(&[21], &[]));
        for change in reported.removed.iter().chain(&reported.added) {
            assert!(
                change.at >= from && change.at.minus(change.uncertainty) <= until,
                "{change:?}"
            );
        }
        assert_eq!(running.status.in_use, BTreeSet::from([Dataplane::Nftables]));

        let rewrite = format!("delete table ip kube-proxy\n{}", nftables("3-gone"));
        nft(&rewrite);
        let reported = running.reported().await;
        assert!(reported.added.is_empty() && reported.removed.is_empty(), "{reported:?}");

        nft(&format!("delete table ip kube-proxy\n{}", nftables("5-all-unready")));
        assert_eq!(running.reported().await.removed(), expected(&[18, 19, 21], &[]));
        nft("delete table ip kube-proxy");
        assert_eq!(running.reported().await.removed(), expected(&[], API));
        assert_eq!(running.status.in_use, BTreeSet::new());
        assert_eq!(running.counters.gaps.get() + running.counters.overruns.get(), 0);
    });
}

#[test]
fn small_commits_as_kube_proxy_makes_them_are_followed() {
    in_runtime(async || {
        nft(&nftables("0-before"));
        let (mut running, _) = Running::start(ROOMY_BYTES).await;
        // What kube-proxy writes when 10.244.0.20 leaves one Service.
        nft("add chain ip kube-proxy service-SUSTUHLJ-default/web/tcp/http
            flush chain ip kube-proxy service-SUSTUHLJ-default/web/tcp/http
            add rule ip kube-proxy service-SUSTUHLJ-default/web/tcp/http meta l4proto tcp dnat ip to \
                numgen random mod 2 map { 0 : 10.244.0.18 . 8080, 1 : 10.244.0.19 . 8080 }
            delete element ip kube-proxy hairpin-connections { 10.244.0.20 . 10.244.0.20 . tcp . 8080 }");
        let reported = running.reported().await;
        let web = BTreeSet::from(["default/web:http Tcp 10.244.0.20 8080".to_owned()]);
        assert_eq!((reported.removed(), reported.added()), (web, BTreeSet::new()));
        // The Service's last endpoint goes: its chain stays for a while, but nothing leads there.
        nft("delete element ip kube-proxy service-ips { 10.96.79.89 . udp . 5353 }
            add element ip kube-proxy no-endpoint-services { 10.96.79.89 . udp . 5353 : goto reject-chain }");
        let udp: BTreeSet<_> =
            (18..=20).map(|pod| format!("default/udp:u Udp 10.244.0.{pod} 5353")).collect();
        assert_eq!(running.reported().await.removed(), udp);
    });
}

#[test]
fn a_table_that_changes_without_end_keeps_no_other_from_being_followed() {
    in_runtime(async || {
        nft(&nftables("0-before"));
        let (mut running, _) = Running::start(ROOMY_BYTES).await;
        running.legacy_commits_without_end();
        nft(&format!("delete table ip kube-proxy\n{}", nftables("1-terminating")));
        assert_eq!(running.reported().await.removed(), expected(&[20], &[]));
    });
}

#[test]
fn lost_messages_make_a_span_blind_and_the_outcome_uncertain() {
    in_crowded_runtime(async || {
        nft(&nftables("0-before"));
        let (mut running, _) = Running::start(2048).await;
        running.reported().await;
        let before = running.counters.overruns.get();
        let from = clock::now();
        // Hundreds of datagrams at once, and room for one.
        let padding = "add rule ip padding c counter\n".repeat(5_000);
        nft(&format!(
            "delete table ip kube-proxy\n{}\nadd table ip padding\nadd chain ip padding c\n{padding}",
            nftables("5-all-unready")
        ));
        let until = clock::now();
        let gone = expected(&[18, 19, 20], &[]);
        let two =
            |update: &Update| matches!(update, Update::Status(status) if status.backends == 2);
        let reported = running.until(two).await;
        assert_eq!(reported.removed(), gone);
        // A commit of many messages may overrun the socket more than once: then the next span
        // begins no later than where the one before ended.
        for pair in reported.blind.windows(2) {
            assert!(pair[1].from <= pair[0].until && pair[0].until <= pair[1].until, "{pair:?}");
        }
        for change in &reported.removed {
            let began = change.at.minus(change.uncertainty);
            let is_its = |blind: &&Blindness| blind.from == began && blind.until == change.at;
            let blind = reported.blind.iter().find(is_its);
            let blind = blind.unwrap_or_else(|| panic!("{change:?} in {:?}", reported.blind));
            assert!(blind.from <= until && blind.until >= from, "the commit lies in {blind:?}");
        }
        assert!(running.counters.overruns.get() > before);
        assert!(running.counters.resyncs.get() >= 1);
    });
}

#[test]
fn a_table_that_goes_while_messages_are_lost_takes_its_backends_along() {
    in_crowded_runtime(async || {
        nft(&nftables("0-before"));
        let (mut running, _) = Running::start(2048).await;
        running.reported().await;
        let before = running.counters.overruns.get();
        let padding = "add rule ip padding c counter\n".repeat(5_000);
        nft(&format!(
            "delete table ip kube-proxy\nadd table ip padding\nadd chain ip padding c\n{padding}"
        ));
        let marker_only =
            |update: &Update| matches!(update, Update::Status(status) if status.backends == 1);
        let reported = running.until(marker_only).await;
        assert_eq!(reported.removed(), expected(&[18, 19, 20], API));
        assert!(running.counters.overruns.get() > before);
    });
}

#[test]
fn a_switch_of_kube_proxys_mode_is_noticed_though_the_old_rules_stay() {
    in_runtime(async || {
        use Dataplane::{IptablesLegacy, IptablesNft, Nftables};
        nft(&nftables("0-before"));
        let (mut running, _) = Running::start(ROOMY_BYTES).await;
        running.reported().await;
        assert_eq!(running.status.serving, Some(Nftables));

        // As many backends as the other has.
        feed(&["iptables-nft-restore"], &captured("iptables-nft/0-before.txt"));
        running.reported().await;
        assert_eq!(running.status.serving, Some(IptablesNft));
        assert_eq!(running.status.in_use, BTreeSet::from([Nftables, IptablesNft]));

        legacy("1-terminating");
        running.legacy_committed(clock::now(), Family::V4).await;
        let serving = |wanted: Dataplane| move |update: &Update| matches!(update, Update::Status(status) if status.serving == Some(wanted));
        running.until(serving(IptablesLegacy)).await;
        assert_eq!(running.status.in_use, BTreeSet::from([Nftables, IptablesNft, IptablesLegacy]));

        // What changes last serves, also when it is the first again.
        nft(&format!("delete table ip kube-proxy\n{}", nftables("5-all-unready")));
        running.until(serving(Nftables)).await;
        nft("flush ruleset");
        running.until(serving(IptablesLegacy)).await;
        assert_eq!(running.status.in_use, BTreeSet::from([IptablesLegacy]));
    });
}

fn legacy(state: &str) {
    feed(&["iptables-legacy-restore"], &captured(&format!("iptables-legacy/{state}.txt")));
}

#[test]
fn legacy_commits_are_read_when_they_are_signalled() {
    in_runtime(async || {
        legacy("0-before");
        let (mut running, present) = Running::start(ROOMY_BYTES).await;
        assert_eq!(present, expected(&[26, 27, 28], API));
        legacy("1-terminating");
        let at = clock::now();
        running.legacy_committed(at, Family::V4).await;
        let reported = running.until_backends(&expected(&[26, 28, 29], API)).await;
        assert_eq!(reported.removed(), expected(&[27], &[]));
        assert_eq!(reported.added(), expected(&[29], &[]));
        assert!(reported.removed.iter().all(|change| change.at == at));
        assert_eq!(running.status.in_use, BTreeSet::from([Dataplane::IptablesLegacy]));

        let from = clock::now();
        legacy("5-all-unready");
        let until = clock::now();
        running.legacy_missed(from, until).await;
        let reported = running.until_backends(&expected(&[], API)).await;
        assert_eq!(reported.removed(), expected(&[26, 28, 29], &[]));
        assert!(!reported.blind.is_empty());
        assert!(reported.blind.iter().all(|blind| blind.from == from));
        assert!(reported.removed.iter().all(|change| change.at.minus(change.uncertainty) == from));
    });
}

#[test]
fn two_legacy_commits_before_one_read_share_their_span() {
    in_runtime(async || {
        legacy("0-before");
        let (mut running, _) = Running::start(ROOMY_BYTES).await;
        let read = running.counters.table_reads.get();
        legacy("6-none");
        let last = clock::now();
        let first = BootNs(last.0 - 5_000_000);
        for at in [first, last] {
            running.legacy_committed(at, Family::V4).await;
        }
        let done =
            |update: &Update| matches!(update, Update::Status(status) if status.backends == 1);
        let reported = running.until(done).await;
        assert_eq!(reported.removed(), expected(&[26, 27, 28], &[]));
        for change in &reported.removed {
            assert_eq!(change.at, last);
            assert!(change.at.minus(change.uncertainty) <= first);
        }
        assert_eq!(running.counters.table_reads.get(), read + 1);
    });
}

/// Takes `CAP_NET_ADMIN` from the calling thread, and from those it starts from now on, or gives it
/// back.
#[expect(unsafe_code, reason = "no wrapper for capset")]
fn allow_net_admin(allowed: bool) {
    /// `_LINUX_CAPABILITY_VERSION_3`, this thread.
    const HEADER: [u32; 2] = [0x2008_0522, 0];
    const NET_ADMIN: u32 = 1 << 12;
    // Effective, permitted and inheritable, twice: capabilities 0 to 31 and the others.
    let mut sets = [0_u32; 6];
    // SAFETY: both point to as many words as this version of the call has.
    let got = unsafe { libc::syscall(libc::SYS_capget, HEADER.as_ptr(), sets.as_mut_ptr()) };
    assert_eq!(got, 0, "capget");
    sets[0] = if allowed { sets[0] | NET_ADMIN } else { sets[0] & !NET_ADMIN };
    // SAFETY: as above.
    let set = unsafe { libc::syscall(libc::SYS_capset, HEADER.as_ptr(), sets.as_ptr()) };
    assert_eq!(set, 0, "capset");
}

#[test]
fn a_failed_legacy_read_is_tried_again_without_another_commit() {
    in_namespace(|| {
        // Blocking work on a new thread each time, with this thread's capabilities.
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_all().thread_keep_alive(Duration::from_millis(1));
        runtime.build().expect("build a runtime").block_on(async {
            legacy("0-before");
            let (mut running, _) = Running::start(ROOMY_BYTES).await;
            let from = clock::now();
            legacy("6-none");
            let until = clock::now();
            tokio::time::sleep(Duration::from_millis(50)).await;
            allow_net_admin(false);
            running.legacy_missed(from, until).await;
            let blind = |update: &Update| matches!(update, Update::Blind(_));
            while running.counters.table_failures.get() < 2 {
                let reported = running.until(blind).await;
                assert!(reported.removed.is_empty(), "{reported:?}");
                assert_eq!(reported.blind[0].from, from, "blind until it can be read");
            }
            allow_net_admin(true);
            let done =
                |update: &Update| matches!(update, Update::Status(status) if status.backends == 1);
            let reported = running.until(done).await;
            assert_eq!(reported.removed(), expected(&[26, 27, 28], &[]));
            for change in &reported.removed {
                assert_eq!(change.at.minus(change.uncertainty), from);
            }
        });
    });
}
