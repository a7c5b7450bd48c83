//! An image as the spool keeps it: its bytes, or the base64 that it came in, once that was looked at. Pure.

use std::borrow::Cow;

use bytes::Bytes;

use crate::encode::{body, image};
use crate::source::message;

/// An image on its way into the spool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::source) struct Image {
    pub(super) bytes: Bytes,
    /// `bytes` are base64 as the engine takes it, of a whole image.
    pub(super) base64: bool,
    /// Size of the image itself.
    pub(super) size: u64,
}

/// Why an image is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::source) enum Flaw {
    /// Larger than allowed.
    TooLarge,
    /// Not base64, or not a whole image: what is wrong with it, in words that follow its name.
    Unusable(String),
}

impl Image {
    /// Looks at the image that was read from `message`, which may be at most so large. Nothing is copied unless its base64
    /// has white space or escapes in it.
    pub(in crate::source) fn look(image: &message::Image<'_>, message: &Bytes, max: u64) -> Result<Self, Flaw> {
        let text = match image {
            message::Image::Raw(raw) => return usable(raw, max).map(|()| Self::raw(message.slice_ref(raw))),
            message::Image::Base64(text) => text,
        };
        let bytes = match text {
            _ if text.bytes().any(|it| it.is_ascii_whitespace()) => {
                Bytes::from(text.split_ascii_whitespace().collect::<String>())
            }
            Cow::Borrowed(text) => message.slice_ref(text.as_bytes()),
            Cow::Owned(text) => Bytes::from(text.clone()),
        };
        let mut decoded = Vec::with_capacity(bytes.len() / 4 * 3);
        if !body::decode(&bytes, &mut decoded) {
            return Err(Flaw::Unusable("is not base64: standard alphabet, padded".into()));
        }
        usable(&decoded, max)?;
        Ok(Self { bytes, base64: true, size: decoded.len() as u64 })
    }

    /// One that nobody has looked at: where it is none, it becomes a dead letter.
    pub(in crate::source) fn raw(bytes: Bytes) -> Self {
        Self { size: bytes.len() as u64, base64: false, bytes }
    }
}

fn usable(bytes: &[u8], max: u64) -> Result<(), Flaw> {
    if bytes.len() as u64 > max {
        return Err(Flaw::TooLarge);
    }
    match image::inspect(bytes) {
        Ok(_) => Ok(()),
        Err(image::Flaw::Truncated(what) | image::Flaw::Unsupported(what)) => {
            Err(Flaw::Unusable(format!("is not a whole image: {what}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use base64::prelude::{BASE64_STANDARD, Engine as _};

    use super::*;
    use crate::encode::image::tests::a_jpeg;

    #[test]
    fn what_the_engine_takes_is_kept_as_it_came_and_nothing_else_is_taken() {
        let jpeg = a_jpeg();
        let plain = BASE64_STANDARD.encode(&jpeg);
        let message = Bytes::from(plain.clone());
        let look = |text: Cow<'_, str>, message: &Bytes, max| Image::look(&message::Image::Base64(text), message, max);
        let borrowed = std::str::from_utf8(&message).unwrap();
        let kept = look(borrowed.into(), &message, 1 << 20).unwrap();
        assert_eq!(kept.bytes.as_ptr(), message.as_ptr(), "not copied");
        assert_eq!((kept.base64, kept.size), (true, jpeg.len() as u64));
        let spaced = plain.replace('A', " A\r\n");
        for text in [Cow::Owned(plain.clone()), Cow::Owned(spaced)] {
            assert_eq!(look(text, &message, 1 << 20).unwrap().bytes, plain);
        }
        assert_eq!(look(borrowed.into(), &message, 10), Err(Flaw::TooLarge));
        for wrong in [&plain[1..], "", "aGVsbG8="] {
            let found = look(wrong.to_owned().into(), &message, 1 << 20);
            assert!(matches!(found, Err(Flaw::Unusable(_))), "{found:?}");
        }
        let raw = Bytes::from(jpeg);
        assert_eq!(Image::look(&message::Image::Raw(&raw), &raw, 1 << 20), Ok(Image::raw(raw.clone())));
        assert!(Image::look(&message::Image::Raw(&raw[..50]), &raw, 1 << 20).is_err());
    }
}
