//! One frame as it lies in a segment: a head of fixed size, what is known about the frame as JSON, its image. Pure.
//!
//! Not here: segments, and what is done with a record that is broken.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::settle::Reason;

/// Bytes before the JSON: the mark, the lengths of JSON and image, the image's checksum, that of everything before it.
pub(super) const HEAD_BYTES: usize = 20;
/// Bytes of JSON: names are bounded, so that a longer one is none of ours.
const META_BYTES_MAX: usize = 16 << 10;
/// What each record begins with; the digit is the version of its form.
const MARK: [u8; 4] = *b"FGs1";

/// What is known about a frame beside its image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Meta {
    /// The frame's id, the same over all restarts.
    pub id: String,
    /// The engine's `detectorName`.
    pub detector: String,
    /// The engine's `ianaTimeZone`.
    pub time_zone: String,
    /// The engine's `detectTimeUtc`.
    pub detect_time: Timestamp,
    /// When it came.
    pub received_at: Timestamp,
    /// The kind of source, as in the metrics.
    pub source: String,
    /// The name of its entry as it is written, placeholders and all: what its rate, order and the like are looked up by.
    pub entry: String,
    /// What the source calls it, such as a request.
    pub name: String,
    /// Whether the image is kept as the base64 that it came in.
    pub base64: bool,
    /// Size of the image itself, bytes.
    pub image_bytes: u64,
    /// Why it can be no frame: it becomes a dead letter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flaw: Option<Flaw>,
}

/// What is wrong with what its source brought.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Flaw {
    pub reason: Reason,
    /// For people.
    pub message: String,
}

/// A head, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// Bytes of JSON.
    pub meta: u32,
    /// Bytes of the image as it is kept.
    pub image: u32,
    /// The image's checksum.
    pub crc: u32,
}

impl Head {
    /// Bytes of the whole record.
    pub(super) fn record_bytes(self) -> u64 {
        HEAD_BYTES as u64 + u64::from(self.meta) + u64::from(self.image)
    }
}

/// Appends a record. Its lengths must fit 32 bits: images are bounded far below.
pub(super) fn write(meta: &[u8], image: &[u8], into: &mut Vec<u8>) -> Head {
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("a frame is far smaller than 4 GiB");
    let head = Head { meta: length(meta), image: length(image), crc: crc32fast::hash(image) };
    let begin = into.len();
    into.extend_from_slice(&MARK);
    for number in [head.meta, head.image, head.crc] {
        into.extend_from_slice(&number.to_le_bytes());
    }
    let crc = before_image(&into[begin..], meta);
    into.extend_from_slice(&crc.to_le_bytes());
    into.extend_from_slice(meta);
    into.extend_from_slice(image);
    head
}

/// Takes a head apart; `None` if it is none. The JSON behind it is not looked at.
pub(super) fn head(bytes: &[u8]) -> Option<Head> {
    let bytes = bytes.get(..HEAD_BYTES)?;
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let head = Head { meta: number(4), image: number(8), crc: number(12) };
    (bytes[..4] == MARK && head.meta as usize <= META_BYTES_MAX).then_some(head)
}

/// What is known about the frame, from head and JSON; `None` if they are broken.
pub(super) fn meta(bytes: &[u8]) -> Option<Meta> {
    let (head, meta) = bytes.split_at_checked(HEAD_BYTES)?;
    let (begin, crc) = head.split_at(HEAD_BYTES - 4);
    if before_image(begin, meta).to_le_bytes() != *crc {
        return None;
    }
    serde_json::from_slice(meta).ok()
}

fn before_image(head: &[u8], meta: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(head);
    crc.update(meta);
    crc.finalize()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn meta_of(n: u64) -> Meta {
        Meta {
            id: format!("{n:026}"),
            detector: format!("Cam \"{}\"", n % 3),
            time_zone: "America/Los_Angeles".into(),
            detect_time: Timestamp::from_second(1_800_000_000 + i64::try_from(n).unwrap()).unwrap(),
            received_at: Timestamp::from_second(1_800_000_001).unwrap(),
            source: "push".into(),
            entry: "{detectorName}".into(),
            name: "a\nb".into(),
            base64: false,
            image_bytes: 3,
            flaw: None,
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic_and_none_are_taken_for_a_record(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let marked = [&MARK[..], &bytes].concat();
            drop((head(&bytes), head(&marked), meta(&bytes)));
            proptest::prop_assert_eq!(meta(&marked), None);
        }
    }

    #[test]
    fn a_record_comes_back_and_no_bit_of_it_can_be_wrong_unnoticed() {
        let mut bytes = Vec::new();
        let json = serde_json::to_vec(&meta_of(7)).unwrap();
        let written = write(&json, b"abc", &mut bytes);
        assert_eq!(bytes.len() as u64, written.record_bytes());
        let begin = HEAD_BYTES + json.len();
        assert_eq!(head(&bytes), Some(written));
        assert_eq!(meta(&bytes[..begin]), Some(meta_of(7)));
        assert_eq!((&bytes[begin..], crc32fast::hash(&bytes[begin..])), (&b"abc"[..], written.crc));
        for at in 0..begin {
            let mut broken = bytes[..begin].to_vec();
            broken[at] ^= 4;
            assert!(head(&broken).is_none() || meta(&broken).is_none(), "byte {at}");
        }
        assert_eq!((head(&bytes[..HEAD_BYTES - 1]), meta(b"")), (None, None));
    }
}
