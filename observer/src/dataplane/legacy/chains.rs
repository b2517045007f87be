//! The table's entries cut into chains: one pass over all of them, in the order they lie in memory,
//! keeps what those say that lead somewhere.
//!
//! Refuses jumps to anything but the start of a chain. Numbers and offsets are 32 bits wide, as the
//! kernel's: there are some 200,000, looked up in no order.

use std::net::IpAddr;

use super::blob::{Entries, Entry, Hook, Malformed, Said, Target};
use crate::dataplane::names;
use crate::dataplane::silent::KUBE_SERVICES;
use crate::facts::{Protocol, ServicePort};

/// Where an entry leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum To {
    /// A chain, by its number.
    Chain(u32),
    /// A destination of its own; `None` when that is not one address and port.
    Destination(Option<(IpAddr, u16)>),
}

/// An entry that leads somewhere.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step<'d> {
    pub(super) to: To,
    pub(super) said: Said<'d>,
}

/// The Service port and protocol that a chain's own name tells.
pub(super) type Named = (ServicePort, Protocol);

/// One chain, after the one before it.
#[derive(Debug, Default)]
struct Chain {
    first_step: usize,
    /// Boxed, as hardly any has it: kube-proxy's iptables chains are hashes.
    named: Option<Box<Named>>,
}

/// All chains that new connections may pass, numbered in the order of their offsets.
#[derive(Debug)]
pub(super) struct Chains<'d> {
    all: Vec<Chain>,
    steps: Vec<Step<'d>>,
    /// Those that new connections enter.
    pub(super) entered: [u32; 2],
    /// Whether kube-proxy's rules are among them.
    pub(super) are_kube_proxys: bool,
}

impl<'d> Chains<'d> {
    /// Cuts the table.
    pub(super) fn cut(entries: Entries<'d>, hooks: [Hook; 2]) -> Result<Self, Malformed> {
        let mut cutting = Cutting::default();
        let mut offset = 0;
        while offset < entries.length() {
            let entry = entries.at(offset).ok_or(Malformed)?;
            let next = offset.checked_add(entry.length).ok_or(Malformed)?;
            if hooks.iter().any(|hook| hook.start == offset) {
                cutting.begin(offset, "");
            }
            match entry.target().ok_or(Malformed)? {
                Target::ChainHeader(name) => cutting.begin(next, name),
                // How a rule without a target is written.
                Target::Jump(to) if to == next => {}
                Target::Jump(to) => cutting.note(&entry, To::Chain(to))?,
                Target::Send(to) => cutting.note(&entry, To::Destination(to))?,
                Target::Other => {}
            }
            // A built-in chain ends with its policy; the next may be one that is not entered.
            cutting.between |= hooks.iter().any(|hook| hook.policy == offset);
            offset = next;
        }
        cutting.finish(hooks)
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    /// What the name of one tells.
    pub(super) fn named(&self, chain: u32) -> Option<&Named> {
        self.all[index(chain)].named.as_deref()
    }

    /// The entries of one that lead somewhere.
    pub(super) fn steps(&self, chain: u32) -> &[Step<'d>] {
        let chain = index(chain);
        let end = self.all.get(chain + 1).map_or(self.steps.len(), |next| next.first_step);
        &self.steps[self.all[chain].first_step..end]
    }
}

/// A number as an index.
pub(super) fn index(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// Chains while they are cut: what a step leads to is an offset still.
#[derive(Default)]
struct Cutting<'d> {
    /// Where each chain starts.
    starts: Vec<u32>,
    chains: Vec<Chain>,
    steps: Vec<Step<'d>>,
    /// Whether no chain that matters has begun since the last one ended.
    between: bool,
    are_kube_proxys: bool,
}

impl<'d> Cutting<'d> {
    fn begin(&mut self, start: u32, name: &str) {
        self.between = false;
        self.are_kube_proxys |= name == KUBE_SERVICES;
        self.starts.push(start);
        let named = names::of_chain(name).map(Box::new);
        self.chains.push(Chain { first_step: self.steps.len(), named });
    }

    fn note(&mut self, entry: &Entry<'d>, to: To) -> Result<(), Malformed> {
        if !self.between && !self.chains.is_empty() {
            self.steps.push(Step { to, said: entry.said().ok_or(Malformed)? });
        }
        Ok(())
    }

    /// Turns offsets into the chains that start there.
    fn finish(self, hooks: [Hook; 2]) -> Result<Chains<'d>, Malformed> {
        let Self { starts, chains, mut steps, are_kube_proxys, .. } = self;
        let starting_at = |offset| {
            let found = starts.binary_search(&offset).ok();
            found.and_then(|chain| u32::try_from(chain).ok()).ok_or(Malformed)
        };
        for step in &mut steps {
            if let To::Chain(to) = &mut step.to {
                *to = starting_at(*to)?;
            }
        }
        let [prerouting, output] = hooks.map(|hook| starting_at(hook.start));
        Ok(Chains { all: chains, steps, entered: [prerouting?, output?], are_kube_proxys })
    }
}
