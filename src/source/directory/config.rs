//! `[detectors.directory]`: a drop directory's settings, and the placeholders of a detector's name.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::time::Duration;

use globset::{Glob, GlobBuilder, GlobSet, GlobSetBuilder};
use schemars::JsonSchema;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// One drop directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The drop directory: where the detector writes to. Must be set.
    pub path: PathBuf,
    /// Take files of its sub-directories too.
    pub recursive: bool,
    /// Names of the files to take: globs against the name alone, in upper or lower case.
    pub include: Vec<String>,
    /// A file that was not renamed into place is complete when nothing changed for this long and its image has its end.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub quiet: Duration,
    /// A file without its end that has not changed for this long becomes a dead letter, `truncated`.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub partial_timeout: Duration,
    /// The whole directory is looked through this often, whatever was noticed in between. Where that takes more than a
    /// twentieth of this time, less often.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub rescan: Duration,
    /// How new files are noticed.
    pub watch: Watch,
    /// Where the time of detection comes from.
    pub detect_time: DetectTime,
    /// What becomes of a published file.
    pub after_publish: AfterPublish,
    /// Where `after_publish = "archive"` puts the files; best on the file system of `path`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub archive: Option<PathBuf>,
    /// How long archived files are kept; 0: for ever.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub archive_max_age: Duration,
    /// Remove sub-directories that have been empty for a minute.
    pub remove_empty_directories: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            recursive: true,
            include: ["*.jpg", "*.jpeg", "*.png"].map(str::to_owned).into(),
            quiet: Duration::from_millis(500),
            partial_timeout: Duration::from_mins(1),
            rescan: Duration::from_secs(30),
            watch: Watch::Auto,
            detect_time: DetectTime::Modified,
            after_publish: AfterPublish::Delete,
            archive: None,
            archive_max_age: Duration::from_hours(30 * 24),
            remove_empty_directories: false,
        }
    }
}

/// How new files are noticed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Watch {
    /// inotify, or polling where that does not work.
    #[default]
    Auto,
    /// inotify even on file systems that are known not to report everything; polling only when watches run out.
    Inotify,
    /// A scan every second, or every `rescan` if that is shorter.
    Poll,
}

/// What becomes of a published file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AfterPublish {
    /// It is deleted.
    #[default]
    Delete,
    /// It is moved to `archive`.
    Archive,
}

/// Where the detection time comes from.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum DetectTime {
    /// The file's modification time.
    #[default]
    Modified,
    /// The moment Framegate noticed the file.
    Arrival,
    /// `DateTimeOriginal` in the image, else the modification time.
    Exif,
    /// The file's name, else the modification time.
    Name(FromName),
}

/// The time in the file's name, else `modified`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FromName {
    /// Regular expression with a group named `time`.
    pub name: String,
    /// Format of that group, as of strftime; without an offset it is in the detector's time zone.
    pub format: String,
}

impl Serialize for DetectTime {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            DetectTime::Modified => serializer.serialize_str("modified"),
            DetectTime::Arrival => serializer.serialize_str("arrival"),
            DetectTime::Exif => serializer.serialize_str("exif"),
            DetectTime::Name(from_name) => from_name.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for DetectTime {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // By hand: an untagged enum would lose the place and the reason of a mistake.
        struct Wire;
        impl<'de> Visitor<'de> for Wire {
            type Value = DetectTime;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(r#""modified", "arrival", "exif" or a table with `name` and `format`"#)
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<DetectTime, E> {
                match text {
                    "modified" => Ok(DetectTime::Modified),
                    "arrival" => Ok(DetectTime::Arrival),
                    "exif" => Ok(DetectTime::Exif),
                    other => Err(E::unknown_variant(other, &["modified", "arrival", "exif"])),
                }
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<DetectTime, A::Error> {
                FromName::deserialize(MapAccessDeserializer::new(map)).map(DetectTime::Name)
            }
        }
        deserializer.deserialize_any(Wire)
    }
}

impl JsonSchema for DetectTime {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "DetectTime".into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let from_name = generator.subschema_for::<FromName>();
        schemars::json_schema!({
            "description": "Where the detection time comes from.",
            "oneOf": [
                { "const": "modified", "type": "string", "description": "The file's modification time." },
                { "const": "arrival", "type": "string", "description": "The moment when Framegate noticed the file." },
                { "const": "exif", "type": "string", "description": "`DateTimeOriginal` in the image, else `modified`." },
                from_name,
            ],
        })
    }
}

impl Config {
    /// Which names are to be taken.
    pub(super) fn included(&self) -> anyhow::Result<Included> {
        let mut set = GlobSetBuilder::new();
        for text in &self.include {
            set.add(glob(text)?);
        }
        Ok(Included(set.build()?))
    }
}

/// One glob of `include`.
///
/// # Errors
/// It is none.
pub fn glob(text: &str) -> Result<Glob, globset::Error> {
    // Classes stay as they are: [A-z] would be another one in lower case, and [Z-a] none at all.
    let has_class = text.contains('[');
    GlobBuilder::new(&lower(text, has_class)).case_insensitive(has_class).build()
}

/// In lower case, but for ASCII letters where those are to stay. Each letter by itself: what stands beside it, as at the end of a
/// Greek word, is not the same in a glob and in a name.
fn lower(text: &str, but_ascii: bool) -> String {
    let mut lower = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii() {
            lower.push(if but_ascii { c } else { c.to_ascii_lowercase() });
        } else {
            lower.extend(c.to_lowercase());
        }
    }
    lower
}

/// The names that are taken. They are in lower case in here: then the usual globs are looked up by the name's ending, where one
/// that does not care would make a regular expression of 10 KB for each directory.
pub(super) struct Included(GlobSet);

impl Included {
    pub(super) fn has(&self, name: &[u8]) -> bool {
        let mut lower_name = Vec::with_capacity(name.len());
        for chunk in name.utf8_chunks() {
            lower_name.extend_from_slice(lower(chunk.valid(), false).as_bytes());
            lower_name.extend_from_slice(chunk.invalid());
        }
        self.0.is_match(OsStr::from_bytes(&lower_name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_in_upper_and_lower_case_whatever_bytes_they_have() {
        let globs = ["*.JPG", "face-[A-F]?.png", "ÉTÉ*", "ΦΑΣ*", "[A-z]{1,2}.bmp", "[Z-a].bmp"];
        let config = Config { include: globs.map(String::from).into(), ..Config::default() };
        let included = config.included().unwrap();
        for (name, expected) in [
            (&b"a.jpg"[..], true),
            (b"A.JpG", true),
            (b".jpg", true),
            (b"\xff\xfe.JPG", true),
            (b"a.jpg.tmp", false),
            (b"jpg", false),
            (b"FACE-b7.PNG", true),
            (b"face-g7.png", false),
            ("été.bmp".as_bytes(), true),
            ("\u{c9}t\u{c9}.bmp".as_bytes(), true),
            (b"\xc3\x89t\xc3\x89\xff.bmp", true),
            ("ΦΑΣΗ.bmp".as_bytes(), true),
            ("φασ".as_bytes(), true),
            (b"_1.BMP", true),
            (b"Q2.bmp", true),
            (b"01.bmp", false),
            (b"", false),
        ] {
            assert_eq!(included.has(name), expected, "{}", name.escape_ascii());
        }
    }

    #[test]
    fn a_configuration_reads_its_own_defaults_and_both_forms_of_detect_time() {
        let config: Config = toml::from_str("path = '/a'").unwrap();
        assert_eq!(config, Config { path: "/a".into(), ..Config::default() });
        assert_eq!(toml::from_str::<Config>(&toml::to_string(&config).unwrap()).unwrap(), config);
        let named: Config =
            toml::from_str(r"detect_time = { name = '(?<time>\d{17})', format = '%Y%m%d%H%M%S%3f' }").unwrap();
        assert!(matches!(named.detect_time, DetectTime::Name(_)));
        let exif: Config = toml::from_str("detect_time = 'exif'").unwrap();
        assert_eq!(exif.detect_time, DetectTime::Exif);
        for bad in ["detect_time = 'never'", "detect_time = { name = 'a', formt = 'b' }", "pth = '/a'"] {
            assert!(toml::from_str::<Config>(bad).is_err(), "{bad}");
        }
        assert!(schemars::schema_for!(Config).as_object().is_some());
    }
}
