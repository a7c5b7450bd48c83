//! What the engine is to us: open, or paused for a reason. Pure words; who changes it is `line`.

/// What the engine is to us; the label of `engine_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Frames are published.
    Open,
    /// No connection, or no answers.
    Unreachable,
    /// The login is refused.
    Credentials,
    /// 403 for all.
    Forbidden,
    /// 400 and the like for all.
    Rejecting,
    /// Somebody who is not the engine answers.
    UnexpectedAnswer,
    /// The engine asked for patience.
    Throttled,
    /// Server errors for all.
    Failing,
}

impl State {
    /// All of them, for metrics.
    pub const ALL: [State; 8] = [
        State::Open,
        State::Unreachable,
        State::Credentials,
        State::Forbidden,
        State::Rejecting,
        State::UnexpectedAnswer,
        State::Throttled,
        State::Failing,
    ];

    /// The text form, as in metrics and `/status`.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Open => "open",
            State::Unreachable => "unreachable",
            State::Credentials => "credentials",
            State::Forbidden => "forbidden",
            State::Rejecting => "rejecting",
            State::UnexpectedAnswer => "unexpected-answer",
            State::Throttled => "throttled",
            State::Failing => "failing",
        }
    }

    /// What it means for the frames.
    pub fn meaning(self) -> &'static str {
        match self {
            State::Open => "Frames are published.",
            State::Unreachable => "Nobody answers. Frames are kept; publishing goes on by itself.",
            State::Credentials => "The login is refused. Frames are kept; it is tried again by itself.",
            State::Forbidden => "The engine's user may not publish. Frames are kept.",
            State::Rejecting => "The engine refuses every frame. Frames are kept.",
            State::UnexpectedAnswer => {
                "Somebody else answers in the engine's place. Frames are kept; none is sent there."
            }
            State::Throttled => "The engine asked for a pause. Frames are kept; publishing goes on by itself.",
            State::Failing => "The engine has errors of its own. Frames are kept; publishing goes on by itself.",
        }
    }

    /// What somebody on site can do about it.
    pub fn advice(self) -> &'static str {
        match self {
            State::Open => "",
            State::Unreachable => {
                "check that the engine runs, and the network, DNS and engine.base_url; `framegate doctor` tells them apart"
            }
            State::Credentials => {
                "check engine.username and the password or token file, then `framegate reload` (a systemd credential: `systemctl restart framegate`); it is tried again by itself"
            }
            State::Forbidden => "give the engine's user the Face Publishing permission; nothing else is needed here",
            State::Rejecting => {
                "the engine refuses every frame's request: compare its version with Framegate's; see the message for what it misses"
            }
            State::UnexpectedAnswer => {
                "something between here and the engine answers instead of it (a portal, a proxy, another server): check engine.base_url and the certificate or pin"
            }
            State::Throttled => "nothing to do: the engine asked for a pause; if it is frequent, set publish.rate",
            State::Failing => "look at the engine's own logs; frames are kept and it is tried again by itself",
        }
    }

    /// Pauses that one frame might cause by its content, so that another detector's frame is worth a try at once.
    pub(super) fn may_be_a_frames_fault(self) -> bool {
        match self {
            State::Forbidden | State::Rejecting | State::Failing => true,
            State::Open | State::Unreachable | State::Credentials | State::UnexpectedAnswer | State::Throttled => false,
        }
    }
}

/// A change of state, for the log and the gauges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) from: State,
    pub(super) to: State,
    pub(super) reason: String,
}
