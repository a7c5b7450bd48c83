//! Sources: where a detector's frames come from, and what is settled there. One `[[detectors]]` entry is one source.
//!
//! Not here: what happens to a frame between its claim and its settlement.

pub mod directory;
mod inbox;
mod lanes;
mod message;
pub mod mqtt;
mod name;
pub mod nats;
pub mod push;
mod reconnect;
pub mod redis;
pub mod retry;
pub mod spool;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

pub use self::mqtt::Sessions;
pub use self::name::{Placeholders, Template};
use crate::metrics::Metrics;
use crate::queue::Intake;

/// Open files that an entry keeps: its directory, the hidden one, its lock, its claims; and one more while it scans.
pub const OPEN_FILES_PER_ENTRY: u64 = 5;

/// One `[[detectors]]` entry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "Written", into = "Written")]
#[schemars(with = "Written")]
pub struct Entry {
    /// The engine's `detectorName`, perhaps with placeholders.
    pub name: String,
    /// IANA time zone of the detector.
    pub time_zone: String,
    /// Attempts per second; 0 means no limit.
    pub rate: f64,
    /// Turns against the other detectors; at least 1.
    pub weight: u32,
    /// Which waiting frame goes first.
    pub order: Order,
    /// Frames older than this are dropped, and counted; 0 means never.
    pub max_age: Duration,
    /// Say so when no frame came for this long.
    pub silence_alarm: Option<Duration>,
    /// Where its frames come from.
    pub source: Config,
}

/// Where an entry's frames come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Config {
    /// Files in a drop directory.
    Directory(directory::Config),
    /// Frames that others push over HTTP.
    Push(push::Config),
    /// A Redis stream, read as one of a consumer group.
    Redis(redis::Config),
    /// A NATS `JetStream` consumer.
    Nats(nats::Config),
    /// An MQTT subscription.
    Mqtt(mqtt::Config),
}

impl Config {
    /// The key that stands for it in an entry: one of [`SOURCE_KEYS`].
    pub fn key(&self) -> &'static str {
        match self {
            Config::Directory(_) => "directory",
            Config::Push(_) => "push",
            Config::Redis(_) => "redis",
            Config::Nats(_) => "nats",
            Config::Mqtt(_) => "mqtt",
        }
    }

    /// What a detector's name may hold with this source.
    pub fn placeholders(&self) -> Placeholders {
        match self {
            Config::Directory(_) => Placeholders {
                levels: Some("path"),
                fields: &[],
                hint: "a directory's detector knows {path.0}, {path.1} and so on: the directories below its path",
            },
            Config::Push(_) => Placeholders {
                levels: None,
                fields: &["detectorName"],
                hint: "a pushed frame's detector knows {detectorName}: what the frame names",
            },
            Config::Redis(_) => Placeholders {
                levels: None,
                fields: &["field.detectorName"],
                hint: "a stream's detector knows {field.detectorName}: the entry's own field",
            },
            Config::Nats(_) => Placeholders {
                levels: Some("subject"),
                fields: &["field.detectorName"],
                hint: "a subject's detector knows {subject.0}, {subject.1} and so on: the subject's parts; and {field.detectorName}",
            },
            Config::Mqtt(_) => Placeholders {
                levels: Some("topic"),
                fields: &["field.detectorName"],
                hint: "a topic's detector knows {topic.0}, {topic.1} and so on: the topic's levels; and {field.detectorName}",
            },
        }
    }
}

/// What is wrong with an entry's source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The key below the source's own.
    pub key: &'static str,
    /// What is wrong, without secrets.
    pub wrong: String,
    /// What would be right.
    pub right: String,
}

impl Fault {
    fn new(key: &'static str, wrong: impl Into<String>, right: impl Into<String>) -> Self {
        Self { key, wrong: wrong.into(), right: right.into() }
    }
}

impl Config {
    /// What is wrong with a queue's keys.
    pub fn faults(&self) -> Vec<Fault> {
        match self {
            Config::Directory(_) | Config::Push(_) => Vec::new(),
            Config::Redis(config) => config.faults(),
            Config::Nats(config) => config.faults(),
            Config::Mqtt(config) => config.faults(),
        }
    }

    /// The files that a queue's keys name: the key, the file, and whether it is a secret.
    pub fn files(&self) -> Vec<(&'static str, &Path, bool)> {
        let files: Vec<(&'static str, &Option<PathBuf>, bool)> = match self {
            Config::Directory(_) | Config::Push(_) => Vec::new(),
            Config::Redis(redis::Config { password_file, ca_file, .. })
            | Config::Mqtt(mqtt::Config { password_file, ca_file, .. }) => {
                vec![("password_file", password_file, true), ("ca_file", ca_file, false)]
            }
            Config::Nats(it) => vec![
                ("password_file", &it.password_file, true),
                ("token_file", &it.token_file, true),
                ("credentials_file", &it.credentials_file, true),
                ("ca_file", &it.ca_file, false),
            ],
        };
        files.into_iter().filter_map(|(key, file, secret)| Some((key, file.as_deref()?, secret))).collect()
    }

    /// What it would connect to, for people, one line each; none where [`Entry::place`] says it all.
    pub fn describe(&self) -> Vec<String> {
        match self {
            Config::Directory(_) => Vec::new(),
            Config::Push(_) => vec!["frames that are pushed to where [push] listens".into()],
            Config::Redis(config) => config.describe(),
            Config::Nats(config) => config.describe(),
            Config::Mqtt(config) => config.describe(),
        }
    }

    /// Connects to where frames come from, takes and makes nothing, and says what there is, or what stands in the way;
    /// `None`: there is nothing to connect to.
    pub async fn reach(&self, files: &Files<'_>) -> Option<anyhow::Result<String>> {
        match self {
            Config::Directory(_) | Config::Push(_) => None,
            Config::Redis(config) => Some(redis::reach(config, files).await),
            Config::Nats(config) => Some(nats::reach(config, files).await),
            Config::Mqtt(config) => Some(mqtt::reach(config, files).await),
        }
    }

    /// What two entries may not share, and what would come of it.
    pub fn shared(&self) -> Option<(String, Fault)> {
        let messages = || {
            let wrong = "reads the same messages as another entry: each goes to one of the two, by chance";
            Fault::new("", wrong, "keep one entry; its name may hold placeholders")
        };
        match self {
            Config::Directory(_) | Config::Push(_) => None,
            Config::Redis(it) => Some((format!("{} {} {}", it.url, it.stream, it.group), messages())),
            Config::Nats(it) => Some((format!("{} {} {}", it.url, it.stream, it.consumer), messages())),
            Config::Mqtt(it) => {
                let wrong = "has the client_id of another entry: the broker lets only one of the two in at a time";
                let fault = Fault::new("client_id", wrong, "give each entry a client_id of its own");
                Some((format!("{} {}", it.url, it.client_id()), fault))
            }
        }
    }
}

/// Where secret and CA files are now.
pub type Files<'a> = dyn Fn(&Path) -> PathBuf + Send + Sync + 'a;

/// What a source of messages works with.
pub struct Surroundings {
    /// Its entry.
    pub entry: Arc<Entry>,
    /// Where it registers its lines.
    pub intake: Intake,
    /// Where it counts.
    pub metrics: Arc<Metrics>,
    /// Larger images become dead letters, bytes.
    pub max_frame: u64,
    /// Where it says how it is.
    pub health: Health,
    /// What drop directories share.
    pub directories: directory::Shared,
    /// Who has which session at a broker.
    pub sessions: Sessions,
    /// Where frames wait that are acknowledged before they are published; there if an entry needs it.
    pub spool: Option<Arc<spool::Spool>>,
    /// The push server; there if `[push]` says where to listen.
    pub push: Option<Arc<push::Door>>,
    /// Where its secret and CA files are now; asked again at each connection, since files may change.
    pub files: Arc<Files<'static>>,
    /// Cancelled: take nothing more, settle what is in hand, give the rest back, and return.
    pub stop: CancellationToken,
}

impl Entry {
    /// Where its frames come from, for people: a directory's path, a queue's address without secrets.
    pub fn place(&self) -> String {
        match &self.source {
            Config::Directory(config) => config.path.display().to_string(),
            Config::Push(config) => config.place(),
            Config::Redis(config) => config.place(),
            Config::Nats(config) => config.place(),
            Config::Mqtt(config) => config.place(),
        }
    }

    /// The drop directory, if that is where the frames come from.
    pub fn directory(&self) -> Option<&directory::Config> {
        match &self.source {
            Config::Directory(config) => Some(config),
            Config::Push(_) | Config::Redis(_) | Config::Nats(_) | Config::Mqtt(_) => None,
        }
    }
}

/// The keys of an entry that name its source: exactly one of them is written.
pub const SOURCE_KEYS: [&str; 5] = ["directory", "push", "redis", "nats", "mqtt"];

/// An [`Entry`] as it stands in a file.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(rename = "Entry")]
struct Written {
    /// The engine's `detectorName`. Must be set. May hold placeholders: `{path.0}`, the first directory below `path`; `{subject.1}`,
    /// a part of a NATS subject; `{topic.1}`, a level of an MQTT topic; `{field.detectorName}` of a Redis stream's, NATS or
    /// MQTT message; `{detectorName}` of a pushed frame.
    name: String,
    /// The detector's IANA time zone, letter for letter, as `America/Los_Angeles`. Must be set.
    time_zone: String,
    /// Attempts per second for this detector; 0: no limit but that of `[publish]`.
    rate: f64,
    /// Turns that it gets for one of a detector with weight 1; at least 1.
    weight: u32,
    /// Which waiting frame goes first.
    order: Order,
    /// Frames older than this are dropped and counted; 0: none is ever too old.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    max_age: Duration,
    /// Say so (log, metrics, status) when no frame came for this long. Without it, silence is no trouble.
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    silence_alarm: Option<Duration>,
    /// A drop directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    directory: Option<directory::Config>,
    /// Frames that others push to where `[push]` listens; written `push = {}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    push: Option<push::Config>,
    /// A Redis stream, read as one of a consumer group.
    #[serde(skip_serializing_if = "Option::is_none")]
    redis: Option<redis::Config>,
    /// A NATS `JetStream` consumer.
    #[serde(skip_serializing_if = "Option::is_none")]
    nats: Option<nats::Config>,
    /// An MQTT subscription.
    #[serde(skip_serializing_if = "Option::is_none")]
    mqtt: Option<mqtt::Config>,
}

impl Default for Written {
    fn default() -> Self {
        Self {
            name: String::new(),
            time_zone: String::new(),
            rate: 0.0,
            weight: 1,
            order: Order::FreshestFirst,
            max_age: Duration::ZERO,
            silence_alarm: None,
            directory: None,
            push: None,
            redis: None,
            nats: None,
            mqtt: None,
        }
    }
}

impl Entry {
    /// Of these, the one that a detector of this name belongs to: by its whole name, else by what stands around placeholders.
    pub fn of<'a>(detector: &str, entries: &'a [Entry]) -> Option<&'a Entry> {
        of_name(detector, entries, |entry| &entry.name)
    }
}

/// [`Entry::of`], for whatever has an entry's name.
pub fn of_name<'a, T>(detector: &str, all: &'a [T], name: impl Fn(&T) -> &str) -> Option<&'a T> {
    let family = |it: &&T| {
        let name = name(it);
        let (Some(open), Some(close)) = (name.find('{'), name.rfind('}')) else { return false };
        let rest = detector.strip_prefix(&name[..open]);
        rest.is_some_and(|rest| !rest.is_empty() && rest.ends_with(&name[close + 1..]))
    };
    all.iter().find(|it| name(it) == detector).or_else(|| all.iter().find(family))
}

impl TryFrom<Written> for Entry {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        let Written {
            name,
            time_zone,
            rate,
            weight,
            order,
            max_age,
            silence_alarm,
            directory,
            push,
            redis,
            nats,
            mqtt,
        } = written;
        let sources = [
            directory.map(Config::Directory),
            push.map(Config::Push),
            redis.map(Config::Redis),
            nats.map(Config::Nats),
            mqtt.map(Config::Mqtt),
        ];
        let mut sources = sources.into_iter().flatten();
        let (Some(source), None) = (sources.next(), sources.next()) else {
            return Err(format!("has not exactly one source of {}", SOURCE_KEYS.join(", ")));
        };
        Ok(Self { name, time_zone, rate, weight, order, max_age, silence_alarm, source })
    }
}

impl From<Entry> for Written {
    fn from(entry: Entry) -> Self {
        let Entry { name, time_zone, rate, weight, order, max_age, silence_alarm, source } = entry;
        let written = Self { name, time_zone, rate, weight, order, max_age, silence_alarm, ..Self::default() };
        match source {
            Config::Directory(config) => Self { directory: Some(config), ..written },
            Config::Push(config) => Self { push: Some(config), ..written },
            Config::Redis(config) => Self { redis: Some(config), ..written },
            Config::Nats(config) => Self { nats: Some(config), ..written },
            Config::Mqtt(config) => Self { mqtt: Some(config), ..written },
        }
    }
}

/// Serves one entry until it is stopped; returns when what it had in hand is settled and the rest given back.
pub async fn serve(around: Surroundings) {
    match around.entry.source.clone() {
        Config::Directory(config) => directory::run(config, around).await,
        Config::Push(_) => push::run(around).await,
        Config::Redis(config) => redis::run(config, around).await,
        Config::Nats(config) => nats::run(config, around).await,
        Config::Mqtt(config) => mqtt::run(config, around).await,
    }
}

/// 2000-01-01T00:00:00Z, in seconds: no detector is older.
const EARLIEST_SECONDS: i64 = 946_684_800;
/// A detector's clock may be this far ahead of ours.
const AHEAD_MAX: Duration = Duration::from_mins(5);

/// Whether a frame can have been detected then.
fn believable(detect_time: Timestamp, now: Timestamp) -> bool {
    detect_time.as_second() >= EARLIEST_SECONDS && detect_time <= now + AHEAD_MAX
}

/// When a frame was detected by what it says itself, unless that is absurd, which is counted.
fn believed(said: Option<Timestamp>, now: Timestamp, metrics: &Metrics) -> Option<Timestamp> {
    let believed = said.filter(|time| believable(*time, now));
    if said.is_some() && believed.is_none() {
        metrics.counter("detect_times_corrected_total", &[]).increment(1);
    }
    believed
}

/// Which waiting frame of a detector goes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// The newest frame goes before the backlog; the backlog keeps one turn in four and is drained newest to oldest.
    #[default]
    FreshestFirst,
    /// Strictly by time.
    OldestFirst,
}

/// Whether a source can deliver. Cheap to clone; all clones show the same.
#[derive(Clone, Debug, Default)]
pub struct Health(Arc<Mutex<State>>);

/// What [`Health`] says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// It has not looked yet.
    #[default]
    Starting,
    /// It delivers.
    Ok,
    /// It cannot deliver, and why; it recovers by itself.
    Held(String),
}

impl Health {
    /// What it says now.
    pub fn get(&self) -> State {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Why it cannot deliver; `None` while it can, and before it has looked.
    pub fn held(&self) -> Option<String> {
        match self.get() {
            State::Held(why) => Some(why),
            State::Starting | State::Ok => None,
        }
    }

    /// Says something else from now on; `true` if that is news.
    pub fn set(&self, state: State) -> bool {
        let mut now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let news = *now != state;
        *now = state;
        news
    }
}

#[cfg(test)]
impl Entry {
    /// One that says no more than it must.
    pub(crate) fn of_directory(name: &str, config: directory::Config) -> Self {
        let written =
            Written { name: name.to_owned(), time_zone: "UTC".into(), directory: Some(config), ..Written::default() };
        written.try_into().expect("one source")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_detector_belongs_to_the_entry_of_its_name_else_to_the_family_that_it_fits() {
        let entries =
            ["{path.0}-in", "Lobby-in", "Door"].map(|name| Entry::of_directory(name, directory::Config::default()));
        let of = |detector| Entry::of(detector, &entries).map(|entry| entry.name.as_str());
        assert_eq!(of("Lobby-in"), Some("Lobby-in"));
        assert_eq!(of("Yard-in"), Some("{path.0}-in"));
        assert_eq!(of("Door"), Some("Door"));
        assert_eq!(of("Yard"), None);
        assert_eq!(of(""), None);
    }
}
