//! One connection to a Redis server (two, since a blocking read keeps its own), and the commands that a group's consumer
//! sends. No decisions: what is asked is sent, what comes back is taken apart.

use std::collections::HashSet;
use std::fmt;
use std::time::Duration;

use anyhow::Context as _;
use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, ErrorKind, IntoConnectionInfo as _, Pipeline,
    RedisError, RedisResult, ServerErrorKind, TlsCertificates, Value, cmd,
};

use super::Config;
use crate::secret::Secret;
use crate::source::Files;

/// Connecting, TLS and the login included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// An answer that takes longer means a connection that is broken and does not say so.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a read waits at the server for something new: how soon a stop can end it.
const BLOCK: Duration = Duration::from_secs(1);
/// Rows of pending entries that are looked at in one go.
const PENDING_ROWS: usize = 100;

/// An entry's id. Written `milliseconds-sequence`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct EntryId {
    /// Milliseconds since 1970, unless its producer chose it.
    pub millis: u64,
    pub sequence: u64,
}

impl EntryId {
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (millis, sequence) = text.split_once('-')?;
        Some(Self { millis: millis.parse().ok()?, sequence: sequence.parse().ok()? })
    }

    /// The greatest id below this one.
    pub(super) fn before(self) -> Self {
        match (self.millis, self.sequence) {
            (0, 0) => self,
            (millis, 0) => Self { millis: millis - 1, sequence: u64::MAX },
            (millis, sequence) => Self { millis, sequence: sequence - 1 },
        }
    }
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.millis, self.sequence)
    }
}

/// An entry of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StreamEntry {
    pub id: EntryId,
    /// Names and values, in their order.
    pub fields: Vec<(Vec<u8>, Vec<u8>)>,
}

/// An entry that was delivered to somebody and not acknowledged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PendingRow {
    pub id: EntryId,
    pub consumer: String,
    pub deliveries: u64,
}

/// Whose pending entries are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    /// Our own.
    Ours,
    /// Anybody's that nobody has touched for this long.
    Idle(Duration),
    /// Everybody's.
    All,
}

/// What a heartbeat or a return sets on entries of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Touch {
    /// Still in hand.
    InHand,
    /// Still in hand, and it has not brought us down: earlier deliveries are forgotten.
    Harmless,
    /// Given back: the next one who looks may take it.
    GivenBack(Duration),
}

pub(super) struct Link {
    reader: MultiplexedConnection,
    writer: MultiplexedConnection,
    stream: String,
    group: String,
    consumer: String,
}

impl Link {
    /// Connects; reads the secret and the CA anew.
    pub(super) async fn connect(config: &Config, consumer: String, files: &Files<'_>) -> anyhow::Result<Self> {
        let client = client(config, files)?;
        let connect = async |response: Duration| {
            let with = AsyncConnectionConfig::new()
                .set_connection_timeout(Some(CONNECT_TIMEOUT))
                .set_response_timeout(Some(response));
            client.get_multiplexed_async_connection_with_config(&with).await
        };
        let writer = connect(RESPONSE_TIMEOUT).await?;
        let reader = connect(BLOCK + RESPONSE_TIMEOUT).await?;
        let (stream, group) = (config.stream.clone(), config.group.clone());
        Ok(Self { reader, writer, stream, group, consumer })
    }

    /// Makes the group where it is missing; one that is new begins behind `after`.
    pub(super) async fn ensure_group(&mut self, after: Option<EntryId>) -> RedisResult<()> {
        let after = match after {
            Some(after) if self.last_generated().await?.is_some_and(|last| last >= after) => after.to_string(),
            // The stream is new, too, and may count from the beginning.
            Some(_) | None => "0".to_owned(),
        };
        let mut create = cmd("XGROUP");
        create.arg("CREATE").arg(&self.stream).arg(&self.group).arg(after).arg("MKSTREAM");
        match create.query_async::<()>(&mut self.writer).await {
            Err(error) if error.code() == Some("BUSYGROUP") => Ok(()),
            made => made,
        }
    }

    /// The greatest id that the stream ever had; `None`: there is no stream.
    pub(super) async fn last_generated(&mut self) -> RedisResult<Option<EntryId>> {
        let info = cmd("XINFO").arg("STREAM").arg(&self.stream).query_async(&mut self.writer).await;
        match info {
            Ok(Value::Array(facts)) => {
                let at = facts.iter().position(|it| text(it).as_deref() == Some("last-generated-id"));
                Ok(at.and_then(|at| EntryId::parse(&text(facts.get(at + 1)?)?)))
            }
            Ok(_) => Ok(None),
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::ResponseError) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Up to `count` entries that nobody has had; none after a while. Owns its connection: dropping it loses what the
    /// server has sent meanwhile, which then is pending and not in hand.
    pub(super) fn read(&self, count: usize) -> impl Future<Output = RedisResult<Vec<StreamEntry>>> + Send + 'static {
        let mut reader = self.reader.clone();
        let mut read = cmd("XREADGROUP");
        read.arg("GROUP").arg(&self.group).arg(&self.consumer).arg("COUNT").arg(count);
        read.arg("BLOCK").arg(millis(BLOCK)).arg("STREAMS").arg(&self.stream).arg(">");
        async move {
            // [[stream, entries]], or nil.
            let answer: Value = read.query_async(&mut reader).await?;
            let Value::Array(streams) = answer else { return Ok(Vec::new()) };
            Ok(streams.into_iter().flat_map(of_stream).collect())
        }
    }

    /// Pending entries behind `after`, in order, up to a bound or `count`.
    pub(super) async fn pending(
        &mut self,
        whose: Whose,
        after: Option<EntryId>,
        count: usize,
    ) -> RedisResult<Vec<PendingRow>> {
        let mut ask = cmd("XPENDING");
        ask.arg(&self.stream).arg(&self.group);
        if let Whose::Idle(idle) = whose {
            ask.arg("IDLE").arg(millis(idle));
        }
        let start = after.map_or("-".to_owned(), |after| format!("({after}"));
        ask.arg(start).arg("+").arg(count.min(PENDING_ROWS));
        if whose == Whose::Ours {
            ask.arg(&self.consumer);
        }
        let rows: Vec<(String, String, u64, u64)> = ask.query_async(&mut self.writer).await?;
        let row = |(id, consumer, _, deliveries): (String, String, u64, u64)| {
            Some(PendingRow { id: EntryId::parse(&id)?, consumer, deliveries })
        };
        Ok(rows.into_iter().filter_map(row).collect())
    }

    /// Makes pending entries ours, those that nobody has touched for `idle`, and gives those that are still there.
    pub(super) async fn claim(&mut self, ids: &[EntryId], idle: Duration) -> RedisResult<Vec<StreamEntry>> {
        let claim = self.xclaim(millis(idle), ids);
        Ok(entries(claim.query_async(&mut self.writer).await?))
    }

    /// Which of these entries the stream does not have any more.
    pub(super) async fn trimmed(&mut self, ids: &[EntryId]) -> RedisResult<Vec<EntryId>> {
        let mut trimmed = Vec::new();
        for id in ids {
            let name = id.to_string();
            let found: Value =
                cmd("XRANGE").arg(&self.stream).arg(&name).arg(&name).query_async(&mut self.writer).await?;
            if entries(found).is_empty() {
                trimmed.push(*id);
            }
        }
        Ok(trimmed)
    }

    /// Says that these entries are in our hands, or that they are not any more.
    pub(super) async fn touch(&mut self, touches: &[(EntryId, Touch)]) -> RedisResult<()> {
        let mut pipeline = Pipeline::new();
        let kinds: HashSet<Option<Duration>> = touches.iter().map(|(_, touch)| touch.idle()).collect();
        for (idle, harmless) in kinds.into_iter().flat_map(|idle| [(idle, false), (idle, true)]) {
            let same = |it: &&(EntryId, Touch)| it.1.idle() == idle && it.1.forgets() == harmless;
            let ids: Vec<EntryId> = touches.iter().filter(same).map(|it| it.0).collect();
            if ids.is_empty() {
                continue;
            }
            let mut claim = self.xclaim(0, &ids);
            if let Some(idle) = idle {
                claim.arg("IDLE").arg(millis(idle));
            }
            if harmless {
                claim.arg("RETRYCOUNT").arg(0);
            }
            claim.arg("JUSTID");
            pipeline.add_command(claim).ignore();
        }
        if pipeline.is_empty() { Ok(()) } else { pipeline.query_async(&mut self.writer).await }
    }

    /// Acknowledges these entries, and removes them from the stream where that is wanted.
    pub(super) async fn acknowledge(&mut self, ids: &[EntryId], delete: bool) -> RedisResult<()> {
        let names: Vec<String> = ids.iter().map(EntryId::to_string).collect();
        let mut pipeline = Pipeline::new();
        pipeline.cmd("XACK").arg(&self.stream).arg(&self.group).arg(&names).ignore();
        if delete {
            pipeline.atomic().cmd("XDEL").arg(&self.stream).arg(&names).ignore();
        }
        pipeline.query_async(&mut self.writer).await
    }

    fn xclaim(&self, idle_ms: u64, ids: &[EntryId]) -> Cmd {
        let mut claim = cmd("XCLAIM");
        claim.arg(&self.stream).arg(&self.group).arg(&self.consumer).arg(idle_ms);
        for id in ids {
            claim.arg(id.to_string());
        }
        claim
    }
}

impl Touch {
    fn idle(self) -> Option<Duration> {
        match self {
            Touch::InHand | Touch::Harmless => None,
            Touch::GivenBack(idle) => Some(idle),
        }
    }

    fn forgets(self) -> bool {
        match self {
            Touch::InHand => false,
            Touch::Harmless | Touch::GivenBack(_) => true,
        }
    }
}

fn client(config: &Config, files: &Files<'_>) -> anyhow::Result<Client> {
    let info: ConnectionInfo = config.url.as_str().into_connection_info()?;
    let mut settings = info.redis_settings().clone();
    if let Some(username) = &config.username {
        settings = settings.set_username(username);
    }
    if let Some(file) = &config.password_file {
        settings = settings.set_password(Secret::read(&files(file))?.expose());
    }
    let info = info.set_redis_settings(settings);
    let tls = matches!(info.addr(), ConnectionAddr::TcpTls { .. });
    let Some(file) = config.ca_file.as_deref().filter(|_| tls) else { return Ok(Client::open(info)?) };
    let path = files(file);
    let root = std::fs::read(&path).with_context(|| format!("cannot read the CA file `{}`", path.display()))?;
    let certificates = TlsCertificates { client_tls: None, root_cert: Some(root) };
    Client::build_with_tls(info, certificates).with_context(|| format!("the CA file `{}`", path.display()))
}

/// What a failed command or connection means, in words for the status.
pub(super) fn explain(error: &anyhow::Error) -> String {
    let Some(redis) = error.downcast_ref::<RedisError>() else { return format!("{error:#}") };
    let said = redis.to_string();
    if redis.kind() == ErrorKind::AuthenticationFailed {
        return format!("{said}; check `username` and `password_file`");
    }
    let remedy = match redis.code() {
        Some("WRONGPASS" | "NOAUTH") => "check `username` and `password_file`",
        Some("NOPERM") => {
            "give the account the commands xreadgroup, xclaim, xpending, xack, xgroup, xinfo, xrange (and xdel) on this stream"
        }
        Some("LOADING") => "it is still loading its data",
        Some("READONLY") => "it is a replica: a fail-over is under way, or the address is wrong",
        Some("OOM") => "it is out of memory: raise its maxmemory, or trim the stream",
        Some("MISCONF") => "it cannot save its data: look at its disk",
        Some("WRONGTYPE") => "this key holds something else than a stream",
        Some("NOGROUP") => "the group is gone and is made anew",
        Some(_) | None => "it is tried again",
    };
    format!("{said}; {remedy}")
}

fn of_stream(stream: Value) -> Vec<StreamEntry> {
    let Value::Array(mut pair) = stream else { return Vec::new() };
    pair.pop().map(entries).unwrap_or_default()
}

/// `[[id, [name, value, …]], …]`; entries that are gone are nil, or have nil for their fields.
fn entries(value: Value) -> Vec<StreamEntry> {
    let Value::Array(rows) = value else { return Vec::new() };
    rows.into_iter().filter_map(entry).collect()
}

fn entry(row: Value) -> Option<StreamEntry> {
    let Value::Array(row) = row else { return None };
    let [id, Value::Array(fields)] = <[Value; 2]>::try_from(row).ok()? else { return None };
    let id = EntryId::parse(&text(&id)?)?;
    let mut fields = fields.into_iter().map(bytes);
    let mut pairs = Vec::new();
    while let (Some(name), Some(value)) = (fields.next(), fields.next()) {
        pairs.push((name, value));
    }
    Some(StreamEntry { id, fields: pairs })
}

fn bytes(value: Value) -> Vec<u8> {
    if let Value::BulkString(bytes) = value {
        return bytes;
    }
    text(&value).unwrap_or_default().into_bytes()
}

fn text(value: &Value) -> Option<String> {
    redis::from_redis_value_ref(value).ok()
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(text: &str) -> Value {
        Value::BulkString(text.into())
    }

    #[test]
    fn ids_are_ordered_by_number_and_parse_back() {
        let id = |text: &str| EntryId::parse(text).unwrap();
        assert!(id("9-0") < id("10-0") && id("10-9") < id("10-10"));
        assert_eq!(id("5-7").before(), id("5-6"));
        assert_eq!(id("5-0").before(), id("4-18446744073709551615"));
        assert_eq!(id("0-0").before(), id("0-0"));
        for bad in ["", "5", "5-", "-", "5-x", "5-1-2", "*"] {
            assert_eq!(EntryId::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn entries_are_taken_apart_and_those_that_are_gone_left_out() {
        let whole = Value::Array(vec![bulk("1-0"), Value::Array(vec![bulk("image"), bulk("x"), bulk("odd")])]);
        let rows = vec![whole, Value::Nil, Value::Array(vec![bulk("2-0"), Value::Nil]), Value::Array(vec![])];
        let found = entries(Value::Array(rows));
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].fields, [(b"image".to_vec(), b"x".to_vec())]);
        assert!(entries(Value::Nil).is_empty());
    }
}
