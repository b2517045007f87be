//! `nf_tables` messages, from dumps and notifications alike, reduced to what the model keeps.
//!
//! Attribute numbers are those of `include/uapi/linux/netfilter/nf_tables.h`. Families other than
//! ip, ip6 and inet have no nat chains for Services and are passed over, as are sets that are not
//! maps, objects and flowtables.

use super::attributes::{Frame, Malformed, attributes, be32, be64, fields, name};
use super::expressions;
use crate::dataplane::rules::{Element, ElementKey, Family, Fingerprint, Name, Rule};

/// `NFNL_SUBSYS_NFTABLES`, the high byte of a message's type.
pub(super) const SUBSYSTEM: u8 = 10;
/// Length of `nfgenmsg`.
const FAMILY_HEADER_BYTES: usize = 4;
/// `NFT_TABLE_F_DORMANT`
const TABLE_DORMANT: u32 = 1;
/// `NFT_SET_MAP`
const SET_IS_MAP: u32 = 8;
/// `NFT_SET_ANONYMOUS | NFT_SET_CONSTANT | NFT_SET_MAP`, and the key's length: what a rule that
/// chooses by a number (`numgen random mod 5 map { 0 : …, 4 : … }`) looks it up in.
const CHOICE_FLAGS: u32 = 1 | 2 | SET_IS_MAP;
const CHOICE_KEY_BYTES: u32 = 4;
/// `NF_INET_PRE_ROUTING` and `NF_INET_LOCAL_OUT`: where new connections meet destination NAT.
const NAT_HOOKS: [u32; 2] = [0, 3];

/// Message types (`nf_tables_msg_types`).
pub(super) mod kind {
    pub(crate) const NEW_TABLE: u8 = 0;
    pub(crate) const GET_TABLE: u8 = 1;
    pub(crate) const DELETE_TABLE: u8 = 2;
    pub(crate) const NEW_CHAIN: u8 = 3;
    pub(crate) const GET_CHAIN: u8 = 4;
    pub(crate) const DELETE_CHAIN: u8 = 5;
    pub(crate) const NEW_RULE: u8 = 6;
    pub(crate) const GET_RULE: u8 = 7;
    pub(crate) const DELETE_RULE: u8 = 8;
    pub(crate) const NEW_SET: u8 = 9;
    pub(crate) const GET_SET: u8 = 10;
    pub(crate) const DELETE_SET: u8 = 11;
    pub(crate) const NEW_ELEMENTS: u8 = 12;
    pub(crate) const GET_ELEMENTS: u8 = 13;
    pub(crate) const DELETE_ELEMENTS: u8 = 14;
    pub(crate) const NEW_GENERATION: u8 = 15;
    pub(crate) const GET_GENERATION: u8 = 16;
}

/// What the model is made of.
const KEPT: [u8; 10] = [
    kind::NEW_TABLE,
    kind::DELETE_TABLE,
    kind::NEW_CHAIN,
    kind::DELETE_CHAIN,
    kind::NEW_RULE,
    kind::DELETE_RULE,
    kind::NEW_SET,
    kind::DELETE_SET,
    kind::NEW_ELEMENTS,
    kind::DELETE_ELEMENTS,
];

/// Family of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableFamily {
    /// Both IP versions.
    Inet,
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
}

impl TableFamily {
    /// `NFPROTO_INET`, `NFPROTO_IPV4`, `NFPROTO_IPV6`
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Inet => 1,
            Self::Ip => 2,
            Self::Ip6 => 10,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        [Self::Inet, Self::Ip, Self::Ip6].into_iter().find(|family| family.number() == number)
    }

    fn version(self) -> Option<Family> {
        match self {
            Self::Inet => None,
            Self::Ip => Some(Family::V4),
            Self::Ip6 => Some(Family::V6),
        }
    }
}

/// What tells a table from the others of its network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TableId {
    /// Its family.
    pub family: TableFamily,
    /// Its name.
    pub name: Name,
}

/// A commit's last message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Generation {
    /// The commit's number.
    pub(super) number: u32,
    /// The thread that made it, in the root pid namespace.
    pub(super) task: Option<u32>,
}

/// What a message says of its table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    NewTable {
        dormant: bool,
    },
    DeleteTable,
    NewChain {
        chain: Name,
        entry: bool,
    },
    DeleteChain {
        chain: Name,
    },
    NewRule {
        chain: Name,
        handle: u64,
        fingerprint: Fingerprint,
        rule: Rule,
    },
    DeleteRule {
        chain: Name,
        handle: u64,
    },
    NewMap {
        map: Name,
        handle: u64,
        /// How many elements it holds at most, if its keys may be the numbers below that.
        numbered: Option<u32>,
    },
    DeleteSet {
        set: Name,
        handle: u64,
    },
    NewElements {
        set: Name,
        elements: Vec<(ElementKey, Element)>,
    },
    DeleteElements {
        set: Name,
        keys: Vec<ElementKey>,
    },
}

/// A message of no interest, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Passed {
    /// Not what the kernel writes.
    Malformed,
    /// Another family, subsystem or kind of object.
    Foreign,
}

impl From<Malformed> for Passed {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

/// The number of the commit that a message ends, if it ends one.
pub(super) fn generation(frame: &Frame<'_>) -> Option<Result<Generation, Malformed>> {
    /// `NFTA_GEN_ID` 1, `NFTA_GEN_PROC_PID` 2.
    fn read(body: Option<&[u8]>) -> Result<Generation, Malformed> {
        let [_, id, task] = fields::<3>(body.ok_or(Malformed)?)?;
        let number = be32(id.ok_or(Malformed)?)?;
        Ok(Generation { number, task: task.map(be32).transpose()? })
    }
    (frame.kind.to_le_bytes() == [kind::NEW_GENERATION, SUBSYSTEM])
        .then(|| read(frame.payload.get(FAMILY_HEADER_BYTES..)))
}

/// A message about something in a table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Within<'d> {
    kind: u8,
    family: TableFamily,
    table: &'d str,
    body: &'d [u8],
}

impl<'d> Within<'d> {
    /// Reads whose it is.
    pub(super) fn read(frame: &Frame<'d>) -> Result<Self, Passed> {
        let [kind, subsystem] = frame.kind.to_le_bytes();
        if subsystem != SUBSYSTEM {
            return Err(Passed::Foreign);
        }
        let (header, body) =
            frame.payload.split_at_checked(FAMILY_HEADER_BYTES).ok_or(Malformed)?;
        let family = TableFamily::from_number(header[0]).ok_or(Passed::Foreign)?;
        if !KEPT.contains(&kind) {
            return Err(Passed::Foreign);
        }
        // NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE, NFTA_SET_TABLE, …_LIST_TABLE: all 1.
        let mut named =
            attributes(body).filter(|read| !matches!(read, Ok((kind, _)) if *kind != 1));
        let (_, table) = named.next().ok_or(Malformed)??;
        Ok(Self { kind, family, table: name(Some(table))?, body })
    }

    /// Its table; `last` if that is the same one.
    pub(super) fn table(&self, last: Option<&TableId>) -> TableId {
        match last {
            Some(last) if last.family == self.family && &*last.name == self.table => last.clone(),
            _ => TableId { family: self.family, name: self.table.into() },
        }
    }

    /// The rule that it announces, if it announces one.
    pub(super) fn rule(&self) -> Result<Option<Announced<'d>>, Malformed> {
        let is_rule = self.kind == kind::NEW_RULE;
        is_rule.then(|| Announced::read(self.family, self.body)).transpose()
    }

    /// What it says. Gives also how many expressions it holds that are not known.
    pub(super) fn change(&self) -> Result<(Change, u64), Passed> {
        let body = self.body;
        let change = match self.kind {
            kind::NEW_TABLE => new_table(body)?,
            kind::DELETE_TABLE => Change::DeleteTable,
            kind::NEW_CHAIN => new_chain(body)?,
            kind::DELETE_CHAIN => delete_chain(body)?,
            kind::NEW_RULE => return Ok(Announced::read(self.family, body)?.change()?),
            kind::DELETE_RULE => delete_rule(body)?,
            kind::NEW_SET => new_set(body)?,
            kind::DELETE_SET => delete_set(body)?,
            kind::NEW_ELEMENTS => new_elements(body)?,
            kind::DELETE_ELEMENTS => delete_elements(body)?,
            _ => return Err(Passed::Foreign),
        };
        Ok((change, 0))
    }
}

/// A rule as the kernel announces it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Announced<'d> {
    pub(super) handle: u64,
    /// Of its chain and all that it says.
    pub(super) fingerprint: Fingerprint,
    family: TableFamily,
    chain: &'d str,
    expressions: &'d [u8],
    userdata: Option<&'d [u8]>,
}

impl<'d> Announced<'d> {
    /// `NFTA_RULE_CHAIN` 2, `_HANDLE` 3, `_EXPRESSIONS` 4, `_USERDATA` 7.
    fn read(family: TableFamily, body: &'d [u8]) -> Result<Self, Malformed> {
        let [_, _, chain, handle, expressions, _, _, userdata] = fields::<8>(body)?;
        let (chain, expressions) = (name(chain)?, expressions.unwrap_or_default());
        Ok(Self {
            handle: be64(handle.ok_or(Malformed)?)?,
            fingerprint: expressions::fingerprint(chain, expressions, userdata)?,
            family,
            chain,
            expressions,
            userdata,
        })
    }

    /// As [`Within::change`].
    pub(super) fn change(&self) -> Result<(Change, u64), Malformed> {
        let Self { handle, fingerprint, chain, .. } = *self;
        let (rule, unknown) =
            expressions::reduce(self.family.version(), self.expressions, self.userdata)?;
        Ok((Change::NewRule { chain: chain.into(), handle, fingerprint, rule }, unknown))
    }
}

/// `NFTA_TABLE_FLAGS` 2.
fn new_table(body: &[u8]) -> Result<Change, Malformed> {
    let [_, _, flags] = fields::<3>(body)?;
    Ok(Change::NewTable { dormant: flags.map_or(Ok(0), be32)? & TABLE_DORMANT != 0 })
}

/// `NFTA_CHAIN_NAME` 3, `_HOOK` 4 (within: `NFTA_HOOK_HOOKNUM` 1), `_TYPE` 7.
fn new_chain(body: &[u8]) -> Result<Change, Malformed> {
    let [_, _, _, chain, hook, _, _, kind] = fields::<8>(body)?;
    let chain = name(chain)?.into();
    let hook = match hook {
        Some(hook) => fields::<2>(hook)?[1].map(be32).transpose()?,
        None => None,
    };
    let entry = hook.is_some_and(|hook| NAT_HOOKS.contains(&hook)) && name(kind) == Ok("nat");
    Ok(Change::NewChain { chain, entry })
}

fn delete_chain(body: &[u8]) -> Result<Change, Malformed> {
    let [_, _, _, chain] = fields::<4>(body)?;
    Ok(Change::DeleteChain { chain: name(chain)?.into() })
}

fn delete_rule(body: &[u8]) -> Result<Change, Malformed> {
    let [_, _, chain, handle] = fields::<4>(body)?;
    Ok(Change::DeleteRule { chain: name(chain)?.into(), handle: be64(handle.ok_or(Malformed)?)? })
}

/// `NFTA_SET_NAME` 2, `_FLAGS` 3, `_KEY_LEN` 5, `_DESC` 9 (within: `NFTA_SET_DESC_SIZE` 1),
/// `_HANDLE` 16.
fn new_set(body: &[u8]) -> Result<Change, Passed> {
    let fields = fields::<17>(body)?;
    let flags = fields[3].map_or(Ok(0), be32)?;
    if flags & SET_IS_MAP == 0 {
        return Err(Passed::Foreign);
    }
    let [_, size] = self::fields::<2>(fields[9].unwrap_or_default())?;
    let size = size.map(be32).transpose()?;
    let choice = flags == CHOICE_FLAGS && fields[5].map_or(Ok(0), be32)? == CHOICE_KEY_BYTES;
    Ok(Change::NewMap {
        map: name(fields[2])?.into(),
        handle: fields[16].map_or(Ok(0), be64)?,
        numbered: size.filter(|_| choice),
    })
}

/// `NFTA_SET_NAME` 2, `_HANDLE` 16.
fn delete_set(body: &[u8]) -> Result<Change, Malformed> {
    let fields = fields::<17>(body)?;
    let handle = fields[16].map_or(Ok(0), be64)?;
    Ok(Change::DeleteSet { set: name(fields[2])?.into(), handle })
}

/// `NFTA_SET_ELEM_LIST_SET` 2, `_ELEMENTS` 3.
fn new_elements(body: &[u8]) -> Result<Change, Malformed> {
    let [_, _, set, list] = fields::<4>(body)?;
    let elements = attributes(list.unwrap_or_default()).map(|item| element(item?.1));
    Ok(Change::NewElements {
        set: name(set)?.into(),
        elements: elements.collect::<Result<_, _>>()?,
    })
}

fn delete_elements(body: &[u8]) -> Result<Change, Malformed> {
    let [_, _, set, list] = fields::<4>(body)?;
    let keys = attributes(list.unwrap_or_default()).map(|item| element_key(item?.1));
    Ok(Change::DeleteElements { set: name(set)?.into(), keys: keys.collect::<Result<_, _>>()? })
}

/// `NFTA_SET_ELEM_DATA` 2 (within: `NFTA_DATA_VALUE` 1, `_VERDICT` 2).
fn element(item: &[u8]) -> Result<(ElementKey, Element), Malformed> {
    let [_, _, data] = fields::<3>(item)?;
    let [_, value, verdict] = fields::<3>(data.unwrap_or_default())?;
    let target = match verdict {
        Some(verdict) => expressions::verdict(verdict)?,
        None => None,
    };
    let element = match (target, value) {
        (Some(chain), _) => Element::Go(chain),
        (None, Some(value)) => Element::Data(value.into()),
        (None, None) => Element::Inert,
    };
    Ok((element_key(item)?, element))
}

/// `NFTA_SET_ELEM_KEY` 1, `_FLAGS` 3 (interval end 1, catch-all 2), `_KEY_END` 10.
fn element_key(item: &[u8]) -> Result<ElementKey, Malformed> {
    let fields = fields::<11>(item)?;
    let mut whole = Vec::new();
    for key in [fields[1], fields[10]].into_iter().flatten() {
        let [_, value] = self::fields::<2>(key)?;
        whole.extend(value.ok_or(Malformed)?);
    }
    whole.extend(fields[3].unwrap_or_default());
    Ok(whole.into())
}
