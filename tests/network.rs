//! The network between Framegate and the engine, and the box's clock, in every trouble: through the real binary. FAULTS.md, those rows
//! of sections A and C that `delivery` leaves out.
//!
//! What needs packets to vanish, a narrow line, name servers or fixed ports runs in a network of its own: see [`own_network`].

mod support;

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use framegate::simulator::Certificate;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE};
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::runtime::Runtime;

use support::engine::{Camera, Engine, Hash, hash, image, nothing_lost, put_face};
use support::faults::skipped;
use support::network::{Names, Narrow, Relay, Says, Server, Silence, WallClock, free_port, own_network};
use support::{Daemon, PATIENCE, Samples, Site, eventually, put};

// ---- clocks

#[test]
fn c6_a_wall_clock_that_is_five_years_off_and_jumps_neither_stops_the_flow_nor_renews_more_often() {
    for offsets in [["+5y", "+0", "-5y", "+0"], ["-5y", "+0", "+5y", "+0"]] {
        let engine = Engine::with(|options| options.faults.token_ttl = Duration::from_secs(4));
        let site =
            Site::new(&engine.base_url()).section("[publish]\nrate = 50\nburst = 5").detector("Lobby", "UTC", "");
        let Some(clock) = WallClock::new(site.path(), offsets[0]) else {
            return skipped("c6_a_wall_clock_…", "needs libfaketime (Debian: faketime)");
        };
        let site = with_clock(site, &clock);
        let begun = Instant::now();
        let mut daemon = site.run();
        let mut written = Vec::new();
        for (round, offset) in (0u64..).zip(offsets) {
            written.extend(put_faces(&site, "Lobby", round * 100..round * 100 + 100));
            // In the middle of them, but for the first.
            engine.until_accepted(round * 100 + 50);
            clock.set(offset);
            engine.until_accepted(round * 100 + 100);
            shows_skew(&daemon, offset);
        }
        let samples = all_published_once(&engine, &mut daemon, &written);
        let counts = engine.counts();
        assert_eq!((counts.authenticate, counts.statuses.get(&401)), (1, None), "renewals in time, no login");
        // Three quarters of four seconds.
        let due = begun.elapsed().as_secs() / 3 + 1;
        assert!((2..=due).contains(&counts.renew), "{} renewals, {due} were due", counts.renew);
        assert_eq!(samples.count("framegate_publish_retries_total", ""), 0);
    }
}

#[test]
fn a25_a_wall_clock_ten_years_off_stalls_nothing_keeps_a_backlogs_order_and_replaces_absurd_times() {
    const FRAMES: u64 = 100;
    /// In hand before all have been seen.
    const IN_HAND: usize = 20;
    /// Neighbours may overtake each other between the threads.
    const OVERTAKEN_BY: usize = 8;
    for (offset, corrected) in [("+0", 0), ("+10y", 0), ("-10y", FRAMES)] {
        let engine = Engine::start();
        let site = Site::new(&engine.base_url())
            .section("[publish]\nmax_in_flight = 1\n[encode]\nworkers = 1")
            .detector("Lobby", "UTC", "");
        let Some(clock) = WallClock::new(site.path(), offset) else {
            return skipped("a25_a_wall_clock_…", "needs libfaketime (Debian: faketime)");
        };
        let site = with_clock(site, &clock);
        // The detectors' times are right, some minutes apart; the newest has the highest number.
        let now = SystemTime::now();
        let written: Vec<Hash> = (0..FRAMES)
            .map(|n| put_of_age(&site.drop_dir("Lobby"), n, now, Duration::from_mins((FRAMES - n) * 5)))
            .collect();
        engine.hold();
        let mut daemon = site.run();
        eventually("all are seen", PATIENCE, || {
            let samples = daemon.metrics();
            let seen = samples.count("framegate_frames_received_total", "") == i64::try_from(FRAMES).unwrap();
            (seen && engine.counts().in_flight == 1).then_some(())
        });
        engine.release();
        let samples = all_published_once(&engine, &mut daemon, &written);
        let order: Vec<usize> = engine.accepted()[IN_HAND..]
            .iter()
            .map(|it| written.iter().position(|hash| *hash == it.sha256).expect("it was written"))
            .collect();
        let mut newest_first = order.clone();
        newest_first.sort_unstable_by(|a, b| b.cmp(a));
        let near = |(at, expected): (&usize, &usize)| at.abs_diff(*expected) <= OVERTAKEN_BY;
        assert!(order.iter().zip(&newest_first).all(near), "{offset}: {order:?}");
        shows_skew(&daemon, offset);
        assert_eq!(samples.count("framegate_detect_times_corrected_total", ""), i64::try_from(corrected).unwrap());
        for frame in engine.accepted() {
            let off = (frame.time.as_second() - jiff::Timestamp::now().as_second()) as f64 / (365.0 * 86_400.0);
            let expected = if corrected > 0 { -10.0 } else { 0.0 };
            assert!((off - expected).abs() < 0.1, "{offset}: {} is {off} years off", frame.time);
        }
    }
}

#[test]
fn a25_a_wall_clock_that_jumps_ten_years_under_load_stalls_and_loses_nothing() {
    let engine = Engine::with(|options| options.faults.latency = Duration::from_millis(5));
    let site = site(&engine.base_url());
    let Some(clock) = WallClock::new(site.path(), "+0") else {
        return skipped("a25_a_wall_clock_…", "needs libfaketime (Debian: faketime)");
    };
    let site = with_clock(site, &clock);
    let mut daemon = site.run();
    let camera = Camera::start(std::slice::from_ref(&engine), vec![site.drop_dir("Lobby")], 100);
    for (round, offset) in (1u64..).zip(["+10y", "+0", "-10y", "+0"]) {
        engine.until_accepted(round * 200);
        clock.set(offset);
    }
    engine.until_accepted(1000);
    let written = camera.finish();
    all_published_once(&engine, &mut daemon, &written);
    assert_eq!(engine.counts().authenticate, 1);
}

/// Everything that is run on the site has this clock.
fn with_clock(site: Site, clock: &WallClock) -> Site {
    clock.environment().into_iter().fold(site, |site, (key, value)| site.environment(key, &value))
}

/// Within a tenth of what was ordered: a year is not always 365 days.
#[track_caller]
fn shows_skew(daemon: &Daemon<'_>, offset: &str) {
    let years: f64 = offset.trim_end_matches('y').parse().expect("a number of years");
    eventually(&format!("the skew is {offset}"), PATIENCE, || {
        let skew = daemon.metrics().sum("framegate_clock_skew_seconds", "") / (365.0 * 86_400.0);
        ((skew - years).abs() <= years.abs() / 10.0 + 0.001).then_some(())
    });
}

/// Waits until nothing is in flight any more but a probe.
#[track_caller]
fn until_all_failed(daemon: &Daemon<'_>) {
    eventually("what was on the dead line has failed", PATIENCE, || {
        (daemon.metrics().count("framegate_frames_in_flight", "") <= 1).then_some(())
    });
}

// ---- connections

#[test]
fn c14_resets_in_the_tls_handshake_are_tried_again_and_cost_no_frame() {
    const RESETS: u64 = 5;
    // After the client's hello; within the server's hello; among its certificates.
    for bytes in [0, 20, 400] {
        let engine = Engine::with(|options| options.tls = Some(Certificate::Good));
        let relay = Relay::to(engine.address());
        let site = site_with(&format!("https://{}", relay.address()), "ca_file = \"engine-ca.pem\"");
        fs::write(site.path().join("engine-ca.pem"), engine.ca_pem().expect("TLS")).expect("it can be written");
        relay.reset(RESETS, bytes);
        let mut daemon = site.run();
        let written = put_faces(&site, "Lobby", 0..50);
        let samples = all_published_once(&engine, &mut daemon, &written);
        assert_eq!(relay.was_reset(), RESETS, "{bytes}: the fault was met");
        assert_eq!(samples.count("framegate_publish_ambiguous_total", ""), 0, "{bytes}: nothing had been sent");
        assert_eq!(samples.count("framegate_engine_state", "state=\"open\""), 1);
    }
}

#[test]
fn c15_half_open_connections_fail_within_seconds_long_before_the_deadline_and_heal() {
    if !own_network("c15_half_open_connections_fail_within_seconds_long_before_the_deadline_and_heal") {
        return;
    }
    if !Silence::works() {
        return skipped("c15_half_open_connections_…", "needs nft and nf_tables in the kernel");
    }
    for http2 in [false, true] {
        let engine = Engine::start();
        // No deadline helps within this test's patience.
        let site = site_with(&engine.base_url(), &format!("timeout = \"3m\"\nhttp2 = {http2}"))
            .section("[shutdown]\ndeadline = \"4m\"");
        let mut daemon = site.run();
        let mut written = put_faces(&site, "Lobby", 0..200);
        engine.until_accepted(200);
        // Its connections are still there.
        let silence = Silence::of(engine.address().port());
        written.extend(put_faces(&site, "Lobby", 200..300));
        until_state(&daemon, "unreachable");
        until_all_failed(&daemon);
        assert!(site.files_left().len() >= 100 - 16, "frames are kept");
        drop(silence);
        let samples = daemon.idle(PATIENCE);
        let doubled = nothing_lost(&[&engine], &written);
        assert!(doubled <= ambiguous(&samples), "{doubled} came twice");
        assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
    }
}

#[test]
fn c15_a_line_that_goes_dead_before_the_answers_fails_at_the_deadline_and_heals() {
    if !own_network("c15_a_line_that_goes_dead_before_the_answers_fails_at_the_deadline_and_heals") {
        return;
    }
    if !Silence::works() {
        return skipped("c15_a_line_that_goes_dead_…", "needs nft and nf_tables in the kernel");
    }
    for http2 in [false, true] {
        let engine = Engine::start();
        let site = site_with(&engine.base_url(), &format!("timeout = \"4s\"\nhttp2 = {http2}"));
        let mut daemon = site.run();
        let mut written = put_faces(&site, "Lobby", 0..100);
        engine.until_accepted(100);
        engine.hold();
        written.extend(put_faces(&site, "Lobby", 100..200));
        eventually("several wait for their answers", PATIENCE, || (engine.counts().in_flight >= 4).then_some(()));
        let silence = Silence::of(engine.address().port());
        engine.release();
        until_state(&daemon, "unreachable");
        // What was still being sent fails first, at the connection's own time-out: an answer would come in time after that.
        until_all_failed(&daemon);
        drop(silence);
        let samples = daemon.idle(PATIENCE);
        let doubled = nothing_lost(&[&engine], &written);
        assert!(doubled >= 4 && doubled <= ambiguous(&samples), "{doubled} came twice");
        assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
    }
}

#[test]
fn c17_a_line_of_64_kilobits_carries_frame_after_frame_within_the_budget() {
    const BUDGET: f64 = (8 << 20) as f64;
    if !own_network("c17_a_line_of_64_kilobits_carries_frame_after_frame_within_the_budget") {
        return;
    }
    let engine = Engine::start();
    let Some(narrow) = Narrow::to(engine.address().port(), "64kbit") else {
        return skipped("c17_a_line_of_64_kilobits_…", "needs tc, and htb, tbf and u32 in the kernel");
    };
    // The default time-outs.
    let site = Site::new(&engine.base_url())
        .section("[encode]\nmemory = \"8MiB\"\nmax_frame = \"1MiB\"")
        .detector("Lobby", "UTC", "");
    let mut daemon = site.run();
    let before = daemon.metrics().sum("process_resident_memory_bytes", "");
    let written: Vec<Hash> = (0..400).map(|n| put_large(&site.drop_dir("Lobby"), n)).collect();
    // Each takes the line almost three seconds.
    eventually("frame after frame gets through", 8 * PATIENCE, || {
        let samples = daemon.metrics();
        let (memory, resident) =
            (samples.sum("framegate_memory_in_use_bytes", ""), samples.sum("process_resident_memory_bytes", ""));
        assert!(memory <= BUDGET, "{memory} bytes in use");
        let limit = samples.count("framegate_concurrency_limit", "");
        assert!(limit <= 8, "{limit} at once, where three take ten seconds");
        assert!(resident < before + BUDGET + 48e6, "from {before} to {resident} bytes");
        (engine.counts().accepted >= 10).then_some(())
    });
    assert_eq!(daemon.metrics().count("framegate_frames_dead_lettered_total", ""), 0);
    drop(narrow);
    let samples = daemon.idle(4 * PATIENCE);
    let doubled = nothing_lost(&[&engine], &written);
    assert!(doubled <= ambiguous(&samples), "{doubled} came twice");
}

#[test]
fn c18_a_name_that_moves_is_followed_under_load_and_one_that_is_gone_pauses_without_loss() {
    const OLD: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
    const NEW: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);
    if !own_network("c18_a_name_that_moves_is_followed_under_load_and_one_that_is_gone_pauses_without_loss") {
        return;
    }
    let old = Engine::with(|options| options.listen = SocketAddr::from((OLD, 0)));
    let port = old.address().port();
    let new = Engine::with(|options| options.listen = SocketAddr::from((NEW, port)));
    let engines = [old.clone(), new.clone()];
    // With one attempt at a time there is one connection, and it is never idle.
    let site = Site::new(&format!("http://engine.test:{port}"))
        .section("[publish]\nmax_in_flight = 1\nbackoff_max = \"1s\"")
        .detector("Lobby", "UTC", "");
    let names = Names::start(Says::Address(OLD), site.path());
    let mut daemon = site.run();
    let camera = Camera::start(&engines, vec![site.drop_dir("Lobby")], 20);
    old.until_accepted(100);

    // The old engine goes on answering: only the connections' age makes them move.
    names.say(Says::Address(NEW));
    eventually("the new engine has everything", 4 * PATIENCE, || {
        (new.counts().accepted > 100 && old.counts().open == 0).then_some(())
    });

    for (says, heals) in [
        (Says::NoSuchName, OLD),
        (Says::ServerFailure, NEW),
        (Says::Nothing, OLD),
        (Says::Late(OLD, Duration::from_secs(5)), NEW),
    ] {
        names.say(says);
        for engine in &engines {
            engine.cut_connections();
        }
        until_state(&daemon, "unreachable");
        let asked = names.asked();
        for_a_while(Duration::from_secs(4));
        let asked = names.asked() - asked;
        assert!(asked <= 60, "{says:?}: {asked} questions in four seconds");
        names.say(Says::Address(heals));
        let accepted = || engines.iter().map(|engine| engine.counts().accepted).sum::<u64>();
        let before = accepted();
        eventually("frames flow again", PATIENCE, || (accepted() > before + 50).then_some(()));
    }
    let written = camera.finish();
    let samples = daemon.idle(PATIENCE);
    let doubled = nothing_lost(&[&old, &new], &written);
    assert!(doubled <= ambiguous(&samples), "{doubled} came twice");
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
}

#[test]
fn c12_a_frame_larger_than_a_proxy_lets_through_is_a_dead_letter_and_the_others_flow() {
    if !own_network("c12_a_frame_larger_than_a_proxy_lets_through_is_a_dead_letter_and_the_others_flow") {
        return;
    }
    let engine = Engine::start();
    let address = free_port();
    let site = site(&format!("http://{address}"));
    let Some(_nginx) = nginx(site.path(), address, "", "client_max_body_size 64k;", &engine) else {
        return skipped("c12_…", "needs nginx");
    };
    let mut daemon = site.run();
    // What follows the end of a JPEG belongs to the file.
    let large = [&image(9000)[..], &vec![0; 5 << 20][..]].concat();
    put(&site.drop_dir("Lobby"), "large.jpg", &large);
    let mut written = Vec::new();
    // It is its fault once others were taken after each of its refusals.
    eventually("the large one is a dead letter", PATIENCE, || {
        let n = written.len() as u64;
        written.push(put_face(&site.drop_dir("Lobby"), n));
        engine.until_accepted(n + 1);
        (daemon.metrics().count("framegate_frames_dead_lettered_total", "reason=\"rejected\"") == 1).then_some(())
    });
    let samples = daemon.idle(PATIENCE);
    let doubled = nothing_lost(&[&engine], &written);
    assert!(doubled <= ambiguous(&samples), "{doubled} came twice");
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 1);
    let letters = site.command(&["dead-letter", "list", "--json"]).output().expect("the binary runs");
    let letter: serde_json::Value = serde_json::from_slice(&letters.stdout).expect("one letter");
    assert_eq!((letter["status"].as_u64(), letter["original_name"].as_str()), (Some(413), Some("large.jpg")));
    let stored = site.dead_letters().join(format!("{}.image", letter["id"].as_str().expect("an id")));
    assert!(fs::read(stored).expect("its image") == large, "as it was");
}

#[test]
fn c19_nginx_closing_idle_connections_after_a_second_costs_no_frame() {
    if !own_network("c19_nginx_closing_idle_connections_after_a_second_costs_no_frame") {
        return;
    }
    let engine = Engine::start();
    let address = free_port();
    let site = site(&format!("http://{address}"));
    let Some(_nginx) = nginx(site.path(), address, "", "keepalive_timeout 1s;", &engine) else {
        return skipped("c19_nginx_…", "needs nginx");
    };
    let mut daemon = site.run();
    let mut written = Vec::new();
    for (round, gap) in (0u64..).zip([950, 1050, 990, 1010, 1000]) {
        written.extend(put_faces(&site, "Lobby", round * 20..round * 20 + 20));
        engine.until_accepted(written.len() as u64);
        for_a_while(Duration::from_millis(gap));
    }
    let samples = daemon.idle(PATIENCE);
    let doubled = nothing_lost(&[&engine], &written);
    let ambiguous = ambiguous(&samples);
    // Each burst may meet every connection just as it closes.
    assert!(doubled <= ambiguous && ambiguous <= 60, "{doubled} came twice, {ambiguous} ambiguous");
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
}

#[test]
fn c20_http_2_connections_that_go_away_after_three_requests_are_left_cleanly() {
    if !own_network("c20_http_2_connections_that_go_away_after_three_requests_are_left_cleanly") {
        return;
    }
    for keys in ["keepalive_requests 3;", "keepalive_requests 3; http2_max_concurrent_streams 1;"] {
        let engine = Engine::start();
        let address = free_port();
        let site = site_with(&format!("https://{address}"), "ca_file = \"nginx.pem\"\nhttp2 = true");
        let Some(_nginx) = nginx(site.path(), address, "ssl http2", keys, &engine) else {
            return skipped("c20_http_2_…", "needs nginx");
        };
        let mut daemon = site.run();
        let written = put_faces(&site, "Lobby", 0..150);
        let samples = all_published_once(&engine, &mut daemon, &written);
        assert_eq!(samples.count("framegate_engine_state", "state=\"open\""), 1);
        assert_eq!(ambiguous(&samples), 0, "what was not read is not in doubt");
    }
}

#[test]
fn c20_streams_that_are_refused_come_again_and_none_of_them_twice() {
    for streams in [1, 100] {
        let engine = Engine::start();
        let front = Front::start(engine.address(), 3, streams);
        let site = site_with(&format!("http://{}", front.address), "http2 = true");
        let mut daemon = site.run();
        let written = put_faces(&site, "Lobby", 0..300);
        let samples = all_published_once(&engine, &mut daemon, &written);
        assert!(front.refused() >= 100, "the fault was met");
        assert_eq!(ambiguous(&samples), 0, "what was not read is not in doubt");
    }
}

#[test]
fn c22_the_environments_proxies_are_ignored() {
    let engine = Engine::start();
    let nobody = TcpListener::bind("127.0.0.1:0").expect("a port");
    nobody.set_nonblocking(true).expect("a socket");
    let proxy = format!("http://{}", nobody.local_addr().expect("it is bound"));
    let mut site = site(&engine.base_url());
    for key in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        site = site.environment(key, &proxy).environment(&key.to_lowercase(), &proxy);
    }
    let mut daemon = site.run();
    let written = put_faces(&site, "Lobby", 0..100);
    all_published_once(&engine, &mut daemon, &written);
    assert!(nobody.accept().is_err(), "nobody asked the proxy");
}

#[test]
fn c22_the_configured_proxy_is_used_and_one_that_is_down_or_wants_a_password_pauses_without_loss() {
    if !own_network("c22_the_configured_proxy_is_used_and_one_that_is_down_or_wants_a_password_pauses_without_loss") {
        return;
    }
    for tls in [false, true] {
        let engine = Engine::with(|options| options.tls = tls.then_some(Certificate::Good));
        let address = free_port();
        let ca = if tls { "ca_file = \"engine-ca.pem\"" } else { "" };
        let site = site_with(&engine.base_url(), &format!("proxy = \"http://{address}\"\n{ca}"));
        fs::write(site.path().join("engine-ca.pem"), engine.ca_pem().unwrap_or_default()).expect("it can be written");
        let Some(proxy) = tinyproxy(site.path(), address, "") else {
            return skipped("c22_the_configured_proxy_…", "needs tinyproxy");
        };
        let mut daemon = site.run();
        let mut written = put_faces(&site, "Lobby", 0..100);
        engine.until_accepted(100);

        drop(proxy);
        written.extend(put_faces(&site, "Lobby", 100..200));
        until_state(&daemon, "unreachable");
        let accepted = engine.counts().accepted;
        let proxy = tinyproxy(site.path(), address, "BasicAuth somebody secret");
        let state = if tls { "unreachable" } else { "unexpected-answer" };
        until_state(&daemon, state);
        for_a_while(Duration::from_secs(3));
        assert_eq!(engine.counts().accepted, accepted, "nothing goes round the proxy");
        assert_eq!(daemon.metrics().count("framegate_frames_dead_lettered_total", ""), 0);
        assert_eq!(daemon.metrics().count("framegate_engine_state", &format!("state=\"{state}\"")), 1);

        drop(proxy);
        let _proxy = tinyproxy(site.path(), address, "");
        let samples = daemon.idle(PATIENCE);
        let doubled = nothing_lost(&[&engine], &written);
        assert!(doubled <= ambiguous(&samples), "{doubled} came twice");
        assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
    }
}

// ---- servers of others

/// In front of the engine; `listens` with these parameters, and has these keys. Its certificate is `nginx.pem` in the directory.
fn nginx(directory: &Path, address: SocketAddr, listens: &str, keys: &str, engine: &Engine) -> Option<Server> {
    let key = rcgen::KeyPair::generate().expect("a key");
    let params = rcgen::CertificateParams::new(vec![address.ip().to_string()]).expect("a name");
    let certificate = params.self_signed(&key).expect("a certificate");
    fs::write(directory.join("nginx.pem"), certificate.pem()).expect("it can be written");
    fs::write(directory.join("nginx.key"), key.serialize_pem()).expect("it can be written");
    let (directory, engine) = (directory.display(), engine.address());
    let config = format!(
        "daemon off; master_process off; pid {directory}/nginx.pid;\n\
         events {{ worker_connections 256; }}\n\
         http {{ access_log off; client_max_body_size 16m;\n\
         client_body_temp_path {directory}/n1; proxy_temp_path {directory}/n2; fastcgi_temp_path {directory}/n3;\n\
         uwsgi_temp_path {directory}/n4; scgi_temp_path {directory}/n5;\n\
         upstream engine {{ server {engine}; keepalive 16; }}\n\
         server {{ listen {address} {listens}; {keys}\n\
         ssl_certificate {directory}/nginx.pem; ssl_certificate_key {directory}/nginx.key;\n\
         location / {{ proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection \"\"; }} }} }}\n"
    );
    let path = format!("{directory}/nginx.conf");
    fs::write(&path, config).expect("it can be written");
    let mut command = Command::new("nginx");
    command.args(["-c", &path, "-e", &format!("{directory}/nginx.log")]);
    Server::start(command, address)
}

fn tinyproxy(directory: &Path, address: SocketAddr, key: &str) -> Option<Server> {
    let config = format!("Listen {}\nPort {}\nTimeout 60\nMaxClients 100\n{key}\n", address.ip(), address.port());
    let path = directory.join("tinyproxy.conf");
    fs::write(&path, config).expect("it can be written");
    let mut command = Command::new("tinyproxy");
    command.args(["-d", "-c"]).arg(path).stdout(Stdio::null());
    Server::start(command, address)
}

/// Speaks HTTP/2 without TLS in front of the engine, and refuses every so many publish requests without having looked at them.
struct Front {
    address: SocketAddr,
    refused: Arc<AtomicU64>,
    _runtime: Runtime,
}

impl Front {
    fn start(engine: SocketAddr, refuse_every: u64, streams: u32) -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
        let address = listener.local_addr().expect("it is bound");
        let (asked, refused) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let counts = (asked, refused.clone());
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let counts = counts.clone();
                let service = service_fn(move |request: Request<Incoming>| {
                    let (asked, refused) = counts.clone();
                    async move {
                        let publish = request.uri().path().ends_with("/publish");
                        if publish && asked.fetch_add(1, Ordering::Relaxed) % refuse_every == 0 {
                            refused.fetch_add(1, Ordering::Relaxed);
                            return Err(h2::Error::from(h2::Reason::REFUSED_STREAM));
                        }
                        Ok(forward(request, engine).await.expect("the engine answers"))
                    }
                });
                let mut server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                server.max_concurrent_streams(streams);
                tokio::spawn(server.serve_connection(TokioIo::new(stream), service));
            }
        });
        Self { address, refused, _runtime: runtime }
    }

    fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

/// The same over HTTP/1.1, on a connection of its own.
async fn forward(request: Request<Incoming>, engine: SocketAddr) -> io::Result<Response<Full<Bytes>>> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    let mut text = Vec::new();
    write!(text, "{} {} HTTP/1.1\r\nHost: {engine}\r\nConnection: close\r\n", head.method, head.uri.path())?;
    for name in [AUTHORIZATION, CONTENT_TYPE, ACCEPT] {
        if let Some(value) = head.headers.get(&name) {
            write!(text, "{name}: {}\r\n", value.to_str().map_err(io::Error::other)?)?;
        }
    }
    write!(text, "Content-Length: {}\r\n\r\n", body.len())?;
    text.extend_from_slice(&body);
    let mut stream = tokio::net::TcpStream::connect(engine).await?;
    stream.write_all(&text).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| io::Error::other("no end of the head"))?;
    let status = head.split(' ').nth(1).ok_or_else(|| io::Error::other("no status"))?;
    let answer = Response::builder().status(status).header(CONTENT_TYPE, "application/json");
    answer.body(Full::new(Bytes::from(body.to_owned()))).map_err(io::Error::other)
}

// ---- what the tests above say for short

/// One detector, and tries soon after another, so that healing takes a test's time.
fn site(base_url: &str) -> Site {
    site_with(base_url, "")
}

fn site_with(base_url: &str, engine_keys: &str) -> Site {
    Site::new(base_url)
        .engine_keys(engine_keys)
        .section("[publish]\nmax_in_flight = 16\nbackoff_max = \"1s\"")
        .detector("Lobby", "UTC", "")
}

fn put_faces(site: &Site, detector: &str, numbers: std::ops::Range<u64>) -> Vec<Hash> {
    numbers.map(|n| put_face(&site.drop_dir(detector), n)).collect()
}

/// A face whose body takes some 22 KB on the line.
fn put_large(directory: &Path, n: u64) -> Hash {
    // What follows the end of a JPEG belongs to the file.
    let image = [&image(n)[..], &vec![0; 12 << 10][..]].concat();
    put(directory, &format!("{n:07}.jpg"), &image);
    hash(&image)
}

fn put_of_age(directory: &Path, n: u64, now: SystemTime, age: Duration) -> Hash {
    let image = image(n);
    let (unfinished, path) = (directory.join(format!(".{n}.part")), directory.join(format!("{n:07}.jpg")));
    fs::write(&unfinished, &image).expect("an image can be written");
    File::options().write(true).open(&unfinished).and_then(|file| file.set_modified(now - age)).expect("and dated");
    fs::rename(unfinished, path).expect("and renamed");
    hash(&image)
}

#[track_caller]
fn all_published_once(engine: &Engine, daemon: &mut Daemon<'_>, written: &[Hash]) -> Samples {
    let samples = daemon.idle(PATIENCE);
    assert_eq!(nothing_lost(&[engine], written), 0, "came twice");
    assert_eq!(samples.count("framegate_frames_dead_lettered_total", ""), 0);
    samples
}

#[track_caller]
fn until_state(daemon: &Daemon<'_>, state: &str) {
    eventually(&format!("the engine's state is {state}"), PATIENCE, || {
        (daemon.metrics().count("framegate_engine_state", &format!("state=\"{state}\"")) == 1).then_some(())
    });
}

fn for_a_while(time: Duration) {
    let begun = Instant::now();
    eventually("a while is over", PATIENCE, || (begun.elapsed() >= time).then_some(()));
}

fn ambiguous(samples: &Samples) -> u64 {
    u64::try_from(samples.count("framegate_publish_ambiguous_total", "")).expect("a count")
}
