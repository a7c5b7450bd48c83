//! One connection to NATS servers: the consumer's facts, pulls, and what is said of messages. No decisions.
//!
//! Pulls are requested by hand on one subscription: so their bounds follow the room there is, and silence is noticed.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use async_nats::jetstream::consumer::{self, AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::context::{ConsumerInfoError, ConsumerInfoErrorKind, GetStreamErrorKind};
use async_nats::jetstream::stream::Stream;
use async_nats::jetstream::{self, ErrorCode};
use async_nats::subject::Subject;
use async_nats::{Client, ConnectOptions, Event, Message, StatusCode, Subscriber};
use futures_util::StreamExt as _;
use jiff::Timestamp;
use serde_json::json;
use tokio::sync::mpsc::{Receiver, channel};
use tokio::time::Instant;

use super::Config;
use crate::secret::Secret;
use crate::source::Files;

/// Connecting, TLS and the login included, to one of the servers.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// An answer or confirmation that takes longer means a connection that is broken and does not say so.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two signs of life that are asked of the server.
const PING_EVERY: Duration = Duration::from_secs(5);
/// How long one pull waits at the server. Its end is the server's sign of life, and a stop waits for it: servers have been
/// seen to deliver what was given back into a pull whose box had gone.
const PULL_EXPIRES: Duration = Duration::from_secs(1);
/// A pull that has not ended for so long after that counts as stalled.
const PULL_STALLED: Duration = Duration::from_secs(4);
/// A consumer that is made here delivers a message again after so long without a report.
const ACK_WAIT: Duration = Duration::from_secs(30);
/// A consumer that is made here lets so many messages be in hand, of all boxes together.
const ACK_PENDING_MAX: i64 = 10_000;
/// Events of the connection that may wait to be looked at; more are of no use.
const EVENTS_MAX: usize = 16;

/// What is said of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// It is in hand.
    Progress,
    /// It is settled.
    Done,
    /// It is settled and must never be delivered again.
    Dead,
    /// It shall be delivered again after this time.
    Back(Duration),
}

impl Reply {
    fn payload(self) -> String {
        match self {
            Reply::Progress => "+WPI".into(),
            Reply::Done => "+ACK".into(),
            Reply::Dead => "+TERM".into(),
            Reply::Back(Duration::ZERO) => "-NAK".into(),
            Reply::Back(delay) => format!("-NAK {}", json!({ "delay": delay.as_nanos() })),
        }
    }
}

/// What the consumer says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    /// After so long without a report a message is delivered again.
    pub deadline: Duration,
    /// After so many deliveries it is not delivered any more.
    pub gives_up_after: Option<i64>,
}

/// What came through the subscription.
pub(super) enum Came {
    Message(Message),
    /// Something about the pull.
    Nothing,
}

/// Where a message stands in its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub sequence: u64,
    /// How often it has been delivered, this time included.
    pub delivered: u64,
    /// When the server got it.
    pub published: Option<Timestamp>,
}

struct Pull {
    left: usize,
    stalls_at: Instant,
}

pub(super) struct Link {
    client: Client,
    /// `None` once nothing more is taken.
    deliveries: Option<Subscriber>,
    inbox: String,
    next: String,
    pull: Option<Pull>,
    ends: Receiver<String>,
    said: Said,
}

/// The last error that a server said beside its answers: it names a missing permission.
type Said = Arc<Mutex<Option<String>>>;

impl Link {
    /// Connects to one of the servers; reads the secrets and the CA anew.
    pub(super) async fn connect(config: &Config, files: &Files<'_>) -> anyhow::Result<Self> {
        let (end, ends) = channel(EVENTS_MAX);
        let said = Said::default();
        let heard = said.clone();
        let options = options(config, files)?.event_callback(move |event| {
            let note = match &event {
                Event::Disconnected | Event::Closed => Some(event.to_string()),
                Event::ServerError(_) | Event::ClientError(_) => {
                    *heard.lock().unwrap_or_else(PoisonError::into_inner) = Some(event.to_string());
                    None
                }
                Event::Connected | Event::LameDuckMode | Event::Draining | Event::SlowConsumer(_) => None,
            };
            // Full: the first one is enough.
            let _lost = note.map(|note| end.try_send(note));
            std::future::ready(())
        });
        let servers = config.servers().context("`url`")?;
        let client = tokio::time::timeout(CONNECT_TIMEOUT * 2, options.connect(servers))
            .await
            .map_err(|_| anyhow!("no answer within {:?}", CONNECT_TIMEOUT * 2))?
            .map_err(|error| refused(&error))?;
        let inbox = client.new_inbox();
        let deliveries = client.subscribe(inbox.clone()).await?;
        let next = format!("$JS.API.CONSUMER.MSG.NEXT.{}.{}", config.stream, config.consumer);
        Ok(Self { client, deliveries: Some(deliveries), inbox, next, pull: None, ends, said })
    }

    /// Looks the consumer up, and makes it where it is missing; a new one begins at `first`.
    pub(super) async fn consumer(&mut self, config: &Config, first: Option<u64>) -> anyhow::Result<Facts> {
        let made = async {
            let stream = self.stream(config).await?;
            match look_up(&stream, config).await? {
                Some(info) => Ok(info),
                None => make(&stream, config, first).await,
            }
        };
        let info = made.await.map_err(|error| self.with_what_was_said(error))?;
        facts(&info.config).map_err(|why| anyhow!("consumer {}: {why}", config.consumer))
    }

    /// Whether the consumer is there; that its stream is not is an error.
    pub(super) async fn has_consumer(&self, config: &Config) -> anyhow::Result<bool> {
        let looked = async { anyhow::Ok(look_up(&self.stream(config).await?, config).await?.is_some()) };
        looked.await.map_err(|error| self.with_what_was_said(error))
    }

    fn with_what_was_said(&self, error: anyhow::Error) -> anyhow::Error {
        match self.said.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(said) => anyhow!("{error:#} ({said})"),
            None => error,
        }
    }

    async fn stream(&self, config: &Config) -> anyhow::Result<Stream> {
        let mut context = jetstream::new(self.client.clone());
        context.set_timeout(RESPONSE_TIMEOUT);
        let found = context.get_stream(&config.stream).await;
        found.map_err(|error| {
            let code =
                if let GetStreamErrorKind::JetStream(said) = error.kind() { Some(said.error_code()) } else { None };
            if code == Some(ErrorCode::STREAM_NOT_FOUND) {
                anyhow!("there is no stream {}: create it (`nats stream add`), it is looked for again", config.stream)
            } else {
                anyhow!("the stream cannot be looked up, JetStream may be switched off or not permitted: {error}")
            }
        })
    }

    /// Whether a pull is under way.
    pub(super) fn pulling(&self) -> bool {
        self.pull.is_some()
    }

    /// When the pull under way counts as stalled.
    pub(super) fn stalls_at(&self) -> Option<Instant> {
        self.pull.as_ref().map(|pull| pull.stalls_at)
    }

    /// Asks for up to `messages`, and `bytes` if the first one does not have more.
    pub(super) async fn pull(&mut self, messages: usize, bytes: u64) -> anyhow::Result<()> {
        // A limit that no message fits would keep the largest ones at the server for ever.
        let bytes = bytes.max(self.client.max_payload() as u64);
        let request = json!({
            "batch": messages,
            "max_bytes": bytes,
            "expires": nanos(PULL_EXPIRES),
        });
        self.client.publish_with_reply(self.next.clone(), self.inbox.clone(), request.to_string().into()).await?;
        self.pull = Some(Pull { left: messages, stalls_at: stall() });
        Ok(())
    }

    /// The next thing that comes; an error when the connection ends. Cancel safe.
    pub(super) async fn next(&mut self) -> anyhow::Result<Came> {
        let deliveries = &mut self.deliveries;
        let next = async {
            match deliveries {
                Some(deliveries) => deliveries.next().await,
                None => std::future::pending().await,
            }
        };
        let message = tokio::select! {
            biased;
            why = self.ends.recv() => {
                let said = self.said.lock().unwrap_or_else(PoisonError::into_inner).take();
                let said = said.map(|said| format!(" ({said})")).unwrap_or_default();
                bail!("the connection ended: {}{said}", why.unwrap_or_default());
            }
            message = next => message.context("the subscription ended")?,
        };
        let Some(status) = message.status.filter(|status| *status != StatusCode::OK) else {
            if let Some(pull) = &mut self.pull {
                pull.left = pull.left.saturating_sub(1);
                pull.stalls_at = stall();
                if pull.left == 0 {
                    self.pull = None;
                }
            }
            return Ok(Came::Message(message));
        };
        let description = message.description.unwrap_or_default();
        match status.as_u16() {
            // Heartbeats, which were not asked for.
            100 => {}
            // Expired, or nothing there.
            404 | 408 => self.pull = None,
            // A pull's own end: its bytes are used up, or the server lets it go.
            409 if !is_fatal(&description) => self.pull = None,
            409 => bail!("{description}"),
            503 => bail!("nobody answers for this stream and consumer; it is tried again"),
            other => bail!("{other} {description}"),
        }
        Ok(Came::Nothing)
    }

    /// Takes nothing more. Gives where to say so of what has come and was not looked at.
    pub(super) async fn close(&mut self) -> Vec<Subject> {
        let mut left = Vec::new();
        let until = self.stalls_at().unwrap_or_else(Instant::now);
        let ended = async {
            while self.pulling() {
                if let Came::Message(message) = self.next().await? {
                    left.extend(message.reply);
                }
            }
            anyhow::Ok(())
        };
        // Where it does not end, the session is about to find out why.
        let _in_time = tokio::time::timeout_at(until, ended).await;
        self.pull = None;
        self.deliveries = None;
        left
    }

    /// Says something of a message.
    pub(super) async fn say(&self, to: Subject, reply: Reply) -> anyhow::Result<()> {
        Ok(self.client.publish(to, reply.payload().into()).await?)
    }

    /// Says something of a message, and waits until the server has it.
    pub(super) fn say_and_confirm(
        &self,
        to: Subject,
        reply: Reply,
    ) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
        let client = self.client.clone();
        async move {
            let said = client.request(to, reply.payload().into());
            let confirmed = tokio::time::timeout(RESPONSE_TIMEOUT, said).await;
            confirmed.context("the server does not confirm")?.context("the server does not confirm")?;
            Ok(())
        }
    }

    /// Waits until everything said is on its way.
    pub(super) async fn flush(&self) -> anyhow::Result<()> {
        tokio::time::timeout(RESPONSE_TIMEOUT, self.client.flush()).await.context("the server does not take it")??;
        Ok(())
    }
}

fn options(config: &Config, files: &Files<'_>) -> anyhow::Result<ConnectOptions> {
    let secret = |file: &Option<PathBuf>| file.as_deref().map(|file| Secret::read(&files(file))).transpose();
    let mut options = ConnectOptions::new()
        .name("framegate")
        .connection_timeout(CONNECT_TIMEOUT)
        .request_timeout(Some(RESPONSE_TIMEOUT))
        .ping_interval(PING_EVERY)
        // Each server once: we connect anew ourselves, with what the files hold then.
        .max_reconnects(config.servers().context("`url`")?.len());
    if let (Some(username), Some(password)) = (&config.username, secret(&config.password_file)?) {
        options = options.user_and_password(username.clone(), password.expose().to_owned());
    }
    if let Some(token) = secret(&config.token_file)? {
        options = options.token(token.expose().to_owned());
    }
    if let Some(credentials) = secret(&config.credentials_file)? {
        options = options.credentials(credentials.expose()).context("`credentials_file`")?;
    }
    if let Some(file) = &config.ca_file {
        options = options.add_root_certificates(files(file));
    }
    Ok(options)
}

fn refused(error: &async_nats::ConnectError) -> anyhow::Error {
    use async_nats::ConnectErrorKind as Kind;
    const TLS: &str = "; check `ca_file` and the server's certificate";
    let remedy = match error.kind() {
        Kind::Authentication | Kind::AuthorizationViolation => {
            "; check `username` and `password_file`, `token_file` or `credentials_file`"
        }
        Kind::Tls => TLS,
        Kind::Io if error.to_string().contains("certificate") => TLS,
        Kind::ServerParse | Kind::Dns | Kind::TimedOut | Kind::Io | Kind::MaxReconnects => "",
    };
    anyhow!("{error}{remedy}")
}

fn is_missing(error: &ConsumerInfoError) -> bool {
    let kind = error.kind();
    if let ConsumerInfoErrorKind::JetStream(said) = &kind {
        return said.error_code() == ErrorCode::CONSUMER_NOT_FOUND;
    }
    kind == ConsumerInfoErrorKind::NotFound
}

async fn look_up(stream: &Stream, config: &Config) -> anyhow::Result<Option<consumer::Info>> {
    match stream.consumer_info(&config.consumer).await {
        Ok(info) => Ok(Some(info)),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => bail!("the consumer cannot be looked up, it may not be permitted: {error}"),
    }
}

async fn make(stream: &Stream, config: &Config, first: Option<u64>) -> anyhow::Result<consumer::Info> {
    // A stream that was made anew counts from the beginning.
    let last = stream.cached_info().state.last_sequence;
    let deliver_policy = match first.filter(|first| *first <= last + 1) {
        Some(start_sequence) => DeliverPolicy::ByStartSequence { start_sequence },
        None => DeliverPolicy::All,
    };
    let wanted = pull::Config {
        durable_name: Some(config.consumer.clone()),
        description: Some("framegate".into()),
        deliver_policy,
        ack_policy: AckPolicy::Explicit,
        ack_wait: ACK_WAIT,
        max_ack_pending: ACK_PENDING_MAX,
        filter_subject: config.subject.clone(),
        ..pull::Config::default()
    };
    let made = stream.create_consumer(wanted).await;
    let made = made.map_err(|error| anyhow!("the consumer cannot be created, it may not be permitted: {error}"))?;
    tracing::info!(stream = %config.stream, consumer = %config.consumer, "created the durable consumer");
    Ok(made.cached_info().clone())
}

/// What a consumer says of itself, or why it cannot be used.
fn facts(config: &consumer::Config) -> Result<Facts, &'static str> {
    if config.ack_policy == AckPolicy::None {
        return Err("its ack policy is none, so a frame would be lost with the box: make it explicit");
    }
    if config.ack_policy != AckPolicy::Explicit {
        return Err("its ack policy is not explicit: one acknowledgement would speak for other frames");
    }
    if config.deliver_subject.is_some() {
        return Err("it is a push consumer: name a pull consumer, or one that is to be created");
    }
    if config.headers_only {
        return Err("it delivers headers only, without images");
    }
    let deadline = config.backoff.first().copied().unwrap_or(config.ack_wait);
    Ok(Facts {
        deadline: if deadline.is_zero() { ACK_WAIT } else { deadline },
        gives_up_after: Some(config.max_deliver).filter(|it| *it > 0),
    })
}

/// Whether a pull ended because there is nothing to pull from.
fn is_fatal(description: &str) -> bool {
    let description = description.to_ascii_lowercase();
    ["deleted", "push based", "shutdown", "bad request"].iter().any(|it| description.contains(it))
}

/// `$JS.ACK.STREAM.CONSUMER.DELIVERED.SEQUENCE.CONSUMER_SEQUENCE.TIME.PENDING`, from newer servers with domain and account
/// behind `ACK` and more at its end.
pub(super) fn place(reply: &str) -> Option<Place> {
    let parts: Vec<&str> = reply.strip_prefix("$JS.ACK.")?.split('.').collect();
    let at = match parts.len() {
        7 => 2,
        9.. => 4,
        _ => return None,
    };
    let nanos: i128 = parts[at + 3].parse().ok()?;
    Some(Place {
        delivered: parts[at].parse().ok()?,
        sequence: parts[at + 1].parse().ok()?,
        published: Timestamp::from_nanosecond(nanos).ok(),
    })
}

fn stall() -> Instant {
    Instant::now() + PULL_EXPIRES + PULL_STALLED
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_messages_place_is_in_the_subject_of_its_reply() {
        let place_of = |sequence, delivered| {
            Some(Place { sequence, delivered, published: Some(Timestamp::from_second(1_700_000_000).unwrap()) })
        };
        assert_eq!(place("$JS.ACK.FRAMES.framegate.2.41.7.1700000000000000000.3"), place_of(41, 2));
        assert_eq!(place("$JS.ACK._.hash.FRAMES.framegate.1.42.7.1700000000000000000.3.token"), place_of(42, 1));
        for bad in ["", "$JS.ACK.FRAMES", "_INBOX.x", "$JS.ACK.a.b.x.1.1.1.1", "$JS.ACK.a.b.1.1.1.1.1.1"] {
            assert_eq!(place(bad), None, "{bad}");
        }
    }

    #[test]
    fn b7_the_deadline_is_the_first_back_off_where_there_is_one() {
        let explicit = consumer::Config { ack_policy: AckPolicy::Explicit, ..consumer::Config::default() };
        let seconds = Duration::from_secs;
        for (ack_wait, backoff, deadline) in
            [(30, vec![], 30), (30, vec![1, 5], 1), (2, vec![], 2), (0, vec![], ACK_WAIT.as_secs())]
        {
            let backoff = backoff.into_iter().map(seconds).collect();
            let config = consumer::Config { ack_wait: seconds(ack_wait), backoff, ..explicit.clone() };
            assert_eq!(facts(&config).unwrap().deadline, seconds(deadline));
        }
    }

    #[test]
    fn b8_a_consumer_that_would_lose_frames_is_refused() {
        let explicit = consumer::Config { ack_policy: AckPolicy::Explicit, ..consumer::Config::default() };
        for (config, why) in [
            (consumer::Config { ack_policy: AckPolicy::None, ..explicit.clone() }, "none"),
            (consumer::Config { ack_policy: AckPolicy::All, ..explicit.clone() }, "not explicit"),
            (consumer::Config { deliver_subject: Some("x".into()), ..explicit.clone() }, "push consumer"),
            (consumer::Config { headers_only: true, ..explicit.clone() }, "headers only"),
        ] {
            assert!(facts(&config).unwrap_err().contains(why));
        }
        assert_eq!(facts(&consumer::Config { max_deliver: 5, ..explicit }).unwrap().gives_up_after, Some(5));
    }
}
