//! One connection to an MQTT broker of either version: packets framed, taken apart and written, and its signs of life. No
//! decisions.
//!
//! The packets themselves are `mqtt_proto`'s. A PUBLISH is taken apart by hand as far as its packet id, so that one that is
//! too large or malformed can be acknowledged like every other: a broker sends again what is not.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use bytes::{Buf as _, Bytes, BytesMut};
use mqtt_proto::{ClientId, Error as WireError, Pid, Protocol, QoS, TopicFilter, Username, v3, v5};
use rustix::net::sockopt::set_tcp_user_timeout;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_rustls::TlsConnector;

use super::Config;
use crate::secret::Secret;

/// Connecting, TLS and the login included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For the last acknowledgements and the farewell.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of a packet beside its payload that are expected at most: topic, properties.
const AROUND_BYTES_MAX: usize = 128 << 10;
/// Bytes from the beginning of a packet that is larger than allowed: enough to see what it was.
const CUT_BYTES: usize = 256 << 10;
/// Bytes read at once at least.
const READ_BYTES: usize = 64 << 10;
/// A session of MQTT 5 that never ends.
const FOR_EVER: u32 = u32::MAX;
/// The only subscription's packet id.
const SUBSCRIBE_ID: u16 = 1;

/// Whether this can be subscribed to.
pub(super) fn is_filter(text: &str) -> bool {
    TopicFilter::try_from(text).is_ok()
}

/// Whether a topic is one of a filter's.
pub(super) fn fits(filter: &str, topic: &str) -> bool {
    // Of a shared subscription, what is behind `$share/GROUP/`.
    let shared = filter.strip_prefix("$share/").and_then(|rest| rest.split_once('/'));
    let (mut filter, mut topic) = (shared.map_or(filter, |(_, filter)| filter).split('/'), topic.split('/'));
    loop {
        match (filter.next(), topic.next()) {
            (Some("#"), _) | (None, None) => return true,
            (Some("+"), Some(_)) => {}
            (Some(wanted), Some(level)) if wanted == level => {}
            (Some(_) | None, _) => return false,
        }
    }
}

/// What came.
#[derive(Debug)]
pub(super) enum Came {
    Publish(Publish),
    /// The subscription is there; with the greatest `QoS` that the broker grants.
    Subscribed(u8),
}

/// A message.
#[derive(Debug)]
pub(super) struct Publish {
    pub topic: String,
    /// The broker keeps it for whoever subscribes.
    pub retained: bool,
    /// The broker has sent it before, as far as it knows.
    pub again: bool,
    /// What it is acknowledged by; `None`: it was sent without a guarantee.
    pub id: Option<u16>,
    pub payload: Bytes,
    /// The user properties `detectorName`, `detectTimeUtc` and `ianaTimeZone`.
    pub beside: [Option<String>; 3],
    /// Its bytes, where only the beginning of it was kept.
    pub cut_from: Option<usize>,
    /// Why what stands beside the payload cannot be read; the payload then begins with it.
    pub malformed: Option<String>,
}

/// What the broker said to our login.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Greeting {
    /// It knows our session.
    pub session_present: bool,
}

/// Who connects, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose<'a> {
    /// To take messages, with this session and so many of them on their way at once.
    Session { client_id: &'a str, receive_max: u16 },
    /// To see whether it can be done, beside a session of that name.
    Trial { client_id: &'a str },
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

pub(super) struct Link {
    reader: ReadHalf<Box<dyn Stream>>,
    writer: WriteHalf<Box<dyn Stream>>,
    framing: Framing,
    outbound: BytesMut,
    unflushed: bool,
    is_5: bool,
    keep_alive: Duration,
    /// When the broker last said anything; while nobody listens, that is not known.
    heard: Instant,
    listening: bool,
    pinged: Instant,
}

impl Link {
    /// Connects and logs in; reads the secret and the CA anew.
    pub(super) async fn connect(
        config: &Config,
        purpose: Purpose<'_>,
        payload_max: u64,
        files: &(dyn Fn(&Path) -> PathBuf + Send + Sync),
    ) -> anyhow::Result<(Self, Greeting)> {
        let connect = connect_packet(config, purpose, files)?;
        let connecting = async {
            let stream = open(config, files).await?;
            let (reader, writer) = tokio::io::split(stream);
            let packet_max = usize::try_from(payload_max).unwrap_or(usize::MAX).saturating_add(AROUND_BYTES_MAX);
            let mut link = Self {
                reader,
                writer,
                framing: Framing::new(packet_max),
                outbound: BytesMut::from(connect.as_slice()),
                unflushed: false,
                is_5: config.version == 5,
                keep_alive: config.keep_alive,
                heard: Instant::now(),
                listening: true,
                pinged: Instant::now(),
            };
            let packet = link.packet(true).await.context("the broker gives no answer to the login")?;
            let greeting = link.greeted(&packet.bytes)?;
            Ok((link, greeting))
        };
        let connected = timeout(CONNECT_TIMEOUT, connecting).await;
        connected.unwrap_or_else(|_| Err(anyhow!("no answer within {CONNECT_TIMEOUT:?}")))
    }

    fn greeted(&mut self, packet: &[u8]) -> anyhow::Result<Greeting> {
        if !self.is_5 {
            let Ok(Some(v3::Packet::Connack(connack))) = v3::Packet::decode(packet) else {
                bail!("does not answer like an MQTT broker");
            };
            return match connack.code {
                v3::ConnectReturnCode::Accepted => Ok(Greeting { session_present: connack.session_present }),
                refused => Err(anyhow!("the broker refuses us: {}{}", words(refused), remedy_v3(refused))),
            };
        }
        // A broker of 3.1.1 answers in its own way.
        if let Ok(Some(v3::Packet::Connack(connack))) = v3::Packet::decode(packet)
            && connack.code == v3::ConnectReturnCode::UnacceptableProtocolVersion
        {
            bail!("the broker does not speak MQTT 5: write version = 3");
        }
        let Ok(Some(v5::Packet::Connack(connack))) = v5::Packet::decode(packet) else {
            bail!("does not answer like an MQTT 5 broker; for one of 3.1.1 write version = 3");
        };
        if connack.reason_code != v5::ConnectReasonCode::Success {
            let said = connack.properties.reason_string.map(|it| format!(" ({it})")).unwrap_or_default();
            let refused = connack.reason_code;
            bail!("the broker refuses us: {}{said}{}", words(refused), remedy(refused));
        }
        if let Some(seconds) = connack.properties.server_keep_alive.filter(|it| *it > 0) {
            self.keep_alive = Duration::from_secs(seconds.into());
        }
        Ok(Greeting { session_present: connack.session_present })
    }

    /// Asks for messages of this topic.
    pub(super) fn subscribe(&mut self, topic: &str, retained: bool) -> anyhow::Result<()> {
        let filter = TopicFilter::try_from(topic).context("`topic`")?;
        let id = Pid::try_from(SUBSCRIBE_ID)?;
        let packet = if self.is_5 {
            let retain_handling =
                if retained { v5::RetainHandling::SendAtSubscribeIfNotExist } else { v5::RetainHandling::DoNotSend };
            // Not as published: then the flag says that a message was kept, and not that it will be.
            let options = v5::SubscriptionOptions {
                max_qos: QoS::Level1,
                no_local: false,
                retain_as_published: false,
                retain_handling,
            };
            encoded_5(&v5::Subscribe::new(id, vec![(filter, options)]).into())?
        } else {
            encoded_3(&v3::Subscribe::new(id, vec![(filter, QoS::Level1)]).into())?
        };
        self.outbound.extend_from_slice(&packet);
        Ok(())
    }

    /// Acknowledges a message, behind those that were acknowledged before.
    pub(super) fn acknowledge(&mut self, id: u16) -> anyhow::Result<()> {
        let id = Pid::try_from(id)?;
        let packet = if self.is_5 {
            encoded_5(&v5::Packet::Puback(v5::Puback::new_success(id)))?
        } else {
            encoded_3(&v3::Packet::Puback(id))?
        };
        self.outbound.extend_from_slice(&packet);
        Ok(())
    }

    /// The next thing that comes, if we want it (`listen`), while what there is to say is said. Cancel safe.
    pub(super) async fn next(&mut self, listen: bool) -> anyhow::Result<Came> {
        loop {
            let packet = self.packet(listen).await?;
            if let Some(came) = self.came(&packet)? {
                return Ok(came);
            }
        }
    }

    fn came(&self, packet: &Packet) -> anyhow::Result<Option<Came>> {
        if packet.is_publish() {
            return Ok(Some(Came::Publish(packet.publish(self.is_5)?)));
        }
        if self.is_5 { came_5(&packet.bytes) } else { came_3(&packet.bytes) }
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
            let buffer = self.framing.room();
            tokio::select! {
                read = self.reader.read_buf(buffer), if listen => {
                    if read.context("the connection broke")? == 0 {
                        bail!("the broker closed the connection");
                    }
                    self.heard = Instant::now();
                }
                written = write(&mut self.writer, &mut self.outbound, &mut self.unflushed),
                    if self.unflushed || !self.outbound.is_empty() => written.context("the connection broke")?,
                () = sleep_until(ping_at) => {
                    let ping = if self.is_5 { encoded_5(&v5::Packet::Pingreq) } else { encoded_3(&v3::Packet::Pingreq) };
                    self.outbound.extend_from_slice(&ping?);
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
        let farewell = if self.is_5 {
            encoded_5(&v5::Packet::Disconnect(v5::Disconnect::new_normal()))?
        } else {
            encoded_3(&v3::Packet::Disconnect)?
        };
        self.outbound.extend_from_slice(&farewell);
        let said = async {
            self.writer.write_all_buf(&mut self.outbound).await?;
            self.writer.shutdown().await
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

async fn open(config: &Config, files: &(dyn Fn(&Path) -> PathBuf + Send + Sync)) -> anyhow::Result<Box<dyn Stream>> {
    let address = config.address().context("`url` leads nowhere")?;
    let stream = TcpStream::connect((address.host.as_str(), address.port)).await.context("cannot connect")?;
    stream.set_nodelay(true)?;
    // What is said into a connection that is gone is noticed, too, while nobody listens.
    set_tcp_user_timeout(&stream, u32::try_from(config.keep_alive.as_millis()).unwrap_or(u32::MAX))?;
    if !address.tls {
        return Ok(Box::new(stream));
    }
    let name = ServerName::try_from(address.host).context("`url` holds no host name")?;
    let connector = TlsConnector::from(Arc::new(tls(config, files)?));
    let stream = connector.connect(name, stream).await;
    Ok(Box::new(stream.context("TLS failed; check `ca_file` and the broker's certificate")?))
}

fn tls(config: &Config, files: &(dyn Fn(&Path) -> PathBuf + Send + Sync)) -> anyhow::Result<ClientConfig> {
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

fn connect_packet(
    config: &Config,
    purpose: Purpose<'_>,
    files: &(dyn Fn(&Path) -> PathBuf + Send + Sync),
) -> anyhow::Result<Vec<u8>> {
    let (client_id, clean, receive_max) = match purpose {
        Purpose::Session { client_id, receive_max } => (client_id, false, Some(receive_max)),
        Purpose::Trial { client_id } => (client_id, true, None),
    };
    let client_id = ClientId::from(Arc::from(client_id));
    let username = config.username.as_deref().map(|name| Username::from(Arc::from(name)));
    let password = config.password_file.as_deref().map(|file| Secret::read(&files(file))).transpose()?;
    let password = password.map(|it| Bytes::copy_from_slice(it.expose().as_bytes()));
    // Validated to fit.
    let keep_alive = u16::try_from(config.keep_alive.as_secs()).unwrap_or(u16::MAX);
    if config.version == 5 {
        let properties = v5::ConnectProperties {
            session_expiry_interval: receive_max.map(|_| FOR_EVER),
            receive_max,
            ..v5::ConnectProperties::default()
        };
        let connect = v5::Connect {
            username,
            password,
            properties,
            clean_start: clean,
            ..v5::Connect::new(client_id, keep_alive)
        };
        return encoded_5(&connect.into());
    }
    let connect = v3::Connect {
        protocol: Protocol::V311,
        clean_session: clean,
        username,
        password,
        ..v3::Connect::new(client_id, keep_alive)
    };
    encoded_3(&connect.into())
}

fn encoded_5(packet: &v5::Packet) -> anyhow::Result<Vec<u8>> {
    Ok(packet.encode().map_err(wire)?.as_ref().to_vec())
}

fn encoded_3(packet: &v3::Packet) -> anyhow::Result<Vec<u8>> {
    Ok(packet.encode().map_err(wire)?.as_ref().to_vec())
}

#[expect(clippy::needless_pass_by_value, reason = "it is what map_err has")]
fn wire(error: WireError) -> anyhow::Error {
    anyhow!("a packet cannot be written: {error}")
}

fn came_5(packet: &[u8]) -> anyhow::Result<Option<Came>> {
    let packet = v5::Packet::decode(packet).map_err(|error| anyhow!("the broker's packet cannot be read: {error}"))?;
    match packet {
        Some(v5::Packet::Suback(suback)) => {
            let granted = suback.topics.first().copied().context("the broker grants nothing")?;
            subscribed(granted as u8, &words(granted)).map(Some)
        }
        Some(v5::Packet::Disconnect(end)) => {
            let said = end.properties.reason_string.map(|it| format!(" ({it})")).unwrap_or_default();
            let taken = "; another one connects with our client_id: every box needs its own";
            let taken = if end.reason_code == v5::DisconnectReasonCode::SessionTakenOver { taken } else { "" };
            bail!("the broker ends the connection: {}{said}{taken}", words(end.reason_code))
        }
        // Signs of life, and what is of no use here.
        Some(_) => Ok(None),
        None => bail!("the broker's packet ends too early"),
    }
}

fn came_3(packet: &[u8]) -> anyhow::Result<Option<Came>> {
    let packet = v3::Packet::decode(packet).map_err(|error| anyhow!("the broker's packet cannot be read: {error}"))?;
    match packet {
        Some(v3::Packet::Suback(suback)) => {
            let granted = suback.topics.first().copied().context("the broker grants nothing")?;
            let code = match granted {
                v3::SubscribeReturnCode::MaxLevel0 => 0,
                v3::SubscribeReturnCode::MaxLevel1 => 1,
                v3::SubscribeReturnCode::MaxLevel2 => 2,
                v3::SubscribeReturnCode::Failure => FAILURES,
            };
            subscribed(code, "not authorized").map(Some)
        }
        Some(_) => Ok(None),
        None => bail!("the broker's packet ends too early"),
    }
}

/// Reason codes from here on mean failure.
const FAILURES: u8 = 0x80;

fn subscribed(code: u8, words: &str) -> anyhow::Result<Came> {
    if code >= FAILURES {
        bail!("the broker refuses the subscription: {words}; check `topic`, and what it permits this account");
    }
    Ok(Came::Subscribed(code))
}

/// `BadUserNameOrPassword` as people write it.
fn words(code: impl std::fmt::Debug) -> String {
    let mut words = String::new();
    for letter in format!("{code:?}").chars() {
        if letter.is_uppercase() && !words.is_empty() {
            words.push(' ');
        }
        words.extend(letter.to_lowercase());
    }
    words
}

const CHECK_ACCOUNT: &str = "; check `username` and `password_file`";
const CHECK_CLIENT_ID: &str = "; choose another client_id";

#[expect(clippy::wildcard_enum_match_arm, reason = "the broker's list: most have no remedy here")]
fn remedy(code: v5::ConnectReasonCode) -> &'static str {
    match code {
        v5::ConnectReasonCode::BadUserNameOrPassword | v5::ConnectReasonCode::NotAuthorized => CHECK_ACCOUNT,
        v5::ConnectReasonCode::ClientIdentifierNotValid => CHECK_CLIENT_ID,
        v5::ConnectReasonCode::UnsupportedProtocolVersion => ": write version = 3",
        _ => "",
    }
}

fn remedy_v3(code: v3::ConnectReturnCode) -> &'static str {
    match code {
        v3::ConnectReturnCode::BadUserNameOrPassword | v3::ConnectReturnCode::NotAuthorized => CHECK_ACCOUNT,
        v3::ConnectReturnCode::IdentifierRejected => CHECK_CLIENT_ID,
        v3::ConnectReturnCode::UnacceptableProtocolVersion => "; write version = 5",
        v3::ConnectReturnCode::ServerUnavailable | v3::ConnectReturnCode::Accepted => "",
    }
}

/// Cuts the stream into packets. Of one that is too large the beginning is kept and the rest thrown away as it comes.
struct Framing {
    inbound: BytesMut,
    packet_max: usize,
    /// A packet's beginning, and how much of it is still to be thrown away.
    cut: Option<(Packet, usize)>,
}

/// A packet, or the beginning of one.
#[derive(Debug)]
struct Packet {
    bytes: Bytes,
    /// Bytes before the remaining length counts.
    head: usize,
    /// Bytes of the whole.
    whole: usize,
}

impl Framing {
    fn new(packet_max: usize) -> Self {
        Self { inbound: BytesMut::new(), packet_max, cut: None }
    }

    /// Where to read to.
    fn room(&mut self) -> &mut BytesMut {
        if self.inbound.capacity() - self.inbound.len() < READ_BYTES / 4 {
            self.inbound.reserve(READ_BYTES);
        }
        &mut self.inbound
    }

    fn next(&mut self) -> anyhow::Result<Option<Packet>> {
        if let Some((packet, left)) = self.cut.take() {
            let come = left.min(self.inbound.len());
            self.inbound.advance(come);
            if left > come {
                self.cut = Some((packet, left - come));
                return Ok(None);
            }
            return Ok(Some(packet));
        }
        let Some((head, whole)) = lengths(&self.inbound)? else { return Ok(None) };
        let wanted = if whole <= self.packet_max { whole } else { CUT_BYTES.min(self.packet_max) };
        if self.inbound.len() < wanted {
            self.inbound.reserve(wanted - self.inbound.len());
            return Ok(None);
        }
        let packet = Packet { bytes: self.inbound.split_to(wanted).freeze(), head, whole };
        if wanted == whole {
            return Ok(Some(packet));
        }
        if !packet.is_publish() {
            bail!("the broker's packet is too large: {whole} bytes");
        }
        self.cut = Some((packet, whole - wanted));
        self.next()
    }
}

/// Bytes of a packet's head, and of the whole packet; `None`: not enough of it is there.
fn lengths(bytes: &[u8]) -> anyhow::Result<Option<(usize, usize)>> {
    let mut remaining = 0;
    for (n, byte) in bytes.iter().skip(1).take(4).enumerate() {
        remaining |= usize::from(byte & 0x7f) << (7 * n);
        if byte & 0x80 == 0 {
            return Ok(Some((n + 2, n + 2 + remaining)));
        }
    }
    if bytes.len() > 4 {
        bail!("does not speak MQTT");
    }
    Ok(None)
}

impl Packet {
    fn is_publish(&self) -> bool {
        self.bytes[0] >> 4 == 3
    }

    fn publish(&self, is_5: bool) -> anyhow::Result<Publish> {
        let flags = self.bytes[0];
        let mut rest = self.bytes.slice(self.head..);
        let mut number = || (rest.len() >= 2).then(|| rest.get_u16());
        let topic = number().map(usize::from);
        let topic = topic.filter(|length| rest.len() >= *length).map(|length| rest.split_to(length));
        let topic = topic.context("the broker's message has no topic")?;
        let id = if flags & 0b110 == 0 {
            None
        } else if rest.len() >= 2 {
            Some(rest.get_u16())
        } else {
            bail!("the broker's message has no packet id");
        };
        let (mut beside, mut malformed) = (Default::default(), None);
        if is_5 {
            let mut end = 0;
            match v5::PublishProperties::decode(&rest, &mut end, v5::PacketType::Publish) {
                Ok(properties) => {
                    rest.advance(end);
                    beside = known(&properties);
                }
                Err(error) => malformed = Some(format!("its properties cannot be read: {error}")),
            }
        }
        Ok(Publish {
            topic: match String::from_utf8_lossy(&topic) {
                Cow::Borrowed(topic) => topic.to_owned(),
                Cow::Owned(escaped) => escaped,
            },
            retained: flags & 1 != 0,
            again: flags & 0b1000 != 0,
            id,
            payload: rest,
            beside,
            cut_from: (self.whole > self.bytes.len()).then_some(self.whole),
            malformed,
        })
    }
}

fn known(properties: &v5::PublishProperties) -> [Option<String>; 3] {
    ["detectorName", "detectTimeUtc", "ianaTimeZone"].map(|name| {
        let found = properties.user_properties.iter().find(|it| &*it.name == name);
        found.map(|it| it.value.to_string())
    })
}
