//! The rules of one node: what wakes the watch (the kernel's notices, or a replaced table), and
//! what the real tools list then.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, anyhow};

use super::changes::{Change, Listing, changes};
use super::legacy::watch;
use super::listing::{IPTABLES_TABLE, NFTABLES_TABLE, of_iptables, of_nftables};
use super::lock;
use super::netlink::{Commit, listen};
use crate::e2e::Dataplane;
use crate::e2e::network::Node;
use crate::lab::clock;
use crate::lab::command;
use crate::lab::netns::Namespace;
use crate::lab::network::Family;

/// How late the end is noticed when no commit comes.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The watch of one node.
#[derive(Debug)]
pub(super) struct NodeWatch {
    name: String,
    dataplane: Dataplane,
    seen: Arc<Mutex<Seen>>,
    thread: JoinHandle<()>,
}

/// What was seen so far.
#[derive(Debug, Default)]
struct Seen {
    commits: Vec<Commit>,
    v4: Vec<Listing>,
    v6: Vec<Listing>,
    /// Why a listing is missing.
    failure: Option<String>,
}

impl Seen {
    fn listings(&mut self, family: Family) -> &mut Vec<Listing> {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }

    /// A listing like the last one only moves the last sight of the old state.
    fn enter(&mut self, family: Family, listing: Listing) {
        let listings = self.listings(family);
        if let [.., before, last] = listings.as_mut_slice()
            && before.backends == last.backends
            && last.backends == listing.backends
        {
            *last = listing;
        } else {
            listings.push(listing);
        }
    }
}

impl NodeWatch {
    /// Begins; the rules have been listed once when this returns.
    pub(super) fn start(node: &Node, dataplane: Dataplane, stop: &Arc<AtomicBool>) -> Result<Self> {
        let seen: Arc<Mutex<Seen>> = Arc::default();
        let lister = Lister {
            namespace: node.namespace.clone(),
            dataplane,
            seen: Arc::clone(&seen),
            stop: Arc::clone(stop),
        };
        // One waiting wake-up is enough: the next listing shows all commits before it.
        let (wake, woken) = sync_channel(1);
        let entering = Arc::clone(&seen);
        let tell = move |commit| {
            lock(&entering).commits.push(commit);
            wake_up(&wake);
        };
        match dataplane {
            Dataplane::Nftables | Dataplane::IptablesNft => {
                listen(&node.namespace, Arc::clone(stop), tell)?;
            }
            Dataplane::IptablesLegacy => watch(&node.namespace, Arc::clone(stop), tell)?,
        }
        lister.list_both()?;
        let thread = std::thread::spawn(move || lister.follow_commits(&woken));
        Ok(Self { name: node.name.to_owned(), dataplane, seen, thread })
    }

    /// What changed so far.
    pub(super) fn changes(&self) -> Result<Vec<Change>> {
        let seen = lock(&self.seen);
        if let Some(failure) = &seen.failure {
            return Err(anyhow!("the rules of {} cannot be watched: {failure}", self.name));
        }
        let (name, table) = (self.name.as_str(), table(self.dataplane));
        let v4 = changes(name, Family::V4, table, &seen.v4, &seen.commits);
        let v6 = changes(name, Family::V6, table, &seen.v6, &seen.commits);
        Ok(v4.into_iter().chain(v6).collect())
    }

    /// Waits for the thread that lists, which was told to stop.
    pub(super) fn join(self) {
        // A panic was reported by the thread itself.
        self.thread.join().ok();
    }
}

/// A full channel means that it will look anyway; a closed one that the watch ends.
fn wake_up(wake: &SyncSender<()>) {
    match wake.try_send(()) {
        Ok(()) | Err(TrySendError::Full(()) | TrySendError::Disconnected(())) => {}
    }
}

fn table(dataplane: Dataplane) -> &'static str {
    match dataplane {
        Dataplane::Nftables => NFTABLES_TABLE,
        Dataplane::IptablesNft | Dataplane::IptablesLegacy => IPTABLES_TABLE,
    }
}

/// Runs the tools.
struct Lister {
    namespace: Namespace,
    dataplane: Dataplane,
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
}

impl Lister {
    fn follow_commits(&self, woken: &Receiver<()>) {
        while !self.stop.load(Ordering::Relaxed) {
            if woken.recv_timeout(LOOK_AGAIN).is_ok() {
                self.list_or_fail();
            }
        }
    }

    fn list_or_fail(&self) {
        if let Err(error) = self.list_both()
            && !self.stop.load(Ordering::Relaxed)
        {
            lock(&self.seen).failure.get_or_insert(format!("{error:#}"));
        }
    }

    fn list_both(&self) -> Result<()> {
        for family in Family::BOTH {
            let listing = self.list(family)?;
            lock(&self.seen).enter(family, listing);
        }
        Ok(())
    }

    fn list(&self, family: Family) -> Result<Listing> {
        let asked_ns = clock::boot_ns();
        let mut tool = tool(self.dataplane, family);
        let output = command::run(Some(&self.namespace), &mut tool, "")?.stdout;
        let answered_ns = clock::boot_ns();
        let backends = match self.dataplane {
            Dataplane::Nftables => of_nftables(&output, family)?,
            Dataplane::IptablesNft | Dataplane::IptablesLegacy => of_iptables(&output),
        };
        Ok(Listing { asked_ns, answered_ns, backends })
    }
}

/// The tool that lists a family's rules. Numbers only: no name is looked up.
fn tool(dataplane: Dataplane, family: Family) -> Command {
    let (program, arguments): (_, &[&str]) = match (dataplane, family) {
        (Dataplane::Nftables, Family::V4) => ("nft", &["-j", "-n", "list", "ruleset", "ip"]),
        (Dataplane::Nftables, Family::V6) => ("nft", &["-j", "-n", "list", "ruleset", "ip6"]),
        (Dataplane::IptablesNft, Family::V4) => ("iptables-nft-save", &["-t", IPTABLES_TABLE]),
        (Dataplane::IptablesNft, Family::V6) => ("ip6tables-nft-save", &["-t", IPTABLES_TABLE]),
        (Dataplane::IptablesLegacy, Family::V4) => {
            ("iptables-legacy-save", &["-t", IPTABLES_TABLE])
        }
        (Dataplane::IptablesLegacy, Family::V6) => {
            ("ip6tables-legacy-save", &["-t", IPTABLES_TABLE])
        }
    };
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn listing(asked_ns: u64, backends: &BTreeSet<super::super::Backend>) -> Listing {
        Listing { asked_ns, answered_ns: asked_ns + 1, backends: backends.clone() }
    }

    #[test]
    fn listings_that_show_nothing_new_are_kept_once() {
        let mut seen = Seen::default();
        let none = BTreeSet::new();
        for asked_ns in [10, 20, 30] {
            seen.enter(Family::V4, listing(asked_ns, &none));
        }
        let asked: Vec<u64> = seen.v4.iter().map(|listing| listing.asked_ns).collect();
        assert_eq!(asked, [10, 30]);
        assert!(seen.v6.is_empty());
    }
}
