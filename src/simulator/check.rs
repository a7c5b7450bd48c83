//! The strict reading of requests: what the engine's contract does not name is refused, with the field in the message. Pure.

use std::borrow::Cow;
use std::fmt;

use base64::Engine as _;
use base64::engine::Simd;
use base64::engine::general_purpose::PAD;
use http::HeaderMap;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use jiff::{SignedDuration, Timestamp};
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, Visitor};

/// The earliest believable detection: 2000-01-01T00:00:00Z, seconds since 1970.
const EARLIEST: i64 = 946_684_800;
/// How far ahead of our clock a detection may be.
const AHEAD_MAX: SignedDuration = SignedDuration::from_hours(24);

/// A publish request that is as it should be.
#[derive(Debug)]
pub(super) struct Publish<'a> {
    pub(super) detector: Cow<'a, str>,
    pub(super) zone: Cow<'a, str>,
    pub(super) time: Timestamp,
    pub(super) image: Vec<u8>,
}

/// Reads the body of a publish request.
pub(super) fn publish<'a>(headers: &HeaderMap, body: &'a [u8], images_only: bool) -> Result<Publish<'a>, String> {
    json_type(headers)?;
    let [expanded, detector, zone, time] =
        object(body, &["expanded", "detectorName", "ianaTimeZone", "detectTimeUtc"])?;
    if detector.is_empty() {
        return Err("`detectorName` is empty".into());
    }
    let known = jiff::tz::TimeZone::get(&zone).is_ok_and(|found| found.iana_name() == Some(&*zone));
    if !known {
        return Err(format!("`ianaTimeZone` is not an IANA time zone: {}", zone.escape_debug()));
    }
    let time = detect_time(&time)?;
    let image = Simd::standard(PAD)
        .decode(expanded.as_bytes())
        .map_err(|error| format!("`expanded` is not canonical padded base64: {error}"))?;
    if image.is_empty() {
        return Err("`expanded` is empty".into());
    }
    if images_only && !is_image(&image) {
        return Err("`expanded` is no JPEG, PNG, WebP or BMP image".into());
    }
    Ok(Publish { detector, zone, time, image })
}

/// Reads the body of a login: user name and password.
pub(super) fn credentials<'a>(headers: &HeaderMap, body: &'a [u8]) -> Result<[Cow<'a, str>; 2], String> {
    json_type(headers)?;
    if headers.contains_key(AUTHORIZATION) {
        return Err("a login carries no `Authorization`".into());
    }
    object(body, &["username", "password"])
}

/// The bearer token of a request.
pub(super) fn bearer(headers: &HeaderMap) -> Result<&str, String> {
    let value = single(headers, &AUTHORIZATION)?;
    match value.strip_prefix("Bearer ") {
        Some(token) if !token.is_empty() && !token.contains(' ') => Ok(token),
        Some(_) | None => Err("`Authorization` is not `Bearer <token>`".into()),
    }
}

fn json_type(headers: &HeaderMap) -> Result<(), String> {
    match single(headers, &CONTENT_TYPE)? {
        "application/json" => Ok(()),
        other => Err(format!("`content-type` is not application/json: {}", other.escape_debug())),
    }
}

fn single<'a>(headers: &'a HeaderMap, name: &http::HeaderName) -> Result<&'a str, String> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => value.to_str().map_err(|_| format!("`{name}` is not ASCII")),
        (None, _) => Err(format!("no `{name}`")),
        (Some(_), Some(_)) => Err(format!("more than one `{name}`")),
    }
}

fn detect_time(text: &str) -> Result<Timestamp, String> {
    let shape = text.bytes().map(|b| if b.is_ascii_digit() { b'0' } else { b });
    if !shape.eq(*b"0000-00-00T00:00:00.000Z") {
        return Err(format!("`detectTimeUtc` is not of the form 2026-11-23T11:00:00.123Z: {}", text.escape_debug()));
    }
    let time: Timestamp = text.parse().map_err(|error| format!("`detectTimeUtc` is no time: {error}"))?;
    if time.as_second() < EARLIEST || time > Timestamp::now() + AHEAD_MAX {
        return Err(format!("`detectTimeUtc` is absurd: {text}"));
    }
    Ok(time)
}

fn is_image(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0xff, 0xd8, 0xff])
        || bytes.starts_with(b"\x89PNG\r\n\x1a\n")
        || bytes.starts_with(b"BM")
        || (bytes.starts_with(b"RIFF") && bytes.get(8..12) == Some(b"WEBP"))
}

/// A JSON object with exactly these fields, each once, each a string; long values are borrowed.
fn object<'a, const N: usize>(body: &'a [u8], fields: &'static [&'static str; N]) -> Result<[Cow<'a, str>; N], String> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let values = json.deserialize_any(Object(fields)).map_err(|error| error.to_string())?;
    json.end().map_err(|error| error.to_string())?;
    Ok(values)
}

struct Object<const N: usize>(&'static [&'static str; N]);

impl<'de, const N: usize> Visitor<'de> for Object<N> {
    type Value = [Cow<'de, str>; N];

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut values: [Option<Cow<'de, str>>; N] = [const { None }; N];
        while let Some(key) = map.next_key_seed(Text("a key"))? {
            let Some(index) = self.0.iter().position(|field| **field == *key) else {
                return Err(A::Error::custom(format_args!("unknown field `{}`", key.escape_debug())));
            };
            if values[index].is_some() {
                return Err(A::Error::custom(format_args!("duplicate field `{key}`")));
            }
            values[index] = Some(map.next_value_seed(Text(self.0[index]))?);
        }
        if let Some(missing) = values.iter().position(Option::is_none) {
            return Err(A::Error::custom(format_args!("missing field `{}`", self.0[missing])));
        }
        Ok(values.map(|value| value.expect("checked above")))
    }
}

/// A string, named for the message if it is something else.
struct Text(&'static str);

impl<'de> DeserializeSeed<'de> for Text {
    type Value = Cow<'de, str>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Text {
    type Value = Cow<'de, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a string for `{}`", self.0)
    }

    fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Cow::Borrowed(text))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Cow::Owned(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    const JPEG: &str = "/9j/4AAQ"; // FF D8 FF E0 00 10

    fn headers(content_type: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(content_type))])
    }

    fn body(expanded: &str, detector: &str, zone: &str, time: &str) -> String {
        format!(r#"{{"expanded":{expanded},"detectorName":{detector},"ianaTimeZone":{zone},"detectTimeUtc":{time}}}"#)
    }

    #[test]
    fn a_good_request_passes() {
        for image in [JPEG, "iVBORw0KGgo=", "Qk0A", "UklGRgAAAABXRUJQ"] {
            let text = body(&format!("\"{image}\""), "\"Küche 1\"", "\"UTC\"", "\"2026-11-23T11:00:00.123Z\"");
            let read = publish(&headers("application/json"), text.as_bytes(), true).expect(image);
            assert_eq!((&*read.detector, &*read.zone), ("Küche 1", "UTC"));
            assert_eq!(read.time.to_string(), "2026-11-23T11:00:00.123Z");
        }
        let escaped = body(r#""\/9j\/4AAQ""#, r#""\u0041""#, "\"America/New_York\"", "\"2026-11-23T11:00:00.123Z\"");
        let read = publish(&headers("application/json"), escaped.as_bytes(), true).expect("escapes are JSON too");
        assert_eq!((&*read.detector, read.image.len()), ("A", 6));
    }

    /// Each row: the body, and what the refusal must say.
    #[test]
    fn each_flaw_is_named() {
        let (image, name, zone, time) = ("\"/9j/4AAQ\"", "\"Door\"", "\"UTC\"", "\"2026-11-23T11:00:00.123Z\"");
        let ahead = format!("\"{:.3}\"", Timestamp::now() + SignedDuration::from_hours(48));
        let rows: Vec<(String, &str)> = vec![
            (body(image, name, zone, time).replace("\"expanded\":\"/9j/4AAQ\",", ""), "missing field `expanded`"),
            (body(image, name, zone, time).replace("\"detectorName\":\"Door\",", ""), "missing field `detectorName`"),
            (body(image, name, zone, time).replace("\"ianaTimeZone\":\"UTC\",", ""), "missing field `ianaTimeZone`"),
            (body(image, name, zone, time).replace("detectTimeUtc", "detectTime"), "unknown field `detectTime`"),
            (body(image, name, zone, time).replace('}', r#","embeddings":[1]}"#), "unknown field `embeddings`"),
            (body(image, name, zone, time).replace('}', r#","ianaTimeZone":"UTC"}"#), "duplicate field `ianaTimeZone`"),
            (body("7", name, zone, time), "`expanded`"),
            (body(image, "null", zone, time), "`detectorName`"),
            (body(image, name, "[\"UTC\"]", time), "`ianaTimeZone`"),
            (body(image, name, zone, "1795431600123"), "`detectTimeUtc`"),
            (body(image, "\"\"", zone, time), "`detectorName` is empty"),
            (body("\"\"", name, zone, time), "`expanded` is empty"),
            (body("\"/9j/4AA\"", name, zone, time), "`expanded` is not canonical"),
            (body("\"/9j/4AB=\"", name, zone, time), "`expanded` is not canonical"),
            (body("\"_9j_4AAQ\"", name, zone, time), "`expanded` is not canonical"),
            (body("\"/9j/\\n4AAQ\"", name, zone, time), "`expanded` is not canonical"),
            (body("\"SGFsbG8h\"", name, zone, time), "`expanded` is no JPEG"),
            (body(image, name, "\"Mars/Olympus\"", time), "`ianaTimeZone` is not an IANA time zone: Mars/Olympus"),
            (body(image, name, "\"america/new_york\"", time), "`ianaTimeZone` is not"),
            (body(image, name, zone, "\"2026-11-23T11:00:00Z\""), "`detectTimeUtc` is not of the form"),
            (body(image, name, zone, "\"2026-11-23T11:00:00.123+00:00\""), "`detectTimeUtc` is not of the form"),
            (body(image, name, zone, "\"2026-11-23T11:00:00.123456Z\""), "`detectTimeUtc` is not of the form"),
            (body(image, name, zone, "\"2026-13-23T11:00:00.123Z\""), "`detectTimeUtc` is no time"),
            (body(image, name, zone, "\"1970-01-01T00:00:00.000Z\""), "`detectTimeUtc` is absurd"),
            (body(image, name, zone, &ahead), "`detectTimeUtc` is absurd"),
            (body(image, name, zone, time) + "{}", "trailing characters"),
            ("[]".into(), "a JSON object"),
            ("not JSON".into(), "expected"),
            (String::new(), "EOF"),
        ];
        for (text, want) in rows {
            let refusal = publish(&headers("application/json"), text.as_bytes(), true).map(|_| ()).expect_err(&text);
            assert!(refusal.contains(want), "{text}: {refusal}, wanted {want}");
        }
    }

    #[test]
    fn headers_are_exact() {
        let text = body("\"/9j/4AAQ\"", "\"Door\"", "\"UTC\"", "\"2026-11-23T11:00:00.123Z\"");
        for wrong in ["application/json; charset=utf-8", "text/json", "Application/JSON"] {
            let refusal = publish(&headers(wrong), text.as_bytes(), true).map(|_| ()).expect_err(wrong);
            assert!(refusal.contains("`content-type`"), "{wrong}: {refusal}");
        }
        assert!(publish(&HeaderMap::new(), text.as_bytes(), true).is_err(), "no content type");
        for (value, good) in
            [("Bearer a.b.c", true), ("bearer a.b.c", false), ("Bearer ", false), ("Basic eA==", false)]
        {
            let headers = HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_static(value))]);
            assert_eq!(bearer(&headers).is_ok(), good, "{value}");
        }
        assert!(bearer(&HeaderMap::new()).is_err());
    }
}
