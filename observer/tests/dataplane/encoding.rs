//! The recorded messages as the bytes they were.
//!
//! The recording holds each message decoded: all that kube-proxy's rules differ by, but neither
//! registers nor masks. Those are the same in every rule that kube-proxy writes, and added here as
//! `nft` 1.0.6 and `iptables-nft` 1.8.9 choose them; offsets and masks, which decide nothing, are
//! zero. The message's recorded length proves that no attribute is missing or too much.

use std::borrow::Cow;
use std::collections::BTreeMap;

use observer::dataplane::nft::Ruleset;
use serde_json::Value;

/// Length of the xt matches whose content the recording cuts short, in bytes.
const CUT_MATCHES: [(&str, usize); 2] = [("comment", 256), ("conntrack", 168)];
/// `NFT_META_L4PROTO`, `NFT_META_MARK`
const PROTOCOL: u32 = 16;
const MARK: u32 = 3;
/// `NFT_REG_1`, `NFT_REG_2`
const FIRST: u32 = 1;
const SECOND: u32 = 2;
/// `NFT_REG32_01`: where the port is after the lookup of an address and port in `NFT_REG_1`.
const AFTER_ADDRESS: u32 = 9;
/// `NFPROTO_IPV4`
const IPV4: u32 = 2;

const KINDS: [(&str, u8); 9] = [
    ("NFT_MSG_NEWCHAIN", 3),
    ("NFT_MSG_DELCHAIN", 5),
    ("NFT_MSG_NEWRULE", 6),
    ("NFT_MSG_DELRULE", 8),
    ("NFT_MSG_NEWSET", 9),
    ("NFT_MSG_DELSET", 11),
    ("NFT_MSG_NEWSETELEM", 12),
    ("NFT_MSG_DELSETELEM", 14),
    ("NFT_MSG_NEWGEN", 15),
];

/// What the rules that were there when the recording began are called here.
#[derive(Debug, Default)]
pub(crate) struct Handles {
    /// Their table.
    table: String,
    /// Handles of rules, recorded to actual.
    rules: BTreeMap<u64, u64>,
    /// Names of the anonymous maps, by actual handle.
    maps: BTreeMap<u64, String>,
}

/// Beyond every handle of this namespace: those of objects made during the recording.
const LATER_HANDLES: u64 = 1_000_000;
/// The kernel's name of an anonymous map, without its number, and ours for those made during the
/// recording: the kernel here may have given the number to another map of the first state.
const ANONYMOUS: &str = "__map";
const LATER: &str = "__new";

impl Handles {
    /// From two listings (`nft -a list table`) of the same rules: the recorded one, and one of the
    /// rules loaded from it, which `loaded` holds.
    pub(crate) fn between(table: &str, recorded: &str, actual: &str, loaded: &Ruleset) -> Self {
        let (recorded, actual) = (rule_handles(recorded), rule_handles(actual));
        let shape = |rules: &BTreeMap<String, Vec<u64>>| -> Vec<(String, usize)> {
            rules.iter().map(|(chain, rules)| (chain.clone(), rules.len())).collect()
        };
        assert_eq!(shape(&recorded), shape(&actual), "the same rules");
        let rules = recorded.into_values().flatten().zip(actual.into_values().flatten());
        let maps = loaded.tables().flat_map(|(_, table)| &table.maps);
        Self {
            table: table.to_owned(),
            rules: rules.collect(),
            maps: maps.map(|(name, map)| (map.handle, name.to_string())).collect(),
        }
    }

    /// An anonymous map is made just before the rule that it belongs to.
    fn actual(&self, table: &str, recorded: u64) -> u64 {
        let known = |handle| self.rules.get(&handle).copied().filter(|_| table == self.table);
        let of_map = || known(recorded + 1).map(|rule| rule - 1);
        known(recorded).or_else(of_map).unwrap_or(recorded + LATER_HANDLES)
    }

    /// The name of a set that is deleted.
    fn deleted<'h>(&'h self, message: &'h Value) -> Cow<'h, str> {
        let handle = self.actual(text(message, "table"), number_of(message, "handle"));
        match self.maps.get(&handle) {
            Some(name) => name.into(),
            None => named(text(message, "name")),
        }
    }
}

/// The name of a set that is made or used during the recording.
fn named(recorded: &str) -> Cow<'_, str> {
    match recorded.strip_prefix(ANONYMOUS) {
        Some(number) => format!("{LATER}{number}").into(),
        None => recorded.into(),
    }
}

/// The handles of each chain's rules, in order, of a listing of one table.
fn rule_handles(listing: &str) -> BTreeMap<String, Vec<u64>> {
    let mut chains: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    let mut chain = None;
    for line in listing.lines() {
        if let Some(name) = line.strip_prefix("\tchain ") {
            chain = name.split(' ').next();
        } else if line == "\t}" {
            chain = None;
        }
        let rule = line.strip_prefix("\t\t").and_then(|rule| rule.rsplit_once("# handle "));
        if let (Some(chain), Some((_, handle))) = (chain, rule) {
            let rules = chains.entry(chain.to_owned()).or_default();
            rules.push(handle.parse().expect("a handle"));
        }
    }
    chains
}

/// One message, with the handles of this namespace.
pub(crate) fn encode(message: &Value, handles: &Handles) -> Vec<u8> {
    let kind = text(message, "msg");
    let number = KINDS.iter().find(|(name, _)| *name == kind).expect("a kind of message").1;
    let body = if kind == "NFT_MSG_NEWGEN" {
        generation(message)
    } else {
        let of_table = within(kind, message, handles);
        [attribute(1, &terminated(text(message, "table"))), of_table].concat()
    };
    let family = u8::try_from(number_of(message, "fam")).expect("a family");
    let bytes = framed(number, family, &body);
    assert_eq!(bytes.len() as u64, number_of(message, "len"), "{message}");
    bytes
}

fn framed(kind: u8, family: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(20 + body.len()).expect("a short message");
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend([kind, 10, 0, 0]);
    bytes.extend([0; 8]);
    bytes.extend([family, 0, 0, 0]);
    bytes.extend(body);
    bytes
}

fn within(kind: &str, message: &Value, handles: &Handles) -> Vec<u8> {
    let handle = || {
        let actual = handles.actual(text(message, "table"), number_of(message, "handle"));
        actual.to_be_bytes()
    };
    let name = |attribute_kind, key| attribute(attribute_kind, &terminated(text(message, key)));
    match kind {
        "NFT_MSG_NEWCHAIN" | "NFT_MSG_DELCHAIN" => {
            let uses = message.get("use").map(|_| word(6, number_of(message, "use")));
            [attribute(2, &handle()), name(3, "name"), uses.unwrap_or_default()].concat()
        }
        "NFT_MSG_NEWRULE" | "NFT_MSG_DELRULE" => {
            [name(2, "chain"), attribute(3, &handle()), rule(message)].concat()
        }
        "NFT_MSG_NEWSET" => {
            let name = attribute(2, &terminated(&named(text(message, "name"))));
            [name, set(message), attribute(16, &handle())].concat()
        }
        "NFT_MSG_DELSET" => {
            let name = attribute(2, &terminated(&handles.deleted(message)));
            [name, attribute(16, &handle())].concat()
        }
        _ => {
            let name = attribute(2, &terminated(&named(text(message, "set"))));
            [name, elements(message)].concat()
        }
    }
}

fn generation(message: &Value) -> Vec<u8> {
    [
        word(1, number_of(message, "id")),
        word(2, number_of(message, "pid")),
        attribute(3, &terminated(text(message, "proc"))),
    ]
    .concat()
}

fn rule(message: &Value) -> Vec<u8> {
    let list = message["exprs"].as_array().expect("expressions");
    let places = 0..list.len();
    let expressions: Vec<u8> = places.flat_map(|place| expression(list, place)).collect();
    let position = message.get("position").map(|_| {
        let position = number_of(message, "position");
        attribute(6, &position.to_be_bytes())
    });
    [attribute(4, &expressions), position.unwrap_or_default(), comment(7, message)].concat()
}

/// A comment in user data: type 0, its length, its text.
fn comment(kind: u16, owner: &Value) -> Vec<u8> {
    let Some(text) = owner.pointer("/userdata/comment").and_then(Value::as_str) else {
        return Vec::new();
    };
    let text = terminated(text);
    let length = u8::try_from(text.len()).expect("a short comment");
    attribute(kind, &[&[0, length], &text[..]].concat())
}

fn set(message: &Value) -> Vec<u8> {
    let numbers = [(3, "flags"), (4, "keytype"), (5, "keylen"), (6, "datatype"), (7, "datalen")];
    let mut body: Vec<u8> =
        numbers.iter().flat_map(|(kind, key)| word(*kind, number_of(message, key))).collect();
    // What the recorder did not know: the description, and two that newer kernels add.
    body.extend(attribute(9, &number_of(message, "9").to_be_bytes()));
    body.extend(attribute(13, &hex(text(message, "userdata"))));
    body.extend(attribute(19, &hex(text(message, "19"))));
    body.extend(word(20, number_of(message, "20")));
    body
}

fn elements(message: &Value) -> Vec<u8> {
    let elements = message["elements"].as_array().expect("elements");
    let element = |element: &Value| {
        let key = attribute(1, &attribute(1, &hex(text(element, "key"))));
        let data = element.get("data").map(|value| attribute(2, &data(value)));
        attribute(1, &[key, data.unwrap_or_default(), comment(6, element)].concat())
    };
    attribute(3, &elements.iter().flat_map(element).collect::<Vec<u8>>())
}

/// A value, or a verdict and the chain it leads to.
fn data(value: &Value) -> Vec<u8> {
    if let Some(bytes) = value.as_str() {
        return attribute(1, &hex(bytes));
    }
    let code = value["verdict"].as_i64().and_then(|code| i32::try_from(code).ok());
    let code = attribute(1, &code.expect("a verdict").to_be_bytes());
    let chain = match text(value, "chain") {
        "" => Vec::new(),
        chain => attribute(2, &terminated(chain)),
    };
    attribute(2, &[code, chain].concat())
}

/// The expression at `place`; the ones around it tell which registers it uses.
fn expression(list: &[Value], place: usize) -> Vec<u8> {
    let name = |place: Option<usize>| place.and_then(|place| list.get(place)?["n"].as_str());
    let (before, after) = (name(place.checked_sub(1)), name(Some(place + 1)));
    let expression = &list[place];
    let operand = |key| attribute(key, &data(&expression["data"]));
    let body = match text(expression, "n") {
        "meta" if before == Some("bitwise") => words(&[(2, MARK), (3, FIRST)]),
        "meta" if after == Some("bitwise") => words(&[(2, MARK), (1, FIRST)]),
        "meta" => words(&[(2, PROTOCOL), (1, FIRST)]),
        "cmp" => {
            let operation = number_of(expression, "op");
            [words(&[(1, FIRST)]), word(2, operation), operand(3)].concat()
        }
        "payload" => words(&[(1, FIRST), (2, 1), (3, 0), (4, 0)]),
        "fib" => words(&[(1, FIRST), (2, 0), (3, 0)]),
        "bitwise" => {
            let zero = attribute(1, &[0; 4]);
            let operation = words(&[(1, FIRST), (2, FIRST), (3, 4), (6, 0)]);
            [operation, attribute(4, &zero), attribute(5, &zero)].concat()
        }
        "numgen" => {
            let modulus = number_of(expression, "mod");
            [words(&[(1, FIRST)]), word(2, modulus), words(&[(3, 1), (4, 0)])].concat()
        }
        "lookup" => {
            let to = if after == Some("nat") { FIRST } else { 0 };
            let set = attribute(1, &terminated(&named(text(expression, "set"))));
            [set, words(&[(2, FIRST), (3, to), (5, 0)])].concat()
        }
        "immediate" => {
            let to = match (expression["data"].is_string(), before) {
                (false, _) => 0,
                (true, Some("immediate")) => SECOND,
                (true, _) => FIRST,
            };
            [words(&[(1, to)]), operand(2)].concat()
        }
        "nat" => {
            let port = if before == Some("lookup") { AFTER_ADDRESS } else { SECOND };
            words(&[(1, 1), (2, IPV4), (3, FIRST), (4, FIRST), (5, port), (6, port), (7, 3)])
        }
        "counter" => [attribute(1, &[0; 8]), attribute(2, &[0; 8])].concat(),
        "match" | "target" => extension(expression),
        other => panic!("an expression of kind {other}"),
    };
    let kind = attribute(1, &terminated(text(expression, "n")));
    attribute(1, &[kind, attribute(2, &body)].concat())
}

/// An xt match or target.
fn extension(expression: &Value) -> Vec<u8> {
    let name = text(expression, "name");
    let mut info = hex(text(expression, "info"));
    if let Some((_, whole)) = CUT_MATCHES.iter().find(|(cut, _)| *cut == name) {
        info.resize(*whole, 0);
    }
    let revision = number_of(expression, "rev");
    [attribute(1, &terminated(name)), word(2, revision), attribute(3, &info)].concat()
}

/// Numbers of 4 bytes, by attribute.
fn words(values: &[(u16, u32)]) -> Vec<u8> {
    values.iter().flat_map(|(kind, value)| word(*kind, u64::from(*value))).collect()
}

fn word(kind: u16, value: u64) -> Vec<u8> {
    attribute(kind, &u32::try_from(value).expect("four bytes").to_be_bytes())
}

/// One netlink attribute, padded.
pub(crate) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).expect("a small attribute");
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn terminated(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

fn hex(text: &str) -> Vec<u8> {
    let byte = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).expect("hexadecimal");
    (0..text.len()).step_by(2).map(byte).collect()
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or_else(|| panic!("no {key} in {value}"))
}

fn number_of(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("no {key} in {value}"))
}
