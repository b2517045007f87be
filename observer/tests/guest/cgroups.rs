//! Pods' processes by their cgroups, of both versions: a machine has its controllers in one of the
//! two, a guest in none.

use super::machine::require_guest;
use super::pods::{Mount, a_listener_is_told, every_short_container_is_told};

#[test]
#[ignore = "runs in a guest: cargo xtask guest"]
fn a_container_that_lives_shorter_than_a_look_is_its_pods() {
    require_guest();
    every_short_container_is_told(&Mount::new(None));
}

#[test]
#[ignore = "runs in a guest: cargo xtask guest"]
fn on_a_node_with_cgroup_v1_as_well() {
    require_guest();
    let mount = Mount::new(Some("pids"));
    every_short_container_is_told(&mount);
    a_listener_is_told(&mount);
}
