//! Follows the commits: which messages belong to which, in order and without a gap.
//!
//! The kernel sends a commit's messages after the new rules took effect and ends them with the
//! new generation's number. They are held back until that number is seen, then applied at once:
//! the model is always exactly one generation. Numbers rise by one per commit (0 is skipped), so
//! one too far is a loss, and one that a dump already showed is passed over.

use std::mem;
use std::time::Duration;

use super::messages::{Change, Message, TableId};
use super::ruleset::Ruleset;
use crate::dataplane::reach::Changes;
use crate::facts::BootNs;

/// How long before its first message wakes us a commit may have taken effect, while the kernel
/// walks the transaction. Measured from before the `sendmsg` of a small one to its reading: median
/// 50 µs, 99th percentile 90 µs. Waiting for a processor comes on top and is measured each time
/// (`Subscription`): with four spinning processes on two cores, 600 of 600 commits lay inside.
pub const DELIVERY: Duration = Duration::from_millis(2);
/// More messages than any commit of kube-proxy (10,000 Services are about 200,000): past it, a
/// dump is cheaper than the memory.
const BATCH_MAX: usize = 1_000_000;

/// A commit whose rules are now in the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// What it changed of the tables it touched; empty when it touched nothing that the model keeps.
    pub tables: Vec<(TableId, Changes)>,
    /// When and whose it was.
    pub heard: Heard,
}

/// When a commit was heard of, and who made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heard {
    /// Its first message arrived no earlier.
    pub earliest: BootNs,
    /// When its first message was read: it had taken effect by then.
    pub at: BootNs,
    /// When its last message was read.
    pub last: BootNs,
    /// The thread that made it, in the root pid namespace.
    pub task: Option<u32>,
}

/// When a thread began its latest commits, by a hook in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommitStamps {
    /// The latest.
    pub latest: BootNs,
    /// The one before, if it is known to have made one.
    pub before: Option<BootNs>,
}

/// What a message led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing yet.
    Nothing,
    /// The model moved on to the next generation.
    Commit(Commit),
    /// Something was missed: the model is no longer true and has to be read again.
    Lost,
}

/// The model and its place in the sequence of commits.
#[derive(Debug, Default)]
pub struct Follow {
    ruleset: Ruleset,
    generation: u32,
    batch: Vec<(TableId, Change)>,
    /// The batch lacks a message that could not be read.
    incomplete: bool,
    /// Earliest arrival and reading time of the batch's first message.
    began: Option<(BootNs, BootNs)>,
}

impl Follow {
    /// Starts from a dump that was all of `generation`.
    #[must_use]
    pub fn from_dump(ruleset: Ruleset, generation: u32) -> Self {
        Self { ruleset, generation, ..Self::default() }
    }

    /// The model.
    #[must_use]
    pub fn ruleset(&self) -> &Ruleset {
        &self.ruleset
    }

    /// The number of the commit that the model is at.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Takes the next message, which was read at `read` and had arrived no earlier than `earliest`.
    pub fn step(&mut self, message: Message, earliest: BootNs, read: BootNs) -> Step {
        match message {
            Message::In(table, change) => {
                self.began.get_or_insert((earliest, read));
                self.batch.push((table, change));
                if self.batch.len() > BATCH_MAX { Step::Lost } else { Step::Nothing }
            }
            // At the commit's end, so that a commit of many such messages is read anew once.
            Message::Unreadable => {
                self.incomplete = true;
                Step::Nothing
            }
            Message::Cut => Step::Lost,
            Message::Generation { number, task } => {
                let incomplete = mem::take(&mut self.incomplete);
                let batch = mem::take(&mut self.batch);
                let (earliest, at) = self.began.take().unwrap_or((earliest, read));
                let next = self.generation.checked_add(1).unwrap_or(1);
                if number == next && !incomplete {
                    self.generation = number;
                    let heard = Heard { earliest, at, last: read, task };
                    self.commit(batch, heard)
                } else if number.wrapping_sub(self.generation).cast_signed() <= 0 {
                    Step::Nothing
                } else {
                    Step::Lost
                }
            }
        }
    }

    fn commit(&mut self, batch: Vec<(TableId, Change)>, heard: Heard) -> Step {
        let Ok(tables) = self.ruleset.commit(batch) else { return Step::Lost };
        Step::Commit(Commit { tables, heard })
    }
}

impl Heard {
    /// It took effect within `[at - uncertainty, at]`. `stamps` are of the thread that made it, as
    /// they are after it.
    ///
    /// Of one thread's commits each begins when the one before has been heard. So the latest that
    /// began before this one's arrival is this one; one that began after may be a later one.
    #[must_use]
    pub fn uncertainty(&self, stamps: Option<CommitStamps>) -> Duration {
        // The walk over the transaction that precedes the first message is about as long as the
        // one that sends them.
        let sending = self.last.since(self.at);
        let reading = self.at.since(self.earliest);
        let usual = DELIVERY + sending + reading;
        match stamps {
            Some(CommitStamps { latest, before: None }) if latest <= self.at => {
                self.at.since(latest)
            }
            Some(CommitStamps { latest, .. }) if latest <= self.earliest => self.at.since(latest),
            Some(CommitStamps { before: Some(before), .. }) if before <= self.earliest => {
                usual.min(self.at.since(before))
            }
            _ => usual,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::nft::TableFamily;

    fn table() -> Message {
        let id = TableId { family: TableFamily::Ip, name: "t".into() };
        Message::In(id, Change::NewTable { dormant: false })
    }

    fn generation(number: u32) -> Message {
        Message::Generation { number, task: Some(4711) }
    }

    fn at(generation: u32) -> Follow {
        Follow::from_dump(Ruleset::default(), generation)
    }

    const T: [BootNs; 4] = [BootNs(1_000), BootNs(2_000), BootNs(3_000), BootNs(4_000)];

    #[test]
    fn nothing_is_applied_before_the_commits_number_is_seen() {
        let mut follow = at(7);
        assert_eq!(follow.step(table(), T[0], T[0]), Step::Nothing);
        assert_eq!(follow.ruleset().tables().count(), 0);
        assert!(matches!(follow.step(generation(8), T[0], T[1]), Step::Commit(_)));
        assert_eq!(follow.ruleset().tables().count(), 1);
    }

    #[test]
    fn a_commit_is_known_by_its_first_message_and_a_late_reading_is_uncertain() {
        let mut follow = at(7);
        follow.step(table(), T[0], T[1]);
        follow.step(table(), T[0], T[2]);
        let Step::Commit(commit) = follow.step(generation(8), T[0], T[3]) else {
            panic!("a commit")
        };
        assert_eq!((commit.heard.at, commit.heard.task), (T[1], Some(4711)));
        assert_eq!(commit.heard.uncertainty(None), DELIVERY + Duration::from_micros(1 + 2));
    }

    #[test]
    fn the_kernels_own_stamp_bounds_a_commit_unless_it_may_be_a_later_ones() {
        let heard = Heard { earliest: T[1], at: T[2], last: T[3], task: None };
        let bound = |latest, before| heard.uncertainty(Some(CommitStamps { latest, before }));
        let usual = heard.uncertainty(None);
        assert_eq!(bound(T[0], None), Duration::from_micros(2));
        assert_eq!(bound(T[1], Some(T[0])), Duration::from_micros(1));
        // Its only commit, or perhaps the second.
        assert_eq!(bound(T[2], None), Duration::ZERO);
        assert_eq!(bound(T[2], Some(T[0])), Duration::from_micros(2));
        // Its own stamp was overwritten, by one or two later ones.
        assert_eq!(bound(T[3], Some(T[1])), Duration::from_micros(1));
        assert_eq!(bound(T[3], Some(T[2])), usual);
        assert_eq!(bound(T[3], None), usual);
        // The thread's id was another's, long ago.
        assert_eq!(bound(T[2], Some(BootNs(0))), usual.min(Duration::from_micros(3)));
    }

    #[test]
    fn what_the_dump_already_showed_is_passed_over() {
        let mut follow = at(7);
        follow.step(table(), T[0], T[0]);
        assert_eq!(follow.step(generation(7), T[0], T[0]), Step::Nothing);
        assert_eq!(follow.ruleset().tables().count(), 0);
        assert_eq!(follow.generation(), 7);
    }

    #[test]
    fn a_missing_commit_is_a_loss_and_the_number_wraps_past_zero() {
        assert_eq!(at(7).step(generation(9), T[0], T[0]), Step::Lost);
        let wrapped = at(u32::MAX).step(generation(1), T[0], T[0]);
        assert!(matches!(wrapped, Step::Commit(_)));
    }

    #[test]
    fn a_commit_with_an_unreadable_message_is_a_loss_and_is_not_applied() {
        let mut follow = at(7);
        follow.step(table(), T[0], T[0]);
        assert_eq!(follow.step(Message::Unreadable, T[0], T[0]), Step::Nothing);
        assert_eq!(follow.step(generation(8), T[0], T[0]), Step::Lost);
        assert_eq!(follow.ruleset().tables().count(), 0);
        assert_eq!(at(7).step(Message::Cut, T[0], T[0]), Step::Lost);
    }

    #[test]
    fn an_unreadable_message_of_a_commit_that_the_dump_showed_is_passed_over() {
        let mut follow = at(7);
        follow.step(Message::Unreadable, T[0], T[0]);
        assert_eq!(follow.step(generation(7), T[0], T[0]), Step::Nothing);
        assert!(matches!(follow.step(generation(8), T[0], T[0]), Step::Commit(_)));
    }

    #[test]
    fn a_message_about_an_unknown_table_is_a_loss() {
        let mut follow = at(7);
        let id = TableId { family: TableFamily::Ip, name: "unknown".into() };
        follow.step(Message::In(id, Change::DeleteChain { chain: "c".into() }), T[0], T[0]);
        assert_eq!(follow.step(generation(8), T[0], T[0]), Step::Lost);
    }
}
