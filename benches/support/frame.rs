//! A frame that has just come, for what only builds bodies.

use std::sync::Arc;

use framegate::frame::{Detector, Frame, FrameId, SourceKind};
use jiff::Timestamp;

pub(crate) fn frame(detector: &Arc<Detector>) -> Frame {
    Frame {
        id: FrameId::generate(),
        detector: detector.clone(),
        detect_time: Timestamp::now(),
        received_at: Timestamp::now(),
        noticed: tokio::time::Instant::now(),
        source: SourceKind::Directory,
        original_name: "face.jpg".into(),
        image_bytes: 0,
    }
}
