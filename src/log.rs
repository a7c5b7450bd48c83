//! The log: one line for each event on standard error, for a terminal, for journald or as JSON.
//!
//! journalctl shows only an event's message, so the facts are written into it; its priority goes before it as `<N>`, which
//! journald takes off. Whatever a file name, a broker or the engine put into a fact, it stays on its line: control
//! characters are escaped. An event that cannot be written, because the disk is full or nobody reads, is lost, and nothing
//! else is.

use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tracing::field::Field;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::field::MakeExt as _;
use tracing_subscriber::fmt::format::{self, FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormattedFields, MakeWriter};
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, reload};

/// Kinds of repeated errors that [`Repeats`] tells apart.
const KEYS_MAX: usize = 256;
/// What further kinds are counted under.
const OTHERS: &str = "(others)";
/// Bytes that a pipe which has room at all takes without waiting (`PIPE_BUF`).
const ROOM: usize = 4096;

/// `[log]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// error, warn, info, debug, trace or off; or a filter such as `info,framegate::publish=debug`.
    pub level: String,
    /// How a line looks. Changes with a restart only.
    pub format: Format,
}

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Text, with colours on a terminal and with priorities for journald.
    Auto,
    /// Text.
    Text,
    /// One JSON object on each line.
    Json,
}

impl Default for Config {
    fn default() -> Self {
        Self { level: "info".into(), format: Format::Auto }
    }
}

impl Config {
    /// Whether the level can be used; the error says what would be right.
    pub fn check(&self) -> anyhow::Result<()> {
        filter(&self.level).map(drop)
    }
}

/// Changes the log of the running process.
#[derive(Clone, Debug)]
pub struct Handle {
    filter: reload::Handle<EnvFilter, Registry>,
}

impl Handle {
    /// A new level, from a reload. The format stays until the next start.
    pub fn set_level(&self, level: &str) -> anyhow::Result<()> {
        self.filter.reload(filter(level)?).context("the log is not there any more")
    }
}

/// What a command complains about on standard error without the log: as it is, or under journald with each line's priority.
pub fn complaint(text: &str) -> String {
    if journald_reads_stderr() { with_priority(Level::ERROR, text) } else { text.to_owned() }
}

fn with_priority(level: Level, text: &str) -> String {
    let lines: Vec<_> = text.lines().map(|line| format!("<{}>{line}", priority(level))).collect();
    lines.join("\n")
}

/// Logs to standard error from here on. Once for each process.
pub fn init(config: &Config) -> anyhow::Result<Handle> {
    let terminal = std::io::stderr().is_terminal();
    let look = match config.format {
        Format::Json => Look::Json { priorities: journald_reads_stderr() },
        Format::Auto if journald_reads_stderr() => Look::Journal,
        Format::Auto | Format::Text => Look::Text { colours: terminal && std::env::var_os("NO_COLOR").is_none() },
    };
    let (subscriber, handle) = subscriber(&config.level, look, || Stderr)?;
    subscriber.try_init().context("the log is set up already")?;
    Ok(handle)
}

/// Standard error, which is never waited for: a reader that stands still must not make the daemon stand still.
struct Stderr;

impl io::Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_all(bytes).map(|()| bytes.len())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        // Locked from the look to the write, so that nobody else takes the room.
        let mut stderr = io::stderr().lock();
        for part in bytes.chunks(ROOM) {
            let mut looks = [PollFd::new(&stderr, PollFlags::OUT)];
            if poll(&mut looks, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            stderr.write_all(part)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Clone, Copy)]
enum Look {
    Text { colours: bool },
    Journal,
    Json { priorities: bool },
}

fn subscriber<W>(level: &str, look: Look, writer: W) -> anyhow::Result<(impl Subscriber + Send + Sync, Handle)>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let (filter, handle) = reload::Layer::new(filter(level)?);
    let layer = tracing_subscriber::fmt::layer().with_writer(writer).log_internal_errors(false);
    let layer = match look {
        Look::Json { priorities } => {
            let layer = layer.json().flatten_event(true).with_span_list(false);
            layer.map_event_format(|json| Json { json, priorities }).boxed()
        }
        Look::Text { .. } | Look::Journal => {
            let colours = matches!(look, Look::Text { colours: true });
            let fields = format::debug_fn(field).delimited(" ");
            layer.with_ansi(colours).fmt_fields(fields).event_format(Line(look)).boxed()
        }
    };
    // The filter is the innermost layer, so that its handle needs no longer type.
    Ok((tracing_subscriber::registry().with(filter).with(layer), Handle { filter: handle }))
}

/// A bare level is Framegate's own; what its libraries say below a warning helps nobody on site.
fn filter(level: &str) -> anyhow::Result<EnvFilter> {
    let directives = match level.trim().to_ascii_lowercase().as_str() {
        plain @ ("info" | "debug" | "trace") => format!("warn,framegate={plain}"),
        plain @ ("error" | "warn" | "off") => plain.to_owned(),
        _ => level.to_owned(),
    };
    let help = "use error, warn, info, debug, trace, off, or a filter such as \"info,framegate::publish=debug\"";
    // Any word would be taken for the name of a module, so a misspelt level would silence everything.
    if let Some(word) = directives
        .split(',')
        .find(|d| !d.contains('=') && (d.trim().is_empty() || d.trim().parse::<LevelName>().is_err()))
    {
        anyhow::bail!("log.level: \"{}\" is no level: {help}", word.escape_debug());
    }
    EnvFilter::try_new(&directives).with_context(|| format!("log.level: \"{}\": {help}", level.escape_debug()))
}

type LevelName = tracing::level_filters::LevelFilter;

fn journald_reads_stderr() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(stderr) = rustix::fs::fstat(std::io::stderr()) else { return false };
    stream == format!("{}:{}", stderr.st_dev, stderr.st_ino)
}

/// The text of an event: `time LEVEL span{facts}: target: message facts`.
struct Line(Look);

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut line: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = *event.metadata().level();
        match self.0 {
            Look::Journal => write!(line, "<{}>", priority(level))?,
            Look::Text { .. } | Look::Json { .. } => {
                SystemTime.format_time(&mut line)?;
                if line.has_ansi_escapes() {
                    write!(line, " \x1b[{}m{level:>5}\x1b[0m ", colour(level))?;
                } else {
                    write!(line, " {level:>5} ")?;
                }
            }
        }
        write!(line, "{}: ", event.metadata().target())?;
        for span in context.event_scope().into_iter().flat_map(tracing_subscriber::registry::Scope::from_root) {
            let extensions = span.extensions();
            let fields = extensions.get::<FormattedFields<N>>().map_or("", |fields| fields.as_str());
            write!(line, "{}{{{fields}}}: ", span.name())?;
        }
        context.field_format().format_fields(line.by_ref(), event)?;
        line.write_char('\n')
    }
}

/// JSON as the library makes it, behind its priority where journald takes that off.
struct Json<F> {
    json: F,
    priorities: bool,
}

impl<S, N, F> FormatEvent<S, N> for Json<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut line: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        if self.priorities {
            write!(line, "<{}>", priority(*event.metadata().level()))?;
        }
        self.json.format_event(context, line, event)
    }
}

/// As syslog counts.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

fn colour(level: Level) -> u8 {
    match level {
        Level::ERROR => 31,
        Level::WARN => 33,
        Level::INFO => 32,
        Level::DEBUG | Level::TRACE => 34,
    }
}

fn field(writer: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug) -> fmt::Result {
    if field.name() != "message" {
        write!(writer, "{}=", field.name())?;
    }
    write!(OneLine(writer), "{value:?}")
}

/// Escapes what could end the line or steer a terminal.
struct OneLine<'a, W>(&'a mut W);

impl<W: fmt::Write> fmt::Write for OneLine<'_, W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for part in text.split_inclusive(char::is_control) {
            match part.char_indices().next_back() {
                Some((at, last)) if last.is_control() => {
                    self.0.write_str(&part[..at])?;
                    write!(self.0, "{}", last.escape_default())?;
                }
                _ => self.0.write_str(part)?,
            }
        }
        Ok(())
    }
}

/// Keeps an error that comes again and again from flooding the log: the first is said at once, then one in each period,
/// with the number of those between. Time is passed in.
#[derive(Debug)]
pub struct Repeats {
    period: Duration,
    seen: Mutex<HashMap<String, Seen>>,
}

#[derive(Debug)]
struct Seen {
    said: Instant,
    more: u64,
}

/// How many were kept silent since the last that was said; shows as nothing, or as ` (and 41 more in the last 60 s)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct More {
    /// Kept silent.
    pub count: u64,
    /// Since this long.
    pub within: Duration,
}

impl fmt::Display for More {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.count {
            0 => Ok(()),
            count => write!(f, " (and {count} more in the last {} s)", self.within.as_secs()),
        }
    }
}

impl Default for Repeats {
    /// One line a minute.
    fn default() -> Self {
        Self { period: Duration::from_mins(1), seen: Mutex::default() }
    }
}

impl Repeats {
    /// The error `key` came: `Some` if it is to be said, with what to add.
    pub fn came(&self, key: &str, now: Instant) -> Option<More> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if !seen.contains_key(key) && seen.len() >= KEYS_MAX {
            seen.retain(|_, it| now.duration_since(it.said) < self.period);
        }
        let known = seen.contains_key(key) || seen.len() < KEYS_MAX;
        let key = if known { key } else { OTHERS };
        let Some(it) = seen.get_mut(key) else {
            seen.insert(key.into(), Seen { said: now, more: 0 });
            return Some(More { count: 0, within: Duration::ZERO });
        };
        let within = now.duration_since(it.said);
        if within < self.period {
            it.more += 1;
            return None;
        }
        let more = More { count: it.more, within };
        *it = Seen { said: now, more: 0 };
        Some(more)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::Arc;

    use super::*;

    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(level: &str, look: Look, events: impl FnOnce(&Handle)) -> String {
        let paper = Paper::default();
        let writer = paper.clone();
        let (subscriber, handle) = subscriber(level, look, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, || events(&handle));
        let bytes = paper.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    const HOSTILE: &str = "a\nWARN forged\x1b[31m\u{9b}31m\r\x07";

    fn hostile_event() {
        let span = tracing::info_span!("frame", id = 7, name = %HOSTILE);
        let _entered = span.enter();
        tracing::warn!(shown = %HOSTILE, debugged = ?HOSTILE, plain = HOSTILE, "refused {HOSTILE}");
    }

    #[test]
    fn an_event_is_one_line_with_its_facts_whatever_they_hold() {
        for look in [Look::Text { colours: false }, Look::Journal, Look::Json { priorities: false }] {
            let text = logged("info", look, |_| hostile_event());
            assert_eq!(text.matches('\n').count(), 1, "{text}");
            assert!(text.ends_with('\n') && !text.contains(['\x1b', '\r', '\x07']), "{text:?}");
            assert!(text.contains("shown") && text.contains("refused a\\nWARN forged"), "{text}");
        }
        let text = logged("info", Look::Journal, |_| hostile_event());
        assert!(text.starts_with("<4>framegate::log::tests: frame{id=7 name=a\\nWARN"), "{text}");
        assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
    }

    #[test]
    fn journald_gets_priorities_and_json_stays_json() {
        let levels = |_: &Handle| {
            tracing::error!("e");
            tracing::warn!("w");
            tracing::info!(detector = "Cam", "i");
            tracing::debug!("d");
        };
        let text = logged("debug", Look::Journal, levels);
        let starts: Vec<_> = text.lines().map(|line| &line[..3]).collect();
        assert_eq!(starts, ["<3>", "<4>", "<6>", "<7>"]);
        assert!(text.contains(": i detector=\"Cam\"\n"), "{text}");
        let text = logged("debug", Look::Json { priorities: true }, levels);
        let starts: Vec<_> = text.lines().map(|line| &line[..4]).collect();
        assert_eq!(starts, ["<3>{", "<4>{", "<6>{", "<7>{"]);
        for line in logged("debug", Look::Json { priorities: false }, levels).lines() {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            assert!(value["message"].is_string() && value["level"].is_string(), "{line}");
        }
    }

    #[test]
    fn each_line_of_a_complaint_has_its_priority_under_journald_only() {
        assert_eq!(with_priority(Level::ERROR, "two:\nlines"), "<3>two:\n<3>lines");
        assert_eq!(complaint("two:\nlines"), "two:\nlines", "nobody tests under journald");
    }

    #[test]
    fn the_level_changes_while_running_and_is_checked() {
        let text = logged("info", Look::Text { colours: true }, |handle| {
            tracing::debug!("hidden");
            handle.set_level("debug").unwrap();
            tracing::debug!("shown");
            assert!(handle.set_level("loud").is_err());
            tracing::debug!("still");
            handle.set_level("off").unwrap();
            tracing::error!("gone");
        });
        assert!(text.contains("shown") && text.contains("still") && text.contains("\x1b[34mDEBUG"), "{text}");
        assert!(!text.contains("hidden") && !text.contains("gone"), "{text}");
        for good in ["INFO", "info,framegate::publish=debug", "framegate=trace", "off"] {
            Config { level: good.into(), ..Config::default() }.check().unwrap();
        }
        for bad in ["loud", "", "framegate=loud", "warn,debgu"] {
            let error = Config { level: bad.into(), ..Config::default() }.check().unwrap_err();
            assert!(error.to_string().contains("use error, warn"), "{bad}: {error}");
        }
    }

    #[test]
    fn libraries_are_quiet_below_a_warning() {
        let text = logged("debug", Look::Journal, |_| {
            tracing::debug!(target: "hyper", "noise");
            tracing::warn!(target: "hyper", "worth it");
        });
        assert_eq!(text, "<4>hyper: worth it\n");
    }

    #[test]
    fn a_full_disk_or_a_closed_pipe_stops_nothing() {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let (reader, pipe) = io::pipe().unwrap();
        drop(reader);
        let (to_full, _) = subscriber("info", Look::Journal, Mutex::new(full)).unwrap();
        let (to_pipe, _) = subscriber("info", Look::Json { priorities: false }, Mutex::new(pipe)).unwrap();
        tracing::subscriber::with_default(to_full, || (0..10).for_each(|_| hostile_event()));
        tracing::subscriber::with_default(to_pipe, hostile_event);
    }

    #[test]
    fn repeated_errors_are_said_once_a_period_with_their_number() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let repeats = Repeats::default();
        assert_eq!(repeats.came("disk full", at(0)).unwrap().to_string(), "");
        for second in 1..42 {
            assert_eq!(repeats.came("disk full", at(second)), None);
        }
        assert!(repeats.came("other", at(42)).is_some(), "other kinds are not kept silent");
        let more = repeats.came("disk full", at(60)).unwrap();
        assert_eq!(more.to_string(), " (and 41 more in the last 60 s)");
        assert_eq!(repeats.came("disk full", at(61)), None);
    }

    #[test]
    fn the_kinds_are_bounded() {
        let now = Instant::now();
        let repeats = Repeats::default();
        let said = (0..10_000).filter(|n| repeats.came(&n.to_string(), now).is_some()).count();
        assert!(said <= KEYS_MAX + 1 && repeats.seen.lock().unwrap().len() <= KEYS_MAX + 1, "{said}");
        assert!(repeats.came("new", now + repeats.period).is_some());
        assert!(repeats.seen.lock().unwrap().len() <= 2);
    }
}
