//! `[detectors.redis]`: its keys, and what they mean together.

use std::path::PathBuf;
use std::time::Duration;

use redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo as _};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::source::Fault;

/// The shortest `take_over_after`: heartbeats come four times as often.
const TAKE_OVER_MIN: Duration = Duration::from_secs(1);

/// `[detectors.redis]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `redis://HOST:PORT`, `rediss://` for TLS; `/N` behind it for another database than 0. Must be set.
    pub url: String,
    /// The account of the server's ACL; without it, its default account.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// A file with its password, looked up like the engine's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// Trust this CA (a PEM file) instead of those of this box.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// The stream's key. Must be set.
    pub stream: String,
    /// The consumer group, created where it is missing, from the stream's beginning. Boxes of one group share its entries.
    pub group: String,
    /// This box's name in the group: of its own on every box, and the same after a restart. Empty: the host's name.
    pub consumer: String,
    /// Entries of another box that it has not touched for this long are taken over.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub take_over_after: Duration,
    /// Remove an entry from the stream when it is settled: only where no other group reads it.
    pub delete: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            url: String::new(),
            username: None,
            password_file: None,
            ca_file: None,
            stream: String::new(),
            group: "framegate".into(),
            consumer: String::new(),
            take_over_after: Duration::from_secs(30),
            delete: false,
        }
    }
}

impl Config {
    /// For people: no secrets.
    pub fn place(&self) -> String {
        format!("{} stream {}", self.url, self.stream)
    }

    /// What it would do, for people.
    pub fn describe(&self) -> Vec<String> {
        let account = self.username.as_deref().unwrap_or("the server's default account");
        let delete = if self.delete { ", settled entries are removed" } else { "" };
        vec![
            format!("{} as {account}", self.url),
            format!("stream {}, group {}, consumer {}{delete}", self.stream, self.group, self.consumer()),
        ]
    }

    /// The consumer's name in the group.
    pub fn consumer(&self) -> String {
        if !self.consumer.is_empty() {
            return self.consumer.clone();
        }
        let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
        if name.is_empty() { "framegate".into() } else { name }
    }

    /// What is wrong with it.
    pub(in crate::source) fn faults(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        match self.url.as_str().into_connection_info() {
            _ if self.url.is_empty() => {
                faults.push(Fault::new("url", "missing", "write for example redis://127.0.0.1:6379"));
            }
            // Not shown: what cannot be taken apart may hold a password.
            Err(_) => {
                faults.push(Fault::new("url", "not a Redis URL (not shown)", "write it like redis://127.0.0.1:6379"));
            }
            Ok(info) => faults.extend(self.faults_of_url(&info)),
        }
        for (key, value, like) in [("stream", &self.stream, "frames"), ("group", &self.group, "framegate")] {
            if value.trim().is_empty() {
                faults.push(Fault::new(key, "missing", format!("write for example {key} = \"{like}\"")));
            }
        }
        if self.take_over_after < TAKE_OVER_MIN {
            let right = "write at least 1s; entries in hand are touched four times in it";
            faults.push(Fault::new("take_over_after", "is too short", right));
        }
        if self.username.is_some() && self.password_file.is_none() {
            faults.push(Fault::new(
                "password_file",
                "missing, but `username` is given",
                "put the password into a file",
            ));
        }
        faults
    }

    fn faults_of_url(&self, info: &ConnectionInfo) -> Option<Fault> {
        let settings = info.redis_settings();
        if settings.password().is_some() || settings.username().is_some() {
            let right = "leave out what is before the @; it goes to `username` and `password_file`";
            return Some(Fault::new("url", "holds an account (not shown)", right));
        }
        if let ConnectionAddr::TcpTls { insecure: true, .. } = info.addr() {
            return Some(Fault::new(
                "url",
                "switches the check of certificates off",
                "leave out #insecure; give `ca_file`",
            ));
        }
        let tls = matches!(info.addr(), ConnectionAddr::TcpTls { .. });
        (self.ca_file.is_some() && !tls)
            .then(|| Fault::new("ca_file", "means nothing without TLS", "write rediss:// in `url`, or remove this"))
    }
}
