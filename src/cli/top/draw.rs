//! The screen of `framegate top`, drawn from the model alone. What does not fit is left out by its weight: first lines, then
//! columns. Everything that comes from outside is escaped and cut by the columns it takes; words say what colours add to.

use bytesize::ByteSize;
use ratatui::Frame;
use ratatui::layout::{Constraint, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Row, Table, TableState};
use unicode_width::UnicodeWidthStr as _;

use super::model::{Column, Mode, Model};
use crate::admin::page::{ago as since, caught_up, number, span};
use crate::cli::status::{ago, cut, printable, shown};
use crate::daemon::{DetectorStatus, SourceStatus, Status};
use crate::metrics::Condition;
use crate::publish::State;

/// A lower screen has one line for each thing.
const ROOMY_ROWS: usize = 18;
/// A screen that is lower still shows nothing of the detector under the cursor but its row.
const DETAIL_ROWS_MIN: usize = 8;
/// Lines that one text of the engine's may take on a roomy screen.
const WRAPPED_LINES_MAX: usize = 2;
/// Lines of totals on a roomy screen.
const TOTALS_LINES_MAX: usize = 3;
/// Held entries that are told above the table.
const HELD_LINES_MAX: usize = 3;
/// Columns that a name gets before others are added, and at most.
const NAME_COLUMNS: std::ops::RangeInclusive<usize> = 8..=20;
const NAME_COLUMNS_MAX: usize = 40;
/// Why a detector is not well is told beside it where so many columns are left.
const WHY_COLUMNS_MIN: usize = 20;
/// Clocks further apart are worth a word, seconds.
const SKEW_TOLD: f64 = 5.0;
/// A backlog that takes longer to work off is worth a word, seconds.
const CAUGHT_UP_TOLD: f64 = 10.0;
/// In front of the engine's lines.
const LABEL_COLUMNS: usize = 8;

/// Lines of one entry of the help.
const HELP_LINES_MAX: usize = 3;

const KEYS: [(&str, &str); 8] = [
    ("q, Esc, Ctrl-C", "end"),
    ("↑ ↓, k j", "move the mark; PgUp PgDn, Home End"),
    ("s, >, →", "sort by the next column"),
    ("S, <, ←", "sort by the one before"),
    ("r", "turn the order round"),
    ("/", "show only names that hold a text; Esc clears it"),
    ("space", "hold the picture; the daemon goes on"),
    ("?", "this help; any key closes it"),
];

const COLUMNS: [(&str, &str); 8] = [
    (
        "state",
        "held: its source cannot deliver (`framegate doctor` says what mends it); silent: no frame for its silence_alarm; gone: not in the configuration any more",
    ),
    ("per s", "frames that the engine accepted, mean of the last 10 s"),
    ("waiting", "frames that are known and not yet settled"),
    ("delivery", "from noticing a frame to its acceptance, mean of the last ones"),
    ("longest", "the longest of these in the last minute"),
    ("last", "since its last frame came"),
    ("published", "accepted since the daemon's start"),
    ("dead", "dead letters since then: `framegate dead-letter list`"),
];

/// How things look. Without colours there is weight alone.
#[derive(Clone, Copy)]
struct Look {
    colours: bool,
}

impl Look {
    fn coloured(self, colour: Color) -> Style {
        if self.colours { Style::new().fg(colour) } else { Style::new() }
    }

    fn good(self) -> Style {
        self.coloured(Color::Green)
    }

    fn warn(self) -> Style {
        self.coloured(Color::Yellow).add_modifier(Modifier::BOLD)
    }

    fn bad(self) -> Style {
        self.coloured(Color::Red).add_modifier(Modifier::BOLD)
    }

    fn key(self) -> Style {
        self.coloured(Color::Cyan).add_modifier(Modifier::BOLD)
    }

    fn of(self, condition: Condition) -> Style {
        match condition {
            Condition::Held => self.bad(),
            Condition::Silent => self.warn(),
            Condition::Well => self.good(),
            Condition::Gone => Style::new().add_modifier(Modifier::DIM),
        }
    }
}

const DIM: Style = Style::new().add_modifier(Modifier::DIM);
const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);

/// Draws all of it.
pub(super) fn draw(frame: &mut Frame, model: &Model) {
    let area = frame.area();
    let [width, height] = [area.width, area.height].map(usize::from);
    if model.mode == Mode::Help {
        return lines(frame, area, &help(model, width));
    }
    let parts = Parts::new(model, width, height);
    let detectors = model.detectors();
    let table = Rect { y: area.y + parts.head_rows(), height: parts.table_rows(), ..area };
    lines(frame, area, &parts.head);
    detector_table(frame, table, model, &detectors);
    let below = Rect { y: table.y + table.height, height: area.height - table.y - table.height, ..area };
    let mut foot = parts.detail;
    foot.push(footer(model, detectors.len(), usize::from(table.height.saturating_sub(1)), width));
    lines(frame, below, &foot);
}

/// Detectors that are on a screen of this size at once.
pub(super) fn page(model: &Model, width: u16, height: u16) -> usize {
    usize::from(Parts::new(model, width.into(), height.into()).table_rows()).saturating_sub(1)
}

/// What is above and below the table, and what is left for it.
struct Parts {
    head: Vec<Line<'static>>,
    detail: Vec<Line<'static>>,
    height: usize,
}

impl Parts {
    fn new(model: &Model, width: usize, height: usize) -> Self {
        let roomy = height >= ROOMY_ROWS;
        let mut head = vec![title(model, width)];
        head.extend(away(model, width, roomy));
        head.extend(engine(model, width, roomy));
        head.extend(totals(model, width, if roomy { TOTALS_LINES_MAX } else { 1 }));
        head.extend(held(model, width, if roomy { HELD_LINES_MAX } else { 1 }));
        if roomy {
            head.push(Line::default());
        }
        let detail = if height >= DETAIL_ROWS_MIN { detail(model, width, roomy) } else { Vec::new() };
        // The footer's line, the table's head and one detector come first.
        head.truncate(height.saturating_sub(3).max(1));
        Self { head, detail, height }
    }

    fn head_rows(&self) -> u16 {
        u16::try_from(self.head.len().min(self.height)).unwrap_or(u16::MAX)
    }

    fn table_rows(&self) -> u16 {
        let left = self.height.saturating_sub(self.head.len() + self.detail.len() + 1);
        u16::try_from(left).unwrap_or(u16::MAX)
    }
}

fn lines(frame: &mut Frame, area: Rect, lines: &[Line<'static>]) {
    for (line, row) in lines.iter().zip(area.rows()) {
        frame.render_widget(line, row);
    }
}

fn title(model: &Model, width: usize) -> Line<'static> {
    let Status { version, pid, uptime_seconds, .. } = &model.status;
    let up = span(std::time::Duration::from_secs(*uptime_seconds));
    let left = [format!("framegate {}", printable(version)), format!("  pid {pid}, up {up}")];
    let right = if model.paused {
        ("HELD, space goes on".to_owned(), Look { colours: model.colours }.warn())
    } else {
        (format!("every {}", humantime::format_duration(model.every)), DIM)
    };
    let room = width.saturating_sub(right.0.width() + 1);
    let rest = cut(&left[1], room.saturating_sub(left[0].width()));
    let first = cut(&left[0], room);
    let gap = " ".repeat(width.saturating_sub(first.width() + rest.width() + right.0.width()));
    Line::from(vec![
        Span::styled(first, BOLD),
        Span::styled(rest, DIM),
        Span::raw(gap),
        Span::styled(cut(&right.0, width), right.1),
    ])
}

/// A text behind its label, on one line or some.
fn labelled(label: &str, style: Style, text: &str, width: usize, lines_max: usize) -> Vec<Line<'static>> {
    hanging(Span::styled(format!("{label:<LABEL_COLUMNS$}"), DIM), style, text, width, lines_max)
}

/// A text whose further lines begin where its first does: behind the label.
fn hanging(label: Span<'static>, style: Style, text: &str, width: usize, lines_max: usize) -> Vec<Line<'static>> {
    let indent = Span::raw(" ".repeat(label.width()));
    let labels = std::iter::once(label).chain(std::iter::repeat(indent.clone()));
    let texts = wrapped(text, width.saturating_sub(indent.width()), lines_max);
    labels.zip(texts).map(|(label, text)| Line::from(vec![label, Span::styled(text, style)])).collect()
}

/// Broken between words; the last line is cut.
fn wrapped(text: &str, width: usize, lines_max: usize) -> Vec<String> {
    let mut all = vec![String::new()];
    for word in text.split(' ') {
        let lines = all.len();
        let last = all.last_mut().expect("there is always a line");
        if last.is_empty() || last.width() + 1 + word.width() <= width || lines == lines_max {
            if !last.is_empty() {
                last.push(' ');
            }
            last.push_str(word);
        } else {
            all.push(word.to_owned());
        }
    }
    all.iter().map(|line| cut(line, width)).collect()
}

fn away(model: &Model, width: usize, roomy: bool) -> Vec<Line<'static>> {
    let Some((since, why)) = &model.away else { return Vec::new() };
    let look = Look { colours: model.colours };
    let age = |then| ago(Some(then), model.now);
    let text = format!(
        "✗ cannot be asked for {}; asked again all the time, and what is shown is {} old. {}",
        age(since.as_millisecond()),
        age(model.said.as_millisecond()),
        printable(why)
    );
    labelled("daemon", look.bad(), &text, width, if roomy { WRAPPED_LINES_MAX } else { 1 })
}

fn engine(model: &Model, width: usize, roomy: bool) -> Vec<Line<'static>> {
    let (engine, look) = (&model.status.engine, Look { colours: model.colours });
    let (sign, style) = match engine.state {
        State::Open => ("✓", look.good().add_modifier(Modifier::BOLD)),
        State::Throttled | State::Failing | State::Unreachable => ("!", look.warn()),
        State::Credentials | State::Forbidden | State::Rejecting | State::UnexpectedAnswer => ("✗", look.bad()),
    };
    let most = if roomy { WRAPPED_LINES_MAX } else { 1 };
    let state = format!("{sign} {} for {}.", engine.state.as_str(), since(model.now, engine.since));
    let mut lines = labelled("engine", Style::new(), &format!("{state} {}", engine.state.meaning()), width, most);
    // Only the state is coloured, not what it means.
    if let Some(text) = lines[0].spans.pop() {
        let meaning = text.content.strip_prefix(&state).map(str::to_owned);
        lines[0].push_span(Span::styled(meaning.as_ref().map_or(text.content, |_| state.into()), style));
        lines[0].push_span(meaning.unwrap_or_default());
    }
    if engine.state != State::Open {
        if roomy && !engine.reason.is_empty() {
            lines.extend(labelled("seen", Style::new(), &printable(&engine.reason), width, most));
        }
        lines.extend(labelled("do", BOLD, &printable(&engine.advice), width, most));
    }
    if engine.insecure {
        lines.extend(labelled("", look.bad(), "its certificate is not verified", width, 1));
    }
    lines
}

/// Name and value of each total, the weightiest first.
fn figures(model: &Model) -> Vec<(&'static str, String)> {
    let status = &model.status;
    let bytes = |bytes: u64| ByteSize(bytes).display().iec().to_string();
    let rate: f64 = status.detectors.iter().map(|it| it.rate).sum();
    let pending: i64 = status.detectors.iter().map(|it| it.counts.pending).sum();
    let part = status.memory_in_use_bytes * 100 / status.memory_budget_bytes.max(1);
    let mut figures = vec![
        ("published", format!("{}/s", number(rate))),
        ("waiting", pending.to_string()),
        ("in flight", format!("{} of {}", status.engine.in_flight, status.engine.concurrency_limit)),
        (
            "dead letters",
            match status.dead_letters {
                0 => "0".to_owned(),
                n => format!("{n}, {}", bytes(status.dead_letter_bytes)),
            },
        ),
        ("memory", format!("{part} % of {}", bytes(status.memory_budget_bytes))),
    ];
    // Told behind what it follows from.
    if let Some(until) = caught_up(pending, rate)
        && status.engine.state == State::Open
        && pending as f64 > rate * CAUGHT_UP_TOLD
    {
        figures.insert(2, ("caught up in", until));
    }
    if status.spool_frames > 0 || status.spool_max_bytes > 0 {
        let (held, most) = (bytes(status.spool_bytes), bytes(status.spool_max_bytes));
        figures.push(("spool", format!("{} frames, {held} of {most}", status.spool_frames)));
    }
    if let Some(skew) = status.engine.clock_skew_seconds.filter(|skew| skew.abs() > SKEW_TOLD) {
        figures.push(("clock", format!("{skew:+.0} s against the engine's")));
    }
    figures
}

fn totals(model: &Model, width: usize, lines_max: usize) -> Vec<Line<'static>> {
    let mut lines: Vec<Line> = vec![Line::default()];
    for (name, value) in figures(model) {
        let taken = name.width() + 1 + value.width();
        let last = lines.last_mut().expect("there is always a line");
        let gap = if last.spans.is_empty() { 0 } else { 3 };
        let to = if last.width() + gap + taken <= width || last.spans.is_empty() {
            last.push_span(Span::raw(" ".repeat(gap)));
            last
        } else if lines.len() < lines_max {
            lines.push(Line::default());
            lines.last_mut().expect("it was pushed")
        } else {
            continue;
        };
        to.push_span(Span::styled(format!("{name} "), DIM));
        to.push_span(Span::styled(value, BOLD));
    }
    lines
}

fn held(model: &Model, width: usize, lines_max: usize) -> Vec<Line<'static>> {
    let look = Look { colours: model.colours };
    let all: Vec<_> = model.held_unseen().collect();
    let text = |(source, why): &(&SourceStatus, &str)| {
        format!("✗ {} ({}): {}", shown(&source.name), shown(&source.place), printable(why))
    };
    let more = all.len().saturating_sub(lines_max);
    let mut lines: Vec<_> =
        all.iter().take(lines_max).flat_map(|it| labelled("held", look.bad(), &text(it), width, 1)).collect();
    if let (true, Some(last)) = (more > 0, lines.last_mut()) {
        *last = labelled("held", look.bad(), &format!("✗ and {} more: framegate status", more + 1), width, 1).remove(0);
    }
    lines
}

/// Title and width of a column.
fn head_of(column: Column) -> (&'static str, usize) {
    match column {
        Column::Name => ("detector", 0),
        Column::State => ("state", 6),
        Column::Rate => ("per s", 7),
        Column::Waiting => ("waiting", 8),
        Column::Delivery => ("delivery", 9),
        Column::Longest => ("longest", 8),
        Column::Last => ("last", 7),
        Column::Published => ("published", 10),
        Column::Dead => ("dead", 6),
    }
}

/// The weightiest first; the name is always there.
const BY_WEIGHT: [Column; 8] = [
    Column::State,
    Column::Rate,
    Column::Waiting,
    Column::Last,
    Column::Delivery,
    Column::Dead,
    Column::Longest,
    Column::Published,
];

/// Which columns a table of this width has, and how wide the name is.
fn columns(model: &Model, width: usize) -> (Vec<Column>, usize) {
    let longest = model.status.detectors.iter().map(|it| shown(&it.name).width()).max().unwrap_or(0);
    let longest = longest.max("detector".len() + 1);
    let mut left = width.saturating_sub(longest.clamp(*NAME_COLUMNS.start(), *NAME_COLUMNS.end()));
    let mut fit = |column: &&Column| {
        let rest = left.checked_sub(head_of(**column).1 + 1);
        left = rest.unwrap_or(left);
        rest.is_some()
    };
    let chosen: Vec<Column> = BY_WEIGHT.iter().filter(&mut fit).copied().collect();
    let name = longest.min(NAME_COLUMNS_MAX).min(longest.min(*NAME_COLUMNS.end()) + left);
    let in_order = Column::ALL.into_iter().filter(|it| *it == Column::Name || chosen.contains(it));
    (in_order.collect(), name.min(width))
}

fn detector_table(frame: &mut Frame, area: Rect, model: &Model, detectors: &[&DetectorStatus]) {
    if area.height == 0 {
        return;
    }
    let (columns, name) = columns(model, area.width.into());
    let width_of = |column: &Column| if *column == Column::Name { name } else { head_of(*column).1 };
    let taken: usize = columns.iter().map(|column| width_of(column) + 1).sum();
    let why = usize::from(area.width).saturating_sub(taken);
    let why = if why >= WHY_COLUMNS_MIN && detectors.iter().any(|it| model.trouble(it).is_some()) { why } else { 0 };
    let constrain = |columns: usize| Constraint::Length(u16::try_from(columns).unwrap_or(u16::MAX));
    let widths = columns.iter().map(width_of).chain((why > 0).then_some(why)).map(constrain);
    let mut head: Vec<_> = columns.iter().map(|column| head_cell(model, *column)).collect();
    if why > 0 {
        head.push(Cell::from("why"));
    }
    let rows = usize::from(area.height).saturating_sub(1);
    let cursor = model.cursor(detectors);
    let first = first_shown(cursor, detectors.len(), rows);
    let shown = detectors.iter().skip(first).take(rows);
    let rows = shown.map(|it| row(model, it, &columns, name, why));
    let table = Table::new(rows, widths)
        .header(Row::new(head).style(BOLD.add_modifier(Modifier::REVERSED)))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    let mut state = TableState::new().with_selected(cursor.map(|at| at - first));
    frame.render_stateful_widget(table, area, &mut state);
    if detectors.is_empty() {
        let text = if model.filter.is_empty() { "no frame has come yet" } else { "no detector's name holds this" };
        let below = Rect { y: area.y + 1, height: area.height - 1, ..area };
        lines(frame, below, &[Line::styled(cut(text, area.width.into()), DIM)]);
    }
}

fn head_cell(model: &Model, column: Column) -> Cell<'static> {
    let arrow = match (model.sort == column, model.reversed) {
        (false, _) => "",
        (true, false) => "▼",
        (true, true) => "▲",
    };
    let line = Line::from(format!("{}{arrow}", head_of(column).0));
    Cell::from(aligned(column, line))
}

fn aligned(column: Column, line: Line<'static>) -> Line<'static> {
    match column {
        Column::Name | Column::State => line,
        Column::Rate
        | Column::Waiting
        | Column::Delivery
        | Column::Longest
        | Column::Last
        | Column::Published
        | Column::Dead => line.right_aligned(),
    }
}

/// The cursor stays in the middle as far as there are detectors above and below.
fn first_shown(cursor: Option<usize>, all: usize, rows: usize) -> usize {
    cursor.unwrap_or(0).saturating_sub(rows / 2).min(all.saturating_sub(rows))
}

fn row(model: &Model, detector: &DetectorStatus, columns: &[Column], name: usize, why: usize) -> Row<'static> {
    let look = Look { colours: model.colours };
    let cell = |column: &Column| {
        let room = if *column == Column::Name { name } else { head_of(*column).1 };
        let style = match column {
            Column::State => look.of(detector.counts.condition()),
            Column::Dead if detector.counts.dead_lettered > 0 => look.warn(),
            Column::Name
            | Column::Rate
            | Column::Waiting
            | Column::Delivery
            | Column::Longest
            | Column::Last
            | Column::Published
            | Column::Dead => Style::new(),
        };
        Cell::from(aligned(*column, Line::styled(cut(&text(model, detector, *column), room), style)))
    };
    let trouble = (why > 0).then(|| {
        let trouble = model.trouble(detector).unwrap_or_default();
        Cell::from(cut(&printable(trouble), why)).style(look.of(detector.counts.condition()))
    });
    Row::new(columns.iter().map(cell).chain(trouble))
}

fn text(model: &Model, detector: &DetectorStatus, column: Column) -> String {
    let counts = &detector.counts;
    let millis = |time: Option<f64>| {
        time.map_or_else(|| "–".into(), |ms| span(std::time::Duration::from_secs_f64(ms.max(0.0) / 1e3)))
    };
    match column {
        Column::Name => shown(&detector.name),
        Column::State => counts.condition().as_str().into(),
        Column::Rate => number(detector.rate),
        Column::Waiting => counts.pending.to_string(),
        Column::Delivery => millis(detector.delivery_ms),
        Column::Longest => millis(detector.delivery_max_ms),
        Column::Last => ago(counts.last_frame_ms, model.now),
        Column::Published => counts.published.to_string(),
        Column::Dead => counts.dead_lettered.to_string(),
    }
}

/// All that is known about the detector under the cursor, whatever the table has room for; in one line on a low screen.
fn detail(model: &Model, width: usize, roomy: bool) -> Vec<Line<'static>> {
    let detectors = model.detectors();
    let Some(at) = model.cursor(&detectors) else { return Vec::new() };
    let detector = detectors[at];
    let counts = &detector.counts;
    let mut text = format!(
        "received {}, published {}, dead letters {}, dropped {}, returned {}, waiting {}, refused {}; last frame {} ago",
        counts.received,
        counts.published,
        counts.dead_lettered,
        counts.dropped,
        counts.returned,
        counts.pending,
        counts.refused,
        ago(counts.last_frame_ms, model.now),
    );
    if counts.last_frame_ms.is_none() {
        text.truncate(text.rfind(';').unwrap_or(text.len()));
    }
    if let Some(why) = model.trouble(detector) {
        text = format!("{}: {}. {text}", counts.condition().as_str(), printable(why));
    }
    if !roomy {
        return vec![Line::raw(cut(&text, width))];
    }
    let head = format!("── {} ", shown(&detector.name));
    let rule = "─".repeat(width.saturating_sub(head.width()));
    let mut lines = vec![Line::styled(cut(&(head + &rule), width), DIM)];
    lines.extend(wrapped(&text, width, WRAPPED_LINES_MAX).into_iter().map(Line::raw));
    // Always as high, so that the table keeps its place while the mark moves.
    lines.resize(1 + WRAPPED_LINES_MAX, Line::default());
    lines
}

fn footer(model: &Model, all: usize, rows: usize, width: usize) -> Line<'static> {
    let look = Look { colours: model.colours };
    if model.mode == Mode::Filter {
        let text = format!("filter: {}▏", shown(&model.filter));
        let rest = "  Enter keeps it, Esc clears it";
        let room = width.saturating_sub(text.width());
        return Line::from(vec![Span::styled(cut(&text, width), BOLD), Span::styled(cut(rest, room), DIM)]);
    }
    let first = first_shown(model.cursor(&model.detectors()), all, rows);
    let place = match all {
        0 => String::new(),
        _ => format!("{}-{} of {all}", first + 1, (first + rows).min(all)),
    };
    let filter = if model.filter.is_empty() { String::new() } else { format!("filter: {}  ", shown(&model.filter)) };
    let room = width.saturating_sub(place.width() + 1);
    let mut line = Line::from(Span::styled(cut(&filter, room), look.warn()));
    let keys = [("q", "quit"), ("?", "help"), ("s", "sort"), ("r", "reverse"), ("/", "filter"), ("space", "hold")];
    for (key, does) in keys {
        if line.width() + key.width() + does.width() + 3 > room {
            break;
        }
        line.push_span(Span::styled(key, look.key()));
        line.push_span(Span::styled(format!(" {does}  "), DIM));
    }
    let gap = width.saturating_sub(line.width() + place.width());
    line.push_span(Span::raw(" ".repeat(gap)));
    line.push_span(Span::styled(place, DIM));
    line
}

fn help(model: &Model, width: usize) -> Vec<Line<'static>> {
    let look = Look { colours: model.colours };
    let entry = |(name, what): &(&str, &str)| {
        hanging(Span::styled(format!(" {name:<15}"), look.key()), Style::new(), what, width, HELP_LINES_MAX)
    };
    let mut lines = vec![Line::styled("Keys", BOLD)];
    lines.extend(KEYS.iter().flat_map(entry));
    lines.push(Line::styled("Columns", BOLD));
    lines.extend(COLUMNS.iter().flat_map(entry));
    lines
}

#[cfg(test)]
mod tests;
