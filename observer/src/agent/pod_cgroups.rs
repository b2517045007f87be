//! Whether pods can be told by their cgroups, for `/readyz`. Without them the agent still measures
//! gaps, arrivals and refusals, so it is a remark and no lack.

use std::sync::atomic::Ordering;

use crate::kernel::EventCounts;
use crate::kernel::cgroups::Hierarchy;
use crate::readiness::{Item, Readiness};

/// The item of the hierarchy that tells pods.
pub(super) struct PodCgroups {
    item: Item,
    /// What there is to say once a pod was seen.
    remark: Option<String>,
}

impl PodCgroups {
    /// No pod was seen yet. (The agent of a cluster is one itself.)
    pub(super) fn expect(readiness: &Readiness, hierarchy: &Hierarchy) -> Self {
        let item = readiness.expect("cgroups", "not read yet");
        item.up_as(format!(
            "{hierarchy} has no pod's directory: signals, exits and listeners of pods are not \
             told; on a node with pods, check --cgroup-root"
        ));
        let remark = hierarchy
            .controller
            .is_some()
            .then(|| format!("{hierarchy}: of sockets, only listeners tell their pod"));
        Self { item, remark }
    }

    /// Says what the reader of events found.
    pub(super) fn show(&self, found: &EventCounts) {
        if !found.knows_a_pod.load(Ordering::Relaxed) {
            return;
        }
        match &self.remark {
            Some(remark) => self.item.up_as(remark),
            None => self.item.up(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::kernel::cgroups::Controller;

    /// What is said before and after a pod's directory was seen.
    fn remarks(controller: Option<Controller>) -> [Vec<String>; 2] {
        let readiness = Readiness::default();
        let hierarchy = Hierarchy { root: PathBuf::from("/cgroups"), controller };
        let cgroups = PodCgroups::expect(&readiness, &hierarchy);
        let counts = EventCounts::default();
        [false, true].map(|known| {
            counts.knows_a_pod.store(known, Ordering::Relaxed);
            cgroups.show(&counts);
            assert_eq!(readiness.missing(), []);
            readiness.remarks().iter().map(ToString::to_string).collect()
        })
    }

    #[test]
    fn a_hierarchy_without_a_pod_is_remarked() {
        let [before, after] = remarks(None);
        assert!(before[0].starts_with("cgroups: cgroup v2 at /cgroups has no pod"), "{before:?}");
        assert_eq!(after, [""; 0]);
    }

    #[test]
    fn version_1_is_remarked() {
        let [_, after] = remarks(Some(Controller { name: "memory", hierarchy_id: 4 }));
        let said =
            "cgroups: cgroup v1 (memory) at /cgroups: of sockets, only listeners tell their pod";
        assert_eq!(after, [said]);
    }
}
