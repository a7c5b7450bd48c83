//! Frames pushed over HTTP: the real daemon, the simulated engine, and curl as somebody else's client.

mod support;

use std::fs::{self, Permissions};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use support::engine::{Engine, Hash, hash, image, nothing_lost};
use support::faults::{Mount, Strace, skipped, works};
use support::{Daemon, PATIENCE, Site, eventually};

/// What the vendor's guide shows, but for the file that holds the body and for the URL.
const PUBLISH: &str = "/api/v1/faceEdge/publish";

/// A site with a Unix socket to push to, and whatever detectors the frames name.
fn site(engine: &Engine, more: &str) -> Site {
    let site = Site::new(&engine.base_url());
    let directory = site.path().to_str().unwrap().to_owned();
    let push =
        if more.contains("listen =") { String::new() } else { format!("listen = \"unix:{directory}/push.sock\"\n") };
    let (push_keys, others) = more.split_once("---").unwrap_or(("", more));
    let spool = if others.contains("[spool]") { "" } else { "[spool]\n" };
    let others = others.replace("[spool]", &format!("[spool]\ndirectory = \"{directory}/spool\""));
    let spool = spool.replace("[spool]", &format!("[spool]\ndirectory = \"{directory}/spool\""));
    site.section(&format!("[push]\n{push}{push_keys}\n{spool}\n{others}")).fed(
        "{detectorName}",
        "America/New_York",
        "push = {}",
    )
}

/// What curl got.
#[derive(Debug)]
struct Got {
    status: u16,
    head: String,
    body: String,
}

/// curl on the site's Unix socket, or wherever `arguments` say.
fn curl(site: &Site, path: &str, arguments: &[&str]) -> Got {
    curl_at(&["--unix-socket", site.path().join("push.sock").to_str().unwrap()], "http://localhost", path, arguments)
}

fn curl_at(how: &[&str], base: &str, path: &str, arguments: &[&str]) -> Got {
    let output = Command::new("curl")
        .args(["-sS", "-i", "--max-time", "60"])
        .args(how)
        .args(arguments)
        .arg(format!("{base}{path}"))
        .output()
        .expect("curl is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // An interim "100 Continue" comes before the answer.
    let text = text.strip_prefix("HTTP/1.1 100 Continue\r\n\r\n").unwrap_or(&text).to_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|it| it.parse().ok()).unwrap_or(0);
    assert!(status > 0, "{} {}", String::from_utf8_lossy(&output.stderr), text);
    Got { status, head: head.to_lowercase(), body: body.to_owned() }
}

fn body_of(image: &[u8], detector: &str) -> String {
    format!(
        r#"{{"expanded":"{}","detectorName":"{detector}","ianaTimeZone":"America/Los_Angeles","detectTimeUtc":"2026-11-23T11:00:00.123Z"}}"#,
        BASE64_STANDARD.encode(image)
    )
}

/// The vendor's example, to where we listen.
fn push(site: &Site, image: &[u8], detector: &str) -> Got {
    let file = site.path().join("body.json");
    fs::write(&file, body_of(image, detector)).unwrap();
    let data = format!("@{}", file.display());
    let arguments =
        ["-X", "POST", "-H", "Authorization: Bearer token", "-H", "Content-Type: application/json", "--data", &data];
    curl(site, PUBLISH, &arguments)
}

#[track_caller]
fn accepted(got: &Got) {
    assert_eq!((got.status, got.body.as_str()), (200, ""), "{got:?}");
}

fn private(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
}

/// Where the daemon says that frames can be pushed.
fn address(site: &Site) -> String {
    let output = site.command(&["status", "--json"]).output().unwrap();
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    status["push"].as_str().expect("it listens").to_owned()
}

#[test]
fn the_vendors_example_publishes_through_us_byte_for_byte() {
    let engine = Engine::start();
    let site = site(&engine, "");
    let mut daemon = site.run();
    let login = curl(&site, "/api/v1/authenticate", &["--json", r#"{"username":"edge","password":"x"}"#]);
    assert_eq!(login.status, 200, "{login:?}");
    let token: serde_json::Value = serde_json::from_str(&login.body).unwrap();
    assert_eq!((token["username"].as_str(), token["token"].as_str().unwrap().split('.').count()), (Some("edge"), 3));
    let bearer = format!("Authorization: Bearer {}", token["token"].as_str().unwrap());
    assert_eq!(curl(&site, "/identities/api/v1/renewToken", &["-H", &bearer]).status, 200);

    accepted(&push(&site, &image(1), "FrontDoorCam"));
    let file = site.path().join("face.jpg");
    fs::write(&file, image(2)).unwrap();
    let data = format!("@{}", file.display());
    let time = "Detect-Time-Utc: 2026-11-23T11:00:01Z";
    accepted(&curl(&site, "/frames/Caf%C3%A9%202", &["--data-binary", &data, "-H", time]));
    // White space in base64, as some encoders write it, and neither time nor zone.
    let wrapped = BASE64_STANDARD.encode(image(3));
    let lines: Vec<&str> = wrapped.as_bytes().chunks(76).map(|line| std::str::from_utf8(line).unwrap()).collect();
    let wrapped = lines.join("\r\n");
    fs::write(site.path().join("body.json"), format!(r#"{{"detectorName":"Wrapped","expanded":"{wrapped}"}}"#))
        .unwrap();
    let data = format!("@{}", site.path().join("body.json").display());
    accepted(&curl(&site, "/identities/api/v1/faceEdge/publish", &["--data", &data]));

    engine.until_accepted(3);
    let samples = daemon.idle(PATIENCE);
    assert_eq!(samples.count("framegate_frames_received_total", "source=\"push\""), 3);
    assert_eq!(samples.count("framegate_spool_frames", ""), 0);
    assert_eq!(samples.count("framegate_push_answers_total", "status=\"200\""), 5);
    assert_eq!(nothing_lost(&[&engine], &[1, 2, 3].map(|n| hash(&image(n)))), 0);
    let mut said: Vec<_> =
        engine.accepted().into_iter().map(|it| (it.detector, it.zone, format!("{:.3}", it.time))).collect();
    said.sort();
    assert_eq!(
        (said[0].0.as_str(), said[0].1.as_str(), said[0].2.as_str()),
        ("Café 2", "America/New_York", "2026-11-23T11:00:01.000Z")
    );
    assert_eq!(
        (said[1].0.as_str(), said[1].1.as_str(), said[1].2.as_str()),
        ("FrontDoorCam", "America/Los_Angeles", "2026-11-23T11:00:00.123Z")
    );
    assert_eq!((said[2].0.as_str(), said[2].1.as_str()), ("Wrapped", "America/New_York"));
}

#[test]
fn b14_poison_is_answered_400_and_names_the_field() {
    let engine = Engine::start();
    let site = site(&engine, "---[encode]\nmax_frame = \"1MiB\"");
    let mut daemon = site.run();
    let whole = BASE64_STANDARD.encode(image(1));
    let half = BASE64_STANDARD.encode(&image(1)[..500]);
    for (body, field, words) in [
        (r#"{"detectorName":"A"}"#.to_owned(), "expanded", "missing"),
        (r#"{"detectorName":"A","expanded":"%%%"}"#.into(), "expanded", "base64"),
        (r#"{"detectorName":"A","expanded":"aGVsbG8="}"#.into(), "expanded", "neither JPEG"),
        (format!(r#"{{"detectorName":"A","expanded":"{half}"}}"#), "expanded", "without its end"),
        (format!(r#"{{"expanded":"{whole}"}}"#), "detectorName", "missing"),
        (format!(r#"{{"detectorName":"A","expanded":"{whole}","ianaTimeZone":"Mars"}}"#), "ianaTimeZone", "IANA"),
        (format!(r#"{{"detectorName":"A","expanded":"{whole}","detectTimeUtc":"now"}}"#), "detectTimeUtc", "time"),
        (format!(r#"{{"detectorName":"A","expanded":"{whole}","embeddings":"x"}}"#), "", "unknown field `embeddings`"),
        ("{".into(), "", "not the engine's JSON"),
    ] {
        fs::write(site.path().join("body.json"), &body).unwrap();
        let data = format!("@{}", site.path().join("body.json").display());
        let got = curl(&site, PUBLISH, &["--data", &data]);
        assert_eq!(got.status, 400, "{body:.80}");
        assert!(got.head.contains("application/problem+json"), "{}", got.head);
        let problem: serde_json::Value = serde_json::from_str(&got.body).unwrap();
        assert!(problem["detail"].as_str().unwrap().contains(words), "{words}: {problem}");
        assert!(field.is_empty() || problem["errors"][field].is_array(), "{field}: {problem}");
    }
    let raw = curl(&site, "/frames/A", &["--data-binary", "no image"]);
    assert_eq!(raw.status, 400, "{raw:?}");
    assert_eq!(curl(&site, "/api/v1/other", &[]).status, 404);
    assert_eq!(curl(&site, PUBLISH, &[]).status, 405);
    fs::write(site.path().join("body.json"), vec![b'x'; 3 << 20]).unwrap();
    let data = format!("@{}", site.path().join("body.json").display());
    assert_eq!(curl(&site, PUBLISH, &["--data-binary", &data]).status, 413);
    accepted(&push(&site, &image(1), "A"));
    engine.until_accepted(1);
    let samples = daemon.idle(PATIENCE);
    assert_eq!(samples.count("framegate_frames_received_total", ""), 1);
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
}

#[test]
fn with_the_engine_down_a_push_gets_its_200_and_the_frame_arrives_after_a_kill_and_a_restart() {
    let engine = Engine::start();
    let site = site(&engine, "");
    engine.down();
    let daemon = site.run();
    for n in 0..5 {
        accepted(&push(&site, &image(n), "Door"));
    }
    assert_eq!(daemon.metrics().count("framegate_spool_frames", ""), 5);
    daemon.kill();
    engine.up();
    let mut daemon = site.run();
    engine.until_accepted(5);
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &(0..5).map(|n| hash(&image(n))).collect::<Vec<_>>()), 0);
    assert!(daemon.stop().success());
}

/// Pushes images over one kept connection each, until told to stop; who got a 200 counts as written.
struct Pushers {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<Vec<Hash>>>,
}

impl Pushers {
    fn start(socket: &Path, count: u64, next: &Arc<AtomicU64>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = |_| {
            let (socket, stop, next) = (socket.to_owned(), stop.clone(), next.clone());
            std::thread::spawn(move || {
                let (mut written, mut open) = (Vec::new(), None);
                while !stop.load(Ordering::Relaxed) {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let image = image(n);
                    // As a real sender: again until it is answered 200.
                    while !stop.load(Ordering::Relaxed) {
                        if answer_of(&socket, &mut open, &body_of(&image, &format!("Cam{}", n % 3))) == Some(200) {
                            written.push(hash(&image));
                            break;
                        }
                        std::thread::sleep(Duration::from_millis(5));
                    }
                }
                written
            })
        };
        let threads = (0..count).map(thread).collect();
        Self { stop, threads }
    }

    fn finish(self) -> Vec<Hash> {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().flat_map(|it| it.join().expect("it pushes")).collect()
    }
}

/// The status that a push over a kept connection is answered with; none, and a new connection next time, if it breaks.
fn answer_of(socket: &Path, open: &mut Option<UnixStream>, body: &str) -> Option<u16> {
    let mut stream = open.take().or_else(|| UnixStream::connect(socket).ok())?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let request = format!("POST {PUBLISH} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(request.as_bytes()).ok()?;
    let (mut answer, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let n = stream.read(&mut buffer).ok().filter(|n| *n > 0)?;
        answer.extend_from_slice(&buffer[..n]);
        let text = String::from_utf8_lossy(&answer);
        let Some((head, rest)) = text.split_once("\r\n\r\n") else { continue };
        let length =
            head.to_lowercase().split("content-length: ").nth(1)?.split("\r\n").next()?.parse::<usize>().ok()?;
        if rest.len() >= length {
            let status = head.split(' ').nth(1)?.parse().ok();
            *open = Some(stream);
            return status;
        }
    }
}

#[test]
fn d1_killed_again_and_again_under_load_nothing_that_was_answered_200_is_lost() {
    let engine = Engine::start();
    let site = site(&engine, "");
    let next = Arc::new(AtomicU64::new(0));
    let pushers = Pushers::start(&site.path().join("push.sock"), 4, &next);
    for round in 1..=6 {
        let daemon = site.run();
        engine.until_accepted(60 * round);
        daemon.kill();
    }
    let mut daemon = site.run();
    engine.until_accepted(500);
    let written = pushers.finish();
    daemon.idle(PATIENCE);
    let arrived = support::engine::arrivals(&[&engine]);
    let lost = written.iter().filter(|hash| !arrived.contains_key(*hash)).count();
    assert_eq!(lost, 0, "of {}", written.len());
    engine.contract_held();
    assert!(written.len() > 300, "{}", written.len());
}

#[test]
fn d3_after_a_power_cut_every_push_that_was_answered_200_is_there() {
    const TEST: &str = "d3_after_a_power_cut_every_push_that_was_answered_200_is_there";
    const ROUNDS: u64 = 4;
    let engine = Engine::start();
    engine.down();
    let alive = site(&engine, "");
    let image_file = alive.path().join("disk.img");
    let file = image_file.to_str().unwrap();
    let made = works("truncate", &["-s", "48M", file]) && works("mkfs.ext4", &["-q", "-F", file]);
    let Some(_disk) = made.then(|| Mount::image(&alive.path().join("spool"), &image_file)).flatten() else {
        return skipped(TEST, "an ext4 image cannot be made and mounted");
    };
    let daemon = alive.run();
    let socket = alive.path().join("push.sock");
    let (mut written, mut open) = (Vec::new(), None);
    // Others push at the same moment, so that the cut comes in the middle of something.
    let others = Pushers::start(&socket, 2, &Arc::new(AtomicU64::new(1 << 20)));
    for round in 0..ROUNDS {
        for n in round * 30..(round + 1) * 30 {
            eventually("it is answered 200", PATIENCE, || {
                (answer_of(&socket, &mut open, &body_of(&image(n), "Door")) == Some(200)).then_some(())
            });
            written.push(hash(&image(n)));
        }
        // What the disk has at this moment: nothing is written by the daemon while it is copied.
        daemon.signal(rustix::process::Signal::STOP);
        let other_engine = Engine::start();
        let cut = site(&other_engine, "");
        let copy = cut.path().join("disk.img");
        assert!(works("cp", &["--sparse=always", file, copy.to_str().unwrap()]));
        daemon.signal(rustix::process::Signal::CONT);
        let Some(_disk) = Mount::image(&cut.path().join("spool"), &copy) else {
            others.finish();
            return skipped(TEST, "the copy cannot be mounted");
        };
        let mut next_life = cut.run();
        accepted(&push(&cut, &image(9999), "Door"));
        next_life.idle(PATIENCE);
        let arrived = support::engine::arrivals(&[&other_engine]);
        let lost = written.iter().filter(|hash| !arrived.contains_key(*hash)).count();
        assert_eq!(lost, 0, "of {} in round {round}", written.len());
        other_engine.contract_held();
        assert!(next_life.stop().success());
    }
    others.finish();
}

#[test]
fn d2_killed_at_a_write_a_sync_or_a_removal_of_the_spool_nothing_that_was_answered_200_is_lost() {
    if !works("strace", &["-f", "-e", "trace=fsync", "true"]) {
        return skipped("d2_killed_at_a_write_a_sync_or_a_removal…", "strace cannot trace");
    }
    let engine = Engine::start();
    let site = site(&engine, "");
    let next = Arc::new(AtomicU64::new(0));
    let pushers = Pushers::start(&site.path().join("push.sock"), 4, &next);
    let faults = [("pwrite64", 1), ("pwrite64", 4), ("fdatasync", 1), ("fdatasync", 5), ("unlink", 1), ("fsync", 1)];
    for (n, (call, when)) in faults.into_iter().enumerate() {
        let mut daemon = site.run();
        let (trace, inject) = (format!("trace={call}"), format!("inject={call}:signal=KILL:when={when}"));
        let output = site.path().join(format!("trace-{n}"));
        // Under load it may have done its work before it is seen to be attached.
        let _strace = Strace::attach(daemon.pid(), &output, &["-e", &trace, "-e", &inject]);
        daemon.wait();
    }
    let mut daemon = site.run();
    let written = pushers.finish();
    accepted(&push(&site, &image(u64::from(u32::MAX)), "Cam0"));
    daemon.idle(PATIENCE);
    let arrived = support::engine::arrivals(&[&engine]);
    let lost = written.iter().filter(|hash| !arrived.contains_key(*hash)).count();
    assert_eq!(lost, 0, "of {}", written.len());
    engine.contract_held();
}

#[test]
fn b15_killed_between_the_dead_letter_and_the_spools_mark_there_is_one_dead_letter_and_no_loop() {
    let poison = image(7);
    let hex: Vec<String> = hash(&poison).iter().map(|byte| format!("{byte:02x}")).collect();
    let engine = Engine::with(|options| {
        options.faults.by_image.insert(hex.concat(), 400);
    });
    let site = site(&engine, "");
    let mut daemon = site.run();
    accepted(&push(&site, &image(0), "Door"));
    // The third fsync of a dead letter is its directory's: both files are there, and the spool does not know yet.
    let fault = ["-e", "trace=fsync", "-e", "inject=fsync:signal=KILL:when=3"];
    let strace = Strace::attach(daemon.pid(), &site.path().join("trace"), &fault);
    let Some(_strace) = strace else {
        return skipped("b15_killed_between_the_dead_letter_and_the_spools_mark…", "strace cannot attach");
    };
    accepted(&push(&site, &poison, "Door"));
    // It is at fault only while others pass.
    let mut n = 100;
    eventually("the daemon dies", PATIENCE, || {
        n += 1;
        answer_of(&site.path().join("push.sock"), &mut None, &body_of(&image(n), "Door")).is_none().then_some(())
    });
    daemon.wait();
    let mut daemon = site.run();
    let listed = || {
        let output = site.command(&["dead-letter", "list", "--json"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    eventually("it is a dead letter and settled", PATIENCE, || {
        n += 1;
        accepted(&push(&site, &image(n), "Door"));
        let dead = daemon.metrics().count("framegate_frames_dead_lettered_total", "reason=\"rejected\"");
        (dead > 0).then_some(())
    });
    daemon.idle(PATIENCE);
    let letters = listed();
    assert_eq!(letters.lines().count(), 1, "{letters}");
    let letter: serde_json::Value = serde_json::from_str(letters.lines().next().unwrap()).unwrap();
    assert_eq!((letter["source"].as_str(), letter["detector"].as_str()), (Some("push"), Some("Door")));
    let kept = site.dead_letters().join(format!("{}.image", letter["id"].as_str().unwrap()));
    assert_eq!(fs::read(kept).unwrap(), poison, "decoded back from its base64");
}

#[test]
fn a_full_spool_is_503_with_retry_after_and_takes_frames_again_when_the_engine_does() {
    let engine = Engine::start();
    let site = site(&engine, "---[encode]\nmax_frame = \"256KiB\"\n[spool]\nmax_size = \"1MiB\"");
    engine.down();
    let mut daemon = site.run();
    let mut written = Vec::new();
    let refused = loop {
        let n = written.len() as u64;
        let got = push(&site, &image(n), "Door");
        if got.status != 200 {
            break got;
        }
        written.push(hash(&image(n)));
        assert!(n < 1000, "never full");
    };
    assert_eq!(refused.status, 503, "{refused:?}");
    assert!(refused.head.contains("retry-after: "), "{}", refused.head);
    assert!(written.len() > 50, "{}", written.len());
    let (status, reasons) = daemon.get("/readyz").unwrap();
    assert!(status == 503 && reasons.contains("the spool is full"), "{reasons}");
    let samples = daemon.metrics();
    assert!(samples.sum("framegate_spool_bytes", "") <= samples.sum("framegate_spool_max_bytes", ""));
    engine.up();
    let n = written.len() as u64;
    eventually("a frame is taken again", PATIENCE, || (push(&site, &image(n), "Door").status == 200).then_some(()));
    written.push(hash(&image(n)));
    engine.until_accepted(written.len() as u64);
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}

#[test]
fn a18_a_full_disk_refuses_new_frames_and_loses_no_old_ones() {
    let engine = Engine::start();
    let site = site(&engine, "");
    let Some(disk) = Mount::tmpfs(&site.path().join("spool"), "size=1m") else {
        return skipped("a18_a_full_disk_refuses_new_frames_and_loses_no_old_ones", "mounting needs root");
    };
    engine.down();
    let mut daemon = site.run();
    let mut written = Vec::new();
    while written.len() < 1000 {
        let n = written.len() as u64;
        let got = push(&site, &image(n), "Door");
        if got.status != 200 {
            assert_eq!(got.status, 503, "{got:?}");
            break;
        }
        written.push(hash(&image(n)));
    }
    assert!((50..1000).contains(&written.len()), "{}", written.len());
    disk.remount("size=8m");
    let n = written.len() as u64;
    eventually("a frame is taken again", PATIENCE, || (push(&site, &image(n), "Door").status == 200).then_some(()));
    written.push(hash(&image(n)));
    engine.up();
    engine.until_accepted(written.len() as u64);
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &written), 0);
}

#[test]
fn a23_after_an_fsync_that_failed_nobody_is_told_that_we_have_the_frame_and_the_next_are_safe() {
    let engine = Engine::start();
    let site = site(&engine, "");
    engine.down();
    let mut daemon = site.run();
    accepted(&push(&site, &image(0), "Door"));
    let fault = ["-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO"];
    let Some(strace) = Strace::attach(daemon.pid(), &site.path().join("trace"), &fault) else {
        return skipped("a23_after_an_fsync_that_failed…", "strace cannot attach");
    };
    let got = push(&site, &image(1), "Door");
    assert_eq!(got.status, 503, "{got:?}");
    assert!(!got.body.contains("spool/"), "no paths of ours: {}", got.body);
    drop(strace);
    eventually("a frame is taken again", PATIENCE, || (push(&site, &image(2), "Door").status == 200).then_some(()));
    daemon.kill();
    engine.up();
    daemon = site.run();
    engine.until_accepted(2);
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &[hash(&image(0)), hash(&image(2))]), 0);
}

#[test]
fn e2_strangers_get_401_413_408_and_429_and_no_memory() {
    let engine = Engine::start();
    let site =
        site(&engine, "listen = \"127.0.0.1:0\"\nusername = \"cameras\"\npassword_file = \"push-password\"\n---");
    private(&site.path().join("push-password"), "canary-push-password\n");
    let mut daemon = site.run();
    let at = address(&site);
    let base = format!("http://{at}");
    let body = body_of(&image(1), "Door");
    for token in ["Authorization: Basic eDp5", "Authorization: Bearer made.up.token", "X-Nothing: x"] {
        let got = curl_at(&[], &base, PUBLISH, &["--data", &body, "-H", token]);
        assert_eq!(got.status, 401, "{token}");
        assert!(got.head.contains("www-authenticate: bearer"), "{}", got.head);
    }
    assert_eq!(curl_at(&[], &base, "/api/v1/renewToken", &[]).status, 401);
    let wrong = curl_at(&[], &base, "/api/v1/authenticate", &["--json", r#"{"username":"cameras","password":"x"}"#]);
    assert_eq!(wrong.status, 401);
    let right = r#"{"username":"cameras","password":"canary-push-password"}"#;
    let login = curl_at(&[], &base, "/api/v1/authenticate", &["--json", right]);
    let token: serde_json::Value = serde_json::from_str(&login.body).unwrap();
    let bearer = format!("Authorization: Bearer {}", token["token"].as_str().unwrap());
    accepted(&curl_at(&[], &base, PUBLISH, &["--data", &body, "-H", &bearer]));

    let before = memory(daemon.pid());
    // 10 GB are announced: refused before a byte of them is read.
    let mut liar = TcpStream::connect(&at).unwrap();
    write!(liar, "POST {PUBLISH} HTTP/1.1\r\nHost: x\r\n{bearer}\r\nContent-Length: 10000000000\r\n\r\n").unwrap();
    assert!(first_line(&mut liar).contains(" 413 "));
    // Ten thousand connections: those beyond the bound are turned away at once, the others hold nothing.
    let mut many = Vec::new();
    let turned_away = (0..10_000).find_map(|_| {
        let mut stream = TcpStream::connect(&at).ok()?;
        stream.set_read_timeout(Some(Duration::from_millis(1))).ok()?;
        let mut answer = [0; 64];
        let turned = stream.read(&mut answer).is_ok_and(|n| answer[..n].starts_with(b"HTTP/1.1 429 "));
        many.push(stream);
        turned.then_some(())
    });
    assert!(turned_away.is_some(), "{} connections and none was turned away", many.len());
    drop(many);
    // Bodies that never end hold what has come of them, and end with a 408.
    let mut slow: Vec<TcpStream> = (0..100)
        .map(|_| {
            // The first of them may come before there is room again after the ten thousand, and a connection that is turned
            // away takes what is written to it all the same: only who is asked for the body was let in.
            eventually("there is a slow connection", PATIENCE, || {
                let mut stream = TcpStream::connect(&at).ok()?;
                let keys = format!("{bearer}\r\nContent-Length: 1000000\r\nExpect: 100-continue");
                write!(stream, "POST {PUBLISH} HTTP/1.1\r\nHost: x\r\n{keys}\r\n\r\n").ok()?;
                let let_in = first_line(&mut stream).contains(" 100 ");
                (let_in && stream.write_all(b"xxx").is_ok()).then_some(stream)
            })
        })
        .collect();
    let grown = memory(daemon.pid()).saturating_sub(before);
    assert!(grown < 32 << 10, "{grown} KiB more");
    let client = std::iter::repeat_with(|| curl_at(&[], &base, PUBLISH, &["--data", &body, "-H", &bearer])).take(20);
    let statuses: Vec<u16> = client.map(|got| got.status).collect();
    assert!(statuses.contains(&200), "others get through: {statuses:?}");
    assert!(slow.iter_mut().rev().any(|stream| first_line(stream).contains(" 408 ")));
    let log = site.log();
    assert!(!log.contains("canary-push-password") && !log.contains(token["token"].as_str().unwrap()));
    drop(slow);
    daemon.idle(PATIENCE);
}

fn first_line(stream: &mut TcpStream) -> String {
    stream.set_read_timeout(Some(Duration::from_mins(1))).unwrap();
    let mut answer = [0; 256];
    // A connection that was turned away may be reset before it is read.
    let n = stream.read(&mut answer).unwrap_or(0);
    String::from_utf8_lossy(&answer[..n]).lines().next().unwrap_or_default().to_owned()
}

/// Resident memory, KiB.
fn memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn pushed_over_tls_with_a_certificate_of_ours() {
    let engine = Engine::start();
    let keys = "listen = \"127.0.0.1:0\"\nusername = \"cameras\"\npassword_file = \"push-password\"\ntls_cert_file = \"cert.pem\"\ntls_key_file = \"key.pem\"\n---";
    let site = site(&engine, keys);
    private(&site.path().join("push-password"), "secret\n");
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
    fs::write(site.path().join("cert.pem"), made.cert.pem()).unwrap();
    private(&site.path().join("key.pem"), &made.signing_key.serialize_pem());
    let mut daemon = site.run();
    let base = format!("https://{}", address(&site));
    let ca: PathBuf = site.path().join("cert.pem");
    let how = ["--cacert", ca.to_str().unwrap()];
    let login =
        curl_at(&how, &base, "/api/v1/authenticate", &["--json", r#"{"username":"cameras","password":"secret"}"#]);
    let token: serde_json::Value = serde_json::from_str(&login.body).unwrap();
    let bearer = format!("Authorization: Bearer {}", token["token"].as_str().unwrap());
    accepted(&curl_at(&how, &base, PUBLISH, &["--data", &body_of(&image(1), "Door"), "-H", &bearer]));
    // A renewed certificate counts from the reload on.
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    fs::write(site.path().join("cert.pem"), made.cert.pem()).unwrap();
    private(&site.path().join("key.pem"), &made.signing_key.serialize_pem());
    assert!(site.command(&["reload"]).output().unwrap().status.success());
    accepted(&curl_at(&how, &base, PUBLISH, &["--data", &body_of(&image(2), "Door"), "-H", &bearer]));
    engine.until_accepted(2);
    daemon.idle(PATIENCE);
}

#[test]
fn e3_a_socket_for_strangers_without_tls_and_an_account_is_refused_and_so_is_an_open_password() {
    let engine = Engine::start();
    let strangers = site(&engine, "listen = \"0.0.0.0:0\"\n---");
    strangers.write_config();
    let output = strangers.command(&["run"]).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(78), "{text}");
    let missing = "push.listen: `0.0.0.0:0` can be reached from the network, but missing: username, password_file, tls_cert_file, tls_key_file";
    assert!(text.contains(missing), "{text}");

    let open = site(&engine, "username = \"cameras\"\npassword_file = \"push-password\"\n---");
    let password = open.path().join("push-password");
    fs::write(&password, "secret").unwrap();
    fs::set_permissions(&password, Permissions::from_mode(0o644)).unwrap();
    open.write_config();
    let output = open.command(&["run"]).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(78), "{text}");
    assert!(text.contains("push.password_file: ") && text.contains("can be read or changed by other users"), "{text}");
}

#[test]
fn a_socket_of_systemds_is_served() {
    let engine = Engine::start();
    let site = site(&engine, "listen = \"systemd\"\n---");
    let activate = Command::new("systemd-socket-activate").arg("--version").stdout(Stdio::null()).status();
    if !activate.is_ok_and(|it| it.success()) {
        return skipped("a_socket_of_systemds_is_served", "systemd-socket-activate is not installed");
    }
    let path = site.path().join("push.sock");
    let run = site.command(&["run"]);
    let mut command = Command::new("systemd-socket-activate");
    command.arg("--listen").arg(&path).arg("--fdname=push").arg(run.get_program()).args(run.get_args());
    let daemon = site.start_as(command);
    // The first connection starts it.
    eventually("somebody listens", PATIENCE, || site.log().contains("Listening on").then_some(()));
    accepted(&push(&site, &image(1), "Door"));
    engine.until_accepted(1);
    let mut daemon = daemon.until_ready();
    daemon.idle(PATIENCE);
}

#[test]
fn each_detector_of_a_pushed_family_is_up_while_it_can_be_pushed_and_has_its_silence_alarm() {
    let engine = Engine::start();
    let site = site(&engine, "").detector("Dropped", "UTC", "");
    let mut daemon = site.run();
    let text = fs::read_to_string(site.config()).unwrap();
    let reload = |text: &str| {
        fs::write(site.config(), text).unwrap();
        let reload = site.command(&["reload"]).output().unwrap();
        assert!(reload.status.success(), "{}", String::from_utf8_lossy(&reload.stderr));
    };
    let shows = |daemon: &Daemon<'_>, up: i64, alarm: i64| {
        eventually(&format!("up is {up} and the alarm {alarm}"), PATIENCE, || {
            let samples = daemon.metrics();
            let of = |what: &str| samples.count(&format!("framegate_detector_{what}"), "detector=\"Yard\"");
            (of("up") == up && of("silence_alarm_seconds") == alarm).then_some(())
        });
    };
    reload(&text.replace("push = {}", "push = {}\nsilence_alarm = \"1h\""));
    accepted(&push(&site, &image(1), "Yard"));
    shows(&daemon, 1, 3600);
    daemon.idle(PATIENCE);
    shows(&daemon, 1, 3600);
    let without = text.replace("name = \"{detectorName}\"\ntime_zone = \"America/New_York\"\npush = {}", "");
    assert_ne!(text, without);
    reload(&without.replace("[[detectors]]\n\n", ""));
    shows(&daemon, 0, 0);
}

#[test]
fn what_the_spool_holds_is_published_after_its_entries_are_gone() {
    let engine = Engine::start();
    let site = site(&engine, "").detector("Dropped", "UTC", "");
    engine.down();
    let mut daemon: Daemon<'_> = site.run();
    for n in 0..3 {
        accepted(&push(&site, &image(n), "Door"));
    }
    let text = fs::read_to_string(site.config()).unwrap();
    let without = text.replace("name = \"{detectorName}\"\ntime_zone = \"America/New_York\"\npush = {}", "");
    assert_ne!(text, without);
    fs::write(site.config(), without.replace("[[detectors]]\n\n", "")).unwrap();
    let reload = site.command(&["reload"]).output().unwrap();
    assert!(reload.status.success(), "{}", String::from_utf8_lossy(&reload.stderr));
    assert_eq!(push(&site, &image(9), "Door").status, 400, "no detector of that name any more");
    engine.up();
    engine.until_accepted(3);
    daemon.idle(PATIENCE);
}

#[test]
fn an_operator_lists_and_purges_the_spool_with_and_without_a_daemon() {
    let engine = Engine::start();
    let site = site(&engine, "");
    let said = |arguments: &[&str]| {
        let output = site.command(arguments).stdin(Stdio::null()).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (String::from_utf8(text).unwrap(), output.status.success())
    };
    engine.down();
    let mut daemon = site.run();
    assert_eq!(said(&["spool", "list"]), ("No frames in the spool.\n".into(), true));
    for n in 0..6 {
        accepted(&push(&site, &image(n), if n < 4 { "Door" } else { "Lobby" }));
    }
    let (list, _) = said(&["spool", "list"]);
    assert!(list.lines().count() == 7 && list.contains("Lobby") && list.contains("unix socket"), "{list}");
    let (json, _) = said(&["spool", "list", "--json", "--detector", "Lobby"]);
    let first: serde_json::Value = serde_json::from_str(json.lines().next().unwrap()).unwrap();
    assert_eq!((json.lines().count(), first["detect_time_utc"].as_str()), (2, Some("2026-11-23T11:00:00.123Z")));
    assert!(said(&["spool", "purge"]).0.contains("--all"));
    assert!(said(&["spool", "purge", "--all"]).0.contains("say --yes"));
    assert_eq!(said(&["spool", "purge", "--older-than", "1h", "--yes"]), ("0 removed.\n".into(), true));
    let (purged, ok) = said(&["spool", "purge", "--detector", "Door", "--yes", "--json"]);
    let purged: serde_json::Value = serde_json::from_str(&purged).unwrap();
    let (removed, in_hand) = (purged["removed"].as_i64().unwrap(), purged["in_hand"].as_i64().unwrap());
    assert!(ok && removed + in_hand == 4, "{purged}");
    assert_eq!(daemon.metrics().count("framegate_frames_dropped_total", "reason=\"purged\""), removed);
    daemon.metrics().equation_holds().unwrap();
    let left = usize::try_from(2 + in_hand).unwrap();
    assert!(daemon.stop().success());

    assert_eq!(said(&["spool", "list", "--json"]).0.lines().count(), left);
    assert_eq!(said(&["spool", "purge", "--detector", "Lobby", "--yes"]), ("2 removed.\n".into(), true));
    assert_eq!(said(&["spool", "purge", "--all", "--yes"]).0, format!("{in_hand} removed.\n"));
    engine.up();
    daemon = site.run();
    accepted(&push(&site, &image(9), "Door"));
    engine.until_accepted(1);
    daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[&engine], &[hash(&image(9))]), 0);
}
