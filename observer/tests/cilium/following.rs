//! Without the kernel's hook, and when things go wrong.

use std::fs;
use std::time::Duration;

use observer::clock;
use observer::dataplane::{Commit, CommitSignal, Dataplane, SilentTable, Update};
use observer::facts::BackendStep;

use super::maps::{ACTIVE, TERMINATING, V4, V4WithBackends2, V6, pinned, with_bpffs};
use super::running::{Running, in_runtime, v4, v4_of, v6};

const CILIUM: SilentTable = SilentTable::Cilium;

#[test]
fn looks_find_what_changed_since_the_one_before() {
    with_bpffs(|maps| {
        in_runtime(async || {
            let mut four = V4WithBackends2::create(&maps, "lb4", "v2");
            let mut six = V6::create(&maps, "lb6", "v3");
            for id in 1..=2 {
                four.backend(id, ACTIVE);
                six.backend(id, ACTIVE);
            }
            four.service(1, &[1, 2], &[], 0);
            six.service(1, &[1, 2], &[], 0);
            let (mut running, present, _) = Running::start(maps).await;
            assert_eq!(present, [v4(1), v4(2), v6(1), v6(2)].into());
            assert_eq!(running.status.serving, Some(Dataplane::Cilium));

            // Nothing changed: a look tells nothing.
            let look = || CommitSignal::Look { at: clock::now(), table: CILIUM };
            running.commits.send(look()).await.expect("sent");
            four.backend(2, TERMINATING);
            let (begun, ended) = four.service(1, &[1], &[2], 2);
            running.commits.send(look()).await.expect("sent");
            let change = running.change().await;
            assert_eq!((&change.backend, change.step), (&v4(2), BackendStep::Draining));
            assert!(change.at >= ended && change.at.minus(change.uncertainty) <= begun);

            let before = clock::now();
            six.service(1, &[1], &[], 2);
            six.remove_backend(2);
            running.commits.send(look()).await.expect("sent");
            let change = running.change().await;
            assert_eq!((&change.backend, change.step), (&v6(2), BackendStep::Removed));
            assert!(change.at >= before && change.at.minus(change.uncertainty) <= before);
        });
    });
}

#[test]
fn a_pod_of_two_services_is_removed_from_each_by_itself() {
    with_bpffs(|maps| {
        in_runtime(async || {
            let mut four = V4::create(&maps, "lb4", "v3");
            four.backend(1, ACTIVE);
            four.service(1, &[1], &[], 0);
            four.service(2, &[1], &[], 0);
            let (mut running, present, _) = Running::start(maps).await;
            assert_eq!(present, [v4_of(1, 1), v4_of(2, 1)].into());
            let mut removed_at = Vec::new();
            for service in [2, 1] {
                four.service(service, &[], &[1], 1);
                let look = CommitSignal::Look { at: clock::now(), table: CILIUM };
                running.commits.send(look).await.expect("sent");
                let change = running.change().await;
                let expected = (v4_of(service, 1), BackendStep::Draining);
                assert_eq!((change.backend, change.step), expected);
                removed_at.push(change.at);
            }
            assert!(removed_at.is_sorted());
        });
    });
}

#[test]
fn an_unknown_layout_is_counted_and_read_again_until_it_is_known() {
    with_bpffs(|maps| {
        in_runtime(async || {
            drop(pinned::<[u8; 12], [u8; 16]>(&maps, "cilium_lb4_services_v2"));
            let (mut running, present, _) = Running::start(maps.clone()).await;
            assert!(present.is_empty());
            let said = running.status.to_string();
            assert!(said.contains("the table of cilium cannot be read since"), "{said}");
            assert!(said.contains("cilium_lb4_services_v2 has keys of 12 bytes"), "{said}");
            assert!(running.counters.table_failures.get() >= 1);
            fs::remove_file(maps.join("cilium_lb4_services_v2")).expect("unpin");
            let mut four = V4::create(&maps, "lb4", "v3");
            four.backend(1, ACTIVE);
            four.service(1, &[1], &[], 0);
            let mut blind = 0;
            let change = loop {
                match running.next().await {
                    Update::Change(change) => break change,
                    Update::Blind(_) => blind += 1,
                    _ => {}
                }
            };
            assert_eq!((&change.backend, change.step), (&v4(1), BackendStep::Added));
            assert!(blind > 0, "what the maps held is not known");
            while !running.status.unreadable.is_empty() {
                running.next().await;
            }
            assert_eq!(running.status.to_string(), "cilium serves Services (1 backends)");
        });
    });
}

#[test]
fn commits_without_an_end_leave_the_maps_unknown_meanwhile() {
    with_bpffs(|maps| {
        in_runtime(async || {
            let mut four = V4::create(&maps, "lb4", "v3");
            four.backend(1, ACTIVE);
            four.service(1, &[1], &[], 0);
            let (mut running, ..) = Running::start(maps).await;
            // Two seconds of commits, each within the window after the one before.
            let start = clock::now();
            for step in 0..2_500 {
                let at = start.plus(Duration::from_micros(800) * step);
                let signal = CommitSignal::Commit(Commit::new(at, CILIUM));
                running.commits.send(signal).await.expect("sent");
            }
            while !matches!(running.next().await, Update::Blind(_)) {}
            assert!(running.counters.table_failures.get() >= 1);
            four.service(1, &[], &[1], 1);
            let at = start.plus(Duration::from_secs(3));
            running
                .commits
                .send(CommitSignal::Commit(Commit::new(at, CILIUM)))
                .await
                .expect("sent");
            running.until(&v4(1), BackendStep::Draining).await;
        });
    });
}
