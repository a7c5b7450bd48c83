//! The control socket: how the commands ask the running daemon. One line of JSON each way, for root and the daemon's own user.
//!
//! Not here: what a request does (the daemon's handler), and what everybody may read (that is `admin`).

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::source::spool::Which;

/// Bytes of a request's line.
const REQUEST_MAX: u64 = 64 << 10;
/// Bytes of an answer's line: the status of a thousand detectors and more.
const ANSWER_MAX: u64 = 16 << 20;
/// For the request to come, for the answer to be taken; and what the asking side waits for both.
const EXCHANGE_MAX: Duration = Duration::from_secs(30);
/// Requests answered at once; the others wait in the kernel.
const CONNECTIONS_MAX: usize = 8;
/// After `accept` failed, which it does when descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Apply the configuration as it is now on disk.
    Reload,
    /// What `/status` shows.
    Status,
    /// Dead letters were removed or retried: count those that are left.
    CountDeadLetters,
    /// Remove frames from the spool for good.
    PurgeSpool {
        /// Which.
        which: Which,
    },
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Whether it was done.
    pub ok: bool,
    /// For people.
    pub message: String,
    /// For programs.
    #[serde(default)]
    pub data: Value,
}

impl Answer {
    /// It was not done, and why.
    pub fn refused(message: impl Into<String>) -> Self {
        Self { ok: false, message: message.into(), data: Value::Null }
    }

    /// It was done.
    pub fn done(message: impl Into<String>, data: Value) -> Self {
        Self { ok: true, message: message.into(), data }
    }
}

/// Does what is asked. It runs to its end even if the asker has gone: a reload is never left halfway.
pub type Handler = Arc<dyn Fn(Request) -> BoxFuture<'static, Answer> + Send + Sync>;

/// The bound control socket. Its file is removed when this is dropped.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode, to remove no other daemon's.
    file: (u64, u64),
}

impl Drop for Socket {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.file);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, path = ?self.path, "the control socket's file stays; the next daemon replaces it");
        }
    }
}

/// Binds the socket; one that a dead daemon left is replaced. Call it inside the runtime.
pub fn bind(path: &Path) -> anyhow::Result<Socket> {
    let listener = match std::os::unix::net::UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path)?;
            std::os::unix::net::UnixListener::bind(path)
        }
        other => other,
    };
    let listener =
        listener.with_context(|| format!("admin.control: cannot listen on {}: {}", path.display(), remedy(path)))?;
    (|| -> io::Result<Socket> {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let file = std::fs::symlink_metadata(path)?;
        Ok(Socket { listener: UnixListener::from_std(listener)?, path: path.into(), file: (file.dev(), file.ino()) })
    })()
    .with_context(|| format!("admin.control: cannot use {}", path.display()))
}

fn remove_stale(path: &Path) -> anyhow::Result<()> {
    let shown = path.display();
    let file = std::fs::symlink_metadata(path).with_context(|| format!("admin.control: {shown}"))?;
    if !file.file_type().is_socket() {
        bail!("admin.control: {shown} is there and is no socket; remove it or name another path");
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)
            .with_context(|| format!("admin.control: cannot replace the socket {shown} that a dead daemon left")),
        Ok(_) => bail!(
            "admin.control: a daemon is already running and answers on {shown}; stop it first, or give this one its own admin.control"
        ),
        Err(error) => Err(error).with_context(|| format!("admin.control: cannot tell whether a daemon uses {shown}")),
    }
}

fn remedy(path: &Path) -> String {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() && !parent.is_dir() => format!(
            "the directory {} is missing; create it for the daemon's user (under systemd: RuntimeDirectory=framegate), or set admin.control",
            parent.display()
        ),
        _ => "the daemon's user must be allowed to create files there".into(),
    }
}

/// Answers until stopped.
pub async fn serve(socket: Socket, handler: Handler, stop: CancellationToken) {
    let mut connections = FuturesUnordered::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(_) = connections.next() => {}
            accepted = socket.listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                Ok((stream, _)) => {
                    let handler = handler.clone();
                    let connection = async move {
                        if let Err(error) = connection(stream, &handler).await {
                            tracing::debug!(%error, "a control connection failed");
                        }
                    };
                    // A panic costs one answer.
                    connections.push(AssertUnwindSafe(connection).catch_unwind());
                }
                Err(error) => {
                    tracing::debug!(%error, "the control socket could not accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
}

async fn connection(mut stream: UnixStream, handler: &Handler) -> io::Result<()> {
    // The file's mode says the same, but not between its creation and the change of its mode.
    let uid = stream.peer_cred()?.uid();
    let answer = if uid == 0 || uid == rustix::process::geteuid().as_raw() {
        match timeout(EXCHANGE_MAX, read(&mut stream)).await?? {
            Ok(request) => handler(request).await,
            Err(refused) => refused,
        }
    } else {
        Answer::refused("only root and the daemon's own user may ask")
    };
    let mut line = serde_json::to_vec(&answer)?;
    line.push(b'\n');
    timeout(EXCHANGE_MAX, stream.write_all(&line)).await?
}

async fn read(stream: &mut UnixStream) -> io::Result<Result<Request, Answer>> {
    let mut line = Vec::new();
    BufReader::new(stream.take(REQUEST_MAX)).read_until(b'\n', &mut line).await?;
    if line.pop() != Some(b'\n') {
        return Ok(Err(Answer::refused(format!("a request is one line of at most {REQUEST_MAX} bytes"))));
    }
    Ok(serde_json::from_slice(&line).map_err(|error| Answer::refused(format!("this is no request: {error}"))))
}

/// Asks the running daemon and waits for its answer. Blocking: for commands.
pub fn ask(path: &Path, request: &Request) -> anyhow::Result<Answer> {
    let shown = path.display();
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    let mut stream =
        std::os::unix::net::UnixStream::connect(path).with_context(|| Unreachable(path.into()).to_string())?;
    stream.set_read_timeout(Some(EXCHANGE_MAX))?;
    stream.set_write_timeout(Some(EXCHANGE_MAX))?;
    let mut answer = Vec::new();
    stream
        .write_all(&line)
        .and_then(|()| stream.take(ANSWER_MAX).read_to_end(&mut answer))
        .with_context(|| format!("the daemon on {shown} did not answer within {} s", EXCHANGE_MAX.as_secs()))?;
    serde_json::from_slice(&answer).with_context(|| format!("the answer of the daemon on {shown} was not understood"))
}

struct Unreachable(PathBuf);

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "no daemon can be asked on {}: is it running (systemctl status framegate), and are you root or its user?",
            self.0.display()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echo() -> Handler {
        Arc::new(|request| {
            Box::pin(async move { Answer::done(format!("{request:?}"), serde_json::to_value(request).unwrap()) })
        })
    }

    /// Runs a server on a socket in a directory of its own while `client` runs on a thread that may block.
    async fn with_server<T: Send + 'static>(client: impl FnOnce(&Path) -> T + Send + 'static) -> T {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let socket = bind(&path).unwrap();
        let stop = CancellationToken::new();
        let asked = path.clone();
        let client = async {
            let output = tokio::task::spawn_blocking(move || client(&asked)).await.unwrap();
            stop.cancel();
            output
        };
        let ((), output) = tokio::join!(serve(socket, echo(), stop.clone()), client);
        assert!(!path.exists(), "the file is removed");
        output
    }

    fn send(path: &Path, bytes: &[u8]) -> Answer {
        let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
        // The server may have answered and closed before everything was written.
        drop(stream.write_all(bytes));
        drop(stream.shutdown(std::net::Shutdown::Write));
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    #[tokio::test]
    async fn a_request_gets_its_answer() {
        with_server(|path| {
            assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
            for request in [Request::Reload, Request::Status, Request::CountDeadLetters] {
                let answer = ask(path, &request).unwrap();
                assert!(answer.ok);
                assert_eq!(serde_json::from_value::<Request>(answer.data).unwrap(), request);
            }
            assert_eq!(send(path, b"{\"command\":\"status\"}\n").data["command"], "status");
        })
        .await;
    }

    #[tokio::test]
    async fn nonsense_is_refused_with_a_reason() {
        with_server(|path| {
            for bad in [&b"hello\n"[..], b"{\"command\":\"format-disk\"}\n", b"", b"{\"command\":\"status\"}"] {
                let answer = send(path, bad);
                assert!(!answer.ok && answer.message.contains("request"), "{answer:?}");
            }
            let long = vec![b' '; usize::try_from(REQUEST_MAX).unwrap()];
            assert!(send(path, &long).message.contains("at most 65536 bytes"));
        })
        .await;
    }

    #[tokio::test]
    async fn what_was_asked_is_done_even_if_the_asker_leaves() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let socket = bind(&path).unwrap();
        let (asked, done, stop) = (CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
        let (began, ended) = (asked.clone(), done.clone());
        let (go, gone) = tokio::sync::watch::channel(false);
        let handler: Handler = Arc::new(move |_| {
            let (began, ended, mut gone) = (began.clone(), ended.clone(), gone.clone());
            Box::pin(async move {
                began.cancel();
                gone.wait_for(|gone| *gone).await.unwrap();
                ended.cancel();
                Answer::done("", Value::Null)
            })
        });
        let client = async {
            let mut stream = UnixStream::connect(&path).await.unwrap();
            stream.write_all(b"{\"command\":\"reload\"}\n").await.unwrap();
            asked.cancelled().await;
            drop(stream);
            go.send_replace(true);
            done.cancelled().await;
            stop.cancel();
        };
        tokio::join!(serve(socket, handler, stop.clone()), client);
    }

    #[tokio::test]
    async fn a_dead_daemons_socket_is_replaced_and_a_living_ones_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "left behind");
        let living = bind(&path).unwrap();
        let error = format!("{:#}", bind(&path).unwrap_err());
        assert!(error.contains("already running"), "{error}");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        drop(living);
        let error = format!("{:#}", bind(&path).unwrap_err());
        assert!(error.contains("no socket"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious", "what is not ours is never removed");
    }

    #[tokio::test]
    async fn a_missing_directory_or_daemon_says_what_to_do() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("missing").join("control.sock");
        let error = format!("{:#}", bind(&path).unwrap_err());
        assert!(error.contains("RuntimeDirectory=framegate"), "{error}");
        let error = format!("{:#}", ask(&path, &Request::Reload).unwrap_err());
        assert!(error.contains("is it running"), "{error}");
    }
}
