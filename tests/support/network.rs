//! Faults of the network: a namespace of a test's own, a relay that resets connections, a name server that misbehaves, a box whose
//! wall clock is wrong. Traffic stays on loopback.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::sockopt::set_socket_linger;

use super::faults::{skipped, works};
use super::{PATIENCE, eventually};

/// Set in the process that runs a test again in namespaces of its own. Not `FRAMEGATE_…`: the daemon reads all of those.
const INSIDE: &str = "OWN_NETWORK_OF_A_FRAMEGATE_TEST";
/// A network, mounts and processes that end with a test.
const OWN: &[&str] = &["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"];
/// Between two looks at whether to stop.
const TICK: Duration = Duration::from_millis(20);
/// A name server's whole packet, bytes.
const PACKET_MAX: usize = 512;

// ---- namespaces

/// Runs this test once more, in a process with a network and mounts of its own: they end with it, whatever happens.
///
/// True in there: the test goes on. False outside, after it has passed in there, or was skipped.
#[track_caller]
pub fn own_network(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        assert!(works("ip", &["link", "set", "lo", "up", "mtu", "1500"]), "the namespace's own loopback");
        return true;
    }
    if !works("unshare", &[OWN, &["ip", "link", "set", "lo", "up"]].concat()) {
        skipped(test, "needs `unshare --net --mount --pid` (root) and `ip`");
        return false;
    }
    let this = std::env::current_exe().expect("a test knows its binary");
    let mut command = Command::new("unshare");
    command.args(OWN).arg(this).args(["--exact", test, "--nocapture"]).env(INSIDE, "1");
    let output = command.output().expect("it worked a moment ago");
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success() && said.contains("1 passed"), "in a network of its own:\n{said}");
    if let Some((_, why)) = said.lines().find_map(|line| line.strip_prefix("SKIPPED ")?.split_once(": ")) {
        skipped(test, why);
    }
    false
}

/// Loopback packets from and to a port vanish, as when the cable is pulled. In a test's own network only.
pub struct Silence;

impl Silence {
    pub fn of(port: u16) -> Self {
        let rules = format!(
            "table inet silence {{ chain input {{ type filter hook input priority 0; \
             tcp dport {port} drop; tcp sport {port} drop; }}; }}"
        );
        assert!(works("nft", &[&rules]), "nft {rules}");
        Self
    }

    /// Whether the kernel has what this needs. In a test's own network.
    pub fn works() -> bool {
        works("nft", &["table inet probe { chain c { type filter hook input priority 0; tcp dport 1 drop; }; }"])
            && works("nft", &["delete", "table", "inet", "probe"])
    }
}

impl Drop for Silence {
    fn drop(&mut self) {
        works("nft", &["delete", "table", "inet", "silence"]);
    }
}

/// What goes to a port goes no faster than so many bits a second. In a test's own network only.
pub struct Narrow;

impl Narrow {
    pub fn to(port: u16, rate: &str) -> Option<Self> {
        let port = port.to_string();
        let made = [
            "qdisc add dev lo root handle 1: htb default 10",
            "class add dev lo parent 1: classid 1:10 htb rate 10gbit",
            "class add dev lo parent 1: classid 1:20 htb rate 10gbit",
            // Three seconds' worth stand in line, as in front of many a modem.
            &format!("qdisc add dev lo parent 1:20 handle 20: tbf rate {rate} burst 3000 latency 3s"),
            &format!("filter add dev lo parent 1: protocol ip u32 match ip dport {port} 0xffff flowid 1:20"),
        ]
        .iter()
        .all(|line| works("tc", &line.split(' ').collect::<Vec<_>>()));
        made.then_some(Self)
    }
}

impl Drop for Narrow {
    fn drop(&mut self) {
        works("tc", &["qdisc", "del", "dev", "lo", "root"]);
    }
}

// ---- a relay

/// Stands in front of a server, byte for byte, and resets connections when told to.
pub struct Relay {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

struct Shared {
    server: SocketAddr,
    stop: AtomicBool,
    /// So many of the next connections are reset …
    reset: AtomicU64,
    /// … after so many bytes of the server's have been passed on.
    after: AtomicU64,
    was_reset: AtomicU64,
    /// What clients say is not passed on.
    muted: AtomicBool,
    /// Counts the times that all connections were cut.
    cuts: AtomicU64,
    recorded: Mutex<Vec<Arc<Recorded>>>,
}

/// What was said over one connection.
#[derive(Default)]
pub struct Recorded {
    pub by_client: Mutex<Vec<u8>>,
    pub by_server: Mutex<Vec<u8>>,
}

impl Relay {
    pub fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("it is bound");
        listener.set_nonblocking(true).expect("a socket");
        let shared = Arc::new(Shared {
            server,
            stop: AtomicBool::new(false),
            reset: AtomicU64::new(0),
            after: AtomicU64::new(0),
            was_reset: AtomicU64::new(0),
            muted: AtomicBool::new(false),
            cuts: AtomicU64::new(0),
            recorded: Mutex::default(),
        });
        let accepting = {
            let shared = shared.clone();
            std::thread::spawn(move || accept(&listener, &shared))
        };
        Self { address, shared, accepting: Some(accepting) }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The next `connections` get a reset: after the client has said something, and `bytes` of the server's answer.
    pub fn reset(&self, connections: u64, bytes: u64) {
        self.shared.after.store(bytes, Ordering::Relaxed);
        self.shared.reset.store(connections, Ordering::Relaxed);
    }

    /// What was said over each connection so far, in their order.
    pub fn recorded(&self) -> Vec<Arc<Recorded>> {
        self.shared.recorded.lock().expect("nobody panics with it").clone()
    }

    /// From now on nothing that clients say reaches the server; or it does again.
    pub fn mute(&self, muted: bool) {
        self.shared.muted.store(muted, Ordering::Relaxed);
    }

    /// Closes every connection of now.
    pub fn cut(&self) {
        self.shared.cuts.fetch_add(1, Ordering::Relaxed);
    }

    /// How many connections have been reset.
    pub fn was_reset(&self) -> u64 {
        self.shared.was_reset.load(Ordering::Relaxed)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(accepting) = self.accepting.take() {
            // A panic in there has been printed.
            drop(accepting.join());
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    while !shared.stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((client, _)) => {
                let shared = shared.clone();
                std::thread::spawn(move || drop(relay(&client, &shared)));
            }
            Err(_nobody) => std::thread::sleep(TICK),
        }
    }
}

fn relay(client: &TcpStream, shared: &Arc<Shared>) -> std::io::Result<()> {
    let mine = |left: u64| left.checked_sub(1);
    let reset = shared.reset.fetch_update(Ordering::Relaxed, Ordering::Relaxed, mine).is_ok();
    client.set_nonblocking(false)?;
    let server = TcpStream::connect(shared.server)?;
    let (recorded, never) = (Arc::<Recorded>::default(), AtomicBool::new(false));
    shared.recorded.lock().expect("nobody panics with it").push(recorded.clone());
    let upward = {
        let (client, server, shared) = (client.try_clone()?, server.try_clone()?, shared.clone());
        let recorded = recorded.clone();
        std::thread::spawn(move || {
            drop(pump(&client, &server, u64::MAX, &shared, (&recorded.by_client, &shared.muted)));
        })
    };
    if reset {
        // The client speaks first, in HTTP and in TLS: until the server answers, it has said something.
        server.peek(&mut [0])?;
        pump(&server, client, shared.after.load(Ordering::Relaxed), shared, (&recorded.by_server, &never))?;
        set_socket_linger(client, Some(Duration::ZERO))?;
        shared.was_reset.fetch_add(1, Ordering::Relaxed);
        server.shutdown(Shutdown::Both)?;
        // Ends the other thread, whose descriptor of this socket would keep it open.
        client.shutdown(Shutdown::Read)?;
        drop(upward.join());
        return Ok(());
    }
    pump(&server, client, u64::MAX, shared, (&recorded.by_server, &never))?;
    drop(upward.join());
    Ok(())
}

/// Passes bytes on until the end, or `most` of them.
fn pump(
    mut from: &TcpStream,
    mut to: &TcpStream,
    most: u64,
    shared: &Shared,
    (recorded, muted): (&Mutex<Vec<u8>>, &AtomicBool),
) -> std::io::Result<()> {
    let cuts = shared.cuts.load(Ordering::Relaxed);
    from.set_read_timeout(Some(TICK))?;
    let (mut buffer, mut left) = (vec![0; 16 << 10], most);
    while left > 0 && !shared.stop.load(Ordering::Relaxed) {
        if shared.cuts.load(Ordering::Relaxed) != cuts {
            from.shutdown(Shutdown::Both)?;
            return to.shutdown(Shutdown::Both);
        }
        let room = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        match from.read(&mut buffer[..room]) {
            Ok(0) => break,
            Ok(read) => {
                if !muted.load(Ordering::Relaxed) {
                    to.write_all(&buffer[..read])?;
                }
                recorded.lock().expect("nobody panics with it").extend_from_slice(&buffer[..read]);
                left -= read as u64;
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error),
        }
    }
    if left > 0 {
        to.shutdown(Shutdown::Write)?;
    }
    Ok(())
}

// ---- names

/// What the name server says to every question for an IPv4 address; there is no other kind of address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Says {
    Address(Ipv4Addr),
    NoSuchName,
    ServerFailure,
    /// Nothing at all.
    Nothing,
    /// The truth, after so long.
    Late(Ipv4Addr, Duration),
}

/// The only name server of a test's own network, on its port 53.
pub struct Names {
    says: Arc<Mutex<Says>>,
    asked: Arc<AtomicU64>,
}

impl Names {
    /// Starts it, and has everything in this mount namespace ask it.
    pub fn start(says: Says, directory: &Path) -> Self {
        let resolv = directory.join("resolv.conf");
        std::fs::write(&resolv, "nameserver 127.0.0.1\noptions timeout:2 attempts:2\n").expect("it can be written");
        let resolv = resolv.to_str().expect("a plain path");
        let target = std::fs::canonicalize("/etc/resolv.conf").expect("there is one");
        assert!(works("mount", &["--bind", resolv, target.to_str().expect("a plain path")]), "mount --bind");
        let socket = UdpSocket::bind("127.0.0.1:53").expect("the port is free in here");
        let names = Self { says: Arc::new(Mutex::new(says)), asked: Arc::default() };
        let (says, asked) = (names.says.clone(), names.asked.clone());
        // It lives as long as the process, which is this one test's.
        std::thread::spawn(move || {
            let mut packet = [0; PACKET_MAX];
            while let Ok((length, from)) = socket.recv_from(&mut packet) {
                asked.fetch_add(1, Ordering::Relaxed);
                let says = *says.lock().expect("says lock");
                let (socket, question) = (socket.try_clone().expect("a descriptor"), packet[..length].to_vec());
                std::thread::spawn(move || {
                    if let Says::Late(_, late) = says {
                        std::thread::sleep(late);
                    }
                    if let Some(answer) = answer(&question, says) {
                        drop(socket.send_to(&answer, from));
                    }
                });
            }
        });
        names
    }

    pub fn say(&self, says: Says) {
        *self.says.lock().expect("says lock") = says;
    }

    /// How many questions came.
    pub fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }
}

/// RFC 1035, section 4: the header, the question again, and an address where one was asked for.
fn answer(question: &[u8], says: Says) -> Option<Vec<u8>> {
    const A: [u8; 2] = [0, 1];
    const LIFE_SECONDS: [u8; 4] = [0, 0, 0, 1];
    let name = question.get(12..)?.iter().position(|byte| *byte == 0)?;
    let asked = question.get(12..12 + name + 5)?;
    let (code, address) = match says {
        Says::Nothing => return None,
        Says::NoSuchName => (3, None),
        Says::ServerFailure => (2, None),
        Says::Address(address) | Says::Late(address, _) => (0, Some(address)),
    };
    let address = address.filter(|_| asked[name + 1..name + 3] == A);
    let mut answer = question[..2].to_vec();
    answer.extend([0x81, 0x80 | code, 0, 1, 0, u8::from(address.is_some()), 0, 0, 0, 0]);
    answer.extend(asked);
    if let Some(address) = address {
        // The name is the question's, at offset 12; class IN.
        answer.extend([0xc0, 12, 0, 1, 0, 1]);
        answer.extend(LIFE_SECONDS);
        answer.extend([0, 4]);
        answer.extend(address.octets());
    }
    Some(answer)
}

// ---- clocks

/// A wall clock to preload into a daemon: wrong by as much as its file says at the moment. Monotonic clocks and file times stay true.
pub struct WallClock {
    file: PathBuf,
    library: PathBuf,
}

impl WallClock {
    /// `offset` as libfaketime writes it: `+5y`, `-3600`. `None` without the library.
    pub fn new(directory: &Path, offset: &str) -> Option<Self> {
        let library =
            std::fs::read_dir("/usr/lib").ok()?.flatten().map(|entry| entry.path()).find_map(|directory| {
                Some(directory.join("faketime/libfaketimeMT.so.1")).filter(|library| library.exists())
            })?;
        let clock = Self { file: directory.join("wall-clock"), library };
        clock.set(offset);
        Some(clock)
    }

    /// The clock jumps.
    pub fn set(&self, offset: &str) {
        let unfinished = self.file.with_extension("part");
        std::fs::write(&unfinished, offset).expect("it can be written");
        std::fs::rename(&unfinished, &self.file).expect("and renamed");
    }

    /// What has to be in the daemon's environment.
    pub fn environment(&self) -> [(&'static str, String); 5] {
        let path = |path: &Path| path.to_str().expect("a plain path").to_owned();
        [
            ("LD_PRELOAD", path(&self.library)),
            ("FAKETIME_TIMESTAMP_FILE", path(&self.file)),
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
            ("NO_FAKE_STAT", "1".to_owned()),
        ]
    }
}

// ---- servers

/// A server of somebody else's, in the foreground. Killed in the end.
pub struct Server {
    child: std::process::Child,
    pub address: SocketAddr,
}

impl Server {
    /// Starts it by `command`, which was told to listen there, and waits until it does. `None` if there is no such program.
    #[track_caller]
    pub fn start(mut command: Command, address: SocketAddr) -> Option<Self> {
        let child = command.stdin(std::process::Stdio::null()).spawn().ok()?;
        let mut server = Self { child, address };
        eventually("the server listens", PATIENCE, || {
            let ended = server.child.try_wait().expect("a child can be waited for");
            assert!(ended.is_none(), "the server ended: {ended:?}");
            TcpStream::connect(address).ok()
        });
        Some(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// A port that nobody listens on; in a test's own network nobody else takes it.
pub fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port")
}
