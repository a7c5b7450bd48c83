//! A backlog in Redis and in NATS `JetStream`, to the engine, by one daemon and by two that share it; in an MQTT broker, through
//! the spool; and the same backlog in a drop directory beside it. Everything shares the box: only the ratios mean something.
//!
//! Needs `redis-server`, `nats-server` and `mosquitto`; says which is missing and goes on.
#![expect(clippy::print_stdout, reason = "the result")]

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use framegate::simulator::faces;

const FRAMES: u64 = 5_000;
const FACE_BYTES: usize = 40 << 10;
/// One run takes at most this.
const RUN_MAX: Duration = Duration::from_mins(1);
/// Longer than `quiet`: files are complete when the clock starts.
const SETTLED: Duration = Duration::from_millis(700);
const LOOK_EVERY: Duration = Duration::from_millis(5);

#[derive(Clone, Copy, PartialEq, Eq)]
enum From {
    Directory,
    Redis,
    Nats,
    /// With what may be on its way at once, as mosquitto has it.
    Mqtt(u32),
}

fn main() {
    let base: Vec<Vec<u8>> = (0..20).map(|seed| faces::face(seed, FACE_BYTES)).collect();
    println!("{FRAMES} frames of {} KiB; everything shares {} CPUs", FACE_BYTES >> 10, cpus());
    println!("{:<12} {:>8} {:>10} {:>12} {:>8}", "from", "daemons", "frames/s", "× directory", "shares");
    let mut directory = 0.0;
    for (from, name, daemons) in [
        (From::Directory, "directory", 1),
        (From::Redis, "redis", 1),
        (From::Redis, "redis", 2),
        (From::Nats, "nats", 1),
        (From::Nats, "nats", 2),
        (From::Mqtt(20), "mqtt", 1),
        (From::Mqtt(100), "mqtt, 100", 1),
    ] {
        let Some((rate, shares)) = measure(&base, from, daemons) else {
            println!("{name:<12} {daemons:>8} {:>10}", "no server");
            continue;
        };
        if from == From::Directory {
            directory = rate;
        }
        let shares: Vec<String> = shares.iter().map(|share| format!("{:.0} %", 100.0 * share)).collect();
        println!("{name:<12} {daemons:>8} {rate:>10.0} {:>12.2} {:>8}", rate / directory, shares.join(", "));
    }
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Frames per second from the first daemon's start to the last frame's acceptance, and each daemon's share.
fn measure(base: &[Vec<u8>], from: From, daemons: usize) -> Option<(f64, Vec<f64>)> {
    let site = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let at = site.path();
    let port = TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("a free port").port();
    let _broker = match from {
        From::Directory => None,
        From::Redis => Some(Process::start(
            Command::new("redis-server")
                .args([
                    "--bind",
                    "127.0.0.1",
                    "--port",
                    &port.to_string(),
                    "--appendonly",
                    "yes",
                    "--save",
                    "",
                    "--dir",
                ])
                .arg(at),
        )?),
        From::Nats => Some(Process::start(
            Command::new("nats-server").args(["-a", "127.0.0.1", "-p", &port.to_string(), "-js", "-sd"]).arg(at),
        )?),
        From::Mqtt(in_flight) => {
            Some(Process::start(Command::new("mosquitto").arg("-c").arg(broker_file(at, port, in_flight)))?)
        }
    };
    let images = (0..FRAMES).map(|n| faces::face_variant(&base[usize::try_from(n).expect("small") % base.len()], n));
    let source = match from {
        From::Directory => fill_directory(at, images),
        From::Redis => fill_redis(port, images),
        From::Nats => fill_nats(port, images),
        From::Mqtt(_) => fill_mqtt(port, images),
    };
    let mut engine = Process::start(Command::new(env!("CARGO_BIN_EXE_framegate")).args([
        "simulate-engine",
        "--listen",
        "127.0.0.1:0",
        "--forget",
    ]))
    .expect("our own binary");
    let url = engine.line().strip_prefix("listening on ").expect("an address").to_owned();
    let address = url.strip_prefix("http://").expect("plain HTTP");
    let begun = Instant::now();
    let mut running = Vec::new();
    for n in 0..daemons {
        let file = configuration(&at.join(n.to_string()), &url, &source.replace("CONSUMER", &format!("box-{n}")));
        let run = Process::start(Command::new(env!("CARGO_BIN_EXE_framegate")).args(["run", "--config"]).arg(&file));
        running.push((run.expect("our own binary"), file));
    }
    while accepted(address) < FRAMES {
        assert!(begun.elapsed() < RUN_MAX, "{} of {FRAMES} after {RUN_MAX:?}", accepted(address));
        sleep(LOOK_EVERY);
    }
    let seconds = begun.elapsed().as_secs_f64();
    let shares = running.iter().map(|(_, file)| published(file) / FRAMES as f64).collect();
    Some((FRAMES as f64 / seconds, shares))
}

fn fill_directory(at: &Path, images: impl Iterator<Item = Vec<u8>>) -> String {
    let drop_dir = at.join("drop");
    fs::create_dir(&drop_dir).expect("a drop directory");
    for (n, image) in images.enumerate() {
        fs::write(drop_dir.join(format!("{n:06}.jpg")), image).expect("a file");
    }
    sleep(SETTLED);
    format!("directory = {{ path = \"{}\" }}", drop_dir.display())
}

fn fill_redis(port: u16, images: impl Iterator<Item = Vec<u8>>) -> String {
    let url = format!("redis://127.0.0.1:{port}");
    let begun = Instant::now();
    let mut client = loop {
        match redis::Client::open(url.as_str()).and_then(|client| client.get_connection()) {
            Ok(client) => break client,
            Err(error) => assert!(begun.elapsed() < RUN_MAX, "{error}"),
        }
        sleep(LOOK_EVERY);
    };
    for image in images {
        redis::cmd("XADD").arg("frames").arg("*").arg("image").arg(image).query::<()>(&mut client).expect("added");
    }
    format!("redis = {{ url = \"{url}\", stream = \"frames\", consumer = \"CONSUMER\" }}")
}

fn fill_nats(port: u16, images: impl Iterator<Item = Vec<u8>>) -> String {
    use async_nats::jetstream::{self, stream};
    let url = format!("nats://127.0.0.1:{port}");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let begun = Instant::now();
        let context = loop {
            if let Ok(client) = async_nats::connect(&url).await {
                let context = jetstream::new(client);
                let config =
                    stream::Config { name: "FRAMES".into(), subjects: vec!["frames.>".into()], ..Default::default() };
                if context.create_stream(config).await.is_ok() {
                    break context;
                }
            }
            assert!(begun.elapsed() < RUN_MAX, "no server");
            tokio::time::sleep(LOOK_EVERY).await;
        };
        for image in images {
            let sent = context.publish("frames.Lobby", image.into()).await.expect("sent");
            sent.await.expect("stored");
        }
    });
    format!("nats = {{ url = \"{url}\", stream = \"FRAMES\" }}")
}

fn broker_file(at: &Path, port: u16, in_flight: u32) -> std::path::PathBuf {
    let file = at.join("mosquitto.conf");
    let lines = format!(
        "user root\nlistener {port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 0\nmax_inflight_messages {in_flight}\n"
    );
    fs::write(&file, lines).expect("a file");
    file
}

/// Makes the daemon's session, which the broker then keeps the backlog in.
fn fill_mqtt(port: u16, images: impl Iterator<Item = Vec<u8>>) -> String {
    use mqtt_proto::v3::{Connect, Packet, Publish, Subscribe};
    use mqtt_proto::{Pid, QoS, QosPid, TopicFilter, TopicName};
    let begun = Instant::now();
    let mut client = MqttClient::connect(port, begun, Connect { clean_session: false, ..connect("bench") });
    let filter = TopicFilter::try_from("frames/+").expect("a filter");
    client.ask(&Subscribe::new(Pid::try_from(1).expect("not 0"), vec![(filter, QoS::Level1)]).into(), 5);
    client.say(&Packet::Disconnect);
    let mut client = MqttClient::connect(port, begun, connect("camera"));
    let (topic, mut sent) = (TopicName::try_from("frames/Lobby").expect("a topic"), 0);
    for image in images {
        sent = sent % 60_000 + 1;
        let id = QosPid::Level1(Pid::try_from(sent).expect("not 0"));
        client.ask(&Publish::new(id, topic.clone(), image.into()).into(), 4);
    }
    format!("mqtt = {{ url = \"mqtt://127.0.0.1:{port}\", topic = \"frames/+\", client_id = \"bench\" }}")
}

fn connect(client_id: &str) -> mqtt_proto::v3::Connect {
    mqtt_proto::v3::Connect::new(mqtt_proto::ClientId::from(std::sync::Arc::from(client_id)), 0)
}

struct MqttClient(TcpStream);

impl MqttClient {
    fn connect(port: u16, begun: Instant, connect: mqtt_proto::v3::Connect) -> Self {
        let stream = loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => break stream,
                Err(error) => assert!(begun.elapsed() < RUN_MAX, "{error}"),
            }
            sleep(LOOK_EVERY);
        };
        stream.set_nodelay(true).expect("a socket");
        let mut client = Self(stream);
        client.ask(&connect.into(), 4);
        client
    }

    fn say(&mut self, packet: &mqtt_proto::v3::Packet) {
        self.0.write_all(packet.encode().expect("a packet").as_ref()).expect("the broker reads");
    }

    /// Says it, and reads the answer of so many bytes.
    fn ask(&mut self, packet: &mqtt_proto::v3::Packet, answer: usize) {
        self.say(packet);
        self.0.read_exact(&mut vec![0; answer]).expect("the broker answers");
    }
}

fn configuration(at: &Path, url: &str, source: &str) -> std::path::PathBuf {
    fs::create_dir(at).expect("a directory");
    let secret = at.join("engine-password");
    fs::write(&secret, "simulated").expect("a password");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).expect("its mode");
    let here = at.display();
    let text = format!(
        r#"
        [engine]
        base_url = "{url}"
        username = "framegate"
        password_file = "engine-password"
        [dead_letter]
        directory = "{here}/dead-letter"
        [spool]
        directory = "{here}/spool"
        [admin]
        listen = "127.0.0.1:0"
        control = "{here}/control"
        [[detectors]]
        name = "Lobby"
        time_zone = "UTC"
        {source}
        "#
    );
    let file = at.join("framegate.toml");
    fs::write(&file, text).expect("a configuration");
    file
}

/// A child that ends with us.
struct Process {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Process {
    /// `None`: the program is not installed.
    fn start(command: &mut Command) -> Option<Self> {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
        let out = BufReader::new(child.stdout.take().expect("piped"));
        Some(Self { child, out })
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).expect("a line");
        line.trim_end().to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
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

/// What the daemon of this configuration has published.
fn published(config: &Path) -> f64 {
    let status = Command::new(env!("CARGO_BIN_EXE_framegate"))
        .args(["status", "--json", "--config"])
        .arg(config)
        .output()
        .expect("our own binary");
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).expect("JSON");
    status["detectors"][0]["counts"]["published"].as_f64().unwrap_or(0.0)
}
