//! One `[[detectors]]` entry by itself.

use std::time::Duration;

use humantime::format_duration;
use jiff::civil;
use jiff::fmt::strtime;

use super::{AGE_MAX, Findings, WAIT_MAX, WEIGHT_MAX};
use crate::config::zones;
use crate::source::directory::{self, AfterPublish, DetectTime};
use crate::source::{Entry, Template};

/// The longest detector name, in bytes.
const NAME_BYTES_MAX: usize = 255;
/// The shortest that `quiet`, `partial_timeout` and `rescan` can be: below, a directory would be looked at without pause.
const PAUSE_MIN: Duration = Duration::from_millis(10);

pub(super) fn check(key: &str, entry: &Entry, found: &mut Findings) {
    name(&format!("{key}.name"), entry, found);
    if entry.time_zone.is_empty() {
        found.problem(format!("{key}.time_zone"), "missing", "write for example time_zone = \"America/Los_Angeles\"");
    } else if !zones::exists(&entry.time_zone) {
        let right = zones::nearest(&entry.time_zone)
            .map_or("write it like America/Los_Angeles".to_owned(), |it| format!("did you mean {it}?"));
        found.problem(format!("{key}.time_zone"), format!("`{}` is not an IANA time zone", entry.time_zone), right);
    }
    found.rate(&format!("{key}.rate"), entry.rate);
    found.not_zero(&format!("{key}.weight"), entry.weight, "1");
    found.no_more_than(&format!("{key}.weight"), entry.weight, WEIGHT_MAX);
    found.at_most(&format!("{key}.max_age"), entry.max_age, AGE_MAX);
    found.at_most(&format!("{key}.silence_alarm"), entry.silence_alarm.unwrap_or_default(), AGE_MAX);
    if entry.silence_alarm == Some(Duration::ZERO) {
        found.problem(format!("{key}.silence_alarm"), "is zero", "write for example 10m, or remove it");
    }
    if let Some(config) = entry.directory() {
        drop_directory(&format!("{key}.directory"), config, found);
    }
}

fn name(key: &str, entry: &Entry, found: &mut Findings) {
    let name = &entry.name;
    if name.trim().is_empty() {
        return found.problem(
            key,
            "missing",
            "write the name that the engine shall show, for example name = \"FrontDoorCam\"",
        );
    }
    if name.len() > NAME_BYTES_MAX {
        return found.problem(key, format!("has {} bytes", name.len()), format!("write at most {NAME_BYTES_MAX}"));
    }
    if name.chars().any(char::is_control) {
        return found.problem(key, format!("`{}` holds control characters", name.escape_debug()), "leave them out");
    }
    let known = entry.source.placeholders();
    match (Template::parse(name, known), entry.directory()) {
        (Err(wrong), _) => found.problem(key, format!("`{name}`: {wrong}"), known.hint),
        (Ok(template), Some(config)) if template.names_levels() && !config.recursive => {
            found.problem(
                key,
                format!("`{name}` names sub-directories, but `recursive` is false"),
                "write recursive = true, or a plain name",
            );
        }
        (Ok(_), _) => {}
    }
}

fn drop_directory(key: &str, config: &directory::Config, found: &mut Findings) {
    if config.path.as_os_str().is_empty() {
        found.problem(format!("{key}.path"), "missing", "write for example path = \"/srv/cameras/front-door\"");
    } else {
        found.absolute(&format!("{key}.path"), &config.path);
    }
    if config.include.is_empty() {
        found.problem(format!("{key}.include"), "is empty: no file would be taken", "write for example [\"*.jpg\"]");
    }
    for (i, glob) in config.include.iter().enumerate() {
        if let Err(error) = directory::glob(glob) {
            let wrong = format!("`{glob}` is not a pattern: {}", error.kind());
            found.problem(format!("{key}.include[{i}]"), wrong, "write it like *.jpg");
        }
    }
    for (name, pause, longest) in [
        ("quiet", config.quiet, WAIT_MAX),
        ("partial_timeout", config.partial_timeout, AGE_MAX),
        ("rescan", config.rescan, WAIT_MAX),
    ] {
        found.at_most(&format!("{key}.{name}"), pause, longest);
        if pause < PAUSE_MIN {
            let right = format!("write at least {}", format_duration(PAUSE_MIN));
            found.problem(format!("{key}.{name}"), format!("is {}", format_duration(pause)), right);
        }
    }
    if config.quiet >= config.partial_timeout {
        let (quiet, partial) = (format_duration(config.quiet), format_duration(config.partial_timeout));
        let wrong = format!("{quiet} is not shorter than the {partial} of `partial_timeout`");
        found.problem(
            format!("{key}.quiet"),
            wrong,
            "no file could be complete before it is given up: make it shorter",
        );
    }
    found.at_most(&format!("{key}.archive_max_age"), config.archive_max_age, AGE_MAX);
    archive(key, config, found);
    detect_time(&format!("{key}.detect_time"), &config.detect_time, found);
}

fn archive(key: &str, config: &directory::Config, found: &mut Findings) {
    let key = format!("{key}.archive");
    match (config.after_publish, &config.archive) {
        (AfterPublish::Archive, None) => {
            found.problem(
                key,
                "missing, but `after_publish` is \"archive\"",
                "write where to, on the same file system as `path`",
            );
        }
        (AfterPublish::Delete, Some(_)) => {
            found.problem(
                key,
                "given, but `after_publish` is \"delete\"",
                "write after_publish = \"archive\", or remove this",
            );
        }
        (AfterPublish::Archive, Some(path)) => found.absolute(&key, path),
        (AfterPublish::Delete, None) => {}
    }
}

fn detect_time(key: &str, detect_time: &DetectTime, found: &mut Findings) {
    let (name, format) = match detect_time {
        DetectTime::Modified | DetectTime::Arrival | DetectTime::Exif => return,
        DetectTime::Name(from_name) => (&from_name.name, &from_name.format),
    };
    match regex::Regex::new(name) {
        Err(error) => {
            // The last line says what; those before draw where.
            let text = error.to_string();
            let what = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
            found.problem(
                format!("{key}.name"),
                format!("`{name}` is not a regular expression: {what}"),
                r"write it like '(?<time>\d{17})'",
            );
        }
        Ok(regex) if !regex.capture_names().flatten().any(|group| group == "time") => {
            found.problem(
                format!("{key}.name"),
                format!("`{name}` has no group named time"),
                r"write it like '(?<time>\d{17})'",
            );
        }
        Ok(_) => {}
    }
    if let Err(wrong) = time_format(format) {
        found.problem(format!("{key}.format"), format!("`{format}` {wrong}"), "write it like %Y%m%d%H%M%S%3f");
    }
}

/// Whether what `format` writes can be read back as a date and a time.
fn time_format(format: &str) -> Result<(), String> {
    // No part of it is like another, so a part that is left out shows.
    let sample = civil::date(2026, 11, 23).at(13, 14, 15, 0).in_tz("UTC").map_err(|it| it.to_string())?;
    let text = strtime::format(format, &sample).map_err(|error| format!("is not a time format: {error}"))?;
    let parsed =
        strtime::BrokenDownTime::parse(format, &text).map_err(|error| format!("cannot be read back: {error}"))?;
    let complete = parsed.to_timestamp().is_ok() || parsed.to_datetime().is_ok();
    let hour = format.contains("%s")
        || ["%H", "%I", "%T", "%R", "%k", "%l", "%c", "%r", "%X"].iter().any(|it| format.contains(it));
    if complete && hour { Ok(()) } else { Err("does not give both date and time".into()) }
}
