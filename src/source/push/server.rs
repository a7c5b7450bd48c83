//! The push server's sockets and connections, each within its bounds: how many, how long, how much.
//!
//! Not here: what a request means (`call`).

use std::convert::Infallible;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::call;
use super::{Acceptor, Door, Listen, is_loopback};
use crate::secret::Secret;

/// Connections served at once; who comes beyond is answered 429.
const CONNECTIONS_MAX: usize = 512;
/// For the head of a request, and between two requests.
const HEAD_MAX: Duration = Duration::from_secs(30);
/// For a TLS handshake.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// Bytes that a connection may buffer.
const BUFFER_MAX: usize = 128 << 10;
/// After `accept` failed, which it does when descriptors run out; and between two tries to listen.
const PAUSE: Duration = Duration::from_millis(500);
/// After a stop: for requests that are under way.
const STOP_MAX: Duration = Duration::from_secs(3);
/// Who may connect to a Unix socket of ours: the daemon's user and group.
const SOCKET_MODE: u32 = 0o660;
/// What the socket is called in systemd's `FileDescriptorName=`.
const SYSTEMD_NAME: &str = "push";
/// Said without reading anything.
const TOO_MANY: &[u8] =
    b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

/// A socket that systemd handed over, if there is one. Call it once, at the start.
pub fn take_inherited() -> anyhow::Result<Inherited> {
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut given = listenfd::ListenFd::from_env();
    // Without names, as without `FileDescriptorName=`, the first one is meant.
    let at = names.split(':').position(|name| name == SYSTEMD_NAME).unwrap_or(0);
    if at >= given.len() {
        bail!(
            "push.listen is \"systemd\", which handed over no socket: enable framegate-push.socket, or name an address"
        );
    }
    if let Ok(Some(tcp)) = given.take_tcp_listener(at) {
        return Ok(Inherited::Tcp(tcp));
    }
    let unix = given.take_unix_listener(at).context("the socket of systemd cannot be used for push.listen")?;
    unix.map(Inherited::Unix).context("the socket of systemd was taken before")
}

/// A socket of systemd's.
#[derive(Debug)]
pub enum Inherited {
    /// An address and port.
    Tcp(std::net::TcpListener),
    /// A path.
    Unix(std::os::unix::net::UnixListener),
}

enum Socket {
    Tcp(TcpListener),
    Unix { socket: UnixListener, _file: Option<OwnFile> },
}

/// The file of a Unix socket that we made.
struct OwnFile {
    path: PathBuf,
    /// Device and inode, to remove no other's.
    file: (u64, u64),
}

impl Drop for OwnFile {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|it| (it.dev(), it.ino()) == self.file);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, path = ?self.path, "the push socket's file stays; the next daemon replaces it");
        }
    }
}

/// Listens and serves until stopped; tries again for ever where it cannot listen.
pub async fn serve(door: Arc<Door>, mut inherited: Option<Inherited>, stop: CancellationToken) {
    let mut said = String::new();
    tokio::select! {
        () = door.spool.tried() => {}
        () = stop.cancelled() => {}
    }
    while !stop.is_cancelled() {
        match open(&door, &mut inherited).await {
            Ok((socket, address)) => {
                door.listens(Ok(address));
                accept(&door, socket, &stop).await;
                return door.listens(Err("stopped".into()));
            }
            Err(error) => {
                let why = format!("{error:#}");
                if why != said {
                    tracing::error!("nothing can be pushed: {why}");
                }
                door.listens(Err(why.clone()));
                said = why;
            }
        }
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(PAUSE) => {}
        }
    }
}

async fn open(door: &Door, inherited: &mut Option<Inherited>) -> anyhow::Result<(Socket, String)> {
    let config = door.config.load_full();
    let listen = config.listen.as_deref().context("push.listen is missing")?;
    if config.has_tls() {
        door.read_certificate()?;
    }
    let socket = match Listen::parse(listen).map_err(|wrong| anyhow::anyhow!("push.listen = \"{listen}\" {wrong}"))? {
        Listen::Tcp(address) => {
            let socket = TcpListener::bind(address).await;
            Socket::Tcp(socket.with_context(|| format!("cannot listen on push.listen = \"{listen}\""))?)
        }
        Listen::Unix(path) => bind(&path).with_context(|| format!("cannot listen on push.listen = \"{listen}\""))?,
        Listen::Systemd => match inherited.take().context("systemd handed over no socket")? {
            Inherited::Tcp(socket) => {
                socket.set_nonblocking(true)?;
                Socket::Tcp(TcpListener::from_std(socket)?)
            }
            Inherited::Unix(socket) => {
                socket.set_nonblocking(true)?;
                Socket::Unix { socket: UnixListener::from_std(socket)?, _file: None }
            }
        },
    };
    if let Socket::Tcp(tcp) = &socket {
        let address = tcp.local_addr()?;
        let strangers = !is_loopback(&address);
        door.for_strangers.store(strangers, Ordering::Relaxed);
        if strangers && !config.is_guarded() {
            bail!(
                "{address} can be reached from the network: write push.username, password_file, tls_cert_file and tls_key_file, or a loopback address"
            );
        }
        tracing::info!(%address, tls = config.has_tls(), "frames can be pushed");
        return Ok((socket, address.to_string()));
    }
    tracing::info!(listen, "frames can be pushed");
    Ok((socket, listen.to_owned()))
}

/// A Unix socket; a dead daemon's is replaced.
fn bind(path: &Path) -> anyhow::Result<Socket> {
    let listener = match std::os::unix::net::UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let file = std::fs::symlink_metadata(path)?;
            if !file.file_type().is_socket() {
                bail!("it is there and is no socket; remove it or name another path");
            }
            match std::os::unix::net::UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
                Ok(_) | Err(_) => bail!("somebody else listens there"),
            }
            std::os::unix::net::UnixListener::bind(path)?
        }
        other => other?,
    };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE))?;
    listener.set_nonblocking(true)?;
    let file = std::fs::symlink_metadata(path)?;
    let own = OwnFile { path: path.to_owned(), file: (file.dev(), file.ino()) };
    Ok(Socket::Unix { socket: UnixListener::from_std(listener)?, _file: Some(own) })
}

enum Stream {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

impl Socket {
    /// Cancel safe.
    async fn accept(&self) -> io::Result<Stream> {
        match self {
            Socket::Tcp(socket) => socket.accept().await.map(|(stream, peer)| Stream::Tcp(stream, peer)),
            Socket::Unix { socket, .. } => socket.accept().await.map(|(stream, _)| Stream::Unix(stream)),
        }
    }
}

async fn accept(door: &Arc<Door>, socket: Socket, stop: &CancellationToken) {
    let mut connections = FuturesUnordered::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.next() => {}
            accepted = socket.accept() => match accepted {
                Ok(stream) if connections.len() >= CONNECTIONS_MAX => turn_away(stream),
                // A panic costs one connection.
                Ok(stream) => connections.push(AssertUnwindSafe(connection(door.clone(), stream, stop.clone())).catch_unwind()),
                Err(error) => {
                    tracing::warn!(%error, "a connection for a push could not be accepted");
                    // Those that are open go on.
                    let pause = tokio::time::sleep(PAUSE);
                    let mut pause = pin!(pause);
                    loop {
                        tokio::select! {
                            () = &mut pause => break,
                            Some(_) = connections.next() => {}
                        }
                    }
                }
            },
        }
    }
    drop(socket);
    let rest = async { while connections.next().await.is_some() {} };
    if tokio::time::timeout(STOP_MAX, rest).await.is_err() {
        tracing::debug!("pushes that did not come to an end are cut off; nobody was told that we have them");
    }
}

/// Without reading a byte: whoever floods us costs us nothing but this.
fn turn_away(stream: Stream) {
    let said = match stream {
        Stream::Tcp(stream, _) => stream.into_std().and_then(|mut it| it.write(TOO_MANY)),
        Stream::Unix(stream) => stream.into_std().and_then(|mut it| it.write(TOO_MANY)),
    };
    tracing::debug!(?said, "too many connections for pushes");
}

fn connection(door: Arc<Door>, stream: Stream, stop: CancellationToken) -> BoxFuture<'static, ()> {
    let acceptor = door.acceptor.load_full();
    match stream {
        Stream::Unix(stream) => speak(door, stream, "over the unix socket".into(), stop).boxed(),
        Stream::Tcp(stream, peer) => async move {
            // Answers are small and complete.
            drop(stream.set_nodelay(true));
            let peer = format!("from {}", peer.ip().to_canonical());
            let Some(acceptor) = acceptor else { return speak(door, stream, peer, stop).await };
            match tokio::time::timeout(HANDSHAKE_MAX, acceptor.0.accept(stream)).await {
                Ok(Ok(stream)) => speak(door, stream, peer, stop).await,
                Ok(Err(error)) => tracing::debug!(%error, peer, "a TLS handshake for a push failed"),
                Err(_) => tracing::debug!(peer, "a TLS handshake for a push was too slow"),
            }
        }
        .boxed(),
    }
}

async fn speak<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    door: Arc<Door>,
    stream: S,
    peer: String,
    stop: CancellationToken,
) {
    let service = service_fn(|request: Request<Incoming>| {
        let (door, peer) = (&door, &peer);
        async move { Ok::<_, Infallible>(call::answer(door, request, peer).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_MAX)
        .max_buf_size(BUFFER_MAX)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, peer, "a connection for pushes failed");
    }
}

impl Door {
    /// Takes the certificate as it is in its files now.
    pub(super) fn read_certificate(&self) -> anyhow::Result<()> {
        let config = self.config.load();
        let (Some(certificate), Some(key)) = (&config.tls_cert_file, &config.tls_key_file) else { return Ok(()) };
        let path = (self.files)(certificate);
        let chain = CertificateDer::pem_file_iter(&path)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .with_context(|| format!("push.tls_cert_file: cannot read {}", path.display()))?;
        let secret = Secret::read(&(self.files)(key)).context("push.tls_key_file")?;
        let key = PrivateKeyDer::from_pem_slice(secret.expose().as_bytes())
            .context("push.tls_key_file: holds no private key in PEM form")?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut tls = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .context("push.tls_cert_file and tls_key_file do not fit each other")?;
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        self.acceptor.store(Some(Arc::new(Acceptor(TlsAcceptor::from(Arc::new(tls))))));
        Ok(())
    }
}
