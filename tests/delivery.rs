//! Frames on their way from real drop directories through the real binary to a strict engine that misbehaves to order:
//! the guarantee of DESIGN §5 under the rows of FAULTS.md section C.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant, SystemTime};

use framegate::simulator::{Certificate, busiest};
use serde_json::Value;

use support::engine::{Engine, Hash, arrivals, hash, image, nothing_lost, put_face};
use support::{Action, Daemon, PATIENCE, Reply, Samples, Site, eventually, put};

/// A frame that is retried in an outage is tried again soon enough for a test.
const QUICK: &str = "[publish]\nbackoff_min = \"20ms\"\nbackoff_max = \"500ms\"\nmax_in_flight = 16";

fn quick_site(engine: &Engine) -> Site {
    Site::new(&engine.base_url()).section(QUICK)
}

fn feed(site: &Site, detectors: &[&str], numbers: std::ops::Range<u64>) -> Vec<Hash> {
    let dirs: Vec<_> = detectors.iter().map(|name| site.drop_dir(name)).collect();
    numbers.zip(dirs.iter().cycle()).map(|(n, dir)| put_face(dir, n)).collect()
}

fn hex(hash: &Hash) -> String {
    hash.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// Waits until the engine is in this state by the metrics.
#[track_caller]
fn until_state(daemon: &Daemon<'_>, state: &str) {
    let label = format!("state=\"{state}\"");
    eventually(&format!("the engine is {state}"), PATIENCE, || {
        (daemon.metrics().count("framegate_engine_state", &label) == 1).then_some(())
    });
}

fn dead_letters(samples: &Samples) -> i64 {
    samples.count("framegate_frames_dead_lettered_total", "")
}

fn letters(site: &Site) -> Vec<(Value, Vec<u8>)> {
    let mut letters = Vec::new();
    for entry in fs::read_dir(site.dead_letters()).unwrap().flatten() {
        if entry.path().extension().is_some_and(|it| it == "json") {
            let json = serde_json::from_slice(&fs::read(entry.path()).unwrap()).unwrap();
            letters.push((json, fs::read(entry.path().with_extension("image")).unwrap()));
        }
    }
    letters
}

#[test]
fn three_thousand_frames_of_three_detectors_arrive_once_each_byte_for_byte_under_their_own_name_zone_and_time() {
    let engine = Engine::start();
    let cameras = [("FrontDoorCam", "America/Los_Angeles"), ("Café \"Lobby\" №7", "Europe/Zurich"), ("Gate\\3", "UTC")];
    let site = cameras.iter().fold(Site::new(&engine.base_url()), |site, (name, zone)| site.detector(name, zone, ""));
    let mut expected = BTreeMap::new();
    let feed = |numbers: std::ops::Range<u64>,
                expected: &mut BTreeMap<Hash, (String, String, Option<jiff::Timestamp>)>| {
        for n in numbers {
            let (name, zone) = cameras[usize::try_from(n).unwrap() % cameras.len()];
            let hash = put_face(&site.drop_dir(name), n);
            let path = site.drop_dir(name).join(format!("{n:07}.jpg"));
            let detected = SystemTime::now() - Duration::from_hours(1) + Duration::from_millis(n);
            // It may be gone already; then its time is what it was.
            let modified = fs::File::options().write(true).open(&path).and_then(|file| {
                file.set_modified(detected)?;
                file.metadata()?.modified()
            });
            let time = modified.ok().map(|at| {
                let millis = jiff::Timestamp::try_from(at).unwrap().as_millisecond();
                jiff::Timestamp::from_millisecond(millis).unwrap()
            });
            expected.insert(hash, (name.to_owned(), zone.to_owned(), time));
        }
    };
    feed(0..1500, &mut expected);
    let mut daemon = site.run();
    for n in 1500..3000 {
        let (name, zone) = cameras[usize::try_from(n).unwrap() % cameras.len()];
        expected.insert(put_face(&site.drop_dir(name), n), (name.to_owned(), zone.to_owned(), None));
    }
    engine.until_accepted(3000);
    let samples = daemon.idle(PATIENCE);
    let written: Vec<Hash> = expected.keys().copied().collect();
    assert_eq!(nothing_lost(&[&engine], &written), 0, "came twice");
    for frame in engine.accepted() {
        let (name, zone, time) = &expected[&frame.sha256];
        assert_eq!((&frame.detector, &frame.zone), (name, zone));
        assert!(time.is_none_or(|time| time == frame.time), "{time:?} but {}", frame.time);
    }
    assert_eq!((engine.counts().authenticate, engine.counts().renew), (1, 0));
    assert_eq!(samples.count("framegate_frames_published_total", ""), 3000);
    assert_eq!(samples.count("framegate_publish_attempts_total", "result=\"200\""), 3000);
}

#[test]
fn c1_with_three_errors_in_ten_answers_nothing_is_lost_doubled_or_dead_lettered() {
    let engine = Engine::start();
    engine.change(|faults| {
        faults.error_rate = 0.3;
        faults.error_statuses = vec![500, 502, 503];
    });
    let site = quick_site(&engine).detector("A", "UTC", "").detector("B", "UTC", "");
    let written = feed(&site, &["A", "B"], 0..600);
    let mut daemon = site.run();
    let samples = daemon.idle(Duration::from_mins(1));
    assert_eq!(nothing_lost(&[&engine], &written), 0, "came twice");
    assert_eq!(dead_letters(&samples), 0);
    assert!(samples.count("framegate_publish_retries_total", "") > 100);
}

#[test]
fn c1_an_outage_of_500s_pauses_the_engine_with_few_attempts_and_charges_no_frame() {
    let engine = Engine::start();
    engine.change(|faults| faults.answer_all = Some(500));
    let site = quick_site(&engine).detector("A", "UTC", "");
    let written = feed(&site, &["A"], 0..100);
    let mut daemon = site.run();
    until_state(&daemon, "failing");
    let began = (Instant::now(), engine.counts().publish);
    eventually("some probes were made", PATIENCE, || (engine.counts().publish >= began.1 + 4).then_some(()));
    let rate = 4.0 / began.0.elapsed().as_secs_f64();
    assert!(rate < 100.0, "{rate} attempts per second while the engine fails");
    engine.change(|faults| faults.answer_all = None);
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert_eq!(dead_letters(&samples), 0);
}

#[test]
fn c2_retry_after_pauses_the_whole_engine_for_as_long_as_it_asked() {
    let engine = Engine::start();
    engine.script([Action::Answer(Reply {
        status: 429,
        headers: vec![("retry-after".into(), "2".into())],
        body: String::new(),
    })]);
    let site = quick_site(&engine).detector("A", "UTC", "");
    let written = feed(&site, &["A"], 0..20);
    let mut daemon = site.run();
    until_state(&daemon, "throttled");
    let refused_at = Instant::now();
    engine.until_accepted(1);
    assert!(refused_at.elapsed() > Duration::from_millis(1500), "{:?}", refused_at.elapsed());
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}

#[test]
fn c3_tokens_that_live_four_seconds_are_renewed_ahead_of_time_and_no_frame_notices() {
    let engine = Engine::with(|options| options.faults.token_ttl = Duration::from_secs(4));
    let site = quick_site(&engine).section("rate = 60").detector("A", "UTC", "");
    let written = feed(&site, &["A"], 0..540);
    let mut daemon = site.run();
    let samples = daemon.idle(PATIENCE);
    let counts = engine.counts();
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert_eq!(counts.authenticate, 1, "logins");
    assert!(counts.renew >= 2, "{} renewals", counts.renew);
    assert_eq!(samples.count("framegate_publish_attempts_total", "result=\"401\""), 0);
}

#[test]
fn c3_all_tokens_revoked_under_load_cost_one_login_and_nothing_else() {
    let engine = Engine::with(|options| options.faults.latency = Duration::from_millis(20));
    let site = quick_site(&engine).detector("A", "UTC", "");
    let written = feed(&site, &["A"], 0..600);
    let mut daemon = site.run();
    engine.until_accepted(100);
    engine.revoke_all_tokens();
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert_eq!(engine.counts().authenticate, 2, "one login more");
    assert_eq!(dead_letters(&samples), 0);
}

#[test]
fn c4_a_refused_login_pauses_with_few_tries_and_heals() {
    let engine = Engine::with(|options| options.faults.login_status = Some(401));
    let site = quick_site(&engine).detector("A", "UTC", "");
    let written = feed(&site, &["A"], 0..50);
    let mut daemon = site.run();
    until_state(&daemon, "credentials");
    assert!(engine.counts().authenticate <= 2, "{} logins", engine.counts().authenticate);
    assert_eq!(engine.counts().publish, 0);
    // A reload says that somebody has mended it.
    engine.change(|faults| faults.login_status = None);
    assert!(site.command(&["reload"]).status().unwrap().success());
    let reloaded = eventually("published or still paused", PATIENCE, || {
        (engine.counts().accepted == 50 || engine.counts().authenticate <= 2).then(|| engine.counts().accepted)
    });
    if reloaded < 50 {
        // Nothing changed in the configuration: the next try is due within half a minute.
        eventually("the next login", Duration::from_secs(45), || (engine.counts().accepted == 50).then_some(()));
    }
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}

#[test]
fn c7_a_403_for_every_frame_pauses_forbidden_and_dead_letters_none() {
    let engine = Engine::start();
    engine.change(|faults| faults.answer_all = Some(403));
    let site = quick_site(&engine).detector("A", "UTC", "").detector("B", "UTC", "");
    let written = feed(&site, &["A", "B"], 0..200);
    let mut daemon = site.run();
    until_state(&daemon, "forbidden");
    let before = engine.counts().publish;
    eventually("some probes", PATIENCE, || (engine.counts().publish >= before + 5).then_some(()));
    assert_eq!(daemon.metrics().count("framegate_dead_letters", ""), 0);
    engine.change(|faults| faults.answer_all = None);
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert_eq!(dead_letters(&samples), 0);
}

#[test]
fn c8_a_403_for_one_detector_of_three_dead_letters_its_frames_and_lets_the_others_flow() {
    let engine = Engine::start();
    engine.forbid_detector("B");
    let site = quick_site(&engine).detector("A", "UTC", "").detector("B", "UTC", "").detector("C", "UTC", "");
    let good: Vec<Hash> = (0..300).map(|n| put_face(&site.drop_dir(["A", "C"][n % 2]), n as u64)).collect();
    let bad = feed(&site, &["B"], 1000..1020);
    let mut daemon = site.run();
    let mut next = 2000;
    let mut more = Vec::new();
    eventually("the other detectors' frames show that it is this one", Duration::from_mins(1), || {
        more.push(put_face(&site.drop_dir("A"), next));
        next += 1;
        (daemon.metrics().count("framegate_dead_letters", "") == 20).then_some(())
    });
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &[good, more].concat()), 0);
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", "detector=\"B\""), 20);
    let kept: Vec<Hash> = letters(&site)
        .iter()
        .map(|(json, image)| {
            assert_eq!(
                (&json["reason"], &json["status"], &json["detector"]),
                (&"forbidden".into(), &403.into(), &"B".into())
            );
            hash(image)
        })
        .collect();
    assert!(bad.iter().all(|hash| kept.contains(hash)));
}

#[test]
fn c8_frames_that_are_always_refused_become_dead_letters_with_all_that_is_known_and_no_other_does() {
    let engine = Engine::start();
    let site = quick_site(&engine).detector("A", "Europe/Zurich", "");
    let bad: Vec<Hash> = [7, 57, 107, 157].map(|n| hash(&image(n))).into();
    engine.change(|faults| faults.by_image = bad.iter().map(|hash| (hex(hash), 400)).collect());
    let written = feed(&site, &["A"], 0..200);
    let mut daemon = site.run();
    let mut next = 1000;
    let mut more = Vec::new();
    eventually("four dead letters", Duration::from_mins(1), || {
        more.push(put_face(&site.drop_dir("A"), next));
        next += 1;
        (daemon.metrics().count("framegate_dead_letters", "") == 4).then_some(())
    });
    let samples = daemon.idle(PATIENCE);
    let good: Vec<Hash> = written.into_iter().filter(|hash| !bad.contains(hash)).chain(more).collect();
    assert_eq!(nothing_lost(&[&engine], &good), 0);
    assert_eq!(dead_letters(&samples), 4);
    let kept = letters(&site);
    assert_eq!(kept.len(), 4);
    for (json, image) in kept {
        assert!(bad.contains(&hash(&image)), "{json}");
        for key in [
            "id",
            "detector",
            "time_zone",
            "detect_time_utc",
            "reason",
            "status",
            "message",
            "source",
            "original_name",
            "attempts",
            "received_at",
            "died_at",
        ] {
            assert!(!json[key].is_null(), "{key}: {json}");
        }
        assert_eq!(
            (&json["reason"], &json["status"], &json["time_zone"]),
            (&"rejected".into(), &400.into(), &"Europe/Zurich".into())
        );
        assert!(json["original_name"].as_str().unwrap().ends_with("7.jpg"), "{json}");
    }
}

#[test]
fn c9_redirects_are_not_followed_and_no_token_leaves() {
    let (engine, other) = (Engine::start(), Engine::start());
    let site = quick_site(&engine).detector("A", "UTC", "");
    let mut daemon = site.run();
    engine.until_accepted(0);
    let mut written = feed(&site, &["A"], 0..10);
    engine.until_accepted(10);
    for (n, status) in [302_u16, 307, 308].into_iter().enumerate() {
        let location = format!("{}/api/v1/faceEdge/publish", other.base_url());
        engine.change(|faults| faults.redirect = Some(framegate::simulator::Redirect { status, location }));
        let from = 100 * (n as u64 + 1);
        written.extend(feed(&site, &["A"], from..from + 10));
        until_state(&daemon, "unexpected-answer");
        engine.change(|faults| faults.redirect = None);
        until_state(&daemon, "open");
    }
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert_eq!((other.counts().connections, dead_letters(&samples)), (0, 0));
}

#[test]
fn c10_a_captive_portal_settles_nothing() {
    let engine = Engine::start();
    let site = quick_site(&engine).detector("A", "UTC", "");
    let mut daemon = site.run();
    let mut written = feed(&site, &["A"], 0..10);
    engine.until_accepted(10);
    engine.change(|faults| faults.portal = true);
    written.extend(feed(&site, &["A"], 10..60));
    until_state(&daemon, "unexpected-answer");
    assert!(daemon.get("/readyz").unwrap().0 == 200, "keeping frames is the daemon's work");
    engine.change(|faults| faults.portal = false);
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert_eq!(dead_letters(&samples), 0);
}

#[test]
fn c11_a_400_for_everything_pauses_rejecting_and_dead_letters_none() {
    let engine = Engine::start();
    engine.change(|faults| faults.answer_all = Some(400));
    let site = quick_site(&engine).detector("A", "UTC", "").detector("B", "UTC", "");
    let written = feed(&site, &["A", "B"], 0..100);
    let mut daemon = site.run();
    until_state(&daemon, "rejecting");
    engine.change(|faults| faults.answer_all = None);
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert_eq!(dead_letters(&samples), 0);
}

#[test]
fn c13_c14_connections_cut_before_and_after_a_frame_was_taken_double_only_what_lost_its_answer() {
    let engine = Engine::start();
    engine.change(|faults| (faults.cut_before, faults.cut_after) = (0.05, 0.05));
    let site = quick_site(&engine).detector("A", "UTC", "");
    let written = feed(&site, &["A"], 0..400);
    let mut daemon = site.run();
    let samples = daemon.idle(Duration::from_mins(1));
    let doubled = nothing_lost(&[&engine], &written);
    let ambiguous = samples.count("framegate_publish_ambiguous_total", "");
    assert!(doubled > 0, "some answers were lost");
    assert!(
        i64::try_from(doubled).unwrap() <= ambiguous,
        "{doubled} came twice, {ambiguous} were said to be ambiguous"
    );
    assert_eq!(dead_letters(&samples), 0);
}

#[test]
fn c16_answers_that_never_end_are_cut_off_and_the_memory_stays_flat() {
    let engine = Engine::start();
    engine.script([Action::Trickle, Action::EndlessHeaders, Action::Flood, Action::Hang]);
    let site = quick_site(&engine).engine_keys("timeout = \"1s\"\nconnect_timeout = \"1s\"").detector("A", "UTC", "");
    let written = feed(&site, &["A"], 0..20);
    let mut daemon = site.run();
    daemon.idle(Duration::from_mins(1));
    assert!(nothing_lost(&[&engine], &written) <= 4);
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let peak: u64 =
        status.lines().find(|l| l.starts_with("VmHWM")).unwrap().split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(peak < 200_000, "{peak} KiB at the most");
}

#[test]
fn c19_an_engine_that_closes_idle_connections_after_a_second_costs_no_frame() {
    let engine = Engine::with(|options| options.idle = Duration::from_secs(1));
    let site = quick_site(&engine).detector("A", "UTC", "");
    let mut daemon = site.run();
    let mut written = Vec::new();
    for round in 0..4 {
        written.extend(feed(&site, &["A"], round * 10..round * 10 + 10));
        engine.until_accepted((round + 1) * 10);
        // The engine's side closes what is idle; ours must have noticed when the next frames come.
        eventually("no connection is open", PATIENCE, || (engine.counts().open == 0).then_some(()));
    }
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert_eq!(dead_letters(&samples), 0);
}

#[test]
fn c21_pins_and_certificate_authorities_are_kept_and_insecurity_is_only_by_name_and_shown() {
    let engine = Engine::with(|options| options.tls = Some(Certificate::Good));
    let ca = |site: &Site| {
        let path = site.path().join("ca.pem");
        fs::write(&path, engine.ca_pem().unwrap()).unwrap();
        path
    };
    let pin = engine.pin().unwrap();
    let wrong = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    let mut n = 0;
    for (keys, good) in [
        ("ca_file = \"ca.pem\"".to_owned(), true),
        (format!("pin_sha256 = [\"{pin}\"]"), true),
        (format!("pin_sha256 = [\"{wrong}\"]"), false),
        (String::new(), false),
        ("danger_accept_invalid_certs = true".to_owned(), true),
    ] {
        let site = quick_site(&engine).engine_keys(&keys).detector("A", "UTC", "");
        ca(&site);
        let before = engine.counts();
        let written = feed(&site, &["A"], n..n + 5);
        n += 5;
        let mut daemon = site.run();
        if good {
            daemon.idle(PATIENCE);
            let arrived = arrivals(&[&engine]);
            assert!(written.iter().all(|hash| arrived.contains_key(hash)), "{keys}");
        } else {
            until_state(&daemon, "unexpected-answer");
            assert_eq!(
                (engine.counts().authenticate, engine.counts().publish),
                (before.authenticate, before.publish),
                "{keys}"
            );
            let (_, status) = daemon.get("/status").unwrap();
            assert!(status.contains("ertificate"), "{status}");
        }
        assert_eq!(daemon.metrics().count("framegate_engine_insecure", "") == 1, keys.contains("danger"), "{keys}");
    }
}

#[test]
fn c23_an_outage_loses_nothing_makes_few_attempts_and_ends_with_the_freshest_frame() {
    let engine = Engine::start();
    let site = quick_site(&engine).section("rate = 500").detector("A", "UTC", "");
    let mut daemon = site.run();
    let mut written = feed(&site, &["A"], 0..50);
    engine.until_accepted(50);
    engine.down();
    written.extend(feed(&site, &["A"], 50..51));
    until_state(&daemon, "unreachable");
    written.extend(feed(&site, &["A"], 51..2000));
    let last = put_face(&site.drop_dir("A"), 9999);
    written.push(last);
    let attempts = daemon.metrics().count("framegate_publish_attempts_total", "result=\"connect\"");
    assert!(attempts < 200, "{attempts} attempts while nobody answers");
    eventually("the last frame has been noticed", PATIENCE, || {
        (daemon.metrics().count("framegate_frames_received_total", "") >= 2001).then_some(())
    });
    engine.up();
    let up = Instant::now();
    engine.until_accepted(51);
    assert!(up.elapsed() < Duration::from_secs(5), "{:?}", up.elapsed());
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert_eq!(dead_letters(&samples), 0);
    let order: Vec<Hash> = engine.accepted().iter().map(|frame| frame.sha256).collect();
    let place = order.iter().position(|hash| *hash == last).unwrap();
    assert!(place < 50 + 200, "the freshest came as number {place}");
    let busiest = busiest(&engine.arrivals(), Duration::from_secs(1));
    assert!(busiest <= 1000, "{busiest} requests in a second, where rate and burst are 500");
}

#[test]
fn no_window_has_more_requests_than_rate_and_burst_allow_logins_and_retries_among_them() {
    let engine = Engine::start();
    engine.change(|faults| faults.error_rate = 0.2);
    let site = quick_site(&engine).section("rate = 40\nburst = 10").detector("A", "UTC", "rate = 30");
    let written = feed(&site, &["A"], 0..100);
    let mut daemon = site.run();
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    for (window, most) in [(1.0, 50), (2.0, 90)] {
        let busiest = busiest(&engine.arrivals(), Duration::from_secs_f64(window));
        assert!(busiest <= most + 2, "{busiest} requests in {window} s");
    }
}

#[test]
fn c24_a_detector_whose_frames_are_all_refused_slows_no_other() {
    let engine = Engine::start();
    engine.change(|faults| faults.by_detector.insert("Bad".into(), 400).map_or((), drop));
    let site = quick_site(&engine).detector("Bad", "UTC", "").detector("Good", "UTC", "");
    feed(&site, &["Bad"], 0..300);
    let good = feed(&site, &["Good"], 1000..1500);
    let daemon = site.run();
    engine.until_accepted(500);
    let arrived = arrivals(&[&engine]);
    assert!(good.iter().all(|hash| arrived.contains_key(hash)));
    assert_eq!(daemon.metrics().count("framegate_frames_published_total", "detector=\"Good\""), 500);
}

#[test]
fn a26_what_is_no_whole_image_becomes_a_dead_letter_and_every_kind_of_image_passes() {
    let engine = Engine::start();
    let keys = "directory.include = [\"*\"]\ndirectory.quiet = \"50ms\"\ndirectory.partial_timeout = \"300ms\"";
    let site = quick_site(&engine).detector("A", "UTC", keys);
    let dir = site.drop_dir("A");
    let whole = image(1);
    put(&dir, "text.jpg", b"not an image at all");
    put(&dir, "cut.jpg", &whole[..whole.len() / 2]);
    put(&dir, "empty.jpg", b"");
    put(&dir, "one.png", &[0x89]);
    let mut bmp = b"BM".to_vec();
    bmp.extend(58_u32.to_le_bytes());
    bmp.extend([0; 4]);
    bmp.extend(54_u32.to_le_bytes());
    bmp.extend(40_u32.to_le_bytes());
    bmp.extend(1_i32.to_le_bytes());
    bmp.extend(1_i32.to_le_bytes());
    bmp.extend([1, 0, 24, 0]);
    bmp.extend([0; 24]);
    bmp.extend([0; 4]);
    put(&dir, "picture.bmp", &bmp);
    put(&dir, "photo.jpeg", &whole);
    let mut daemon = site.run();
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &[hash(&whole), hash(&bmp)]), 0);
    let count = |reason: &str| samples.count("framegate_frames_dead_lettered_total", &format!("reason=\"{reason}\""));
    assert_eq!((count("unsupported"), count("truncated")), (1, 3));
}

#[test]
fn a_path_prefix_in_the_base_url_is_kept() {
    let engine = Engine::with(|options| options.prefix = "/identities".into());
    assert!(engine.base_url().ends_with("/identities"));
    let site = Site::new(&engine.base_url()).detector("A", "UTC", "");
    let written = feed(&site, &["A"], 0..5);
    site.run().idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}
