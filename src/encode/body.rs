//! The request body of one frame, built once and shared by all its attempts. Field names and order are the engine's contract.
//!
//! Written by hand into one allocation of the exact size: sending the image through a JSON serialiser costs ten times as much.

use base64::Engine as _;
use base64::engine::general_purpose::PAD;
use bytes::Bytes;

use crate::frame::Frame;

const HEAD: &[u8] = br#"{"expanded":""#;

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
type Base64 = base64::engine::Simd;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
static BASE64: std::sync::LazyLock<Base64> = std::sync::LazyLock::new(|| Base64::standard(PAD));
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
type Base64 = base64::engine::GeneralPurpose;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
static BASE64: std::sync::LazyLock<Base64> = std::sync::LazyLock::new(|| Base64::new(&base64::alphabet::STANDARD, PAD));

/// Decodes standard padded base64; `None` if it is none.
pub fn decode(base64: &str) -> Option<Vec<u8>> {
    BASE64.decode(base64).ok()
}

/// What is posted to the engine for one frame. Cheap to clone.
#[derive(Clone)]
pub struct Body(Bytes);

impl Body {
    /// Builds it.
    pub fn build(frame: &Frame, image: &[u8]) -> Self {
        let tail = tail(frame);
        let encoded = base64::encoded_len(image.len(), true).expect("images are far smaller than the address space");
        let mut body = Vec::with_capacity(HEAD.len() + encoded + tail.len());
        body.extend_from_slice(HEAD);
        body.resize(HEAD.len() + encoded, 0);
        BASE64.encode_slice(image, &mut body[HEAD.len()..]).expect("the slice has the encoded length");
        body.extend_from_slice(tail.as_bytes());
        Self(Bytes::from(body))
    }

    /// The bytes to send.
    pub fn bytes(&self) -> Bytes {
        self.0.clone()
    }

    /// The image, decoded back: for the rare frame that becomes a dead letter, so that the others need not keep it twice.
    pub fn image(&self) -> Vec<u8> {
        let from = &self.0[HEAD.len()..];
        let end = from.iter().position(|b| *b == b'"').expect("build closes the string");
        BASE64.decode(&from[..end]).expect("build wrote it")
    }

    /// Bytes to send.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// Not the image: only how large it is.
impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Body({} bytes)", self.0.len())
    }
}

/// Everything behind the image.
fn tail(frame: &Frame) -> String {
    let json = |text: &str| serde_json::Value::from(text).to_string();
    format!(
        r#"","detectorName":{},"ianaTimeZone":{},"detectTimeUtc":"{:.3}"}}"#,
        json(&frame.detector.name),
        json(&frame.detector.time_zone),
        frame.detect_time,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encode::tests::frame_of;
    use base64::prelude::BASE64_STANDARD;
    use proptest::prelude::*;

    #[test]
    fn the_body_is_exactly_what_the_engine_documents() {
        let mut frame = frame_of("FrontDoorCam");
        frame.detect_time = "2026-11-23T11:00:00.1239Z".parse().unwrap();
        let body = Body::build(&frame, b"image");
        let expected = concat!(
            r#"{"expanded":"aW1hZ2U=","detectorName":"FrontDoorCam","#,
            r#""ianaTimeZone":"America/Los_Angeles","detectTimeUtc":"2026-11-23T11:00:00.123Z"}"#,
        );
        assert_eq!(body.bytes(), expected.as_bytes());
        frame.detect_time = "2026-11-23T11:00:00Z".parse().unwrap();
        assert!(Body::build(&frame, b"").bytes().ends_with(br#""2026-11-23T11:00:00.000Z"}"#));
    }

    #[test]
    fn the_allocation_has_the_exact_size() {
        for n in [0, 1, 2, 3, 40_000] {
            let body = Body::build(&frame_of("a \"quoted\" name"), &vec![7; n]);
            let length = body.len();
            let bytes = body.bytes();
            drop(body);
            let vec: Vec<u8> = bytes.try_into_mut().map(Vec::from).unwrap();
            assert_eq!(vec.capacity(), length);
        }
    }

    proptest! {
        #[test]
        fn any_name_and_image_come_back_byte_for_byte(
            name in "\\PC*|[\"\\\\\\x00-\\x1f\\u{2028}🙂]{1,20}",
            image in proptest::collection::vec(any::<u8>(), 0..500),
        ) {
            let body = Body::build(&frame_of(&name), &image);
            let parsed: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&body.bytes()).unwrap();
            prop_assert_eq!(parsed.len(), 4);
            prop_assert_eq!(parsed["detectorName"].as_str(), Some(name.as_str()));
            prop_assert_eq!(parsed["ianaTimeZone"].as_str(), Some("America/Los_Angeles"));
            let sent = BASE64_STANDARD.decode(parsed["expanded"].as_str().unwrap()).unwrap();
            prop_assert_eq!(&sent, &image);
            prop_assert_eq!(body.image(), image);
        }
    }
}
