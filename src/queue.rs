//! The queue between sources and the encode workers: the byte budget, and turns between detectors.
//!
//! Frames wait at their source, not in here. A source registers one [`Line`] for each detector and says when it has
//! something; the queue pulls the line's next frame at the moment there is room for it, so the freshest really goes first.

use std::fmt;
use std::sync::Arc;

use crate::frame::{Detector, Frame};
use crate::settle::Receipt;

/// A detector's waiting frames, kept by its source in the source's order.
pub trait Line: Send + Sync {
    /// Takes the next frame out of line. Called from async code: locks briefly, never does I/O. `None`: nothing waits;
    /// the source calls [`Ready::ready`] when that changes.
    fn next(&self) -> Option<Offer>;
}

/// A frame that waits at its source, and how to take hold of it.
pub struct Offer {
    /// Size of the image in bytes as far as the source knows: what the budget is charged by.
    pub image_bytes: u64,
    /// Runs once on an encode worker, where blocking is allowed: claims the frame and reads its image into the (empty) buffer.
    pub take: Take,
}

/// See [`Offer::take`].
pub type Take = Box<dyn FnOnce(&mut Vec<u8>) -> Taken + Send>;

/// What came of taking hold of a frame.
#[derive(Debug)]
pub enum Taken {
    /// The frame is claimed and its image is in the buffer.
    Frame(Frame, Receipt),
    /// The frame is claimed, but it is no image that can be published (the bytes, if any, are in the buffer).
    Flawed(Frame, Receipt, crate::settle::Refusal),
    /// Nothing to do: it vanished, is not finished, or the source has dealt with it.
    Gone,
}

impl fmt::Debug for Offer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Offer({} bytes)", self.image_bytes)
    }
}

/// The sources' end of the queue.
#[derive(Clone)]
pub struct Intake {}

/// One registered line. Dropping it takes the line out of the queue; frames in hand are not touched.
pub struct Ready {}

impl Intake {
    /// Registers the line of one detector.
    pub fn register(&self, _detector: Arc<Detector>, _line: Arc<dyn Line>) -> Ready {
        Ready {}
    }
}

impl Ready {
    /// Says that the line has something. Cheap; may be called from any thread, also when it was said before.
    pub fn ready(&self) {}
}
