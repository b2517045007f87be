//! A reader of the running kernel's type information (BTF), for what the programs must know before
//! they load: where a field lies, what an enumerator's value is, which arguments a tracepoint has.
//!
//! Format: <https://docs.kernel.org/bpf/btf.html>. Bytes are foreign: every read is checked, and a
//! type graph that loops or nests absurdly is refused rather than followed.

use std::fmt;

/// `BTF_MAGIC`, little endian on every machine the programs are built for.
const MAGIC: u16 = 0xeb9f;
/// The only version there is, and no flags.
const VERSION_AND_FLAGS: [u8; 2] = [1, 0];
/// Bytes of `struct btf_header`.
const HEADER_BYTES: u32 = 24;
/// Bytes of `struct btf_type` before the kind's own data.
const TYPE_BYTES: usize = 12;
/// Modifiers and anonymous members that may nest; the kernel's own limit is 32.
const MAX_DEPTH: u32 = 32;
/// Members that one search may look at. The kernel's largest structures have some hundred; without
/// a limit, anonymous members of the same type would double the work with each level of depth.
const MAX_MEMBERS: u32 = 10_000;
/// What the name of a tracepoint's type begins with.
const TRACEPOINT: &str = "btf_trace_";

const KIND_INT: u32 = 1;
const KIND_PTR: u32 = 2;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_RESTRICT: u32 = 11;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;

/// Why bytes are not BTF.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    what: &'static str,
    offset: usize,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "malformed BTF: {} at byte {}", self.what, self.offset)
    }
}

impl std::error::Error for Malformed {}

/// Parsed BTF; type id `n` is the `n`th type, 0 is `void`.
pub struct Btf {
    bytes: Vec<u8>,
    strings: usize,
    types: Vec<usize>,
}

/// The fixed part of a type.
#[derive(Clone, Copy)]
struct Type {
    at: usize,
    name: u32,
    kind: u32,
    vlen: u32,
    kind_flag: bool,
    size_or_id: u32,
}

impl Btf {
    /// Indexes the types.
    ///
    /// # Errors
    /// When the header, a type or a section runs past the end, or a kind is unknown.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, Malformed> {
        let header = |offset| read_u32(&bytes, offset).ok_or(Malformed { what: "header", offset });
        if read_u16(&bytes, 0) != Some(MAGIC) {
            return Err(Malformed { what: "magic number", offset: 0 });
        }
        let start = header(4)? as usize;
        let first = start.saturating_add(header(8)? as usize);
        let end = first.saturating_add(header(12)? as usize);
        let strings = start.saturating_add(header(16)? as usize);
        if end > bytes.len() || strings > bytes.len() {
            return Err(Malformed { what: "section length", offset: 8 });
        }
        let mut btf = Self { bytes, strings, types: vec![usize::MAX] };
        let mut at = first;
        while at < end {
            let parsed = btf.type_at(at).ok_or(Malformed { what: "type", offset: at })?;
            btf.types.push(at);
            at = at
                .checked_add(TYPE_BYTES + parsed.extra_bytes())
                .filter(|next| *next <= end)
                .ok_or(Malformed { what: "type length", offset: at })?;
        }
        Ok(btf)
    }

    /// Byte offset of a field. `path` names members of nested structures, separated by dots;
    /// anonymous structures and unions are looked through.
    #[must_use]
    pub fn field_offset(&self, structure: &str, path: &str) -> Option<u32> {
        let mut current = self.find(KIND_STRUCT, structure)?;
        let mut bits = 0_u32;
        for name in path.split('.') {
            let mut left = MAX_MEMBERS;
            let (offset, type_id) = self.member(current, name, 0, &mut left)?;
            bits = bits.checked_add(offset)?;
            current = self.strip(type_id)?;
        }
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    /// Value of an enumerator of a named enum, when it fits 32 bits.
    #[must_use]
    pub fn enumerator(&self, name: &str, enumerator: &str) -> Option<u32> {
        let found = self.find(KIND_ENUM, name)?;
        (0..found.vlen as usize).find_map(|index| {
            let at = found.at + TYPE_BYTES + index * 8;
            (self.string(read_u32(&self.bytes, at)?)? == enumerator)
                .then(|| read_u32(&self.bytes, at + 4))?
        })
    }

    /// How many arguments a tracepoint passes to a `tp_btf` program; `None` when the kernel has no
    /// such tracepoint.
    #[must_use]
    pub fn tracepoint_arguments(&self, tracepoint: &str) -> Option<u32> {
        // The prototype's first parameter is the tracing core's own `void *__data`.
        self.tracepoint_prototype(tracepoint)?.vlen.checked_sub(1)
    }

    /// Whether a tracepoint's argument (from 0) is a pointer.
    #[must_use]
    pub fn tracepoint_argument_is_pointer(&self, tracepoint: &str, index: u32) -> bool {
        self.tracepoint_prototype(tracepoint)
            .filter(|prototype| index + 1 < prototype.vlen)
            .and_then(|prototype| {
                let at = prototype.at + TYPE_BYTES + (index as usize + 1) * 8;
                self.strip(read_u32(&self.bytes, at + 4)?)
            })
            .is_some_and(|argument| argument.kind == KIND_PTR)
    }

    /// BTF that names the tracepoints' types and nothing else, each with the id that it has here: a
    /// loader that looks for their ids only reads this in a small part of the memory.
    ///
    /// # Errors
    /// When the names of tracepoints take 4 GiB or more.
    pub fn only_tracepoints(&self) -> Result<Vec<u8>, Malformed> {
        let (mut types, mut strings, mut end) = (Vec::new(), vec![0], 0);
        for at in self.types.iter().skip(1) {
            let name = self.type_at(*at).and_then(|found| self.tracepoint(found));
            let kind = if name.is_some() { KIND_TYPEDEF } else { KIND_PTR };
            let name_at = if name.is_some() { length(&strings)? } else { 0 };
            types.extend([name_at, kind << 24, 0].into_iter().flat_map(u32::to_le_bytes));
            if let Some(name) = name {
                strings.extend(name.bytes().chain([0]));
                end = types.len();
            }
        }
        write(&types[..end], &strings)
    }

    /// The name of a tracepoint's type.
    fn tracepoint(&self, found: Type) -> Option<&str> {
        let name = self.string(found.name).filter(|_| found.kind == KIND_TYPEDEF);
        name.filter(|name| name.starts_with(TRACEPOINT))
    }

    fn tracepoint_prototype(&self, tracepoint: &str) -> Option<Type> {
        let typedef = self.find(KIND_TYPEDEF, &format!("{TRACEPOINT}{tracepoint}"))?;
        let pointer = self.strip(typedef.size_or_id)?;
        let prototype = self.strip(pointer.size_or_id)?;
        (pointer.kind == KIND_PTR && prototype.kind == KIND_FUNC_PROTO).then_some(prototype)
    }

    /// Bit offset and type of a member, searched through anonymous members; looks at no more than
    /// `left`, which it counts down.
    fn member(
        &self,
        structure: Type,
        name: &str,
        depth: u32,
        left: &mut u32,
    ) -> Option<(u32, u32)> {
        if depth > MAX_DEPTH || !matches!(structure.kind, KIND_STRUCT | KIND_UNION) {
            return None;
        }
        (0..structure.vlen as usize).find_map(|index| {
            *left = left.checked_sub(1)?;
            let at = structure.at + TYPE_BYTES + index * 12;
            let type_id = read_u32(&self.bytes, at + 4)?;
            let raw = read_u32(&self.bytes, at + 8)?;
            let offset = if structure.kind_flag { raw & 0x00ff_ffff } else { raw };
            match self.string(read_u32(&self.bytes, at)?)? {
                "" => {
                    let (inner, found) =
                        self.member(self.strip(type_id)?, name, depth + 1, left)?;
                    Some((offset.checked_add(inner)?, found))
                }
                own if own == name => Some((offset, type_id)),
                _ => None,
            }
        })
    }

    /// The type behind typedefs and qualifiers.
    fn strip(&self, id: u32) -> Option<Type> {
        let mut current = self.type_by_id(id)?;
        for _ in 0..MAX_DEPTH {
            match current.kind {
                KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG => {
                    current = self.type_by_id(current.size_or_id)?;
                }
                _ => return Some(current),
            }
        }
        None
    }

    fn find(&self, kind: u32, name: &str) -> Option<Type> {
        self.types
            .iter()
            .skip(1)
            .filter_map(|at| self.type_at(*at))
            .find(|found| found.kind == kind && self.string(found.name) == Some(name))
    }

    fn type_by_id(&self, id: u32) -> Option<Type> {
        self.types
            .get(usize::try_from(id).ok()?)
            .filter(|_| id != 0)
            .and_then(|at| self.type_at(*at))
    }

    fn type_at(&self, at: usize) -> Option<Type> {
        let info = read_u32(&self.bytes, at.checked_add(4)?)?;
        let found = Type {
            at,
            name: read_u32(&self.bytes, at)?,
            kind: info >> 24 & 0x1f,
            vlen: info & 0xffff,
            kind_flag: info >> 31 == 1,
            size_or_id: read_u32(&self.bytes, at + 8)?,
        };
        (KIND_INT..=KIND_ENUM64).contains(&found.kind).then_some(found)
    }

    fn string(&self, offset: u32) -> Option<&str> {
        let start = self.strings.checked_add(usize::try_from(offset).ok()?)?;
        let tail = self.bytes.get(start..)?;
        let length = tail.iter().position(|byte| *byte == 0)?;
        std::str::from_utf8(&tail[..length]).ok()
    }
}

impl Type {
    /// Bytes of the kind's own data behind the fixed part.
    fn extra_bytes(self) -> usize {
        let each = match self.kind {
            KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => 12,
            KIND_ENUM | KIND_FUNC_PROTO => 8,
            _ => 0,
        };
        let fixed = match self.kind {
            KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
            KIND_ARRAY => 12,
            _ => 0,
        };
        each * self.vlen as usize + fixed
    }
}

/// Both sections behind a header.
fn write(types: &[u8], strings: &[u8]) -> Result<Vec<u8>, Malformed> {
    let types_bytes = length(types)?;
    let mut bytes = [MAGIC.to_le_bytes(), VERSION_AND_FLAGS].concat();
    let sections = [HEADER_BYTES, 0, types_bytes, types_bytes, length(strings)?];
    bytes.extend(sections.into_iter().flat_map(u32::to_le_bytes));
    bytes.extend_from_slice(types);
    bytes.extend_from_slice(strings);
    Ok(bytes)
}

fn length(bytes: &[u8]) -> Result<u32, Malformed> {
    u32::try_from(bytes.len()).map_err(|_large| Malformed { what: "section length", offset: 0 })
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    let raw = bytes.get(at..at.checked_add(4)?)?;
    raw.try_into().ok().map(u32::from_le_bytes)
}

fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    let raw = bytes.get(at..at.checked_add(2)?)?;
    raw.try_into().ok().map(u16::from_le_bytes)
}

#[cfg(test)]
#[path = "btf_tests.rs"]
mod tests;
