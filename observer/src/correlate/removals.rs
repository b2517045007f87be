//! Which backends a terminating pod had in this node's rules, and when each was removed.

use std::net::IpAddr;
use std::time::Duration;

use super::assemble::{Assembler, earliest};
use super::backends::Step;
use super::pods::Pod;
use super::slices::{EndpointKey, EndpointState};
use super::timeline::{Instant, Removal, Source};
use crate::facts::{Backend, BackendStep, BootNs, PodUid, ServiceName};

/// Rules may name a new owner of an address before our pod watch does.
const REUSE_SKEW: Duration = Duration::from_secs(10);

impl Assembler<'_> {
    /// Every backend of the pod that this node's rules had at the deletion or since, with its
    /// removal. Sorted by Service port, for a stable presentation.
    pub(super) fn removals(
        &self,
        uid: &PodUid,
        pod: &Pod,
        floor: BootNs,
        requested: Option<Instant>,
    ) -> Vec<(Backend, Removal)> {
        let mut removals = Vec::new();
        for address in pod.addresses() {
            let next_owner = self.next_owner(uid, pod, address);
            let exclusive = pod.has_address_since(address).is_some();
            for (backend, steps) in self.evidence.backends.of(address) {
                let keys: Vec<&EndpointKey> =
                    pod.endpoints.keys().filter(|key| is_endpoint_of(&backend, key)).collect();
                // A node's address, which host-network pods share, or another node's pod's.
                if keys.is_empty() && !exclusive {
                    continue;
                }
                let gone = pod.gone_from(&keys);
                let fate = fate(steps, floor, next_owner, gone);
                let Fate::Backend { backend_removed, draining, drained } = fate else { continue };
                let terminating =
                    keys.iter().filter_map(|key| endpoint_terminating(pod, key, floor, requested));
                let removal = Removal {
                    service: backend.service.clone(),
                    endpoint_terminating: earliest(terminating),
                    backend_removed,
                    draining,
                    drained,
                };
                removals.push((backend, removal));
            }
        }
        removals.sort_by(|one, other| one.0.cmp(&other.0));
        removals
    }

    /// When another pod of this node is first known to have the address after this one.
    fn next_owner(&self, uid: &PodUid, pod: &Pod, address: IpAddr) -> Option<BootNs> {
        let since = pod.has_address_since(address)?;
        self.pods
            .iter()
            .filter(|(other, _)| *other != uid)
            .filter_map(|(_, other)| other.has_address_since(address))
            .filter(|other_since| *other_since > since)
            .min()
    }
}

/// What became of one backend in one termination.
enum Fate {
    /// The rules did not have it when the termination began, nor since.
    NoBackend,
    /// They had it; the removal and the end of draining, once they happened.
    Backend { backend_removed: Option<Instant>, draining: bool, drained: Option<Instant> },
}

/// Follows one backend's steps from the floor on, up to the next owner of its address: as the pod
/// watch shows it, or (another node's pod) whoever is added after the endpoint is `gone`.
fn fate(steps: &[Step], floor: BootNs, next_owner: Option<BootNs>, gone: Option<BootNs>) -> Fate {
    // A pod that ended keeps naming an address that may be another's long before it is deleted.
    if next_owner.is_some_and(|next| next <= floor) {
        return Fate::NoBackend;
    }
    let (earlier, later) = steps.split_at(steps.partition_point(|step| step.at < floor));
    let mut before = earlier.last().map(|step| step.what);
    let mut known = before == Some(BackendStep::Added);
    let (mut backend_removed, mut drained) = (None, None);
    for step in later {
        let at = step.at;
        if next_owner.is_some_and(|next| at >= next) {
            break;
        }
        let uncertainty = Some(step.uncertainty());
        let instant = Instant { at, uncertainty, source: Source::Dataplane };
        match step.what {
            BackendStep::Added => {
                let others = next_owner.is_some_and(|next| at.plus(REUSE_SKEW) >= next)
                    || gone.is_some_and(|gone| at >= gone);
                if backend_removed.is_some() && others {
                    break;
                }
                (known, backend_removed, drained) = (true, None, None);
            }
            // What drained before the termination began is no backend of it.
            BackendStep::Removed if before == Some(BackendStep::Draining) => {
                drained = backend_removed.and(Some(instant));
            }
            BackendStep::Draining | BackendStep::Removed => {
                (known, backend_removed) = (true, Some(instant));
            }
        }
        before = Some(step.what);
    }
    let draining = before == Some(BackendStep::Draining);
    if known { Fate::Backend { backend_removed, draining, drained } } else { Fate::NoBackend }
}

/// The last removal, once all backends are removed.
pub(super) fn all_removed(removals: &[(Backend, Removal)]) -> Option<Instant> {
    let removed: Option<Vec<Instant>> =
        removals.iter().map(|(_, removal)| removal.backend_removed).collect();
    removed?.into_iter().max_by_key(|instant| instant.at)
}

fn is_endpoint_of(backend: &Backend, key: &EndpointKey) -> bool {
    let is_its_service = match &backend.service {
        Some(ServiceName::Port(service)) => *service == key.service,
        Some(ServiceName::FrontEnd { .. }) | None => true,
    };
    is_its_service
        && (backend.protocol, backend.address, backend.port)
            == (key.protocol, key.address, key.port)
}

/// The first sight of one endpoint terminating, not ready or gone, in this termination. It cannot
/// have happened before the deletion was requested.
pub(super) fn endpoint_terminating(
    pod: &Pod,
    key: &EndpointKey,
    floor: BootNs,
    requested: Option<Instant>,
) -> Option<Instant> {
    let mut steps = pod.endpoints.get(key)?.range((floor, EndpointState::Back)..).peekable();
    let at = loop {
        match steps.next()? {
            (_, EndpointState::Back) => {}
            // Listed again since: the controller moved it to another slice.
            (_, EndpointState::Gone) if steps.peek().is_some() => {}
            (at, _) => break *at,
        }
    };
    let uncertainty = requested.and_then(|requested| {
        let begin = requested.at.minus(requested.uncertainty?);
        at.0.checked_sub(begin.0).map(Duration::from_nanos)
    });
    Some(Instant { at, uncertainty, source: Source::SliceWatch })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::{Protocol, ServicePort};

    #[test]
    fn only_a_name_tells_the_services_of_an_endpoint_apart() {
        let port = |name: &str| ServicePort(name.into());
        let front_end = ServiceName::FrontEnd { address: [10, 96, 0, 10].into(), port: 80 };
        let address = IpAddr::from([10, 0, 0, 1]);
        let (service, protocol) = (port("default/web:http"), Protocol::Tcp);
        let key = EndpointKey { service, protocol, address, port: 8080 };
        for (service, expected) in [
            (Some(ServiceName::Port(port("default/web:http"))), true),
            (Some(ServiceName::Port(port("default/api:http"))), false),
            (Some(front_end), true),
            (None, true),
        ] {
            let backend = Backend { service, protocol, address, port: 8080 };
            assert_eq!(is_endpoint_of(&backend, &key), expected, "{backend:?}");
            assert!(!is_endpoint_of(&Backend { port: 8081, ..backend }, &key));
        }
    }
}
