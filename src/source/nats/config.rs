//! `[detectors.nats]`: its keys, and what they mean together.

use std::path::PathBuf;
use std::str::FromStr as _;

use async_nats::ServerAddr;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::source::Fault;

/// `[detectors.nats]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `nats://HOST:PORT`, `tls://` for TLS; several servers with commas between them. Must be set.
    pub url: String,
    /// The account's name; its password is in `password_file`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,
    /// A file with the account's password, looked up like the engine's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// A file with a token, instead of an account.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// A credentials file (JWT and nkey seed), instead of an account.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credentials_file: Option<PathBuf>,
    /// Trust this CA (a PEM file), too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// The stream's name. Must be set. It is not created: its subjects, replicas and limits are its owner's.
    pub stream: String,
    /// The durable pull consumer, created where it is missing. Boxes that share it share its messages.
    pub consumer: String,
    /// The subject that a consumer created here is for, wildcards allowed; empty: all of the stream.
    pub subject: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            url: String::new(),
            username: None,
            password_file: None,
            token_file: None,
            credentials_file: None,
            ca_file: None,
            stream: String::new(),
            consumer: "framegate".into(),
            subject: String::new(),
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
        let account = match (&self.username, &self.token_file, &self.credentials_file) {
            (Some(name), _, _) => format!(" as {name}"),
            (None, Some(_), _) => " with a token".into(),
            (None, None, Some(_)) => " with a credentials file".into(),
            (None, None, None) => String::new(),
        };
        let subject = if self.subject.is_empty() { "all subjects" } else { &self.subject };
        vec![
            format!("{}{account}", self.url),
            format!("stream {}, durable consumer {}, {subject}", self.stream, self.consumer),
        ]
    }

    /// The servers of `url`.
    pub(super) fn servers(&self) -> Result<Vec<ServerAddr>, std::io::Error> {
        self.url.split(',').map(|part| ServerAddr::from_str(part.trim())).collect()
    }

    /// What is wrong with it.
    pub(in crate::source) fn faults(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        match self.servers() {
            _ if self.url.is_empty() => {
                faults.push(Fault::new("url", "missing", "write for example nats://127.0.0.1:4222"));
            }
            // Not shown: what cannot be taken apart may hold a password.
            Err(_) => {
                let right = "write it like nats://127.0.0.1:4222, several with commas between them";
                faults.push(Fault::new("url", "holds no NATS URL (not shown)", right));
            }
            Ok(servers) => faults.extend(fault_of(&servers)),
        }
        for (key, value) in [("stream", &self.stream), ("consumer", &self.consumer)] {
            if value.is_empty()
                || value.contains([' ', '.', '*', '>', '/', '\\'])
                || value.chars().any(char::is_control)
            {
                let right = format!("write a name without spaces and without . * > / \\, such as {key} = \"FRAMES\"");
                faults.push(Fault::new(key, format!("`{}` cannot be a name", value.escape_debug()), right));
            }
        }
        faults.extend(self.faults_of_account());
        faults
    }

    fn faults_of_account(&self) -> Option<Fault> {
        let given = [self.username.is_some(), self.token_file.is_some(), self.credentials_file.is_some()];
        if given.iter().filter(|it| **it).count() > 1 {
            let right = "keep one of `username`, `token_file` and `credentials_file`";
            return Some(Fault::new("username", "is not the only account given", right));
        }
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

fn fault_of(servers: &[ServerAddr]) -> Option<Fault> {
    if servers.iter().any(|server| server.username().is_some() || server.password().is_some()) {
        let right = "leave out what is before the @; it goes to `username` and `password_file`, or `token_file`";
        return Some(Fault::new("url", "holds an account (not shown)", right));
    }
    if servers.iter().any(|server| !matches!(server.scheme(), "nats" | "tls")) {
        return Some(Fault::new("url", "has another scheme than nats and tls", "write it like nats://127.0.0.1:4222"));
    }
    None
}
