//! Where a pod's processes are: a network namespace with the pod's addresses, or the node's, and
//! a cgroup. It lives as long as the pod, whatever happens to its container.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};

use super::cgroups::CgroupLayout;
use super::spec::{Identity, PodSpec};
use super::{Shared, lock};
use crate::lab::command;
use crate::lab::netns::Namespace;
use crate::lab::network::Addresses;

/// The place of one pod.
#[derive(Debug)]
pub(super) struct Sandbox {
    pub(super) namespace: Namespace,
    pub(super) addresses: Addresses,
    /// The pod's cgroup directory.
    pub(super) cgroup: PathBuf,
    /// What its addresses end in, unless they are the node's.
    number: Option<u8>,
}

impl Sandbox {
    /// Makes a pod's place; `None` while the address that it asks for is taken.
    pub(super) fn make(
        shared: &Shared,
        identity: &Identity,
        spec: &PodSpec,
    ) -> Result<Option<Self>> {
        let (node, options) = (shared.node(), &shared.options);
        let cgroup = options.cgroup_root.join(options.cgroup_layout.pod(spec.qos, &identity.uid));
        if spec.host_network {
            let (namespace, addresses) = (node.namespace.clone(), node.addresses);
            return Ok(Some(Self { namespace, addresses, cgroup, number: None }));
        }
        let Some(number) = lock(&shared.numbers).take(spec.address_number) else {
            return Ok(None);
        };
        let addresses = node.pod_addresses(number);
        let name = shared.started.fetch_add(1, Ordering::Relaxed);
        let namespace = node.add_pod(name, addresses).context("cannot connect a pod")?;
        Ok(Some(Self { namespace, addresses, cgroup, number: Some(number) }))
    }

    /// The cgroup directory of a run of its container.
    pub(super) fn run(&self, layout: CgroupLayout, container_id: &str) -> PathBuf {
        self.cgroup.join(layout.container(container_id))
    }

    /// Whether its addresses are its own, not the node's.
    pub(super) fn owns_addresses(&self) -> bool {
        self.number.is_some()
    }

    /// Removes it, once no process is in it; another pod can have the address then.
    pub(super) fn remove(self, shared: &Shared) -> Result<()> {
        if self.owns_addresses() {
            let mut ip = Command::new("ip");
            command::run(None, ip.args(["netns", "delete", self.namespace.name()]), "")?;
        }
        remove_cgroup(&self.cgroup)?;
        if let Some(number) = self.number {
            lock(&shared.numbers).give_back(number);
        }
        Ok(())
    }
}

/// Removes a pod's cgroup with those of its containers' runs.
fn remove_cgroup(pod: &Path) -> Result<()> {
    let entries = match fs::read_dir(pod) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| format!("cannot read {}", pod.display()))?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_run(&entry.path())?;
        }
    }
    remove_run(pod)
}

/// Removes a directory without others in it, whose processes have ended.
pub(super) fn remove_run(cgroup: &Path) -> Result<()> {
    fs::remove_dir(cgroup).with_context(|| format!("cannot remove {}", cgroup.display()))
}
