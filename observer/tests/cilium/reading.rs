//! What one reading tells, of every layout and of what it cannot understand.

use std::collections::BTreeSet;
use std::fs;

use nix::mount::{MsFlags, mount};
use observer::dataplane::cilium::{Reader, map_ids};

use super::maps::{ACTIVE, TERMINATING, V4, V4WithBackends2, V6, pinned, with_bpffs};
use super::running::{v4, v6};

#[test]
fn both_ip_versions_are_read_and_slots_beyond_the_count_are_draining() {
    with_bpffs(|maps| {
        let mut four = V4::create(&maps, "lb4", "v3");
        let mut six = V6::create(&maps, "lb6", "v3");
        for id in 1..=4 {
            four.backend(id, if id == 3 { TERMINATING } else { ACTIVE });
            six.backend(id, ACTIVE);
        }
        four.service(1, &[1, 2], &[3], 0);
        six.service(1, &[2], &[3], 0);
        let reached = Reader::new(maps, true).read().expect("readable");
        assert_eq!(reached.backends, BTreeSet::from([v4(1), v4(2), v6(2)]));
        assert_eq!((reached.draining, reached.unresolved), (BTreeSet::from([v4(3), v6(3)]), 0));
    });
}

#[test]
fn a_service_whose_backends_all_terminate_still_has_them() {
    with_bpffs(|maps| {
        let mut four = V4WithBackends2::create(&maps, "lb4", "v2");
        four.backend(1, TERMINATING);
        four.service(1, &[1], &[], 0);
        let reached = Reader::new(maps, true).read().expect("readable");
        assert_eq!(reached.backends, BTreeSet::from([v4(1)]));
        assert!(reached.draining.is_empty());
    });
}

#[test]
fn the_newer_of_two_versions_of_the_backends_is_read() {
    with_bpffs(|maps| {
        let mut old = V4WithBackends2::create(&maps, "lb4", "v2");
        old.backend(1, ACTIVE);
        old.service(1, &[1, 2], &[], 0);
        let mut new = pinned::<[u8; 4], [u8; 12]>(&maps, "cilium_lb4_backends_v3");
        let value = [10, 1, 0, 2, 0x1f, 0x90, 6, 0, 0, 0, 0, 0];
        new.insert(2_u32.to_ne_bytes(), value, 0).expect("write a backend");
        let reached = Reader::new(maps, true).read().expect("readable");
        assert_eq!((reached.backends, reached.unresolved), (BTreeSet::from([v4(2)]), 1));
    });
}

#[test]
fn what_a_proxy_takes_and_what_no_backend_has_is_unresolved() {
    with_bpffs(|maps| {
        let mut four = V4::create(&maps, "lb4", "v3");
        four.backend(1, ACTIVE);
        four.service(1, &[1], &[], 0);
        four.give_to_proxy(1);
        four.service(2, &[7], &[], 0);
        let reached = Reader::new(maps, true).read().expect("readable");
        assert_eq!((reached.backends.len(), reached.draining.len()), (0, 0), "{reached:?}");
        assert_eq!(reached.unresolved, 2);
    });
}

#[test]
fn an_unknown_layout_is_refused_by_name_and_size() {
    with_bpffs(|maps| {
        let _services = pinned::<[u8; 12], [u8; 16]>(&maps, "cilium_lb4_services_v2");
        let error = Reader::new(maps.clone(), false).read().expect_err("unknown").to_string();
        let words = "cilium_lb4_services_v2 has keys of 12 bytes and values of 16, but 12 and 12";
        assert!(error.contains(words), "{error}");
        fs::remove_file(maps.join("cilium_lb4_services_v2")).expect("unpin");

        let _services = pinned::<[u8; 12], [u8; 12]>(&maps, "cilium_lb4_services_v2");
        let error = Reader::new(maps.clone(), false).read().expect_err("incomplete").to_string();
        assert!(error.contains("Cilium 1.11 or newer is needed"), "{error}");

        let _backends = pinned::<[u8; 4], [u8; 8]>(&maps, "cilium_lb4_backends_v3");
        let error = Reader::new(maps, false).read().expect_err("unknown").to_string();
        assert!(error.contains("values of 8, but 4 and 12 are known"), "{error}");
    });
}

#[test]
fn a_node_without_cilium_is_an_error_only_when_it_was_asked_for() {
    with_bpffs(|maps| {
        let reached = Reader::new(maps.clone(), false).read().expect("nothing");
        assert!(reached.backends.is_empty());
        let elsewhere = maps.join("elsewhere");
        let error = Reader::new(elsewhere.clone(), true).read().expect_err("nothing").to_string();
        assert!(error.contains("no maps of Cilium in"), "{error}");
        assert!(map_ids(&elsewhere).is_empty());
    });
}

#[test]
fn a_file_that_is_no_pin_says_what_is_needed() {
    with_bpffs(|_| {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("cilium_lb4_services_v2"), "").expect("a file");
        let error = Reader::new(directory.path().into(), false).read().expect_err("no map");
        let error = format!("{error:#}");
        assert!(error.contains("needs CAP_BPF, and the node's bpf file system"), "{error}");
    });
}

/// As a pod sees them.
#[test]
fn a_read_only_mount_will_do() {
    with_bpffs(|maps| {
        let mut four = V4::create(&maps, "lb4", "v3");
        four.backend(1, ACTIVE);
        four.service(1, &[1], &[], 0);
        let bind = MsFlags::MS_BIND;
        mount(Some(&maps), &maps, None::<&str>, bind, None::<&str>).expect("bind mount");
        let read_only = bind | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(Some(&maps), &maps, None::<&str>, read_only, None::<&str>).expect("read-only");
        assert!(fs::remove_file(maps.join("cilium_lb4_services_v2")).is_err(), "it is read-only");
        let reached = Reader::new(maps.clone(), true).read().expect("readable");
        assert_eq!(reached.backends, BTreeSet::from([v4(1)]));
        nix::mount::umount(&maps).expect("unmount");
    });
}

#[test]
fn maps_made_anew_behind_their_pins_are_followed() {
    with_bpffs(|maps| {
        let mut old = V4::create(&maps, "lb4", "v3");
        old.backend(1, ACTIVE);
        old.service(1, &[1], &[], 0);
        let reader = Reader::new(maps.clone(), true);
        let ids = map_ids(&maps);
        assert_eq!(ids.len(), 2);
        for name in ["cilium_lb4_services_v2", "cilium_lb4_backends_v3"] {
            fs::remove_file(maps.join(name)).expect("unpin");
        }
        let mut new = V4::create(&maps, "lb4", "v3");
        new.backend(2, ACTIVE);
        new.service(1, &[2], &[], 0);
        assert_eq!(reader.read().expect("readable").backends, BTreeSet::from([v4(2)]));
        assert!(map_ids(&maps).is_disjoint(&ids));
    });
}
