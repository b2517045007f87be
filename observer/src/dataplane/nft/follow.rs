//! Follows the commits: which messages belong to which, in order and without a gap.
//!
//! The kernel sends a commit's messages after the new rules took effect and ends them with the
//! new generation's number. They are applied as they come, and what they change is known at the
//! end. Numbers rise by one per commit (0 is skipped), so one too far is a loss. After a dump the
//! messages are held back until the first number is seen: the dump may have shown them already.
//!
//! A dump takes a while, and shows of the commits meanwhile some and some not. Their messages say
//! of each thing what it is afterwards, whatever the dump showed of it: applied once more, from the
//! generation at which the dump began to that at which it ended, they make the model whole.

use std::mem;
use std::time::Duration;

use super::attributes::{Frame, Malformed, frames};
use super::messages::{Passed, TableId, Within, generation};
use super::ruleset::{Ruleset, Unexpected};
use crate::dataplane::Counters;
use crate::dataplane::reach::Changes;
use crate::facts::BootNs;

/// How long before its first message wakes us a commit may have taken effect, while the kernel
/// walks the transaction. Measured from before the `sendmsg` of a small one to its reading: median
/// 50 µs, 99th percentile 90 µs. Waiting for a processor comes on top and is measured each time
/// (`Subscription`): with four spinning processes on two cores, 600 of 600 commits lay inside.
pub const DELIVERY: Duration = Duration::from_millis(2);
/// More than any commit of kube-proxy (10,000 Services of 5 endpoints in iptables mode are about
/// 80 MB): past it, a dump is cheaper than the memory.
const PENDING_BYTES_MAX: usize = 128 << 20;
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

/// Messages were missed or not understood: the model is no longer true and has to be read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost;

/// The model and its place in the sequence of commits.
#[derive(Debug, Default)]
pub struct Follow {
    ruleset: Ruleset,
    generation: u32,
    /// The generations at which the dump began and ended: from the second on the model is whole.
    dumped_from: u32,
    whole_from: u32,
    /// Messages that come belong to the commit after `generation`.
    in_step: bool,
    /// Until then, the messages of the commit that has not ended yet.
    pending: Vec<u8>,
    /// Earliest arrival and reading time of that commit's first message.
    began: Option<(BootNs, BootNs)>,
    /// One of its messages could not be applied.
    broken: bool,
    /// The table of the latest message: mostly that of the next one too.
    table: Option<TableId>,
}

impl Follow {
    /// Starts from a dump that began at generation `from` and ended at `until`.
    #[must_use]
    pub fn from_dump(ruleset: Ruleset, from: u32, until: u32) -> Self {
        let mut follow = Self {
            ruleset,
            generation: from,
            dumped_from: from,
            whole_from: until,
            ..Self::default()
        };
        if follow.is_whole() {
            follow.ruleset.end();
        }
        follow
    }

    /// Whether the commits that happened during the dump have been heard: until then, neither the
    /// model nor what it reaches is of any use.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        rise(self.whole_from, self.generation) >= 0
    }

    /// Whether no commit happened during the dump.
    #[must_use]
    pub fn was_whole_at_once(&self) -> bool {
        self.whole_from == self.dumped_from
    }

    /// Whether some messages of a commit have come, but not all: the model's tables are then
    /// neither as before it nor as after it. What they reach is as before.
    #[must_use]
    pub fn is_within_a_commit(&self) -> bool {
        self.in_step && self.began.is_some()
    }

    /// The earliest arrival of the first message of the commit that has not ended yet.
    #[must_use]
    pub fn begun(&self) -> Option<BootNs> {
        self.began.map(|(earliest, _)| earliest)
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

    /// Takes the next messages, which were read at `read` and had arrived no earlier than
    /// `earliest`; adds the commits that they complete to `commits`, also before an error.
    ///
    /// # Errors
    /// [`Lost`]; messages that are not what the kernel writes are counted.
    pub fn take(
        &mut self,
        datagram: &[u8],
        (earliest, read): (BootNs, BootNs),
        counters: &Counters,
        commits: &mut Vec<Commit>,
    ) -> Result<(), Lost> {
        for frame in frames(datagram) {
            let frame = frame.and_then(|frame| Ok((frame, generation(&frame).transpose()?)));
            let (frame, end) = frame.map_err(|Malformed| {
                counters.malformed.increase();
                Lost
            })?;
            let Some(end) = end else {
                self.began.get_or_insert((earliest, read));
                if self.in_step {
                    self.apply(&frame, counters);
                } else {
                    self.hold_back(&frame)?;
                }
                continue;
            };
            let (earliest, at) = self.began.take().unwrap_or((earliest, read));
            if let Some(tables) = self.end(end.number, counters)? {
                let heard = Heard { earliest, at, last: read, task: end.task };
                commits.push(Commit { tables, heard });
            }
        }
        Ok(())
    }

    fn hold_back(&mut self, frame: &Frame<'_>) -> Result<(), Lost> {
        self.pending.extend(frame.whole);
        self.pending.resize(self.pending.len().next_multiple_of(4), 0);
        if self.pending.len() > PENDING_BYTES_MAX { Err(Lost) } else { Ok(()) }
    }

    /// Ends a commit; gives what it changed, unless the dump showed it.
    fn end(
        &mut self,
        number: u32,
        counters: &Counters,
    ) -> Result<Option<Vec<(TableId, Changes)>>, Lost> {
        let pending = mem::take(&mut self.pending);
        let next = self.generation.checked_add(1).unwrap_or(1);
        if number != next {
            let is_shown = !self.in_step && rise(self.generation, number) <= 0;
            return if is_shown { Ok(None) } else { Err(Lost) };
        }
        for frame in frames(&pending).flatten() {
            self.apply(&frame, counters);
        }
        if self.broken {
            return Err(Lost);
        }
        let was_whole = self.is_whole();
        (self.generation, self.in_step) = (number, true);
        let changes = self.is_whole().then(|| self.ruleset.end());
        Ok(changes.filter(|_| was_whole))
    }

    /// Applies a message. Of a commit in which that fails, the rest is passed over, so that the
    /// rules are read anew once, after its end.
    fn apply(&mut self, frame: &Frame<'_>, counters: &Counters) {
        if self.broken {
            return;
        }
        match self.try_to_apply(frame, counters) {
            Ok(()) | Err(Fault::Foreign) => {}
            // What the dump showed as it was later lacks what was deleted before.
            Err(Fault::Unexpected) => self.broken = self.is_whole(),
            Err(Fault::Malformed) => {
                counters.malformed.increase();
                self.broken = true;
            }
        }
    }

    fn try_to_apply(&mut self, frame: &Frame<'_>, counters: &Counters) -> Result<(), Fault> {
        let message = Within::read(frame)?;
        let table = &*self.table.insert(message.table(self.table.as_ref()));
        let (change, unknown) = match message.rule()? {
            Some(rule) if self.ruleset.rewrite(table, rule.handle, rule.fingerprint) => {
                return Ok(());
            }
            Some(rule) => rule.change()?,
            None => message.change()?,
        };
        counters.unknown_expressions.add(unknown);
        Ok(self.ruleset.apply(table, change)?)
    }
}

/// Why a message was not applied.
enum Fault {
    Foreign,
    Malformed,
    Unexpected,
}

impl From<Passed> for Fault {
    fn from(passed: Passed) -> Self {
        match passed {
            Passed::Foreign => Self::Foreign,
            Passed::Malformed => Self::Malformed,
        }
    }
}

impl From<Malformed> for Fault {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

impl From<Unexpected> for Fault {
    fn from(_: Unexpected) -> Self {
        Self::Unexpected
    }
}

/// The commits that a datagram of notifications ends: their numbers and messages.
pub(crate) fn ended(mut datagram: &[u8]) -> Vec<(u32, &[u8])> {
    let mut commits = Vec::new();
    let mut length = 0;
    for frame in frames(datagram).map_while(Result::ok) {
        length += frame.whole.len();
        if let Some(Ok(end)) = generation(&frame) {
            let (messages, rest) = datagram.split_at(length);
            commits.push((end.number, messages));
            (datagram, length) = (rest, 0);
        }
    }
    commits
}

/// How far a generation is beyond another; numbers wrap.
fn rise(from: u32, to: u32) -> i32 {
    to.wrapping_sub(from).cast_signed()
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
    use super::super::messages::{SUBSYSTEM, kind};
    use super::super::written::{attribute, generation, in_table, message};
    use super::*;
    use crate::dataplane::nft::TableFamily;

    fn table() -> Vec<u8> {
        in_table(kind::NEW_TABLE, &[])
    }

    fn chain(name: &[u8]) -> Vec<u8> {
        in_table(kind::NEW_CHAIN, &[attribute(3, name)])
    }

    fn rule_message(kind: u8, chain: &[u8], handle: u64, expressions: &[u8]) -> Vec<u8> {
        let handle = attribute(3, &handle.to_be_bytes());
        in_table(kind, &[attribute(2, chain), handle, attribute(4, expressions)])
    }

    /// It jumps to the chain `b`.
    fn rule(chain: &[u8], handle: u64) -> Vec<u8> {
        let jump = attribute(1, &(-3_i32).to_be_bytes());
        let verdict = attribute(2, &[jump, attribute(2, b"b\0")].concat());
        let data = [attribute(1, &0_u32.to_be_bytes()), attribute(2, &verdict)].concat();
        let expression = [attribute(1, b"immediate\0"), attribute(2, &data)].concat();
        rule_message(kind::NEW_RULE, chain, handle, &attribute(1, &expression))
    }

    fn deleted(chain: &[u8], handle: u64) -> Vec<u8> {
        rule_message(kind::DELETE_RULE, chain, handle, &[])
    }

    fn at(generation: u32) -> Follow {
        Follow::from_dump(Ruleset::default(), generation, generation)
    }

    const T: [BootNs; 4] = [BootNs(1_000), BootNs(2_000), BootNs(3_000), BootNs(4_000)];

    fn take(follow: &mut Follow, datagram: &[u8], read: BootNs) -> Result<Vec<Commit>, Lost> {
        let mut commits = Vec::new();
        let taken = follow.take(datagram, (T[0], read), &Counters::default(), &mut commits);
        taken.map(|()| commits)
    }

    fn tables(follow: &Follow) -> usize {
        follow.ruleset().tables().count()
    }

    /// The handles' number in each chain of the only table, by name.
    fn rules(follow: &Follow) -> Vec<(String, usize)> {
        let tables = follow.ruleset().tables();
        let chains = tables.flat_map(|(_, table)| &table.chains);
        let mut rules: Vec<_> =
            chains.map(|(name, chain)| (name.to_string(), chain.rules.len())).collect();
        rules.sort();
        rules
    }

    #[test]
    fn after_a_dump_nothing_is_applied_before_a_commits_number_is_seen() {
        let mut follow = at(7);
        assert_eq!(take(&mut follow, &table(), T[0]), Ok(vec![]));
        assert_eq!(tables(&follow), 0);
        assert_eq!(take(&mut follow, &generation(8), T[1]).map(|commits| commits.len()), Ok(1));
        assert_eq!(tables(&follow), 1);
    }

    #[test]
    fn a_commit_is_known_by_its_first_message_and_a_late_reading_is_uncertain() {
        let mut follow = at(7);
        take(&mut follow, &table(), T[1]).expect("nothing is lost");
        take(&mut follow, &table(), T[2]).expect("nothing is lost");
        let commits = take(&mut follow, &generation(8), T[3]).expect("nothing is lost");
        let [commit] = &commits[..] else { panic!("one commit") };
        assert_eq!((commit.heard.at, commit.heard.task), (T[1], Some(4711)));
        assert_eq!(commit.heard.uncertainty(None), DELIVERY + Duration::from_micros(1 + 2));
    }

    #[test]
    fn one_datagram_may_end_several_commits_and_begin_another() {
        let mut follow = at(7);
        let datagram = [table(), generation(8), chain(b"a"), generation(9), chain(b"b")].concat();
        assert_eq!(take(&mut follow, &datagram, T[0]).map(|commits| commits.len()), Ok(2));
        assert_eq!(take(&mut follow, &generation(10), T[0]).map(|commits| commits.len()), Ok(1));
        assert_eq!(rules(&follow), [("a".to_owned(), 0), ("b".to_owned(), 0)]);
    }

    #[test]
    fn in_step_messages_are_applied_as_they_come() {
        let mut follow = at(7);
        take(&mut follow, &[table(), generation(8)].concat(), T[0]).expect("nothing is lost");
        take(&mut follow, &chain(b"a"), T[0]).expect("nothing is lost");
        assert!(follow.is_within_a_commit());
        assert_eq!(rules(&follow), [("a".to_owned(), 0)]);
        assert_eq!(take(&mut follow, &generation(9), T[0]).map(|commits| commits.len()), Ok(1));
        assert!(!follow.is_within_a_commit());
        // Applied already, so that its number must be the next one.
        assert_eq!(take(&mut follow, &generation(9), T[0]), Err(Lost));
    }

    #[test]
    fn a_rule_written_anew_is_known_by_its_new_handle() {
        let mut follow = at(7);
        let begin = [table(), chain(b"a"), chain(b"b"), rule(b"a", 1), generation(8)].concat();
        take(&mut follow, &begin, T[0]).expect("nothing is lost");
        let anew = [deleted(b"a", 1), rule(b"a", 2), generation(9)].concat();
        take(&mut follow, &anew, T[0]).expect("nothing is lost");
        assert_eq!(rules(&follow), [("a".to_owned(), 1), ("b".to_owned(), 0)]);
        for (handle, left) in [(1, 1), (2, 0)] {
            let number = follow.generation() + 1;
            let datagram = [deleted(b"a", handle), generation(number)].concat();
            take(&mut follow, &datagram, T[0]).expect("nothing is lost");
            assert_eq!(rules(&follow)[0].1, left, "after the deletion of {handle}");
        }
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
        let datagram = [table(), generation(7)].concat();
        assert_eq!(take(&mut follow, &datagram, T[0]), Ok(vec![]));
        assert_eq!((tables(&follow), follow.generation()), (0, 7));
    }

    #[test]
    fn a_missing_commit_is_a_loss_and_the_number_wraps_past_zero() {
        assert_eq!(take(&mut at(7), &generation(9), T[0]), Err(Lost));
        assert_eq!(take(&mut at(u32::MAX), &generation(1), T[0]).map(|all| all.len()), Ok(1));
    }

    #[test]
    fn what_a_dump_showed_of_the_commits_meanwhile_is_made_whole_by_their_messages() {
        // From 7 to 9: the chain `a` got a rule and went, `b` came, with a rule that was written
        // anew. The dump showed `b` and its last rule, but no longer `a`.
        let commits = [
            vec![table(), chain(b"b"), rule(b"a", 1), rule(b"b", 2), generation(8)],
            vec![deleted(b"a", 1), in_table(kind::DELETE_CHAIN, &[attribute(3, b"a")])],
            vec![deleted(b"b", 2), rule(b"b", 3), generation(9)],
        ];
        let mut dumped = at(6);
        let shown = [table(), chain(b"b"), rule(b"b", 3), generation(7)].concat();
        take(&mut dumped, &shown, T[0]).expect("nothing is lost");
        let mut follow = Follow::from_dump(dumped.ruleset().clone(), 7, 9);
        assert!(!follow.was_whole_at_once());
        for datagram in commits.map(|messages| messages.concat()) {
            assert!(!follow.is_whole());
            assert_eq!(take(&mut follow, &datagram, T[0]), Ok(vec![]), "no change that is told");
        }
        assert!(follow.is_whole());
        assert_eq!(rules(&follow), [("b".to_owned(), 1)]);
        let last = [deleted(b"b", 3), generation(10)].concat();
        assert_eq!(take(&mut follow, &last, T[0]).map(|commits| commits.len()), Ok(1));
        assert_eq!(rules(&follow), [("b".to_owned(), 0)]);
    }

    #[test]
    fn a_message_about_an_unknown_table_is_a_loss() {
        let datagram = [chain(b"c"), generation(8)].concat();
        assert_eq!(take(&mut at(7), &datagram, T[0]), Err(Lost));
    }

    #[test]
    fn only_a_malformed_message_that_would_be_kept_makes_its_commit_a_loss() {
        let malformed = &[9, 0, 1, 0][..];
        let (ip, bridge) = (TableFamily::Ip.number(), 7);
        let objects = 18;
        let cut = message(SUBSYSTEM, kind::NEW_RULE, ip, &[])[..18].to_vec();
        for (bytes, lost) in [
            (message(SUBSYSTEM, kind::NEW_RULE, ip, malformed), true),
            (message(SUBSYSTEM, kind::NEW_GENERATION, 0, malformed), true),
            (cut, true),
            (message(SUBSYSTEM, kind::NEW_RULE, bridge, malformed), false),
            (message(SUBSYSTEM, objects, ip, malformed), false),
            (message(1, kind::NEW_RULE, ip, malformed), false),
        ] {
            let (counters, mut follow) = (Counters::default(), at(7));
            let mut taken = Ok(());
            for datagram in [bytes.clone(), generation(8)] {
                let taken_now = follow.take(&datagram, (T[0], T[0]), &counters, &mut Vec::new());
                taken = taken.and(taken_now);
            }
            assert_eq!(taken.is_err(), lost, "{bytes:?}");
            assert_eq!(counters.malformed.get(), u64::from(lost), "{bytes:?}");
        }
    }

    #[test]
    fn a_malformed_message_of_a_commit_that_the_dump_showed_is_passed_over() {
        let mut follow = at(7);
        let malformed = message(SUBSYSTEM, kind::NEW_RULE, TableFamily::Ip.number(), &[9, 0, 1, 0]);
        assert_eq!(take(&mut follow, &[malformed, generation(7)].concat(), T[0]), Ok(vec![]));
    }
}
