//! Settling: what becomes of a frame, and the duty to say so exactly once.
//!
//! Not here: deciding (that is `pipeline` and `publish`) and carrying it out at the source (that is the source).

pub mod dead_letter;

use std::fmt;

/// What became of a frame. The source acts on it: deletes, archives, acknowledges or gives back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// The engine has it.
    Accepted,
    /// It is durably kept as a dead letter. Do not send it again.
    Rejected,
    /// Nothing durable happened. Send it again later.
    Released,
    /// A policy that the operator switched on dropped it (counted).
    Dropped,
}

/// Why a frame is a dead letter; the `reason` of its JSON and of the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// Not an image of a kind that the engine takes.
    Unsupported,
    /// The image never got its end.
    Truncated,
    /// Larger than `encode.max_frame`.
    TooLarge,
    /// The engine took other frames but said 400, 413, 415 or 422 to this one.
    Rejected,
    /// The engine took other frames but said 403 to this one.
    Forbidden,
    /// The engine took other frames but said 500 to this one, `publish.attempts` times.
    ServerError,
    /// Framegate itself failed on it (a panic).
    InternalError,
}

impl Reason {
    /// All of them, for filters and metrics.
    pub const ALL: [Reason; 7] = [
        Reason::Unsupported,
        Reason::Truncated,
        Reason::TooLarge,
        Reason::Rejected,
        Reason::Forbidden,
        Reason::ServerError,
        Reason::InternalError,
    ];

    /// The text form, as in metrics and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Unsupported => "unsupported",
            Reason::Truncated => "truncated",
            Reason::TooLarge => "too-large",
            Reason::Rejected => "rejected",
            Reason::Forbidden => "forbidden",
            Reason::ServerError => "server-error",
            Reason::InternalError => "internal-error",
        }
    }

    /// Takes back what [`Reason::as_str`] gave.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == text)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a frame was refused, with what the engine said about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    /// The class of refusal.
    pub reason: Reason,
    /// The engine's status, where it was the engine that refused.
    pub status: Option<u16>,
    /// A bounded, escaped message for people.
    pub message: String,
    /// Attempts made.
    pub attempts: u32,
}

/// The duty to say what became of one frame. Dropped unsettled (a panic, an abort at the deadline), it says
/// [`Disposition::Released`]: a forgotten path must never look delivered.
#[must_use]
pub struct Receipt(Option<Box<dyn FnOnce(Disposition) + Send>>);

impl Receipt {
    /// `tell` is called exactly once, on whatever thread settles: it must only hand the news on, not do I/O.
    pub fn new(tell: impl FnOnce(Disposition) + Send + 'static) -> Self {
        Self(Some(Box::new(tell)))
    }

    /// Says what became of the frame.
    pub fn settle(mut self, disposition: Disposition) {
        if let Some(tell) = self.0.take() {
            tell(disposition);
        }
    }
}

impl Drop for Receipt {
    fn drop(&mut self) {
        if let Some(tell) = self.0.take() {
            tell(Disposition::Released);
        }
    }
}

impl fmt::Debug for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Receipt")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_receipt_dropped_unsettled_says_released_and_a_settled_one_speaks_once() {
        let (tx, rx) = mpsc::channel();
        let told = tx.clone();
        drop(Receipt::new(move |d| told.send(d).unwrap()));
        Receipt::new(move |d| tx.send(d).unwrap()).settle(Disposition::Accepted);
        assert_eq!(rx.iter().collect::<Vec<_>>(), [Disposition::Released, Disposition::Accepted]);
    }

    #[test]
    fn reasons_parse_back() {
        for reason in Reason::ALL {
            assert_eq!(Reason::parse(reason.as_str()), Some(reason));
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.as_str());
        }
        assert_eq!(Reason::parse("whatever"), None);
    }
}
