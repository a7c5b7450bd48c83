//! What a queue carries: an image's bytes with what is known about it beside them, or the engine's own publish JSON. Pure.
//!
//! Not here: how a queue delivers it, and whether the image is one (`encode::image`).

use std::borrow::Cow;
use std::fmt;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::de::{Deserializer as _, Error, IgnoredAny, MapAccess, Visitor};

/// The longest detector name, in bytes.
const NAME_BYTES_MAX: usize = 255;
/// Bytes around the base64 of an image: names, zone, time, and some white space.
const AROUND_BYTES_MAX: u64 = 64 << 10;
/// How much of a wrong value is told, in characters.
const SHOWN_CHARS_MAX: usize = 60;

/// Bytes of the largest message whose image has at most `max_frame`.
pub(super) fn bytes_max(max_frame: u64) -> u64 {
    max_frame.div_ceil(3) * 4 + AROUND_BYTES_MAX
}

/// What a frame says about itself; what it leaves out, its detector's entry says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Known {
    /// The engine's `detectorName`.
    pub detector_name: Option<String>,
    /// When the face was detected.
    pub detect_time: Option<Timestamp>,
    /// IANA time zone of the detector.
    pub time_zone: Option<String>,
}

/// The image of a message, as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Image<'a> {
    /// Its bytes.
    Raw(&'a [u8]),
    /// Base64 as the engine wants it; not checked here.
    Base64(Cow<'a, str>),
}

/// Why a message cannot become a frame, and which of its fields is to blame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Flaw {
    /// The field's name; `None`: the message as a whole.
    pub field: Option<&'static str>,
    /// What is wrong with it, bounded and without the image.
    pub message: String,
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.field {
            Some(field) => write!(f, "`{field}` {}", self.message),
            None => f.write_str(&self.message),
        }
    }
}

impl Known {
    /// Takes what a message carries beside its image: properties, headers or fields.
    pub(super) fn from_fields(
        detector_name: Option<&str>,
        detect_time_utc: Option<&str>,
        iana_time_zone: Option<&str>,
    ) -> Result<Self, Flaw> {
        Ok(Self {
            detector_name: detector_name.map(name).transpose()?,
            detect_time: detect_time_utc.map(time).transpose()?,
            time_zone: iana_time_zone.map(zone).transpose()?,
        })
    }
}

/// Takes a payload apart: JSON if it begins like an object, which no image does; else the image itself.
/// What the JSON says goes before what stands `beside` it.
pub(super) fn payload(bytes: &[u8], beside: Known) -> Result<(Image<'_>, Known), Flaw> {
    if bytes.trim_ascii_start().first() != Some(&b'{') {
        return Ok((Image::Raw(bytes), beside));
    }
    let (image, known) = json(bytes)?;
    let known = Known {
        detector_name: known.detector_name.or(beside.detector_name),
        detect_time: known.detect_time.or(beside.detect_time),
        time_zone: known.time_zone.or(beside.time_zone),
    };
    Ok((image, known))
}

/// The engine's publish JSON. Only `expanded` must be there: an entry can say the rest. Fields that are not the engine's
/// are refused, for who sends `croppedAligned` or `embeddings` expects something of them.
pub(super) fn json(bytes: &[u8]) -> Result<(Image<'_>, Known), Flaw> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let values = reader.deserialize_map(Object).map_err(|error| flaw_of(&error))?;
    reader.end().map_err(|error| flaw_of(&error))?;
    let [expanded, detector_name, time_zone, detect_time] = values;
    let Some(expanded) = expanded.filter(|it| !it.is_empty()) else {
        return Err(Flaw { field: Some("expanded"), message: "is missing or empty".into() });
    };
    let known = Known::from_fields(detector_name.as_deref(), detect_time.as_deref(), time_zone.as_deref())?;
    Ok((Image::Base64(expanded), known))
}

/// In the order of the values that [`Object`] gives.
const FIELDS: [&str; 4] = ["expanded", "detectorName", "ianaTimeZone", "detectTimeUtc"];

struct Object;

impl<'de> Visitor<'de> for Object {
    type Value = [Option<Cow<'de, str>>; FIELDS.len()];

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut values = Self::Value::default();
        while let Some(key) = map.next_key::<Text>()? {
            let Some(at) = FIELDS.iter().position(|field| *field == key.0) else {
                map.next_value::<IgnoredAny>()?;
                return Err(A::Error::custom(format_args!("unknown\n{}", shown(&key.0))));
            };
            if values[at].is_some() {
                return Err(A::Error::custom(format_args!("field\n{}\nis there twice", FIELDS[at])));
            }
            let value = map.next_value::<Text>();
            let value =
                value.map_err(|error| A::Error::custom(format_args!("field\n{}\nis no text: {error}", FIELDS[at])))?;
            values[at] = Some(value.0);
        }
        Ok(values)
    }
}

/// Borrowed where nothing in it is escaped.
struct Text<'a>(Cow<'a, str>);

impl<'de> serde::Deserialize<'de> for Text<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Borrow;
        impl<'de> Visitor<'de> for Borrow {
            type Value = Text<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text")
            }
            fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Text(text.into()))
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Text(text.to_owned().into()))
            }
            // A number or a list in place of text: never shown, for it may be the image.
            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, _: A) -> Result<Self::Value, A::Error> {
                Err(A::Error::custom("a list"))
            }
        }
        deserializer.deserialize_str(Borrow)
    }
}

/// Back from serde's message to the field that [`Object`] named in it.
fn flaw_of(error: &serde_json::Error) -> Flaw {
    let text = error.to_string();
    let mut parts = text.splitn(3, '\n');
    match (parts.next(), parts.next(), parts.next()) {
        (Some("field"), Some(name), Some(message)) => {
            let field = FIELDS.into_iter().find(|field| *field == name);
            Flaw { field, message: shown(message) }
        }
        (Some("unknown"), Some(name), _) => {
            let name = name.rsplit_once(" at line").map_or(name, |(name, _)| name);
            Flaw { field: None, message: format!("unknown field `{name}`; known are {}", FIELDS.join(", ")) }
        }
        _ => Flaw { field: None, message: format!("is not the engine's JSON: {}", shown(&text)) },
    }
}

/// What a message made of its entry's `name`, as a detector's name; or why it is none.
pub(super) fn named(entry: &str, filled: Option<String>) -> Result<String, String> {
    let filled = filled.ok_or_else(|| format!("the message does not say what `{entry}` stands for"))?;
    // The level of a topic or subject may be as long as it likes.
    name(&filled).map_err(|flaw| format!("what the message says for `{entry}` {}", flaw.message))
}

/// A detector's name, if it can be one.
fn name(text: &str) -> Result<String, Flaw> {
    let wrong = |message: &str| Err(Flaw { field: Some("detectorName"), message: message.into() });
    if text.trim().is_empty() {
        wrong("is empty")
    } else if text.len() > NAME_BYTES_MAX {
        wrong("is longer than 255 bytes")
    } else if text.chars().any(char::is_control) {
        wrong("holds control characters")
    } else {
        Ok(text.to_owned())
    }
}

fn time(text: &str) -> Result<Timestamp, Flaw> {
    text.parse().map_err(|_| Flaw {
        field: Some("detectTimeUtc"),
        message: format!("is not a time like 2026-11-23T11:00:00.123Z: {}", shown(text)),
    })
}

fn zone(text: &str) -> Result<String, Flaw> {
    let known = TimeZone::get(text).is_ok_and(|zone| zone.iana_name() == Some(text));
    if known {
        Ok(text.to_owned())
    } else {
        let message = format!("is not an IANA time zone like America/Los_Angeles: {}", shown(text));
        Err(Flaw { field: Some("ianaTimeZone"), message })
    }
}

fn shown(text: &str) -> String {
    text.escape_debug().take(SHOWN_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<(Image<'_>, Known), String> {
        payload(text.as_bytes(), Known::default()).map_err(|flaw| flaw.to_string())
    }

    #[test]
    fn an_image_is_taken_as_it_is_and_json_is_taken_apart() {
        assert_eq!(payload(b"\xff\xd8\xff", Known::default()).unwrap().0, Image::Raw(b"\xff\xd8\xff"));
        let text = r#"{"expanded":"AAAA","detectorName":"T\u00fcr","ianaTimeZone":"UTC","detectTimeUtc":"2026-11-23T11:00:00.123Z"}"#;
        let (image, known) = read(text).unwrap();
        assert!(matches!(image, Image::Base64(Cow::Borrowed("AAAA"))), "not copied");
        assert_eq!(known.detector_name.as_deref(), Some("Tür"));
        assert_eq!(known.time_zone.as_deref(), Some("UTC"));
        assert_eq!(known.detect_time, Some("2026-11-23T11:00:00.123Z".parse().unwrap()));
        assert_eq!(read(r#"{"expanded":"AAAA"}"#).unwrap().1, Known::default(), "the entry says the rest");
    }

    #[test]
    fn b14_what_fills_a_name_must_be_one() {
        let named = |filled: Option<&str>| named("{subject.1}", filled.map(str::to_owned));
        assert_eq!(named(Some("Tür")).as_deref(), Ok("Tür"));
        for filled in [None, Some(""), Some(" "), Some("a\u{1b}"), Some(&*"x".repeat(256))] {
            let why = named(filled).unwrap_err();
            assert!(why.contains("`{subject.1}`") && why.len() < 100, "{why}");
        }
    }

    #[test]
    fn what_the_json_says_goes_before_what_stands_beside_it() {
        let beside = Known::from_fields(Some("Beside"), None, Some("UTC")).unwrap();
        let (_, known) = payload(br#"{"expanded":"AAAA","detectorName":"Inside"}"#, beside).unwrap();
        assert_eq!((known.detector_name.as_deref(), known.time_zone.as_deref()), (Some("Inside"), Some("UTC")));
    }

    proptest::proptest! {
        #[test]
        fn no_payload_panics_and_no_flaw_is_long(
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300),
            field in "expanded|detectorName|ianaTimeZone|detectTimeUtc|[\\PC\n]{0,400}",
            value in "\\PC{0,400}",
        ) {
            let object = serde_json::json!({ "expanded": "AAAA", field: value }).to_string();
            for payload in [&bytes[..], &[b"{", &bytes[..]].concat(), object.as_bytes()] {
                for read in [self::payload(payload, Known::default()), json(payload)] {
                    let Err(flaw) = read else { continue };
                    proptest::prop_assert!(flaw.to_string().chars().count() < 300, "{}", flaw);
                    proptest::prop_assert!(!flaw.to_string().contains('\n'), "{}", flaw);
                }
            }
        }
    }

    #[test]
    fn every_flaw_names_its_field_and_shows_no_image() {
        let long = "9".repeat(1000);
        for (text, said) in [
            (r#"{"detectorName":"A"}"#, "`expanded` is missing or empty"),
            (r#"{"expanded":""}"#, "`expanded` is missing or empty"),
            (r#"{"expanded":[1,2]}"#, "`expanded` is no text"),
            (r#"{"expanded":7}"#, "`expanded` is no text"),
            (r#"{"expanded":"A","expanded":"B"}"#, "`expanded` is there twice"),
            (r#"{"expanded":"A","embeddings":"B"}"#, "unknown field `embeddings`; known are expanded, "),
            (r#"{"expanded":"A","detectorName":" "}"#, "`detectorName` is empty"),
            (r#"{"expanded":"A","detectorName":"a\u0007"}"#, "`detectorName` holds control characters"),
            (r#"{"expanded":"A","ianaTimeZone":"utc"}"#, "`ianaTimeZone` is not an IANA time zone"),
            (r#"{"expanded":"A","detectTimeUtc":"yesterday"}"#, "`detectTimeUtc` is not a time"),
            (r#"{"expanded":"A"} x"#, "is not the engine's JSON"),
            ("{", "is not the engine's JSON"),
            (&format!(r#"{{"expanded":"A","detectTimeUtc":"{long}"}}"#), "`detectTimeUtc` is not a time"),
        ] {
            let found = read(text).unwrap_err();
            assert!(found.starts_with(said), "{text}: {found}");
            assert!(found.len() < 300, "{found}");
        }
    }
}
