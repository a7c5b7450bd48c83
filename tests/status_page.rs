//! The status page in a real browser: what a technician sees, on a desk and on a phone, in light and dark, with and without
//! scripts, with a mouse and without. A daemon serves it where that matters; elsewhere prepared figures do.
//!
//! Every picture that is taken lands in `target/tmp/status-page`, to be looked at.

mod support;

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use framegate::admin::page::{Row, Shown};
use framegate::admin::{self, View};
use framegate::history::{STEPS, Sample};
use framegate::metrics::Condition;
use framegate::metrics::Metrics;
use framegate::publish::{EngineStatus, State};
use framegate::settle::Reason;
use jiff::Timestamp;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use support::browser::Page;
use support::engine::{Engine, put_face};
use support::faults::skipped;
use support::{PASSWORD, Site};

/// A narrow phone, in CSS pixels; and what WCAG 2.2 asks for, which is also a desk's window at 400 %.
const PHONE: u32 = 360;
const NARROWEST: u32 = 320;
const DESK: u32 = 1280;
const HIGH: u32 = 800;

// ---- by a daemon

#[test]
fn the_page_of_a_daemon_shows_frames_an_outage_and_its_end_without_being_loaded_again() {
    let Some(mut page) = Page::open("the live status page") else { return };
    let engine = Engine::start();
    let site = Site::new(&engine.base_url()).detector("Lobby", "UTC", "").detector("Tür 2", "UTC", "");
    let daemon = site.run();
    let url = format!("http://{}/", daemon.admin());
    page.go(&url);
    page.ask("window.loadedOnce = true");
    page.until("it is live", "document.querySelector('#live').textContent == 'live'");
    page.until("all is well", "document.querySelector('#summary').textContent == 'well'");
    assert_eq!(names(&mut page), ["Lobby", "Tür 2"]);

    put_face(&site.drop_dir("Lobby"), 1);
    page.until("a published frame", &figure("Published", "1 in"));
    page.until("when it came", "/[0-9] s ago/.test(document.querySelector('#detectors tbody tr').textContent)");

    engine.down();
    put_face(&site.drop_dir("Lobby"), 2);
    page.until("the outage", "document.querySelector('#summary').textContent == 'engine unreachable'");
    page.until("its title", "document.title.startsWith('engine unreachable · ')");
    let told = page.text("document.querySelector('#engine').innerText");
    for part in ["unreachable", "Frames are kept", "What was seen", "What to do", "framegate doctor"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    page.until("the frame that waits", &figure("Waiting", "1"));

    engine.up();
    page.until("its end", "document.querySelector('#summary').textContent == 'well'");
    page.until("the frame that waited", &figure("Published", "2 in"));
    page.until("nothing waits", &figure("Waiting", "0"));
    assert_eq!(page.ask("window.loadedOnce"), true, "it was never loaded again");
    assert_eq!(page.complaints(), Vec::<String>::new());
    for request in page.requests() {
        assert!(request.starts_with(&url) || request == "data:,", "{request}");
    }
    let document = page.text("document.documentElement.outerHTML");
    assert!(!document.contains(PASSWORD) && !document.contains("eyJ"), "no secret, no token");
}

#[test]
fn without_scripts_the_page_says_the_same_and_loads_itself_again() {
    let Some(mut page) = Page::open("the status page without scripts") else { return };
    let engine = Engine::start();
    let site = Site::new(&engine.base_url()).detector("Lobby", "UTC", "");
    let daemon = site.run();
    page.without_scripts();
    page.go(&format!("http://{}/", daemon.admin()));
    assert!(page.text("document.querySelector('#live').textContent").starts_with("as of 20"));
    assert!(page.text("document.querySelector('#engine').innerText").contains("open"));
    assert_eq!(names(&mut page), ["Lobby"]);

    engine.down();
    put_face(&site.drop_dir("Lobby"), 1);
    page.until_loaded();
    page.until("the outage", "document.querySelector('#summary').textContent == 'engine unreachable'");
}

// ---- by prepared figures

#[test]
fn nobody_is_told_that_the_page_is_live_when_it_is_not() {
    let Some(mut page) = Page::open("the status page that lost its daemon") else { return };
    let mut served = Served::start(a_bad_afternoon());
    page.go(&served.url());
    page.until("it is live", "document.querySelector('#live').textContent == 'live'");
    served.stop();
    page.until("the loss", "document.querySelector('#live').textContent.startsWith('not live since ')");
    page.until("also in its title", "document.title.startsWith('not live · ')");
    served.change(|shown| shown.engine.state = State::Open);
    served.serve();
    page.until("the return", "document.querySelector('#live').textContent == 'live'");
    page.until("what has changed", "document.querySelector('#engine strong').textContent.includes('open')");
}

#[test]
fn what_somebody_has_selected_stays_selected_while_the_rest_changes() {
    let Some(mut page) = Page::open("a selection on the status page") else { return };
    let served = Served::start(a_bad_afternoon());
    page.go(&served.url());
    page.until("it is live", "document.querySelector('#live').textContent == 'live'");
    let selected =
        page.text("getSelection().selectAllChildren(document.querySelector('#engine dd')); getSelection().toString()");
    assert!(selected.contains("connection refused"), "{selected}");
    served.change(|shown| {
        shown.now += Duration::from_mins(5);
        shown.detectors[0].rate = 77.7;
    });
    page.until("the change", "document.querySelector('#engine').textContent.includes('for 9 min')");
    page.until("another change", "document.querySelector('#detectors').textContent.includes('77.7')");
    assert_eq!(page.text("getSelection().toString()"), selected);
}

#[test]
fn axe_finds_nothing_to_complain_about_in_light_and_dark_on_a_desk_and_on_a_phone() {
    let Some(mut page) = Page::open("the accessibility of the status page") else { return };
    let Some(axe) = axe() else {
        return skipped("the accessibility of the status page", "no axe-core: scripts/test fetches it with npm");
    };
    let served = Served::start(a_bad_afternoon());
    for state in State::ALL {
        served.change(|shown| (shown.engine.state, shown.engine.advice) = (state, state.advice().into()));
        for (scheme, width) in [("light", DESK), ("dark", DESK), ("light", PHONE), ("dark", PHONE)] {
            page.scheme(scheme);
            page.size(width, HIGH);
            page.go(&served.url());
            page.until("it is live", "document.querySelector('#live').textContent == 'live'");
            let passed = violations(&mut page, &axe, &format!("{state:?} {scheme} {width}"));
            assert!(passed > 20, "{passed} rules were looked at");
        }
    }
    page.ask("document.body.className = 'stale'");
    violations(&mut page, &axe, "not live");
    page.ask("document.querySelector('#summary').style.color = 'rgb(60, 60, 60)'");
    let found = page.ask(AXE).to_string();
    assert!(found.contains("color-contrast"), "it would be found: {found}");
}

#[test]
fn everything_that_leads_somewhere_is_reached_by_the_keyboard_and_seen() {
    let Some(mut page) = Page::open("the status page by keyboard") else { return };
    let served = Served::start(a_bad_afternoon());
    for scheme in ["light", "dark"] {
        page.scheme(scheme);
        page.go(&served.url());
        page.until("it is live", "document.querySelector('#live').textContent == 'live'");
        let links = page.ask("[...document.querySelectorAll('a')].map((link) => link.getAttribute('href'))");
        let links: Vec<String> = serde_json::from_value(links).expect("texts");
        assert_eq!(links, ["metrics", "status", "readyz", "healthz"]);
        for (n, link) in links.iter().enumerate() {
            page.tab(false);
            assert_eq!(&page.text("document.activeElement.getAttribute('href') ?? ''"), link, "tab {n}");
            let outline = page.text(
                "(({ outlineStyle, outlineWidth }) => `${outlineStyle} ${outlineWidth}`)(getComputedStyle(document.activeElement))",
            );
            assert_eq!(outline, "solid 3px", "{scheme}: the focus is seen on {link}");
        }
        served.change(|shown| shown.detectors[0].pending += 1);
        let pending = served.shown.lock().expect("no panic").detectors[0].pending;
        page.until(
            "a change",
            &format!(
                "document.querySelector('#detectors').textContent.replaceAll('\\u202f', '').includes('{pending}')"
            ),
        );
        page.tab(true);
        assert_eq!(
            page.text("document.activeElement.getAttribute('href') ?? ''"),
            "readyz",
            "and backwards, from where it was"
        );
    }
}

#[test]
fn names_from_outside_are_text_and_break_nothing() {
    let Some(mut page) = Page::open("hostile names on the status page") else { return };
    let hostile = [
        "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>".to_owned(),
        "\" ' ` & &amp; --> ]]> \\ ${window.hacked = 1}".to_owned(),
        "\u{202e}gnp.nimda\u{202d} \u{2066}".to_owned(),
        "W".repeat(200),
        "two words ".repeat(20).trim_end().to_owned(),
        "كاميرا الباب الأمامي".to_owned(),
        "a\nb\tc\u{7}d\u{200b}".to_owned(),
        "🚪🚪🚪".to_owned(),
    ];
    let served = Served::start(a_bad_afternoon());
    page.go(&served.url());
    page.until("it is live", "document.querySelector('#live').textContent == 'live'");
    let rename = |shown: &mut Shown| {
        let row = shown.detectors[0].clone();
        shown.detectors = hostile
            .iter()
            .map(|name| Row { name: name.clone(), condition: Condition::Silent, ..row.clone() })
            .collect();
        shown.held = hostile.iter().map(|name| (name.clone(), name.clone(), name.clone())).collect();
        shown.host.clone_from(&hostile[3]);
        shown.engine.reason = hostile.join(" ");
    };
    served.change(rename);
    page.until("they come live", "document.querySelectorAll('#trouble li').length == 16");
    for way in ["live", "loaded"] {
        if way == "loaded" {
            page.go(&served.url());
        }
        assert_eq!(names(&mut page), hostile, "{way}");
        for width in [DESK, PHONE, NARROWEST] {
            page.size(width, HIGH);
            nothing_sticks_out(&mut page, width);
        }
        page.picture(&format!("hostile-{way}"));
        page.size(DESK, HIGH);
        assert_eq!(page.ask("typeof window.hacked"), "undefined", "{way}");
        assert_eq!(page.ask("document.querySelectorAll('img, script').length"), 1, "our script alone");
        let isolated = page
            .ask("[...document.querySelectorAll('bdi')].every((it) => getComputedStyle(it).unicodeBidi == 'isolate')");
        assert_eq!(isolated, true, "no name turns round what stands beside it");
        assert_eq!(page.complaints(), Vec::<String>::new(), "{way}");
    }
}

#[test]
fn it_is_readable_at_every_width_and_nothing_is_to_be_scrolled_sideways() {
    let Some(mut page) = Page::open("the status page at every width") else { return };
    let served = Served::start(a_bad_afternoon());
    page.go(&served.url());
    for width in [2560, 1440, DESK, 1024, 900, 865, 864, 768, 600, 430, PHONE, NARROWEST] {
        page.size(width, HIGH);
        nothing_sticks_out(&mut page, width);
    }
    page.size(PHONE, HIGH);
    let smallest = page.ask(
        "Math.min(...[...document.querySelectorAll('body *')].filter((it) => it.textContent && it.checkVisibility())
            .map((it) => parseFloat(getComputedStyle(it).fontSize)))",
    );
    assert!(smallest.as_f64().is_some_and(|pixels| pixels >= 13.0), "{smallest} pixels");
    // What the table's head says on a desk stands before each figure on a phone.
    let labels = page.ask(
        "[...document.querySelectorAll('#detectors tbody tr:first-child td')].map((it) => getComputedStyle(it, '::before').content)",
    );
    for label in ["Per second", "Delivery", "Waiting", "Last frame"] {
        assert!(labels.to_string().contains(label), "{label}: {labels}");
    }
}

#[test]
fn it_looks_only_and_its_policy_keeps_everything_else_out() {
    let Some(mut page) = Page::open("what the status page can do") else { return };
    let served = Served::start(a_bad_afternoon());
    page.go(&served.url());
    page.until("it is live", "document.querySelector('#live').textContent == 'live'");
    let acting = page.ask(
        "document.querySelectorAll('form, button, input, select, textarea, img, picture, video, audio, iframe, object, embed').length",
    );
    assert_eq!(acting, 0, "no images, no actions");
    assert_eq!(page.complaints(), Vec::<String>::new());
    for attempt in [
        "document.body.append(Object.assign(new Image(), { src: '/status' }))",
        "document.head.append(Object.assign(document.createElement('script'), { textContent: 'window.hacked = 1' }))",
        "document.body.setAttribute('style', 'color: red')",
        "fetch('http://127.0.0.1:9/').catch(() => {})",
    ] {
        page.go(&served.url());
        page.ask(&format!("{attempt}; 0"));
        page.until("the browser has turned", "new Promise((done) => setTimeout(() => done(true)))");
        let complaints = page.complaints().join("\n");
        assert!(complaints.contains("Content Security Policy"), "{attempt}: {complaints}");
    }
    assert_eq!(page.ask("typeof window.hacked"), "undefined");
}

#[test]
fn pictures_are_taken_to_be_looked_at() {
    let Some(mut page) = Page::open("pictures of the status page") else { return };
    let served = Served::start(a_bad_afternoon());
    for (name, scheme, width) in [
        ("light", "light", 1200),
        ("dark", "dark", 1200),
        ("phone-light", "light", 390),
        ("phone-dark", "dark", 390),
        ("tablet-light", "light", 820),
    ] {
        page.scheme(scheme);
        page.size(width, HIGH);
        page.go(&served.url());
        page.until("it is live", "document.querySelector('#live').textContent == 'live'");
        let picture = page.picture(name);
        assert!(fs::metadata(&picture).is_ok_and(|it| it.len() > 10_000), "{}", picture.display());
    }
}

// ---- what they look at

fn names(page: &mut Page) -> Vec<String> {
    let names = page.ask("[...document.querySelectorAll('#detectors tbody th')].map((it) => it.textContent)");
    serde_json::from_value(names).expect("names")
}

/// Whether the figure of this title begins so.
fn figure(title: &str, begin: &str) -> String {
    format!(
        "[...document.querySelectorAll('#figures dl > div')].some((it) => it.querySelector('dt').textContent == '{title}' \
         && it.querySelector('dd').textContent.startsWith('{begin}'))"
    )
}

#[track_caller]
fn nothing_sticks_out(page: &mut Page, width: u32) {
    let sticking = page.ask(
        "[...document.querySelectorAll('body *')].filter((it) => it.checkVisibility() && !it.closest('.unseen, thead')
            && (it.getBoundingClientRect().right > innerWidth + 0.5 || it.getBoundingClientRect().left < -0.5
                || it.scrollWidth > it.clientWidth + 1 && getComputedStyle(it).display != 'inline'))
            .map((it) => it.outerHTML.slice(0, 90))",
    );
    assert_eq!(sticking, serde_json::json!([]), "at {width}");
    assert_eq!(page.ask("document.documentElement.scrollWidth <= innerWidth"), true, "it scrolls sideways at {width}");
    assert_eq!(page.ask("innerWidth"), width);
}

/// Asks axe, which was brought in before.
const AXE: &str = "axe.run().then(({ violations, passes }) => ({ passed: passes.length, violations: \
    violations.map(({ id, nodes }) => [id, nodes.map((it) => [it.html, it.failureSummary])]) }))";

/// How many rules axe has looked at, none of which was violated.
#[track_caller]
fn violations(page: &mut Page, axe: &str, when: &str) -> u64 {
    page.ask(&format!("{axe}; 0"));
    let found = page.ask(AXE);
    assert_eq!(found["violations"], serde_json::json!([]), "{when}: {found:#}");
    found["passed"].as_u64().unwrap_or(0)
}

/// axe-core's one file, which `scripts/test` has fetched.
fn axe() -> Option<String> {
    fs::read_to_string(Path::new(env!("CARGO_TARGET_TMPDIR")).join("axe-core/axe.min.js")).ok()
}

/// The real admin server with figures of the test's own.
struct Served {
    runtime: Runtime,
    shown: Arc<Mutex<Shown>>,
    address: SocketAddr,
    stop: CancellationToken,
    ended: Option<tokio::task::JoinHandle<()>>,
}

impl Served {
    fn start(shown: Shown) -> Self {
        let mut served = Self {
            runtime: Runtime::new().expect("a runtime"),
            shown: Arc::new(Mutex::new(shown)),
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            stop: CancellationToken::new(),
            ended: None,
        };
        served.serve();
        served
    }

    /// Again, at the address that it had.
    fn serve(&mut self) {
        let listener = self.runtime.block_on(TcpListener::bind(self.address)).expect("the address is free");
        self.address = listener.local_addr().expect("an address");
        let shown = self.shown.clone();
        let view = View {
            metrics: Metrics::new(),
            alive: Box::new(|| Ok(())),
            ready: Box::new(Vec::new),
            status: Box::new(|| Value::Null),
            shown: Box::new(move || shown.lock().expect("no panic").clone()),
        };
        self.stop = CancellationToken::new();
        self.ended = Some(self.runtime.spawn(admin::serve(listener, Arc::new(view), self.stop.clone())));
    }

    fn stop(&mut self) {
        self.stop.cancel();
        let ended = self.ended.take().expect("it serves");
        self.runtime.block_on(ended).expect("no panic");
    }

    fn change(&self, change: impl FnOnce(&mut Shown)) {
        change(&mut self.shown.lock().expect("no panic"));
    }

    fn url(&self) -> String {
        format!("http://{}/", self.address)
    }
}

/// A site in the worst hour of its year: an outage that goes on, a silent camera, a share that is gone, and dead letters.
fn a_bad_afternoon() -> Shown {
    let now: Timestamp = "2026-11-23T16:42:10Z".parse().expect("a time");
    let ago = |seconds| now - Duration::from_secs(seconds);
    let detectors = [
        ("Cash desk 1", Condition::Well, 3.0, 5),
        ("Cash desk 2", Condition::Well, 2.4, 9),
        ("Front door", Condition::Well, 7.5, 1),
        ("Garage", Condition::Held, 2.0, 1_320),
        ("Gate 4", Condition::Well, 1.4, 3),
        ("Loading dock", Condition::Silent, 0.8, 2_710),
        ("Lobby", Condition::Well, 4.6, 1),
        ("Old reception", Condition::Gone, 0.0, 90_000),
    ];
    let detector = |(n, (name, condition, rate, last)): (usize, (&str, Condition, f64, u64))| {
        let hour = hour(n, rate, last);
        Row {
            name: name.into(),
            condition,
            alarm: Some(Duration::from_mins(15)),
            rate: 0.0,
            delivery: (condition != Condition::Gone).then(|| Duration::from_millis(140 + 13 * n as u64)),
            pending: if condition == Condition::Well {
                hour.last().map_or(0, |step| i64::try_from(step.pending).unwrap_or(0))
            } else {
                0
            },
            last_frame: Some(ago(last)),
            published: 41_873 * (n as u64 + 1),
            hour,
        }
    };
    Shown {
        version: "0.1.0".into(),
        host: "edge-07".into(),
        uptime: Duration::from_hours(24 * 19 + 7),
        now,
        engine: EngineStatus {
            state: State::Unreachable,
            since: ago(250),
            reason: "cannot connect to https://10.0.0.123:5009: connection refused".into(),
            advice: State::Unreachable.advice().into(),
            concurrency_limit: 1,
            in_flight: 1,
            waiting: 312,
            token_expires: Some(now + Duration::from_mins(43)),
            clock_skew_seconds: Some(0.12),
            insecure: false,
        },
        detectors: detectors.into_iter().enumerate().map(detector).collect(),
        held: vec![(
            "Garage".into(),
            "/srv/cameras/garage".into(),
            "the directory is gone: is the share mounted?".into(),
        )],
        spool: Some((1_204, 49 << 20)),
        dead_letters: (85, 3 << 20),
        dead_lettered: vec![
            (Reason::Unsupported, 12),
            (Reason::Truncated, 4),
            (Reason::Rejected, 69),
            (Reason::Forbidden, 0),
        ],
    }
}

/// One detector's hour: busy and quiet times, an outage of four minutes in its middle that was caught up with, and one now.
fn hour(n: usize, rate: f64, last: u64) -> Vec<Sample> {
    let mut random = fastrand::Rng::with_seed(n as u64);
    let mut waiting = 0.0_f64;
    let mut step = |at: usize| {
        let busy = 1.0 + 0.5 * (at as f64 / 17.0 + n as f64).sin() + 0.3 * (random.f64() - 0.5);
        let heard = (STEPS - at) as u64 * 30 > last;
        let came = if heard { (30.0 * rate * busy).round() } else { 0.0 };
        let away = (48..56).contains(&at) || at > 111;
        let published = if away { 0.0 } else { (waiting + came).min(30.0 * rate * 2.2) };
        waiting += came - published;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small and not negative")]
        Sample { published: published as u64, pending: waiting as u64, delivery_max: Duration::ZERO }
    };
    (0..STEPS).map(&mut step).collect()
}
