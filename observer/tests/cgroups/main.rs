//! Pods' processes and listeners by their cgroups, in a hierarchy that the test mounts.
//!
//! Needs root: without it the test fails.

mod pods;

use std::sync::{Mutex, PoisonError};

use pods::Mount;

/// One test at a time: a listener's takes this whole process into its cgroup.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn a_container_that_lives_shorter_than_a_look_is_its_pods() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    pods::every_short_container_is_told(&Mount::new(None));
}

#[test]
fn a_listener_is_its_pods() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    pods::a_listener_is_told(&Mount::new(None));
}
