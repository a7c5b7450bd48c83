//! `[detectors.mqtt]`: its keys, and what they mean together.

use std::path::PathBuf;
use std::time::Duration;

use reqwest::Url;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::wire::{self, Version};
use crate::source::Fault;

/// Where brokers listen if the URL says nothing, without and with TLS.
const PORT: u16 = 1883;
const TLS_PORT: u16 = 8883;
/// `keep_alive` is told in whole seconds, of which sixteen bits have room.
const KEEP_ALIVE_MIN: Duration = Duration::from_secs(1);
const KEEP_ALIVE_MAX: Duration = Duration::from_secs(u16::MAX as u64);
/// The longest client id, in bytes.
const CLIENT_ID_BYTES_MAX: usize = 255;
/// What some brokers take for an order about the subscription: its messages come under topics without it, and so would be
/// taken for those of another one.
const ORDERS: [&str; 2] = ["$queue/", "$exclusive/"];

/// `[detectors.mqtt]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `mqtt://HOST:PORT`, `mqtts://` for TLS. Must be set.
    pub url: String,
    /// 5, or 3 for MQTT 3.1.1.
    pub version: u8,
    /// The account; its password is in `password_file`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// A file with the account's password, looked up like the engine's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// Trust this CA (a PEM file) instead of those of this box.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// What is subscribed to: `+` stands for one level, `#` for all the rest. Must be set.
    pub topic: String,
    /// The name of our session at the broker: of its own on every box, and the same after a restart. Empty: `framegate-`
    /// and the host's name.
    pub client_id: String,
    /// Take retained messages, too: a topic's last message, that the broker keeps and sends to whoever subscribes.
    pub retained: bool,
    /// A broker that says nothing for this long is connected to anew.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub keep_alive: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            url: String::new(),
            version: 5,
            username: None,
            password_file: None,
            ca_file: None,
            topic: String::new(),
            client_id: String::new(),
            retained: false,
            keep_alive: Duration::from_secs(30),
        }
    }
}

/// Where the broker is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub host: String,
    pub port: u16,
    pub tls: bool,
}

impl Config {
    /// For people: no secrets.
    pub fn place(&self) -> String {
        format!("{} topic {}", self.url, self.topic)
    }

    /// What it would do, for people.
    pub fn describe(&self) -> Vec<String> {
        let account = self.username.as_deref().map_or(String::new(), |name| format!(" as {name}"));
        let version = match self.version() {
            Version::Three => "3.1.1",
            Version::Five => "5",
        };
        let retained = if self.retained { "retained messages too" } else { "no retained messages" };
        vec![
            format!("{}{account}, MQTT {version}", self.url),
            format!("topic {}, client id {}, {retained}", self.topic, self.client_id()),
        ]
    }

    /// The name of our session.
    pub fn client_id(&self) -> String {
        if !self.client_id.is_empty() {
            return self.client_id.clone();
        }
        format!("framegate-{}", rustix::system::uname().nodename().to_string_lossy())
    }

    /// What is spoken.
    pub(super) fn version(&self) -> Version {
        if self.version == 3 { Version::Three } else { Version::Five }
    }

    /// Where `url` leads; `None` if that is nowhere.
    pub(super) fn address(&self) -> Option<Address> {
        let url = Url::parse(&self.url).ok()?;
        let tls = match url.scheme() {
            "mqtt" => false,
            "mqtts" => true,
            _ => return None,
        };
        let host = url.host_str()?.trim_matches(['[', ']']).to_owned();
        Some(Address { host, port: url.port().unwrap_or(if tls { TLS_PORT } else { PORT }), tls })
    }

    /// What is wrong with it.
    pub(in crate::source) fn faults(&self) -> Vec<Fault> {
        let mut faults: Vec<Fault> = self.fault_of_url().into_iter().collect();
        if self.topic.is_empty() {
            faults.push(Fault::new("topic", "missing", "write for example topic = \"frigate/+/person/snapshot\""));
        } else if let Some(order) = ORDERS.iter().find(|order| self.topic.starts_with(**order)) {
            let right = "leave it out; to share a subscription write $share/GROUP/ in its place";
            faults.push(Fault::new("topic", format!("begins with `{order}`, which is no part of a topic"), right));
        } else if !wire::is_filter(&self.topic) {
            let right = "a + or # stands alone between slashes, and # only at the end, as in frigate/+/person/snapshot";
            faults.push(Fault::new("topic", format!("`{}` cannot be subscribed to", self.topic.escape_debug()), right));
        }
        if !matches!(self.version, 3 | 5) {
            let wrong = format!("{} is no version that is spoken here", self.version);
            faults.push(Fault::new("version", wrong, "write 5, or 3 for MQTT 3.1.1"));
        }
        if self.client_id.len() > CLIENT_ID_BYTES_MAX || self.client_id.chars().any(char::is_control) {
            let right =
                "write a name of up to 255 bytes, of its own on every box, such as client_id = \"framegate-edge-07\"";
            faults.push(Fault::new("client_id", "is too long or holds control characters", right));
        }
        if !(KEEP_ALIVE_MIN..=KEEP_ALIVE_MAX).contains(&self.keep_alive) {
            faults.push(Fault::new("keep_alive", "is out of bounds", "write at least 1s and at most 18h"));
        }
        faults.extend(self.fault_of_account());
        faults
    }

    fn fault_of_url(&self) -> Option<Fault> {
        const RIGHT: &str = "write it like mqtt://127.0.0.1:1883, or mqtts:// for TLS";
        if self.url.is_empty() {
            return Some(Fault::new("url", "missing", "write for example mqtt://127.0.0.1:1883"));
        }
        let url = Url::parse(&self.url).ok();
        let Some(url) = url.filter(Url::has_host) else {
            // Not shown: what cannot be taken apart may hold a password.
            return Some(Fault::new("url", "not an MQTT URL (not shown)", RIGHT));
        };
        if !url.username().is_empty() || url.password().is_some() {
            let right = "leave out what is before the @; it goes to `username` and `password_file`";
            return Some(Fault::new("url", "holds an account (not shown)", right));
        }
        if !matches!(url.scheme(), "mqtt" | "mqtts") {
            return Some(Fault::new("url", "has another scheme than mqtt and mqtts", RIGHT));
        }
        if !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some() {
            return Some(Fault::new("url", "has something behind host and port", RIGHT));
        }
        (self.ca_file.is_some() && url.scheme() == "mqtt")
            .then(|| Fault::new("ca_file", "means nothing without TLS", "write mqtts:// in `url`, or remove this"))
    }

    fn fault_of_account(&self) -> Option<Fault> {
        match (&self.username, &self.password_file) {
            (Some(_), None) => {
                Some(Fault::new("password_file", "missing, but `username` is given", "put the password into a file"))
            }
            (None, Some(_)) => {
                Some(Fault::new("username", "missing, but `password_file` is given", "write the account it belongs to"))
            }
            (Some(_), Some(_)) | (None, None) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_leads_to_a_broker() {
        for (url, found) in [
            ("mqtt://10.0.0.5", Some(("10.0.0.5", 1883, false))),
            ("mqtts://broker.example", Some(("broker.example", 8883, true))),
            ("mqtt://[::1]:1884/", Some(("::1", 1884, false))),
            ("tcp://10.0.0.5", None),
            ("10.0.0.5:1883", None),
            ("", None),
        ] {
            let config = Config { url: url.into(), ..Config::default() };
            let found = found.map(|(host, port, tls)| Address { host: host.into(), port, tls });
            assert_eq!(config.address(), found, "{url}");
        }
    }
}
