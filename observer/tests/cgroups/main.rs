//! Pods' processes and listeners by their cgroups, in a hierarchy that the test mounts.
//!
//! Needs root: without it the test fails.

mod pods;

use pods::Mount;

#[test]
fn a_container_that_lives_shorter_than_a_look_is_its_pods() {
    pods::every_short_container_is_told(&Mount::new(None));
}
