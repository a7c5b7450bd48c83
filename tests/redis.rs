//! From a Redis stream to the engine, through the real binary and a real server, in every trouble that the two can make.
//! FAULTS.md section B, as far as it concerns Redis.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use support::brokers::Redis;
use support::engine::{Engine, Hash, hash, image, nothing_lost};
use support::faults::skipped;
use support::{Daemon, PATIENCE, Samples, Site, eventually, put};

const FRAMES: u64 = 200;
/// Longer than entries may lie untouched in these tests.
const SLOW: Duration = Duration::from_secs(5);

/// A test that needs the server is skipped aloud without it.
macro_rules! redis {
    ($test:literal) => {
        match Redis::start() {
            Some(redis) => redis,
            None => return skipped($test, "redis-server is not installed"),
        }
    };
}

/// A site that reads the stream `frames` as consumer `name`; others take over after a second.
fn site(engine: &Engine, redis: &Redis, name: &str) -> Site {
    let keys = format!(
        "redis = {{ url = \"{}\", stream = \"frames\", consumer = \"{name}\", take_over_after = \"1s\" }}",
        redis.url()
    );
    Site::new(&engine.base_url())
        .section("[publish]\nbackoff_min = \"20ms\"\nbackoff_max = \"200ms\"\nmax_in_flight = 16")
        .fed("{field.detectorName}", "Europe/Paris", &keys)
}

fn add_faces(redis: &Redis, numbers: std::ops::Range<u64>) -> Vec<Hash> {
    let mut client = ::redis::Client::open(redis.url()).unwrap().get_connection().unwrap();
    let mut pipeline = ::redis::pipe();
    let mut written = Vec::new();
    for n in numbers {
        let image = image(n);
        written.push(hash(&image));
        pipeline.cmd("XADD").arg("frames").arg("*").arg("detectorName").arg("Cam").arg("image").arg(image).ignore();
    }
    pipeline.query::<()>(&mut client).unwrap();
    written
}

/// Everything is settled at the server and in the daemon, and the equation holds.
#[track_caller]
fn settled(redis: &Redis, daemon: &mut Daemon<'_>) -> Samples {
    redis.until_settled();
    daemon.idle(PATIENCE)
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

// ---- what an entry may look like

#[test]
fn entries_of_redis_cli_are_published_as_their_fields_or_their_json_say() {
    let redis = redis!("entries_of_redis_cli_are_published_as_their_fields_or_their_json_say");
    let engine = Engine::start();
    // There before the group: nothing that waits is lost.
    let id = redis.add(&["detectorName", "Door"], &image(1));
    let fields = ["detectorName", "Tür", "ianaTimeZone", "Asia/Tokyo", "detectTimeUtc", "2026-11-23T11:00:00.123Z"];
    redis.add(&fields, &image(2));
    let json = format!(
        r#"{{"expanded":"{}","detectorName":"Json","ianaTimeZone":"UTC","detectTimeUtc":"2026-11-23T11:00:00.456Z"}}"#,
        BASE64_STANDARD.encode(image(3))
    );
    redis.cli_with(&["XADD", "frames", "*", "body"], json.as_bytes());

    let site = site(&engine, &redis, "a");
    let mut daemon = site.run();
    let samples = settled(&redis, &mut daemon);
    let mut arrived: Vec<_> =
        engine.accepted().into_iter().map(|it| (it.detector, it.zone, it.time.as_millisecond(), it.sha256)).collect();
    arrived.sort();
    let millis = |text: &str| text.parse::<jiff::Timestamp>().unwrap().as_millisecond();
    let of_the_id = id.split('-').next().unwrap().parse().unwrap();
    let zone = "Europe/Paris".to_owned();
    assert_eq!(
        arrived,
        [
            ("Door".to_owned(), zone, of_the_id, hash(&image(1))),
            ("Json".to_owned(), "UTC".to_owned(), millis("2026-11-23T11:00:00.456Z"), hash(&image(3))),
            ("Tür".to_owned(), "Asia/Tokyo".to_owned(), millis("2026-11-23T11:00:00.123Z"), hash(&image(2))),
        ]
    );
    assert_eq!(samples.count("framegate_frames_received_total", "source=\"redis\""), 3);
    assert_eq!(samples.count("framegate_detector_up", "detector=\"Door\""), 1);
    assert_eq!(redis.cli(&["XLEN", "frames"]), "3", "acknowledged, not removed");
    let (_, status) = daemon.get("/status").unwrap();
    assert!(status.contains(&format!("{} stream frames", redis.url())), "{status}");
    assert!(daemon.stop().success());
}

#[test]
fn settled_entries_are_removed_where_that_is_asked_for() {
    let redis = redis!("settled_entries_are_removed_where_that_is_asked_for");
    let engine = Engine::start();
    let written = add_faces(&redis, 0..20);
    let keys = format!("redis = {{ url = \"{}\", stream = \"frames\", delete = true }}", redis.url());
    let site = Site::new(&engine.base_url()).fed("Cam", "UTC", &keys);
    let mut daemon = site.run();
    settled(&redis, &mut daemon);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert_eq!(redis.cli(&["XLEN", "frames"]), "0");
}

#[test]
fn b14_a_poison_entry_is_one_dead_letter_and_one_acknowledgement() {
    let redis = redis!("b14_a_poison_entry_is_one_dead_letter_and_one_acknowledgement");
    let engine = Engine::start();
    let site = site(&engine, &redis, "a");
    let mut daemon = site.run();
    let large = vec![b'x'; 50 << 20];
    redis.cli_with(&["XADD", "frames", "*", "detectorName", "Cam", "body"], b"{\"expanded\":");
    redis.cli_with(&["XADD", "frames", "*", "body"], br#"{"expanded":"!!!!","detectorName":"Cam"}"#);
    redis.cli_with(&["XADD", "frames", "*", "neither", "this", "nor"], b"that");
    redis.cli_with(&["XADD", "frames", "*", "image"], &image(1));
    redis.cli_with(&["XADD", "frames", "*", "detectorName", "Cam", "detectTimeUtc", "noon", "image"], &image(2));
    redis.add(&["detectorName", "Cam"], b"no image");
    redis.add(&["detectorName", "Cam"], &large);
    let good = add_faces(&redis, 10..20);
    let samples = settled(&redis, &mut daemon);
    assert_eq!(nothing_lost(&[&engine], &good), 0);
    let letters = |reason: &str| samples.count("framegate_frames_dead_lettered_total", &format!("reason=\"{reason}\""));
    assert_eq!((letters("unsupported"), letters("too-large")), (6, 1));
    assert_eq!(samples.count("framegate_dead_letters", ""), 7);
    assert_eq!(samples.count("framegate_redelivered_total", ""), 0);
    // The payload is kept as it came.
    let kept: Vec<Vec<u8>> = support::files_below(&site.dead_letters())
        .into_iter()
        .filter(|path| path.extension().is_some_and(|it| it == "image"))
        .map(|path| fs::read(path).unwrap())
        .collect();
    for payload in [b"{\"expanded\":".to_vec(), br#"{"expanded":"!!!!","detectorName":"Cam"}"#.to_vec(), image(1)] {
        assert!(kept.contains(&payload));
    }
}

// ---- outages and deaths

#[test]
fn an_engine_outage_keeps_entries_pending_and_ends_with_none() {
    let redis = redis!("an_engine_outage_keeps_entries_pending_and_ends_with_none");
    let engine = Engine::start();
    engine.down();
    let site = site(&engine, &redis, "a");
    let mut daemon = site.run();
    let written = add_faces(&redis, 0..2 * FRAMES);
    eventually("frames are in hand", PATIENCE, || (redis.pending() > 100).then_some(()));
    // What is in hand is bounded, the rest waits at the server.
    eventually("heartbeats come", PATIENCE, || {
        let rows = redis.cli(&["XPENDING", "frames", "framegate", "IDLE", "1000", "-", "+", "10"]);
        rows.is_empty().then_some(())
    });
    assert!(redis.pending() <= 192 && redis.lag().unwrap() > 0, "{} pending", redis.pending());
    engine.up();
    let samples = settled(&redis, &mut daemon);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
    assert_eq!(samples.count("framegate_redelivered_total", ""), 0);
}

#[test]
fn b10_a_slow_engine_beyond_the_take_over_is_waited_for_and_each_entry_delivered_once() {
    let redis = redis!("b10_a_slow_engine_beyond_the_take_over_is_waited_for_and_each_entry_delivered_once");
    let engine = Engine::with(|options| options.faults.latency = SLOW);
    let (mine, other) = (site(&engine, &redis, "mine"), site(&engine, &redis, "other"));
    let mut daemon = mine.run();
    let written = add_faces(&redis, 0..8);
    eventually("all are in hand", PATIENCE, || (redis.pending() == 8).then_some(()));
    // Somebody who would like to take them over, all the time.
    let thief = other.run();
    let samples = settled(&redis, &mut daemon);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert_eq!(samples.count("framegate_frames_published_total", ""), 8);
    assert_eq!(thief.metrics().count("framegate_frames_received_total", ""), 0, "stolen");
}

#[test]
fn b10_after_a_kill_9_the_other_takes_over_what_the_dead_one_had() {
    let redis = redis!("b10_after_a_kill_9_the_other_takes_over_what_the_dead_one_had");
    let engine = Engine::start();
    engine.down();
    let (mine, other) = (site(&engine, &redis, "mine"), site(&engine, &redis, "other"));
    let daemon = mine.run();
    let written = add_faces(&redis, 0..50);
    eventually("all are in hand", PATIENCE, || (redis.pending() == 50).then_some(()));
    daemon.kill();
    engine.up();
    let mut heir = other.run();
    let samples = settled(&redis, &mut heir);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert_eq!(samples.count("framegate_redelivered_total", ""), 50);
}

#[test]
fn b16_after_kill_9_and_restart_under_load_nothing_is_lost_and_only_what_was_in_flight_is_doubled() {
    let redis =
        redis!("b16_after_kill_9_and_restart_under_load_nothing_is_lost_and_only_what_was_in_flight_is_doubled");
    let engine = Engine::with(|options| options.faults.latency = Duration::from_millis(20));
    let site = site(&engine, &redis, "a");
    let written = add_faces(&redis, 0..5 * FRAMES);
    let kills = 5;
    for kill in 1..=kills {
        let daemon = site.run();
        engine.until_accepted(kill * 100);
        daemon.kill();
    }
    let mut daemon = site.run();
    let samples = settled(&redis, &mut daemon);
    let doubled = nothing_lost(&[&engine], &written);
    // In flight, and accepted with the acknowledgement still to come.
    assert!(doubled <= kills * 2 * 16, "{doubled} came twice");
    assert!(samples.count("framegate_redelivered_total", "") > 0);
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
}

#[test]
fn b9_kill_9_of_the_server_again_and_again_loses_nothing() {
    let mut redis = redis!("b9_kill_9_of_the_server_again_and_again_loses_nothing");
    let engine = Engine::with(|options| options.faults.latency = Duration::from_millis(10));
    let site = site(&engine, &redis, "a");
    let mut daemon = site.run();
    let mut written = Vec::new();
    for n in 0..5 {
        written.extend(add_faces(&redis, n * FRAMES..(n + 1) * FRAMES));
        engine.until_accepted(n * FRAMES + 50);
        redis.0.kill();
        until_held(&daemon, "stream frames");
        assert_eq!(daemon.metrics().count("framegate_detector_up", "detector=\"Cam\""), 0);
        redis.0.again();
        until_ready(&daemon);
    }
    settled(&redis, &mut daemon);
    assert_eq!(nothing_lost(&[&engine], &written), 0, "in hand all the time");
}

#[test]
fn b13_a_server_that_falls_silent_is_noticed_and_taken_up_again() {
    let redis = redis!("b13_a_server_that_falls_silent_is_noticed_and_taken_up_again");
    let engine = Engine::start();
    let site = site(&engine, &redis, "a");
    let mut daemon = site.run();
    let mut written = add_faces(&redis, 0..20);
    engine.until_accepted(20);
    redis.0.freeze(true);
    until_held(&daemon, "timed out");
    redis.0.freeze(false);
    written.extend(add_faces(&redis, 20..40));
    settled(&redis, &mut daemon);
    until_ready(&daemon);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}

#[test]
fn b15_killed_between_dead_letter_and_acknowledgement_it_is_one_dead_letter() {
    let redis = redis!("b15_killed_between_dead_letter_and_acknowledgement_it_is_one_dead_letter");
    let engine = Engine::start();
    let site = site(&engine, &redis, "a");
    let daemon = site.run();
    redis.cli(&["ACL", "SETUSER", "default", "-xack"]);
    redis.add(&["detectorName", "Cam"], b"no image");
    until_held(&daemon, "xack");
    assert_eq!(daemon.metrics().count("framegate_dead_letters", ""), 1);
    daemon.kill();
    redis.cli(&["ACL", "SETUSER", "default", "+xack"]);
    let mut daemon = site.run();
    let samples = settled(&redis, &mut daemon);
    assert_eq!(samples.count("framegate_dead_letters", ""), 1, "the same one");
    assert_eq!(samples.count("framegate_redelivered_total", ""), 1);
}

#[test]
fn an_entry_that_was_delivered_again_and_again_comes_alone_and_in_the_end_is_a_dead_letter() {
    let redis = redis!("an_entry_that_was_delivered_again_and_again_comes_alone_and_in_the_end_is_a_dead_letter");
    let engine = Engine::start();
    redis.cli(&["XGROUP", "CREATE", "frames", "framegate", "0", "MKSTREAM"]);
    let written = add_faces(&redis, 0..10);
    redis.cli(&["XREADGROUP", "GROUP", "framegate", "a", "COUNT", "10", "STREAMS", "frames", ">"]);
    let pending = redis.cli(&["XPENDING", "frames", "framegate", "-", "+", "10"]);
    let first = pending.lines().next().unwrap().to_owned();
    redis.cli(&["XCLAIM", "frames", "framegate", "a", "0", &first, "RETRYCOUNT", "10", "JUSTID"]);
    let suspect = pending.lines().nth(4).unwrap().to_owned();
    redis.cli(&["XCLAIM", "frames", "framegate", "a", "0", &suspect, "RETRYCOUNT", "5", "JUSTID"]);
    let site = site(&engine, &redis, "a");
    let mut daemon = site.run();
    let samples = settled(&redis, &mut daemon);
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", "reason=\"internal-error\""), 1);
    assert_eq!(nothing_lost(&[&engine], &written[1..]), 0);
}

#[test]
fn a_stop_gives_back_what_waits_and_the_next_box_has_it_at_once() {
    let redis = redis!("a_stop_gives_back_what_waits_and_the_next_box_has_it_at_once");
    let engine = Engine::start();
    engine.down();
    let (mine, other) = (site(&engine, &redis, "mine"), site(&engine, &redis, "other"));
    let daemon = mine.run();
    let written = add_faces(&redis, 0..100);
    eventually("all are in hand", PATIENCE, || (redis.pending() == 100).then_some(()));
    assert!(daemon.stop().success());
    assert_eq!(redis.pending(), 100);
    engine.up();
    let mut heir = other.run();
    settled(&redis, &mut heir);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}

#[test]
fn a_reload_that_changes_the_entry_doubles_nothing_that_is_in_flight() {
    let redis = redis!("a_reload_that_changes_the_entry_doubles_nothing_that_is_in_flight");
    let engine = Engine::with(|options| options.faults.latency = Duration::from_secs(2));
    let site = site(&engine, &redis, "a");
    let mut daemon = site.run();
    let written = add_faces(&redis, 0..60);
    eventually("frames are in flight", PATIENCE, || {
        (daemon.metrics().count("framegate_frames_in_flight", "") > 0).then_some(())
    });
    let changed = fs::read_to_string(site.config()).unwrap().replace("Europe/Paris", "Europe/Rome");
    fs::write(site.config(), changed).unwrap();
    engine.change(|faults| faults.latency = Duration::from_millis(500));
    assert!(site.command(&["reload"]).output().unwrap().status.success());
    engine.until_accepted(60);
    settled(&redis, &mut daemon);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}

#[test]
fn b16_settled_entries_that_are_delivered_again_are_acknowledged_and_not_published_again() {
    let redis = redis!("b16_settled_entries_that_are_delivered_again_are_acknowledged_and_not_published_again");
    let engine = Engine::start();
    let site = site(&engine, &redis, "a");
    let mut daemon = site.run();
    let written = add_faces(&redis, 0..50);
    engine.until_accepted(50);
    settled(&redis, &mut daemon);
    // As after a fail-over to a replica that was behind.
    redis.cli(&["XGROUP", "SETID", "frames", "framegate", "0"]);
    eventually("all of them come again", PATIENCE, || {
        (daemon.metrics().count("framegate_redelivered_total", "") == 50).then_some(())
    });
    let samples = settled(&redis, &mut daemon);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert_eq!(samples.count("framegate_redelivered_total", ""), 50);
}

// ---- what the server may do

#[test]
fn b11_trimmed_entries_are_counted_as_lost_upstream_acknowledged_and_said_once() {
    let redis = redis!("b11_trimmed_entries_are_counted_as_lost_upstream_acknowledged_and_said_once");
    let engine = Engine::start();
    engine.down();
    let site = site(&engine, &redis, "a");
    let daemon = site.run();
    let written = add_faces(&redis, 0..40);
    eventually("all are in hand", PATIENCE, || (redis.pending() == 40).then_some(()));
    daemon.kill();
    redis.cli(&["XTRIM", "frames", "MAXLEN", "10"]);
    engine.up();
    let mut daemon = site.run();
    let samples = settled(&redis, &mut daemon);
    assert_eq!(nothing_lost(&[&engine], &written[30..]), 0);
    assert_eq!(samples.count("framegate_lost_upstream_total", "reason=\"trimmed\""), 30);
    assert_eq!(site.log().matches("were trimmed from the stream").count(), 1);
}

#[test]
fn b11_what_is_trimmed_while_it_is_in_hand_is_published_all_the_same() {
    let redis = redis!("b11_what_is_trimmed_while_it_is_in_hand_is_published_all_the_same");
    let engine = Engine::start();
    engine.down();
    let site = site(&engine, &redis, "a");
    let mut daemon = site.run();
    let written = add_faces(&redis, 0..40);
    eventually("all are in hand", PATIENCE, || (redis.pending() == 40).then_some(()));
    redis.cli(&["XTRIM", "frames", "MAXLEN", "0"]);
    engine.up();
    let samples = settled(&redis, &mut daemon);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert_eq!(samples.count("framegate_lost_upstream_total", ""), 0);
}

#[test]
fn b12_after_flushall_the_group_is_made_anew_and_what_is_in_hand_is_published() {
    let redis = redis!("b12_after_flushall_the_group_is_made_anew_and_what_is_in_hand_is_published");
    let engine = Engine::start();
    engine.down();
    let site = site(&engine, &redis, "a");
    let mut daemon = site.run();
    let mut written = add_faces(&redis, 0..40);
    eventually("all are in hand", PATIENCE, || (redis.pending() == 40).then_some(()));
    redis.cli(&["FLUSHALL"]);
    written.extend(add_faces(&redis, 40..60));
    engine.up();
    engine.until_accepted(60);
    settled(&redis, &mut daemon);
    // Ids that begin anew, before all that was seen.
    redis.cli(&["FLUSHALL"]);
    redis.cli_with(&["XADD", "frames", "1-1", "detectorName", "Cam", "image"], &image(60));
    written.push(hash(&image(60)));
    engine.until_accepted(61);
    settled(&redis, &mut daemon);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}

#[test]
fn b12_a_destroyed_group_goes_on_where_it_was() {
    let redis = redis!("b12_a_destroyed_group_goes_on_where_it_was");
    let engine = Engine::start();
    let site = site(&engine, &redis, "a");
    let mut daemon = site.run();
    let mut written = add_faces(&redis, 0..40);
    engine.until_accepted(40);
    settled(&redis, &mut daemon);
    redis.cli(&["XGROUP", "DESTROY", "frames", "framegate"]);
    written.extend(add_faces(&redis, 40..60));
    engine.until_accepted(60);
    settled(&redis, &mut daemon);
    assert_eq!(nothing_lost(&[&engine], &written), 0, "nothing from before");
}

#[test]
fn b12_a_replica_a_full_memory_and_a_key_of_another_kind_are_named_and_healed() {
    let redis = redis!("b12_a_replica_a_full_memory_and_a_key_of_another_kind_are_named_and_healed");
    let engine = Engine::start();
    redis.cli(&["SET", "frames", "x"]);
    let site = site(&engine, &redis, "a");
    let mut daemon = site.start();
    daemon = daemon.until_told();
    until_held(&daemon, "holds something else than a stream");
    redis.cli(&["CONFIG", "SET", "maxmemory", "1"]);
    redis.cli(&["DEL", "frames"]);
    until_held(&daemon, "out of memory");
    redis.cli(&["CONFIG", "SET", "maxmemory", "0"]);
    until_ready(&daemon);
    let written = add_faces(&redis, 0..20);
    settled(&redis, &mut daemon);
    redis.cli(&["REPLICAOF", "127.0.0.1", "1"]);
    redis.cli(&["CONFIG", "SET", "replica-serve-stale-data", "yes"]);
    until_held(&daemon, "fail-over");
    redis.cli(&["REPLICAOF", "NO", "ONE"]);
    until_ready(&daemon);
    let more = add_faces(&redis, 20..40);
    settled(&redis, &mut daemon);
    assert_eq!(nothing_lost(&[&engine], &[written, more].concat()), 0);
}

#[test]
fn b17_a_wrong_password_holds_this_source_only_until_the_file_is_right() {
    let Some(redis) =
        Redis::with(&["--user", "default", "off", "--user", "edge", "on", ">canary-redis-77", "~frames", "+@all"])
    else {
        return skipped("b17_a_wrong_password", "redis-server is not installed");
    };
    let engine = Engine::start();
    let password = |site: &Site, text: &str| {
        let path = site.path().join("redis-password");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    };
    let keys = format!(
        "redis = {{ url = \"{}\", stream = \"frames\", username = \"edge\", password_file = \"redis-password\" }}",
        redis.url()
    );
    let site = Site::new(&engine.base_url()).fed("Cam", "UTC", &keys).detector("Door", "UTC", "");
    password(&site, "wrong");
    let mut daemon = site.start().until_told();
    until_held(&daemon, "password_file");
    let (_, reasons) = daemon.get("/readyz").unwrap();
    assert!(reasons.contains("detector Cam") && !reasons.contains("detector Door"), "{reasons}");
    put(&site.drop_dir("Door"), "1.jpg", &image(1));
    engine.until_accepted(1);
    assert_eq!(daemon.metrics().count("framegate_detector_up", "detector=\"Cam\""), 0);
    password(&site, "canary-redis-77");
    until_ready(&daemon);
    assert_eq!(daemon.metrics().count("framegate_detector_up", "detector=\"Cam\""), 1);
    daemon.idle(PATIENCE);
    assert!(!site.log().contains("canary-redis-77"));
}

#[test]
fn b17_tls_with_the_ca_of_the_server_works_and_without_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    fs::write(&cert, made.cert.pem()).unwrap();
    fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let (cert, key) = (cert.to_str().unwrap(), key.to_str().unwrap());
    let Some(redis) = Redis::with(&["--tls-cert-file", cert, "--tls-key-file", key, "--tls-auth-clients", "no"]) else {
        return skipped("b17_tls", "redis-server is not installed");
    };
    let tls_port = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().port()
    };
    assert_eq!(redis.cli(&["CONFIG", "SET", "tls-port", &tls_port.to_string()]), "OK");
    let engine = Engine::start();
    let of = |ca: &str| {
        let keys = format!("redis = {{ url = \"rediss://localhost:{tls_port}\", stream = \"frames\"{ca} }}");
        Site::new(&engine.base_url()).fed("Cam", "UTC", &keys)
    };
    let distrustful = of("");
    let daemon = distrustful.start().until_told();
    until_held(&daemon, "certificate");
    daemon.kill();
    let site = of(&format!(", ca_file = \"{cert}\""));
    let mut daemon = site.run();
    let written = add_faces(&redis, 0..20);
    settled(&redis, &mut daemon);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}

// ---- more than one box

#[test]
fn two_daemons_share_a_group_evenly_and_when_one_is_killed_the_other_finishes() {
    let redis = redis!("two_daemons_share_a_group_evenly_and_when_one_is_killed_the_other_finishes");
    let engine = Engine::with(|options| options.faults.latency = Duration::from_millis(20));
    let (a, b) = (site(&engine, &redis, "a"), site(&engine, &redis, "b"));
    let (first, mut second) = (a.run(), b.run());
    let mut written = add_faces(&redis, 0..2000);
    engine.until_accepted(2000);
    let share = |daemon: &Daemon<'_>| daemon.metrics().count("framegate_frames_published_total", "");
    eventually("both have counted", PATIENCE, || (share(&first) + share(&second) >= 2000).then_some(()));
    let shares = (share(&first), share(&second));
    assert!(shares.0.min(shares.1) >= 800, "{shares:?}");
    written.extend(add_faces(&redis, 2000..3000));
    engine.until_accepted(2200);
    first.kill();
    settled(&redis, &mut second);
    let doubled = nothing_lost(&[&engine], &written);
    assert!(doubled <= 2 * 16, "{doubled} came twice");
}

#[test]
fn check_says_what_it_would_connect_to() {
    let site = Site::new("https://127.0.0.1:5009").fed(
        "Cam",
        "UTC",
        "redis = { url = \"rediss://10.0.0.5\", stream = \"frames\", username = \"edge\", password_file = \"pw\", consumer = \"edge-07\" }",
    );
    site.write_config();
    let output =
        Command::new(env!("CARGO_BIN_EXE_framegate")).args(["check", "--config"]).arg(site.config()).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    for part in [
        "redis      rediss://10.0.0.5 as edge",
        "stream frames, group framegate, consumer edge-07",
        "password_file: cannot read",
    ] {
        assert!(said.contains(part), "{part}\n{said}");
    }
}

#[test]
fn frames_older_than_max_age_are_dropped_counted_and_acknowledged() {
    let redis = redis!("frames_older_than_max_age_are_dropped_counted_and_acknowledged");
    let engine = Engine::start();
    let old = ["detectorName", "Cam", "detectTimeUtc", "2026-01-01T00:00:00Z"];
    redis.add(&old, &image(1));
    redis.add(&["detectorName", "Cam"], &image(2));
    let keys = format!("max_age = \"1h\"\nredis = {{ url = \"{}\", stream = \"frames\" }}", redis.url());
    let site = Site::new(&engine.base_url()).fed("Cam", "UTC", &keys);
    let mut daemon = site.run();
    let samples = settled(&redis, &mut daemon);
    assert_eq!(nothing_lost(&[&engine], &[hash(&image(2))]), 0);
    assert_eq!(samples.count("framegate_frames_dropped_total", "reason=\"max-age\""), 1);
}
