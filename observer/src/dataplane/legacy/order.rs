//! In which order chains are passed: each after all that lead to it.

use super::chains::{Chains, To, index};

/// How far looking at a chain has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Unseen,
    /// On the way that is being followed.
    Open,
    /// Followed to all its ends; whether one is a destination.
    Followed {
        leads_to_destination: bool,
    },
}

/// The chains that matter: those that new connections reach and that lead to a destination.
#[derive(Debug)]
pub(super) struct Order {
    states: Vec<State>,
    /// Each after those it leads to.
    followed: Vec<u32>,
}

impl Order {
    /// `None` when chains loop.
    pub(super) fn of(chains: &Chains) -> Option<Self> {
        let states = vec![State::Unseen; chains.count()];
        let mut order = Self { states, followed: Vec::new() };
        for chain in chains.entered {
            order.follow(chains, chain)?;
        }
        Some(order)
    }

    /// Follows every way from a chain, unless that was done. Not by recursion: bytes of others
    /// decide how deep it goes.
    fn follow(&mut self, chains: &Chains, first: u32) -> Option<()> {
        // The way that led here: chains, and how many of their steps were taken.
        let mut way = Vec::new();
        self.open(first, &mut way)?;
        while let Some((chain, taken)) = way.last_mut() {
            if let Some(step) = chains.steps(*chain).get(*taken) {
                *taken += 1;
                if let To::Chain(to) = step.to {
                    self.open(to, &mut way)?;
                }
            } else {
                self.close(chains, *chain);
                way.pop();
            }
        }
        Some(())
    }

    /// Takes a chain into the way, unless it was followed before; `None` when it is in there.
    fn open(&mut self, chain: u32, way: &mut Vec<(u32, usize)>) -> Option<()> {
        let state = &mut self.states[index(chain)];
        match state {
            State::Unseen => {
                *state = State::Open;
                way.push((chain, 0));
                Some(())
            }
            State::Open => None,
            State::Followed { .. } => Some(()),
        }
    }

    fn close(&mut self, chains: &Chains, chain: u32) {
        let leads_to_destination = chains.steps(chain).iter().any(|step| match step.to {
            To::Chain(to) => self.leads_to_destination(to),
            To::Destination(_) => true,
        });
        self.states[index(chain)] = State::Followed { leads_to_destination };
        if leads_to_destination {
            self.followed.push(chain);
        }
    }

    /// Whether a chain matters.
    pub(super) fn leads_to_destination(&self, chain: u32) -> bool {
        self.states[index(chain)] == State::Followed { leads_to_destination: true }
    }

    /// The chains that matter.
    pub(super) fn before_those_they_lead_to(&self) -> impl Iterator<Item = u32> {
        self.followed.iter().rev().copied()
    }
}
