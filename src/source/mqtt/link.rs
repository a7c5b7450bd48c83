//! One connection to an MQTT broker: made, listened to, spoken into, with its signs of life. No decisions.
//!
//! Nothing in here waits for the spool: while nobody listens, what there is to say is said all the same.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use bytes::BytesMut;
use rustix::net::sockopt::set_tcp_user_timeout;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_rustls::TlsConnector;

use super::Config;
use super::wire::{self, Came, Framing, Greeting, Id, Login, Packet, Version};
use crate::secret::Secret;
use crate::source::Files;

/// Connecting, TLS and the login included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For the last acknowledgements and the farewell.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// What we are there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Purpose<'a> {
    pub client_id: &'a str,
    /// So many messages may be on their way, in a session that stays; `None`: in one that does not.
    pub session: Option<u16>,
    /// Bytes of the largest payload that is kept whole.
    pub payload_max: u64,
}

pub(super) struct Link {
    version: Version,
    reader: ReadHalf<Box<dyn Stream>>,
    writer: WriteHalf<Box<dyn Stream>>,
    framing: Framing,
    outbound: BytesMut,
    /// Something was written and may still be under way in here.
    unflushed: bool,
    keep_alive: Duration,
    /// When the broker was last heard. While nobody listens, that is not known.
    heard: Instant,
    listening: bool,
    pinged: Instant,
}

impl Link {
    /// Connects and logs in; reads the secret and the CA anew.
    pub(super) async fn connect(
        config: &Config,
        purpose: Purpose<'_>,
        files: &Files<'_>,
    ) -> anyhow::Result<(Self, Greeting)> {
        let password = config.password_file.as_deref().map(|file| Secret::read(&files(file))).transpose()?;
        let login = Login {
            client_id: purpose.client_id,
            username: config.username.as_deref(),
            password: password.as_ref(),
            // It was checked to fit.
            keep_alive: u16::try_from(config.keep_alive.as_secs()).unwrap_or(u16::MAX),
            session: purpose.session,
        };
        let version = config.version();
        let hello = wire::connect(version, login)?;
        let connecting = async {
            let (reader, writer) = tokio::io::split(open(config, files).await?);
            let now = Instant::now();
            let mut link = Self {
                version,
                reader,
                writer,
                framing: Framing::new(purpose.payload_max),
                outbound: BytesMut::from(hello.as_slice()),
                unflushed: false,
                keep_alive: config.keep_alive,
                heard: now,
                listening: true,
                pinged: now,
            };
            let packet = link.packet(true).await.context("no answer to the login")?;
            let greeting = wire::greeting(version, &packet.bytes)?;
            // It may want to hear of us more often; how long we wait for it is our own affair.
            link.keep_alive = config.keep_alive.min(greeting.keep_alive.unwrap_or(config.keep_alive));
            Ok((link, greeting))
        };
        let connected = timeout(CONNECT_TIMEOUT, connecting).await;
        connected.unwrap_or_else(|_| Err(anyhow!("no answer within {CONNECT_TIMEOUT:?}")))
    }

    /// Asks for messages of this topic.
    pub(super) fn subscribe(&mut self, topic: &str, retained: bool) -> anyhow::Result<()> {
        self.say(&wire::subscribe(self.version, topic, retained)?);
        Ok(())
    }

    /// Acknowledges a message, behind those that were acknowledged before.
    pub(super) fn acknowledge(&mut self, id: Id) -> anyhow::Result<()> {
        self.say(&wire::acknowledgement(self.version, id)?);
        Ok(())
    }

    fn say(&mut self, packet: &[u8]) {
        self.outbound.extend_from_slice(packet);
    }

    /// The next thing that comes, if we want it (`listen`), while what there is to say is said. Cancel safe.
    pub(super) async fn next(&mut self, listen: bool) -> anyhow::Result<Came> {
        loop {
            let packet = self.packet(listen).await?;
            if let Some(number) = packet.released() {
                self.say(&wire::completion(self.version, number)?);
            } else if let Some(came) = packet.came(self.version)? {
                return Ok(came);
            }
        }
    }

    /// The next packet. Cancel safe: what was read or is to be written stays here.
    async fn packet(&mut self, listen: bool) -> anyhow::Result<Packet> {
        if listen && !self.listening {
            self.heard = Instant::now();
        }
        self.listening = listen;
        loop {
            if listen && let Some(packet) = self.framing.next()? {
                return Ok(packet);
            }
            // Twice in the time that is agreed on, so that a broker that lives is heard in each.
            let ping_at = self.pinged + self.keep_alive / 2;
            let silent_at = self.heard + self.keep_alive;
            tokio::select! {
                read = self.reader.read_buf(self.framing.room()), if listen => {
                    if read.context("the connection broke")? == 0 {
                        bail!("the broker closed the connection");
                    }
                    self.heard = Instant::now();
                }
                written = write(&mut self.writer, &mut self.outbound, &mut self.unflushed),
                    if self.unflushed || !self.outbound.is_empty() => written.context("the connection broke")?,
                () = sleep_until(ping_at) => {
                    self.say(&wire::ping(self.version)?);
                    self.pinged = Instant::now();
                }
                () = sleep_until(silent_at), if listen => {
                    bail!("the broker has said nothing for {:?}", self.keep_alive);
                }
            }
        }
    }

    /// Says what there is to say, and farewell. The session stays.
    pub(super) async fn close(mut self) -> anyhow::Result<()> {
        self.say(&wire::farewell(self.version)?);
        let said = async {
            self.writer.write_all_buf(&mut self.outbound).await?;
            self.writer.shutdown().await?;
            // Until the broker has read it all and closes: a socket that is closed over unread bytes takes back what was
            // said.
            let mut rest = BytesMut::new();
            while self.reader.read_buf(&mut rest).await? > 0 {
                rest.clear();
            }
            io::Result::Ok(())
        };
        timeout(CLOSE_TIMEOUT, said).await.context("the broker does not take it")?.context("the connection broke")
    }
}

/// Writes some of what there is, or flushes it. Cancel safe.
async fn write(
    writer: &mut (impl AsyncWrite + Unpin),
    outbound: &mut BytesMut,
    unflushed: &mut bool,
) -> io::Result<()> {
    if outbound.is_empty() {
        writer.flush().await?;
        *unflushed = false;
    } else {
        writer.write_buf(outbound).await?;
        *unflushed = true;
    }
    Ok(())
}

async fn open(config: &Config, files: &Files<'_>) -> anyhow::Result<Box<dyn Stream>> {
    let address = config.address().context("`url` leads nowhere")?;
    let stream = TcpStream::connect((address.host.as_str(), address.port)).await.context("cannot connect")?;
    stream.set_nodelay(true)?;
    // What is said into a connection that is gone is noticed while nobody listens, too.
    set_tcp_user_timeout(&stream, u32::try_from(config.keep_alive.as_millis()).unwrap_or(u32::MAX))?;
    if !address.tls {
        return Ok(Box::new(stream));
    }
    let name = ServerName::try_from(address.host).context("`url` holds no host name")?;
    let connector = TlsConnector::from(Arc::new(tls(config, files)?));
    let stream = connector.connect(name, stream).await;
    Ok(Box::new(stream.context("TLS failed; check `ca_file` and the broker's certificate")?))
}

fn tls(config: &Config, files: &Files<'_>) -> anyhow::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    match &config.ca_file {
        Some(file) => {
            let path = files(file);
            let told = || format!("`ca_file` {}", path.display());
            for certificate in CertificateDer::pem_file_iter(&path).with_context(told)? {
                roots.add(certificate.with_context(told)?).with_context(told)?;
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tokio::net::TcpListener;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn b13_a_broker_that_wants_fewer_pings_is_not_waited_for_longer_than_we_want() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("mqtt://{}", listener.local_addr().unwrap());
        let config = Config { url, keep_alive: Duration::from_secs(1), ..Config::default() };
        let broker = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            // "Welcome, I want to hear of you every 600 seconds", and nothing more.
            stream.write_all(&[0x20, 6, 0, 0, 3, 0x13, 0x02, 0x58]).await.unwrap();
            stream
        };
        let purpose = Purpose { client_id: "box", session: None, payload_max: 0 };
        let files = |file: &Path| file.to_owned();
        let (connected, _open) = tokio::join!(Link::connect(&config, purpose, &files), broker);
        let (mut link, _) = connected.unwrap();
        let ended = timeout(PATIENCE, link.next(true)).await.expect("it is noticed").unwrap_err();
        assert!(ended.to_string().contains("has said nothing for 1s"), "{ended}");
    }
}
