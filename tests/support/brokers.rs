//! Real brokers from Debian on free ports, with their data in temporary directories, driven by their own clients.
//!
//! `None` where the server is not installed; the test then says so with `skipped` and returns.

use std::future::IntoFuture as _;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::consumer::{self, pull};
use async_nats::jetstream::context::GetStreamErrorKind;
use async_nats::jetstream::{self, Context, stream};
use async_nats::{ConnectOptions, HeaderMap};
use mqtt_proto::{ClientId, Pid as PacketId, QosPid, TopicName, v5};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::{PATIENCE, eventually};

/// Ports that are tried one after the other: somebody else may be quicker to take one.
const PORTS_TRIED: usize = 20;

/// How long the test's own client waits for an answer, before it asks again or gives up.
const ANSWER: Duration = Duration::from_secs(5);

/// Builds the command for a data directory and a port.
type Recipe = Box<dyn Fn(&Path, u16) -> Command>;

/// A server as a child process, which can be killed and started again on its port and its data.
pub struct Server {
    dir: TempDir,
    port: u16,
    child: Child,
    recipe: Recipe,
}

impl Server {
    fn start(recipe: Recipe) -> Option<Self> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for _ in 0..PORTS_TRIED {
            let port = free_port();
            let mut child = spawn(&recipe, dir.path(), port)?;
            if listens(&mut child, port) {
                return Some(Self { dir, port, child, recipe });
            }
        }
        panic!("no server could be started");
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        self.child.kill().expect("the server runs");
        self.child.wait().expect("a child can be waited for");
    }

    /// Starts it again where it was.
    #[track_caller]
    pub fn again(&mut self) {
        self.child = spawn(&self.recipe, self.dir.path(), self.port).expect("it was there before");
        assert!(listens(&mut self.child, self.port), "the server starts again");
    }

    /// Stops answering, as a connection whose other end is gone without a word; or goes on.
    pub fn freeze(&self, frozen: bool) {
        let signal = if frozen { Signal::STOP } else { Signal::CONT };
        kill_process(Pid::from_child(&self.child), signal).expect("the server runs");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// A port that nobody listens on now.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("a free port").port()
}

fn spawn(recipe: &Recipe, dir: &Path, port: u16) -> Option<Child> {
    recipe(dir, port).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok()
}

fn listens(child: &mut Child, port: u16) -> bool {
    eventually("the server listens, or has ended", PATIENCE, || {
        let ended = child.try_wait().expect("a child can be waited for").is_some();
        (ended || TcpStream::connect(("127.0.0.1", port)).is_ok()).then_some(!ended)
    })
}

/// `redis-server`, whose every write is on the disk before it is answered.
pub struct Redis(pub Server);

impl Redis {
    pub fn start() -> Option<Self> {
        Self::with(&[])
    }

    /// With further arguments, such as `--requirepass x`.
    pub fn with(arguments: &[&str]) -> Option<Self> {
        let arguments: Vec<String> = arguments.iter().map(|it| (*it).to_owned()).collect();
        let recipe = move |dir: &Path, port: u16| {
            let mut command = Command::new("redis-server");
            command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--dir"]).arg(dir);
            command.args(["--appendonly", "yes", "--appendfsync", "always", "--save", ""]).args(&arguments);
            command
        };
        Server::start(Box::new(recipe)).map(Self)
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.0.port())
    }

    /// What `redis-cli` answers; an error is an answer, too.
    #[track_caller]
    pub fn cli(&self, arguments: &[&str]) -> String {
        self.cli_with(arguments, b"")
    }

    /// [`Redis::cli`] with `input` as the command's last argument, whatever bytes it has.
    #[track_caller]
    pub fn cli_with(&self, arguments: &[&str], input: &[u8]) -> String {
        let mut command = Command::new("redis-cli");
        command.args(["-p", &self.0.port().to_string()]);
        if !input.is_empty() {
            command.arg("-x");
        }
        let mut child = command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("redis-cli comes with redis-server");
        child.stdin.take().expect("piped").write_all(input).expect("redis-cli reads");
        let output = child.wait_with_output().expect("redis-cli ends");
        String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
    }

    /// Adds an entry to the stream `frames`, by `redis-cli`: the image is its last field.
    #[track_caller]
    pub fn add(&self, fields: &[&str], image: &[u8]) -> String {
        let id = self.cli_with(&[&["XADD", "frames", "*"], fields, &["image"]].concat(), image);
        assert!(id.contains('-'), "{id}");
        id
    }

    /// How many entries of `frames` wait for an acknowledgement in the group `framegate`.
    #[track_caller]
    pub fn pending(&self) -> u64 {
        let answer = self.cli(&["XPENDING", "frames", "framegate"]);
        answer.lines().next().and_then(|it| it.parse().ok()).unwrap_or_else(|| panic!("{answer}"))
    }

    /// Entries that were delivered to nobody yet; `None` while the server cannot say.
    pub fn lag(&self) -> Option<u64> {
        let answer = self.cli(&["XINFO", "GROUPS", "frames"]);
        let mut lines = answer.lines();
        lines.find(|it| *it == "lag")?;
        lines.next()?.parse().ok()
    }

    /// Waits until every entry of `frames` is delivered and acknowledged.
    #[track_caller]
    pub fn until_settled(&self) {
        eventually("nothing is pending and nothing waits", PATIENCE, || {
            let groups = self.cli(&["XINFO", "GROUPS", "frames"]);
            (groups.contains("framegate") && self.pending() == 0 && self.lag().unwrap_or(0) == 0).then_some(())
        });
    }
}

/// `nats-server` with `JetStream`, and a client of the test's own.
pub struct Nats {
    pub server: Server,
    runtime: Runtime,
    account: Option<(String, String)>,
}

impl Nats {
    pub fn start() -> Option<Self> {
        Self::with("", None)
    }

    /// With further lines of its configuration; `account` is the test's own.
    pub fn with(lines: &str, account: Option<(&str, &str)>) -> Option<Self> {
        let lines = lines.to_owned();
        let recipe = move |dir: &Path, port: u16| {
            let file = dir.join("nats.conf");
            let store = dir.display();
            let config = format!("listen: \"127.0.0.1:{port}\"\njetstream {{ store_dir: \"{store}\" }}\n{lines}\n");
            std::fs::write(&file, config).expect("the configuration can be written");
            let mut command = Command::new("nats-server");
            command.arg("-c").arg(file);
            command
        };
        let server = Server::start(Box::new(recipe))?;
        let account = account.map(|(user, password)| (user.to_owned(), password.to_owned()));
        let nats = Self { server, runtime: Runtime::new().expect("a runtime"), account };
        // Listening comes before JetStream.
        eventually("JetStream answers", PATIENCE, || {
            let found = nats.run(async |it| it.get_stream("NONE").await.map(drop));
            found.is_err_and(|error| matches!(error.kind(), GetStreamErrorKind::JetStream(_))).then_some(())
        });
        Some(nats)
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.server.port())
    }

    /// Does something with a client that is connected for it.
    pub fn run<T>(&self, work: impl AsyncFnOnce(Context) -> T) -> T {
        self.runtime.block_on(async {
            let options = match &self.account {
                Some((user, password)) => ConnectOptions::with_user_and_password(user.clone(), password.clone()),
                None => ConnectOptions::new(),
            };
            let client = options.connect(self.url()).await.expect("a client");
            let mut context = jetstream::new(client);
            context.set_timeout(ANSWER);
            work(context).await
        })
    }

    /// Creates the stream `FRAMES` of `frames.>`.
    #[track_caller]
    pub fn make_stream(&self) {
        let config =
            stream::Config { name: "FRAMES".into(), subjects: vec!["frames.>".into()], ..stream::Config::default() };
        self.run(async |it| it.create_stream(config).await.map(drop)).expect("the stream can be created");
    }

    /// Creates a consumer of it.
    #[track_caller]
    pub fn make_consumer(&self, config: pull::Config) {
        let made = self.run(async |it| it.create_consumer_on_stream(config, "FRAMES").await.map(drop));
        made.expect("the consumer can be created");
    }

    /// Publishes to the stream, each message confirmed.
    #[track_caller]
    pub fn publish(&self, messages: Vec<(String, HeaderMap, Vec<u8>)>) {
        self.run(async |it| {
            let mut confirmed = Vec::new();
            for (subject, headers, payload) in messages {
                let sent = it.publish_with_headers(subject, headers, payload.into()).await.expect("it can be sent");
                confirmed.push(sent.into_future());
            }
            for confirmation in confirmed {
                confirmation.await.expect("the stream has it");
            }
        });
    }

    /// What the consumer `framegate` says; `None` where there is none.
    pub fn consumer(&self) -> Option<consumer::Info> {
        self.run(async |it| it.get_stream_no_info("FRAMES").await.ok()?.consumer_info("framegate").await.ok())
    }

    /// Waits until every message is delivered and acknowledged.
    #[track_caller]
    pub fn until_settled(&self) {
        eventually("nothing is pending and nothing waits", PATIENCE, || {
            self.consumer().filter(|it| it.num_ack_pending == 0 && it.num_pending == 0).map(drop)
        });
    }
}

/// `mosquitto`, whose every change is on the disk before it is answered.
pub struct Mosquitto(pub Server);

/// What it writes its sessions and messages to.
const MOSQUITTO_DB: &str = "mosquitto.db";
const MOSQUITTO_LOG: &str = "mosquitto.log";
/// Messages of the test's own client that are on their way at once: no more than mosquitto takes.
const MQTT_WINDOW: usize = 10;

impl Mosquitto {
    pub fn start() -> Option<Self> {
        // A change is written before the next one; where nothing is killed, that only costs time.
        Self::with("allow_anonymous true\nautosave_on_changes true\nautosave_interval 1")
    }

    /// With these lines of its configuration, about accounts for example.
    pub fn with(lines: &str) -> Option<Self> {
        let lines = lines.to_owned();
        let recipe = move |dir: &Path, port: u16| {
            let file = dir.join("mosquitto.conf");
            // Started as root, it would become another user, who may not write here.
            let config = format!(
                "user root\nlistener {port} 127.0.0.1\npersistence true\npersistence_location {0}/\nsys_interval 1\nlog_dest file {0}/{MOSQUITTO_LOG}\nlog_type all\n{lines}\n",
                dir.display()
            );
            std::fs::write(&file, config).expect("the configuration can be written");
            let mut command = Command::new("mosquitto");
            command.arg("-c").arg(file);
            command
        };
        Server::start(Box::new(recipe)).map(Self)
    }

    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.0.port())
    }

    /// Ends without having written anything down: its sessions are lost.
    pub fn forget(&mut self) {
        self.0.kill();
        std::fs::remove_file(self.0.dir().join(MOSQUITTO_DB)).ok();
    }

    /// `mosquitto_pub`: a message of `QoS` 1, unless `arguments` say otherwise.
    #[track_caller]
    pub fn publish(&self, topic: &str, arguments: &[&str], payload: &[u8]) {
        let mut command = Command::new("mosquitto_pub");
        command.args(["-p", &self.0.port().to_string(), "-q", "1", "-t", topic, "-s"]).args(arguments);
        let mut child = command.stdin(Stdio::piped()).spawn().expect("mosquitto_pub comes with mosquitto-clients");
        child.stdin.take().expect("piped").write_all(payload).expect("mosquitto_pub reads");
        assert!(child.wait().expect("mosquitto_pub ends").success());
    }

    /// `mosquitto_sub` until it has what `arguments` ask for.
    pub fn subscribe(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new("mosquitto_sub");
        command.args(["-p", &self.0.port().to_string()]).args(arguments);
        command.output().expect("mosquitto_sub comes with mosquitto-clients")
    }

    /// What the broker says of itself below `$SYS/broker/`.
    #[track_caller]
    pub fn says(&self, of: &str) -> u64 {
        let topic = format!("$SYS/broker/{of}");
        let output = self.subscribe(&["-t", &topic, "-C", "1", "-W", "10"]);
        String::from_utf8_lossy(&output.stdout).trim().parse().unwrap_or_else(|_| panic!("{topic}: {output:?}"))
    }

    /// Waits until the broker has heard everything that a client had to say before it went.
    #[track_caller]
    pub fn until_gone(&self, client_id: &str) {
        eventually(&format!("{client_id} is gone"), PATIENCE, || {
            let log = std::fs::read_to_string(self.0.dir().join(MOSQUITTO_LOG)).ok()?;
            let last = log.lines().rev().find(|line| line.contains(client_id))?;
            (last.contains("disconnected") || last.contains("closed its connection")).then_some(())
        });
    }

    pub fn client(&self) -> MqttClient {
        MqttClient::connect(self.0.port(), "test")
    }
}

/// The test's own publisher, of MQTT 5.
pub struct MqttClient {
    stream: TcpStream,
    next: u16,
    on_their_way: usize,
}

impl MqttClient {
    pub fn connect(port: u16, client_id: &str) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("the broker listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let mut client = Self { stream, next: 1, on_their_way: 0 };
        client.say(&v5::Connect::new(ClientId::from(Arc::from(client_id)), 0).into());
        assert_eq!(client.hear()[0] >> 4, 2, "the broker lets us in");
        client
    }

    /// Publishes with `QoS` 1; what is on its way is confirmed at the latest by [`MqttClient::confirmed`].
    pub fn publish(&mut self, topic: &str, properties: &[(&str, &str)], payload: Vec<u8>) {
        while self.on_their_way >= MQTT_WINDOW {
            self.confirm();
        }
        let name = TopicName::try_from(topic).expect("a topic");
        let pid = PacketId::try_from(self.next).expect("never 0");
        self.next = self.next.checked_add(1).unwrap_or(1);
        let mut publish = v5::Publish::new(QosPid::Level1(pid), name, payload.into());
        publish.properties.user_properties = properties
            .iter()
            .map(|(name, value)| v5::UserProperty { name: Arc::from(*name), value: Arc::from(*value) })
            .collect();
        self.say(&publish.into());
        self.on_their_way += 1;
    }

    /// Waits until the broker has everything.
    pub fn confirmed(&mut self) {
        while self.on_their_way > 0 {
            self.confirm();
        }
    }

    fn confirm(&mut self) {
        assert_eq!(self.hear()[0] >> 4, 4, "a PUBACK");
        self.on_their_way -= 1;
    }

    fn say(&mut self, packet: &v5::Packet) {
        let bytes = packet.encode().expect("a packet");
        self.stream.write_all(bytes.as_ref()).expect("the broker reads");
    }

    /// The next packet, which is small.
    fn hear(&mut self) -> Vec<u8> {
        let mut packet = vec![0; 2];
        self.stream.read_exact(&mut packet).expect("the broker answers");
        assert!(packet[1] < 0x80, "a short one");
        packet.resize(2 + usize::from(packet[1]), 0);
        self.stream.read_exact(&mut packet[2..]).expect("the broker answers");
        packet
    }
}

/// The packets in what was said over one connection: the first byte of each, and its bytes behind the head.
pub fn mqtt_packets(mut bytes: &[u8]) -> Vec<(u8, &[u8])> {
    let mut packets = Vec::new();
    while let Some((first, rest)) = bytes.split_first() {
        let (mut length, mut at) = (0, 0);
        while let Some(byte) = rest.get(at) {
            length |= usize::from(byte & 0x7f) << (7 * at);
            at += 1;
            if byte & 0x80 == 0 {
                break;
            }
        }
        // The last one may have been cut off.
        let Some(body) = rest.get(at..at + length) else { break };
        packets.push((*first, body));
        bytes = &rest[at + length..];
    }
    packets
}
