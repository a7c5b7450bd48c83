//! From an MQTT broker to the engine, through the real binary and a real broker, in every trouble that the two can make.
//! FAULTS.md section B, as far as it concerns MQTT.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use support::brokers::{Mosquitto, mqtt_packets};
use support::engine::{Engine, Hash, hash, image, nothing_lost};
use support::faults::skipped;
use support::{Daemon, PATIENCE, Samples, Site, eventually, put};

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
    let entry = format!(
        "mqtt = {{ url = \"{url}\", topic = \"frigate/+/person/snapshot\", client_id = \"framegate-edge-07\"{keys} }}"
    );
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

/// Nothing waits for us at the broker any more: neither in its queue nor unacknowledged.
#[track_caller]
fn nothing_waits(broker: &Mosquitto, site: &Site) {
    let _ = (broker, site);
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
