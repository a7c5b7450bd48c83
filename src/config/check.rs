//! What the values mean together: pure, on the merged settings and what is known of the file system.
//!
//! Messages name other keys in backticks; `config` uses that to leave out what only follows from another problem.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use humantime::format_duration;
use jiff::civil;
use jiff::fmt::strtime;
use reqwest::Url;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use super::{Facts, Finding, SecretFile, Settings, Severity, layer, zones};
use crate::source::Entry;
use crate::source::directory::{self, AfterPublish, DetectTime};

/// The longest detector name, in bytes.
const NAME_BYTES_MAX: usize = 255;
/// `encode.memory` is at least so many times `encode.max_frame`: an image and its body.
const FRAMES_IN_MEMORY_MIN: u64 = 2;
/// Bytes of a SHA-256 hash.
const PIN_BYTES: usize = 32;

/// Everything that is wrong or worth a warning, in the order of the sections.
pub fn check(settings: &Settings, facts: &Facts) -> Vec<Finding> {
    let mut found = Findings(Vec::new());
    engine_url(settings, &mut found);
    engine_account(settings, facts, &mut found);
    engine_tls(settings, &mut found);
    engine_times(settings, &mut found);
    publish(settings, &mut found);
    encode(settings, &mut found);
    dead_letter(settings, &mut found);
    admin(settings, &mut found);
    log(settings, &mut found);
    found.not_zero("shutdown.deadline", settings.shutdown.deadline, "20s");
    for (i, entry) in settings.detectors.iter().enumerate() {
        detector(&format!("detectors[{i}]"), entry, &mut found);
    }
    detectors_together(settings, facts, &mut found);
    found.0
}

struct Findings(Vec<Finding>);

impl Findings {
    fn problem(&mut self, key: impl Into<String>, wrong: impl Into<String>, right: impl Into<String>) {
        self.push(Severity::Problem, key.into(), wrong.into(), right.into());
    }

    fn warning(&mut self, key: impl Into<String>, wrong: impl Into<String>, right: impl Into<String>) {
        self.push(Severity::Warning, key.into(), wrong.into(), right.into());
    }

    fn push(&mut self, severity: Severity, key: String, wrong: String, right: String) {
        self.0.push(Finding { severity, key, wrong, right });
    }

    fn not_zero<T: Copy + Default + PartialEq>(&mut self, key: &str, value: T, example: &str) {
        if value == T::default() {
            self.problem(key, "is zero", format!("write for example {example}"));
        }
    }

    fn rate(&mut self, key: &str, rate: f64) {
        if !(rate.is_finite() && rate >= 0.0) {
            self.problem(key, format!("is {rate}"), "write attempts per second, 0 for no limit");
        }
    }

    fn absolute(&mut self, key: &str, path: &Path) {
        if !path.is_absolute() {
            let wrong = format!("`{}` is a relative path", path.display());
            self.problem(key, wrong, "write the whole path, beginning with /");
        }
    }
}

fn engine_url(settings: &Settings, found: &mut Findings) {
    let key = "engine.base_url";
    let text = settings.engine.base_url.as_str();
    let like = "write it like https://10.0.0.123:5009";
    if text.is_empty() {
        return found.problem(key, "missing", like);
    }
    let url = match Url::parse(text) {
        Ok(url) => url,
        // Not shown: what cannot be taken apart may hold a password.
        Err(error) => return found.problem(key, format!("not a URL: {error}"), like),
    };
    if !matches!(url.scheme(), "http" | "https") {
        return found.problem(key, format!("the scheme is `{}`", url.scheme()), like);
    }
    if !url.username().is_empty() || url.password().is_some() {
        let right = "leave out what is before the @; the account goes to `username` and `password_file`";
        return found.problem(key, "holds an account (not shown)", right);
    }
    if url.query().is_some() || url.fragment().is_some() {
        return found.problem(key, "holds a query or fragment (not shown)", "leave out everything from ? or # on");
    }
    if url.path().contains("/api/v1") {
        let base = text.split("/api/v1").next().unwrap_or(text);
        return found.problem(
            key,
            "holds a path of the engine's API",
            format!("write {base}; the API's paths are added to it"),
        );
    }
    if url.scheme() == "http" {
        let engine = &settings.engine;
        for (key, given) in
            [("engine.pin_sha256", !engine.pin_sha256.is_empty()), ("engine.ca_file", engine.ca_file.is_some())]
        {
            if given {
                found.problem(
                    key,
                    "means nothing where `base_url` is plain http",
                    "write https:// in `base_url`, or remove this",
                );
            }
        }
        if !is_loopback(&url) {
            let wrong = "plain http: everybody on the network can read the faces, the password and the token";
            found.warning(key, wrong, "use https, on-premise usually on port 5009");
        }
    }
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn engine_account(settings: &Settings, facts: &Facts, found: &mut Findings) {
    let engine = &settings.engine;
    match (&engine.password_file, &engine.token_file) {
        (Some(_), Some(_)) => {
            found.problem(
                "engine.token_file",
                "given beside `password_file`",
                "keep one of `password_file` and `token_file`",
            );
        }
        (None, None) => found.problem(
            "engine.password_file",
            "missing, and no `token_file` either",
            "put the password of `username` into a file and write password_file = \"engine-password\"",
        ),
        (Some(_), None) if engine.username.as_deref().is_none_or(|name| name.trim().is_empty()) => {
            found.problem(
                "engine.username",
                "missing, but `password_file` is given",
                "write the account that the password belongs to",
            );
        }
        (None, Some(_)) if engine.username.is_some() => {
            found.warning("engine.username", "not used: `token_file` says who we are", "remove it");
        }
        (Some(_), None) | (None, Some(_)) => {}
    }
    let files = [
        ("engine.password_file", &engine.password_file),
        ("engine.token_file", &engine.token_file),
        ("engine.ca_file", &engine.ca_file),
    ];
    for (key, file) in files {
        match file.as_ref().and_then(|file| facts.secrets.get(file)) {
            None | Some(SecretFile::Usable) => {}
            Some(SecretFile::Away(why)) => found.warning(key, why, "nothing is published until it is there"),
            Some(SecretFile::Unfit(why)) => found.problem(key, why, ""),
        }
    }
}

fn engine_tls(settings: &Settings, found: &mut Findings) {
    let engine = &settings.engine;
    for (i, pin) in engine.pin_sha256.iter().enumerate() {
        if !is_pin(pin) {
            let right = "write the SHA-256 of the engine's public key in base64, as `framegate pin URL` shows it";
            found.problem(format!("engine.pin_sha256[{i}]"), format!("`{pin}` is not a pin"), right);
        }
    }
    let key = "engine.danger_accept_invalid_certs";
    if engine.danger_accept_invalid_certs && !engine.pin_sha256.is_empty() {
        found.problem(key, "given beside `pin_sha256`", "remove it: a pin is enough for a self-signed certificate");
    } else if engine.danger_accept_invalid_certs {
        let wrong = "whoever can answer in the engine's place gets the password, the token and the faces";
        found.warning(key, wrong, "give `pin_sha256` (see `framegate pin URL`) or `ca_file` instead");
    }
    if let Some(proxy) = &engine.proxy {
        let url = Url::parse(proxy).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        match url {
            None => found.problem(
                "engine.proxy",
                "not the URL of a proxy (not shown)",
                "write it like http://10.0.0.1:3128",
            ),
            Some(url) if url.password().is_some() => {
                found.problem("engine.proxy", "holds a password (not shown)", "use a proxy that asks for none");
            }
            Some(_) => {}
        }
    }
}

/// Base64 or hexadecimal (colons allowed), with or without `sha256/` before it: what `publish` takes.
fn is_pin(text: &str) -> bool {
    let text = text.trim().trim_start_matches("sha256/").trim_start_matches("sha256:");
    let base64 = base64::engine::general_purpose::STANDARD.decode(text).is_ok_and(|hash| hash.len() == PIN_BYTES);
    let digits = text.replace(':', "");
    base64 || digits.len() == 2 * PIN_BYTES && digits.bytes().all(|it| it.is_ascii_hexdigit())
}

fn engine_times(settings: &Settings, found: &mut Findings) {
    let engine = &settings.engine;
    let show = |it: Duration| format_duration(it).to_string();
    found.not_zero("engine.timeout", engine.timeout, "10s");
    found.not_zero("engine.connect_timeout", engine.connect_timeout, "3s");
    if engine.connect_timeout > engine.timeout {
        let wrong =
            format!("{} is longer than the {} of `timeout`", show(engine.connect_timeout), show(engine.timeout));
        found.problem("engine.connect_timeout", wrong, "`timeout` includes connecting: make this shorter");
    }
    let deadline = settings.shutdown.deadline;
    if engine.timeout > deadline {
        let wrong = format!("{} is longer than the {} of `shutdown.deadline`", show(engine.timeout), show(deadline));
        found.problem(
            "engine.timeout",
            wrong,
            "an attempt must be able to end before the daemon does: shorten it, or allow a longer deadline",
        );
    }
}

fn publish(settings: &Settings, found: &mut Findings) {
    let publish = &settings.publish;
    found.rate("publish.rate", publish.rate);
    found.not_zero("publish.max_in_flight", publish.max_in_flight, "64");
    found.not_zero("publish.attempts", publish.attempts, "8");
    found.not_zero("publish.backoff_min", publish.backoff_min, "200ms");
    if publish.backoff_min > publish.backoff_max {
        let (min, max) = (format_duration(publish.backoff_min), format_duration(publish.backoff_max));
        let wrong = format!("{min} is longer than the {max} of `backoff_max`");
        found.problem("publish.backoff_min", wrong, "make it the shorter of the two");
    }
}

fn encode(settings: &Settings, found: &mut Findings) {
    let encode = &settings.encode;
    found.not_zero("encode.memory", encode.memory.as_u64(), "256MiB");
    found.not_zero("encode.max_frame", encode.max_frame.as_u64(), "8MiB");
    let least = encode.max_frame.as_u64().saturating_mul(FRAMES_IN_MEMORY_MIN);
    if encode.memory.as_u64() < least && encode.memory.as_u64() > 0 {
        let wrong =
            format!("{} is less than {FRAMES_IN_MEMORY_MIN} × {} of `max_frame`", encode.memory, encode.max_frame);
        found.problem(
            "encode.memory",
            wrong,
            format!("write at least {}, or a smaller `max_frame`", bytesize::ByteSize(least)),
        );
    }
}

fn dead_letter(settings: &Settings, found: &mut Findings) {
    let dead_letter = &settings.dead_letter;
    found.absolute("dead_letter.directory", &dead_letter.directory);
    found.not_zero("dead_letter.max_size", dead_letter.max_size.as_u64(), "1GiB");
}

fn admin(settings: &Settings, found: &mut Findings) {
    let admin = &settings.admin;
    if !admin.listen.ip().is_loopback() {
        found.warning(
            "admin.listen",
            format!("`{}` can be read from the network, without a password: metrics, status, detector names", admin.listen),
            "write 127.0.0.1, or let a firewall admit Prometheus only",
        );
    }
    found.absolute("admin.control", &admin.control);
}

fn log(settings: &Settings, found: &mut Findings) {
    let level = &settings.log.level;
    let like = "write error, warn, info, debug or trace, or directives such as info,framegate::publish=debug";
    if let Err(error) = EnvFilter::builder().parse(level) {
        return found.problem("log.level", format!("`{level}`: {error}"), like);
    }
    // A bare word that is no level would be taken for a module's name and silence everything else.
    let wrong =
        level.split(',').map(str::trim).find(|part| !part.contains(['=', '[']) && part.parse::<LevelFilter>().is_err());
    if let Some(part) = wrong {
        let levels = ["error", "warn", "info", "debug", "trace", "off"];
        let right = layer::nearest(part, &levels).map_or(like.to_owned(), |it| format!("did you mean {it}?"));
        found.problem("log.level", format!("`{part}` is not a level"), right);
    }
}

fn detector(key: &str, entry: &Entry, found: &mut Findings) {
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
    if entry.silence_alarm == Some(Duration::ZERO) {
        found.problem(format!("{key}.silence_alarm"), "is zero", "write for example 10m, or remove it");
    }
    drop_directory(&format!("{key}.directory"), &entry.directory, found);
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
    let right = "a directory's detector knows {path.0}, {path.1} and so on: the directories below its path";
    match placeholders(name) {
        Err(wrong) => found.problem(key, format!("`{name}`: {wrong}"), right),
        Ok(0) => {}
        Ok(_) if !entry.directory.recursive => {
            found.problem(
                key,
                format!("`{name}` names sub-directories, but `recursive` is false"),
                "write recursive = true, or a plain name",
            );
        }
        Ok(_) => {}
    }
}

/// How many placeholders `name` holds, all of them `{path.N}`.
fn placeholders(name: &str) -> Result<usize, String> {
    let mut count = 0;
    let mut rest = name;
    while let Some(at) = rest.find(['{', '}']) {
        let inner = rest[at..].strip_prefix('{').ok_or("a } without its {")?;
        let (inner, after) = inner.split_once('}').ok_or("a { without its }")?;
        let index = inner.strip_prefix("path.").filter(|index| index.bytes().all(|it| it.is_ascii_digit()));
        index.and_then(|index| index.parse::<u8>().ok()).ok_or_else(|| format!("{{{inner}}} is not known here"))?;
        count += 1;
        rest = after;
    }
    Ok(count)
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
        if let Err(error) = globset::Glob::new(glob) {
            let wrong = format!("`{glob}` is not a pattern: {}", error.kind());
            found.problem(format!("{key}.include[{i}]"), wrong, "write it like *.jpg");
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
    found.not_zero(&format!("{key}.rescan"), config.rescan, "30s");
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

fn detectors_together(settings: &Settings, facts: &Facts, found: &mut Findings) {
    if settings.detectors.is_empty() {
        let right = "describe at least one with [[detectors]], here or in a file in conf.d";
        return found.problem("detectors", "there are none", right);
    }
    same_names(&settings.detectors, found);
    overlaps(settings, facts, found);
}

fn same_names(detectors: &[Entry], found: &mut Findings) {
    let mut first: HashMap<&str, &Entry> = HashMap::new();
    // A name with placeholders stands for many: two directories may use the same form.
    for (i, entry) in detectors.iter().enumerate().filter(|(_, it)| !it.name.contains('{')) {
        match first.get(entry.name.as_str()) {
            Some(other) => {
                let wrong =
                    format!("`{}` is also the name of the detector of {}", entry.name, other.directory.path.display());
                found.problem(format!("detectors[{i}].name"), wrong, "give each its own name");
            }
            None => {
                first.insert(&entry.name, entry);
            }
        }
    }
}

/// Directories of ours that no other may contain.
struct Place<'a> {
    key: String,
    path: &'a Path,
    real: PathBuf,
    drop_of: Option<&'a Entry>,
}

fn overlaps(settings: &Settings, facts: &Facts, found: &mut Findings) {
    let place = |key: String, path, drop_of| Place { key, path, real: facts.real(path), drop_of };
    let mut places = vec![place("dead_letter.directory".into(), settings.dead_letter.directory.as_path(), None)];
    for (i, entry) in settings.detectors.iter().enumerate() {
        places.push(place(format!("detectors[{i}].directory.path"), &entry.directory.path, Some(entry)));
        places.extend(
            entry
                .directory
                .archive
                .as_ref()
                .map(|archive| place(format!("detectors[{i}].directory.archive"), archive, None)),
        );
    }
    places.retain(|place| place.path.is_absolute());
    // Sorted by component, whatever contains a place comes before it, the nearest last.
    places.sort_by(|a, b| a.real.cmp(&b.real));
    let mut around: Vec<&Place<'_>> = Vec::new();
    for inner in &places {
        while around.last().is_some_and(|outer| !inner.real.starts_with(&outer.real)) {
            around.pop();
        }
        if let Some(outer) = around.iter().rev().find(|outer| collide(outer, inner)) {
            report_overlap(outer, inner, found);
        }
        around.push(inner);
    }
}

fn collide(outer: &Place<'_>, inner: &Place<'_>) -> bool {
    match (outer.drop_of, inner.drop_of) {
        (Some(entry), Some(_)) => outer.real == inner.real || entry.directory.recursive,
        (Some(_), None) | (None, Some(_)) => true,
        // Archives may share a directory; dead letters are theirs alone, for an archive is tidied by other rules.
        (None, None) => outer.key.starts_with("dead_letter") != inner.key.starts_with("dead_letter"),
    }
}

fn report_overlap(outer: &Place<'_>, inner: &Place<'_>, found: &mut Findings) {
    let whose = |place: &Place<'_>| match place.drop_of {
        Some(entry) => format!("the drop directory of `{}`", entry.name),
        None if place.key.starts_with("dead_letter") => "the dead-letter directory".to_owned(),
        None => "an archive".to_owned(),
    };
    // Told where the detector's entry stands, which is what somebody just wrote.
    let (at, other) = if inner.key.starts_with("dead_letter") { (outer, inner) } else { (inner, outer) };
    let relation = match (inner.real == outer.real, std::ptr::eq(at, inner)) {
        (true, _) => "is also",
        (false, true) => "is inside",
        (false, false) => "contains",
    };
    let wrong = format!("`{}` {relation} {} ({})", at.path.display(), whose(other), other.path.display());
    let right = match (at.drop_of, other.drop_of) {
        (Some(_), Some(_)) => {
            "a frame would be taken twice: write separate directories, or recursive = false for the outer"
        }
        (Some(_) | None, None) | (None, Some(_)) => {
            "what is kept would be published again or tidied away: write separate directories"
        }
    };
    found.problem(&at.key, wrong, right);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The keys (and severities) found in a configuration that begins with `start` and has these detectors.
    fn found(engine: &str, more: &str, detectors: &[&str]) -> Vec<String> {
        let detectors: String = detectors.iter().flat_map(|it| ["[[detectors]]\n", it, "\n"]).collect();
        let text = format!("[engine]\n{engine}\n{more}\n{detectors}");
        let settings: Settings = toml::from_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        check(&settings, &Facts::default())
            .iter()
            .map(|it| format!("{}{}", if it.severity == Severity::Warning { "~" } else { "" }, it.key))
            .collect()
    }

    const ENGINE: &str = "base_url = 'https://e:5009'\nusername = 'u'\npassword_file = 'p'";
    const DETECTOR: &str = "name = 'A'\ntime_zone = 'UTC'\ndirectory = { path = '/a' }";
    const NONE: [&str; 0] = [];

    #[test]
    fn a_plain_configuration_is_right() {
        assert_eq!(found(ENGINE, "", &[DETECTOR]), NONE);
    }

    #[test]
    fn engines() {
        let account = "username = 'u'\npassword_file = 'p'";
        for (engine, keys) in [
            (format!("base_url = 'ftp://e'\n{account}"), vec!["engine.base_url"]),
            (format!("base_url = '10.0.0.1:5009'\n{account}"), vec!["engine.base_url"]),
            (format!("base_url = 'https://u:p@e'\n{account}"), vec!["engine.base_url"]),
            (format!("base_url = 'https://e?x=1'\n{account}"), vec!["engine.base_url"]),
            (format!("base_url = 'https://e/identities/api/v1/authenticate'\n{account}"), vec!["engine.base_url"]),
            (format!("base_url = 'https://customer.econnectcloud.com/identities'\n{account}"), vec![]),
            (format!("base_url = 'http://e:6009'\n{account}"), vec!["~engine.base_url"]),
            (format!("base_url = 'http://[::1]:6009'\n{account}"), vec![]),
            (format!("base_url = 'http://127.0.0.1:6009'\n{account}\nca_file = 'c'"), vec!["engine.ca_file"]),
            ("base_url = 'https://e'".into(), vec!["engine.password_file"]),
            ("base_url = 'https://e'\npassword_file = 'p'".into(), vec!["engine.username"]),
            ("base_url = 'https://e'\ntoken_file = 't'".into(), vec![]),
            (format!("{ENGINE}\ntoken_file = 't'"), vec!["engine.token_file"]),
            (format!("{ENGINE}\npin_sha256 = ['abc']"), vec!["engine.pin_sha256[0]"]),
            (format!("{ENGINE}\ndanger_accept_invalid_certs = true"), vec!["~engine.danger_accept_invalid_certs"]),
            (
                format!(
                    "{ENGINE}\npin_sha256 = ['k2oYXKqiZrucvpgengXLeM1zKwsygOuURBK7b4+PB68=']\ndanger_accept_invalid_certs = true"
                ),
                vec!["engine.danger_accept_invalid_certs"],
            ),
            (format!("{ENGINE}\ntimeout = '2s'"), vec!["engine.connect_timeout"]),
            (format!("{ENGINE}\ntimeout = '30s'"), vec!["engine.timeout"]),
            (format!("{ENGINE}\nproxy = 'http://u:p@p'"), vec!["engine.proxy"]),
        ] {
            assert_eq!(found(&engine, "", &[DETECTOR]), keys, "{engine}");
        }
    }

    #[test]
    fn sections() {
        for (more, keys) in [
            ("[publish]\nrate = -1", vec!["publish.rate"]),
            ("[publish]\nrate = nan", vec!["publish.rate"]),
            ("[publish]\nmax_in_flight = 0\nattempts = 0", vec!["publish.max_in_flight", "publish.attempts"]),
            ("[publish]\nbackoff_min = '1m'", vec!["publish.backoff_min"]),
            ("[encode]\nmemory = '15MiB'", vec!["encode.memory"]),
            ("[encode]\nmemory = 0\nmax_frame = 0", vec!["encode.memory", "encode.max_frame"]),
            (
                "[dead_letter]\ndirectory = 'dead'\nmax_size = 0\nmax_age = '0s'",
                vec!["dead_letter.directory", "dead_letter.max_size"],
            ),
            ("[admin]\ncontrol = 'x'", vec!["admin.control"]),
            ("[admin]\nlisten = '0.0.0.0:9464'", vec!["~admin.listen"]),
            ("[log]\nlevel = 'inof'", vec!["log.level"]),
            ("[log]\nlevel = 'info,framegate=loud'", vec!["log.level"]),
            ("[log]\nlevel = 'warn,framegate::publish=debug'", vec![]),
            ("[shutdown]\ndeadline = '0s'", vec!["engine.timeout", "shutdown.deadline"]),
        ] {
            assert_eq!(found(ENGINE, more, &[DETECTOR]), keys, "{more}");
        }
        assert_eq!(found(ENGINE, "", &[]), ["detectors"]);
    }

    #[test]
    fn names_and_zones() {
        let directory = "directory = { path = '/a' }";
        for (name, ok) in [
            ("", false),
            ("Front Door", true),
            ("{path.0}", true),
            ("{path.0}-{path.12}", true),
            ("{path.}", false),
            ("{topic.1}", false),
            ("{path.0", false),
            ("path.0}", false),
            ("{}", false),
            (&"x".repeat(256), false),
            ("a\\u0007b", false),
        ] {
            let keys = found(ENGINE, "", &[&format!("name = \"{name}\"\ntime_zone = 'UTC'\n{directory}")]);
            assert_eq!(keys, if ok { vec![] } else { vec!["detectors[0].name"] }, "{name}");
        }
        for zone in ["utc", "Mars", ""] {
            assert_eq!(
                found(ENGINE, "", &[&format!("name = 'A'\ntime_zone = '{zone}'\n{directory}")]),
                ["detectors[0].time_zone"]
            );
        }
    }

    #[test]
    fn drop_directories() {
        for (directory, keys) in [
            ("path = 'a'", vec!["path"]),
            ("path = '/a'\ninclude = []", vec!["include"]),
            ("path = '/a'\ninclude = ['*.jpg', '[']", vec!["include[1]"]),
            ("path = '/a'\nquiet = '60s'", vec!["quiet"]),
            ("path = '/a'\nrescan = '0s'", vec!["rescan"]),
            ("path = '/a'\nafter_publish = 'archive'", vec!["archive"]),
            ("path = '/a'\narchive = '/b'", vec!["archive"]),
            ("path = '/a'\nafter_publish = 'archive'\narchive = '/b'", vec![]),
            ("path = '/a'\nafter_publish = 'archive'\narchive = '/a/done'", vec!["archive"]),
            ("path = '/a/in'\nafter_publish = 'archive'\narchive = '/a'", vec!["path"]),
            ("path = '/var/lib/framegate'", vec!["path"]),
            (
                r"path = '/a'
detect_time = { name = '(?<time>\d{17})', format = '%Y%m%d%H%M%S%3f' }",
                vec![],
            ),
            (
                r"path = '/a'
detect_time = { name = '(?<time>\d+)', format = '%s' }",
                vec![],
            ),
            (
                r"path = '/a'
detect_time = { name = '(?<time>\d+', format = '%Y%m%d' }",
                vec!["detect_time.name", "detect_time.format"],
            ),
            (
                r"path = '/a'
detect_time = { name = '(?<when>\d+)', format = '%Q!%%%' }",
                vec!["detect_time.name", "detect_time.format"],
            ),
        ] {
            let detector = format!("name = 'A'\ntime_zone = 'UTC'\n[detectors.directory]\n{directory}");
            let keys: Vec<_> = keys.iter().map(|key| format!("detectors[0].directory.{key}")).collect();
            assert_eq!(found(ENGINE, "", &[&detector]), keys, "{directory}");
        }
    }

    #[test]
    fn detectors_among_each_other() {
        let of =
            |name: &str, directory: &str| format!("name = '{name}'\ntime_zone = 'UTC'\ndirectory = {{ {directory} }}");
        for (a, b, keys) in [
            (of("A", "path = '/a'"), of("B", "path = '/b'"), vec![]),
            (of("A", "path = '/a'"), of("A", "path = '/b'"), vec!["detectors[1].name"]),
            (of("{path.0}", "path = '/a'"), of("{path.0}", "path = '/b'"), vec![]),
            (of("A", "path = '/a'"), of("B", "path = '/a/../a/'"), vec!["detectors[1].directory.path"]),
            (of("A", "path = '/a'"), of("B", "path = '/a/b'"), vec!["detectors[1].directory.path"]),
            (of("A", "path = '/a/b'"), of("B", "path = '/a'"), vec!["detectors[0].directory.path"]),
            (of("A", "path = '/a', recursive = false"), of("B", "path = '/a/b'"), vec![]),
            (of("A", "path = '/a'"), of("B", "path = '/ab'"), vec![]),
        ] {
            assert_eq!(found(ENGINE, "", &[&a, &b]), keys, "{a}\n{b}");
        }
    }

    #[test]
    fn two_paths_to_one_directory_are_one() {
        let text = format!(
            "[engine]\n{ENGINE}\n[[detectors]]\n{DETECTOR}\n[[detectors]]\nname = 'B'\ntime_zone = 'UTC'\ndirectory = {{ path = '/link' }}"
        );
        let mut facts = Facts::default();
        facts.real.insert("/link".into(), "/a".into());
        let found = check(&toml::from_str(&text).unwrap(), &facts);
        assert_eq!(found.len(), 1, "{found:?}");
    }

    #[test]
    fn a_missing_secret_is_a_warning_and_an_open_one_a_problem() {
        let settings: Settings = toml::from_str(&format!("[engine]\n{ENGINE}\n[[detectors]]\n{DETECTOR}")).unwrap();
        for (state, severity) in [
            (SecretFile::Away("missing".into()), Severity::Warning),
            (SecretFile::Unfit("open".into()), Severity::Problem),
        ] {
            let facts = Facts { secrets: [(PathBuf::from("p"), state)].into(), ..Facts::default() };
            let found = check(&settings, &facts);
            assert_eq!(found.iter().map(|it| it.severity).collect::<Vec<_>>(), [severity]);
        }
    }
}
