//! Which of a node's cgroup hierarchies tells pods.
//!
//! With cgroup v2 alone there is one. Where version 1 is mounted, alone or beside version 2 (hybrid
//! mode), every controller's hierarchy has the pods, and that of version 2 may not.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use nix::sys::statfs::{CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, FsType, statfs};

const OWN_CGROUPS: &str = "/proc/self/cgroup";

/// Controllers in whose version 1 hierarchies the kubelet puts every pod.
const CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];

/// A mounted cgroup hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub root: PathBuf,
    /// The controller by which the kernel tells a task's directory; `None` with cgroup v2.
    pub controller: Option<Controller>,
}

/// A cgroup v1 controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Controller {
    /// The kernel's name for it.
    pub name: &'static str,
    /// The kernel's number of its hierarchy.
    pub hierarchy_id: u32,
}

impl Hierarchy {
    /// The hierarchy at `root`, or a controller's in a directory of its name below.
    ///
    /// # Errors
    /// When there is neither; says what to check.
    pub fn find(root: &Path) -> anyhow::Result<Self> {
        let advice = || format!("{}: check --cgroup-root", root.display());
        if kind(root).with_context(advice)? == CGROUP2_SUPER_MAGIC {
            return Ok(Self { root: root.to_owned(), controller: None });
        }
        Self::of_controller(root).with_context(advice)
    }

    fn of_controller(root: &Path) -> anyhow::Result<Self> {
        for name in CONTROLLERS {
            let root = root.join(name);
            if kind(&root).is_ok_and(|kind| kind == CGROUP_SUPER_MAGIC) {
                let own = fs::read_to_string(OWN_CGROUPS).context(OWN_CGROUPS)?;
                let hierarchy_id = hierarchy_id(&own, name)
                    .ok_or_else(|| anyhow!("{OWN_CGROUPS} has no controller {name}"))?;
                return Ok(Self { root, controller: Some(Controller { name, hierarchy_id }) });
            }
        }
        bail!(
            "neither a cgroup v2 hierarchy nor a directory of those of version 1 ({})",
            CONTROLLERS.join(", ")
        );
    }
}

impl fmt::Display for Hierarchy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let root = self.root.display();
        match self.controller {
            None => write!(f, "cgroup v2 at {root}"),
            Some(Controller { name, .. }) => write!(f, "cgroup v1 ({name}) at {root}"),
        }
    }
}

fn kind(root: &Path) -> nix::Result<FsType> {
    Ok(statfs(root)?.filesystem_type())
}

/// The number of a controller's hierarchy, from the lines `number:controller,controller:path`.
fn hierarchy_id(own_cgroups: &str, controller: &str) -> Option<u32> {
    own_cgroups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let id = fields.next()?.parse().ok()?;
        fields.next()?.split(',').any(|name| name == controller).then_some(id)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_controllers_number_is_read_from_the_processs_own_cgroups() {
        let own = "12:pids:/a:b\n4:cpu,cpuacct:/\n1:name=systemd:/init.scope\n0::/memory\nodd\n";
        assert_eq!(hierarchy_id(own, "pids"), Some(12));
        assert_eq!(hierarchy_id(own, "cpu"), Some(4));
        assert_eq!(hierarchy_id(own, "memory"), None);
        assert_eq!(hierarchy_id("", "cpu"), None);
    }

    #[test]
    fn a_directory_without_cgroups_is_named_with_what_to_check() {
        let directory = tempfile::tempdir().expect("temporary directory");
        fs::create_dir(directory.path().join("memory")).expect("a directory");
        for root in [Path::new("/none/here"), directory.path()] {
            let error = format!("{:#}", Hierarchy::find(root).expect_err("no cgroups"));
            assert!(error.contains(&*root.to_string_lossy()), "{error}");
            assert!(error.contains("check --cgroup-root"), "{error}");
        }
    }
}
