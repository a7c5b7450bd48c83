//! MQTT packets of both versions: what is said, and what is heard, cut out of the stream. Pure.
//!
//! The packets themselves are `mqtt_proto`'s, which no other file names. A PUBLISH is taken apart by hand as far as its
//! packet id, so that one that is too large or malformed can be acknowledged like every other: a broker sends again what
//! is not, for ever.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use bytes::{Buf as _, Bytes, BytesMut};
use mqtt_proto::{ClientId, Error, Pid, Protocol, QoS, TopicFilter, Username, v3, v5};

use crate::secret::Secret;

/// Bytes of a packet beside its payload that are expected at most: its topic and what is said beside the image.
const AROUND_BYTES_MAX: usize = 128 << 10;
/// Bytes from the beginning of a packet that is larger than allowed: enough to see what it was.
const CUT_BYTES: usize = 256 << 10;
/// Bytes that there is room for when the stream is read.
const READ_BYTES: usize = 64 << 10;
/// Bytes in which a packet's remaining length is written, at most.
const LENGTH_BYTES_MAX: usize = 4;
/// Seconds after which the broker may forget a session of MQTT 5: never.
const FOR_EVER: u32 = u32::MAX;
/// The only subscription's packet id.
const SUBSCRIPTION: u16 = 1;
/// The types of a PUBLISH and a PUBREL, the upper half of their first byte.
const PUBLISH: u8 = 3;
const PUBREL: u8 = 6;
/// Reason codes from here on mean failure.
const FAILURES: u8 = 0x80;
const CHECK_ACCOUNT: &str = "; check `username` and `password_file`";
const CHECK_CLIENT_ID: &str = "; choose another client_id";

/// What is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    /// MQTT 3.1.1.
    Three,
    /// MQTT 5.
    Five,
}

/// Who comes, and what for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Login<'a> {
    pub client_id: &'a str,
    pub username: Option<&'a str>,
    pub password: Option<&'a Secret>,
    /// Seconds.
    pub keep_alive: u16,
    /// So many messages may be on their way, in a session that stays; `None`: in one that does not.
    pub session: Option<u16>,
}

/// How the broker lets us in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Greeting {
    /// It knows our session.
    pub session_present: bool,
    /// It wants another keep-alive.
    pub keep_alive: Option<Duration>,
}

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Came {
    Publish(Publish),
    /// The subscription is there, with at most this `QoS`.
    Subscribed(u8),
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Publish {
    pub topic: String,
    /// The broker had kept it for whoever subscribes.
    pub retained: bool,
    /// The broker has sent it before, as far as it knows.
    pub again: bool,
    /// What it is acknowledged by; `None`: it was sent without a guarantee.
    pub id: Option<Id>,
    pub payload: Bytes,
    /// The user properties `detectorName`, `detectTimeUtc` and `ianaTimeZone`.
    pub beside: [Option<String>; 3],
    /// Bytes of the packet, where only its beginning was kept.
    pub cut_from: Option<usize>,
    /// Why what stands beside the payload cannot be read; the payload then begins with it.
    pub malformed: Option<String>,
}

/// What a message is acknowledged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Id {
    /// Its packet id, never 0.
    pub number: u16,
    /// `QoS` 2, which only an earlier subscription of our `client_id` can have asked for: taken like every other, but it has
    /// acknowledgements of its own.
    pub exactly_once: bool,
}

/// Whether this can be subscribed to.
pub(super) fn is_filter(text: &str) -> bool {
    TopicFilter::try_from(text).is_ok()
}

/// Whether a topic is one of a filter's.
pub(super) fn fits(filter: &str, topic: &str) -> bool {
    // Of a shared subscription, what is behind `$share/GROUP/`.
    let shared = filter.strip_prefix("$share/").and_then(|rest| rest.split_once('/'));
    let filter = shared.map_or(filter, |(_, filter)| filter);
    // What a broker says of itself is nothing that a wildcard stands for.
    if topic.starts_with('$') && filter.starts_with(['+', '#']) {
        return false;
    }
    let (mut filter, mut topic) = (filter.split('/'), topic.split('/'));
    loop {
        match (filter.next(), topic.next()) {
            (Some("#"), _) | (None, None) => return true,
            (Some("+"), Some(_)) => {}
            (Some(wanted), Some(level)) if wanted == level => {}
            (Some(_) | None, _) => return false,
        }
    }
}

// ---- what is said

pub(super) fn connect(version: Version, login: Login<'_>) -> anyhow::Result<Vec<u8>> {
    let client_id = ClientId::from(Arc::from(login.client_id));
    let username = login.username.map(|name| Username::from(Arc::from(name)));
    let password = login.password.map(|it| Bytes::copy_from_slice(it.expose().as_bytes()));
    let keep_alive = login.keep_alive;
    let session = login.session;
    match version {
        Version::Five => {
            let properties = v5::ConnectProperties {
                session_expiry_interval: session.map(|_| FOR_EVER),
                receive_max: session,
                ..v5::ConnectProperties::default()
            };
            let connect = v5::Connect::new(client_id, keep_alive);
            let connect = v5::Connect { clean_start: session.is_none(), username, password, properties, ..connect };
            five(&connect.into())
        }
        Version::Three => {
            let connect = v3::Connect::new(client_id, keep_alive);
            let clean_session = session.is_none();
            let connect = v3::Connect { protocol: Protocol::V311, clean_session, username, password, ..connect };
            three(&connect.into())
        }
    }
}

/// Asks for messages of a topic, with the one that is retained or without.
pub(super) fn subscribe(version: Version, topic: &str, retained: bool) -> anyhow::Result<Vec<u8>> {
    let filter = TopicFilter::try_from(topic).context("`topic`")?;
    let id = Pid::try_from(SUBSCRIPTION)?;
    let retain_handling =
        if retained { v5::RetainHandling::SendAtSubscribeIfNotExist } else { v5::RetainHandling::DoNotSend };
    // Not as published: so the flag says that a message was kept, and not that it is going to be.
    let options =
        v5::SubscriptionOptions { max_qos: QoS::Level1, no_local: false, retain_as_published: false, retain_handling };
    match version {
        Version::Five => five(&v5::Subscribe::new(id, vec![(filter, options)]).into()),
        Version::Three => three(&v3::Subscribe::new(id, vec![(filter, QoS::Level1)]).into()),
    }
}

pub(super) fn acknowledgement(version: Version, id: Id) -> anyhow::Result<Vec<u8>> {
    let number = Pid::try_from(id.number)?;
    match (version, id.exactly_once) {
        (Version::Five, false) => five(&v5::Packet::Puback(v5::Puback::new_success(number))),
        (Version::Five, true) => five(&v5::Packet::Pubrec(v5::Pubrec::new_success(number))),
        (Version::Three, false) => three(&v3::Packet::Puback(number)),
        (Version::Three, true) => three(&v3::Packet::Pubrec(number)),
    }
}

/// The answer to the broker's answer, where a message comes exactly once.
pub(super) fn completion(version: Version, number: u16) -> anyhow::Result<Vec<u8>> {
    let number = Pid::try_from(number)?;
    match version {
        Version::Five => five(&v5::Packet::Pubcomp(v5::Pubcomp::new_success(number))),
        Version::Three => three(&v3::Packet::Pubcomp(number)),
    }
}

pub(super) fn ping(version: Version) -> anyhow::Result<Vec<u8>> {
    match version {
        Version::Five => five(&v5::Packet::Pingreq),
        Version::Three => three(&v3::Packet::Pingreq),
    }
}

pub(super) fn farewell(version: Version) -> anyhow::Result<Vec<u8>> {
    match version {
        Version::Five => five(&v5::Packet::Disconnect(v5::Disconnect::new_normal())),
        Version::Three => three(&v3::Packet::Disconnect),
    }
}

fn five(packet: &v5::Packet) -> anyhow::Result<Vec<u8>> {
    let bytes = packet.encode().map_err(|error| anyhow!("a packet cannot be written: {error}"))?;
    Ok(bytes.as_ref().to_vec())
}

fn three(packet: &v3::Packet) -> anyhow::Result<Vec<u8>> {
    let bytes = packet.encode().map_err(|error| anyhow!("a packet cannot be written: {error}"))?;
    Ok(bytes.as_ref().to_vec())
}

// ---- what is heard

/// What the broker says to our login.
pub(super) fn greeting(version: Version, packet: &[u8]) -> anyhow::Result<Greeting> {
    let as_3 = match v3::Packet::decode(packet) {
        Ok(Some(v3::Packet::Connack(connack))) => Some(connack),
        // Of MQTT 5, or no MQTT at all.
        Ok(_) | Err(_) => None,
    };
    match version {
        Version::Three => {
            let connack = as_3.context("does not answer like an MQTT broker")?;
            if connack.code != v3::ConnectReturnCode::Accepted {
                bail!("the broker refuses us: {}{}", words(connack.code), remedy_of_3(connack.code));
            }
            Ok(Greeting { session_present: connack.session_present, keep_alive: None })
        }
        // A broker of 3.1.1 answers in its own way.
        Version::Five if as_3.is_some_and(|it| it.code == v3::ConnectReturnCode::UnacceptableProtocolVersion) => {
            bail!("the broker does not speak MQTT 5: write version = 3")
        }
        Version::Five => {
            let Ok(Some(v5::Packet::Connack(connack))) = v5::Packet::decode(packet) else {
                bail!("does not answer like an MQTT 5 broker; for one of 3.1.1 write version = 3");
            };
            let code = connack.reason_code;
            if code != v5::ConnectReasonCode::Success {
                let said = said(connack.properties.reason_string.as_deref());
                bail!("the broker refuses us: {}{said}{}", words(code), remedy_of_5(code));
            }
            let keep_alive = connack.properties.server_keep_alive.filter(|it| *it > 0);
            let keep_alive = keep_alive.map(|seconds| Duration::from_secs(seconds.into()));
            Ok(Greeting { session_present: connack.session_present, keep_alive })
        }
    }
}

fn came_of_5(packet: &[u8]) -> anyhow::Result<Option<Came>> {
    let packet = v5::Packet::decode(packet).map_err(|error| anyhow!("the broker's packet cannot be read: {error}"))?;
    match packet {
        Some(v5::Packet::Suback(suback)) => {
            let granted = suback.topics.first().copied().context("the broker grants nothing")?;
            subscribed(granted as u8, &words(granted)).map(Some)
        }
        Some(v5::Packet::Disconnect(end)) => {
            let said = said(end.properties.reason_string.as_deref());
            let taken_over = end.reason_code == v5::DisconnectReasonCode::SessionTakenOver;
            let remedy =
                if taken_over { "; somebody else connects with this client_id: every box needs its own" } else { "" };
            bail!("the broker ends the connection: {}{said}{remedy}", words(end.reason_code))
        }
        // Signs of life, and what is of no use here.
        Some(_) => Ok(None),
        None => bail!("the broker's packet ends too early"),
    }
}

fn came_of_3(packet: &[u8]) -> anyhow::Result<Option<Came>> {
    let packet = v3::Packet::decode(packet).map_err(|error| anyhow!("the broker's packet cannot be read: {error}"))?;
    match packet {
        Some(v3::Packet::Suback(suback)) => {
            let granted = match suback.topics.first().copied().context("the broker grants nothing")? {
                v3::SubscribeReturnCode::MaxLevel0 => 0,
                v3::SubscribeReturnCode::MaxLevel1 => 1,
                v3::SubscribeReturnCode::MaxLevel2 => 2,
                v3::SubscribeReturnCode::Failure => FAILURES,
            };
            subscribed(granted, "failure").map(Some)
        }
        Some(_) => Ok(None),
        None => bail!("the broker's packet ends too early"),
    }
}

fn subscribed(granted: u8, words: &str) -> anyhow::Result<Came> {
    if granted >= FAILURES {
        bail!("the broker refuses the subscription: {words}; check `topic`, and what this account may read");
    }
    Ok(Came::Subscribed(granted))
}

/// A reason code's name as people write it.
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

fn said(reason: Option<&str>) -> String {
    reason.map(|it| format!(" ({})", it.escape_debug())).unwrap_or_default()
}

#[expect(clippy::wildcard_enum_match_arm, reason = "a list of the standard's: most have no remedy here")]
fn remedy_of_5(code: v5::ConnectReasonCode) -> &'static str {
    match code {
        v5::ConnectReasonCode::BadUserNameOrPassword | v5::ConnectReasonCode::NotAuthorized => CHECK_ACCOUNT,
        v5::ConnectReasonCode::ClientIdentifierNotValid => CHECK_CLIENT_ID,
        v5::ConnectReasonCode::UnsupportedProtocolVersion => "; write version = 3",
        _ => "",
    }
}

fn remedy_of_3(code: v3::ConnectReturnCode) -> &'static str {
    match code {
        v3::ConnectReturnCode::BadUserNameOrPassword | v3::ConnectReturnCode::NotAuthorized => CHECK_ACCOUNT,
        v3::ConnectReturnCode::IdentifierRejected => CHECK_CLIENT_ID,
        v3::ConnectReturnCode::UnacceptableProtocolVersion => "; write version = 5",
        v3::ConnectReturnCode::ServerUnavailable | v3::ConnectReturnCode::Accepted => "",
    }
}

/// Cuts the stream into packets. Of one that is too large the beginning is kept, and the rest thrown away as it comes.
pub(super) struct Framing {
    inbound: BytesMut,
    packet_max: usize,
    /// A packet's beginning, and how much of it is still to be thrown away.
    cut: Option<(Packet, usize)>,
}

/// A packet, or the beginning of one.
#[derive(Debug)]
pub(super) struct Packet {
    pub bytes: Bytes,
    /// Bytes before those that its remaining length counts.
    head: usize,
    /// Bytes of the whole.
    whole: usize,
}

impl Framing {
    /// For messages whose payload has at most so many bytes.
    pub(super) fn new(payload_max: u64) -> Self {
        let packet_max = usize::try_from(payload_max).unwrap_or(usize::MAX).saturating_add(AROUND_BYTES_MAX);
        Self { inbound: BytesMut::new(), packet_max, cut: None }
    }

    /// Where to read to.
    pub(super) fn room(&mut self) -> &mut BytesMut {
        if self.inbound.capacity() - self.inbound.len() < READ_BYTES / 4 {
            self.inbound.reserve(READ_BYTES);
        }
        &mut self.inbound
    }

    /// The next packet, once all of it has come.
    pub(super) fn next(&mut self) -> anyhow::Result<Option<Packet>> {
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
        let kept = if whole <= self.packet_max { whole } else { CUT_BYTES.min(self.packet_max) };
        if self.inbound.len() < kept {
            self.inbound.reserve(kept - self.inbound.len());
            return Ok(None);
        }
        let packet = Packet { bytes: self.inbound.split_to(kept).freeze(), head, whole };
        if kept == whole {
            return Ok(Some(packet));
        }
        if !packet.is_publish() {
            bail!("the broker's packet is too large: {whole} bytes");
        }
        self.cut = Some((packet, whole - kept));
        self.next()
    }
}

/// Bytes of a packet's head, and of the whole packet; `None`: not enough of it has come.
fn lengths(bytes: &[u8]) -> anyhow::Result<Option<(usize, usize)>> {
    let mut remaining = 0;
    for (n, byte) in bytes.iter().skip(1).take(LENGTH_BYTES_MAX).enumerate() {
        remaining |= usize::from(byte & 0x7f) << (7 * n);
        if byte & 0x80 == 0 {
            let head = n + 2;
            return Ok(Some((head, head + remaining)));
        }
    }
    if bytes.len() > LENGTH_BYTES_MAX {
        bail!("does not speak MQTT");
    }
    Ok(None)
}

impl Packet {
    fn is_publish(&self) -> bool {
        self.bytes[0] >> 4 == PUBLISH
    }

    /// The packet id that the broker has heard the acknowledgement of, where a message comes exactly once.
    pub(super) fn released(&self) -> Option<u16> {
        (self.bytes[0] >> 4 == PUBREL).then(|| number(&mut self.bytes.slice(self.head..))).flatten()
    }

    /// What it means for us; `None`: nothing.
    pub(super) fn came(&self, version: Version) -> anyhow::Result<Option<Came>> {
        match version {
            _ if self.is_publish() => Ok(Some(Came::Publish(self.publish(version)?))),
            Version::Five => came_of_5(&self.bytes),
            Version::Three => came_of_3(&self.bytes),
        }
    }

    fn publish(&self, version: Version) -> anyhow::Result<Publish> {
        let flags = self.bytes[0];
        let mut rest = self.bytes.slice(self.head..);
        let length = number(&mut rest).map(usize::from).filter(|length| rest.len() >= *length);
        let topic = rest.split_to(length.context("the broker's message has no topic")?);
        let id = match (flags >> 1) & 3 {
            0 => None,
            qos @ (1 | 2) => {
                let number = number(&mut rest).filter(|number| *number != 0);
                let number = number.context("the broker's message has no packet id")?;
                Some(Id { number, exactly_once: qos == 2 })
            }
            _ => bail!("the broker's message has QoS 3, which there is not"),
        };
        let (mut beside, mut malformed) = (Default::default(), None);
        if version == Version::Five {
            match properties(&mut rest) {
                Ok(found) => beside = found,
                Err(error) => malformed = Some(format!("its properties cannot be read: {error}")),
            }
        }
        Ok(Publish {
            topic: String::from_utf8_lossy(&topic).into_owned(),
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

fn number(bytes: &mut Bytes) -> Option<u16> {
    (bytes.len() >= 2).then(|| bytes.get_u16())
}

/// Takes a message's properties off its bytes.
fn properties(bytes: &mut Bytes) -> Result<[Option<String>; 3], v5::ErrorV5> {
    let mut end = 0;
    let properties = v5::PublishProperties::decode(bytes, &mut end, v5::PacketType::Publish)?;
    if end > bytes.len() {
        return Err(Error::InvalidRemainingLength.into());
    }
    bytes.advance(end);
    Ok(["detectorName", "detectTimeUtc", "ianaTimeZone"].map(|name| {
        let found = properties.user_properties.iter().find(|it| &*it.name == name);
        found.map(|it| it.value.to_string())
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mqtt_proto::{QosPid, TopicName};
    use proptest::prelude::*;

    const VERSIONS: [Version; 2] = [Version::Five, Version::Three];
    const ID: Id = Id { number: 7, exactly_once: false };

    fn message(version: Version, payload: &[u8], property: Option<&str>) -> Vec<u8> {
        let topic = TopicName::try_from("a/b").unwrap();
        let id = QosPid::Level1(Pid::try_from(7).unwrap());
        let payload = Bytes::copy_from_slice(payload);
        match version {
            Version::Five => {
                let mut publish = v5::Publish::new(id, topic, payload);
                publish.dup = true;
                publish.properties.user_properties = property
                    .map(|value| v5::UserProperty { name: "detectorName".into(), value: value.into() })
                    .into_iter()
                    .collect();
                five(&publish.into()).unwrap()
            }
            Version::Three => {
                let mut publish = v3::Publish::new(id, topic, payload);
                publish.dup = true;
                three(&publish.into()).unwrap()
            }
        }
    }

    /// All that comes out of a stream that arrives in pieces of this size.
    fn heard(version: Version, payload_max: u64, stream: &[u8], piece: usize) -> Vec<Came> {
        let mut framing = Framing::new(payload_max);
        let mut all = Vec::new();
        for piece in stream.chunks(piece) {
            framing.room().extend_from_slice(piece);
            while let Some(packet) = framing.next().unwrap() {
                all.extend(packet.came(version).unwrap());
            }
        }
        assert!(framing.inbound.is_empty() && framing.cut.is_none(), "nothing is left");
        all
    }

    fn publish(payload: &[u8]) -> Publish {
        Publish {
            topic: "a/b".into(),
            retained: false,
            again: true,
            id: Some(ID),
            payload: Bytes::copy_from_slice(payload),
            beside: [None, None, None],
            cut_from: None,
            malformed: None,
        }
    }

    #[test]
    fn a_message_is_taken_apart_however_it_arrives() {
        for version in VERSIONS {
            let property = (version == Version::Five).then_some("Lobby");
            let mut stream = ping(version).unwrap();
            stream[0] = 0xd0;
            stream.extend(message(version, b"image", property));
            stream.extend(message(version, b"", None));
            for piece in [1, 2, 3, 7, stream.len()] {
                let first = Publish { beside: [property.map(str::to_owned), None, None], ..publish(b"image") };
                let expected = [Came::Publish(first), Came::Publish(publish(b""))];
                assert_eq!(heard(version, 100, &stream, piece), expected, "{version:?} {piece}");
            }
        }
    }

    #[test]
    fn b14_of_a_message_that_is_too_large_the_beginning_is_kept_and_the_next_one_is_whole() {
        for version in VERSIONS {
            let large = message(version, &vec![b'x'; 3 << 20], None);
            let stream = [&large[..], &message(version, b"next", None)].concat();
            for piece in [1000, 100_000, stream.len()] {
                let found = heard(version, 1 << 20, &stream, piece);
                let [Came::Publish(cut), Came::Publish(next)] = &found[..] else { panic!("{found:?}") };
                assert_eq!((cut.id, cut.cut_from, next), (Some(ID), Some(large.len()), &publish(b"next")));
                assert!(cut.payload.len() < CUT_BYTES && cut.payload.iter().all(|it| *it == b'x'));
            }
        }
    }

    #[test]
    fn b14_a_message_with_malformed_properties_can_be_acknowledged() {
        let sound = message(Version::Five, b"image", Some("Lobby"));
        // A property that there is not; one that ends behind the packet; a length that does.
        for (at, byte) in [(10, 0x7f), (12, 0xff), (9, 0x7f)] {
            let mut broken = sound.clone();
            broken[at] = byte;
            let found = heard(Version::Five, 100, &broken, 1000);
            let [Came::Publish(publish)] = &found[..] else { panic!("{found:?}") };
            assert!(publish.malformed.is_some(), "{publish:?}");
            assert_eq!((publish.id, publish.topic.as_str()), (Some(ID), "a/b"));
        }
    }

    #[test]
    fn b14_a_message_that_no_broker_may_send_ends_the_connection() {
        for version in VERSIONS {
            let sound = message(version, b"image", None);
            let with = |at: usize, byte| {
                let mut broken = sound.clone();
                broken[at] = byte;
                let mut framing = Framing::new(100);
                framing.room().extend_from_slice(&broken);
                framing.next().unwrap().unwrap().came(version).map_err(|error| error.to_string())
            };
            assert!(with(0, 0x36).is_err_and(|it| it.contains("QoS 3")), "{version:?}");
            // Nothing could be acknowledged by it, and it would come again for ever.
            assert!(with(8, 0).is_err_and(|it| it.contains("packet id")), "{version:?}");
        }
    }

    #[test]
    fn a_login_that_is_printed_shows_no_password() {
        let login = Login {
            client_id: "box",
            username: Some("edge"),
            password: Some(&Secret::new("canary-9")),
            keep_alive: 30,
            session: None,
        };
        let printed = format!("{login:?}");
        assert!(printed.contains("edge") && !printed.contains("canary"), "{printed}");
    }

    #[test]
    fn a_message_that_comes_exactly_once_has_acknowledgements_of_its_own() {
        for version in VERSIONS {
            let mut sound = message(version, b"image", None);
            sound[0] = 0x34;
            let [Came::Publish(publish)] = &heard(version, 100, &sound, 1000)[..] else { panic!("a message") };
            let id = publish.id.unwrap();
            assert_eq!(id, Id { exactly_once: true, ..ID });
            assert_eq!(acknowledgement(version, id).unwrap(), [0x50, 2, 0, 7]);
            let mut framing = Framing::new(100);
            for (bytes, number) in [(&[0x62, 2, 0, 7][..], Some(7)), (&[0x62, 0], None), (&[0x40, 2, 0, 7], None)] {
                framing.room().extend_from_slice(bytes);
                assert_eq!(framing.next().unwrap().unwrap().released(), number, "{bytes:?}");
            }
            assert_eq!(completion(version, 7).unwrap(), [0x70, 2, 0, 7]);
        }
    }

    #[test]
    fn an_answer_to_the_login_is_a_greeting_or_says_what_to_do() {
        let told = |version, bytes: &[u8]| match greeting(version, bytes) {
            Ok(greeting) => format!("{greeting:?}"),
            Err(error) => format!("{error:#}"),
        };
        for (version, bytes, said) in [
            (Version::Three, &[0x20, 2, 1, 0][..], "session_present: true"),
            (Version::Three, &[0x20, 2, 0, 4], "bad user name or password; check `username`"),
            (Version::Three, &[0x20, 2, 0, 1], "write version = 5"),
            (Version::Three, b"HTTP/1.1 400", "does not answer like an MQTT broker"),
            (Version::Five, &[0x20, 3, 0, 0, 0], "session_present: false"),
            (Version::Five, &[0x20, 6, 1, 0, 3, 0x13, 0, 9], "keep_alive: Some(9s)"),
            (Version::Five, &[0x20, 3, 0, 0x86, 0], "bad user name or password; check `username`"),
            (Version::Five, &[0x20, 3, 0, 0x84, 0], "write version = 3"),
            (Version::Five, &[0x20, 2, 0, 1], "write version = 3"),
        ] {
            assert!(told(version, bytes).contains(said), "{bytes:?}: {}", told(version, bytes));
        }
    }

    #[test]
    fn a_subscription_is_granted_or_the_broker_says_why_not() {
        let told = |version, bytes: &[u8]| {
            let mut framing = Framing::new(100);
            framing.room().extend_from_slice(bytes);
            let packet = framing.next().unwrap().unwrap();
            packet.came(version).map_err(|error| error.to_string())
        };
        assert_eq!(told(Version::Three, &[0x90, 3, 0, 1, 1]), Ok(Some(Came::Subscribed(1))));
        assert_eq!(told(Version::Five, &[0x90, 4, 0, 1, 0, 0]), Ok(Some(Came::Subscribed(0))));
        for (version, bytes, said) in [
            (Version::Three, &[0x90, 3, 0, 1, 0x80][..], "refuses the subscription"),
            (Version::Five, &[0x90, 4, 0, 1, 0, 0x87], "not authorized; check `topic`"),
            (Version::Five, &[0xe0, 1, 0x8e], "every box needs its own"),
            (Version::Five, &[0xe0, 1, 0x8b], "server shutting down"),
        ] {
            assert!(told(version, bytes).unwrap_err().contains(said), "{bytes:?}");
        }
    }

    #[test]
    fn a_topic_fits_its_filter() {
        for (filter, topic, does) in [
            ("a/b", "a/b", true),
            ("a/+", "a/b", true),
            ("a/+", "a/b/c", false),
            ("a/+/c", "a//c", true),
            ("a/#", "a", true),
            ("a/#", "a/b/c", true),
            ("#", "a/b", true),
            ("+", "a/b", false),
            ("a/b", "a", false),
            ("a", "a/b", false),
            ("$share/boxes/a/+", "a/b", true),
            ("$share/boxes/#", "a/b", true),
            ("#", "$SYS/broker/uptime", false),
            ("+/broker/uptime", "$SYS/broker/uptime", false),
            ("$share/boxes/#", "$SYS/broker/uptime", false),
            ("$SYS/#", "$SYS/broker/uptime", true),
            ("$SYS/+/uptime", "$SYS/broker/uptime", true),
            ("a/+", "a/$b", true),
        ] {
            assert_eq!(fits(filter, topic), does, "{filter} {topic}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_at_all_make_it_panic_or_wait_for_more_than_they_announce(bytes: Vec<u8>) {
            for version in VERSIONS {
                let mut framing = Framing::new(16);
                framing.room().extend_from_slice(&bytes);
                while let Ok(Some(packet)) = framing.next() {
                    drop((packet.came(version), packet.released()));
                }
                drop(greeting(version, &bytes));
            }
        }
    }
}
