//! From an MQTT broker to the engine, through the real binary and a real broker, in every trouble that the two can make.
//! FAULTS.md section B, as far as it concerns MQTT.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use support::brokers::{Mosquitto, mqtt_packets};
use support::engine::{Engine, Hash, hash, image, nothing_lost};
use support::faults::{Mount, skipped};
use support::network::{Relay, Silence, free_port, own_network};
use support::{Daemon, PATIENCE, Site, eventually, put};

const CLIENT_ID: &str = "framegate-edge-07";
/// The versions of MQTT, as `version` has them.
const VERSIONS: [u8; 2] = [5, 3];

/// A test that needs the broker is skipped aloud without it.
macro_rules! mosquitto {
    ($test:literal) => {
        match Mosquitto::start() {
            Some(broker) => broker,
            None => return skipped($test, "mosquitto is not installed"),
        }
    };
}

/// A site with the spool below it and one entry: `keys` are further ones of its table, `sections` further tables.
fn site_at(engine: &Engine, url: &str, keys: &str, sections: &str) -> Site {
    let site = Site::new(&engine.base_url());
    let spool = site.path().join("spool").display().to_string();
    let sections = if sections.contains("[spool]") { sections.to_owned() } else { format!("{sections}\n[spool]") };
    let sections = sections.replace("[spool]", &format!("[spool]\ndirectory = \"{spool}\""));
    let unless = |key: &str, text: &str| if keys.contains(key) { String::new() } else { text.to_owned() };
    let topic = unless("topic =", ", topic = \"frigate/+/person/snapshot\"");
    let client_id = unless("client_id =", &format!(", client_id = \"{CLIENT_ID}\""));
    let entry = format!("mqtt = {{ url = \"{url}\"{topic}{client_id}{keys} }}");
    site.section("[publish]\nbackoff_min = \"20ms\"\nbackoff_max = \"200ms\"").section(&sections).fed(
        "{topic.1}",
        "Europe/Paris",
        &entry,
    )
}

fn site(engine: &Engine, broker: &Mosquitto) -> Site {
    site_at(engine, &broker.url(), "", "")
}

fn topic(camera: &str) -> String {
    format!("frigate/{camera}/person/snapshot")
}

/// Publishes that many faces, confirmed by the broker.
fn add_faces(broker: &Mosquitto, numbers: std::ops::Range<u64>) -> Vec<Hash> {
    let mut client = broker.client();
    let written = numbers.map(|n| {
        let image = image(n);
        let hash = hash(&image);
        client.publish(&topic("Cam"), &[], image);
        hash
    });
    let written = written.collect();
    client.confirmed();
    written
}

#[track_caller]
fn until_received(daemon: &Daemon<'_>, frames: i64) {
    eventually(&format!("{frames} frames are spooled"), PATIENCE, || {
        (daemon.metrics().count("framegate_frames_received_total", "") >= frames).then_some(())
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

/// Nothing waits for us at the broker any more, neither in its queue nor unacknowledged: another client takes up the
/// session of a daemon that has ended.
#[track_caller]
fn nothing_waits(broker: &Mosquitto, client_id: &str) {
    broker.until_gone(client_id);
    let waited = broker.subscribe(&["-i", client_id, "-c", "-q", "1", "-t", "none/of/ours", "-W", "1", "-F", "%t %l"]);
    assert_eq!(String::from_utf8_lossy(&waited.stdout), "", "left at the broker");
}

/// Writes a secret file that only its owner can read.
fn secret(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

// ---- what a message may look like

#[test]
fn messages_are_published_as_their_properties_their_topic_or_their_json_say() {
    let broker = mosquitto!("messages_are_published_as_their_properties_their_topic_or_their_json_say");
    for version in VERSIONS {
        let engine = Engine::start();
        let site = site_at(&engine, &broker.url(), &format!(", version = {version}"), "");
        let mut daemon = site.run();
        let json = format!(r#"{{"expanded":"{}","ianaTimeZone":"UTC"}}"#, BASE64_STANDARD.encode(image(3)));
        let before = jiff::Timestamp::now().as_millisecond();
        broker.publish(&topic("Door"), &[], &image(1));
        let property = |name, value| ["-D", "PUBLISH", "user-property", name, value];
        let properties = [
            &["-V", "5"][..],
            &property("ianaTimeZone", "Asia/Tokyo"),
            &property("detectTimeUtc", "2026-11-23T11:00:00.123Z"),
            &property("detectorName", "Ignored: the topic says it"),
        ];
        broker.publish(&topic("Lobby"), &properties.concat(), &image(2));
        broker.publish(&topic("Json"), &[], json.as_bytes());
        broker.publish("frigate/Door/car/snapshot", &[], &image(9));
        engine.until_accepted(3);
        let samples = daemon.idle(PATIENCE);
        let mut arrived: Vec<_> = engine
            .accepted()
            .into_iter()
            .map(|it| (it.detector, it.zone, it.time.as_millisecond(), it.sha256))
            .collect();
        arrived.sort();
        let names: Vec<_> = arrived.iter().map(|it| (it.0.as_str(), it.1.as_str(), it.3)).collect();
        // User properties came with MQTT 5.
        let lobby = if version == 5 { "Asia/Tokyo" } else { "Europe/Paris" };
        assert_eq!(
            names,
            [
                ("Door", "Europe/Paris", hash(&image(1))),
                ("Json", "UTC", hash(&image(3))),
                ("Lobby", lobby, hash(&image(2))),
            ]
        );
        let of_arrival = arrived[0].2;
        assert!((before..=before + 60_000).contains(&of_arrival), "{of_arrival}");
        if version == 5 {
            assert_eq!(arrived[2].2, "2026-11-23T11:00:00.123Z".parse::<jiff::Timestamp>().unwrap().as_millisecond());
        }
        assert_eq!(samples.count("framegate_frames_received_total", "source=\"mqtt\""), 3);
        assert_eq!(samples.count("framegate_detector_up", "detector=\"Door\""), 1);
        let (_, status) = daemon.get("/status").unwrap();
        assert!(status.contains(&format!("{} topic frigate/+/person/snapshot", broker.url())), "{status}");
        assert!(daemon.stop().success());
    }
}

#[test]
fn retained_messages_are_left_unless_they_are_asked_for_and_are_acknowledged_in_any_case() {
    let broker = mosquitto!("retained_messages_are_left_unless_they_are_asked_for");
    for (version, asked) in VERSIONS.into_iter().flat_map(|it| [(it, false), (it, true)]) {
        let engine = Engine::start();
        let prefix = format!("v{version}-{asked}");
        let topic = format!("{prefix}/Cam/x");
        broker.publish(&topic, &["-r"], &image(1));
        let keys =
            format!(", version = {version}, retained = {asked}, topic = \"{prefix}/+/x\", client_id = \"{prefix}\"");
        let site = site_at(&engine, &broker.url(), &keys, "");
        let mut daemon = site.run();
        // Retained for those who come later, and new to those who are there.
        broker.publish(&topic, &["-r"], &image(2));
        let expected = if asked { vec![hash(&image(1)), hash(&image(2))] } else { vec![hash(&image(2))] };
        engine.until_accepted(expected.len() as u64);
        let samples = daemon.idle(PATIENCE);
        assert_eq!(nothing_lost(&[&engine], &expected), 0, "{prefix}");
        // MQTT 5 has a word for not sending them at all.
        let refused = samples.count("framegate_frames_refused_total", "reason=\"retained\"");
        assert_eq!(refused, i64::from(!asked && version == 3), "{prefix}");
        assert!(daemon.stop().success());
        nothing_waits(&broker, &prefix);
    }
}

#[test]
fn topics_of_another_depth_are_dead_letters_and_those_of_an_earlier_subscription_are_refused() {
    let broker = mosquitto!("topics_of_another_depth_are_dead_letters");
    let engine = Engine::start();
    let entry = |topic: &str| {
        let spool = "[spool]\ndirectory = \"SPOOL\"";
        let site = Site::new(&engine.base_url());
        let spool = spool.replace("SPOOL", site.path().join("spool").to_str().unwrap());
        let mqtt = format!("mqtt = {{ url = \"{}\", topic = \"{topic}\", client_id = \"box\" }}", broker.url());
        site.section(&spool).fed("{topic.1}-{topic.2}", "UTC", &mqtt)
    };
    let before = entry("cams/#");
    let mut daemon = before.run();
    broker.publish("cams/a/b/c", &[], &image(1));
    broker.publish("cams/a", &[], &image(2));
    until_received(&daemon, 2);
    engine.until_accepted(1);
    let samples = daemon.idle(PATIENCE);
    assert_eq!(engine.accepted()[0].detector, "a-b");
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", "reason=\"unsupported\""), 1);
    assert!(daemon.stop().success());

    let after = entry("others/+/+");
    let mut daemon = after.run();
    broker.publish("cams/a/b", &[], &image(3));
    broker.publish("others/a/b", &[], &image(4));
    engine.until_accepted(2);
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &[1, 4].map(|n| hash(&image(n)))), 0);
    assert_eq!(samples.count("framegate_frames_refused_total", "reason=\"other-topic\""), 1);
    assert!(after.log().contains("choose another client_id"));
    assert!(daemon.stop().success());
    nothing_waits(&broker, "box");
}

#[test]
fn b14_a_poison_message_is_one_dead_letter_and_one_acknowledgement() {
    let broker = mosquitto!("b14_a_poison_message_is_one_dead_letter_and_one_acknowledgement");
    for version in VERSIONS {
        let engine = Engine::start();
        let site = site_at(&engine, &broker.url(), &format!(", version = {version}"), "");
        let mut daemon = site.run();
        let mut client = broker.client();
        client.publish(&topic("Cam"), &[], b"{\"expanded\":".to_vec());
        client.publish(&topic("Cam"), &[], br#"{"expanded":"!!!!"}"#.to_vec());
        client.publish(&topic("Cam"), &[], b"no image".to_vec());
        client.publish(&topic("Cam"), &[], Vec::new());
        client.publish(&topic("Cam"), &[], image(1)[..100].to_vec());
        client.publish(&topic("Cam"), &[], vec![b'x'; 9 << 20]);
        client.publish(&topic("Cam"), &[], vec![b'y'; 50 << 20]);
        if version == 5 {
            client.publish(&topic("Cam"), &[("detectTimeUtc", "noon")], image(1));
        }
        client.confirmed();
        let good = add_faces(&broker, 10..20);
        engine.until_accepted(10);
        let samples = daemon.idle(PATIENCE);
        assert_eq!(nothing_lost(&[&engine], &good), 0);
        let letters =
            |reason: &str| samples.count("framegate_frames_dead_lettered_total", &format!("reason=\"{reason}\""));
        let unsupported = if version == 5 { 4 } else { 3 };
        assert_eq!((letters("unsupported"), letters("truncated"), letters("too-large")), (unsupported, 2, 2));
        assert_eq!(samples.count("framegate_dead_letters", ""), unsupported + 4);
        assert_eq!(samples.count("framegate_redelivered_total", ""), 0, "no loop");
        assert_eq!(samples.count("framegate_sessions_lost_total", ""), 0);
        let listed = site.command(&["dead-letter", "list", "--json", "--reason", "too-large"]).output().unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        assert!(listed.contains("52428") && listed.contains("only its beginning is kept"), "{listed}");
        assert!(daemon.stop().success());
        nothing_waits(&broker, CLIENT_ID);
    }
}

#[test]
fn b14_a_topic_that_is_no_name_is_a_dead_letter_and_costs_no_frame_behind_it_after_a_kill() {
    let broker = mosquitto!("b14_a_topic_that_is_no_name_is_a_dead_letter");
    let engine = Engine::start();
    engine.down();
    let site = site(&engine, &broker);
    let daemon = site.run();
    let mut client = broker.client();
    client.publish(&topic(&"x".repeat(20_000)), &[], image(100));
    client.publish(&topic(""), &[], image(101));
    client.confirmed();
    let written = add_faces(&broker, 0..5);
    until_received(&daemon, 7);
    daemon.kill();
    engine.up();
    let mut daemon = site.run();
    engine.until_accepted(5);
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert_eq!(samples.count("framegate_dead_letters", ""), 2);
    let listed = site.command(&["dead-letter", "list", "--json"]).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert!(listed.contains("longer than 255 bytes") && listed.contains("is empty"), "{listed}");
    assert!(daemon.stop().success());
    nothing_waits(&broker, CLIENT_ID);
}

#[test]
fn messages_of_qos_2_from_an_earlier_subscription_are_taken_and_acknowledged_to_their_end() {
    let broker = mosquitto!("messages_of_qos_2_from_an_earlier_subscription");
    for version in VERSIONS {
        let engine = Engine::start();
        let id = format!("box-{version}");
        // The session of somebody who tried it out by hand.
        let tried = ["-V", "5", "-x", "-1", "-c", "-i", &id, "-q", "2", "-t", "frigate/#", "-E"];
        assert!(broker.subscribe(&tried).status.success());
        broker.until_gone(&id);
        for n in 0..70 {
            broker.publish(&topic("Cam"), &["-q", "2"], &image(n));
        }
        let keys = format!(", version = {version}, client_id = \"{id}\"");
        let site = site_at(&engine, &broker.url(), &keys, "");
        let mut daemon = site.run();
        engine.until_accepted(70);
        let samples = daemon.idle(PATIENCE);
        let written: Vec<_> = (0..70).map(|n| hash(&image(n))).collect();
        assert_eq!(nothing_lost(&[&engine], &written), 0);
        assert_eq!(samples.count("framegate_redelivered_total", ""), 0, "no loop");
        assert!(!site.log().contains("held"), "nobody threw us out");
        assert!(daemon.stop().success());
        nothing_waits(&broker, &id);
    }
}

// ---- outages and deaths

#[test]
fn b4_with_the_engine_down_5000_frames_are_spooled_and_the_broker_drops_none() {
    // Its defaults: twenty on their way, a thousand waiting, then it drops.
    let Some(broker) = Mosquitto::with("allow_anonymous true") else {
        return skipped("b4_with_the_engine_down", "mosquitto is not installed");
    };
    let engine = Engine::start();
    engine.down();
    let site = site(&engine, &broker);
    let daemon = site.run();
    let mut written = Vec::new();
    for n in 0..10 {
        written.extend(add_faces(&broker, n * 500..(n + 1) * 500));
        // A camera is slower than a disk; this loop is not.
        until_received(&daemon, (i64::try_from(n).unwrap() + 1) * 500);
    }
    assert_eq!(broker.says("publish/messages/dropped"), 0);
    let samples = daemon.metrics();
    assert_eq!(samples.count("framegate_spool_frames", ""), 5000);
    // What is acknowledged outlives us.
    daemon.kill();
    engine.up();
    let mut daemon = site.run();
    engine.until_accepted(5000);
    daemon.idle(PATIENCE);
    assert!(nothing_lost(&[&engine], &written) <= 20, "what was not acknowledged yet");
    assert!(daemon.stop().success());
    nothing_waits(&broker, CLIENT_ID);
}

#[test]
fn b1_restart_and_kill_9_of_the_broker_again_and_again_lose_nothing() {
    let mut broker = mosquitto!("b1_restart_and_kill_9_of_the_broker_again_and_again_lose_nothing");
    for version in VERSIONS {
        let engine = Engine::start();
        let site = site_at(&engine, &broker.url(), &format!(", version = {version}"), "");
        let mut daemon = site.run();
        let mut written = Vec::new();
        for n in 0..5 {
            written.extend(add_faces(&broker, n * 20..(n + 1) * 20));
            // It confirms before it writes down; whom it greets later, it greets after that.
            drop(broker.client());
            broker.0.kill();
            until_held(&daemon, "topic frigate");
            broker.0.again();
            until_ready(&daemon);
        }
        // What the broker sends again comes before what is new.
        written.extend(add_faces(&broker, 100..101));
        engine.until_accepted(101);
        let samples = daemon.idle(PATIENCE);
        assert_eq!(nothing_lost(&[&engine], &written), 0, "what comes again is known");
        assert_eq!(samples.count("framegate_sessions_lost_total", ""), 0);
        assert!(daemon.stop().success());
        nothing_waits(&broker, CLIENT_ID);
    }
}

#[test]
fn b2_a_session_that_the_broker_forgot_is_counted_and_subscribed_again() {
    let mut broker = mosquitto!("b2_a_session_that_the_broker_forgot_is_counted_and_subscribed_again");
    for version in VERSIONS {
        let engine = Engine::start();
        let site = site_at(&engine, &broker.url(), &format!(", version = {version}"), "");
        let mut daemon = site.run();
        let mut written = add_faces(&broker, 0..10);
        engine.until_accepted(10);
        broker.forget();
        broker.0.again();
        eventually("the loss is counted", PATIENCE, || {
            (daemon.metrics().count("framegate_sessions_lost_total", "detector=\"{topic.1}\"") == 1).then_some(())
        });
        until_ready(&daemon);
        written.extend(add_faces(&broker, 10..20));
        engine.until_accepted(20);
        daemon.idle(PATIENCE);
        assert_eq!(nothing_lost(&[&engine], &written), 0);
        assert!(site.log().contains("the broker has forgotten our session"));
    }
}

#[test]
fn b3_b5_a_full_spool_holds_acknowledgements_back_which_then_leave_in_the_order_of_arrival() {
    let broker = mosquitto!("b3_b5_a_full_spool_holds_acknowledgements_back");
    for version in VERSIONS {
        let engine = Engine::start();
        engine.down();
        let relay = Relay::to(([127, 0, 0, 1], broker.0.port()).into());
        let sections = "[encode]\nmax_frame = \"256KiB\"\n[spool]\nmax_size = \"1MiB\"";
        let keys = format!(", version = {version}, keep_alive = \"4s\"");
        let site = site_at(&engine, &format!("mqtt://{}", relay.address()), &keys, sections);
        let mut daemon = site.run();
        // Large and small ones in turn: where a large one has no room, small ones behind it are safe before it is.
        let mut client = broker.client();
        let mut written = Vec::new();
        for n in 0..150 {
            let mut image = image(n);
            if n % 5 == 0 {
                image = large(&image);
            }
            written.push(hash(&image));
            client.publish(&topic("Cam"), &[], image);
        }
        client.confirmed();
        until_held(&daemon, "the spool is full");
        eventually("the detector is shown as held", PATIENCE, || {
            (daemon.metrics().count("framegate_detector_up", "detector=\"Cam\"") == 0).then_some(())
        });
        let (_, status) = daemon.get("/status").unwrap();
        assert!(status.contains("the spool is full"), "{status}");
        // Longer than its patience with a connection that is dead, and than the broker's: this one lives.
        let begun = std::time::Instant::now();
        eventually("time passes", PATIENCE, || (begun.elapsed() > Duration::from_secs(7)).then_some(()));
        let held_back = daemon.metrics().count("framegate_frames_received_total", "");
        assert!(held_back < 150, "{held_back}");
        engine.up();
        engine.until_accepted(150);
        let samples = daemon.idle(PATIENCE);
        until_ready(&daemon);
        assert_eq!(nothing_lost(&[&engine], &written), 0);
        assert_eq!(samples.count("framegate_redelivered_total", ""), 0, "nothing was sent again");
        assert_eq!(broker.says("publish/messages/dropped"), 0);
        assert!(daemon.stop().success());
        nothing_waits(&broker, CLIENT_ID);
        let [connection] = &relay.recorded()[..] else { panic!("one connection") };
        let (sent, said) = (connection.by_server.lock().unwrap(), connection.by_client.lock().unwrap());
        let (sent, acknowledged) = (published_ids(&sent), acknowledged_ids(&said));
        assert_eq!(sent.len(), 150);
        assert_eq!(sent, acknowledged, "in the order of arrival, each once");
    }
}

/// The same image with a comment that makes it some fifty times as large.
fn large(jpeg: &[u8]) -> Vec<u8> {
    let comment = [&[0xff, 0xfe, 0xff, 0xff][..], &vec![b' '; 0xfffd]].concat();
    [&jpeg[..2], &comment.repeat(3), &jpeg[2..]].concat()
}

fn published_ids(sent: &[u8]) -> Vec<[u8; 2]> {
    let publishes = mqtt_packets(sent).into_iter().filter(|(first, _)| first >> 4 == 3);
    publishes
        .map(|(_, body)| {
            let at = 2 + usize::from(u16::from_be_bytes([body[0], body[1]]));
            [body[at], body[at + 1]]
        })
        .collect()
}

fn acknowledged_ids(said: &[u8]) -> Vec<[u8; 2]> {
    let acknowledgements = mqtt_packets(said).into_iter().filter(|(first, _)| first >> 4 == 4);
    acknowledgements.map(|(_, body)| [body[0], body[1]]).collect()
}

#[test]
fn b5_a_spool_whose_disk_is_gone_acknowledges_nothing_and_goes_on_when_it_is_back() {
    let broker = mosquitto!("b5_a_spool_whose_disk_is_gone_acknowledges_nothing");
    let engine = Engine::start();
    engine.down();
    let site = site(&engine, &broker);
    let Some(disk) = Mount::tmpfs(&site.path().join("spool"), "size=2m") else {
        return skipped("b5_a_spool_whose_disk_is_gone", "needs to mount a tmpfs (root)");
    };
    let mut daemon = site.run();
    let written = add_faces(&broker, 0..700);
    until_held(&daemon, "spool");
    let spooled = daemon.metrics().count("framegate_frames_received_total", "");
    assert!((100..700).contains(&spooled), "{spooled}");
    disk.remount("size=64m");
    until_received(&daemon, 700);
    engine.up();
    engine.until_accepted(700);
    daemon.idle(PATIENCE);
    until_ready(&daemon);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}

#[test]
fn b13_a_broker_that_falls_silent_is_noticed_and_taken_up_again() {
    let broker = mosquitto!("b13_a_broker_that_falls_silent_is_noticed_and_taken_up_again");
    let engine = Engine::start();
    let site = site_at(&engine, &broker.url(), ", keep_alive = \"2s\"", "");
    let mut daemon = site.run();
    let mut written = add_faces(&broker, 0..20);
    engine.until_accepted(20);
    broker.0.freeze(true);
    until_held(&daemon, "has said nothing for 2s");
    broker.0.freeze(false);
    until_ready(&daemon);
    written.extend(add_faces(&broker, 20..40));
    engine.until_accepted(40);
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}

#[test]
fn b13_a_connection_whose_packets_vanish_is_noticed_within_one_and_a_half_keep_alives() {
    const TEST: &str = "b13_a_connection_whose_packets_vanish_is_noticed_within_one_and_a_half_keep_alives";
    if !own_network(TEST) {
        return;
    }
    if !Silence::works() {
        return skipped(TEST, "nft cannot drop packets here");
    }
    let Some(broker) = Mosquitto::start() else {
        return skipped(TEST, "mosquitto is not installed");
    };
    let engine = Engine::start();
    let site = site_at(&engine, &broker.url(), ", keep_alive = \"4s\"", "");
    let mut daemon = site.run();
    let mut written = add_faces(&broker, 0..20);
    engine.until_accepted(20);
    let silence = Silence::of(broker.0.port());
    until_held(&daemon, "topic frigate");
    drop(silence);
    until_ready(&daemon);
    written.extend(add_faces(&broker, 20..40));
    engine.until_accepted(40);
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}

#[test]
fn b15_killed_between_spool_and_acknowledgement_a_poison_message_is_one_dead_letter() {
    let broker = mosquitto!("b15_killed_between_spool_and_acknowledgement_a_poison_message_is_one_dead_letter");
    for version in VERSIONS {
        let engine = Engine::start();
        let relay = Relay::to(([127, 0, 0, 1], broker.0.port()).into());
        let keys = format!(", version = {version}");
        let site = site_at(&engine, &format!("mqtt://{}", relay.address()), &keys, "");
        let daemon = site.run();
        relay.mute(true);
        broker.publish(&topic("Cam"), &[], b"no base64: {}");
        broker.publish(&topic("Cam"), &[], br#"{"expanded":"!!!!"}"#);
        let written = add_faces(&broker, 0..5);
        engine.until_accepted(5);
        // The spool has nothing left, so that what comes after the kill comes from the broker.
        eventually("they are dead letters", PATIENCE, || {
            let samples = daemon.metrics();
            let (letters, left) =
                (samples.count("framegate_dead_letters", ""), samples.count("framegate_spool_frames", ""));
            (letters == 2 && left == 0).then_some(())
        });
        daemon.kill();
        relay.mute(false);
        let mut daemon = site.run();
        eventually("everything has come again", PATIENCE, || {
            (daemon.metrics().count("framegate_redelivered_total", "") == 7).then_some(())
        });
        // That is counted as they come, and before the spool has them.
        until_received(&daemon, 7);
        let samples = daemon.idle(PATIENCE);
        // Of the raw one nobody knew, when it was spooled, that it is no image.
        let letters = samples.count("framegate_dead_letters", "");
        assert_eq!(letters, 3, "the flawed one is the same");
        assert_eq!(nothing_lost(&[&engine], &written), 5, "what the broker sent again, and no more");
        assert!(daemon.stop().success());
        nothing_waits(&broker, CLIENT_ID);
    }
}

#[test]
fn b16_what_the_broker_sends_again_after_a_lost_connection_is_acknowledged_and_no_frame() {
    let broker = mosquitto!("b16_what_the_broker_sends_again_after_a_lost_connection_is_acknowledged_and_no_frame");
    for version in VERSIONS {
        let engine = Engine::start();
        let relay = Relay::to(([127, 0, 0, 1], broker.0.port()).into());
        let keys = format!(", version = {version}");
        let site = site_at(&engine, &format!("mqtt://{}", relay.address()), &keys, "");
        let mut daemon = site.run();
        relay.mute(true);
        let written = add_faces(&broker, 0..10);
        engine.until_accepted(10);
        relay.mute(false);
        relay.cut();
        eventually("everything has come again", PATIENCE, || {
            (daemon.metrics().count("framegate_redelivered_total", "") == 10).then_some(())
        });
        let samples = daemon.idle(PATIENCE);
        assert_eq!(nothing_lost(&[&engine], &written), 0);
        assert_eq!(samples.count("framegate_frames_received_total", ""), 10);
        assert!(daemon.stop().success());
        nothing_waits(&broker, CLIENT_ID);
    }
}

#[test]
fn killed_again_and_again_under_load_the_daemon_loses_nothing() {
    // One that writes down each acknowledgement would be far behind.
    let Some(broker) = Mosquitto::with("allow_anonymous true") else {
        return skipped("killed_again_and_again_under_load", "mosquitto is not installed");
    };
    for version in VERSIONS {
        let engine = Engine::with(|options| options.faults.latency = Duration::from_millis(20));
        let site = site_at(&engine, &broker.url(), &format!(", version = {version}"), "max_in_flight = 16");
        // Subscribed before anything is sent.
        assert!(site.run().stop().success());
        let written = add_faces(&broker, 0..500);
        let kills = 4;
        for kill in 1..=kills {
            let daemon = site.run();
            engine.until_accepted(kill * 60);
            daemon.kill();
        }
        let mut daemon = site.run();
        engine.until_accepted(500);
        let samples = daemon.idle(PATIENCE);
        let doubled = nothing_lost(&[&engine], &written);
        // In flight, and spooled with the acknowledgement still to come.
        assert!(doubled <= kills * (2 * 16 + 64), "{doubled} came twice");
        assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
        assert!(daemon.stop().success());
        nothing_waits(&broker, CLIENT_ID);
    }
}

#[test]
fn an_engine_slower_than_every_deadline_is_waited_for_and_the_broker_waits_for_nothing() {
    let broker = mosquitto!("an_engine_slower_than_every_deadline_is_waited_for");
    let engine = Engine::with(|options| options.faults.latency = Duration::from_secs(5));
    let site = site_at(&engine, &broker.url(), ", keep_alive = \"2s\"", "");
    let mut daemon = site.run();
    let written = add_faces(&broker, 0..8);
    until_received(&daemon, 8);
    engine.until_accepted(8);
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert_eq!(samples.count("framegate_redelivered_total", ""), 0);
}

#[test]
fn what_comes_while_we_are_stopped_waits_at_the_broker() {
    let broker = mosquitto!("what_comes_while_we_are_stopped_waits_at_the_broker");
    for version in VERSIONS {
        let engine = Engine::start();
        let site = site_at(&engine, &broker.url(), &format!(", version = {version}"), "");
        assert!(site.run().stop().success());
        let written = add_faces(&broker, 0..50);
        let mut daemon = site.run();
        engine.until_accepted(50);
        let samples = daemon.idle(PATIENCE);
        assert_eq!(nothing_lost(&[&engine], &written), 0);
        assert_eq!(samples.count("framegate_sessions_lost_total", ""), 0);
        assert!(daemon.stop().success());
        nothing_waits(&broker, CLIENT_ID);
    }
}

#[test]
fn a_reload_that_changes_the_entry_under_load_loses_and_doubles_nothing() {
    let Some(broker) = Mosquitto::with("allow_anonymous true") else {
        return skipped("a_reload_that_changes_the_entry", "mosquitto is not installed");
    };
    let engine = Engine::start();
    let site = site(&engine, &broker);
    let mut daemon = site.run();
    let config = fs::read_to_string(site.config()).unwrap();
    let mut written = Vec::new();
    for round in 1..=5 {
        written.extend(add_faces(&broker, (round - 1) * 100..round * 100));
        fs::write(site.config(), format!("{config}\nweight = {round}\n")).unwrap();
        let reloaded = site.command(&["reload"]).output().unwrap();
        assert!(reloaded.status.success(), "{reloaded:?}");
    }
    engine.until_accepted(500);
    daemon.idle(PATIENCE);
    until_ready(&daemon);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert!(daemon.stop().success());
    nothing_waits(&broker, CLIENT_ID);
}

// ---- what the broker may do

#[test]
fn b17_a_wrong_password_holds_this_source_only_and_the_right_one_is_read_anew() {
    let dir = tempfile::tempdir().unwrap();
    let accounts = dir.path().join("accounts");
    let account = |password: &str| {
        let made = Command::new("mosquitto_passwd").args(["-c", "-b"]).arg(&accounts).args(["edge", password]).status();
        made.is_ok_and(|it| it.success())
    };
    if !account("canary-mqtt-55") {
        return skipped("b17_a_wrong_password", "mosquitto is not installed");
    }
    let lines = format!("allow_anonymous false\npassword_file {}", accounts.display());
    let broker = Mosquitto::with(&lines).expect("mosquitto_passwd comes with it");
    for version in VERSIONS {
        let engine = Engine::start();
        let keys = format!(
            ", version = {version}, username = \"edge\", password_file = \"mqtt-password\", client_id = \"box-{version}\""
        );
        let site = site_at(&engine, &broker.url(), &keys, "").detector("Door", "UTC", "");
        secret(&site.path().join("mqtt-password"), "wrong");
        let mut daemon = site.start().until_told();
        until_held(&daemon, "check `username` and `password_file`");
        let (_, reasons) = daemon.get("/readyz").unwrap();
        assert!(reasons.contains("detector {topic.1}") && !reasons.contains("detector Door"), "{reasons}");
        put(&site.drop_dir("Door"), "1.jpg", &image(1));
        engine.until_accepted(1);
        secret(&site.path().join("mqtt-password"), "canary-mqtt-55");
        until_ready(&daemon);
        broker.publish(&topic("Cam"), &["-u", "edge", "-P", "canary-mqtt-55"], &image(2));
        engine.until_accepted(2);
        daemon.idle(PATIENCE);
        assert_eq!(nothing_lost(&[&engine], &[1, 2].map(|n| hash(&image(n)))), 0);
        assert!(!site.log().contains("canary-mqtt-55"));
    }
}

#[test]
fn b17_tls_with_the_ca_of_the_broker_works_and_without_it_holds() {
    let dir = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    fs::write(&cert, made.cert.pem()).unwrap();
    fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let (cert, key) = (cert.display(), key.display());
    let port = free_port().port();
    let lines = format!("allow_anonymous true\nlistener {port} 127.0.0.1\ncertfile {cert}\nkeyfile {key}");
    let Some(broker) = Mosquitto::with(&lines) else {
        return skipped("b17_tls", "mosquitto is not installed");
    };
    let url = format!("mqtts://localhost:{port}");
    for version in VERSIONS {
        let engine = Engine::start();
        let keys = format!(", version = {version}, client_id = \"box-{version}\"");
        let distrustful = site_at(&engine, &url, &keys, "");
        let daemon = distrustful.start().until_told();
        until_held(&daemon, "ca_file");
        daemon.kill();
        let site = site_at(&engine, &url, &format!("{keys}, ca_file = \"{cert}\""), "");
        let mut daemon = site.run();
        let written = add_faces(&broker, 0..20);
        engine.until_accepted(20);
        daemon.idle(PATIENCE);
        assert_eq!(nothing_lost(&[&engine], &written), 0);
        assert!(daemon.stop().success());
        nothing_waits(&broker, &format!("box-{version}"));
    }
}

#[test]
fn a_broker_that_is_away_is_named_and_healed() {
    let mut broker = mosquitto!("a_broker_that_is_away_is_named_and_healed");
    broker.0.kill();
    let engine = Engine::start();
    let site = site(&engine, &broker);
    let mut daemon = site.start().until_told();
    until_held(&daemon, "cannot connect");
    let status = site.command(&["status"]).output().unwrap();
    assert!(String::from_utf8_lossy(&status.stdout).contains("cannot connect"), "{status:?}");
    broker.0.again();
    until_ready(&daemon);
    let written = add_faces(&broker, 0..5);
    engine.until_accepted(5);
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}

#[test]
fn check_says_what_it_would_connect_to() {
    let keys = ", version = 3, username = \"edge\", password_file = \"pw\"";
    let engine = Engine::start();
    let site = site_at(&engine, "mqtts://10.0.0.5", keys, "");
    site.write_config();
    let output =
        Command::new(env!("CARGO_BIN_EXE_framegate")).args(["check", "--config"]).arg(site.config()).output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    for part in [
        "mqtt       mqtts://10.0.0.5 as edge, MQTT 3.1.1",
        "topic frigate/+/person/snapshot, client id framegate-edge-07, no retained messages",
        "password_file: cannot read",
        "spool in ",
    ] {
        assert!(said.contains(part), "{part}\n{said}");
    }
}

#[test]
fn doctor_says_whether_the_broker_lets_us_in_and_leaves_the_session_alone() {
    let mut broker = mosquitto!("doctor_says_whether_the_broker_lets_us_in");
    let engine = Engine::start();
    let site = site(&engine, &broker);
    let mut daemon = site.run();
    let doctor = || {
        let output = site.command(&["doctor", "--user", "root"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let well = format!("ok    detector {{topic.1}}: {} topic frigate/+/person/snapshot: it lets us in", broker.url());
    assert!(doctor().contains(&well), "{}", doctor());
    let written = add_faces(&broker, 0..5);
    engine.until_accepted(5);
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
    assert!(!site.log().contains("held"), "nobody threw us out");
    broker.0.kill();
    let said = doctor();
    assert!(said.contains("fail  detector {topic.1}") && said.contains("cannot connect"), "{said}");
    assert!(said.contains("is mqtt.url right"), "{said}");
}
