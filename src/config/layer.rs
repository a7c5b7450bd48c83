//! One file (or environment variable) by itself: its text becomes a table of keys that are known and of the right type, with
//! the place where each stands, and a problem for everything else. Nothing about what the values mean together.

use std::collections::BTreeMap;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde_path_to_error::Segment;
use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

use super::{DETECTORS, Problem, Settings};
use crate::source;

/// A configuration file is at most this large, in bytes: a thousand detectors are a tenth of it.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// Keys at least so alike are suggested (0 to 1).
const LIKENESS_MIN: f64 = 0.7;
/// How much of a wrong value is shown, in characters.
const VALUE_CHARS_MAX: usize = 200;
/// The prefix of the environment variables that are ours.
pub(super) const ENVIRONMENT_PREFIX: &str = "FRAMEGATE_";

/// Said of a key that is not known; its value is never shown, for it may be a misplaced secret.
const UNKNOWN_KEY: &str = "unknown key";

/// How values are written, for hints: the keys' defaults where they have some.
const EXAMPLES: &str = r#"
[engine]
base_url = "https://10.0.0.123:5009"
username = "edge-07"
password_file = "engine-password"
token_file = "engine-token"
timeout = "10s"
connect_timeout = "3s"
http2 = false
proxy = "http://10.0.0.1:3128"
ca_file = "engine-ca.pem"
pin_sha256 = ["k2oYXKqiZrucvpgengXLeM1zKwsygOuURBK7b4+PB68="]
danger_accept_invalid_certs = false
[publish]
rate = 0
burst = 0
max_in_flight = 64
attempts = 8
backoff_min = "200ms"
backoff_max = "30s"
[encode]
workers = 0
memory = "256MiB"
max_frame = "8MiB"
[dead_letter]
directory = "/var/lib/framegate/dead-letter"
max_size = "1GiB"
max_age = "7d"
[spool]
directory = "/var/lib/framegate/spool"
max_size = "2GiB"
[push]
listen = "unix:/run/framegate/push.sock"
username = "cameras"
password_file = "push-password"
tls_cert_file = "push-cert.pem"
tls_key_file = "push-key.pem"
[admin]
listen = "127.0.0.1:9464"
control = "/run/framegate/control.sock"
[log]
level = "info"
format = "auto"
[shutdown]
deadline = "20s"
[[detectors]]
name = "FrontDoorCam"
time_zone = "America/Los_Angeles"
rate = 0
weight = 1
order = "freshest-first"
max_age = "0s"
silence_alarm = "10m"
[detectors.directory]
path = "/srv/cameras/front-door"
recursive = true
include = ["*.jpg", "*.jpeg", "*.png"]
quiet = "500ms"
partial_timeout = "60s"
rescan = "30s"
watch = "auto"
detect_time = "modified"
after_publish = "delete"
archive = "/srv/archive/front-door"
archive_max_age = "30d"
remove_empty_directories = false
"#;

/// What one file or environment variable says, as far as it is right.
#[derive(Debug)]
pub(super) struct Layer {
    /// Shown in front of every problem.
    pub file: String,
    /// Everything but the detectors.
    pub sections: Table,
    /// The detectors, with their place in the file's own list.
    pub detectors: Vec<(usize, source::Entry)>,
    /// Where each key stands.
    places: BTreeMap<String, (usize, usize)>,
}

impl Layer {
    /// Reads a file. Syntax errors end its reading; everything else is collected.
    pub(super) fn read(path: &Path, problems: &mut Vec<Problem>) -> Option<Self> {
        let file = path.display().to_string();
        let text = match read_text(path) {
            Ok(text) => text,
            Err((wrong, right)) => {
                problems.push(Problem { file, at: None, key: String::new(), wrong, right });
                return None;
            }
        };
        Self::parse(file, &text, problems)
    }

    /// Reads `NAME=value`; `None` where it is wrong. The value is taken as text, or as TOML where text does not fit the key.
    pub(super) fn variable(name: &str, value: &str, problems: &mut Vec<Problem>) -> Option<Self> {
        let file = format!("environment variable {name}");
        let key = name.strip_prefix(ENVIRONMENT_PREFIX)?.to_lowercase();
        let parts: Vec<&str> = key.split("__").collect();
        let [section, key] = parts[..] else {
            problems.push(Problem {
                file,
                at: None,
                key: String::new(),
                wrong: "not of the form FRAMEGATE_SECTION__KEY".into(),
                right:
                    "write for example FRAMEGATE_ENGINE__BASE_URL, or unset it; detectors are described in files only"
                        .into(),
            });
            return None;
        };
        let as_toml = toml::from_str::<Table>(&format!("value = {value}")).ok();
        let as_toml = as_toml.filter(|table| table.len() == 1).and_then(|mut table| table.remove("value"));
        let mut found = Vec::new();
        for value in std::iter::once(Value::String(value.to_owned())).chain(as_toml) {
            let layer =
                Self { file: file.clone(), sections: Table::new(), detectors: Vec::new(), places: BTreeMap::new() };
            let table =
                Table::from_iter([(section.to_owned(), Value::Table(Table::from_iter([(key.to_owned(), value)])))]);
            let mut wrong = Vec::new();
            let layer = layer.fill(table, &mut wrong);
            if wrong.is_empty() {
                return Some(layer);
            }
            if found.is_empty() {
                found = wrong;
            }
        }
        problems.append(&mut found);
        None
    }

    /// Where `key` stands in this file, or the nearest thing around it that does.
    pub(super) fn place(&self, key: &str) -> Option<(usize, usize)> {
        prefixes(key).find_map(|prefix| self.places.get(prefix).copied())
    }

    /// Whether this file says anything about exactly this key.
    pub(super) fn says(&self, key: &str) -> bool {
        let mut parts = key.split('.').map(|part| part.split('[').next().unwrap_or(part));
        let first = parts.next().and_then(|part| self.sections.get(part));
        parts.try_fold(first, |value, part| value?.get(part).map(Some)).flatten().is_some()
    }

    fn parse(file: String, text: &str, problems: &mut Vec<Problem>) -> Option<Self> {
        let (document, errors) = DeTable::parse_recoverable(text);
        for error in &errors {
            problems.push(Problem {
                file: file.clone(),
                at: error.span().map(|span| line_and_column(text, span.start)),
                key: String::new(),
                wrong: format!("not TOML: {}", error.message().replace('\n', ", ")),
                right: if error.message().contains("duplicate") {
                    "keep one of them".into()
                } else {
                    "text is written \"in quotes\", a table [section], a list [\"a\", \"b\"]".into()
                },
            });
        }
        if !errors.is_empty() {
            return None;
        }
        let mut places = BTreeMap::new();
        note_table(text, "", document.get_ref(), &mut places);
        // It parsed, so only numbers that fit no type can fail here.
        let table = match toml::from_str::<Table>(text) {
            Ok(table) => table,
            Err(error) => {
                let at = error.span().map(|span| line_and_column(text, span.start));
                let (wrong, right) = (error.message().to_owned(), "write a smaller number".to_owned());
                problems.push(Problem { file, at, key: String::new(), wrong, right });
                return None;
            }
        };
        let layer = Self { file, sections: Table::new(), detectors: Vec::new(), places };
        Some(layer.fill(table, problems))
    }

    fn fill(mut self, mut table: Table, problems: &mut Vec<Problem>) -> Self {
        match table.remove(DETECTORS) {
            None => {}
            Some(Value::Array(entries)) => {
                for (i, mut entry) in entries.into_iter().enumerate() {
                    self.one_source(i, &mut entry, problems);
                    let entry = self.sift::<source::Entry>(&format!("{DETECTORS}[{i}]"), entry, problems).1;
                    self.detectors.extend(entry.map(|entry| (i, entry)));
                }
            }
            Some(_) => problems.push(self.problem(
                DETECTORS.to_owned(),
                "not a list of tables".into(),
                "head every detector with [[detectors]]".into(),
            )),
        }
        if let Value::Table(sections) = self.sift::<Settings>("", Value::Table(table), problems).0 {
            self.sections = sections;
        }
        self
    }

    /// An entry has one source: a second one, or none, is reported and mended.
    fn one_source(&self, i: usize, entry: &mut Value, problems: &mut Vec<Problem>) {
        let Value::Table(table) = entry else { return };
        let named: Vec<_> = source::SOURCE_KEYS.into_iter().filter(|key| table.contains_key(*key)).collect();
        let key = |rest: &str| format!("{DETECTORS}[{i}]{rest}");
        match named[..] {
            [] => {
                problems.push(self.problem(
                    key(""),
                    "has no source of frames".into(),
                    format!("write one of {}", source::SOURCE_KEYS.join(", ")),
                ));
                // Stands in for it, so that what else is wrong with the entry is told at once.
                table.insert("push".into(), Value::Table(Table::new()));
            }
            [first, ref others @ ..] => {
                for other in others {
                    let wrong = format!("a second source: the entry has `{first}` already");
                    problems.push(self.problem(key(&format!(".{other}")), wrong, "write an entry for each".into()));
                    table.remove(*other);
                }
            }
        }
    }

    /// Takes out of `value` what does not fit `T`, one problem each, until the rest fits. Gives back the rest and the `T`.
    fn sift<T: DeserializeOwned>(
        &self,
        prefix: &str,
        mut value: Value,
        problems: &mut Vec<Problem>,
    ) -> (Value, Option<T>) {
        loop {
            let error = match serde_path_to_error::deserialize::<_, T>(value.clone()) {
                Ok(it) => return (value, Some(it)),
                Err(error) => error,
            };
            let segments: Vec<Segment> = error.path().iter().cloned().collect();
            let mut problem = self.explain(prefix, &segments, error.inner().message());
            // Not every type's message shows what it was given.
            let shown = |given: &str| problem.wrong.contains(given) || problem.wrong.contains(&format!("{given:?}"));
            let given = text_at(&value, &segments).filter(|it| !shown(it));
            if let Some(given) = given.filter(|_| problem.wrong != UNKNOWN_KEY && !is_secret(&problem.key)) {
                problem.wrong = bounded(&format!("`{given}`: {}", problem.wrong));
            }
            problems.push(problem);
            if !remove(&mut value, &segments) {
                return (value, None);
            }
        }
    }

    fn problem(&self, key: String, wrong: String, right: String) -> Problem {
        Problem { file: self.file.clone(), at: self.place(&key), key, wrong, right }
    }

    fn explain(&self, prefix: &str, segments: &[Segment], message: &str) -> Problem {
        let key = key_path(prefix, segments);
        let last = key.rsplit('.').next().unwrap_or_default();
        if let Some(rest) = message.strip_prefix("missing field ") {
            let field = rest.split('`').nth(1).unwrap_or(rest);
            let path = join(&key, field);
            let at = self.place(&path);
            let right = format!("write {field} = {}", example(&path).unwrap_or_else(|| "…".into()));
            return Problem { file: self.file.clone(), at, key: path, wrong: "missing".into(), right };
        }
        if message.starts_with("unknown field") {
            let known = quoted(message.split_once("expected").map_or("", |(_, known)| known));
            let right = match nearest(last, &known) {
                Some(name) => format!("did you mean `{name}`?"),
                None if known.is_empty() => "remove it".to_owned(),
                None => format!("known here: {}", known.join(", ")),
            };
            return self.problem(key.clone(), UNKNOWN_KEY.into(), right);
        }
        let wrong =
            if is_secret(&key) { "wrong type of value (not shown)".to_owned() } else { bounded(&in_words(message)) };
        let right = match example(&key) {
            Some(value) => format!("write it like {last} = {value}"),
            None => String::new(),
        };
        self.problem(key.clone(), wrong, right)
    }
}

fn read_text(path: &Path) -> Result<String, (String, String)> {
    let meta = std::fs::metadata(path)
        .map_err(|error| (format!("cannot be read: {error}"), "create it, or name another with --config".to_owned()))?;
    if !meta.is_file() || meta.len() > FILE_BYTES_MAX {
        let right = format!("a configuration is a regular file of at most {} MiB", FILE_BYTES_MAX >> 20);
        return Err((format!("not a configuration file ({} bytes)", meta.len()), right));
    }
    let bytes = std::fs::read(path).map_err(|error| {
        (format!("cannot be read: {error}"), "make it readable for the user framegate runs as".to_owned())
    })?;
    String::from_utf8(bytes).map_err(|_| ("not UTF-8 text".to_owned(), "save it as UTF-8".to_owned()))
}

/// Whether somebody may have put a secret itself here.
fn is_secret(key: &str) -> bool {
    let last = key.rsplit('.').next().unwrap_or(key);
    ["password", "token", "secret"].iter().any(|it| last.contains(it))
}

/// The text that `path` leads to.
fn text_at<'a>(value: &'a Value, path: &[Segment]) -> Option<&'a str> {
    let step = |value: &'a Value, segment: &Segment| match segment {
        Segment::Map { key } => value.get(key),
        Segment::Seq { index } => value.get(index),
        Segment::Enum { .. } | Segment::Unknown => Some(value),
    };
    path.iter().try_fold(value, step)?.as_str()
}

/// Removes what `path` leads to, or the nearest thing around it that is there. `false` if that is the whole.
fn remove(value: &mut Value, path: &[Segment]) -> bool {
    let Some((first, rest)) = path.split_first() else { return false };
    match (first, value) {
        (Segment::Map { key }, Value::Table(table)) => {
            let inner = table.get_mut(key).is_some_and(|inner| remove(inner, rest));
            inner || table.remove(key).is_some()
        }
        // A list with one wrong element is wrong as a whole: its other elements would change their places.
        (Segment::Map { .. } | Segment::Seq { .. } | Segment::Enum { .. } | Segment::Unknown, _) => false,
    }
}

fn key_path(prefix: &str, segments: &[Segment]) -> String {
    segments.iter().fold(prefix.to_owned(), |path, segment| match segment {
        Segment::Map { key } => join(&path, key),
        Segment::Seq { index } => format!("{path}[{index}]"),
        Segment::Enum { .. } | Segment::Unknown => path,
    })
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// `a.b[1].c`, `a.b[1]`, `a.b`, `a`.
fn prefixes(key: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(key), |key| key.rfind(['.', '[']).map(|end| &key[..end])).filter(|key| !key.is_empty())
}

fn note_table(text: &str, prefix: &str, table: &DeTable<'_>, places: &mut BTreeMap<String, (usize, usize)>) {
    for (key, value) in table {
        let path = join(prefix, key.get_ref());
        places.insert(path.clone(), line_and_column(text, key.span().start));
        note_value(text, &path, value, places);
    }
}

fn note_value(text: &str, path: &str, value: &Spanned<DeValue<'_>>, places: &mut BTreeMap<String, (usize, usize)>) {
    match value.get_ref() {
        DeValue::Table(table) => note_table(text, path, table, places),
        DeValue::Array(array) => {
            for (i, element) in array.iter().enumerate() {
                let path = format!("{path}[{i}]");
                places.insert(path.clone(), line_and_column(text, element.span().start));
                note_value(text, &path, element, places);
            }
        }
        DeValue::String(_) | DeValue::Integer(_) | DeValue::Float(_) | DeValue::Boolean(_) | DeValue::Datetime(_) => {}
    }
}

fn line_and_column(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |end| end + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

/// How a value of this key is written.
fn example(key: &str) -> Option<String> {
    static PARSED: std::sync::LazyLock<Table> = std::sync::LazyLock::new(|| EXAMPLES.parse().unwrap_or_default());
    let mut value: Option<&Value> = None;
    for part in key.split('.') {
        let name = part.split('[').next().unwrap_or(part);
        let found = value.map_or_else(|| PARSED.get(name), |value| value.get(name))?;
        // Of lists only the detectors are looked into: a pin's example is the list of pins.
        value = Some(if name == DETECTORS { found.get(0)? } else { found });
    }
    value.filter(|value| !value.is_table()).map(Value::to_string)
}

fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// The name that `wrong` was probably meant to be.
pub(super) fn nearest<'a>(wrong: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|name| (strsim::jaro_winkler(wrong, name), *name))
        .filter(|(likeness, _)| *likeness >= LIKENESS_MIN)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, name)| name)
}

/// serde's message without the names of our types.
fn in_words(message: &str) -> String {
    let mut message = message.replace('\n', " ");
    for (theirs, ours) in [
        ("expected f64", "expected a number"),
        ("expected usize", "expected a whole number"),
        ("expected u64", "expected a whole number"),
        ("expected u32", "expected a whole number"),
        ("expected parsable string", "expected a size"),
        ("unit variant, expected string only", "expected a word in quotes"),
    ] {
        message = message.replace(theirs, ours);
    }
    message
}

fn bounded(text: &str) -> String {
    if text.chars().count() <= VALUE_CHARS_MAX {
        text.to_owned()
    } else {
        text.chars().take(VALUE_CHARS_MAX).chain(['…']).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> (Option<Layer>, Vec<String>) {
        let mut problems = Vec::new();
        let layer = Layer::parse("f".into(), text, &mut problems);
        (layer, problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn every_problem_of_a_file_is_found_at_its_place() {
        let (layer, problems) = parse(
            "[publish]\nrate = \"fast\"\nbrust = 1\nattempts = 3\n[engine]\npassword = \"hunter2\"\n[[detectors]]\nname = 1\ntime_zone = \"UTC\"\ndirectory = { path = \"/a\" }\n[encode]\nmemory = \"much\"\n",
        );
        assert_eq!(problems.len(), 5, "{problems:#?}");
        for (key, place) in [
            ("publish.rate", "f:2:1: "),
            ("publish.brust", "f:3:1: "),
            ("engine.password", "f:6:1: "),
            ("detectors[0].name", "f:8:1: "),
            ("encode.memory", "f:12:1: "),
        ] {
            assert!(problems.iter().any(|it| it.starts_with(&format!("{place}{key}"))), "{key}: {problems:#?}");
        }
        assert!(!problems.concat().contains("hunter2"), "{problems:#?}");
        let layer = layer.unwrap();
        assert!(layer.says("publish.attempts") && !layer.says("publish.rate"));
    }

    #[test]
    fn a_variable_is_text_or_else_toml() {
        let mut problems = Vec::new();
        for (name, value, key) in [
            ("FRAMEGATE_ENGINE__BASE_URL", "https://e", "engine.base_url"),
            ("FRAMEGATE_ENGINE__USERNAME", "1234", "engine.username"),
            ("FRAMEGATE_ENGINE__HTTP2", "true", "engine.http2"),
            ("FRAMEGATE_ENGINE__PIN_SHA256", "[\"a\"]", "engine.pin_sha256"),
            ("FRAMEGATE_PUBLISH__RATE", "2.5", "publish.rate"),
            ("FRAMEGATE_SHUTDOWN__DEADLINE", "5s", "shutdown.deadline"),
        ] {
            let layer = Layer::variable(name, value, &mut problems);
            assert!(layer.is_some_and(|it| it.says(key)), "{name}: {problems:#?}");
        }
        for (name, value) in [
            ("FRAMEGATE_ENGINE__PASSWORD", "hunter2"),
            ("FRAMEGATE_PUBLISH__RATE", "1\n[log]\nlevel = \"x\""),
            ("FRAMEGATE_DETECTORS__NAME", "x"),
            ("FRAMEGATE_BASE_URL", "x"),
            ("FRAMEGATE_A__B__C", "x"),
        ] {
            assert!(Layer::variable(name, value, &mut problems).is_none(), "{name}");
        }
        assert_eq!(problems.len(), 5);
        assert!(problems.iter().all(|it| !it.to_string().contains("hunter2")));
    }

    #[test]
    fn lines_and_columns_count_from_one_and_in_characters() {
        assert_eq!(line_and_column("ä = 1\nü = 2", 0), (1, 1));
        assert_eq!(line_and_column("ä = 1\nü = 2", 7), (2, 1));
        assert_eq!(line_and_column("ä = 1", 5), (1, 5));
    }

    #[test]
    fn the_examples_are_themselves_right() {
        let (layer, problems) = parse(EXAMPLES);
        assert_eq!((problems, layer.unwrap().detectors.len()), (Vec::new(), 1));
    }
}
