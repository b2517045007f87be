//! From a rule's expressions to its effects.
//!
//! `nf_tables` is a small register machine: a rule loads a constant or a map's value into
//! registers, then `nat` reads the address and port from there. The registers are followed
//! symbolically, in words of 4 bytes. An expression that is not known forgets all registers, so
//! that a stale value is never taken for a destination, and is counted.

use std::hash::{BuildHasher as _, Hash as _, Hasher as _};
use std::net::IpAddr;
use std::sync::LazyLock;

use foldhash::quality::RandomState;

use super::attributes::{Malformed, attributes, be32, fields, name};
use crate::dataplane::rules::{Effect, Family, Fingerprint, Name, PortSource, Rule};
use crate::dataplane::{names, xt};

/// Sixteen words: `NFT_REG_1` to `4` are four words each, `NFT_REG32_00` to `15` one.
const WORDS: usize = 16;
const WORD_BYTES: usize = 4;
/// `NFT_REG32_00`
const FIRST_WORD_REGISTER: u32 = 8;
/// `NFT_META_L4PROTO`
const META_L4PROTO: u32 = 16;
/// `NFT_NAT_DNAT`
const NAT_DESTINATION: u32 = 1;
/// `NFT_CMP_EQ`
const CMP_EQUAL: u32 = 0;
/// `NFT_PAYLOAD_NETWORK_HEADER`
const PAYLOAD_NETWORK: u32 = 1;
/// Where the protocol number is in an IPv4 and in an IPv6 header.
const PROTOCOL_AT: [u32; 2] = [9, 6];
/// `NFT_JUMP` and `NFT_GOTO`, as the kernel's negative numbers.
const JUMP_OR_GOTO: [u32; 2] = [(-3_i32).cast_unsigned(), (-4_i32).cast_unsigned()];
/// `NFTNL_UDATA_RULE_COMMENT`: where iptables-nft before 1.8.3 and `nft` put a comment.
const USERDATA_COMMENT: u8 = 0;

/// How the attributes of a counter begin: `NFTA_EXPR_NAME` 1, of 12 bytes.
const COUNTER: [u8; 12] = {
    let [low, high] = 12_u16.to_ne_bytes();
    let [kind, zero] = 1_u16.to_ne_bytes();
    [low, high, kind, zero, b'c', b'o', b'u', b'n', b't', b'e', b'r', 0]
};

/// Expressions that load a register with something that is no destination.
const LOADS: [&str; 13] = [
    "bitwise",
    "byteorder",
    "ct",
    "exthdr",
    "fib",
    "hash",
    "inner",
    "numgen",
    "osf",
    "rt",
    "socket",
    "tunnel",
    "xfrm",
];
/// Expressions that load none and send nowhere else.
const INERT: [&str; 20] = [
    "connlimit",
    "counter",
    "dup",
    "dynset",
    "flow_offload",
    "fwd",
    "last",
    "limit",
    "log",
    "masq",
    "notrack",
    "objref",
    "queue",
    "quota",
    "range",
    "redir",
    "reject",
    "secmark",
    "synproxy",
    "tproxy",
];

/// What is known of one word of the registers.
#[derive(Clone, Debug, Default)]
enum Word {
    #[default]
    Unknown,
    /// The packet's transport protocol, in the first byte.
    Protocol,
    Constant([u8; WORD_BYTES]),
    /// This byte and the three after it of the data of whichever element of the map matched.
    OfMap(Name, u8),
}

/// Reads rules of one table's family.
struct Reader {
    family: Option<Family>,
    words: [Word; WORDS],
    rule: Rule,
    unknown: u64,
}

/// Reduces a rule: `list` holds `NFTA_LIST_ELEM` attributes, one per expression. `family` is the
/// table's, `None` for inet. Gives also how many expressions are not known.
pub(super) fn reduce(
    family: Option<Family>,
    list: &[u8],
    userdata: Option<&[u8]>,
) -> Result<(Rule, u64), Malformed> {
    let mut reader =
        Reader { family, words: Default::default(), rule: Rule::default(), unknown: 0 };
    reader.rule.service = userdata.and_then(comment).and_then(names::of_comment);
    for expression in attributes(list) {
        let [_, kind, data] = fields::<3>(expression?.1)?;
        reader.read(name(kind)?, data.unwrap_or_default())?;
    }
    // There may be 100,000 rules with one effect each.
    reader.rule.effects.shrink_to_fit();
    Ok((reader.rule, reader.unknown))
}

/// Tells rules apart by their chain and all that they say, but not by what their counters show.
pub(super) fn fingerprint(
    chain: &str,
    list: &[u8],
    userdata: Option<&[u8]>,
) -> Result<Fingerprint, Malformed> {
    static SEED: LazyLock<RandomState> = LazyLock::new(RandomState::default);
    let mut hasher = SEED.build_hasher();
    chain.hash(&mut hasher);
    for expression in attributes(list) {
        let (_, expression) = expression?;
        if !expression.starts_with(&COUNTER) {
            expression.hash(&mut hasher);
        }
    }
    userdata.hash(&mut hasher);
    Ok(Fingerprint(hasher.finish()))
}

/// The comment in a rule's user data: a sequence of type, length and value bytes.
fn comment(mut userdata: &[u8]) -> Option<&str> {
    while let [kind, length, rest @ ..] = userdata {
        let (value, after) = rest.split_at_checked(usize::from(*length))?;
        if *kind == USERDATA_COMMENT {
            return std::str::from_utf8(xt::text(value)).ok();
        }
        userdata = after;
    }
    None
}

/// What a verdict says: the chain it goes to, if it is a jump or goto.
pub(super) fn verdict(data: &[u8]) -> Result<Option<Name>, Malformed> {
    let [_, code, chain] = fields::<3>(data)?;
    let code = be32(code.ok_or(Malformed)?)?;
    Ok(if JUMP_OR_GOTO.contains(&code) { Some(name(chain)?.into()) } else { None })
}

/// The first word of a register; `None` for the verdict register and those that do not exist.
fn word_of(register: Option<&[u8]>) -> Result<Option<usize>, Malformed> {
    let Some(register) = register else { return Ok(None) };
    let word = match be32(register)? {
        register @ 1..=4 => (register - 1) * 4,
        register @ 8..=23 => register - FIRST_WORD_REGISTER,
        _ => return Ok(None),
    };
    Ok(usize::try_from(word).ok())
}

impl Reader {
    fn read(&mut self, kind: &str, data: &[u8]) -> Result<(), Malformed> {
        match kind {
            "immediate" => self.immediate(data),
            "lookup" => self.lookup(data),
            "meta" => self.meta(data),
            "payload" => self.payload(data),
            "cmp" => self.cmp(data),
            "nat" => self.nat(data),
            "match" => self.xt(data, |rule, _, name, _, info| xt::add_match(rule, name, info)),
            "target" => self.xt(data, xt::add_target),
            _ if INERT.contains(&kind) => Ok(()),
            _ => {
                self.words = Default::default();
                self.unknown += u64::from(!LOADS.contains(&kind));
                Ok(())
            }
        }
    }

    /// `NFTA_IMMEDIATE_DREG` 1, `_DATA` 2.
    fn immediate(&mut self, data: &[u8]) -> Result<(), Malformed> {
        let [_, register, data] = fields::<3>(data)?;
        let [_, value, code] = fields::<3>(data.ok_or(Malformed)?)?;
        if let Some(code) = code {
            self.rule.effects.extend(verdict(code)?.map(Effect::Go));
        }
        if let (Some(first), Some(value)) = (word_of(register)?, value) {
            for (word, bytes) in (first..WORDS).zip(value.chunks(WORD_BYTES)) {
                let mut constant = [0; WORD_BYTES];
                constant[..bytes.len()].copy_from_slice(bytes);
                self.words[word] = Word::Constant(constant);
            }
        }
        Ok(())
    }

    /// `NFTA_LOOKUP_SET` 1, `_DREG` 3. Register 0 takes a verdict; none is a mere match.
    fn lookup(&mut self, data: &[u8]) -> Result<(), Malformed> {
        let [_, set, _, register] = fields::<4>(data)?;
        let map: Name = name(set)?.into();
        match word_of(register)? {
            // How much is loaded depends on the map; what is beyond is not read by this rule.
            Some(first) => {
                for (word, at) in self.words[first..].iter_mut().zip((0..).step_by(WORD_BYTES)) {
                    *word = Word::OfMap(map.clone(), at);
                }
            }
            None if register.is_some() => self.rule.effects.push(Effect::GoByMap(map)),
            None => {}
        }
        Ok(())
    }

    /// `NFTA_META_DREG` 1, `_KEY` 2.
    fn meta(&mut self, data: &[u8]) -> Result<(), Malformed> {
        let [_, register, key] = fields::<3>(data)?;
        let protocol = be32(key.ok_or(Malformed)?)? == META_L4PROTO;
        self.load(word_of(register)?, protocol);
        Ok(())
    }

    /// `NFTA_PAYLOAD_DREG` 1, `_BASE` 2, `_OFFSET` 3, `_LEN` 4.
    fn payload(&mut self, data: &[u8]) -> Result<(), Malformed> {
        let [_, register, base, offset, length] = fields::<5>(data)?;
        let number = |field: Option<&[u8]>| be32(field.ok_or(Malformed)?);
        let protocol = number(base)? == PAYLOAD_NETWORK
            && PROTOCOL_AT.contains(&number(offset)?)
            && number(length)? == 1;
        self.load(word_of(register)?, protocol);
        Ok(())
    }

    /// A load of up to four words that are no destination.
    fn load(&mut self, first: Option<usize>, protocol: bool) {
        let Some(first) = first else { return };
        self.words[first..WORDS.min(first + WORD_BYTES)].fill(Word::Unknown);
        if protocol {
            self.words[first] = Word::Protocol;
        }
    }

    /// `NFTA_CMP_SREG` 1, `_OP` 2, `_DATA` 3.
    fn cmp(&mut self, data: &[u8]) -> Result<(), Malformed> {
        let [_, register, operation, data] = fields::<4>(data)?;
        let [_, value] = fields::<2>(data.ok_or(Malformed)?)?;
        let equal = be32(operation.ok_or(Malformed)?)? == CMP_EQUAL;
        if let (Some(word), Some([number]), true) = (word_of(register)?, value, equal)
            && let Word::Protocol = self.words[word]
        {
            self.rule.protocol = xt::protocol(*number);
        }
        Ok(())
    }

    /// `NFTA_NAT_TYPE` 1, `_FAMILY` 2, `_REG_ADDR_MIN` 3, `_REG_ADDR_MAX` 4, `_REG_PROTO_MIN` 5,
    /// `_REG_PROTO_MAX` 6. The kernel repeats the minimum as maximum unless it is a range, which
    /// is no backend.
    fn nat(&mut self, data: &[u8]) -> Result<(), Malformed> {
        let [_, kind, family, address, last_address, port, last_port] = fields::<7>(data)?;
        if be32(kind.ok_or(Malformed)?)? != NAT_DESTINATION {
            return Ok(());
        }
        let family = match be32(family.ok_or(Malformed)?)? {
            2 => Some(Family::V4),
            10 => Some(Family::V6),
            _ => None,
        };
        let range = last_address.is_some_and(|last| Some(last) != address)
            || last_port.is_some_and(|last| Some(last) != port);
        let at = word_of(address)?.zip(word_of(port)?).filter(|_| !range);
        let effect = family
            .zip(at)
            .and_then(|(family, (address, port))| self.destination(family, address, port));
        self.rule.effects.push(effect.unwrap_or(Effect::SendUnknown));
        Ok(())
    }

    fn destination(&self, family: Family, address: usize, port: usize) -> Option<Effect> {
        match (&self.words[address], &self.words[port]) {
            (Word::Constant(_), Word::Constant([high, low, ..])) => Some(Effect::Send(
                self.constant(family, address)?,
                u16::from_be_bytes([*high, *low]),
            )),
            (Word::OfMap(map, address_at), Word::Constant([high, low, ..])) => {
                let port = PortSource::Fixed(u16::from_be_bytes([*high, *low]));
                Some(Effect::SendByMap { map: map.clone(), family, address_at: *address_at, port })
            }
            (Word::OfMap(map, address_at), Word::OfMap(same, port_at)) if map == same => {
                let port = PortSource::AtByte(*port_at);
                Some(Effect::SendByMap { map: map.clone(), family, address_at: *address_at, port })
            }
            _ => None,
        }
    }

    fn constant(&self, family: Family, first: usize) -> Option<IpAddr> {
        let mut bytes = Vec::with_capacity(family.address_bytes());
        for word in self.words.get(first..first + family.address_bytes() / WORD_BYTES)? {
            let Word::Constant(constant) = word else { return None };
            bytes.extend(constant);
        }
        family.address(&bytes)
    }

    /// `NFTA_MATCH_NAME` or `NFTA_TARGET_NAME` 1, `_REV` 2, `_INFO` 3. Only iptables-nft writes
    /// these, and only in tables of one family.
    fn xt(
        &mut self,
        data: &[u8],
        add: impl Fn(&mut Rule, Family, &[u8], u8, &[u8]),
    ) -> Result<(), Malformed> {
        let [_, kind, revision, info] = fields::<4>(data)?;
        let (kind, info) = (name(kind)?.as_bytes(), info.ok_or(Malformed)?);
        let revision = u8::try_from(revision.map_or(Ok(0), be32)?).ok().ok_or(Malformed)?;
        if let Some(family) = self.family {
            add(&mut self.rule, family, kind, revision, info);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::written::attribute;
    use super::*;
    use crate::facts::Protocol;

    fn number(kind: u16, value: u32) -> Vec<u8> {
        attribute(kind, &value.to_be_bytes())
    }

    fn expression(name: &str, data: &[Vec<u8>]) -> Vec<u8> {
        let name = attribute(1, format!("{name}\0").as_bytes());
        attribute(1, &[name, attribute(2, &data.concat())].concat())
    }

    fn constant(register: u32, value: &[u8]) -> Vec<u8> {
        expression("immediate", &[number(1, register), attribute(2, &attribute(1, value))])
    }

    fn tcp() -> Vec<u8> {
        let load = expression("meta", &[number(1, 1), number(2, META_L4PROTO)]);
        let equal = [number(1, 1), number(2, CMP_EQUAL), attribute(3, &attribute(1, &[6]))];
        [load, expression("cmp", &equal)].concat()
    }

    fn dnat(address: u32, port: u32) -> Vec<u8> {
        let parts =
            [(1, NAT_DESTINATION), (2, 2), (3, address), (4, address), (5, port), (6, port)];
        expression("nat", &parts.map(|(kind, value)| number(kind, value)))
    }

    fn reduced(expressions: &[Vec<u8>]) -> (Rule, u64) {
        reduce(Some(Family::V4), &expressions.concat(), None).expect("well formed")
    }

    #[test]
    fn constants_in_registers_become_the_destination() {
        let (rule, unknown) =
            reduced(&[tcp(), constant(1, &[10, 0, 0, 7]), constant(2, &[0x1f, 0x90]), dnat(1, 2)]);
        assert_eq!(rule.protocol, Some(Protocol::Tcp));
        assert_eq!(rule.effects, [Effect::Send("10.0.0.7".parse().expect("address"), 8080)]);
        assert_eq!(unknown, 0);
    }

    #[test]
    fn a_map_of_address_and_port_is_read_by_its_words() {
        let lookup = expression("lookup", &[attribute(1, b"__map0\0"), number(2, 1), number(3, 1)]);
        let (rule, _) = reduced(&[tcp(), expression("numgen", &[]), lookup, dnat(1, 9)]);
        let port = PortSource::AtByte(4);
        let map = "__map0".into();
        assert_eq!(
            rule.effects,
            [Effect::SendByMap { map, family: Family::V4, address_at: 0, port }]
        );
    }

    #[test]
    fn an_unknown_expression_forgets_the_registers_and_is_counted() {
        let load = [constant(1, &[10, 0, 0, 7]), constant(2, &[0, 80])];
        for (name, counted) in [("novel", 1), ("ct", 0)] {
            let (rule, unknown) = reduced(&[load.concat(), expression(name, &[]), dnat(1, 2)]);
            assert_eq!((rule.effects, unknown), (vec![Effect::SendUnknown], counted), "{name}");
        }
        let (rule, _) = reduced(&[load.concat(), expression("counter", &[]), dnat(1, 2)]);
        assert_ne!(rule.effects, [Effect::SendUnknown]);
    }

    #[test]
    fn registers_that_do_not_exist_are_no_destination() {
        for register in [0, 5, 7, 24, u32::MAX] {
            let (rule, _) = reduced(&[constant(register, &[1; 16]), dnat(register, register)]);
            assert_eq!(rule.effects, [Effect::SendUnknown], "{register}");
        }
        let (rule, _) = reduced(&[constant(23, &[1; 64]), dnat(23, 23)]);
        assert_eq!(rule.effects, [Effect::Send("1.1.1.1".parse().expect("address"), 257)]);
    }

    #[test]
    fn truncated_rules_are_malformed_or_smaller_but_never_more() {
        let whole =
            [tcp(), constant(1, &[10, 0, 0, 7]), constant(2, &[0, 80]), dnat(1, 2)].concat();
        for length in 0..whole.len() {
            if let Ok((rule, _)) = reduce(Some(Family::V4), &whole[..length], None) {
                assert!(rule.effects.is_empty(), "{length}");
            }
        }
    }

    #[test]
    fn a_fingerprint_tells_all_but_what_counters_show() {
        let counted = |packets: u8| expression("counter", &[attribute(1, &[0, 0, 0, packets])]);
        let of = |chain, list: &[Vec<u8>], userdata| {
            fingerprint(chain, &list.concat(), userdata).expect("well formed")
        };
        let one = of("c", &[tcp(), counted(1)], None);
        assert_eq!(one, of("c", &[tcp(), counted(9)], None));
        let go = constant(1, &[10, 0, 0, 7]);
        for other in [
            of("d", &[tcp(), counted(1)], None),
            of("c", &[tcp(), counted(1), go], None),
            of("c", &[tcp(), counted(1)], Some(&[])),
            of("c", &[], None),
        ] {
            assert_ne!(one, other);
        }
    }

    #[test]
    fn a_comment_in_user_data_names_the_service_port() {
        let text = b"default/web:http\0";
        let mut userdata = vec![9, 2, 0, 0, USERDATA_COMMENT, 17];
        userdata.extend(text);
        let (rule, _) = reduce(None, &[], Some(&userdata)).expect("well formed");
        assert_eq!(rule.service.map(|service| service.0), Some("default/web:http".into()));
        assert_eq!(comment(&userdata[..12]), None, "cut short");
    }
}
