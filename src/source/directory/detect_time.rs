//! The detection time of a file: from its modification, its arrival, its EXIF data or its name, kept within reason.

use std::io::Cursor;

use anyhow::{Context as _, bail};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::fmt::strtime::BrokenDownTime;
use jiff::tz::TimeZone;
use regex::bytes::Regex;

use super::config::{DetectTime, FromName};

/// Finds detection times the way one detector is configured.
#[derive(Debug)]
pub struct Finder {
    way: Way,
    zone: TimeZone,
}

#[derive(Debug)]
enum Way {
    Modified,
    Arrival,
    Exif,
    Name(Regex, String),
}

/// The regular expression, checked together with the format.
pub(super) fn compile(from_name: &FromName) -> anyhow::Result<Regex> {
    let regex = Regex::new(&from_name.name).context("`name` is no regular expression")?;
    if !regex.capture_names().flatten().any(|group| group == "time") {
        bail!("`name` has no group `time`: write `(?<time>…)` around the time");
    }
    // A format is checked by writing a time with it: what cannot be written cannot be read either.
    jiff::fmt::strtime::format(&from_name.format, &Timestamp::UNIX_EPOCH.to_zoned_datetime(TimeZone::UTC))
        .with_context(|| format!("`format` = `{}` is no time format", from_name.format))?;
    Ok(regex)
}

impl Finder {
    /// For the files of a detector in this time zone.
    ///
    /// # Errors
    /// If the way or the zone cannot be used; a checked configuration has neither.
    pub fn new(detect_time: &DetectTime, time_zone: &str) -> anyhow::Result<Self> {
        let way = match detect_time {
            DetectTime::Modified => Way::Modified,
            DetectTime::Arrival => Way::Arrival,
            DetectTime::Exif => Way::Exif,
            DetectTime::Name(from_name) => Way::Name(compile(from_name)?, from_name.format.clone()),
        };
        let zone = TimeZone::get(time_zone).with_context(|| format!("time zone `{time_zone}`"))?;
        Ok(Self { way, zone })
    }

    /// The detection time, and whether an absurd one was replaced by the time of arrival, or that by now. `modified` is in
    /// nanoseconds since 1970.
    pub fn find(
        &self,
        name: &[u8],
        image: &[u8],
        modified: i64,
        arrival: Timestamp,
        now: Timestamp,
    ) -> (Timestamp, bool) {
        // Noticed before the clock was put back, it came in the future, which nobody believes.
        let (arrival, ahead) = (arrival.min(now), arrival > now);
        let modified = || Timestamp::from_nanosecond(i128::from(modified)).ok();
        let found = match &self.way {
            Way::Arrival => return (arrival, ahead),
            Way::Modified => modified(),
            Way::Exif => self.exif(image).or_else(modified),
            Way::Name(regex, format) => self.name(regex, format, name).or_else(modified),
        };
        match found {
            Some(time) if crate::source::believable(time, now) => (time, false),
            _ => (arrival, true),
        }
    }

    fn name(&self, regex: &Regex, format: &str, name: &[u8]) -> Option<Timestamp> {
        let captures = regex.captures(name)?;
        let text = std::str::from_utf8(captures.name("time")?.as_bytes()).ok()?;
        let parsed = BrokenDownTime::parse(format, text).ok()?;
        // With an offset (or seconds since 1970) it is a time by itself.
        parsed.to_timestamp().ok().or_else(|| self.local(parsed.to_datetime().ok()?))
    }

    fn exif(&self, image: &[u8]) -> Option<Timestamp> {
        let data = exif::Reader::new().read_from_container(&mut Cursor::new(image)).ok()?;
        let ascii = |tag| {
            let exif::Value::Ascii(texts) = &data.get_field(tag, exif::In::PRIMARY)?.value else { return None };
            texts.first().cloned()
        };
        let mut time = exif::DateTime::from_ascii(&ascii(exif::Tag::DateTimeOriginal)?).ok()?;
        // These two add to it; an image without them, or with rubbish in them, still has its seconds.
        if let Some(fraction) = ascii(exif::Tag::SubSecTimeOriginal) {
            time.parse_subsec(&fraction).ok();
        }
        if let Some(offset) = ascii(exif::Tag::OffsetTimeOriginal).or_else(|| ascii(exif::Tag::OffsetTime)) {
            time.parse_offset(&offset).ok();
        }
        let small = |n: u8| i8::try_from(n).ok();
        let local = DateTime::new(
            i16::try_from(time.year).ok()?,
            small(time.month)?,
            small(time.day)?,
            small(time.hour)?,
            small(time.minute)?,
            small(time.second)?,
            i32::try_from(time.nanosecond.unwrap_or(0)).ok()?,
        )
        .ok()?;
        match time.offset {
            Some(minutes) => {
                let offset = jiff::tz::Offset::from_seconds(i32::from(minutes) * 60).ok()?;
                offset.to_timestamp(local).ok()
            }
            None => self.local(local),
        }
    }

    fn local(&self, time: DateTime) -> Option<Timestamp> {
        self.zone.to_timestamp(time).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn nanos(text: &str) -> i64 {
        i64::try_from(at(text).as_nanosecond()).unwrap()
    }

    #[test]
    fn times_in_names_are_in_the_detectors_zone_unless_they_say_otherwise() {
        let (now, arrival) = (at("2026-11-24T00:00:00Z"), at("2026-11-23T23:59:00Z"));
        let cases = [
            (r"(?<time>\d{17})", "%Y%m%d%H%M%S%3f", "cam_20261123030000123.jpg", "2026-11-23T11:00:00.123Z"),
            (r"_(?<time>.*)\.jpg", "%Y-%m-%dT%H.%M.%S%z", "a_2026-11-23T03.00.00+0100.jpg", "2026-11-23T02:00:00Z"),
            (r"^(?<time>\d+)\.", "%s", "1795000000.jpg", "2026-11-18T11:06:40Z"),
            (r"(?<time>\d{17})", "%Y%m%d%H%M%S%3f", "no time in it.jpg", "2026-11-20T00:00:00Z"),
        ];
        for (name, format, file, want) in cases {
            let way = DetectTime::Name(FromName { name: name.into(), format: format.into() });
            let finder = Finder::new(&way, "America/Los_Angeles").unwrap();
            let found = finder.find(file.as_bytes(), b"", nanos("2026-11-20T00:00:00Z"), arrival, now);
            assert_eq!(found, (at(want), false), "{file}");
        }
    }

    #[test]
    fn absurd_times_are_replaced_by_the_time_of_arrival() {
        let (now, arrival) = (at("2026-11-24T00:00:00Z"), at("2026-11-23T23:59:00Z"));
        let finder = Finder::new(&DetectTime::Modified, "UTC").unwrap();
        for (modified, corrected) in [
            ("1970-01-01T00:00:00Z", true),
            ("1999-12-31T23:59:59Z", true),
            ("2000-01-01T00:00:00Z", false),
            ("2026-11-24T00:04:59Z", false),
            ("2026-11-24T00:05:01Z", true),
            ("2040-01-01T00:00:00Z", true),
        ] {
            let want = if corrected { arrival } else { at(modified) };
            assert_eq!(finder.find(b"", b"", nanos(modified), arrival, now), (want, corrected), "{modified}");
        }
    }

    #[test]
    fn a_time_of_arrival_that_is_ahead_since_the_clock_was_put_back_is_now() {
        let (now, arrival) = (at("2016-11-24T00:00:00Z"), at("2026-11-23T23:59:00Z"));
        for way in [DetectTime::Modified, DetectTime::Arrival] {
            let finder = Finder::new(&way, "UTC").unwrap();
            assert_eq!(finder.find(b"", b"", nanos("2026-11-23T23:58:00Z"), arrival, now), (now, true));
        }
    }

    #[test]
    fn exif_times_are_read_with_and_without_an_offset() {
        let (now, arrival) = (at("2026-11-24T00:00:00Z"), at("2026-11-23T23:59:00Z"));
        let finder = Finder::new(&DetectTime::Exif, "America/Los_Angeles").unwrap();
        let find = |image: &[u8]| finder.find(b"", image, nanos("2026-11-20T00:00:00Z"), arrival, now).0;
        assert_eq!(find(&jpeg_with_exif(None)), at("2026-11-23T11:00:00Z"));
        assert_eq!(find(&jpeg_with_exif(Some("+01:00"))), at("2026-11-23T02:00:00Z"));
        assert_eq!(find(b"\xff\xd8\xff\xd9"), at("2026-11-20T00:00:00Z"), "none: the modification time");
    }

    fn jpeg_with_exif(offset: Option<&str>) -> Vec<u8> {
        let field = |tag, text: &str| exif::Field {
            tag,
            ifd_num: exif::In::PRIMARY,
            value: exif::Value::Ascii(vec![text.as_bytes().to_vec()]),
        };
        let mut fields = vec![field(exif::Tag::DateTimeOriginal, "2026:11:23 03:00:00")];
        fields.extend(offset.map(|text| field(exif::Tag::OffsetTimeOriginal, text)));
        let mut writer = exif::experimental::Writer::new();
        for field in &fields {
            writer.push_field(field);
        }
        let mut tiff = Cursor::new(Vec::new());
        writer.write(&mut tiff, false).unwrap();
        let mut segment = b"Exif\0\0".to_vec();
        segment.extend(tiff.into_inner());
        let mut jpeg = b"\xff\xd8\xff\xe1".to_vec();
        jpeg.extend(u16::try_from(segment.len() + 2).unwrap().to_be_bytes());
        jpeg.extend(segment);
        jpeg.extend(b"\xff\xd9");
        jpeg
    }
}
