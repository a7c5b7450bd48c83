//! A directory's backlog to the engine: the daemon against a *roofline*, in turns, on the same files.
//!
//! The roofline is the least code that does the work: it reads each file, builds the body, posts it with the same HTTP client over as
//! many connections and unlinks it. No watching, claims, retries, metrics. All three (engine, daemon, roofline) are processes, so that
//! CPU time and peak memory are each one's own. Only the ratios mean something: the engine shares the box.
#![expect(clippy::print_stdout, reason = "the result")]

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use framegate::encode::body::Body;
use framegate::frame::{Detector, Frame, FrameId, SourceKind};
use framegate::simulator::faces;
use jiff::Timestamp;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const FRAMES: u64 = 5_000;
const FACE_BYTES: usize = 40 << 10;
const ROUNDS: usize = 3;
/// No round begins later than this.
const BEGIN_UNTIL: Duration = Duration::from_secs(80);
/// One run of one of the two takes at most this.
const RUN_MAX: Duration = Duration::from_secs(20);
/// Longer than `quiet`: files are complete when the clock starts.
const SETTLED: Duration = Duration::from_millis(700);
const CONNECTIONS: usize = 64;
/// `encode.memory`, MiB.
const BUDGET_MIB: f64 = 64.0;
/// Of `/proc/PID/stat`: the same on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

struct Run {
    seconds: f64,
    cpu_micros: f64,
    peak_mib: f64,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [mode, url, drop] if mode == "roofline" => roofline(url, Path::new(drop)),
        _ => compare(),
    }
}

fn compare() {
    let begun = Instant::now();
    let base: Vec<Vec<u8>> = (0..20).map(|seed| faces::face(seed, FACE_BYTES)).collect();
    let mut pairs = Vec::new();
    while pairs.len() < ROUNDS && begun.elapsed() < BEGIN_UNTIL {
        // Whoever is second has the warmer box: they take turns at that, too.
        let first = measure(&base, pairs.len() % 2 == 1);
        let second = measure(&base, pairs.len() % 2 == 0);
        pairs.push(if pairs.len() % 2 == 0 { (first, second) } else { (second, first) });
    }
    report(&pairs);
}

/// One run over fresh files, with an engine of its own.
fn measure(base: &[Vec<u8>], daemon: bool) -> Run {
    let site = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let drop_dir = site.path().join("drop");
    fs::create_dir(&drop_dir).expect("a drop directory");
    for n in 0..FRAMES {
        let at = usize::try_from(n).expect("small") % base.len();
        fs::write(drop_dir.join(format!("{n:06}.jpg")), faces::face_variant(&base[at], n)).expect("a file");
    }
    sleep(SETTLED);
    let mut engine = Process::start(Command::new(env!("CARGO_BIN_EXE_framegate")).args([
        "simulate-engine",
        "--listen",
        "127.0.0.1:0",
        "--forget",
    ]));
    let url = engine.line().strip_prefix("listening on ").expect("an address").to_owned();
    let mut command = if daemon {
        let mut command = Command::new(env!("CARGO_BIN_EXE_framegate"));
        command.args(["run", "--config"]).arg(configuration(site.path(), &url));
        command
    } else {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["roofline", &url]).arg(&drop_dir);
        command
    };
    let started = Instant::now();
    let worker = Process::start(&mut command);
    let address = url.strip_prefix("http://").expect("plain HTTP");
    wait("all frames are accepted", || accepted(address) >= FRAMES);
    let seconds = started.elapsed().as_secs_f64();
    wait("all files are removed", || images_left(&drop_dir) == 0);
    let run = worker.usage(seconds);
    assert_eq!(accepted(address), FRAMES, "a frame came twice");
    run
}

fn configuration(site: &Path, url: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    let secret = site.join("engine-password");
    fs::write(&secret, "simulated").expect("a password");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).expect("its mode");
    let file = site.join("framegate.toml");
    let at = site.display();
    let text = format!(
        r#"
        [engine]
        base_url = "{url}"
        username = "framegate"
        password_file = "engine-password"
        [publish]
        max_in_flight = {CONNECTIONS}
        [encode]
        memory = "{BUDGET_MIB}MiB"
        [dead_letter]
        directory = "{at}/dead-letter"
        [admin]
        listen = "127.0.0.1:0"
        control = "{at}/control"
        [[detectors]]
        name = "Lobby"
        time_zone = "UTC"
        directory = {{ path = "{at}/drop" }}
        "#
    );
    fs::write(&file, text).expect("a configuration");
    file
}

/// A child that ends with us.
struct Process {
    child: Child,
    out: BufReader<ChildStdout>,
    _in: ChildStdin,
}

impl Process {
    fn start(command: &mut Command) -> Self {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("a process");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        let input = child.stdin.take().expect("piped");
        Self { child, out, _in: input }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).expect("a line");
        line.trim_end().to_owned()
    }

    /// What it used so far.
    fn usage(&self, seconds: f64) -> Run {
        let proc = PathBuf::from(format!("/proc/{}", self.child.id()));
        let stat = fs::read_to_string(proc.join("stat")).expect("it runs");
        // Behind the name, which may contain anything: the 14th and 15th field are the 12th and 13th.
        let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
        let ticks: f64 = fields[11..13].iter().map(|it| it.parse::<f64>().expect("ticks")).sum();
        let status = fs::read_to_string(proc.join("status")).expect("it runs");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
        let kib: f64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
        Run { seconds, cpu_micros: ticks / TICKS_PER_SECOND * 1e6 / FRAMES as f64, peak_mib: kib / 1024.0 }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn wait(what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < RUN_MAX, "waited too long until {what}");
        sleep(Duration::from_millis(10));
    }
}

fn accepted(address: &str) -> u64 {
    let mut stream = TcpStream::connect(address).expect("the engine");
    write!(stream, "GET /__simulator/counts HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let body = answer.split_once("\r\n\r\n").expect("a body").1;
    let counts: serde_json::Value = serde_json::from_str(body).expect("JSON");
    counts["accepted"].as_u64().expect("a count")
}

/// Claimed ones, too.
fn images_left(dir: &Path) -> usize {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => images_left(&entry.path()),
            Ok(_) => usize::from(entry.metadata().is_ok_and(|it| it.len() > 1000)),
            Err(_) => 0,
        })
        .sum()
}

fn report(pairs: &[(Run, Run)]) {
    let median = |of: &dyn Fn(&(Run, Run)) -> f64| {
        let mut all: Vec<f64> = pairs.iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    let rate = |run: &Run| FRAMES as f64 / run.seconds;
    let rows = [
        ("throughput_ratio", median(&|(roof, daemon)| rate(daemon) / rate(roof)), ">= 0.8"),
        ("cpu_ratio", median(&|(roof, daemon)| daemon.cpu_micros / roof.cpu_micros), "<= 1.5"),
        ("beyond_budget_mib", median(&|(_, daemon)| daemon.peak_mib - BUDGET_MIB), "<= 64"),
        ("daemon_frames_per_second", median(&|(_, daemon)| rate(daemon)), ""),
        ("roofline_frames_per_second", median(&|(roof, _)| rate(roof)), ""),
        ("daemon_cpu_micros", median(&|(_, daemon)| daemon.cpu_micros), ""),
        ("roofline_cpu_micros", median(&|(roof, _)| roof.cpu_micros), ""),
        ("daemon_peak_mib", median(&|(_, daemon)| daemon.peak_mib), ""),
        ("roofline_peak_mib", median(&|(roof, _)| roof.peak_mib), ""),
    ];
    println!("{FRAMES} frames of {} KiB, medians of {} rounds", FACE_BYTES >> 10, pairs.len());
    let mut json = format!(r#"{{"bench":"end_to_end","frames":{FRAMES},"rounds":{}"#, pairs.len());
    for (name, value, wanted) in rows {
        println!("{name:<28} {value:>10.2}  {wanted}");
        write!(json, r#","{name}":{value:.3}"#).expect("a string");
    }
    println!("{json}}}");
}

// ---- the roofline

fn roofline(url: &str, drop: &Path) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let client = client();
        let login = client
            .post(format!("{url}/api/v1/authenticate"))
            .header("Content-Type", "application/json")
            .body(r#"{"username":"framegate","password":"simulated"}"#);
        let answer = login.send().await.expect("a login").bytes().await.expect("an answer");
        let answer: serde_json::Value = serde_json::from_slice(&answer).expect("JSON");
        let bearer = format!("Bearer {}", answer["token"].as_str().expect("a token"));
        let publish = format!("{url}/api/v1/faceEdge/publish");
        let files: Vec<PathBuf> = fs::read_dir(drop).expect("a directory").flatten().map(|it| it.path()).collect();
        let shared = Arc::new((files, AtomicUsize::new(0)));
        let detector = Arc::new(Detector { name: "Lobby".into(), time_zone: "UTC".into(), rate: 0.0, weight: 1 });
        let mut posting = tokio::task::JoinSet::new();
        for _ in 0..CONNECTIONS {
            let (shared, detector) = (shared.clone(), detector.clone());
            let (client, bearer, publish) = (client.clone(), bearer.clone(), publish.clone());
            posting.spawn(async move {
                while let Some(file) = shared.0.get(shared.1.fetch_add(1, Ordering::Relaxed)) {
                    let image = fs::read(file).expect("a file");
                    let body = Body::build(&frame(&detector), &image);
                    let request = client
                        .post(&publish)
                        .header("Content-Type", "application/json")
                        .header("Accept", "*/*")
                        .header("Authorization", &bearer)
                        .body(body.bytes());
                    let answer = request.send().await.expect("an answer");
                    assert!(answer.status().is_success());
                    answer.bytes().await.expect("its body");
                    fs::remove_file(file).expect("removed");
                }
            });
        }
        posting.join_all().await;
    });
    // Until its use is read and it is ended.
    std::io::stdin().read_to_end(&mut Vec::new()).ok();
}

/// As the daemon's.
fn client() -> reqwest::Client {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("protocols")
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .referer(false)
        .no_proxy()
        .pool_max_idle_per_host(CONNECTIONS)
        .tcp_nodelay(true)
        .http1_only()
        .build()
        .expect("a client")
}

fn frame(detector: &Arc<Detector>) -> Frame {
    Frame {
        id: FrameId::generate(),
        detector: detector.clone(),
        detect_time: Timestamp::now(),
        received_at: Timestamp::now(),
        noticed: tokio::time::Instant::now(),
        source: SourceKind::Directory,
        original_name: "face.jpg".into(),
        image_bytes: 0,
    }
}
