//! A pod's UID in little room: as many are held as the cluster has endpoints.

use std::fmt::Write as _;

use crate::facts::PodUid;

/// Where a UUID's text has dashes.
const DASHES: [usize; 4] = [8, 13, 18, 23];
/// The length of that text.
const TEXT_BYTES: usize = 36;

/// The API server gives UUIDs; anything else is kept as it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Uid {
    /// In the form that the API server writes.
    Uuid([u8; 16]),
    /// Any other text.
    Other(PodUid),
}

impl From<&str> for Uid {
    fn from(text: &str) -> Self {
        uuid(text).map_or_else(|| Self::Other(PodUid(text.into())), Self::Uuid)
    }
}

impl From<&Uid> for PodUid {
    fn from(uid: &Uid) -> Self {
        let bytes = match uid {
            Uid::Uuid(bytes) => bytes,
            Uid::Other(uid) => return uid.clone(),
        };
        let mut text = String::with_capacity(TEXT_BYTES);
        for byte in bytes {
            if DASHES.contains(&text.len()) {
                text.push('-');
            }
            // A string takes whatever is written to it.
            let _infallible = write!(text, "{byte:02x}");
        }
        Self(text.into())
    }
}

/// The bytes of a UUID in small letters with dashes; `None` for any other text.
fn uuid(text: &str) -> Option<[u8; 16]> {
    let text = text.as_bytes();
    if text.len() != TEXT_BYTES || DASHES.iter().any(|dash| text[*dash] != b'-') {
        return None;
    }
    let mut bytes = [0; 16];
    let (mut at, mut next) = (0, 0);
    while at < TEXT_BYTES {
        if DASHES.contains(&at) {
            at += 1;
            continue;
        }
        bytes[next] = digit(text[at])? << 4 | digit(text[at + 1])?;
        (at, next) = (at + 2, next + 1);
    }
    Some(bytes)
}

fn digit(letter: u8) -> Option<u8> {
    match letter {
        b'0'..=b'9' => Some(letter - b'0'),
        b'a'..=b'f' => Some(letter - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_what_the_api_server_writes_is_taken_for_a_uuid() {
        let is_uuid = |text: &str| uuid(text).is_some();
        assert!(is_uuid("9d3c0a54-3e0e-4b43-8d38-2f3f0a8e3c11"));
        for other in [
            "",
            "ua",
            "9D3C0A54-3E0E-4B43-8D38-2F3F0A8E3C11",
            "9d3c0a54-3e0e-4b43-8d38-2f3f0a8e3c1ü",
        ] {
            assert!(!is_uuid(other), "{other}");
        }
    }

    proptest! {
        #[test]
        fn a_uid_comes_out_as_it_went_in(
            text in "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-fA-F-]{36}|.{0,40}",
        ) {
            let uid = PodUid(text.into());
            prop_assert_eq!(PodUid::from(&Uid::from(&*uid.0)), uid);
        }
    }
}
