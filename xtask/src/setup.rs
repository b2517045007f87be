//! What a machine needs, and installing what it lacks.
//!
//! Deciding (`plan`) is apart from looking (`Machine`) and doing (`install`). A machine that has
//! everything costs a few file look-ups; nothing is downloaded to find that out. Refuses to install
//! anything without root or off Debian 12, the one system this was tried on: it says what to get.

mod install;
mod tool;

use std::fmt;

use anyhow::Result;
pub(crate) use tool::{DEBIAN_CLIPPY, DEBIAN_RUSTC, has_debian_compiler};
use tool::{TOOLS, Tool};

use crate::step::say;

/// What a person wants to do; each needs some of the tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// Compile the kernel programs and the daemon.
    Build,
    /// Check the sources.
    Lint,
    /// Work in network namespaces: the demo, benchmarks.
    Network,
    /// The same, with a Kubernetes that is compiled here first.
    Kubernetes,
    /// Run the tests of another kernel in a guest.
    Guest,
    /// Run all tests.
    Test,
    /// Any of the above.
    Everything,
}

impl Task {
    /// Network namespaces and loading BPF programs take root, whatever is installed.
    fn takes_root(self) -> bool {
        matches!(self, Self::Network | Self::Kubernetes | Self::Test)
    }
}

/// Why nothing was started: the machine lacks something that this program may not install.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Unmet(String);

impl fmt::Display for Unmet {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl std::error::Error for Unmet {}

/// What matters about this machine.
#[derive(Clone, Copy, Debug)]
struct Machine {
    root: bool,
    debian_12: bool,
}

impl Machine {
    fn here() -> Self {
        let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
        Self { root: nix::unistd::geteuid().is_root(), debian_12: is_debian_12(&release) }
    }
}

/// Makes this machine ready for `task`, installing what is missing.
///
/// # Errors
/// [`Unmet`] if something is missing that must be installed by hand, or root is; else a failed
/// installation.
pub(crate) fn run(task: Task) -> Result<()> {
    let missing: Vec<&Tool> = missing(task, Tool::is_present).collect();
    plan(task, Machine::here(), &missing)?;
    if missing.is_empty() {
        if task == Task::Everything {
            say("setup: everything is here");
        }
        return Ok(());
    }
    install::all(&missing)?;
    let absent: Vec<&str> =
        missing.iter().filter(|tool| !tool.is_present()).map(|tool| tool.name).collect();
    if !absent.is_empty() {
        let absent = absent.join(", ");
        return Err(Unmet(format!(
            "installed but not found: {absent}; put /usr/local/bin and /usr/sbin into PATH"
        ))
        .into());
    }
    Ok(())
}

fn missing(task: Task, is_present: impl Fn(&Tool) -> bool) -> impl Iterator<Item = &'static Tool> {
    TOOLS
        .iter()
        .filter(move |tool| task == Task::Everything || tool.tasks.contains(&task))
        .filter(move |tool| !is_present(tool))
}

/// Said to whoever is not root.
const TAKES_ROOT: &str = "this makes network namespaces and loads BPF programs: run it as root";

/// Whether the missing tools may be installed here and the task can run.
fn plan(task: Task, machine: Machine, missing: &[&Tool]) -> Result<(), Unmet> {
    let needs_root = task.takes_root() && !machine.root;
    let installable = machine.root && machine.debian_12;
    if !missing.is_empty() && !installable {
        let root_too = if needs_root { format!("\n{TAKES_ROOT}") } else { String::new() };
        return Err(Unmet(by_hand(machine, missing) + &root_too));
    }
    if needs_root { Err(Unmet(TAKES_ROOT.into())) } else { Ok(()) }
}

fn by_hand(machine: Machine, missing: &[&Tool]) -> String {
    let heading = if machine.debian_12 {
        "not root, and these are missing; run this as root, or have them installed:"
    } else {
        "only Debian 12 is set up automatically, and these are missing; install them:"
    };
    let sources = missing.iter().map(|tool| {
        let source = if machine.debian_12 { tool.debian() } else { tool.elsewhere.to_owned() };
        format!("  {}: {source}", tool.name)
    });
    std::iter::once(heading.to_owned()).chain(sources).collect::<Vec<_>>().join("\n")
}

fn is_debian_12(os_release: &str) -> bool {
    let has = |line: &str| os_release.lines().any(|have| have.replace('"', "") == line);
    has("ID=debian") && has("VERSION_ID=12")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN_ROOT: Machine = Machine { root: true, debian_12: true };
    const DEBIAN_USER: Machine = Machine { root: false, debian_12: true };
    const FEDORA_ROOT: Machine = Machine { root: true, debian_12: false };

    fn all_missing(task: Task) -> Vec<&'static Tool> {
        missing(task, |_| false).collect()
    }

    #[test]
    fn building_needs_neither_promtool_nor_firewall_tools() {
        let names: Vec<&str> = all_missing(Task::Build).iter().map(|tool| tool.name).collect();
        assert_eq!(names, ["a compiler for BPF", "LLVM 22", "bpf-linker 0.13"]);
    }

    #[test]
    fn only_a_kubernetes_that_is_compiled_needs_go() {
        let needs_go = |task| all_missing(task).iter().any(|tool| tool.name == "Go");
        assert!(needs_go(Task::Kubernetes));
        assert!(!needs_go(Task::Network) && !needs_go(Task::Test));
    }

    #[test]
    fn a_present_tool_is_not_missing() {
        assert_eq!(missing(Task::Everything, |_| true).count(), 0);
        let only_nft: Vec<_> = missing(Task::Test, |tool| tool.name != "nft").collect();
        assert_eq!(only_nft.len(), 1);
    }

    #[test]
    fn root_on_debian_may_install_everything() {
        assert_eq!(plan(Task::Everything, DEBIAN_ROOT, &all_missing(Task::Everything)), Ok(()));
    }

    #[test]
    fn a_user_on_debian_is_told_the_packages() {
        let unmet =
            plan(Task::Network, DEBIAN_USER, &all_missing(Task::Network)).expect_err("unmet");
        assert!(unmet.0.starts_with("not root"), "{unmet}");
        assert!(unmet.0.ends_with(TAKES_ROOT), "{unmet}");
        assert!(
            unmet.0.contains("nft: apt-get install --no-install-recommends nftables"),
            "{unmet}"
        );
    }

    #[test]
    fn off_debian_each_missing_tool_is_named_and_no_package_is() {
        let missing = all_missing(Task::Everything);
        let unmet = plan(Task::Everything, FEDORA_ROOT, &missing).expect_err("unmet");
        assert_eq!(unmet.0.lines().count(), 1 + missing.len());
        assert!(!unmet.0.contains("apt-get"), "{unmet}");
    }

    #[test]
    fn with_everything_there_only_the_kernel_tasks_take_root() {
        assert_eq!(plan(Task::Build, DEBIAN_USER, &[]), Ok(()));
        assert_eq!(plan(Task::Lint, FEDORA_ROOT, &[]), Ok(()));
        assert!(plan(Task::Test, DEBIAN_USER, &[]).is_err());
        assert!(plan(Task::Network, DEBIAN_USER, &[]).is_err());
    }

    #[test]
    fn only_debian_12_is_debian_12() {
        assert!(is_debian_12("NAME=\"Debian GNU/Linux\"\nVERSION_ID=\"12\"\nID=debian\n"));
        assert!(!is_debian_12("VERSION_ID=\"13\"\nID=debian\n"));
        assert!(!is_debian_12("VERSION_ID=\"12\"\nID=other\nID_LIKE=debian\n"));
        assert!(!is_debian_12(""));
    }
}
