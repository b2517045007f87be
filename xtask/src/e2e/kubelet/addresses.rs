//! Which addresses of the node's pod ranges are taken. Pure.
//!
//! In a circle, as the `host-local` plugin hands them out: an address comes back as late as it can.
//! A pod that asks for a number gets it as soon as it is free, so that a test can have an address
//! reused within moments.

use std::collections::BTreeSet;

use crate::e2e::network::FIRST_POD;

/// The last bytes that pods get: 254 is the node's client.
const NUMBERS: std::ops::RangeInclusive<u8> = FIRST_POD..=253;

/// The numbers in use.
#[derive(Debug)]
pub(super) struct Numbers {
    taken: BTreeSet<u8>,
    last: u8,
}

impl Default for Numbers {
    fn default() -> Self {
        Self { taken: BTreeSet::new(), last: *NUMBERS.end() }
    }
}

impl Numbers {
    /// The wanted one, or the next free one; `None` while it is not to be had.
    pub(super) fn take(&mut self, wanted: Option<u8>) -> Option<u8> {
        let is_free = |number: &u8| !self.taken.contains(number);
        let number = if let Some(number) = wanted {
            Some(number).filter(is_free)?
        } else {
            let later = NUMBERS.filter(|number| *number > self.last);
            let earlier = NUMBERS.filter(|number| *number <= self.last);
            later.chain(earlier).find(is_free)?
        };
        if wanted.is_none() {
            self.last = number;
        }
        self.taken.insert(number);
        Some(number)
    }

    pub(super) fn give_back(&mut self, number: u8) {
        self.taken.remove(&number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_comes_back_last() {
        let mut numbers = Numbers::default();
        assert_eq!(numbers.take(None), Some(2));
        numbers.give_back(2);
        let others: Vec<u8> = std::iter::from_fn(|| numbers.take(None)).collect();
        assert_eq!(others.first(), Some(&3));
        assert_eq!(others.last(), Some(&2));
        assert_eq!(others.len(), 252);
        assert_eq!(numbers.take(None), None);
    }

    #[test]
    fn a_wanted_address_is_had_once_it_is_free() {
        let mut numbers = Numbers::default();
        assert_eq!(numbers.take(Some(9)), Some(9));
        assert_eq!(numbers.take(Some(9)), None);
        numbers.give_back(9);
        assert_eq!(numbers.take(Some(9)), Some(9));
    }
}
