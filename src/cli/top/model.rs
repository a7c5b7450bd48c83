//! What `framegate top` shows, and what keys do to it. Pure: no terminal, no clock, no daemon.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::time::Duration;

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use jiff::Timestamp;

use crate::cli::status::shown;
use crate::daemon::{DetectorStatus, SourceStatus, Status};
use crate::metrics::Condition;
use crate::source;

/// Letters of a filter; a name is hardly longer.
const FILTER_CHARS_MAX: usize = 100;

/// Everything that is on the screen.
#[derive(Clone, Debug)]
pub(super) struct Model {
    /// How often the daemon is asked.
    pub(super) every: Duration,
    /// Whether colours may be added to what words and signs say.
    pub(super) colours: bool,
    /// The moment of the drawing.
    pub(super) now: Timestamp,
    /// What the daemon said last, and when that was.
    pub(super) status: Status,
    pub(super) said: Timestamp,
    /// Since when the daemon cannot be asked, and why.
    pub(super) away: Option<(Timestamp, String)>,
    pub(super) paused: bool,
    pub(super) mode: Mode,
    pub(super) sort: Column,
    pub(super) reversed: bool,
    /// Detectors whose name holds this are shown.
    pub(super) filter: String,
    /// The detector under the cursor, by name, so that it stays under it whatever the order.
    selected: Option<String>,
}

/// What the keys mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// They act on the table.
    Table,
    /// They close the help.
    Help,
    /// They are letters of the filter.
    Filter,
}

/// What is known about a detector, as the table has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Column {
    Name,
    State,
    Rate,
    Waiting,
    Delivery,
    Longest,
    Last,
    Published,
    Dead,
}

impl Column {
    /// From left to right.
    pub(super) const ALL: [Column; 9] = [
        Column::Name,
        Column::State,
        Column::Rate,
        Column::Waiting,
        Column::Delivery,
        Column::Longest,
        Column::Last,
        Column::Published,
        Column::Dead,
    ];

    fn beside(self, steps: usize) -> Self {
        let at = Self::ALL.iter().position(|it| *it == self).unwrap_or(0);
        Self::ALL[(at + steps) % Self::ALL.len()]
    }

    /// What is worth a look first: trouble, then much before little.
    fn compare(self, a: &DetectorStatus, b: &DetectorStatus) -> Ordering {
        let optional = |a: Option<f64>, b: Option<f64>| b.unwrap_or(-1.0).total_cmp(&a.unwrap_or(-1.0));
        match self {
            Column::Name => Ordering::Equal,
            Column::State => a.counts.condition().cmp(&b.counts.condition()),
            Column::Rate => b.rate.total_cmp(&a.rate),
            Column::Waiting => b.counts.pending.cmp(&a.counts.pending),
            Column::Delivery => optional(a.delivery_ms, b.delivery_ms),
            Column::Longest => optional(a.delivery_max_ms, b.delivery_max_ms),
            // Who was never heard comes before who was heard long ago.
            Column::Last => a.counts.last_frame_ms.cmp(&b.counts.last_frame_ms),
            Column::Published => b.counts.published.cmp(&a.counts.published),
            Column::Dead => b.counts.dead_lettered.cmp(&a.counts.dead_lettered),
        }
    }
}

impl Model {
    pub(super) fn new(status: Status, now: Timestamp, every: Duration, colours: bool) -> Self {
        Self {
            every,
            colours,
            now,
            status,
            said: now,
            away: None,
            paused: false,
            mode: Mode::Table,
            sort: Column::State,
            reversed: false,
            filter: String::new(),
            selected: None,
        }
    }

    /// The daemon answered, or could not be asked. What it said before stays on the screen.
    pub(super) fn heard(&mut self, answer: Result<Status, String>) {
        match answer {
            Ok(status) => (self.status, self.said, self.away) = (status, self.now, None),
            Err(why) => self.away = Some((self.away.take().map_or(self.now, |(since, _)| since), why)),
        }
    }

    /// The detectors that fit the filter, in order.
    pub(super) fn detectors(&self) -> Vec<&DetectorStatus> {
        let wanted = self.filter.to_lowercase();
        let fits = |it: &&DetectorStatus| shown(&it.name).to_lowercase().contains(&wanted);
        let mut detectors: Vec<_> = self.status.detectors.iter().filter(fits).collect();
        detectors.sort_by(|a, b| {
            let order = self.sort.compare(a, b).then_with(|| a.name.cmp(&b.name));
            if self.reversed { order.reverse() } else { order }
        });
        detectors
    }

    /// The place of the cursor among these, once it was moved.
    pub(super) fn cursor(&self, detectors: &[&DetectorStatus]) -> Option<usize> {
        let name = self.selected.as_deref()?;
        detectors.iter().position(|it| it.name == name)
    }

    /// Why a detector is not well; `None`: it is.
    pub(super) fn trouble(&self, detector: &DetectorStatus) -> Option<&str> {
        match detector.counts.condition() {
            Condition::Well | Condition::Gone => None,
            Condition::Silent => Some("no frame for longer than its silence_alarm"),
            Condition::Held => {
                let source = source::of_name(&detector.name, &self.status.sources, |source| &source.name);
                let held = source.and_then(|source| source.held.as_deref());
                Some(held.unwrap_or("not looked at yet"))
            }
        }
    }

    /// Held entries that no row of the table tells of: no frame of theirs has come yet.
    pub(super) fn held_unseen(&self) -> impl Iterator<Item = (&SourceStatus, &str)> {
        let owner = |it: &DetectorStatus| source::of_name(&it.name, &self.status.sources, |source| &source.name);
        let seen: BTreeSet<&str> = self.status.detectors.iter().filter_map(owner).map(|owner| &*owner.name).collect();
        let held = self.status.sources.iter().filter_map(|source| Some((source, source.held.as_deref()?)));
        held.filter(move |(source, _)| !seen.contains(&*source.name))
    }

    /// A key was pressed while `page` detectors were on the screen. Break: the end.
    pub(super) fn key(&mut self, key: KeyEvent, page: usize) -> ControlFlow<()> {
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return if key.code == KeyCode::Char('c') { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        }
        match self.mode {
            Mode::Table => self.act(key.code, page),
            Mode::Help if key.code == KeyCode::Char('q') => ControlFlow::Break(()),
            Mode::Help => {
                self.mode = Mode::Table;
                ControlFlow::Continue(())
            }
            Mode::Filter => {
                self.type_filter(key.code);
                ControlFlow::Continue(())
            }
        }
    }

    fn act(&mut self, key: KeyCode, page: usize) -> ControlFlow<()> {
        let page = isize::try_from(page.max(1)).unwrap_or(isize::MAX);
        #[expect(clippy::wildcard_enum_match_arm, reason = "a foreign enum; keys without a meaning do nothing")]
        match key {
            KeyCode::Esc if !self.filter.is_empty() => self.filter.clear(),
            KeyCode::Char('q') | KeyCode::Esc => return ControlFlow::Break(()),
            KeyCode::Char('?' | 'h') | KeyCode::F(1) => self.mode = Mode::Help,
            KeyCode::Char(' ') => self.paused = !self.paused,
            KeyCode::Char('/') => self.mode = Mode::Filter,
            KeyCode::Char('s' | '>') | KeyCode::Right => self.sort = self.sort.beside(1),
            KeyCode::Char('S' | '<') | KeyCode::Left => self.sort = self.sort.beside(Column::ALL.len() - 1),
            KeyCode::Char('r') => self.reversed = !self.reversed,
            KeyCode::Up | KeyCode::Char('k') => self.move_by(-1),
            KeyCode::Down | KeyCode::Char('j') => self.move_by(1),
            KeyCode::PageUp => self.move_by(-page),
            KeyCode::PageDown => self.move_by(page),
            KeyCode::Home | KeyCode::Char('g') => self.move_by(isize::MIN),
            KeyCode::End | KeyCode::Char('G') => self.move_by(isize::MAX),
            _ => {}
        }
        ControlFlow::Continue(())
    }

    fn type_filter(&mut self, key: KeyCode) {
        #[expect(clippy::wildcard_enum_match_arm, reason = "a foreign enum; keys without a meaning do nothing")]
        match key {
            KeyCode::Enter => self.mode = Mode::Table,
            KeyCode::Esc => {
                self.mode = Mode::Table;
                self.filter.clear();
            }
            KeyCode::Backspace => {
                self.filter.pop();
            }
            KeyCode::Char(c) if self.filter.chars().count() < FILTER_CHARS_MAX => self.filter.push(c),
            _ => {}
        }
    }

    /// Moves the cursor; the first move puts it where it is from the start: on the first detector.
    fn move_by(&mut self, steps: isize) {
        let detectors = self.detectors();
        let last = detectors.len().saturating_sub(1);
        let to = match self.cursor(&detectors) {
            Some(at) => at.saturating_add_signed(steps).min(last),
            None if steps == isize::MAX => last,
            None => 0,
        };
        self.selected = detectors.get(to).map(|it| it.name.clone());
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    pub(in super::super) const NOW: &str = "2026-11-23T11:00:00Z";

    /// What a daemon with detectors of these names says: each has a rate and a backlog of its own.
    pub(in super::super) fn status(names: &[&str]) -> Status {
        let now = NOW.parse::<Timestamp>().unwrap().as_millisecond();
        let detector = |(n, name): (usize, &&str)| {
            json!({ "name": name, "rate": n as f64 + 0.5, "delivery_ms": 2.5, "delivery_max_ms": 40.0, "counts": {
                "received": 1000 * n, "published": 900 * n, "dead_lettered": n, "dropped": 0, "returned": 0, "refused": 0,
                "pending": 99 * n, "up": n != 1, "served": true, "silent": n == 2,
                "last_frame_ms": (n > 0).then(|| now - 1000 * i64::try_from(n * n * 7).unwrap()) } })
        };
        serde_json::from_value(json!({
            "version": "1.2.3", "pid": 4711, "uptime_seconds": 11_000, "admin": "127.0.0.1:9464",
            "engine": { "state": "open", "since": "2026-11-23T10:50:00Z", "reason": "", "advice": "",
                "concurrency_limit": 16, "in_flight": 3, "waiting": 5, "token_expires": null,
                "clock_skew_seconds": 0.2, "insecure": false },
            "sources": names.iter().enumerate().map(|(n, name)| json!({ "name": name, "place": "/srv/x",
                "held": (n == 1).then_some("/srv/x is mounted read-only") })).collect::<Vec<_>>(),
            "detectors": names.iter().enumerate().map(detector).collect::<Vec<_>>(),
            "dead_letters": 3, "dead_letter_bytes": 123_456, "spool_frames": 0, "spool_bytes": 4096,
            "spool_max_bytes": 2_147_483_648_u64, "memory_in_use_bytes": 12_582_912, "memory_budget_bytes": 268_435_456,
            "push": "127.0.0.1:5009"
        }))
        .unwrap()
    }

    pub(in super::super) fn model(names: &[&str]) -> Model {
        Model::new(status(names), NOW.parse().unwrap(), Duration::from_secs(1), false)
    }

    fn names(model: &Model) -> Vec<&str> {
        model.detectors().iter().map(|it| &*it.name).collect()
    }

    fn press(model: &mut Model, keys: &str) -> bool {
        keys.chars().any(|c| {
            let code = match c {
                '\n' => KeyCode::Enter,
                '\u{1b}' => KeyCode::Esc,
                '\u{8}' => KeyCode::Backspace,
                c => KeyCode::Char(c),
            };
            model.key(KeyEvent::from(code), 2).is_break()
        })
    }

    #[test]
    fn trouble_comes_first_and_every_column_sorts_both_ways() {
        let mut model = model(&["Lobby", "Door", "Yard", "Roof"]);
        assert_eq!(names(&model), ["Door", "Yard", "Lobby", "Roof"], "held, silent, well");
        for (column, first) in [
            (Column::Rate, "Roof"),
            (Column::Waiting, "Roof"),
            (Column::Delivery, "Door"),
            (Column::Longest, "Door"),
            (Column::Last, "Lobby"),
            (Column::Published, "Roof"),
            (Column::Dead, "Roof"),
            (Column::Name, "Door"),
            (Column::State, "Door"),
        ] {
            assert!(!press(&mut model, "s"));
            assert_eq!((model.sort, names(&model)[0]), (column, first));
            let mut backwards = names(&model).into_iter().map(str::to_owned).collect::<Vec<_>>();
            backwards.reverse();
            press(&mut model, "r");
            assert_eq!(names(&model), backwards, "{column:?}");
            press(&mut model, "r");
        }
        press(&mut model, "S");
        assert_eq!(model.sort, Column::Name);
    }

    #[test]
    fn the_cursor_moves_within_bounds_and_stays_with_its_detector() {
        let mut model = model(&["a", "b", "c", "d", "e"]);
        let at = |model: &Model| model.cursor(&model.detectors());
        assert_eq!(at(&model), None, "nothing is marked before somebody asks");
        press(&mut model, "jjj");
        assert_eq!(at(&model), Some(2));
        let marked = names(&model)[2].to_owned();
        press(&mut model, "r");
        assert_eq!(names(&model)[at(&model).unwrap()], marked);
        for (code, place) in [
            (KeyCode::End, 4),
            (KeyCode::Down, 4),
            (KeyCode::PageUp, 2),
            (KeyCode::PageUp, 0),
            (KeyCode::Up, 0),
            (KeyCode::PageDown, 2),
            (KeyCode::Home, 0),
        ] {
            assert!(model.key(KeyEvent::from(code), 2).is_continue());
            assert_eq!(at(&model), Some(place), "{code:?}");
        }
        model.heard(Ok(status(&[])));
        press(&mut model, "jG");
        assert_eq!(at(&model), None);
    }

    #[test]
    fn a_filter_is_typed_kept_and_cleared() {
        let mut model = model(&["Lobby", "Door", "Side door"]);
        press(&mut model, "/DOORq\u{8}");
        assert_eq!(model.mode, Mode::Filter);
        assert_eq!(names(&model), ["Door", "Side door"]);
        press(&mut model, "\n");
        assert_eq!((model.mode, &*model.filter), (Mode::Table, "DOOR"));
        assert!(!press(&mut model, "\u{1b}"), "the first Esc clears the filter");
        assert_eq!(names(&model).len(), 3);
        press(&mut model, "/x\u{1b}");
        assert_eq!((model.mode, &*model.filter), (Mode::Table, ""));
        press(&mut model, &format!("/{}", "x".repeat(500)));
        assert_eq!(model.filter.len(), FILTER_CHARS_MAX);
    }

    #[test]
    fn it_ends_by_q_escape_and_control_c_whatever_is_open() {
        let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        for opened in ["", "/", "?"] {
            let mut model = model(&["a"]);
            press(&mut model, opened);
            assert!(model.key(control_c, 2).is_break(), "{opened}");
        }
        assert!(press(&mut model(&["a"]), "q"));
        assert!(press(&mut model(&["a"]), "?q"));
        assert!(press(&mut model(&["a"]), "\u{1b}"));
        let mut model = model(&["a"]);
        assert!(!press(&mut model, "?\u{1b}") && model.mode == Mode::Table, "escape closes the help");
        assert!(!press(&mut model, " ") && model.paused);
        assert!(!press(&mut model, "   xyz") && !model.paused);
    }

    #[test]
    fn a_daemon_that_goes_away_is_remembered_with_the_time_and_forgotten_when_it_is_back() {
        let mut model = model(&["a"]);
        let since = model.now;
        model.heard(Err("refused".into()));
        model.now += Duration::from_secs(5);
        model.heard(Err("gone".into()));
        assert_eq!(model.away, Some((since, "gone".into())));
        assert_eq!((names(&model), model.said), (vec!["a"], since), "what was said last stays");
        model.heard(Ok(status(&["b"])));
        assert_eq!((model.away.is_none(), names(&model), model.said), (true, vec!["b"], model.now));
    }

    #[test]
    fn a_held_entry_is_told_by_its_detectors_or_by_itself() {
        let mut model = model(&["a", "{path.0}-cam"]);
        model.status.detectors.remove(1);
        let held: Vec<&str> = model.held_unseen().map(|(source, _)| &*source.name).collect();
        assert_eq!(held, ["{path.0}-cam"], "none of its detectors is known");
        model.status.detectors[0].name = "Lobby-cam".into();
        assert_eq!(model.held_unseen().count(), 0);
        model.status.detectors[0].counts.up = false;
        assert_eq!(model.trouble(&model.status.detectors[0]), Some("/srv/x is mounted read-only"));
    }
}
