//! What the values mean together: pure, on the merged settings and what is known of the file system.
//!
//! Messages name other keys in backticks; `config` uses that to leave out what only follows from another problem.

mod detector;
mod engine;
mod overlap;
mod push;
mod queue;

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use bytesize::ByteSize;
use humantime::format_duration;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use super::{Facts, Finding, Settings, Severity, layer};
use crate::source::Entry;

/// `encode.memory` is at least so many times `encode.max_frame`: an image and its body.
const FRAMES_IN_MEMORY_MIN: u64 = 2;
/// An image larger than this is a mistake, in bytes; the engine takes far less.
const FRAME_MAX: u64 = 1 << 30;
/// More memory than this is a mistake, in bytes.
const MEMORY_MAX: u64 = 1 << 40;
/// More encode threads than this are a mistake.
const WORKERS_MAX: usize = 1024;
/// More requests at once than this are a mistake: each is a connection.
const IN_FLIGHT_MAX: usize = 10_000;
/// A larger weight would leave the other detectors next to nothing.
const WEIGHT_MAX: u32 = 1000;
/// The longest wait for something that is under way; and in the words of the configuration.
const WAIT_MAX: (Duration, &str) = (Duration::from_hours(24), "1d");
/// The longest age of anything. Clocks reckon with durations, and overflow some way beyond.
const AGE_MAX: (Duration, &str) = (Duration::from_hours(24 * 3650), "3650d");

/// Everything that is wrong or worth a warning, in the order of the sections.
pub fn check(settings: &Settings, facts: &Facts) -> Vec<Finding> {
    let mut found = Findings(Vec::new());
    engine::check(settings, facts, &mut found);
    publish(settings, &mut found);
    encode(settings, &mut found);
    dead_letter(settings, &mut found);
    push::check(settings, facts, &mut found);
    admin(settings, &mut found);
    log(settings, &mut found);
    found.not_zero("shutdown.deadline", settings.shutdown.deadline, "20s");
    found.at_most("shutdown.deadline", settings.shutdown.deadline, WAIT_MAX);
    for (i, entry) in settings.detectors.iter().enumerate() {
        detector::check(&format!("detectors[{i}]"), entry, &mut found);
    }
    queue::check(settings, facts, &mut found);
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

    fn at_most(&mut self, key: &str, value: Duration, (max, shown): (Duration, &str)) {
        if value > max {
            self.problem(key, format!("is {}", format_duration(value)), format!("write at most {shown}"));
        }
    }

    fn no_more_than<T: Copy + PartialOrd + std::fmt::Display>(&mut self, key: &str, value: T, max: T) {
        if value > max {
            self.problem(key, format!("is {value}"), format!("write at most {max}"));
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

fn publish(settings: &Settings, found: &mut Findings) {
    let publish = &settings.publish;
    found.rate("publish.rate", publish.rate);
    found.not_zero("publish.max_in_flight", publish.max_in_flight, "64");
    found.no_more_than("publish.max_in_flight", publish.max_in_flight, IN_FLIGHT_MAX);
    found.not_zero("publish.attempts", publish.attempts, "8");
    found.not_zero("publish.backoff_min", publish.backoff_min, "200ms");
    found.at_most("publish.backoff_min", publish.backoff_min, WAIT_MAX);
    found.at_most("publish.backoff_max", publish.backoff_max, WAIT_MAX);
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
    found.no_more_than("encode.workers", encode.workers, WORKERS_MAX);
    found.no_more_than("encode.memory", encode.memory, ByteSize(MEMORY_MAX));
    found.no_more_than("encode.max_frame", encode.max_frame, ByteSize(FRAME_MAX));
    let least = encode.max_frame.as_u64().saturating_mul(FRAMES_IN_MEMORY_MIN);
    if encode.memory.as_u64() < least && encode.memory.as_u64() > 0 {
        let wrong =
            format!("{} is less than {FRAMES_IN_MEMORY_MIN} × {} of `max_frame`", encode.memory, encode.max_frame);
        found.problem("encode.memory", wrong, format!("write at least {}, or a smaller `max_frame`", ByteSize(least)));
    }
}

fn dead_letter(settings: &Settings, found: &mut Findings) {
    let dead_letter = &settings.dead_letter;
    found.absolute("dead_letter.directory", &dead_letter.directory);
    found.not_zero("dead_letter.max_size", dead_letter.max_size.as_u64(), "1GiB");
    found.at_most("dead_letter.max_age", dead_letter.max_age, AGE_MAX);
}

fn admin(settings: &Settings, found: &mut Findings) {
    let admin = &settings.admin;
    if !admin.listen.ip().to_canonical().is_loopback() {
        let wrong = format!(
            "`{}` can be read from the network, without a password: metrics, status, detector names",
            admin.listen
        );
        found.warning("admin.listen", wrong, "write 127.0.0.1, or let a firewall admit Prometheus only");
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

fn detectors_together(settings: &Settings, facts: &Facts, found: &mut Findings) {
    if settings.detectors.is_empty() {
        let right = "describe at least one with [[detectors]], here or in a file in conf.d";
        return found.problem("detectors", "there are none", right);
    }
    same_names(&settings.detectors, found);
    overlap::check(settings, facts, found);
}

fn same_names(detectors: &[Entry], found: &mut Findings) {
    let mut first: HashMap<&str, &Entry> = HashMap::new();
    // A name with placeholders stands for many: two directories may use the same form.
    for (i, entry) in detectors.iter().enumerate().filter(|(_, it)| !it.name.contains('{')) {
        match first.get(entry.name.as_str()) {
            Some(other) => {
                let wrong = format!("`{}` is also the name of the detector of {}", entry.name, other.place());
                found.problem(format!("detectors[{i}].name"), wrong, "give each its own name");
            }
            None => {
                first.insert(&entry.name, entry);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::config::SecretFile;

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
            ("path = '/a'\nrescan = '0s'\nquiet = '1ms'", vec!["quiet", "rescan"]),
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
