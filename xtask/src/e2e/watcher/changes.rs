//! When backends came and went, from listings of the rules and the commits between them. Pure.
//!
//! A listing says what is there, but takes tens of ms; a commit has an exact stamp, but does not
//! say all. Two listings bracket a change; the commit between them that made it is the one after
//! which the messages lead elsewhere, or the only one.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::ops::RangeInclusive;

use super::listing::Backend;
use super::netlink::Commit;
use crate::lab::network::Family;

/// What a tool said of one family's rules. Moments are ns of `CLOCK_BOOTTIME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listing {
    /// Just before the tool was started.
    pub(super) asked_ns: u64,
    /// When it had ended.
    pub(super) answered_ns: u64,
    pub(super) backends: BTreeSet<Backend>,
}

/// Whether a backend came or went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// New connections could be sent to it from then on.
    Entered,
    /// They could not any more.
    Left,
}

/// What a moment rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// The one commit between two listings, or the one whose messages show it.
    Commit,
    /// One of several commits between two listings: the earliest that is possible.
    EarliestOfSeveral,
    /// Two listings, and no commit was seen between them.
    Listings,
}

/// One backend's coming or going.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which way of which Service.
    pub backend: Backend,
    /// Where it was seen: the node's name.
    pub node: String,
    /// Came or went.
    pub direction: Direction,
    /// When.
    pub moment: Moment,
}

/// When something happened, and how sure that is. Moments are ns of `CLOCK_BOOTTIME`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// The best single figure: when the commit's notice came, else when the first listing that
    /// shows it had ended.
    pub at_ns: u64,
    /// The last sight of the old state: the begin of a listing, or a later commit's notice.
    pub not_before_ns: u64,
    /// The first sight of the new state.
    pub not_after_ns: u64,
    /// What the figure rests on.
    pub evidence: Evidence,
}

/// When a Service's chains on `node` no longer led to `address`, within `span` (ns of
/// `CLOCK_BOOTTIME`; another pod may have the address outside of it): the last of the chains, and of
/// the times if it came back. `None` while it has not left.
#[must_use]
pub fn removal<'c>(
    changes: &'c [Change],
    node: &str,
    service: &str,
    address: SocketAddr,
    span: &RangeInclusive<u64>,
) -> Option<&'c Change> {
    let last = last_change(changes, node, service, address, span);
    last.filter(|change| change.direction == Direction::Left)
}

/// Whether a Service's chains on `node` led to `address` in the end.
#[must_use]
pub fn leads(changes: &[Change], node: &str, service: &str, address: SocketAddr) -> bool {
    let last = last_change(changes, node, service, address, &(0..=u64::MAX));
    last.is_some_and(|change| change.direction == Direction::Entered)
}

fn last_change<'c>(
    changes: &'c [Change],
    node: &str,
    service: &str,
    address: SocketAddr,
    span: &RangeInclusive<u64>,
) -> Option<&'c Change> {
    let of = changes.iter().filter(|change| {
        change.node == node
            && change.backend.service == service
            && change.backend.address == address
            && span.contains(&change.moment.at_ns)
    });
    of.max_by_key(|change| change.moment.at_ns)
}

/// All changes of one family's `table` on `node`, in the order of the listings. The commits are in
/// the order of their stamps.
pub(super) fn changes(
    node: &str,
    family: Family,
    table: &str,
    listings: &[Listing],
    commits: &[Commit],
) -> Vec<Change> {
    let mut changes = Vec::new();
    for (before, after) in listings.iter().zip(listings.iter().skip(1)) {
        let between = |commit: &&Commit| {
            (before.asked_ns..=after.answered_ns).contains(&commit.at_ns)
                && commit.touches(family, table)
        };
        let between: Vec<&Commit> = commits.iter().filter(between).collect();
        let left = before.backends.difference(&after.backends);
        let entered = after.backends.difference(&before.backends);
        let left = left.map(|backend| (backend, Direction::Left));
        for (backend, direction) in left.chain(entered.map(|b| (b, Direction::Entered))) {
            let present = direction == Direction::Entered;
            let leads = |commit: &&Commit| {
                let leads = commit.leads_to(family, table, &backend.chain, &backend.token);
                leads.map(|leads| leads == present)
            };
            let moment = locate(before, after, &between, leads);
            let (backend, node) = (backend.clone(), node.to_owned());
            changes.push(Change { backend, node, direction, moment });
        }
    }
    changes
}

/// Finds the commit of a change; `is_new` says whether the new state shows in a commit.
fn locate(
    before: &Listing,
    after: &Listing,
    between: &[&Commit],
    is_new: impl Fn(&&Commit) -> Option<bool>,
) -> Moment {
    // Whatever came before the last commit that shows the old state is not it.
    let old = between.iter().rposition(|commit| is_new(commit) == Some(false));
    let possible = &between[old.map_or(0, |last| last + 1)..];
    let shown = possible.iter().find(|commit| is_new(commit) == Some(true));
    let last_old_ns = old.map_or(before.asked_ns, |last| between[last].at_ns);
    let exact = |commit: &Commit| Moment {
        at_ns: commit.at_ns,
        not_before_ns: last_old_ns.max(commit.not_before_ns),
        not_after_ns: commit.at_ns,
        evidence: Evidence::Commit,
    };
    let within = |at_ns, not_after_ns, evidence| Moment {
        at_ns,
        not_before_ns: last_old_ns,
        not_after_ns,
        evidence,
    };
    match (shown, possible) {
        (Some(shown), _) => exact(shown),
        (None, [only]) if !only.incomplete => exact(only),
        (None, [earliest, .., last]) => {
            within(earliest.at_ns, last.at_ns, Evidence::EarliestOfSeveral)
        }
        (None, _) => within(after.answered_ns, after.answered_ns, Evidence::Listings),
    }
}

#[cfg(test)]
mod tests {
    use super::super::netlink::Assembler;
    use super::super::netlink::tests::rewrite;
    use super::*;

    const TABLE: &str = "kube-proxy";
    const CHAIN: &str = "service-web";

    fn backend(last: u8) -> Backend {
        Backend {
            service: "default/web".to_owned(),
            chain: CHAIN.to_owned(),
            address: ([10, 244, 1, last], 8080).into(),
            token: vec![10, 244, 1, last],
        }
    }

    fn listing(asked_ns: u64, answered_ns: u64, backends: &[u8]) -> Listing {
        let backends = backends.iter().map(|last| backend(*last)).collect();
        Listing { asked_ns, answered_ns, backends }
    }

    fn commit(at_ns: u64, backends: &[u8]) -> Commit {
        let tokens: Vec<[u8; 4]> = backends.iter().map(|last| [10, 244, 1, *last]).collect();
        let tokens: Vec<&[u8]> = tokens.iter().map(<[u8; 4]>::as_slice).collect();
        rewrite(at_ns, CHAIN, &tokens)
    }

    fn lost(at_ns: u64) -> Commit {
        Assembler::default().lose(at_ns)
    }

    fn all(listings: &[Listing], commits: &[Commit]) -> Vec<(u8, Direction, Moment)> {
        let last = |change: &Change| match change.backend.address.ip() {
            std::net::IpAddr::V4(address) => address.octets()[3],
            std::net::IpAddr::V6(_) => 0,
        };
        changes("node-1", Family::V4, TABLE, listings, commits)
            .iter()
            .map(|change| (last(change), change.direction, change.moment))
            .collect()
    }

    fn moment(at_ns: u64, interval: (u64, u64), evidence: Evidence) -> Moment {
        Moment { at_ns, not_before_ns: interval.0, not_after_ns: interval.1, evidence }
    }

    #[test]
    fn the_only_commit_between_two_listings_did_it() {
        let listings = [listing(10, 15, &[2, 3]), listing(50, 60, &[3])];
        let commits = [commit(5, &[2, 3]), commit(49, &[3])];
        let exact = moment(49, (10, 49), Evidence::Commit);
        assert_eq!(all(&listings, &commits), [(2, Direction::Left, exact)]);
    }

    #[test]
    fn of_several_commits_the_messages_say_which() {
        let listings = [listing(10, 15, &[2, 3]), listing(50, 60, &[3])];
        let commits = [commit(20, &[2, 3]), commit(30, &[3]), commit(40, &[3])];
        let exact = moment(30, (20, 30), Evidence::Commit);
        assert_eq!(all(&listings, &commits), [(2, Direction::Left, exact)]);
    }

    #[test]
    fn a_backend_that_came_back_left_with_the_last_commit_that_lacks_it() {
        let listings = [listing(10, 15, &[2, 3]), listing(50, 60, &[3])];
        let commits = [commit(20, &[3]), commit(30, &[2, 3]), commit(40, &[3])];
        let exact = moment(40, (30, 40), Evidence::Commit);
        assert_eq!(all(&listings, &commits), [(2, Direction::Left, exact)]);
    }

    #[test]
    fn commits_that_do_not_say_leave_the_earliest_and_an_interval() {
        let listings = [listing(10, 15, &[2, 3]), listing(50, 60, &[3])];
        let other = |at_ns| rewrite(at_ns, "service-other", &[b"x"]);
        let earliest = moment(20, (10, 40), Evidence::EarliestOfSeveral);
        let several = all(&listings, &[other(20), other(40)]);
        assert_eq!(several, [(2, Direction::Left, earliest)]);
    }

    #[test]
    fn without_a_commit_the_listings_bracket_it() {
        let listings = [listing(10, 15, &[2, 3]), listing(50, 60, &[3])];
        let bracket = moment(60, (10, 60), Evidence::Listings);
        assert_eq!(all(&listings, &[]), [(2, Direction::Left, bracket)]);
        assert_eq!(all(&listings, &[lost(30)]), [(2, Direction::Left, bracket)]);
    }

    #[test]
    fn a_table_seen_to_be_replaced_brackets_it_by_two_looks() {
        let listings = [listing(10, 15, &[2, 3]), listing(50, 60, &[3])];
        let looked = |family| Commit::replacement(family, 28, 30);
        let exact = moment(30, (28, 30), Evidence::Commit);
        let commits = [looked(Family::V6), looked(Family::V4)];
        assert_eq!(all(&listings, &commits), [(2, Direction::Left, exact)]);
    }

    #[test]
    fn a_replacement_is_one_leaving_and_one_entering() {
        let listings = [listing(10, 15, &[2]), listing(50, 60, &[3])];
        let commits = [commit(20, &[2, 3]), commit(40, &[3])];
        let left = moment(40, (20, 40), Evidence::Commit);
        let entered = moment(20, (10, 20), Evidence::Commit);
        assert_eq!(
            all(&listings, &commits),
            [(2, Direction::Left, left), (3, Direction::Entered, entered)]
        );
    }

    #[test]
    fn a_rewrite_of_identical_rules_is_no_change() {
        let listings = [listing(10, 15, &[2]), listing(50, 60, &[2])];
        assert_eq!(all(&listings, &[commit(40, &[2])]), []);
    }
}
