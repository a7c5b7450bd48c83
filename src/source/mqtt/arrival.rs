//! A message as the spool takes it: whose frame it is, when it was detected, and what is wrong with it. No I/O.
//!
//! What is wrong with it goes into the spool, too: so it is safe before it is acknowledged, and becomes one dead letter.

use std::sync::Arc;

use jiff::Timestamp;

use super::wire::Publish;
use crate::frame::{FrameId, SourceKind};
use crate::metrics::Metrics;
use crate::settle::{Reason, Refusal};
use crate::source::inbox::{id_of_parts, refusal};
use crate::source::message::{self, Known};
use crate::source::spool::{self, Arrival, Image};
use crate::source::{Entry, Surroundings, Template, believed};

/// What messages of one entry are read by.
pub(super) struct Reader {
    entry: Arc<Entry>,
    template: Option<Template>,
    max_frame: u64,
    metrics: Arc<Metrics>,
}

impl Reader {
    pub(super) fn new(around: &Surroundings) -> Self {
        let entry = around.entry.clone();
        Self {
            template: Template::parse(&entry.name, entry.source.placeholders()).ok(),
            max_frame: around.max_frame,
            metrics: around.metrics.clone(),
            entry,
        }
    }

    /// Whether every message is the same detector's.
    pub(super) fn is_fixed(&self) -> bool {
        self.template.as_ref().is_some_and(Template::is_fixed)
    }

    /// The name of a message's detector; the entry's own where it lacks what a name is made of.
    pub(super) fn name(&self, publish: &Publish) -> String {
        self.filled(publish, None).unwrap_or_else(|_| self.entry.name.clone())
    }

    /// Whose frame it is, and what it says of itself.
    pub(super) fn read(&self, publish: Publish) -> Arrival {
        let (entry, received_at) = (&self.entry, Timestamp::now());
        let (image, known, mut flaw) = match self.image(&publish) {
            Ok((image, known)) => (image, known, None),
            Err(flaw) => (Image::raw(publish.payload.clone()), Known::default(), Some(flaw)),
        };
        let name = self.filled(&publish, known.detector_name.as_deref()).unwrap_or_else(|why| {
            flaw.get_or_insert_with(|| refusal(Reason::Unsupported, why));
            entry.name.clone()
        });
        Arrival {
            id: if flaw.is_some() { id_of(entry, &publish) } else { FrameId::generate() },
            entry: entry.name.as_str().into(),
            source: SourceKind::Mqtt,
            detector: name,
            time_zone: known.time_zone.unwrap_or_else(|| entry.time_zone.clone()),
            detect_time: believed(known.detect_time, received_at, &self.metrics).unwrap_or(received_at),
            received_at,
            name: publish.topic,
            image,
            flaw,
        }
    }

    /// The detector's name, or why there is none.
    fn filled(&self, publish: &Publish, said: Option<&str>) -> Result<String, String> {
        let levels: Vec<&[u8]> = publish.topic.split('/').map(str::as_bytes).collect();
        let said = said.or(publish.beside[0].as_deref());
        let filled = self.template.as_ref().and_then(|it| it.fill(&levels, |_| said.map(str::to_owned)));
        message::named(&self.entry.name, filled)
    }

    /// The image, and what is known about it. Bytes are not looked at: those that are none become a dead letter anyway.
    fn image(&self, publish: &Publish) -> Result<(Image, Known), Refusal> {
        if let Some(whole) = publish.cut_from {
            let mut flaw = self.too_large(whole);
            flaw.message.push_str("; only its beginning is kept");
            return Err(flaw);
        }
        if let Some(why) = &publish.malformed {
            return Err(refusal(Reason::Unsupported, format!("the message: {why}")));
        }
        let [detector_name, detect_time, time_zone] = &publish.beside;
        let beside = Known::from_fields(detector_name.as_deref(), detect_time.as_deref(), time_zone.as_deref());
        let read = beside.and_then(|beside| message::payload(&publish.payload, beside));
        let (image, known) = read.map_err(|flaw| unsupported(&flaw))?;
        let image = match &image {
            message::Image::Raw(bytes) if bytes.len() as u64 > self.max_frame => {
                return Err(self.too_large(bytes.len()));
            }
            message::Image::Raw(_) => Image::raw(publish.payload.clone()),
            message::Image::Base64(_) => {
                Image::look(&image, &publish.payload, self.max_frame).map_err(|flaw| match flaw {
                    spool::Flaw::TooLarge => self.too_large(publish.payload.len()),
                    spool::Flaw::Unusable(message) => unsupported(&message::Flaw { field: Some("expanded"), message }),
                })?
            }
        };
        Ok((image, known))
    }

    fn too_large(&self, bytes: usize) -> Refusal {
        refusal(Reason::TooLarge, format!("{bytes} bytes; `encode.max_frame` is {}", self.max_frame))
    }
}

fn unsupported(flaw: &message::Flaw) -> Refusal {
    refusal(Reason::Unsupported, format!("the message: {flaw}"))
}

/// The same for each delivery of what becomes a dead letter: it becomes one, whenever we are killed. Of frames nobody
/// can tell: two cameras may well send the same bytes.
fn id_of(entry: &Entry, publish: &Publish) -> FrameId {
    let (place, whole) = (entry.place(), publish.cut_from.unwrap_or(publish.payload.len()).to_le_bytes());
    let beside = publish.beside.iter().map(|it| it.as_deref().unwrap_or_default().as_bytes());
    let parts = [place.as_bytes(), publish.topic.as_bytes(), &whole, &publish.payload];
    id_of_parts(0, parts.into_iter().chain(beside))
}
