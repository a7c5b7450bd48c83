//! What came last: a broker sends again what it has no acknowledgement of, also where that went down with a connection. Pure.

use std::collections::VecDeque;

use super::HELD_MAX;
use super::wire::Publish;

/// Messages whose acknowledgement may not have reached the broker: it has at most those of its window.
const MESSAGES_MAX: usize = 4 * HELD_MAX as usize;

/// Packet ids, and what tells a message's content from another's, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Remembered(VecDeque<(u16, u32)>);

impl Remembered {
    /// Whether the broker sends once more what we have. If not, it is remembered.
    pub(super) fn knows(&mut self, id: u16, publish: &Publish) -> bool {
        let this = (id, content(publish));
        if publish.again && self.0.contains(&this) {
            return true;
        }
        // It uses a packet id anew only after it heard the acknowledgement, and with it those that went before.
        if let Some(used) = self.0.iter().rposition(|(before, _)| *before == id) {
            self.0.drain(..=used);
        }
        if self.0.len() >= MESSAGES_MAX {
            self.0.pop_front();
        }
        self.0.push_back(this);
        false
    }

    /// The broker has forgotten everything: its packet ids begin anew.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

fn content(publish: &Publish) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(publish.topic.as_bytes());
    for said in publish.beside.iter().flatten() {
        crc.update(said.as_bytes());
    }
    crc.update(&publish.payload);
    crc.finalize()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    /// Whether each of these is known when it comes: its packet id, what is in it, whether it is sent again.
    fn known(messages: &[(u16, &'static [u8], bool)]) -> Vec<bool> {
        let mut remembered = Remembered::default();
        let publish = |payload, again| Publish {
            topic: "a/b".into(),
            retained: false,
            again,
            id: None,
            payload: Bytes::from_static(payload),
            beside: [None, None, None],
            cut_from: None,
            malformed: None,
        };
        messages.iter().map(|(id, payload, again)| remembered.knows(*id, &publish(payload, *again))).collect()
    }

    #[test]
    fn b16_what_is_sent_again_is_known_by_packet_id_and_content() {
        let messages: [(u16, &[u8], bool); 7] = [
            (1, b"A", false),
            (2, b"A", false),
            (1, b"A", true),
            (2, b"A", true),
            (1, b"A", true),
            (3, b"A", true),
            (2, b"B", true),
        ];
        assert_eq!(known(&messages), [false, false, true, true, true, false, false]);
    }

    #[test]
    fn b16_a_new_message_is_not_taken_for_an_earlier_one_of_its_packet_id() {
        // A broker that uses the lowest id that is free: one camera's messages are all number 1. The last one was lost on
        // its way, and is sent again.
        let messages: [(u16, &[u8], bool); 3] = [(1, b"A", false), (1, b"B", false), (1, b"A", true)];
        assert_eq!(known(&messages), [false, false, false]);
        // What was acknowledged before it has reached the broker, too.
        let messages: [(u16, &[u8], bool); 4] = [(1, b"A", false), (2, b"B", false), (2, b"C", false), (1, b"A", true)];
        assert_eq!(known(&messages), [false, false, false, false]);
    }
}
