//! The status page: what a technician sees in a browser. One document without outside resources, rendered here, so that it
//! says everything without scripts; a script only puts newer sections in place of older ones.
//!
//! Not here: serving it, and where the figures come from. No images of frames, no secrets, nothing that acts.

use std::sync::LazyLock;
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytesize::ByteSize;
use jiff::Timestamp;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::history::{STEPS, Sample};
use crate::publish::{EngineStatus, State};
use crate::settle::Reason;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");
/// Without scripts the page is loaded again after so many seconds.
const RELOAD_SECONDS: &str = "10";
/// Sparklines are drawn in a box of this size; the browser stretches it.
const BOX: (f64, f64) = (240.0, 28.0);

/// For the header `Content-Security-Policy`: nothing but our own style and script, and our own events.
pub static CONTENT_SECURITY_POLICY: LazyLock<String> = LazyLock::new(|| {
    let hash = |text: &str| BASE64_STANDARD.encode(digest(&SHA256, text.as_bytes()));
    format!(
        "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash(STYLE),
        hash(SCRIPT)
    )
});

/// Everything on the page.
#[derive(Clone, Debug)]
pub struct Shown {
    /// Framegate's version.
    pub version: String,
    /// Since the start.
    pub uptime: Duration,
    /// The moment of all this.
    pub now: Timestamp,
    /// The engine.
    pub engine: EngineStatus,
    /// Detectors, by name.
    pub detectors: Vec<Row>,
    /// Entries that cannot deliver: name, place, why.
    pub held: Vec<(String, String, String)>,
    /// Dead letters that are kept: how many, and bytes.
    pub dead_letters: (u64, u64),
    /// Dead letters since the start, by reason.
    pub dead_lettered: Vec<(Reason, u64)>,
}

/// One detector.
#[derive(Clone, Debug)]
pub struct Row {
    /// The engine's `detectorName`: any text at all.
    pub name: String,
    /// Whether its source can deliver.
    pub up: bool,
    /// Longer than its alarm without a frame.
    pub silent: bool,
    /// Frames published per second.
    pub rate: f64,
    /// Noticed to accepted, of the last frames.
    pub delivery: Option<Duration>,
    /// Frames that wait.
    pub pending: i64,
    /// When the last one came.
    pub last_frame: Option<Timestamp>,
    /// Published since the start.
    pub published: u64,
    /// Its last hour.
    pub hour: Vec<Sample>,
}

/// The whole document.
pub fn page(shown: &Shown) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                noscript { meta http-equiv="refresh" content=(RELOAD_SECONDS); }
                title { (title(shown)) }
                // No request for an icon.
                link rel="icon" href="data:,";
                style { (PreEscaped(STYLE)) }
            }
            body {
                header {
                    h1 { "Framegate" }
                    span { (shown.version) }
                    p #live role="status" { "as of " (shown.now.strftime("%F %T UTC")) }
                }
                main {
                    @for (id, section) in sections(shown) {
                        section id=(id) { (PreEscaped(section)) }
                    }
                }
                footer {
                    h2 { "More" }
                    a href="metrics" { "metrics" }
                    a href="status" { "status as JSON" }
                    a href="readyz" { "readiness" }
                    a href="healthz" { "health" }
                }
                script { (PreEscaped(SCRIPT)) }
            }
        }
    };
    page.into_string()
}

/// The parts that change, by their ids.
pub fn sections(shown: &Shown) -> [(&'static str, String); 5] {
    [
        ("engine", engine(shown)),
        ("figures", figures(shown)),
        ("held", held(shown)),
        ("detectors", detectors(shown)),
        ("dead-letters", dead_letters(shown)),
    ]
    .map(|(id, markup)| (id, markup.into_string()))
}

fn title(shown: &Shown) -> String {
    let trouble = shown.held.len() + shown.detectors.iter().filter(|row| row.silent).count();
    match (shown.engine.state, trouble) {
        (State::Open, 0) => "Framegate: well".into(),
        (State::Open, n) => format!("Framegate: {n} in trouble"),
        (state, _) => format!("Framegate: {}", state.as_str()),
    }
}

fn engine(shown: &Shown) -> Markup {
    let engine = &shown.engine;
    let (class, sign) = match engine.state {
        State::Open => ("state good", "✓"),
        State::Throttled | State::Failing | State::Unreachable => ("state warn", "!"),
        State::Credentials | State::Forbidden | State::Rejecting | State::UnexpectedAnswer => ("state bad", "✗"),
    };
    html! {
        h2 { "Engine" }
        div class=(class) data-title=(title(shown)) {
            strong { span aria-hidden="true" { (sign) " " } (engine.state.as_str()) }
            " " span.dim { "since " (ago(shown.now, engine.since)) }
            p { (engine.state.meaning()) }
            @if engine.state != State::Open && !engine.reason.is_empty() { p { "What was seen: " (engine.reason) } }
            @if !engine.advice.is_empty() { p { "What to do: " (engine.advice) } }
            @if engine.insecure { p.is-bad { "Its certificate is not verified." } }
        }
    }
}

fn figures(shown: &Shown) -> Markup {
    let rate: f64 = shown.detectors.iter().map(|row| row.rate).sum();
    let pending: i64 = shown.detectors.iter().map(|row| row.pending).sum();
    let published: u64 = shown.detectors.iter().map(|row| row.published).sum();
    let (letters, bytes) = shown.dead_letters;
    html! {
        dl {
            div { dt { "Published per second" } dd { (number(rate)) } }
            div { dt { "Waiting" } dd { (pending) " " small { (caught_up(pending, rate)) } } }
            div { dt { "Published" } dd { (published) " " small { "in " (span(shown.uptime)) } } }
            div { dt { "Dead letters kept" } dd { (letters) " " small { (ByteSize(bytes).display().iec()) } } }
        }
    }
}

fn held(shown: &Shown) -> Markup {
    html! {
        @if !shown.held.is_empty() {
            h2 { "Held" }
            @for (name, place, why) in &shown.held {
                p { strong.is-bad { (name) } " " span.dim { (place) } br; (why) }
            }
        }
    }
}

fn detectors(shown: &Shown) -> Markup {
    html! {
        h2 { "Detectors" }
        @if shown.detectors.is_empty() {
            p.dim { "No frame has come yet." }
        } @else {
            table {
                thead {
                    tr {
                        th scope="col" { "Detector" } th scope="col" { "State" } th scope="col" { "Per second" }
                        th scope="col" { "Delivery" } th scope="col" { "Waiting" } th scope="col" { "Last frame" }
                        th scope="col" { "Published, last hour" }
                    }
                }
                tbody { @for row in &shown.detectors { (detector(shown.now, row)) } }
            }
        }
    }
}

fn detector(now: Timestamp, row: &Row) -> Markup {
    let (class, state) = match (row.up, row.silent) {
        (false, _) => ("is-bad", "✗ held"),
        (true, true) => ("is-warn", "! silent"),
        (true, false) => ("is-good", "✓ well"),
    };
    html! {
        tr {
            th scope="row" { (row.name) }
            td class=(class) data-label="State" { (state) }
            td data-label="Per second" { (number(row.rate)) }
            td data-label="Delivery" { (row.delivery.map_or_else(|| "–".into(), span)) }
            td data-label="Waiting" { (row.pending) }
            td data-label="Last frame" { (row.last_frame.map_or_else(|| "never".into(), |at| ago(now, at) + " ago")) }
            td data-label="Last hour" { (sparkline(&row.hour)) }
        }
    }
}

fn sparkline(hour: &[Sample]) -> Markup {
    let most = hour.iter().map(|step| step.published).max().unwrap_or(0);
    let total: u64 = hour.iter().map(|step| step.published).sum();
    let (width, height) = BOX;
    // The newest step is at the right edge; an hour that is not over yet begins further right.
    let at = |i: usize| width * (STEPS - hour.len() + i + 1) as f64 / STEPS as f64;
    let up = |n: u64| height - 2.0 - (height - 4.0) * n as f64 / most.max(1) as f64;
    let points = hour.iter().enumerate().map(|(i, step)| format!("{:.1} {:.1}", at(i), up(step.published)));
    let path = format!("M{}", points.collect::<Vec<_>>().join("L"));
    html! {
        svg viewBox=(format!("0 0 {width} {height}")) preserveAspectRatio="none" role="img"
            aria-label=(format!("{total} published in the last hour, at most {most} in half a minute")) {
            @if !hour.is_empty() { path d=(path) {} }
        }
    }
}

fn dead_letters(shown: &Shown) -> Markup {
    let reasons: Vec<_> = shown.dead_lettered.iter().filter(|(_, count)| *count > 0).collect();
    html! {
        @if !reasons.is_empty() {
            h2 { "Dead letters since the start" }
            table {
                thead { tr { th scope="col" { "Reason" } th scope="col" { "Frames" } th.text scope="col" { "Meaning" } } }
                tbody {
                    @for (reason, count) in reasons {
                        tr {
                            th scope="row" { (reason) }
                            td data-label="Frames" { (count) }
                            td.text data-label="Meaning" { (why(*reason)) }
                        }
                    }
                }
            }
        }
    }
}

fn why(reason: Reason) -> &'static str {
    match reason {
        Reason::Unsupported => "not an image that the engine takes: something else is written here",
        Reason::Truncated => "the image never got its end: its camera dies or is slow while writing",
        Reason::TooLarge => "larger than encode.max_frame",
        Reason::Rejected => "the engine took others and refused these",
        Reason::Forbidden => "the engine took others and had no permission for these",
        Reason::ServerError => "the engine took others and failed on these again and again",
        Reason::InternalError => "Framegate failed on these: please report it",
    }
}

/// A rate, with a decimal where that says something.
pub fn number(rate: f64) -> String {
    if rate >= 100.0 || rate == 0.0 { format!("{rate:.0}") } else { format!("{rate:.1}") }
}

/// How long until nothing waits, if it goes on like this and nothing more comes.
pub fn caught_up(pending: i64, rate: f64) -> String {
    if pending <= 0 || rate < 0.05 {
        return String::new();
    }
    format!("about {} at this pace", span(Duration::from_secs_f64((pending as f64 / rate).min(1e9))))
}

/// How long before `now`, in its largest unit; nothing is before it that is after it.
pub fn ago(now: Timestamp, then: Timestamp) -> String {
    span(Duration::try_from(now.duration_since(then)).unwrap_or_default())
}

/// In its largest unit, for people.
pub fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0 if time.is_zero() => "0 s".into(),
        0 => format!("{} ms", time.as_millis().max(1)),
        1..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::admin) fn shown() -> Shown {
        let now: Timestamp = "2026-11-23T11:00:00Z".parse().unwrap();
        Shown {
            version: "1.2.3".into(),
            uptime: Duration::from_hours(3),
            now,
            engine: EngineStatus {
                state: State::Forbidden,
                since: "2026-11-23T10:58:30Z".parse().unwrap(),
                reason: "403 <b>no</b>".into(),
                advice: State::Forbidden.advice().into(),
                concurrency_limit: 1,
                in_flight: 0,
                waiting: 0,
                token_expires: None,
                clock_skew_seconds: None,
                insecure: false,
            },
            detectors: vec![Row {
                name: "<script>alert('Lobby & Tür')</script>".into(),
                up: true,
                silent: true,
                rate: 12.34,
                delivery: Some(Duration::from_micros(2500)),
                pending: 740,
                last_frame: Some("2026-11-23T10:59:00Z".parse().unwrap()),
                published: 7,
                hour: vec![Sample { published: 3, ..Sample::default() }, Sample::default()],
            }],
            held: vec![("Door".into(), "/srv/door".into(), "the directory is gone".into())],
            dead_letters: (2, 4096),
            dead_lettered: vec![(Reason::Truncated, 2), (Reason::Rejected, 0)],
        }
    }

    #[test]
    fn the_page_says_everything_and_escapes_what_comes_from_outside() {
        let page = page(&shown());
        for part in [
            "<!DOCTYPE html>",
            "Framegate: forbidden</title>",
            "forbidden</strong> <span class=\"dim\">since 90 s",
            "What was seen: 403 &lt;b&gt;no&lt;/b&gt;",
            "Face Publishing",
            "&lt;script&gt;alert('Lobby &amp; Tür')&lt;/script&gt;",
            "! silent",
            "data-label=\"Per second\">12.3<",
            "2 ms<",
            "740 <small>about 59 s at this pace</small>",
            "60 s ago",
            "the directory is gone",
            "3 published in the last hour",
            "truncated",
        ] {
            assert!(page.contains(part), "{part}\n{page}");
        }
        assert_eq!(page.matches("<script>").count(), 1, "ours alone");
        assert!(!page.contains("rejected"), "what did not happen is not listed");
        assert!(!page.contains("style=\""), "the policy forbids it");
    }

    #[test]
    fn sparklines_end_at_the_right_edge_and_stay_in_their_box() {
        let hour: Vec<Sample> = (0..STEPS as u64).map(|n| Sample { published: n % 7, ..Sample::default() }).collect();
        let svg = sparkline(&hour).into_string();
        let path = svg.split("d=\"M").nth(1).unwrap().split('"').next().unwrap();
        let points: Vec<(f64, f64)> = path
            .split('L')
            .map(|point| point.split_once(' ').map(|(x, y)| (x.parse().unwrap(), y.parse().unwrap())).unwrap())
            .collect();
        assert_eq!(points.len(), STEPS);
        assert!((points[STEPS - 1].0 - BOX.0).abs() < 0.1);
        assert!(points.iter().all(|(x, y)| (0.0..=BOX.0).contains(x) && (0.0..=BOX.1).contains(y)));
        assert!(!sparkline(&[]).into_string().contains("path"));
    }

    #[test]
    fn spans_are_in_their_largest_unit() {
        for (millis, text) in [(0, "0 s"), (3, "3 ms"), (61_000, "61 s"), (600_000, "10 min"), (10_800_000, "3 h")] {
            assert_eq!(span(Duration::from_millis(millis)), text);
        }
        assert_eq!(span(Duration::from_micros(20)), "1 ms");
    }
}
