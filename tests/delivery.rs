//! From drop directories to the engine, through the real binary, in every trouble that an engine can make. FAULTS.md section C, and A26.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use framegate::simulator::{Arrival, Call, Certificate, Redirect, busiest};
use serde_json::Value;

use support::engine::{Camera, Engine, Hash, hash, image, nothing_lost, put_face};
use support::{Action, Daemon, PATIENCE, Reply, Samples, Site, eventually, put};

/// How long a fault lasts, where the time itself is the point.
const A_WHILE: Duration = Duration::from_secs(4);
/// Requests while the engine is paused for [`A_WHILE`], with the short back-off of [`site`]: a probe every second or so.
const FEW: u64 = 15;
/// What lies between two tries of a login that is refused, at least (`pause::LOGIN_BACKOFF`).
const LOGINS_APART: Duration = Duration::from_secs(30);
/// What the queue lets a detector have in hand before its first attempt (`queue::AHEAD_MAX`).
const AHEAD: u64 = 16;

// ---- nothing is wrong

#[test]
fn three_detectors_and_three_thousand_frames_arrive_exactly_once_each_with_its_own_name_zone_and_time() {
    const DETECTORS: [(&str, &str); 3] =
        [("Café \"Lobby\" №7", "Europe/Paris"), ("Front\\Door", "America/Los_Angeles"), ("裏口", "Asia/Tokyo")];
    let engine = Engine::start();
    let mut site = site(&engine);
    for (name, zone) in DETECTORS {
        site = site.detector(name, zone, "");
    }
    // The first half is there before the daemon.
    let now = SystemTime::now();
    let mut expected = BTreeMap::new();
    let mut write = |numbers: std::ops::Range<u64>| {
        for n in numbers {
            let (name, zone) = DETECTORS[usize::try_from(n % 3).unwrap()];
            let time = now - Duration::from_micros(n * 1_234_567 + 999);
            let image = image(n);
            put_of_time(&site.drop_dir(name), &format!("{n}.jpg"), &image, time);
            let millis = i64::try_from(time.duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap();
            expected.insert(hash(&image), (name.to_owned(), zone.to_owned(), millis));
        }
    };
    write(0..1500);
    let mut daemon = site.run();
    write(1500..3000);
    let samples = daemon.idle(PATIENCE);

    let accepted = engine.accepted();
    assert_eq!(accepted.len(), 3000, "each once");
    let arrived: BTreeMap<_, _> =
        accepted.into_iter().map(|it| (it.sha256, (it.detector, it.zone, it.time.as_millisecond()))).collect();
    assert_eq!(arrived, expected);
    engine.contract_held();
    let counts = engine.counts();
    assert_eq!((counts.authenticate, counts.renew, counts.publish), (1, 0, 3000));
    assert_eq!(samples.count("framegate_frames_received_total", "source=\"directory\""), 3000);
    assert_eq!(samples.count("framegate_frames_published_total", r#"detector="Café \"Lobby\" №7""#), 1000);
    assert_eq!(samples.count("framegate_publish_attempts_total", "result=\"200\""), 3000);
    assert_eq!(samples.count("framegate_memory_in_use_bytes", ""), 0);
    assert_eq!(samples.count("framegate_frames_in_flight", ""), 0);
    assert!(daemon.stop().success());
}

// ---- errors

#[test]
fn c1_with_thirty_per_cent_of_errors_every_frame_is_published_once_and_none_is_a_dead_letter() {
    let engine = Engine::with(|options| options.faults.error_rate = 0.3);
    let site = site(&engine).detector("Lobby", "UTC", "").detector("Door", "UTC", "");
    let mut daemon = site.run();
    let written = put_faces(&site, &["Lobby", "Door"], 0..1000);
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0, "came twice");
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
    let retries: i64 = ["server-error", "transient"].iter().map(|it| retries(&samples, it)).sum();
    assert!((300..650).contains(&retries), "{retries} retries of 1000 frames");
    assert_eq!(samples.count("framegate_publish_ambiguous_total", ""), 0);
}

#[test]
fn c1_when_everything_fails_publishing_pauses_with_few_attempts_and_then_goes_on() {
    let engine = Engine::with(|options| options.faults.answer_all = Some(503));
    let site = site(&engine).detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let written = put_faces(&site, &["Lobby"], 0..300);
    until_state(&daemon, "failing");
    few_attempts_and_no_dead_letters(&engine, &daemon, FEW);
    engine.change(|faults| faults.answer_all = None);
    all_published_once(&engine, &mut daemon, &written);
}

#[test]
fn c2_a_retry_after_is_honoured_in_seconds_and_as_a_date_and_garbage_stops_nothing() {
    let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(6));
    for (text, pause) in [("2", 2), (date.as_str(), 2), ("soon", 0), ("-7", 0)] {
        let engine = Engine::start();
        let site = site(&engine).detector("Lobby", "UTC", "");
        let mut daemon = site.run();
        let headers = vec![("Retry-After".to_owned(), text.to_owned())];
        engine.script([Action::Answer(Reply { status: 429, headers, body: String::new() })]);
        let written = put_faces(&site, &["Lobby"], 0..20);
        if pause > 0 {
            until_state(&daemon, "throttled");
        }
        all_published_once(&engine, &mut daemon, &written);
        let publishes = publishes(&engine);
        let waited = publishes[1].at - publishes[0].at;
        // The date names whole seconds, and the daemon took some to start.
        assert!(waited >= Duration::from_secs(pause), "{text}: tried again after {waited:?}");
    }
}

#[test]
fn c2_a_throttling_engine_gets_what_it_takes_and_loses_nothing() {
    let engine = Engine::with(|options| {
        options.faults.rate = Some(100.0);
        options.faults.retry_after = Some("1".into());
    });
    let site = site(&engine).detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let written = put_faces(&site, &["Lobby"], 0..100);
    all_published_once(&engine, &mut daemon, &written);
}

#[test]
fn c8_one_frame_that_is_always_refused_is_a_dead_letter_and_the_others_flow() {
    const REFUSED: [(u64, u16, &str); 6] = [
        (3, 400, "rejected"),
        (50, 413, "rejected"),
        (51, 415, "rejected"),
        (90, 422, "rejected"),
        (120, 403, "forbidden"),
        (150, 500, "server-error"),
    ];
    let engine = Engine::with(|options| {
        let by_image = REFUSED.iter().map(|(n, status, _)| (hex(&hash(&image(*n))), *status));
        options.faults.by_image = by_image.collect();
    });
    let site = Site::new(&engine.base_url())
        .section("[publish]\nattempts = 3\nbackoff_max = \"500ms\"")
        .detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let mut written = put_faces(&site, &["Lobby"], 0..300);
    written.extend(feed_until_settled(&engine, &site, &mut daemon, "Lobby"));
    for (n, status, reason) in REFUSED {
        let image = image(n);
        written.retain(|it| *it != hash(&image));
        let letter = letters(&site).into_iter().find(|it| it["original_name"] == format!("{n:07}.jpg"));
        let letter = letter.unwrap_or_else(|| panic!("no dead letter of frame {n}"));
        assert_eq!((&letter["reason"], &letter["status"]), (&reason.into(), &status.into()), "{letter}");
        assert_eq!(image_of(&site, &letter), image);
    }
    assert_eq!(letters(&site).len(), REFUSED.len());
    assert_eq!(nothing_lost(&[&engine], &written), 0, "came twice");
}

#[test]
fn c8_without_the_permission_for_one_detector_its_frames_are_dead_letters_and_the_others_flow() {
    let engine = Engine::start();
    let site = site(&engine).detector("Lobby", "UTC", "").detector("Forbidden", "UTC", "").detector("Door", "UTC", "");
    engine.forbid_detector("Forbidden");
    let mut daemon = site.run();
    let mut written = put_faces(&site, &["Lobby", "Door"], 0..600);
    let forbidden: BTreeSet<Hash> = put_faces(&site, &["Forbidden"], 1000..1030).into_iter().collect();
    written.extend(feed_until_settled(&engine, &site, &mut daemon, "Lobby"));
    assert_eq!(nothing_lost(&[&engine], &written), 0, "came twice");
    let letters = letters(&site);
    assert!(
        letters.iter().all(|it| it["detector"] == "Forbidden" && it["reason"] == "forbidden" && it["status"] == 403)
    );
    let dead: BTreeSet<Hash> = letters.iter().map(|it| hash(&image_of(&site, it))).collect();
    assert!(dead == forbidden, "{} dead letters of {}", dead.len(), forbidden.len());
    let samples = daemon.metrics();
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", "reason=\"forbidden\""), 30);
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", "detector=\"Forbidden\""), 30);
}

#[test]
fn c8_of_one_per_cent_refused_for_their_content_exactly_those_are_dead_letters_that_say_everything() {
    const SHARE: f64 = 0.01;
    let engine = Engine::with(|options| options.faults.refuse_share = SHARE);
    let name = "Café \"Lobby\" №7";
    let site = site(&engine).detector(name, "Europe/Paris", "");
    let begun = jiff::Timestamp::now();
    let mut daemon = site.run();
    let mut written = put_faces(&site, &[name], 0..1500);
    written.extend(feed_until_settled(&engine, &site, &mut daemon, name));
    let (refused, good): (Vec<Hash>, Vec<Hash>) = written.iter().partition(|it| is_refused(it, SHARE));
    assert!(refused.len() > 5, "the share was met");
    assert_eq!(nothing_lost(&[&engine], &good), 0, "came twice");

    let letters = letters(&site);
    let mut dead: Vec<Hash> = letters.iter().map(|it| hash(&image_of(&site, it))).collect();
    dead.sort_unstable();
    let mut expected = refused;
    expected.sort_unstable();
    assert_eq!(dead, expected);
    for letter in &letters {
        let n = letter["original_name"].as_str().and_then(|it| it.strip_suffix(".jpg")).expect("our name");
        let image = image(n.parse().expect("our number"));
        assert_eq!(image_of(&site, letter), image);
        let time = |key: &str| letter[key].as_str().and_then(|it| it.parse::<jiff::Timestamp>().ok()).expect(key);
        let (detected, received, died) = (time("detect_time_utc"), time("received_at"), time("died_at"));
        assert!(begun <= received && received <= died && died <= jiff::Timestamp::now(), "{letter}");
        assert!(detected >= begun - jiff::SignedDuration::from_secs(1) && detected <= died, "{letter}");
        assert_eq!(letter["detector"], name);
        assert_eq!(letter["time_zone"], "Europe/Paris");
        assert_eq!(letter["reason"], "rejected");
        assert_eq!(letter["status"], 400);
        assert!(letter["message"].as_str().expect("a message").contains("injected"), "{letter}");
        assert_eq!(letter["source"], "directory");
        assert!(letter["attempts"].as_u64().expect("attempts") >= 2, "{letter}");
        assert!(!letter["id"].as_str().expect("an id").is_empty());
    }
}

#[test]
fn c24_a_detector_whose_frames_are_all_bad_does_not_hold_up_the_others_while_it_floods() {
    /// The row's own measure. A busy box disturbs a round, but not each of them in the same way.
    const SLOWER_MAX: f64 = 1.5;
    const ROUNDS: usize = 3;
    let mut measured = Vec::new();
    for _ in 0..ROUNDS {
        let (alone, flooded) = (others_while_one_floods(0), others_while_one_floods(2));
        measured.push((alone, flooded));
        if flooded.as_secs_f64() <= SLOWER_MAX * alone.as_secs_f64() {
            return;
        }
    }
    panic!("the 99th percentile of the others, alone and beside the flood: {measured:?}");
}

/// Two detectors write a frame every 10 ms, while a third writes so many that are all refused: the 99th percentile of
/// the time from writing to acceptance.
fn others_while_one_floods(bad_each: u64) -> Duration {
    let engine = Engine::with(|options| {
        options.faults.by_detector.insert("Bad".into(), 400);
        options.faults.latency = Duration::from_millis(50);
    });
    let site = site(&engine).detector("Bad", "UTC", "").detector("Lobby", "UTC", "").detector("Door", "UTC", "");
    put_faces(&site, &["Bad"], 100_000..100_000 + 250 * bad_each);
    let mut daemon = site.run();
    // As long as there are only bad ones, publishing may pause; and it starts slowly.
    let mut written = put_faces(&site, &["Lobby", "Door"], 1000..1100);
    engine.until_accepted(100);
    let mut put_at = BTreeMap::new();
    let begun = Instant::now();
    for n in 0..400 {
        eventually("the next frame is due", PATIENCE, || {
            (begun.elapsed() >= Duration::from_millis(10) * n).then_some(())
        });
        let bad = 200_000 + bad_each * u64::from(n);
        put_faces(&site, &["Bad"], bad..bad + bad_each);
        let face = put_face(&site.drop_dir(if n % 2 == 0 { "Lobby" } else { "Door" }), n.into());
        // The first second still belongs to the slow start after that pause.
        if n >= 100 {
            put_at.insert(face, Instant::now());
        }
        written.push(face);
    }
    eventually("the good ones are published", PATIENCE, || {
        (engine.counts().accepted >= written.len() as u64).then_some(())
    });
    let bad_pending = daemon.metrics().count("framegate_frames_pending", "detector=\"Bad\"");
    assert_eq!(bad_pending > 0, bad_each > 0, "the flood goes on");
    assert_eq!(nothing_lost(&[&engine], &written), 0, "came twice");
    let mut late: Vec<Duration> = engine
        .accepted()
        .iter()
        .filter_map(|it| Some(it.accepted.into_std().saturating_duration_since(*put_at.get(&it.sha256)?)))
        .collect();
    late.sort_unstable();

    // Whatever is refused: nobody else's, and nothing is lost.
    engine.change(|faults| faults.by_detector.clear());
    let samples = daemon.idle(PATIENCE);
    assert_eq!(
        samples.count("framegate_frames_dead_lettered_total", ""),
        samples.count("framegate_frames_dead_lettered_total", "detector=\"Bad\"")
    );
    late[late.len() * 99 / 100]
}

// ---- the token

#[test]
fn c3_tokens_that_live_four_seconds_are_renewed_ahead_of_time_and_nothing_is_refused() {
    let engine = Engine::with(|options| options.faults.token_ttl = Duration::from_secs(4));
    let site = Site::new(&engine.base_url()).section("[publish]\nrate = 60\nburst = 5").detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let written = put_faces(&site, &["Lobby"], 0..600);
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0, "came twice");
    let counts = engine.counts();
    assert_eq!(counts.authenticate, 1, "renewals, not logins");
    let most = 1 + lives(&engine, Duration::from_secs(3));
    assert!((2..=most).contains(&counts.renew), "{} renewals, {most} at most", counts.renew);
    assert_eq!(counts.statuses.get(&401), None, "none too late");
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
    assert_eq!(samples.count("framegate_token_refreshes_total", "kind=\"login\""), 1);
    let renewals = u64::try_from(samples.count("framegate_token_refreshes_total", "kind=\"renew\"")).unwrap();
    assert_eq!(renewals, counts.renew);
}

#[test]
fn c5_all_tokens_revoked_under_load_take_exactly_one_more_login_however_many_are_refused() {
    let engine = Engine::with(|options| options.faults.latency = Duration::from_millis(5));
    let site = site(&engine).detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let camera = Camera::start(std::slice::from_ref(&engine), vec![site.drop_dir("Lobby")], 200);
    for round in 1..=3 {
        engine.until_accepted(round * 200);
        // Answers to the old token come in late, in any order, also after there is a new one.
        engine.hold();
        let held = engine.counts().publish;
        eventually("several are under way", PATIENCE, || (engine.counts().in_flight >= 4).then_some(()));
        engine.revoke_all_tokens();
        engine.release();
        eventually("the old token was refused", PATIENCE, || {
            (engine.counts().statuses.get(&401).is_some_and(|it| *it >= 4 * round)).then_some(())
        });
        assert!(engine.counts().publish >= held);
    }
    engine.until_accepted(800);
    let written = camera.finish();
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0, "came twice");
    assert_eq!(engine.counts().authenticate, 1 + 3);
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
}

#[test]
fn c4_when_no_renewal_works_each_token_costs_one_login() {
    for status in [401, 500] {
        let engine = Engine::with(|options| {
            options.faults.token_ttl = Duration::from_secs(2);
            options.faults.renew_status = Some(status);
        });
        let site =
            Site::new(&engine.base_url()).section("[publish]\nrate = 60\nburst = 5").detector("Lobby", "UTC", "");
        let mut daemon = site.run();
        let written = put_faces(&site, &["Lobby"], 0..300);
        all_published_once(&engine, &mut daemon, &written);
        let logins = engine.counts().authenticate;
        // Five seconds at least, in lives of two: one login when three quarters of each are over, and the first.
        let most = 2 + lives(&engine, Duration::from_millis(1500));
        assert!((3..=most).contains(&logins), "{status}: {logins} logins, {most} at most");
        // One ahead of time for each token; and one more if the 401 comes while the token still lives by our clock.
        assert!(engine.counts().renew <= 2 * logins, "{status}: {} renewals", engine.counts().renew);
    }
}

#[test]
fn c4_a_refused_login_pauses_with_one_try_and_a_reload_with_the_right_password_heals_it() {
    let engine = Engine::with(|options| options.password = "another".into());
    let site = site(&engine).detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let written = put_faces(&site, &["Lobby"], 0..100);
    until_state(&daemon, "credentials");
    for_a_while(|| {
        assert_eq!(engine.counts().authenticate, 1, "an account can be locked");
        assert_eq!(engine.counts().publish, 0);
        assert_eq!(daemon.metrics().count("framegate_dead_letters", ""), 0);
    });
    // The configuration's text stays as it is.
    fs::write(site.path().join("engine-password"), "another").unwrap();
    reload(&site);
    all_published_once(&engine, &mut daemon, &written);
    let logins = logins(&engine);
    assert_eq!(logins.len(), 2);
    let apart = logins[1].at - logins[0].at;
    assert!(apart < LOGINS_APART, "the reload waited for the next try by itself: {apart:?}");
}

// ---- pauses

#[test]
fn c7_without_the_permission_for_anything_publishing_pauses_and_every_frame_waits_for_it() {
    pauses_and_heals("forbidden", |engine, on| engine.change(|faults| faults.answer_all = on.then_some(403)));
}

#[test]
fn c11_when_everything_is_answered_400_publishing_pauses_and_nothing_is_a_dead_letter() {
    pauses_and_heals("rejecting", |engine, on| engine.change(|faults| faults.answer_all = on.then_some(400)));
}

#[test]
fn c10_a_captive_portal_settles_nothing_and_pauses_until_it_is_gone() {
    pauses_and_heals("unexpected-answer", |engine, on| engine.change(|faults| faults.portal = on));
}

#[test]
fn c10_a_portal_that_says_511_or_407_settles_nothing_and_pauses_until_it_is_gone() {
    for status in [511, 407] {
        pauses_and_heals("unexpected-answer", |engine, on| {
            engine.change(|faults| faults.answer_all = on.then_some(status));
        });
    }
}

#[test]
fn c10_a_captive_portal_at_the_login_gets_no_frame() {
    let engine = Engine::with(|options| options.faults.portal = true);
    let site = site(&engine).detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let written = put_faces(&site, &["Lobby"], 0..100);
    until_state(&daemon, "unexpected-answer");
    few_attempts_and_no_dead_letters(&engine, &daemon, FEW);
    assert_eq!(engine.counts().publish, 0);
    engine.change(|faults| faults.portal = false);
    all_published_once(&engine, &mut daemon, &written);
}

#[test]
fn c9_a_redirect_is_not_followed_and_nobody_else_sees_a_token_or_a_frame() {
    let elsewhere = Engine::start();
    for (status, location) in [
        (302, format!("{}/login", elsewhere.base_url())),
        (307, format!("{}/api/v1/faceEdge/publish", elsewhere.base_url())),
        (308, format!("{}/api/v1/faceEdge/publish", elsewhere.base_url())),
        (307, "/login".to_owned()),
    ] {
        pauses_and_heals("unexpected-answer", |engine, on| {
            engine.change(|faults| faults.redirect = on.then(|| Redirect { status, location: location.clone() }));
        });
    }
    let counts = elsewhere.counts();
    assert_eq!((counts.connections, elsewhere.arrivals().len()), (0, 0));
}

#[test]
fn c9_a_redirect_from_tls_to_plain_http_and_one_of_the_login_are_not_followed() {
    let elsewhere = Engine::start();
    let redirect = || Some(Redirect { status: 307, location: format!("{}/api/v1/authenticate", elsewhere.base_url()) });
    for tls in [true, false] {
        let engine = if tls { tls_engine(Certificate::Good) } else { Engine::start() };
        let keys = if tls { "ca_file = \"engine-ca.pem\"" } else { "" };
        let site = site(&engine).engine_keys(keys).detector("Lobby", "UTC", "");
        if tls {
            trust(&site, &engine);
        }
        // The login is the first thing that is redirected: it carries the password.
        engine.change(|faults| faults.redirect = redirect());
        let mut daemon = site.run();
        let mut written = put_faces(&site, &["Lobby"], 0..50);
        until_state(&daemon, "unexpected-answer");
        few_attempts_and_no_dead_letters(&engine, &daemon, FEW);
        assert_eq!(engine.counts().publish, 0);
        engine.change(|faults| faults.redirect = None);
        engine.until_accepted(50);
        // Then a frame, with its token.
        engine.change(|faults| faults.redirect = redirect());
        written.extend(put_faces(&site, &["Lobby"], 50..100));
        until_state(&daemon, "unexpected-answer");
        engine.change(|faults| faults.redirect = None);
        all_published_once(&engine, &mut daemon, &written);
    }
    assert_eq!((elsewhere.counts().connections, elsewhere.arrivals().len()), (0, 0));
}

/// An engine that works, then has this fault for a while under load, then works again.
#[track_caller]
fn pauses_and_heals(state: &str, fault: impl Fn(&Engine, bool)) {
    let engine = Engine::start();
    let site = site(&engine).detector("Lobby", "UTC", "").detector("Door", "UTC", "");
    let mut daemon = site.run();
    let mut written = put_faces(&site, &["Lobby", "Door"], 0..100);
    engine.until_accepted(100);
    fault(&engine, true);
    written.extend(put_faces(&site, &["Lobby", "Door"], 100..400));
    until_state(&daemon, state);
    few_attempts_and_no_dead_letters(&engine, &daemon, FEW);
    assert_eq!(engine.counts().accepted, 100);
    fault(&engine, false);
    all_published_once(&engine, &mut daemon, &written);
    assert!(is_state(&daemon.metrics(), "open"));
    assert_eq!(engine.counts().authenticate, 1);
    engine.contract_held();
}

// ---- the network

#[test]
fn c13_c14_connections_cut_before_and_after_the_frame_was_taken_lose_nothing_and_double_only_lost_answers() {
    let engine = Engine::with(|options| {
        options.faults.cut_before = 0.05;
        options.faults.cut_after = 0.05;
    });
    let site = site(&engine).detector("Lobby", "UTC", "").detector("Door", "UTC", "");
    let mut daemon = site.run();
    let written = put_faces(&site, &["Lobby", "Door"], 0..800);
    let samples = daemon.idle(PATIENCE);
    let doubled = nothing_lost(&[&engine], &written);
    let counts = engine.counts();
    let answered = counts.statuses[&200] - counts.authenticate - counts.renew;
    let answers_lost = counts.accepted - answered;
    assert!(doubled <= answers_lost, "{doubled} came twice, {answers_lost} answers were lost");
    assert!(answers_lost >= 10, "the fault was met");
    let ambiguous = u64::try_from(samples.count("framegate_publish_ambiguous_total", "")).unwrap();
    assert!(
        ambiguous >= doubled && ambiguous <= counts.cut,
        "{ambiguous} ambiguous, {doubled} came twice, {} cut",
        counts.cut
    );
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
}

#[test]
fn c16_answers_that_trickle_flood_never_begin_or_never_end_cost_no_memory_and_no_frame() {
    let engine = Engine::start();
    let site = Site::new(&engine.base_url())
        .engine_keys("timeout = \"1s\"\nconnect_timeout = \"1s\"")
        .section("[publish]\nmax_in_flight = 8\nbackoff_max = \"500ms\"")
        .detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let before = daemon.metrics().sum("process_resident_memory_bytes", "");
    let nasty = [Action::Trickle, Action::Flood, Action::EndlessHeaders, Action::Hang];
    engine.script(nasty.iter().cycle().take(12).cloned());
    let written = put_faces(&site, &["Lobby"], 0..200);
    let mut most = before;
    let samples = eventually("everything is settled", PATIENCE, || {
        let samples = daemon.metrics();
        most = most.max(samples.sum("process_resident_memory_bytes", ""));
        (samples.count("framegate_frames_pending", "") == 0 && site.files_left().is_empty()).then_some(samples)
    });
    let doubled = nothing_lost(&[&engine], &written);
    assert!(doubled <= 9, "{doubled} came twice, of nine that were taken");
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
    assert!(most < before + 64e6, "from {before} to {most} bytes");
    daemon.idle(PATIENCE);
}

#[test]
fn c19_an_engine_that_closes_idle_connections_after_a_second_loses_nothing() {
    let engine = Engine::with(|options| options.idle = Duration::from_secs(1));
    let site = site(&engine).detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let mut written = Vec::new();
    // Bursts that hit the second more and more exactly.
    for (round, gap) in (0u64..).zip([900, 1100, 960, 1040, 980, 1000, 1010, 990, 995, 1005]) {
        written.extend(put_faces(&site, &["Lobby"], round * 20..round * 20 + 20));
        engine.until_accepted(written.len() as u64);
        let last = engine.accepted().last().expect("a frame").accepted.into_std();
        eventually("the gap is over", PATIENCE, || (last.elapsed() >= Duration::from_millis(gap)).then_some(()));
    }
    let samples = daemon.idle(PATIENCE);
    let doubled = nothing_lost(&[&engine], &written);
    let ambiguous = u64::try_from(samples.count("framegate_publish_ambiguous_total", "")).unwrap();
    // Each burst may meet every connection just as it closes.
    assert!(doubled <= ambiguous && ambiguous <= 60, "{doubled} came twice, {ambiguous} ambiguous");
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
}

#[test]
fn c23_after_an_outage_the_first_frame_goes_within_seconds_the_freshest_ahead_and_nothing_is_lost() {
    const OUTAGE: Duration = Duration::from_secs(20);
    let engine = Engine::start();
    // The default back-off: that is what heals on site.
    let site = Site::new(&engine.base_url()).section("[publish]\nmax_in_flight = 8").detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let mut written = put_faces(&site, &["Lobby"], 0..100);
    engine.until_accepted(100);
    engine.down();
    let begun = Instant::now();
    written.extend(put_faces(&site, &["Lobby"], 100..800));
    until_state(&daemon, "unreachable");
    let mut attempts = 0;
    eventually("the outage is over", PATIENCE, || {
        let samples = daemon.metrics();
        assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
        attempts = samples.count("framegate_publish_attempts_total", "result=\"connect\"");
        (begun.elapsed() >= OUTAGE).then_some(())
    });
    assert!((2..40).contains(&attempts), "{attempts} attempts while the engine was away");
    let last: BTreeSet<Hash> = put_faces(&site, &["Lobby"], 800..805).into_iter().collect();
    written.extend(&last);
    eventually("the last ones are noticed", PATIENCE, || {
        (daemon.metrics().count("framegate_frames_received_total", "") >= 805).then_some(())
    });

    engine.up();
    let healed = Instant::now();
    engine.until_accepted(101);
    assert!(healed.elapsed() < Duration::from_secs(5), "the first frame came after {:?}", healed.elapsed());
    all_published_once(&engine, &mut daemon, &written);
    let place = engine.accepted()[100..].iter().position(|it| last.contains(&it.sha256)).expect("it was accepted");
    // Before it go those that were in hand when the engine went, and one for each probe.
    let in_hand = AHEAD + 8 + u64::try_from(attempts).unwrap();
    assert!(place as u64 <= in_hand + 10, "{place} frames went before the freshest, {in_hand} were in hand");
    assert_eq!(engine.counts().authenticate, 1);
}

/// A limit holds where requests leave; on the way to a busy engine's clock so many may catch up with those before them.
const CAUGHT_UP: usize = 5;

#[test]
fn c23_after_an_outage_a_large_backlog_comes_within_the_rate_and_what_is_new_does_not_wait_for_it() {
    const RATE: usize = 150;
    const BURST: usize = 10;
    const BACKLOG: u64 = 1500;
    let engine = Engine::start();
    let site = Site::new(&engine.base_url())
        .section(&format!("[publish]\nrate = {RATE}\nburst = {BURST}\nbackoff_max = \"500ms\""))
        .detector("Lobby", "UTC", "")
        .detector("Door", "UTC", "");
    let mut daemon = site.run();
    let mut written = put_faces(&site, &["Lobby", "Door"], 0..20);
    daemon.idle(PATIENCE);
    engine.down();
    written.extend(put_faces(&site, &["Lobby", "Door"], 20..20 + BACKLOG));
    until_state(&daemon, "unreachable");
    eventually("the backlog is noticed", PATIENCE, || {
        let pending = daemon.metrics().count("framegate_frames_pending", "");
        (pending >= i64::try_from(BACKLOG).unwrap()).then_some(())
    });

    engine.up();
    engine.until_accepted(20 + BACKLOG / 3);
    let fresh: Vec<Hash> = put_faces(&site, &["Lobby", "Door"], 5000..5050);
    written.extend(&fresh);
    all_published_once(&engine, &mut daemon, &written);
    let arrivals = engine.arrivals();
    for seconds in [1, 2, 5] {
        let most = busiest(&arrivals, Duration::from_secs(seconds as u64));
        assert!(most <= RATE * seconds + BURST + CAUGHT_UP, "{most} requests within {seconds} s");
    }
    // The backlog keeps its share of one in four, and what was in hand goes first; after that it waits for what is new.
    let accepted = engine.accepted();
    let last_fresh = accepted.iter().rposition(|it| fresh.contains(&it.sha256)).expect("they were accepted");
    let behind = accepted.len() - 1 - last_fresh;
    assert!(behind as u64 > BACKLOG / 4, "{behind} frames of the backlog were left when the last new one went");
}

// ---- limits

#[test]
fn c1_c23_the_rate_of_the_box_bounds_every_request_retries_and_logins_included() {
    const RATE: usize = 50;
    const BURST: usize = 10;
    let engine = Engine::with(|options| {
        options.faults.error_rate = 0.1;
        options.faults.token_ttl = Duration::from_secs(2);
    });
    let site = Site::new(&engine.base_url())
        .section(&format!("[publish]\nrate = {RATE}\nburst = {BURST}\nbackoff_max = \"500ms\""))
        .detector("Lobby", "UTC", "")
        .detector("Door", "UTC", "");
    let written = put_faces(&site, &["Lobby", "Door"], 0..350);
    let mut daemon = site.run();
    let samples = all_published_once(&engine, &mut daemon, &written);
    let arrivals = engine.arrivals();
    assert!(arrivals.len() > 350 && engine.counts().renew > 0);
    for seconds in [1, 2, 4] {
        let most = busiest(&arrivals, Duration::from_secs(seconds as u64));
        assert!(most <= RATE * seconds + BURST + CAUGHT_UP, "{most} requests within {seconds} s");
    }
    // The limit is made use of, too.
    let took = arrivals.last().expect("arrivals").at - arrivals[0].at;
    assert!(took.as_secs_f64() < 1.3 * arrivals.len() as f64 / RATE as f64, "{took:?} for {}", arrivals.len());
    assert!(samples.count("framegate_rate_limited_seconds_total", "") >= 4);
}

#[test]
fn a_detectors_own_rate_bounds_it_alone() {
    let engine = Engine::start();
    let site = site(&engine).detector("Slow", "UTC", "rate = 20").detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let mut written = put_faces(&site, &["Slow"], 0..100);
    written.extend(put_faces(&site, &["Lobby"], 1000..1300));
    eventually("the other is done", PATIENCE, || {
        (daemon.metrics().count("framegate_frames_published_total", "detector=\"Lobby\"") == 300).then_some(())
    });
    assert!(daemon.metrics().count("framegate_frames_pending", "detector=\"Slow\"") > 0, "the slow one is not done");
    all_published_once(&engine, &mut daemon, &written);
    let slow: Vec<Arrival> = engine
        .accepted()
        .iter()
        .filter(|it| it.detector == "Slow")
        .map(|it| Arrival { at: it.arrival, call: Call::Publish })
        .collect();
    for seconds in [1, 2] {
        let most = busiest(&slow, Duration::from_secs(seconds as u64));
        assert!(most <= 20 * seconds + 20 + CAUGHT_UP, "{most} requests within {seconds} s");
    }
}

// ---- images

#[test]
fn a26_what_is_no_whole_image_is_a_dead_letter_with_the_reason_and_every_good_format_is_published() {
    let engine = Engine::start();
    let site = site(&engine).section("[encode]\nmax_frame = \"64KiB\"").detector(
        "Lobby",
        "UTC",
        "directory.include = [\"*.jpg\", \"*.png\", \"*.webp\", \"*.bmp\"]\n\
         directory.partial_timeout = \"300ms\"\ndirectory.quiet = \"50ms\"",
    );
    let jpeg = image(1);
    let half = jpeg.len() / 2;
    let flawed: [(&str, Vec<u8>, &str); 8] = [
        ("text.jpg", b"this is no picture\r\n".repeat(20), "unsupported"),
        ("page.png", b"<!doctype html><title>Not found</title>".to_vec(), "unsupported"),
        ("sound.webp", [b"RIFF\x10\0\0\0WAVE".as_slice(), &[0; 64]].concat(), "unsupported"),
        ("half.jpg", jpeg[..half].to_vec(), "truncated"),
        ("almost.jpg", jpeg[..jpeg.len() - 1].to_vec(), "truncated"),
        ("hole.jpg", [&jpeg[..half], &vec![0; half][..]].concat(), "truncated"),
        ("zero.jpg", Vec::new(), "truncated"),
        ("one.jpg", vec![0xff], "truncated"),
    ];
    let good: [(&str, Vec<u8>); 7] = [
        ("good.jpg", jpeg.clone()),
        ("png-in-truth.jpg", a_png()),
        ("good.png", [a_png(), b"trailing".to_vec()].concat()),
        ("good.webp", a_webp()),
        ("GOOD.BMP", a_bmp()),
        ("line-end.jpg", [&image(2)[..], b"\r\n"].concat()),
        ("padded.jpg", [&image(3)[..], &[0; 512]].concat()),
    ];
    let mut daemon = site.run();
    for (name, bytes) in
        flawed.iter().map(|(name, bytes, _)| (name, bytes)).chain(good.iter().map(|(name, bytes)| (name, bytes)))
    {
        put(&site.drop_dir("Lobby"), name, bytes);
    }
    let samples = daemon.idle(PATIENCE);
    let written: Vec<Hash> = good.iter().map(|(_, bytes)| hash(bytes)).collect();
    assert_eq!(nothing_lost(&[&engine], &written), 0, "came twice");
    let letters = letters(&site);
    for (name, bytes, reason) in &flawed {
        let letter = letters.iter().find(|it| it["original_name"] == *name);
        let letter = letter.unwrap_or_else(|| panic!("no dead letter of {name}"));
        assert_eq!(letter["reason"], *reason, "{letter}");
        assert_eq!(letter["status"], Value::Null, "{letter}");
        assert!(!letter["message"].as_str().expect("a message").is_empty(), "{letter}");
        assert_eq!(&image_of(&site, letter), bytes, "{letter}");
    }
    assert_eq!(letters.len(), flawed.len());
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", "reason=\"truncated\""), 5);
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", "reason=\"unsupported\""), 3);
    assert_eq!(engine.counts().publish, good.len() as u64, "the engine was not bothered with the others");

    // What is too large is never accepted: it stays where it is.
    let large = [&jpeg[..], &vec![0; 100 << 10][..]].concat();
    put(&site.drop_dir("Lobby"), "large.jpg", &large);
    eventually("it is refused", PATIENCE, || {
        (daemon.metrics().count("framegate_frames_refused_total", "reason=\"too-large\"") == 1).then_some(())
    });
    assert_eq!(fs::read(site.drop_dir("Lobby").join("large.jpg")).expect("it is still there"), large);
    assert_eq!(daemon.metrics().count("framegate_frames_pending", ""), 0);
}

// ---- TLS

#[test]
fn c21_with_the_engines_ca_frames_flow_below_a_path_prefix_over_http_1_and_2() {
    for http2 in [false, true] {
        let engine = tls_engine(Certificate::Good);
        let site = site(&engine)
            .engine_keys(&format!("ca_file = \"engine-ca.pem\"\nhttp2 = {http2}"))
            .detector("Lobby", "UTC", "");
        assert!(engine.base_url().starts_with("https://") && engine.base_url().ends_with("/identities"));
        trust(&site, &engine);
        let mut daemon = site.run();
        let written = put_faces(&site, &["Lobby"], 0..300);
        let samples = all_published_once(&engine, &mut daemon, &written);
        assert_eq!(samples.count("framegate_engine_insecure", ""), 0);
        assert_eq!(engine.counts().authenticate, 1);
        if http2 {
            assert!(engine.counts().connections <= 2, "{} connections", engine.counts().connections);
        }
    }
}

#[test]
fn c21_a_certificate_that_turns_bad_pauses_nothing_leaves_and_a_good_one_heals_it() {
    let engine = tls_engine(Certificate::Good);
    let site = site(&engine).engine_keys("ca_file = \"engine-ca.pem\"").detector("Lobby", "UTC", "");
    trust(&site, &engine);
    let mut daemon = site.run();
    let mut written = put_faces(&site, &["Lobby"], 0..50);
    engine.until_accepted(50);
    for (n, bad) in (1u64..).zip([
        Certificate::Expired,
        Certificate::NotYetValid,
        Certificate::WrongName,
        Certificate::SelfSigned,
        Certificate::OtherAuthority,
    ]) {
        engine.show_certificate(bad).unwrap();
        engine.cut_connections();
        let before = engine.counts();
        written.extend(put_faces(&site, &["Lobby"], n * 50..n * 50 + 50));
        until_state(&daemon, "unexpected-answer");
        assert_eq!(
            (engine.counts().publish, engine.counts().authenticate),
            (before.publish, before.authenticate),
            "{bad:?}"
        );
        assert_eq!(daemon.metrics().count("framegate_dead_letters", ""), 0);
        engine.show_certificate(Certificate::Good).unwrap();
        engine.until_accepted((n + 1) * 50);
    }
    let samples = daemon.idle(PATIENCE);
    // A connection may have been cut under a frame.
    let doubled = i64::try_from(nothing_lost(&[&engine], &written)).unwrap();
    assert!(doubled <= samples.count("framegate_publish_ambiguous_total", ""));
}

#[test]
fn c21_the_right_pin_is_enough_for_a_self_signed_certificate() {
    let engine = tls_engine(Certificate::SelfSigned);
    let pin = engine.pin().expect("TLS");
    let site = site(&engine).engine_keys(&format!("pin_sha256 = [\"{pin}\"]")).detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let written = put_faces(&site, &["Lobby"], 0..200);
    let samples = all_published_once(&engine, &mut daemon, &written);
    assert_eq!(samples.count("framegate_engine_insecure", ""), 0);
}

#[test]
fn c21_a_self_signed_certificate_that_calls_itself_an_authority_is_trusted_by_its_file_and_no_other_is() {
    let engine = tls_engine(Certificate::SelfSigned);
    let site = site(&engine).engine_keys("ca_file = \"engine-ca.pem\"").detector("Lobby", "UTC", "");
    trust(&site, &engine);
    let mut daemon = site.run();
    let mut written = put_faces(&site, &["Lobby"], 0..50);
    engine.until_accepted(50);
    // Another one of the same names, from whoever is in between.
    engine.show_certificate(Certificate::SelfSigned).unwrap();
    engine.cut_connections();
    written.extend(put_faces(&site, &["Lobby"], 50..100));
    until_state(&daemon, "unexpected-answer");
    assert_eq!(engine.counts().accepted, 50);
    // It was the engine's new one: somebody puts it in place.
    trust(&site, &engine);
    reload(&site);
    let samples = daemon.idle(PATIENCE);
    let doubled = i64::try_from(nothing_lost(&[&engine], &written)).unwrap();
    assert!(doubled <= samples.count("framegate_publish_ambiguous_total", ""));
}

#[test]
fn c21_a_new_key_under_the_same_authority_flows_with_the_ca_and_pauses_with_a_pin_until_the_new_pin_is_configured() {
    for pinned in [false, true] {
        let engine = tls_engine(Certificate::Good);
        let pin = engine.pin().expect("TLS");
        let keys = if pinned { format!("pin_sha256 = [\"{pin}\"]") } else { "ca_file = \"engine-ca.pem\"".to_owned() };
        let site = site(&engine).engine_keys(&keys).detector("Lobby", "UTC", "");
        trust(&site, &engine);
        let mut daemon = site.run();
        let mut written = put_faces(&site, &["Lobby"], 0..50);
        engine.until_accepted(50);
        engine.show_certificate(Certificate::Good).unwrap();
        let new_pin = engine.pin().expect("TLS");
        assert_ne!(pin, new_pin);
        engine.cut_connections();
        written.extend(put_faces(&site, &["Lobby"], 50..100));
        if pinned {
            until_state(&daemon, "unexpected-answer");
            let (_, status) = daemon.get("/status").expect("an answer");
            assert!(status.contains("none of engine.pin_sha256"), "it says what is wrong: {status}");
            assert_eq!(engine.counts().accepted, 50);
            let config = fs::read_to_string(site.config()).expect("the configuration");
            fs::write(site.config(), config.replace(&pin, &new_pin)).expect("it can be written");
            reload(&site);
        }
        let samples = daemon.idle(PATIENCE);
        let doubled = i64::try_from(nothing_lost(&[&engine], &written)).unwrap();
        assert!(doubled <= samples.count("framegate_publish_ambiguous_total", ""));
        assert_eq!(samples.count("framegate_dead_letters", ""), 0);
    }
}

#[test]
fn c21_with_a_wrong_pin_or_an_unknown_authority_nothing_is_sent() {
    const OTHER_PIN: &str = "pin_sha256 = [\"k2oYXKqiZrucvpgengXLeM1zKwsygOuURBK7b4+PB68=\"]";
    for (certificate, keys) in [(Certificate::Good, OTHER_PIN), (Certificate::SelfSigned, ""), (Certificate::Good, "")]
    {
        let engine = tls_engine(certificate);
        let site = site(&engine).engine_keys(keys).detector("Lobby", "UTC", "");
        let daemon = site.run();
        put_faces(&site, &["Lobby"], 0..50);
        until_state(&daemon, "unexpected-answer");
        few_attempts_and_no_dead_letters(&engine, &daemon, 0);
        assert_eq!(engine.arrivals().len(), 0, "{certificate:?} {keys}");
    }
}

#[test]
fn c21_danger_mode_takes_any_certificate_and_a_metric_says_so() {
    let engine = tls_engine(Certificate::WrongName);
    let site = site(&engine).engine_keys("danger_accept_invalid_certs = true").detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let written = put_faces(&site, &["Lobby"], 0..100);
    let samples = all_published_once(&engine, &mut daemon, &written);
    assert_eq!(samples.count("framegate_engine_insecure", ""), 1);
    assert!(site.log().contains("danger_accept_invalid_certs"), "the log says so");
}

fn tls_engine(certificate: Certificate) -> Arc<Engine> {
    Engine::with(|options| {
        options.prefix = "/identities".into();
        options.tls = Some(certificate);
    })
}

fn trust(site: &Site, engine: &Engine) {
    fs::write(site.path().join("engine-ca.pem"), engine.ca_pem().expect("TLS")).expect("it can be written");
}

// ---- what the tests above say for short

/// A site that tries again soon, so that healing takes a test's time.
fn site(engine: &Engine) -> Site {
    Site::new(&engine.base_url()).section("[publish]\nmax_in_flight = 16\nbackoff_max = \"1s\"")
}

/// These faces, to the detectors in turn.
fn put_faces(site: &Site, detectors: &[&str], numbers: std::ops::Range<u64>) -> Vec<Hash> {
    let directories: Vec<_> = detectors.iter().map(|name| site.drop_dir(name)).collect();
    numbers.zip(directories.iter().cycle()).map(|(n, directory)| put_face(directory, n)).collect()
}

/// [`put`], with a modification time.
fn put_of_time(directory: &Path, name: &str, image: &[u8], time: SystemTime) {
    let unfinished = directory.join(format!(".{name}.part"));
    fs::write(&unfinished, image).expect("an image can be written");
    File::options().write(true).open(&unfinished).and_then(|file| file.set_modified(time)).expect("a time can be set");
    fs::rename(unfinished, directory.join(name)).expect("and renamed");
}

#[track_caller]
fn all_published_once(engine: &Engine, daemon: &mut Daemon<'_>, written: &[Hash]) -> Samples {
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[engine], written), 0, "came twice");
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
    samples
}

/// A refused frame becomes a dead letter once others are accepted after it: sends some, one by one, until all is settled.
#[track_caller]
fn feed_until_settled(engine: &Engine, site: &Site, daemon: &mut Daemon<'_>, detector: &str) -> Vec<Hash> {
    let mut written = Vec::new();
    let mut n = 900_000;
    eventually("everything is settled", PATIENCE, || {
        let stuck = daemon.metrics().count("framegate_frames_pending", "");
        if stuck == 0 && site.files_left().is_empty() {
            return Some(());
        }
        let accepted = engine.counts().accepted;
        written.push(put_face(&site.drop_dir(detector), n));
        n += 1;
        eventually("another frame is accepted", PATIENCE, || (engine.counts().accepted > accepted).then_some(()));
        None
    });
    daemon.idle(PATIENCE);
    written
}

/// As the simulator decides it.
fn is_refused(hash: &Hash, share: f64) -> bool {
    let draw = u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]]);
    f64::from(draw) < share * (f64::from(u32::MAX) + 1.0)
}

fn is_state(samples: &Samples, state: &str) -> bool {
    samples.count("framegate_engine_state", "") == 1
        && samples.count("framegate_engine_state", &format!("state=\"{state}\"")) == 1
}

#[track_caller]
fn reload(site: &Site) {
    let reload = site.command(&["reload"]).output().expect("the binary starts");
    assert!(reload.status.success(), "{reload:?}");
}

#[track_caller]
fn until_state(daemon: &Daemon<'_>, state: &str) {
    eventually(&format!("the engine's state is {state}"), PATIENCE, || {
        is_state(&daemon.metrics(), state).then_some(())
    });
}

/// Looks again and again for [`A_WHILE`].
#[track_caller]
fn for_a_while(mut look: impl FnMut()) {
    let begun = Instant::now();
    eventually("a while is over", PATIENCE, || {
        look();
        (begun.elapsed() >= A_WHILE).then_some(())
    });
}

/// While the pause lasts.
#[track_caller]
fn few_attempts_and_no_dead_letters(engine: &Engine, daemon: &Daemon<'_>, few: u64) {
    let before = requests(engine);
    for_a_while(|| assert_eq!(daemon.metrics().count("framegate_dead_letters", ""), 0));
    let asked = requests(engine) - before;
    assert!(asked <= few, "{asked} requests in {A_WHILE:?}");
    assert_eq!(daemon.metrics().count("framegate_frames_dead_lettered_total", ""), 0);
}

fn requests(engine: &Engine) -> u64 {
    let counts = engine.counts();
    counts.publish + counts.authenticate + counts.renew
}

fn publishes(engine: &Engine) -> Vec<Arrival> {
    let mut arrivals = engine.arrivals();
    arrivals.retain(|it| it.call == Call::Publish);
    arrivals
}

/// How many whole ones of this length lie between the first request and the last.
fn lives(engine: &Engine, life: Duration) -> u64 {
    let arrivals = engine.arrivals();
    let (Some(first), Some(last)) = (arrivals.first(), arrivals.last()) else { return 0 };
    u64::try_from((last.at - first.at).as_millis() / life.as_millis()).unwrap_or(u64::MAX)
}

fn logins(engine: &Engine) -> Vec<Arrival> {
    let mut arrivals = engine.arrivals();
    arrivals.retain(|it| it.call == Call::Authenticate);
    arrivals
}

fn retries(samples: &Samples, reason: &str) -> i64 {
    samples.count("framegate_publish_retries_total", &format!("reason=\"{reason}\""))
}

/// The JSON of every dead letter.
#[track_caller]
fn letters(site: &Site) -> Vec<Value> {
    let mut letters = Vec::new();
    for entry in fs::read_dir(site.dead_letters()).into_iter().flatten() {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|it| it == "json") {
            letters.push(serde_json::from_slice(&fs::read(&path).expect("it can be read")).expect("JSON"));
        }
    }
    letters
}

#[track_caller]
fn image_of(site: &Site, letter: &Value) -> Vec<u8> {
    let name = format!("{}.image", letter["id"].as_str().expect("an id"));
    fs::read(site.dead_letters().join(name)).expect("the image is beside its JSON")
}

fn hex(hash: &Hash) -> String {
    use std::fmt::Write as _;
    hash.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes everything");
        text
    })
}

fn a_png() -> Vec<u8> {
    let chunk = |kind: &[u8], data: &[u8]| {
        let length = u32::try_from(data.len()).expect("a short chunk");
        [&length.to_be_bytes(), kind, data, b"\0\0\0\0"].concat() // nobody looks at the checksum
    };
    let header = [&3u32.to_be_bytes()[..], &2u32.to_be_bytes(), b"\x08\0\0\0\0"].concat();
    [b"\x89PNG\r\n\x1a\n", &chunk(b"IHDR", &header)[..], &chunk(b"IDAT", b"\x78\x9c\x62"), &chunk(b"IEND", b"")]
        .concat()
}

fn a_webp() -> Vec<u8> {
    let lossless = b"\x2f\0\0\0\x10\x07\x10\x11\x11\x88\x88\xfe\x07\0";
    let length = u32::try_from(lossless.len()).expect("short");
    [b"RIFF", &(length + 12).to_le_bytes()[..], b"WEBPVP8L", &length.to_le_bytes(), lossless].concat()
}

/// 3 by 2 pixels of 24 bits.
fn a_bmp() -> Vec<u8> {
    let pixels = [7; 24];
    let mut bmp =
        [b"BM", &(54 + 24u32).to_le_bytes()[..], &[0; 4], &54u32.to_le_bytes(), &40u32.to_le_bytes()].concat();
    bmp.extend([3u32.to_le_bytes(), 2u32.to_le_bytes()].concat());
    bmp.extend(b"\x01\0\x18\0");
    bmp.extend([0; 24]);
    bmp.extend(pixels);
    bmp
}
