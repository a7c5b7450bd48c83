//! The queue between sources and the encode workers: the byte budget, and turns between detectors.
//!
//! Frames wait at their source, not in here. A source registers one [`Line`] for each detector and says when it has
//! something; the queue pulls the line's next frame at the moment there is room for it, so the freshest really goes first.
//!
//! Three bounds make it the one place of back-pressure, and keep a flooding, poisoned or rate-limited detector from
//! slowing the others: all frames in hand fit the byte budget; one line holds no more than its share of it; and only
//! [`AHEAD_MAX`] frames of a line (times its weight) are on their way to the engine without having begun their first attempt.
//! What it costs: a frame at the head that waits for room in the budget keeps the lines behind it waiting, so that large
//! frames are not overtaken for ever by small ones.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::frame::{Detector, Frame};
use crate::metrics::{DetectorMetrics, Metrics};
use crate::settle::Receipt;

/// Frames of a line of weight 1 that were delivered and have not begun to be published. It goes up with the weight:
/// behind a slow engine the lines share the rate in proportion to their frames ahead.
pub const AHEAD_MAX: u32 = 16;
/// Weights above this one get no more frames ahead.
const AHEAD_WEIGHT_MAX: u32 = 64;
/// What one frame of weight 1 moves its line's pass by.
const STRIDE: u64 = 1 << 20;
/// Bytes: the JSON around the image, headers and bookkeeping of one frame.
const FRAME_OVERHEAD: u64 = 1024;

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
    /// Runs once on an encode worker, where blocking is allowed: claims the frame and reads its image into the (empty)
    /// buffer. Dropped unrun (the line was removed, the daemon stops): the frame was never touched.
    pub take: Take,
}

/// See [`Offer::take`].
pub type Take = Box<dyn FnOnce(&mut Vec<u8>) -> Taken + Send>;

/// What came of taking hold of a frame.
#[derive(Debug)]
pub enum Taken {
    /// The frame is claimed and its image is in the buffer.
    Frame(Frame, Receipt),
    /// The frame is claimed and its image is in the buffer as the base64 that the engine wants, which its source has
    /// checked: of a whole image, standard alphabet, padded.
    Base64(Frame, Receipt),
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

/// A queue that holds at most `budget_bytes` of frames at once (or one larger frame).
pub fn queue(budget_bytes: u64, metrics: &Arc<Metrics>) -> (Intake, Outlet) {
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            budget: 0,
            in_use: 0,
            lines: BTreeMap::new(),
            turns: BTreeSet::new(),
            next_id: 0,
            virtual_time: 0,
            active: 0,
            over_share: 0,
            closed: false,
        }),
        wake: Notify::new(),
        metrics: metrics.clone(),
    });
    let intake = Intake { door: Arc::new(Door { shared: shared.clone() }) };
    intake.set_budget(budget_bytes);
    (intake, Outlet { shared })
}

/// The sources' end of the queue.
#[derive(Clone)]
pub struct Intake {
    door: Arc<Door>,
}

/// One registered line. Dropping the last clone takes the line out of the queue; frames in hand are not touched.
#[derive(Clone)]
pub struct Ready {
    registration: Arc<Registration>,
}

impl Intake {
    /// Registers the line of one detector. It has its turn once it says that it is ready.
    pub fn register(&self, detector: Arc<Detector>, line: Arc<dyn Line>) -> Ready {
        let said = Arc::new(AtomicBool::new(false));
        let mut state = self.door.shared.lock();
        let id = state.next_id;
        state.next_id += 1;
        let weight = detector.weight.max(1);
        let slot = Slot {
            counts: self.door.shared.metrics.detector(&detector.name),
            detector,
            line: Some(line),
            said: said.clone(),
            offer: None,
            guess: 0,
            turn: Turn::Idle,
            pass: 0,
            stride: (STRIDE / u64::from(weight)).max(1),
            ahead: 0,
            ahead_max: AHEAD_MAX * weight.min(AHEAD_WEIGHT_MAX),
            frames: 0,
            bytes: 0,
            active: false,
        };
        state.lines.insert(id, slot);
        Ready { registration: Arc::new(Registration { door: self.door.clone(), id, said }) }
    }

    /// A new budget, from a reload. Frames in hand keep what they have.
    pub fn set_budget(&self, budget_bytes: u64) {
        let shared = &self.door.shared;
        let mut state = shared.lock();
        state.budget = budget_bytes.max(1);
        state.unpark_over_share();
        shared.metrics.gauge("memory_budget_bytes", &[]).set(budget_bytes as f64);
        drop(state);
        shared.wake.notify_one();
    }

    /// Shows how full the queue is.
    pub fn meter(&self) -> Meter {
        Meter(self.door.shared.clone())
    }
}

/// Shows how full the queue is, and keeps it open for nobody.
#[derive(Clone)]
pub struct Meter(Arc<Shared>);

impl Meter {
    /// Bytes that the frames in hand take, and those that they may take.
    pub fn bytes(&self) -> (u64, u64) {
        let state = self.0.lock();
        (state.in_use, state.budget)
    }
}

impl Ready {
    /// Says that the line has something. Cheap; may be called from any thread, also when it was said before.
    pub fn ready(&self) {
        // Said and not yet heard: the pull that will hear it comes after this, so it sees what the caller just added.
        if self.registration.said.swap(true, Ordering::SeqCst) {
            return;
        }
        let shared = &self.registration.door.shared;
        shared.lock().enter(self.registration.id);
        shared.wake.notify_one();
    }
}

/// The workers' end of the queue.
pub struct Outlet {
    shared: Arc<Shared>,
}

/// A frame whose turn it is.
pub struct Delivery {
    /// Whose frame it is.
    pub detector: Arc<Detector>,
    /// Where what becomes of it is counted: looked up once for the line, not for each frame.
    pub counts: Arc<DetectorMetrics>,
    /// To be run on an encode worker.
    pub take: Take,
    /// Its room in the queue's bounds.
    pub lease: Lease,
}

impl Outlet {
    /// The frame whose turn it is, once there is room for it. `None`: no [`Intake`] and no [`Ready`] are left.
    ///
    /// Cancel safe: a frame leaves its line and is returned, or stays with its line, without an await in between.
    pub async fn next(&mut self) -> Option<Delivery> {
        loop {
            // A flood must leave the thread to others now and then.
            tokio::task::coop::consume_budget().await;
            match self.look() {
                Look::Delivery(delivery) => return Some(delivery),
                Look::Again => {}
                Look::Wait => self.shared.wake.notified().await,
                Look::End => return None,
            }
        }
    }

    fn look(&self) -> Look {
        let mut state = self.shared.lock();
        match state.pick() {
            Pick::Deliver(id) => state.deliver(id, &self.shared).map_or(Look::Again, Look::Delivery),
            Pick::Pull(id, line) => {
                drop(state);
                // Not under the lock: the source has a lock of its own and may say `ready` under it.
                let offer = line.next();
                let left = self.shared.lock().pulled(id, offer);
                drop((left, line));
                Look::Again
            }
            Pick::Wait => Look::Wait,
            Pick::End => Look::End,
        }
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        // Offers that were pulled and had no room yet go back to their sources, which wait for them when they stop.
        let left: Vec<Offer> = self.shared.lock().lines.values_mut().filter_map(|slot| slot.offer.take()).collect();
        drop(left);
    }
}

enum Look {
    Delivery(Delivery),
    Again,
    Wait,
    End,
}

/// A frame's room in the queue: its bytes, and its place among the frames ahead of publishing. Dropping it frees both.
#[must_use]
pub struct Lease {
    shared: Arc<Shared>,
    line: u64,
    charge: u64,
    begun: AtomicBool,
}

impl Lease {
    /// The first attempt to publish begins: the line may deliver another frame.
    pub fn begun(&self) {
        if self.begun.swap(true, Ordering::SeqCst) {
            return;
        }
        if self.shared.lock().begun(self.line) {
            self.shared.wake.notify_one();
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        let wake = state.ended(self.line, self.charge, *self.begun.get_mut());
        self.shared.metrics.memory_in_use.set(state.in_use as f64);
        drop(state);
        if wake {
            self.shared.wake.notify_one();
        }
    }
}

/// Held by every [`Intake`] and [`Ready`]; gone with the last of them.
struct Door {
    shared: Arc<Shared>,
}

impl Drop for Door {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.wake.notify_one();
    }
}

struct Registration {
    door: Arc<Door>,
    id: u64,
    /// The line said that it is ready, and was not pulled since.
    said: Arc<AtomicBool>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let left = self.door.shared.lock().remove(self.id);
        self.door.shared.wake.notify_one();
        // A source's own code may run here, so the lock is not held.
        drop(left);
    }
}

struct Shared {
    state: Mutex<State>,
    wake: Notify,
    metrics: Arc<Metrics>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct State {
    budget: u64,
    in_use: u64,
    lines: BTreeMap<u64, Slot>,
    /// The lines whose turn is [`Turn::Waiting`], by pass.
    turns: BTreeSet<(u64, u64)>,
    next_id: u64,
    /// The pass of the line that delivered last: where newcomers begin, so that nobody saves turns up.
    virtual_time: u64,
    /// Lines that hold or wait for frames: the budget is shared among them.
    active: u64,
    /// Lines that are [`Turn::OverShare`].
    over_share: usize,
    closed: bool,
}

struct Slot {
    detector: Arc<Detector>,
    counts: Arc<DetectorMetrics>,
    /// `None`: removed, and kept only for the frames in hand.
    line: Option<Arc<dyn Line>>,
    said: Arc<AtomicBool>,
    /// Pulled, and then there was no room for it.
    offer: Option<Offer>,
    /// Charge of the line's last frame: room for as much is awaited before the next one is pulled.
    guess: u64,
    turn: Turn,
    pass: u64,
    stride: u64,
    ahead: u32,
    ahead_max: u32,
    frames: u64,
    bytes: u64,
    active: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// Has nothing.
    Idle,
    /// Among the turns.
    Waiting,
    /// Has something, but too many frames ahead: until one of them begins.
    TooFarAhead,
    /// Has something, but holds its share of the budget: until it holds less or the share grows.
    OverShare,
}

enum Pick {
    Deliver(u64),
    Pull(u64, Arc<dyn Line>),
    Wait,
    End,
}

/// What a removed line leaves.
struct Left {
    _line: Option<Arc<dyn Line>>,
    _offer: Option<Offer>,
}

impl Slot {
    fn need(&self, budget: u64) -> u64 {
        self.offer.as_ref().map_or(self.guess, charge).min(budget)
    }
}

impl State {
    /// The line whose turn it is and for which there is room.
    fn pick(&mut self) -> Pick {
        while let Some(&(pass, id)) = self.turns.first() {
            let share = self.budget / self.active.max(1);
            let Some(slot) = self.lines.get_mut(&id) else {
                self.turns.remove(&(pass, id));
                continue;
            };
            let need = slot.need(self.budget);
            if slot.ahead >= slot.ahead_max {
                slot.turn = Turn::TooFarAhead;
                self.turns.remove(&(pass, id));
                continue;
            }
            if slot.frames > 0 && slot.bytes + need > share {
                slot.turn = Turn::OverShare;
                self.over_share += 1;
                self.turns.remove(&(pass, id));
                continue;
            }
            if self.in_use > 0 && self.in_use + need > self.budget {
                return Pick::Wait;
            }
            if slot.offer.is_some() {
                return Pick::Deliver(id);
            }
            if let Some(line) = slot.line.clone() {
                // Before the pull: what is said from here on is about frames that the pull may not see.
                slot.said.store(false, Ordering::SeqCst);
                return Pick::Pull(id, line);
            }
            self.turns.remove(&(pass, id));
        }
        if self.closed { Pick::End } else { Pick::Wait }
    }

    /// What a pull brought. Gives back an offer that nobody waits for any more.
    fn pulled(&mut self, id: u64, offer: Option<Offer>) -> Option<Offer> {
        let Some(slot) = self.lines.get_mut(&id) else { return offer };
        if slot.line.is_none() {
            return offer;
        }
        if offer.is_some() {
            slot.said.store(true, Ordering::SeqCst);
            slot.offer = offer;
        } else if !slot.said.load(Ordering::SeqCst) {
            self.turns.remove(&(slot.pass, id));
            slot.turn = Turn::Idle;
            slot.guess = 0;
            self.count_active(id);
        }
        None
    }

    fn deliver(&mut self, id: u64, shared: &Arc<Shared>) -> Option<Delivery> {
        let slot = self.lines.get_mut(&id)?;
        let offer = slot.offer.take()?;
        slot.guess = charge(&offer);
        let charge = slot.guess.min(self.budget);
        slot.frames += 1;
        slot.ahead += 1;
        slot.bytes += charge;
        self.in_use += charge;
        shared.metrics.memory_in_use.set(self.in_use as f64);
        self.turns.remove(&(slot.pass, id));
        self.virtual_time = self.virtual_time.max(slot.pass);
        slot.pass += slot.stride;
        self.turns.insert((slot.pass, id));
        let lease = Lease { shared: shared.clone(), line: id, charge, begun: AtomicBool::new(false) };
        Some(Delivery { detector: slot.detector.clone(), counts: slot.counts.clone(), take: offer.take, lease })
    }

    /// The line is ready, or no longer held back.
    fn enter(&mut self, id: u64) {
        let Some(slot) = self.lines.get_mut(&id) else { return };
        match slot.turn {
            Turn::Waiting => return,
            Turn::OverShare => self.over_share -= 1,
            Turn::Idle | Turn::TooFarAhead => {}
        }
        if slot.line.is_none() {
            return;
        }
        slot.turn = Turn::Waiting;
        slot.pass = slot.pass.max(self.virtual_time);
        self.turns.insert((slot.pass, id));
        self.count_active(id);
    }

    /// Whether the outlet should look again.
    fn begun(&mut self, id: u64) -> bool {
        let Some(slot) = self.lines.get_mut(&id) else { return false };
        slot.ahead -= 1;
        let held_back = slot.turn == Turn::TooFarAhead;
        if held_back {
            self.enter(id);
        }
        held_back
    }

    /// Whether the outlet should look again.
    fn ended(&mut self, id: u64, charge: u64, begun: bool) -> bool {
        self.in_use -= charge;
        if let Some(slot) = self.lines.get_mut(&id) {
            slot.frames -= 1;
            slot.bytes -= charge;
            slot.ahead -= u32::from(!begun);
            match slot.turn {
                Turn::TooFarAhead | Turn::OverShare => self.enter(id),
                Turn::Idle | Turn::Waiting => {}
            }
            self.count_active(id);
            self.forget_if_unused(id);
        }
        !self.turns.is_empty()
    }

    /// Takes a line out; what it leaves is to be dropped without the lock.
    fn remove(&mut self, id: u64) -> Option<Left> {
        let slot = self.lines.get_mut(&id)?;
        match slot.turn {
            Turn::Waiting => {
                self.turns.remove(&(slot.pass, id));
            }
            Turn::OverShare => self.over_share -= 1,
            Turn::Idle | Turn::TooFarAhead => {}
        }
        slot.turn = Turn::Idle;
        let left = Left { _line: slot.line.take(), _offer: slot.offer.take() };
        self.count_active(id);
        self.forget_if_unused(id);
        Some(left)
    }

    fn forget_if_unused(&mut self, id: u64) {
        if self.lines.get(&id).is_some_and(|slot| slot.line.is_none() && slot.frames == 0) {
            self.lines.remove(&id);
        }
    }

    fn count_active(&mut self, id: u64) {
        let Some(slot) = self.lines.get_mut(&id) else { return };
        let active = slot.turn != Turn::Idle || slot.frames > 0;
        if active == slot.active {
            return;
        }
        slot.active = active;
        if active {
            self.active += 1;
        } else {
            self.active -= 1;
            self.unpark_over_share();
        }
    }

    /// The share grew: every line that held too much of it may hold more.
    fn unpark_over_share(&mut self) {
        if self.over_share == 0 {
            return;
        }
        let parked: Vec<u64> =
            self.lines.iter().filter(|(_, slot)| slot.turn == Turn::OverShare).map(|(id, _)| *id).collect();
        for id in parked {
            self.enter(id);
        }
    }
}

/// What a frame takes of the budget: its base64 body and what is around it.
fn charge(offer: &Offer) -> u64 {
    offer.image_bytes.div_ceil(3).saturating_mul(4).saturating_add(FRAME_OVERHEAD)
}

macro_rules! opaque_debug {
    ($($name:ident),*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(stringify!($name))
            }
        }
    )*};
}
opaque_debug!(Intake, Ready, Outlet, Delivery, Lease);

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, VecDeque};
    use std::sync::atomic::AtomicU64;

    use futures_util::FutureExt;
    use proptest::prelude::*;
    use tokio::task::coop::unconstrained;

    use super::*;

    /// A line of sizes; `Ready` is kept beside it.
    #[derive(Default)]
    struct Sizes(Mutex<VecDeque<u64>>);

    impl Line for Sizes {
        fn next(&self) -> Option<Offer> {
            let image_bytes = self.0.lock().unwrap().pop_front()?;
            Some(Offer { image_bytes, take: Box::new(|_| Taken::Gone) })
        }
    }

    struct Source {
        sizes: Arc<Sizes>,
        ready: Ready,
    }

    impl Source {
        fn new(intake: &Intake, name: &str, weight: u32) -> Self {
            let sizes = Arc::new(Sizes::default());
            let detector = Detector { name: name.into(), time_zone: "UTC".into(), rate: 0.0, weight };
            let ready = intake.register(Arc::new(detector), sizes.clone());
            Self { sizes, ready }
        }

        fn push(&self, size: u64, times: usize) {
            self.sizes.0.lock().unwrap().extend(std::iter::repeat_n(size, times));
            self.ready.ready();
        }
    }

    const MIB: u64 = 1 << 20;
    /// Charged 5 KiB.
    const SMALL: u64 = 3 << 10;

    fn now(outlet: &mut Outlet) -> Option<Delivery> {
        unconstrained(outlet.next()).now_or_never().flatten()
    }

    fn all_now(outlet: &mut Outlet) -> Vec<Delivery> {
        std::iter::from_fn(|| now(outlet)).collect()
    }

    fn in_use(outlet: &Outlet) -> u64 {
        outlet.shared.lock().in_use
    }

    fn by_name<'a>(deliveries: impl IntoIterator<Item = &'a Delivery>) -> HashMap<String, usize> {
        let mut counts = HashMap::new();
        for delivery in deliveries {
            *counts.entry(delivery.detector.name.to_string()).or_default() += 1;
        }
        counts
    }

    #[test]
    fn turns_go_by_weight() {
        let (intake, mut outlet) = queue(MIB, &Metrics::new());
        let sources = [Source::new(&intake, "one", 1), Source::new(&intake, "three", 3)];
        for source in &sources {
            source.push(SMALL, 1000);
        }
        let mut counts = HashMap::<String, usize>::new();
        for _ in 0..400 {
            let delivery = now(&mut outlet).unwrap();
            *counts.entry(delivery.detector.name.to_string()).or_default() += 1;
        }
        assert_eq!((counts["one"], counts["three"]), (100, 300));
    }

    #[test]
    fn behind_a_slow_engine_the_weights_hold_too() {
        let (intake, mut outlet) = queue(100 * MIB, &Metrics::new());
        let sources = [Source::new(&intake, "one", 1), Source::new(&intake, "three", 3)];
        for source in &sources {
            source.push(SMALL, 1000);
        }
        let mut engine: VecDeque<_> = all_now(&mut outlet).into();
        let mut published = Vec::new();
        for _ in 0..400 {
            published.push(engine.pop_front().unwrap());
            published.last().unwrap().lease.begun();
            engine.extend(all_now(&mut outlet));
        }
        let counts = by_name(&published);
        assert!((295..=305).contains(&counts["three"]), "{counts:?}");
    }

    #[test]
    fn a_flood_does_not_starve_a_newcomer_and_idleness_saves_no_turns_up() {
        let (intake, mut outlet) = queue(MIB, &Metrics::new());
        let flood = Source::new(&intake, "flood", 1);
        let late = Source::new(&intake, "late", 1);
        flood.push(SMALL, 10_000);
        for _ in 0..1000 {
            drop(now(&mut outlet));
        }
        late.push(SMALL, 100);
        let next: Vec<_> = (0..20).map(|_| now(&mut outlet).unwrap()).collect();
        assert_eq!(by_name(&next), HashMap::from([("flood".into(), 10), ("late".into(), 10)]));
    }

    #[test]
    fn only_so_many_frames_of_a_line_are_ahead_of_publishing() {
        let (intake, mut outlet) = queue(100 * MIB, &Metrics::new());
        let held = Source::new(&intake, "held", 1);
        let other = Source::new(&intake, "other", 1);
        held.push(SMALL, 100);
        let ahead = all_now(&mut outlet);
        assert_eq!(ahead.len(), AHEAD_MAX as usize);
        other.push(SMALL, 5);
        assert_eq!(by_name(&all_now(&mut outlet)), HashMap::from([("other".into(), 5)]), "the others go on");
        ahead[3].lease.begun();
        ahead[3].lease.begun();
        assert_eq!(all_now(&mut outlet).len(), 1, "begun frees one place, once");
        drop(ahead);
        assert_eq!(all_now(&mut outlet).len(), AHEAD_MAX as usize);
    }

    #[test]
    fn a_line_holds_no_more_than_its_share_and_at_least_one_frame() {
        let (intake, mut outlet) = queue(100 << 10, &Metrics::new());
        let flood = Source::new(&intake, "flood", 1);
        let other = Source::new(&intake, "other", 1);
        let large = Source::new(&intake, "large", 1);
        flood.push(SMALL, 1000);
        other.push(SMALL, 1000);
        let held = all_now(&mut outlet);
        assert_eq!(by_name(&held), HashMap::from([("flood".into(), 10), ("other".into(), 10)]), "half the budget each");
        let (flood_held, _other_held): (Vec<_>, Vec<_>) = held.into_iter().partition(|d| &*d.detector.name == "flood");
        large.push(36 << 10, 3);
        drop(flood_held);
        let next = all_now(&mut outlet);
        assert_eq!(by_name(&next)["large"], 1, "49 KiB are more than a third, but one frame may go");
    }

    #[test]
    fn a_share_grows_when_others_have_nothing() {
        let (intake, mut outlet) = queue(100 << 10, &Metrics::new());
        let flood = Source::new(&intake, "flood", 1);
        let other = Source::new(&intake, "other", 1);
        flood.push(SMALL, 1000);
        other.push(SMALL, 1);
        let mut held = all_now(&mut outlet);
        // The ahead bound is not what is tested here.
        for delivery in &held {
            delivery.lease.begun();
        }
        held.extend(all_now(&mut outlet));
        assert_eq!(by_name(&held)["flood"], 10, "the other holds a frame, so it has a share");
        held.retain(|d| &*d.detector.name == "flood");
        held.extend(all_now(&mut outlet));
        assert_eq!(by_name(&held)["flood"], 20);
    }

    #[test]
    fn an_oversized_frame_takes_the_whole_budget_alone_and_is_not_overtaken() {
        let (intake, mut outlet) = queue(100 << 10, &Metrics::new());
        let large = Source::new(&intake, "large", 1);
        let small = Source::new(&intake, "small", 1);
        small.push(SMALL, 100);
        let first = now(&mut outlet).unwrap();
        large.push(8 * MIB, 2);
        let mut held = vec![first];
        held.extend(all_now(&mut outlet));
        assert_eq!(by_name(&held).get("large"), None, "it waits until it is alone");
        assert!(held.len() <= 2, "and the small ones do not overtake it");
        drop(held);
        let alone = now(&mut outlet).unwrap();
        assert_eq!((&*alone.detector.name, in_use(&outlet)), ("large", 100 << 10));
        assert!(now(&mut outlet).is_none());
        drop(alone);
        assert!(now(&mut outlet).is_some());
    }

    #[test]
    fn a_line_that_says_ready_while_it_is_pulled_is_heard() {
        /// Empty at the first pull; the frame and the wake-up come during it.
        struct Late(Mutex<Option<Ready>>, AtomicU64);
        impl Line for Late {
            fn next(&self) -> Option<Offer> {
                self.0.lock().unwrap().as_ref().unwrap().ready();
                let pulls = self.1.fetch_add(1, Ordering::SeqCst);
                (pulls == 1).then(|| Offer { image_bytes: 1, take: Box::new(|_| Taken::Gone) })
            }
        }
        let (intake, mut outlet) = queue(MIB, &Metrics::new());
        let line = Arc::new(Late(Mutex::default(), AtomicU64::new(0)));
        let detector = Detector { name: "late".into(), time_zone: "UTC".into(), rate: 0.0, weight: 1 };
        let ready = intake.register(Arc::new(detector), line.clone());
        *line.0.lock().unwrap() = Some(ready.clone());
        ready.ready();
        assert!(now(&mut outlet).is_some());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_wake_up_is_lost_between_threads() {
        const EACH: usize = 20_000;
        let (intake, mut outlet) = queue(MIB, &Metrics::new());
        let threads: Vec<_> = (0..3)
            .map(|n| {
                let source = Source::new(&intake, &n.to_string(), n + 1);
                std::thread::spawn(move || {
                    (0..EACH).for_each(|_| source.push(SMALL, 1));
                    source
                })
            })
            .collect();
        drop(intake);
        let (tx, rx) = std::sync::mpsc::channel::<Delivery>();
        let settler = std::thread::spawn(move || {
            rx.iter().enumerate().for_each(|(n, d)| if n % 2 == 0 { d.lease.begun() } else { drop(d) });
        });
        for n in 0..3 * EACH {
            let next = tokio::time::timeout(std::time::Duration::from_secs(20), outlet.next()).await;
            tx.send(next.unwrap_or_else(|_| panic!("stuck after {n}")).unwrap()).unwrap();
        }
        drop(tx);
        settler.join().unwrap();
        assert_eq!(in_use(&outlet), 0);
        for thread in threads {
            drop(thread.join().unwrap());
        }
        assert!(outlet.next().await.is_none(), "ends with the last handle");
    }

    #[tokio::test]
    async fn a_cancelled_wait_loses_neither_a_frame_nor_a_wake_up() {
        let (intake, mut outlet) = queue(12 << 10, &Metrics::new());
        let source = Source::new(&intake, "cam", 1);
        for n in 0..100 {
            assert!(outlet.next().now_or_never().is_none(), "nothing waits");
            source.push(SMALL + n, 3);
            let first = outlet.next().await.unwrap();
            let second = outlet.next().await.unwrap();
            assert!(outlet.next().now_or_never().is_none(), "no room for the third");
            drop(first);
            let third = outlet.next().await.unwrap();
            drop((second, third));
        }
        assert_eq!((in_use(&outlet), source.sizes.0.lock().unwrap().len()), (0, 0));
    }

    #[test]
    fn a_removed_line_leaves_its_turns_but_keeps_its_frames_in_hand() {
        let (intake, mut outlet) = queue(12 << 10, &Metrics::new());
        let gone = Source::new(&intake, "gone", 1);
        let stays = Source::new(&intake, "stays", 1);
        gone.push(SMALL, 10);
        let held = [now(&mut outlet).unwrap(), now(&mut outlet).unwrap()];
        assert!(now(&mut outlet).is_none(), "an offer of the line waits for room");
        stays.push(SMALL, 1);
        drop(gone);
        drop(held);
        assert_eq!(by_name(&all_now(&mut outlet)), HashMap::from([("stays".into(), 1)]));
        assert_eq!((in_use(&outlet), outlet.shared.lock().lines.len()), (0, 1));
        drop((stays, intake));
        assert!(unconstrained(outlet.next()).now_or_never().unwrap().is_none(), "the end");
        assert!(outlet.shared.lock().lines.is_empty());
    }

    #[test]
    fn a_new_budget_counts_at_once() {
        let metrics = Metrics::new();
        let (intake, mut outlet) = queue(12 << 10, &metrics);
        let source = Source::new(&intake, "cam", 1);
        source.push(SMALL, 10);
        let mut held = all_now(&mut outlet);
        assert_eq!(held.len(), 2);
        intake.set_budget(20 << 10);
        held.extend(all_now(&mut outlet));
        assert_eq!(held.len(), 4);
        let text = metrics.render();
        assert!(text.contains("framegate_memory_budget_bytes 20480"), "{text}");
        assert!(text.contains("framegate_memory_in_use_bytes 20480"), "{text}");
        intake.set_budget(SMALL);
        assert!(now(&mut outlet).is_none());
        drop(held);
        assert_eq!(all_now(&mut outlet).len(), 1, "larger than the whole budget: one at a time");
    }

    #[derive(Clone, Debug)]
    enum Act {
        Push(usize, u64),
        Next,
        Begun(usize),
        Settle(usize),
        Remove(usize),
        Budget(u64),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            4 => (0usize..4, 0u64..40_000).prop_map(|(line, size)| Act::Push(line, size)),
            6 => Just(Act::Next),
            2 => any::<prop::sample::Index>().prop_map(|i| Act::Begun(i.index(64))),
            3 => any::<prop::sample::Index>().prop_map(|i| Act::Settle(i.index(64))),
            1 => (0usize..4).prop_map(Act::Remove),
            1 => (1u64..100_000).prop_map(Act::Budget),
        ]
    }

    proptest! {
        #[test]
        fn bytes_return_to_zero_and_never_exceed_the_budget_but_for_one_large_frame(
            acts in prop::collection::vec(act(), 1..300)
        ) {
            let (intake, mut outlet) = queue(64 << 10, &Metrics::new());
            let mut sources: Vec<_> = (0..4).map(|n| Source::new(&intake, &n.to_string(), n + 1)).collect();
            let (mut held, mut pushed, mut delivered) = (Vec::new(), 0, 0);
            for act in acts {
                match act {
                    Act::Push(line, size) => {
                        sources[line].push(size, 1);
                        pushed += 1;
                    }
                    Act::Next => {
                        let next = now(&mut outlet);
                        if next.is_some() {
                            let state = outlet.shared.lock();
                            prop_assert!(state.in_use <= state.budget);
                        }
                        delivered += usize::from(next.is_some());
                        held.extend(next);
                    }
                    Act::Begun(n) if !held.is_empty() => held[n % held.len()].lease.begun(),
                    Act::Settle(n) if !held.is_empty() => drop(held.swap_remove(n % held.len())),
                    Act::Begun(_) | Act::Settle(_) => {}
                    Act::Remove(line) => {
                        pushed -= sources[line].sizes.0.lock().unwrap().len()
                            + usize::from(pulled_offer(&outlet, &sources[line]));
                        sources[line] = Source::new(&intake, "again", 1);
                    }
                    Act::Budget(bytes) => intake.set_budget(bytes),
                }
            }
            drop(held);
            prop_assert_eq!(in_use(&outlet), 0);
            while let Some(last) = now(&mut outlet) {
                delivered += 1;
                drop(last);
            }
            prop_assert_eq!(delivered, pushed, "every frame of a line that was not removed came out");
            drop((sources, intake));
            let state = outlet.shared.lock();
            prop_assert!(state.lines.is_empty() && state.turns.is_empty());
            prop_assert_eq!((state.in_use, state.active, state.over_share), (0, 0, 0));
        }
    }

    fn pulled_offer(outlet: &Outlet, source: &Source) -> bool {
        outlet.shared.lock().lines[&source.ready.registration.id].offer.is_some()
    }
}
