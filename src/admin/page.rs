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

use crate::history::{STEP, STEPS, Sample};
use crate::metrics::Condition;
use crate::publish::{EngineStatus, State};
use crate::settle::Reason;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");
/// Without scripts the page is loaded again after so many seconds.
const RELOAD_SECONDS: &str = "10";
/// How high a sparkline's box is, in its own units; it is one unit wide for each step, and the browser stretches it.
const SPARK_HEIGHT: u64 = 100;
/// What happened at all is seen, however little it was.
const SPARK_LEAST: u64 = 5;
/// What is worked off sooner than this is no backlog to speak of.
const BACKLOG_LEAST: Duration = Duration::from_secs(10);
/// Between the groups of three digits: narrow, and never broken.
const DIGITS_APART: char = '\u{202f}';

/// For the header `Content-Security-Policy`: nothing but our own style and script, and our own events.
pub static CONTENT_SECURITY_POLICY: LazyLock<String> = LazyLock::new(|| {
    let hash = |text: &str| BASE64_STANDARD.encode(digest(&SHA256, text.as_bytes()));
    format!(
        "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash(STYLE),
        hash(SCRIPT)
    )
});

/// Everything on the page.
#[derive(Clone, Debug)]
pub struct Shown {
    /// Framegate's version.
    pub version: String,
    /// The box's name.
    pub host: String,
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
    /// What the spool holds: frames, and bytes. `None`: nothing uses it.
    pub spool: Option<(u64, u64)>,
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
    /// How it is.
    pub condition: Condition,
    /// Its `silence_alarm`.
    pub alarm: Option<Duration>,
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
    let [(_, summary), sections @ ..] = sections(shown);
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                noscript { meta http-equiv="refresh" content=(RELOAD_SECONDS); }
                title { (PreEscaped(&summary)) " · " (shown.host) " · Framegate" }
                // No request for an icon.
                link rel="icon" href="data:,";
                style { (PreEscaped(STYLE)) }
            }
            body {
                header {
                    h1 { "Framegate " bdi { (shown.host) } }
                    p #summary role="status" { (PreEscaped(&summary)) }
                    p #live role="status" { "as of " (shown.now.strftime("%F %T UTC")) }
                }
                main {
                    @for (id, section) in sections {
                        section id=(id) { (PreEscaped(section)) }
                    }
                }
                footer {
                    nav aria-label="The same for programs" {
                        a href="metrics" { "metrics" }
                        a href="status" { "status as JSON" }
                        a href="readyz" { "readiness" }
                        a href="healthz" { "health" }
                    }
                    p { "Framegate " (shown.version) }
                }
                script { (PreEscaped(SCRIPT)) }
            }
        }
    };
    page.into_string()
}

/// The parts that change, by their ids; the first is the page in a word or two.
pub fn sections(shown: &Shown) -> [(&'static str, String); 6] {
    [
        ("summary", summary(shown)),
        ("engine", engine(shown)),
        ("figures", figures(shown)),
        ("trouble", trouble(shown)),
        ("detectors", detectors(shown)),
        ("dead-letters", dead_letters(shown)),
    ]
    .map(|(id, markup)| (id, markup.into_string()))
}

fn summary(shown: &Shown) -> Markup {
    let trouble = shown.held.len() + silent(shown).count();
    html! {
        @match (shown.engine.state, trouble) {
            (State::Open, 0) => "well",
            (State::Open, n) => { (n) " in trouble" }
            (state, _) => { "engine " (state.as_str()) }
        }
    }
}

fn silent(shown: &Shown) -> impl Iterator<Item = &Row> {
    shown.detectors.iter().filter(|row| row.condition == Condition::Silent)
}

fn engine(shown: &Shown) -> Markup {
    let engine = &shown.engine;
    let (class, sign) = match engine.state {
        State::Open => ("state good", "✓"),
        State::Throttled | State::Failing | State::Unreachable => ("state warn", "!"),
        State::Credentials | State::Forbidden | State::Rejecting | State::UnexpectedAnswer => ("state bad", "✗"),
    };
    let paused = engine.state != State::Open;
    html! {
        h2 { "Engine" }
        div class=(class) {
            p { strong { span aria-hidden="true" { (sign) " " } (engine.state.as_str()) } " for " (ago(shown.now, engine.since)) }
            p { (engine.state.meaning()) }
            @if paused {
                dl {
                    @if !engine.reason.is_empty() { dt { "What was seen" } dd { (engine.reason) } }
                    @if !engine.advice.is_empty() { dt { "What to do" } dd { (commands(&engine.advice)) } }
                }
            }
            @if engine.insecure { p.is-bad { "Its certificate is not verified: " code { "danger_accept_invalid_certs" } " is on." } }
            p.dim { (terms(shown)) }
        }
    }
}

/// What stands between backticks is to be typed.
fn commands(text: &str) -> Markup {
    html! {
        @for (n, part) in text.split('`').enumerate() {
            @if n % 2 == 1 { code { (part) } } @else { (part) }
        }
    }
}

/// On what terms we are with the engine, in one line.
fn terms(shown: &Shown) -> String {
    let engine = &shown.engine;
    let mut terms = vec![format!("{} of {} attempts in flight", engine.in_flight, engine.concurrency_limit)];
    terms.push(match engine.token_expires {
        Some(at) if at > shown.now => format!("token valid for {}", ago(at, shown.now)),
        Some(_) | None => "no valid token".into(),
    });
    if let Some(skew) = engine.clock_skew_seconds {
        let side = if skew < 0.0 { "behind" } else { "ahead" };
        terms.push(match skew.abs() {
            ..1.0 => "clocks agree".into(),
            by => format!("this box's clock is {} {side}", span(Duration::from_secs_f64(by.min(1e9)))),
        });
    }
    terms.join(" · ")
}

fn figures(shown: &Shown) -> Markup {
    let rate: f64 = shown.detectors.iter().map(|row| row.rate).sum();
    let pending: i64 = shown.detectors.iter().map(|row| row.pending).sum();
    let published: u64 = shown.detectors.iter().map(|row| row.published).sum();
    let (letters, bytes) = shown.dead_letters;
    let (publishing, waiting) = (total(shown, |step| step.published), total(shown, |step| step.pending));
    let most_published = most_per_second(&publishing).max(rate);
    let most_waiting = i128::from(waiting.iter().max().copied().unwrap_or(0)).max(pending.into());
    let ever = |most: &str| format!("at most {most} in the last hour");
    html! {
        h2.unseen { "Figures" }
        dl {
            div {
                dt { "Published per second" }
                dd { (number(rate)) " " small { (ever(&number(most_published))) } }
                dd { (sparkline(&publishing, "published")) }
            }
            div {
                dt { "Waiting" }
                dd { (whole(pending)) " " small { (caught_up(pending, rate).unwrap_or_else(|| ever(&whole(most_waiting)))) } }
                dd { (sparkline(&waiting, "waiting")) }
            }
            div { dt { "Published" } dd { (whole(published)) " " small { "in " (span(shown.uptime)) } } }
            @if let Some((frames, bytes)) = shown.spool {
                div { dt { "In the spool" } dd { (whole(frames)) " " small { (ByteSize(bytes).display().iec()) } } }
            }
            div { dt { "Dead letters kept" } dd { (whole(letters)) " " small { (ByteSize(bytes).display().iec()) } } }
        }
    }
}

/// All detectors' last hour, step by step.
fn total(shown: &Shown, what: impl Fn(&Sample) -> u64) -> Vec<u64> {
    let length = shown.detectors.iter().map(|row| row.hour.len()).max().unwrap_or(0);
    let mut steps = vec![0; length];
    for row in &shown.detectors {
        // The newest steps are those that belong together.
        for (step, sample) in steps[length - row.hour.len()..].iter_mut().zip(&row.hour) {
            *step += what(sample);
        }
    }
    steps
}

fn trouble(shown: &Shown) -> Markup {
    html! {
        @if !shown.held.is_empty() || silent(shown).next().is_some() {
            h2 { "In trouble" }
            ul {
                @for (name, place, why) in &shown.held {
                    li { strong.is-bad { "✗ " bdi { (name) } } " " span.dim { "held · " bdi { (place) } } br; (why) }
                }
                @for row in silent(shown) {
                    li {
                        strong.is-warn { "! " bdi { (row.name) } } " " span.dim { "silent" } br;
                        "No frame " @if let Some(at) = row.last_frame { "for " (ago(shown.now, at)) } @else { "since the start" }
                        @if let Some(alarm) = row.alarm { "; its alarm is " (span(alarm)) }
                        ". Does its camera run, and does it send to this box?"
                    }
                }
            }
        }
    }
}

fn detectors(shown: &Shown) -> Markup {
    let mut rows: Vec<_> = shown.detectors.iter().collect();
    rows.sort_by_key(|row| row.condition);
    html! {
        h2 { "Detectors" }
        @if rows.is_empty() {
            p.dim { "No frame has come yet." }
        } @else {
            // On a phone these are no boxes of a table any more; the roles say that they still are one.
            table role="table" {
                thead role="rowgroup" {
                    tr role="row" {
                        th role="columnheader" scope="col" { "Detector" } th role="columnheader" scope="col" { "State" }
                        th role="columnheader" scope="col" { "Per second" } th role="columnheader" scope="col" { "Delivery" }
                        th role="columnheader" scope="col" { "Waiting" } th role="columnheader" scope="col" { "Last frame" }
                        th role="columnheader" scope="col" { "Published, last hour" }
                    }
                }
                tbody role="rowgroup" { @for row in rows { (detector(shown.now, row)) } }
            }
        }
    }
}

fn detector(now: Timestamp, row: &Row) -> Markup {
    let (class, state) = match row.condition {
        Condition::Held => ("is-bad", "✗ held"),
        Condition::Silent => ("is-warn", "! silent"),
        Condition::Well => ("is-good", "✓ well"),
        Condition::Gone => ("dim", "not configured"),
    };
    let steps: Vec<u64> = row.hour.iter().map(|step| step.published).collect();
    html! {
        tr role="row" {
            th role="rowheader" scope="row" { bdi { (row.name) } }
            td role="cell" { span class=(class) { (state) } }
            td role="cell" data-label="Per second" { (number(row.rate)) }
            td role="cell" data-label="Delivery" { (row.delivery.map_or_else(|| "–".into(), span)) }
            td role="cell" data-label="Waiting" { (whole(row.pending)) }
            td role="cell" data-label="Last frame" { (row.last_frame.map_or_else(|| "never".into(), |at| ago(now, at) + " ago")) }
            td.hour role="cell" { (sparkline(&steps, "published")) }
        }
    }
}

/// A column for each step of the last hour; the newest is at the right edge. `what` frames did, for those who hear it.
fn sparkline(steps: &[u64], what: &str) -> Markup {
    let steps = finished(steps);
    let most = steps.iter().max().copied().unwrap_or(0);
    let heard = match what {
        "published" => format!(
            "{} published in the last hour, at most {} per second",
            whole(steps.iter().sum::<u64>()),
            number(most_per_second(steps))
        ),
        _ => format!("at most {} {what} in the last hour", whole(most)),
    };
    html! {
        svg viewBox=(format!("0 0 {STEPS} {SPARK_HEIGHT}")) preserveAspectRatio="none" role="img" {
            title { (heard) }
            @if most > 0 { path d=(columns(steps, most)) {} }
        }
    }
}

/// The step that is still going on would always look like a fall.
fn finished(steps: &[u64]) -> &[u64] {
    match steps {
        [finished @ .., _] if !finished.is_empty() => finished,
        all => all,
    }
}

fn columns(steps: &[u64], most: u64) -> String {
    let mut path = format!("M{} {SPARK_HEIGHT}", STEPS.saturating_sub(steps.len()));
    for step in steps {
        let high = if *step == 0 { 0 } else { (step * SPARK_HEIGHT / most).max(SPARK_LEAST) };
        path.extend(["V", &(SPARK_HEIGHT - high).to_string(), "h1"]);
    }
    path.extend(["V", &SPARK_HEIGHT.to_string(), "z"]);
    path
}

fn most_per_second(steps: &[u64]) -> f64 {
    finished(steps).iter().max().copied().unwrap_or(0) as f64 / STEP.as_secs_f64()
}

fn dead_letters(shown: &Shown) -> Markup {
    let reasons: Vec<_> = shown.dead_lettered.iter().filter(|(_, count)| *count > 0).collect();
    html! {
        @if !reasons.is_empty() {
            h2 { "Dead letters since the start" }
            table.reasons role="table" {
                thead role="rowgroup" {
                    tr role="row" {
                        th role="columnheader" scope="col" { "Reason" } th role="columnheader" scope="col" { "Frames" }
                        th role="columnheader" scope="col" { "Meaning" }
                    }
                }
                tbody role="rowgroup" {
                    @for (reason, count) in reasons {
                        tr role="row" {
                            th role="rowheader" scope="row" { (reason) }
                            td role="cell" { (whole(*count)) }
                            td role="cell" { (why(*reason)) }
                        }
                    }
                }
            }
            p.dim { "Each is kept with its image: " code { "framegate dead-letter list" } }
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

/// With its digits in groups of three.
fn whole(n: impl Into<i128>) -> String {
    let digits = n.into().to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(DIGITS_APART);
        }
        text.push(digit);
    }
    text
}

/// How long until nothing waits, if it goes on like this and nothing more comes.
pub fn caught_up(pending: i64, rate: f64) -> Option<String> {
    let seconds = if rate < 0.05 { 0.0 } else { pending as f64 / rate };
    let time = Duration::from_secs_f64(seconds.clamp(0.0, 1e9));
    (time >= BACKLOG_LEAST).then(|| format!("about {} at this pace", span(time)))
}

/// How long before `now`, in whole seconds or its largest unit; nothing is before it that is after it.
pub fn ago(now: Timestamp, then: Timestamp) -> String {
    span(Duration::from_secs(now.duration_since(then).as_secs().try_into().unwrap_or(0)))
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
            host: "edge-07".into(),
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
                condition: Condition::Silent,
                alarm: Some(Duration::from_secs(30)),
                rate: 12.34,
                delivery: Some(Duration::from_micros(2500)),
                pending: 740,
                last_frame: Some("2026-11-23T10:59:00Z".parse().unwrap()),
                published: 7,
                hour: vec![Sample { published: 3, ..Sample::default() }, Sample::default()],
            }],
            held: vec![("Door".into(), "/srv/door".into(), "the directory is gone".into())],
            spool: None,
            dead_letters: (2, 4096),
            dead_lettered: vec![(Reason::Truncated, 2), (Reason::Rejected, 0)],
        }
    }

    #[test]
    fn the_page_says_everything_and_escapes_what_comes_from_outside() {
        let page = page(&shown());
        for part in [
            "<!DOCTYPE html>",
            "<title>engine forbidden · edge-07 · Framegate</title>",
            "forbidden</strong> for 90 s",
            "<dd>403 &lt;b&gt;no&lt;/b&gt;</dd>",
            "Face Publishing",
            "<bdi>&lt;script&gt;alert('Lobby &amp; Tür')&lt;/script&gt;</bdi>",
            "! silent",
            "No frame for 60 s; its alarm is 30 s",
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
    fn what_needs_somebody_comes_first_and_is_counted() {
        let mut shown = shown();
        shown.engine.state = State::Open;
        let row = shown.detectors[0].clone();
        let of = |name: &str, condition| Row { name: name.into(), condition, ..row.clone() };
        shown.detectors = vec![
            of("A", Condition::Gone),
            of("B", Condition::Well),
            of("C", Condition::Held),
            of("D", Condition::Silent),
        ];
        let table = detectors(&shown).into_string();
        let at = |name: &str| table.find(&format!("<bdi>{name}</bdi>")).unwrap();
        assert!(at("C") < at("D") && at("D") < at("B") && at("B") < at("A"), "{table}");
        assert!(table.contains("not configured"), "{table}");
        assert_eq!(summary(&shown).into_string(), "2 in trouble", "one is held, one is silent");
        (shown.held, shown.detectors) = (Vec::new(), Vec::new());
        assert_eq!(summary(&shown).into_string(), "well");
    }

    #[test]
    fn sparklines_end_at_the_right_edge_and_stay_in_their_box() {
        let hour: Vec<u64> = (0..STEPS as u64).map(|n| n % 7 * 1000).chain([9_000_000]).collect();
        let path = columns(finished(&hour), 6000);
        let columns: Vec<u64> = path
            .split('V')
            .skip(1)
            .map(|it| it.trim_end_matches("h1").trim_end_matches('z').parse().unwrap())
            .collect();
        assert!(path.starts_with("M0 100V100h1V84h1"), "{path}");
        assert_eq!(columns.len(), STEPS + 1, "a column for each step, and the way back");
        assert!(columns.iter().all(|high| *high <= SPARK_HEIGHT), "the step that still goes on is left out: {path}");
        assert!(super::columns(&[1, 0], 1000).starts_with("M118 100V95h1V100h1"), "little is seen, nothing is not");
        assert!(!sparkline(&[], "published").into_string().contains("path"));
        assert!(sparkline(&[7], "waiting").into_string().contains("path"), "after the start there is only that step");
    }

    #[test]
    fn hours_of_detectors_that_began_at_different_times_are_added_step_by_step() {
        let mut shown = shown();
        let step = |published| Sample { published, ..Sample::default() };
        let mut row = shown.detectors[0].clone();
        row.hour = vec![step(10)];
        shown.detectors.push(row);
        assert_eq!(total(&shown, |step| step.published), [3, 10]);
    }

    #[test]
    fn digits_stand_in_groups() {
        for (n, text) in [(0_u64, "0"), (999, "999"), (1000, "1\u{202f}000"), (1_234_567, "1\u{202f}234\u{202f}567")] {
            assert_eq!(whole(n), text);
        }
    }

    #[test]
    fn only_a_backlog_to_speak_of_has_an_end_to_wait_for() {
        for (pending, rate, text) in
            [(740, 12.34, Some("about 59 s at this pace")), (4, 17.0, None), (9, 0.0, None), (-1, 1.0, None)]
        {
            assert_eq!(caught_up(pending, rate).as_deref(), text);
        }
    }

    #[test]
    fn the_most_of_an_hour_is_never_less_than_what_is_now() {
        let mut shown = shown();
        (shown.detectors[0].rate, shown.detectors[0].pending) = (700.0, 3);
        let figures = figures(&shown).into_string();
        assert!(
            figures.contains("at most 700 in the last hour") && figures.contains("at most 3 in the last"),
            "{figures}"
        );
    }

    #[test]
    fn spans_are_in_their_largest_unit() {
        for (millis, text) in [(0, "0 s"), (3, "3 ms"), (61_000, "61 s"), (600_000, "10 min"), (10_800_000, "3 h")] {
            assert_eq!(span(Duration::from_millis(millis)), text);
        }
        assert_eq!(span(Duration::from_micros(20)), "1 ms");
    }
}
