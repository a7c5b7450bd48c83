//! Pushed frames: how many are durably spooled and answered, by the number of senders; and how many pass through to an engine
//! on the same box. Senders, engine and daemon share the machine, and all of it is bound by what the disk syncs.
#![expect(clippy::print_stdout, reason = "the result")]

#[path = "support/process.rs"]
#[expect(dead_code, reason = "other benches use the rest")]
mod process;

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use base64::prelude::{BASE64_STANDARD, Engine as _};
use framegate::simulator::{Options, Simulator, faces};

use crate::process::Process;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const FACE_BYTES: usize = 40 << 10;
const SENDERS: [u64; 4] = [1, 4, 16, 64];
const FRAMES_MAX: u64 = 20_000;
/// One run ends after this, however many frames it took.
const RUN_MAX: Duration = Duration::from_secs(6);
/// For the daemon to be ready, and for what it holds to be published.
const PATIENCE: Duration = Duration::from_mins(1);

fn main() {
    let face = BASE64_STANDARD.encode(faces::face(1, FACE_BYTES));
    let body = format!(r#"{{"expanded":"{face}","detectorName":"Cam","ianaTimeZone":"UTC"}}"#);
    let request =
        format!("POST /api/v1/faceEdge/publish HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    println!(
        "spooled and answered, the engine away; {} KiB images, {} KiB requests",
        FACE_BYTES >> 10,
        request.len() >> 10
    );
    for senders in SENDERS {
        run(senders, request.as_bytes(), "http://127.0.0.1:9", false);
    }
    println!("spooled, answered and published");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let options = Options { username: "bench".into(), password: "bench".into(), keep: false, ..Options::default() };
    let engine = runtime.block_on(Simulator::start(options)).expect("a simulator");
    run(64, request.as_bytes(), &engine.base_url(), true);
}

fn run(senders: u64, request: &[u8], engine: &str, publishes: bool) {
    let site = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let daemon = Daemon::start(site.path(), engine);
    let (sent, begun) = (AtomicU64::new(0), Instant::now());
    let cpu = daemon.process.cpu();
    std::thread::scope(|scope| {
        for _ in 0..senders {
            scope.spawn(|| {
                let mut stream = UnixStream::connect(site.path().join("push.sock")).expect("the daemon listens");
                let mut answer = [0; 1024];
                while sent.fetch_add(1, Ordering::Relaxed) < FRAMES_MAX && begun.elapsed() < RUN_MAX {
                    stream.write_all(request).expect("it reads");
                    let n = stream.read(&mut answer).expect("it answers");
                    assert!(answer[..n].starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer[..n]));
                }
            });
        }
    });
    let spooled = begun.elapsed().as_secs_f64();
    let frames = daemon.metric("framegate_frames_received_total{detector=\"Cam\",source=\"push\"}");
    let syncs = daemon.metric("framegate_spool_syncs_total");
    println!(
        "  {senders:3} senders: {:6.0} frames/s, {:5.1} frames a sync, {:4.0} µs of CPU each, {:4.0} MiB at the peak",
        frames / spooled,
        frames / syncs,
        daemon.process.cpu().since(cpu).total().as_secs_f64() * 1e6 / frames,
        daemon.process.peak_mib(),
    );
    if publishes {
        let done = || daemon.metric("framegate_spool_frames") < 1.0;
        while !done() {
            assert!(begun.elapsed() < PATIENCE, "not published");
            sleep(Duration::from_millis(5));
        }
        println!(
            "               {:6.0} frames/s until the last one was published",
            frames / begun.elapsed().as_secs_f64()
        );
    }
}

struct Daemon {
    process: Process,
    admin: String,
}

impl Daemon {
    fn start(site: &Path, engine: &str) -> Self {
        let path = site.display();
        let password = site.join("password");
        fs::write(&password, "bench").expect("a file");
        fs::set_permissions(&password, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("a mode");
        let text = format!(
            "[engine]\nbase_url = \"{engine}\"\nusername = \"bench\"\npassword_file = \"password\"\n\
             [dead_letter]\ndirectory = \"{path}/dead\"\n[spool]\ndirectory = \"{path}/spool\"\n\
             [push]\nlisten = \"unix:{path}/push.sock\"\n\
             [admin]\nlisten = \"127.0.0.1:0\"\ncontrol = \"{path}/control.sock\"\n[log]\nlevel = \"warn\"\n\
             [[detectors]]\nname = \"{{detectorName}}\"\ntime_zone = \"UTC\"\npush = {{}}\n"
        );
        fs::write(site.join("framegate.toml"), text).expect("a file");
        let command = |name: &str| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_framegate"));
            command.arg(name).arg("--config").arg(site.join("framegate.toml"));
            command
        };
        let mut daemon = Self { process: Process::start(&mut command("run")), admin: String::new() };
        let begun = Instant::now();
        loop {
            let status = command("status").arg("--json").output().expect("the command runs");
            let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap_or_default();
            if let (Some(admin), Some(_)) = (status["admin"].as_str(), status["push"].as_str()) {
                admin.clone_into(&mut daemon.admin);
                return daemon;
            }
            assert!(begun.elapsed() < PATIENCE, "the daemon is not ready");
            sleep(Duration::from_millis(20));
        }
    }

    fn metric(&self, name: &str) -> f64 {
        let mut stream = std::net::TcpStream::connect(&self.admin).expect("the admin listener");
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").expect("it reads");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("it answers");
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        value.unwrap_or(0.0)
    }
}
