//! From a `JetStream` consumer to the engine, through the real binary and a real server, in every trouble that the two can
//! make. FAULTS.md section B, as far as it concerns NATS.

mod support;

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use async_nats::jetstream::consumer::{AckPolicy, pull};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use support::brokers::Nats;
use support::engine::{Engine, Hash, hash, image, nothing_lost};
use support::faults::skipped;
use support::{Daemon, PATIENCE, Samples, Site, eventually, put};

const FRAMES: u64 = 200;

/// A test that needs the server is skipped aloud without it.
macro_rules! nats {
    ($test:literal) => {
        match Nats::start() {
            Some(nats) => nats,
            None => return skipped($test, "nats-server is not installed"),
        }
    };
}

fn site_at(engine: &Engine, url: &str, keys: &str) -> Site {
    let keys = format!("nats = {{ url = \"{url}\", stream = \"FRAMES\"{keys} }}");
    Site::new(&engine.base_url())
        .section("[publish]\nbackoff_min = \"20ms\"\nbackoff_max = \"200ms\"\nmax_in_flight = 16")
        .fed("{subject.1}", "Europe/Paris", &keys)
}

fn site(engine: &Engine, nats: &Nats) -> Site {
    site_at(engine, &nats.url(), "")
}

/// A consumer that delivers again after so many seconds.
fn consumer(ack_wait: u64) -> pull::Config {
    pull::Config {
        durable_name: Some("framegate".into()),
        ack_policy: AckPolicy::Explicit,
        ack_wait: Duration::from_secs(ack_wait),
        ..pull::Config::default()
    }
}

fn add_faces(nats: &Nats, numbers: std::ops::Range<u64>) -> Vec<Hash> {
    let images: Vec<Vec<u8>> = numbers.map(image).collect();
    let written = images.iter().map(|it| hash(it)).collect();
    nats.publish(images.into_iter().map(|it| ("frames.Cam".to_owned(), HeaderMap::new(), it)).collect());
    written
}

/// Everything is settled at the server and in the daemon, and the equation holds.
#[track_caller]
fn settled(nats: &Nats, daemon: &mut Daemon<'_>) -> Samples {
    nats.until_settled();
    daemon.idle(PATIENCE)
}

#[track_caller]
fn until_pending(nats: &Nats, messages: usize) {
    eventually("so many are in hand", PATIENCE, || {
        nats.consumer().filter(|it| it.num_ack_pending == messages).map(drop)
    });
}

#[track_caller]
fn until_held(daemon: &Daemon<'_>, why: &str) {
    eventually(&format!("/readyz says {why}"), PATIENCE, || {
        daemon.get("/readyz").ok().filter(|(status, body)| *status == 503 && body.contains(why))
    });
}

#[track_caller]
fn until_ready(daemon: &Daemon<'_>) {
    eventually("the daemon is ready", PATIENCE, || daemon.get("/readyz").ok().filter(|it| it.0 == 200));
}

// ---- what a message may look like

#[test]
fn messages_are_published_as_their_headers_their_subject_or_their_json_say() {
    let nats = nats!("messages_are_published_as_their_headers_their_subject_or_their_json_say");
    nats.make_stream();
    let engine = Engine::start();
    let mut headers = HeaderMap::new();
    headers.insert("Iana-Time-Zone", "Asia/Tokyo");
    headers.insert("Detect-Time-Utc", "2026-11-23T11:00:00.123Z");
    let json = format!(r#"{{"expanded":"{}","ianaTimeZone":"UTC"}}"#, BASE64_STANDARD.encode(image(3)));
    let before = jiff::Timestamp::now().as_millisecond();
    // There before the consumer: nothing that waits is lost.
    nats.publish(vec![
        ("frames.Door".into(), HeaderMap::new(), image(1)),
        ("frames.Lobby.x".into(), headers, image(2)),
        ("frames.Json".into(), HeaderMap::new(), json.into_bytes()),
    ]);
    // By hand, as any client may.
    let mut plain = TcpStream::connect(("127.0.0.1", nats.server.port())).unwrap();
    let mut answers = BufReader::new(plain.try_clone().unwrap()).lines();
    plain
        .write_all(format!("CONNECT {{\"verbose\":false}}\r\nPUB frames.Plain {}\r\n", image(4).len()).as_bytes())
        .unwrap();
    plain.write_all(&[&image(4)[..], b"\r\nPING\r\n"].concat()).unwrap();
    assert!(answers.any(|line| line.unwrap() == "PONG"));

    let site = site(&engine, &nats);
    let mut daemon = site.run();
    let samples = settled(&nats, &mut daemon);
    let mut arrived: Vec<_> =
        engine.accepted().into_iter().map(|it| (it.detector, it.zone, it.time.as_millisecond(), it.sha256)).collect();
    arrived.sort();
    let names: Vec<_> = arrived.iter().map(|it| (it.0.as_str(), it.1.as_str(), it.3)).collect();
    assert_eq!(
        names,
        [
            ("Door", "Europe/Paris", hash(&image(1))),
            ("Json", "UTC", hash(&image(3))),
            ("Lobby", "Asia/Tokyo", hash(&image(2))),
            ("Plain", "Europe/Paris", hash(&image(4))),
        ]
    );
    let of_the_broker = arrived[0].2;
    assert!((before..=before + 60_000).contains(&of_the_broker), "{of_the_broker}");
    assert_eq!(arrived[2].2, "2026-11-23T11:00:00.123Z".parse::<jiff::Timestamp>().unwrap().as_millisecond());
    assert_eq!(samples.count("framegate_frames_received_total", "source=\"nats\""), 4);
    let (_, status) = daemon.get("/status").unwrap();
    assert!(status.contains(&format!("{} stream FRAMES", nats.url())), "{status}");
    assert!(daemon.stop().success());
}

#[test]
fn messages_of_the_public_c_client_are_published_as_their_headers_say() {
    const TEST: &str = "messages_of_the_public_c_client_are_published_as_their_headers_say";
    let nats = nats!("messages_of_the_public_c_client_are_published_as_their_headers_say");
    let client = match c_client(nats.server.dir()) {
        Ok(client) => client,
        Err(why) => return skipped(TEST, &why),
    };
    nats.make_stream();
    let engine = Engine::start();
    let file = nats.server.dir().join("image");
    let publish = |subject: &str, n: u64, headers: &[&str]| {
        fs::write(&file, image(n)).unwrap();
        let sent = Command::new(&client).arg(nats.url()).arg(subject).arg(&file).args(headers).output().unwrap();
        assert!(sent.status.success(), "{}", String::from_utf8_lossy(&sent.stderr));
    };
    publish("frames.Door", 1, &[]);
    let time = "2026-11-23T11:00:00.123Z";
    publish("frames.Lobby", 2, &["Detector-Name", "unused", "Iana-Time-Zone", "Asia/Tokyo", "Detect-Time-Utc", time]);

    let site = site(&engine, &nats);
    let mut daemon = site.run();
    settled(&nats, &mut daemon);
    let mut arrived: Vec<_> = engine.accepted().into_iter().map(|it| (it.detector, it.zone, it.sha256)).collect();
    arrived.sort();
    let expected = [("Door", "Europe/Paris", 1), ("Lobby", "Asia/Tokyo", 2)];
    assert_eq!(arrived, expected.map(|(name, zone, n)| (name.to_owned(), zone.to_owned(), hash(&image(n)))));
    assert!(engine.accepted().iter().any(|it| it.time == time.parse().unwrap()));
}

/// Builds the publisher of the public C client in this directory.
fn c_client(directory: &Path) -> Result<PathBuf, String> {
    if !Path::new("/usr/include/nats/nats.h").exists() {
        return Err("libnats-dev is not installed".to_owned());
    }
    let program = directory.join("nats_publish");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/nats_publish.c");
    let built = Command::new("cc").arg("-o").arg(&program).args([source, "-lnats"]).output();
    let built = built.map_err(|error| format!("cc: {error}"))?;
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    Ok(program)
}

#[test]
fn b14_a_poison_message_is_one_dead_letter_and_one_acknowledgement() {
    let Some(nats) = Nats::with("max_payload: 32MB\nmax_pending: 64MB", None) else {
        return skipped("b14_a_poison_message", "nats-server is not installed");
    };
    nats.make_stream();
    let engine = Engine::start();
    let site = site(&engine, &nats);
    let mut daemon = site.run();
    let mut headers = HeaderMap::new();
    headers.insert("Detect-Time-Utc", "noon");
    let large = vec![b'x'; 20 << 20];
    let cam = || "frames.Cam".to_owned();
    nats.publish(vec![
        (cam(), HeaderMap::new(), b"{\"expanded\":".to_vec()),
        (cam(), HeaderMap::new(), br#"{"expanded":"!!!!"}"#.to_vec()),
        (cam(), headers, image(1)),
        (cam(), HeaderMap::new(), b"no image".to_vec()),
        (cam(), HeaderMap::new(), large),
    ]);
    let good = add_faces(&nats, 10..20);
    let samples = settled(&nats, &mut daemon);
    assert_eq!(nothing_lost(&[&engine], &good), 0);
    let letters = |reason: &str| samples.count("framegate_frames_dead_lettered_total", &format!("reason=\"{reason}\""));
    assert_eq!((letters("unsupported"), letters("too-large")), (4, 1));
    assert_eq!(samples.count("framegate_dead_letters", ""), 5);
    assert_eq!(samples.count("framegate_redelivered_total", ""), 0);
}

// ---- outages and deaths

#[test]
fn an_engine_outage_keeps_messages_unacknowledged_and_ends_with_none() {
    let nats = nats!("an_engine_outage_keeps_messages_unacknowledged_and_ends_with_none");
    nats.make_stream();
    nats.make_consumer(consumer(2));
    let engine = Engine::start();
    engine.down();
    let site = site(&engine, &nats);
    let mut daemon = site.run();
    let written = add_faces(&nats, 0..2 * FRAMES);
    let in_hand = eventually("frames are in hand", PATIENCE, || {
        nats.consumer().map(|it| it.num_ack_pending).filter(|it| *it > 100)
    });
    assert!(in_hand <= 192, "{in_hand} in hand: what is in memory is bounded");
    // Longer than the deadline: what makes it pass is the daemon's own clock.
    // The deadline passes twice: nothing but time tells.
    let begun = Instant::now();
    eventually("the deadline has passed", PATIENCE, || (begun.elapsed() > Duration::from_secs(4)).then_some(()));
    engine.up();
    let samples = settled(&nats, &mut daemon);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
    assert_eq!(samples.count("framegate_redelivered_total", ""), 0);
}

#[test]
fn b6_an_engine_slower_than_ack_wait_is_waited_for_and_each_message_delivered_once() {
    let nats = nats!("b6_an_engine_slower_than_ack_wait_is_waited_for_and_each_message_delivered_once");
    slower_than_the_deadline(&nats, consumer(2));
}

#[test]
fn b7_an_engine_slower_than_the_first_back_off_is_waited_for_and_each_message_delivered_once() {
    let nats = nats!("b7_an_engine_slower_than_the_first_back_off_is_waited_for_and_each_message_delivered_once");
    let backoff = vec![Duration::from_secs(1), Duration::from_secs(5)];
    slower_than_the_deadline(&nats, pull::Config { backoff, max_deliver: 10, ..consumer(30) });
}

fn slower_than_the_deadline(nats: &Nats, config: pull::Config) {
    nats.make_stream();
    nats.make_consumer(config);
    let engine = Engine::with(|options| options.faults.latency = Duration::from_secs(7));
    let (mine, other) = (site(&engine, nats), site(&engine, nats));
    let (daemon, second) = (mine.run(), other.run());
    let written = add_faces(nats, 0..8);
    engine.until_accepted(8);
    nats.until_settled();
    let samples = [daemon.metrics(), second.metrics()];
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    let sum = |name: &str| samples.iter().map(|it| it.count(name, "")).sum::<i64>();
    assert_eq!((sum("framegate_frames_received_total"), sum("framegate_redelivered_total")), (8, 0));
}

#[test]
fn b16_after_kill_9_and_restart_under_load_nothing_is_lost_and_only_what_was_in_flight_is_doubled() {
    let nats = nats!("b16_after_kill_9_and_restart_under_load_nothing_is_lost_and_only_what_was_in_flight_is_doubled");
    nats.make_stream();
    nats.make_consumer(consumer(1));
    let engine = Engine::with(|options| options.faults.latency = Duration::from_millis(20));
    let site = site(&engine, &nats);
    let written = add_faces(&nats, 0..5 * FRAMES);
    let kills = 5;
    for kill in 1..=kills {
        let daemon = site.run();
        engine.until_accepted(kill * 100);
        daemon.kill();
    }
    let mut daemon = site.run();
    let samples = settled(&nats, &mut daemon);
    let doubled = nothing_lost(&[&engine], &written);
    // In flight, and accepted with the acknowledgement still to come.
    assert!(doubled <= kills * 2 * 16, "{doubled} came twice");
    assert!(samples.count("framegate_redelivered_total", "") > 0);
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
}

#[test]
fn b9_kill_9_of_the_server_again_and_again_loses_nothing_and_the_stream_resumes() {
    let mut nats = nats!("b9_kill_9_of_the_server_again_and_again_loses_nothing_and_the_stream_resumes");
    nats.make_stream();
    nats.make_consumer(consumer(2));
    let engine = Engine::with(|options| options.faults.latency = Duration::from_millis(10));
    let site = site(&engine, &nats);
    let mut daemon = site.run();
    let mut written = Vec::new();
    for n in 0..50 {
        written.extend(add_faces(&nats, n * 20..(n + 1) * 20));
        engine.until_accepted(n * 20 + 5);
        nats.server.kill();
        until_held(&daemon, "stream FRAMES");
        nats.server.again();
        until_ready(&daemon);
    }
    engine.until_accepted(1000);
    settled(&nats, &mut daemon);
    // It forgets acknowledgements that it confirmed just before it is killed, and delivers again: the daemon does not.
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}

#[test]
fn b13_a_server_that_falls_silent_is_noticed_and_taken_up_again() {
    let nats = nats!("b13_a_server_that_falls_silent_is_noticed_and_taken_up_again");
    nats.make_stream();
    let engine = Engine::start();
    let site = site(&engine, &nats);
    let mut daemon = site.run();
    let mut written = add_faces(&nats, 0..20);
    engine.until_accepted(20);
    nats.server.freeze(true);
    until_held(&daemon, "silent");
    nats.server.freeze(false);
    written.extend(add_faces(&nats, 20..40));
    engine.until_accepted(40);
    settled(&nats, &mut daemon);
    until_ready(&daemon);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}

#[test]
fn b15_killed_between_dead_letter_and_acknowledgement_it_is_one_dead_letter() {
    let nats = nats!("b15_killed_between_dead_letter_and_acknowledgement_it_is_one_dead_letter");
    nats.make_stream();
    nats.make_consumer(consumer(2));
    let engine = Engine::start();
    let site = site(&engine, &nats);
    let daemon = site.run();
    // The disk of the dead letters is gone until the server is silent.
    let (directory, away) = (site.dead_letters(), site.path().join("away"));
    fs::rename(&directory, &away).unwrap();
    fs::write(&directory, "not a directory").unwrap();
    nats.publish(vec![("frames.Cam".into(), HeaderMap::new(), b"no image".to_vec())]);
    eventually("the dead letter waits for its disk", PATIENCE, || {
        (daemon.metrics().count("framegate_settle_errors_total", "operation=\"dead-letter\"") > 0).then_some(())
    });
    nats.server.freeze(true);
    fs::remove_file(&directory).unwrap();
    fs::rename(&away, &directory).unwrap();
    eventually("it is a dead letter", PATIENCE, || {
        (daemon.metrics().count("framegate_dead_letters", "") == 1).then_some(())
    });
    daemon.kill();
    nats.server.freeze(false);
    assert_eq!(nats.consumer().unwrap().num_ack_pending, 1);
    let mut daemon = site.run();
    let samples = settled(&nats, &mut daemon);
    assert_eq!(samples.count("framegate_dead_letters", ""), 1, "the same one");
    assert!(samples.count("framegate_redelivered_total", "") >= 1);
}

#[test]
fn a_stop_gives_back_what_waits_and_the_next_box_has_it_at_once() {
    let nats = nats!("a_stop_gives_back_what_waits_and_the_next_box_has_it_at_once");
    nats.make_stream();
    // Longer than the test's patience: only what is given back comes in time.
    nats.make_consumer(consumer(300));
    let engine = Engine::start();
    engine.down();
    let (mine, other) = (site(&engine, &nats), site(&engine, &nats));
    let daemon = mine.run();
    let written = add_faces(&nats, 0..100);
    until_pending(&nats, 100);
    assert!(daemon.stop().success());
    engine.up();
    let mut heir = other.run();
    engine.until_accepted(100);
    settled(&nats, &mut heir);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}

// ---- what the server may do

#[test]
fn b8_a_missing_stream_and_consumers_that_would_lose_frames_are_named_and_healed() {
    let nats = nats!("b8_a_missing_stream_and_consumers_that_would_lose_frames_are_named_and_healed");
    let engine = Engine::start();
    let site = site(&engine, &nats);
    let mut daemon = site.start().until_told();
    until_held(&daemon, "there is no stream FRAMES");
    nats.make_stream();
    until_ready(&daemon);
    let mut written = add_faces(&nats, 0..20);
    engine.until_accepted(20);
    settled(&nats, &mut daemon);

    let replace = |config: pull::Config| {
        nats.run(async |it| it.delete_consumer_from_stream("framegate", "FRAMES").await.map(drop)).unwrap();
        nats.make_consumer(config);
    };
    // Stopped meanwhile: it makes a consumer itself where one is missing.
    assert!(daemon.stop().success());
    replace(pull::Config { ack_policy: AckPolicy::None, ..consumer(30) });
    let mut daemon = site.start().until_told();
    until_held(&daemon, "ack policy is none");
    assert_eq!(daemon.metrics().count("framegate_frames_received_total", ""), 0);
    nats.run(async |it| it.delete_consumer_from_stream("framegate", "FRAMES").await.map(drop)).unwrap();
    until_ready(&daemon);
    written.extend(add_faces(&nats, 20..40));
    engine.until_accepted(60);
    settled(&nats, &mut daemon);
    assert_eq!(nothing_lost(&[&engine], &written), 20, "a new consumer begins at the stream's beginning");
}

#[test]
fn a_consumer_that_is_deleted_meanwhile_is_made_anew_where_it_was() {
    let nats = nats!("a_consumer_that_is_deleted_meanwhile_is_made_anew_where_it_was");
    nats.make_stream();
    let engine = Engine::start();
    let site = site(&engine, &nats);
    let mut daemon = site.run();
    let mut written = add_faces(&nats, 0..40);
    engine.until_accepted(40);
    settled(&nats, &mut daemon);
    nats.run(async |it| it.delete_consumer_from_stream("framegate", "FRAMES").await.map(drop)).unwrap();
    written.extend(add_faces(&nats, 40..60));
    engine.until_accepted(60);
    settled(&nats, &mut daemon);
    assert_eq!(nothing_lost(&[&engine], &written), 0, "nothing from before");
}

#[test]
fn b8_a_missing_permission_is_named_and_b17_a_wrong_password_holds_this_source_only() {
    let accounts = r#"authorization { users: [
        { user: admin, password: admin }
        { user: poor, password: canary-nats-31, permissions: { publish: ["frames.>"], subscribe: ["_INBOX.>"] } }
    ] }"#;
    let Some(nats) = Nats::with(accounts, Some(("admin", "admin"))) else {
        return skipped("b8_a_missing_permission", "nats-server is not installed");
    };
    nats.make_stream();
    let engine = Engine::start();
    let keys = |user: &str| {
        format!(
            "nats = {{ url = \"{}\", stream = \"FRAMES\", consumer = \"{user}\", username = \"{user}\", password_file = \"{user}\" }}",
            nats.url()
        )
    };
    let site = Site::new(&engine.base_url())
        .fed("Poor", "UTC", &keys("poor"))
        .fed("Cam", "UTC", &keys("admin"))
        .detector("Door", "UTC", "");
    secret(&site, "poor", "canary-nats-31");
    secret(&site, "admin", "wrong");
    let mut daemon = site.start().until_told();
    until_held(&daemon, "ermissions Violation");
    until_held(&daemon, "password_file");
    put(&site.drop_dir("Door"), "1.jpg", &image(1));
    engine.until_accepted(1);
    assert_eq!(daemon.metrics().count("framegate_detector_up", "detector=\"Cam\""), 0);
    secret(&site, "admin", "admin");
    let written = [vec![hash(&image(1))], add_faces(&nats, 2..10)].concat();
    engine.until_accepted(9);
    assert_eq!(daemon.metrics().count("framegate_detector_up", "detector=\"Cam\""), 1);
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert!(!site.log().contains("canary-nats-31"));
}

#[test]
fn b17_tls_with_the_ca_of_the_server_works_and_without_it_holds_and_the_second_server_is_tried() {
    let dir = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    fs::write(&cert, made.cert.pem()).unwrap();
    fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let (cert, key) = (cert.display(), key.display());
    // The test's own client speaks without TLS.
    let lines = format!("allow_non_tls: true\ntls {{ cert_file: \"{cert}\"\nkey_file: \"{key}\" }}");
    let Some(nats) = Nats::with(&lines, None) else {
        return skipped("b17_tls", "nats-server is not installed");
    };
    nats.make_stream();
    let engine = Engine::start();
    let url = format!("tls://localhost:1,tls://localhost:{}", nats.server.port());
    let distrustful = site_at(&engine, &format!("tls://localhost:{}", nats.server.port()), "");
    let daemon = distrustful.start().until_told();
    until_held(&daemon, "ca_file");
    daemon.kill();
    let site = site_at(&engine, &url, &format!(", ca_file = \"{cert}\""));
    let mut daemon = site.run();
    let written = add_faces(&nats, 0..20);
    engine.until_accepted(20);
    settled(&nats, &mut daemon);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}

// ---- more than one box

#[test]
fn two_daemons_share_a_consumer_evenly_and_when_one_is_killed_the_other_finishes() {
    let nats = nats!("two_daemons_share_a_consumer_evenly_and_when_one_is_killed_the_other_finishes");
    nats.make_stream();
    nats.make_consumer(consumer(2));
    let engine = Engine::with(|options| options.faults.latency = Duration::from_millis(20));
    let (a, b) = (site(&engine, &nats), site(&engine, &nats));
    let (first, mut second) = (a.run(), b.run());
    let mut written = add_faces(&nats, 0..2000);
    engine.until_accepted(2000);
    let share = |daemon: &Daemon<'_>| daemon.metrics().count("framegate_frames_published_total", "");
    eventually("both have counted", PATIENCE, || (share(&first) + share(&second) >= 2000).then_some(()));
    let shares = (share(&first), share(&second));
    assert!(shares.0.min(shares.1) >= 800, "{shares:?}");
    written.extend(add_faces(&nats, 2000..3000));
    engine.until_accepted(2200);
    first.kill();
    settled(&nats, &mut second);
    let doubled = nothing_lost(&[&engine], &written);
    assert!(doubled <= 2 * 16, "{doubled} came twice");
}

/// Writes a secret file that only its owner can read.
fn secret(site: &Site, file: &str, text: &str) {
    let path = site.path().join(file);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
}
