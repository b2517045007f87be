//! What a recording's `timeline.txt` says: the endpoints as the API server listed them, when the
//! rules were committed, and so which pods the rules had to send to. Knows nothing of rules.

use std::collections::BTreeSet;

use super::namespace::captured;

/// kube-proxy and the recorder each watch the `EndpointSlice`; either may see a change this much
/// before the other (20 ms at most in these recordings).
const WATCHES_APART_NS: u64 = 50_000_000;
const DAY_NS: u64 = 86_400_000_000_000;

/// One pod in an `EndpointSlice`.
#[derive(Clone, Copy, Debug)]
struct Endpoint {
    /// Last byte of its address.
    pod: u8,
    ready: bool,
    serving: bool,
    terminating: bool,
}

/// A change of the rules.
#[derive(Clone, Debug)]
pub(crate) struct Commit {
    /// When its last message was received, or the tool ended; in ns since midnight.
    pub(crate) at_ns: u64,
    /// `nf_tables`' number of it, or the file that the tool was fed with.
    pub(crate) name: String,
}

/// A recording's course.
#[derive(Debug, Default)]
pub(crate) struct Timeline {
    slices: Vec<(u64, Vec<Endpoint>)>,
    /// When a pod was deleted, all were, and three were started.
    actions: Vec<u64>,
    pub(crate) commits: Vec<Commit>,
}

impl Timeline {
    pub(crate) fn of(folder: &str) -> Self {
        let mut timeline = Self::default();
        for line in captured(&format!("{folder}/timeline.txt")).lines() {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let at_ns = time_of_day_ns(fields[0]);
            let field = |key: &str| fields.iter().find_map(|field| field.strip_prefix(key));
            match fields[2] {
                "ACT" => timeline.actions.push(at_ns),
                "EPS" => {
                    let endpoints = fields[6..].iter().map(|field| endpoint(field)).collect();
                    timeline.slices.push((at_ns, endpoints));
                }
                "NFT" => {
                    let name = field("gen=").expect("a generation").to_owned();
                    timeline.commits.push(Commit { at_ns, name });
                }
                "WRAP" if fields[4] == "end" => {
                    let name = field("in=").expect("an input").to_owned();
                    timeline.commits.push(Commit { at_ns, name });
                }
                "WRAP" => {}
                other => panic!("{folder}: a line of kind {other}"),
            }
        }
        assert_eq!(timeline.actions.len(), 3, "{folder}");
        timeline
    }

    /// The pods that the rules send to in each of the eight recorded states.
    pub(crate) fn states(&self) -> [BTreeSet<u8>; 8] {
        let before = self.slices[0].1.iter().map(|endpoint| endpoint.pod).collect();
        let (one, all, back) = (self.phase(0), self.phase(1), self.phase(2));
        let whole = |slice: &&Vec<Endpoint>| slice.iter().all(|endpoint| endpoint.serving);
        let leaving = |slice: &&Vec<Endpoint>| slice.iter().all(|endpoint| endpoint.terminating);
        let spent = |slice: &&Vec<Endpoint>| slice.iter().all(|endpoint| !endpoint.serving);
        let usable_in = |slice: Option<&Vec<Endpoint>>| usable(slice.expect("a recorded state"));
        [
            before,
            usable_in(one.iter().take_while(|slice| whole(slice)).last()),
            usable_in(one.iter().find(|slice| !whole(slice))),
            usable_in(one.last()),
            usable_in(all.iter().find(leaving)),
            usable_in(all.iter().find(spent)),
            usable_in(all.last()),
            usable_in(back.last()),
        ]
    }

    /// The slices from one action to the next.
    fn phase(&self, action: usize) -> Vec<Vec<Endpoint>> {
        let from = self.actions[action];
        let until = self.actions.get(action + 1).copied().unwrap_or(u64::MAX);
        let within = self.slices.iter().filter(|(at, _)| (from..until).contains(at));
        within.map(|(_, slice)| slice.clone()).collect()
    }

    /// What kube-proxy may have known when it wrote a commit: the pods to send to by any slice
    /// that was in force around then.
    pub(crate) fn usable_around(&self, at_ns: u64) -> Vec<BTreeSet<u8>> {
        let (from, until) = (at_ns - WATCHES_APART_NS, at_ns + WATCHES_APART_NS);
        let superseded =
            |number: &usize| self.slices.get(number + 1).is_some_and(|(at, _)| *at < from);
        let known = (0..self.slices.len())
            .filter(|number| self.slices[*number].0 <= until && !superseded(number));
        known.map(|number| usable(&self.slices[number].1)).collect()
    }

    /// What the rules have to send to after the last commit before an action, or the last of all:
    /// the recording left all changes time to get there. `None` for other commits.
    pub(crate) fn settled(&self, number: usize) -> Option<BTreeSet<u8>> {
        let this = self.commits[number].at_ns;
        let next = self.commits.get(number + 1).map_or(u64::MAX, |commit| commit.at_ns);
        let until = match self.actions.iter().find(|at| (this..next).contains(at)) {
            Some(action) => *action,
            None if next == u64::MAX => u64::MAX,
            None => return None,
        };
        self.slices.iter().rfind(|(at, _)| *at < until).map(|(_, slice)| usable(slice))
    }
}

/// Those that are ready, or when none is, those that still serve (KEP-1669).
fn usable(slice: &[Endpoint]) -> BTreeSet<u8> {
    let those = |which: fn(&Endpoint) -> bool| -> BTreeSet<u8> {
        slice.iter().filter(|endpoint| which(endpoint)).map(|endpoint| endpoint.pod).collect()
    };
    let ready = those(|endpoint| endpoint.ready);
    if ready.is_empty() {
        those(|endpoint| endpoint.serving && endpoint.terminating)
    } else {
        ready
    }
}

/// `20[-st]`: pod 20 is not ready, serving, terminating.
fn endpoint(field: &str) -> Endpoint {
    let (pod, conditions) = field.split_once('[').expect("conditions");
    let is = |condition| conditions.contains(condition);
    let pod = pod.parse().expect("the last byte of an address");
    Endpoint { pod, ready: is('r'), serving: is('s'), terminating: is('t') }
}

/// `01:44:34.604342`, in ns.
fn time_of_day_ns(text: &str) -> u64 {
    let (clock, micros) = text.split_once('.').expect("a fraction");
    let number = |part: &str| part.parse::<u64>().expect("a number");
    let seconds = clock.split(':').fold(0, |sum, part| sum * 60 + number(part));
    seconds * 1_000_000_000 + number(micros) * 1_000
}

/// Seconds since 1970 with six decimals, in ns since midnight.
pub(crate) fn unix_time_of_day_ns(text: &str) -> u64 {
    let (seconds, micros) = text.split_once('.').expect("a fraction");
    let number = |part: &str| part.parse::<u64>().expect("a number");
    (number(seconds) * 1_000_000_000 + number(micros) * 1_000) % DAY_NS
}
