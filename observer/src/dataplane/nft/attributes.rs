//! Netlink messages and attributes, as borrowed slices of a datagram.
//!
//! Why not netlink-packet-netfilter 0.4: it fails a whole message on one attribute it finds too
//! short, reads `NFTA_SET_EXPR` unchecked (it can panic), has no types for the `nat`, `target`,
//! `match` and set-element payloads that matter here, and copies every value. This reader is
//! total: any input gives slices or [`Malformed`].

/// Input that is not what the kernel writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Malformed;

/// Length of `nlmsghdr`.
pub(in super::super) const MESSAGE_HEADER_BYTES: usize = 16;
const ATTRIBUTE_HEADER_BYTES: usize = 4;
/// Without `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`.
const ATTRIBUTE_TYPE_MASK: u16 = 0x3fff;

/// One netlink message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Frame<'d> {
    /// `nlmsg_type`
    pub kind: u16,
    /// `nlmsg_flags`
    pub flags: u16,
    /// `nlmsg_seq`
    pub sequence: u32,
    /// What follows the header.
    pub payload: &'d [u8],
    /// All of it, header and padding included.
    pub whole: &'d [u8],
}

/// The messages of a datagram; the first malformed one ends it.
pub(in super::super) fn frames(
    datagram: &[u8],
) -> impl Iterator<Item = Result<Frame<'_>, Malformed>> {
    split_all(datagram, split_frame)
}

/// One attribute: its type and value.
type Attribute<'d> = (u16, &'d [u8]);

/// The attributes in `bytes`; the first malformed one ends it.
pub(super) fn attributes(bytes: &[u8]) -> impl Iterator<Item = Result<Attribute<'_>, Malformed>> {
    split_all(bytes, split_attribute)
}

fn split_all<'d, T>(
    mut rest: &'d [u8],
    split: impl Fn(&'d [u8]) -> Option<(T, &'d [u8])>,
) -> impl Iterator<Item = Result<T, Malformed>> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let Some((first, after)) = split(rest) else {
            rest = &[];
            return Some(Err(Malformed));
        };
        rest = after;
        Some(Ok(first))
    })
}

fn split_frame(bytes: &[u8]) -> Option<(Frame<'_>, &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(*bytes.first_chunk()?)).ok()?;
    let payload = bytes.get(MESSAGE_HEADER_BYTES..length)?;
    let half = |at: usize| Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
    let sequence = u32::from_ne_bytes(*bytes.get(8..)?.first_chunk()?);
    let (whole, rest) = bytes.split_at(length.next_multiple_of(4).min(bytes.len()));
    Some((Frame { kind: half(4)?, flags: half(6)?, sequence, payload, whole }, rest))
}

fn split_attribute(bytes: &[u8]) -> Option<(Attribute<'_>, &[u8])> {
    let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
    let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?) & ATTRIBUTE_TYPE_MASK;
    let value = bytes.get(ATTRIBUTE_HEADER_BYTES..length)?;
    Some(((kind, value), bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// The attributes in `bytes`, by type; types from `N` on are left out, as newer kernels add them.
pub(in super::super) fn fields<const N: usize>(
    bytes: &[u8],
) -> Result<[Option<&[u8]>; N], Malformed> {
    let mut fields = [None; N];
    for attribute in attributes(bytes) {
        let (kind, value) = attribute?;
        if let Some(field) = fields.get_mut(usize::from(kind)) {
            *field = Some(value);
        }
    }
    Ok(fields)
}

/// A number in network order.
pub(super) fn be32(value: &[u8]) -> Result<u32, Malformed> {
    value.try_into().map(u32::from_be_bytes).ok().ok_or(Malformed)
}

/// A handle in network order.
pub(super) fn be64(value: &[u8]) -> Result<u64, Malformed> {
    value.try_into().map(u64::from_be_bytes).ok().ok_or(Malformed)
}

/// A name, with or without its final NUL.
pub(super) fn name(value: Option<&[u8]>) -> Result<&str, Malformed> {
    let value = value.ok_or(Malformed)?;
    std::str::from_utf8(value.strip_suffix(&[0]).unwrap_or(value)).ok().ok_or(Malformed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn values_are_padded_to_four_bytes_and_flags_are_not_part_of_the_type() {
        let bytes = [5, 0, 1, 0x80, b'a', 0, 0, 0, 8, 0, 2, 0x40, 0, 0, 1, 2];
        let fields = fields::<3>(&bytes).expect("well formed");
        assert_eq!(fields, [None, Some(&b"a"[..]), Some(&[0, 0, 1, 2][..])]);
        assert_eq!(be32(&bytes[12..]), Ok(258));
    }

    #[test]
    fn unknown_types_are_passed_over_and_missing_padding_at_the_end_is_no_error() {
        assert_eq!(
            fields::<2>(&[5, 0, 9, 0, 7, 0, 0, 0, 5, 0, 1, 0, 8]),
            Ok([None, Some(&[8][..])])
        );
    }

    #[test]
    fn a_length_beyond_the_end_or_below_the_header_is_malformed() {
        for bytes in [&[9, 0, 1, 0, 1][..], &[3, 0, 1, 0], &[0, 0, 0, 0], &[4], &[4, 0, 1]] {
            assert_eq!(fields::<2>(bytes), Err(Malformed), "{bytes:?}");
        }
        let frame = [15, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(frames(&frame).collect::<Vec<_>>(), [Err(Malformed)]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_an_end(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(frames(&bytes).count() <= bytes.len());
            prop_assert!(attributes(&bytes).count() <= bytes.len());
        }
    }
}
