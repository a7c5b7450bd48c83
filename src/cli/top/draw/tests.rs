//! The screen of `framegate top` on a terminal in memory, of every size.

use crossterm::event::{KeyCode, KeyEvent};
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;

use super::super::model::tests::model;
use super::*;

/// From nothing at all to more than anybody has.
const SIZES: [(u16, u16); 11] =
    [(0, 0), (1, 1), (3, 40), (8, 5), (20, 6), (40, 10), (41, 17), (59, 40), (80, 18), (240, 5), (300, 100)];

const NAMES: [&str; 4] = ["Lobby", "Front Door", "Yard", "Roof \u{1b}[2J"];

fn buffer(model: &Model, width: u16, height: u16) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, model)).unwrap();
    terminal.backend().buffer().clone()
}

/// The screen as text, without blanks at the ends of lines.
fn screen(model: &Model, width: u16, height: u16) -> String {
    let buffer = buffer(model, width, height);
    let line = |y| {
        let symbols = (0..width).map(|x| buffer.cell((x, y)).map_or("", |cell| cell.symbol()));
        let mut covered = 0;
        // The cell behind a wide letter is covered by it.
        let visible = symbols.filter(|symbol| {
            let is_visible = covered == 0;
            covered = if is_visible { symbol.width().saturating_sub(1) } else { covered - 1 };
            is_visible
        });
        visible.collect::<String>().trim_end().to_owned()
    };
    (0..height).map(line).collect::<Vec<_>>().join("\n")
}

/// The screen is these lines, one below the other; blank ones at its end go without saying.
#[track_caller]
fn shows(model: &Model, width: u16, height: u16, expected: &[&str]) {
    let screen = screen(model, width, height);
    assert_eq!(screen.trim_end().lines().collect::<Vec<_>>(), expected, "\n{screen}");
}

/// Nothing goes well.
fn trouble() -> Model {
    let mut model = model(&NAMES);
    let engine = &mut model.status.engine;
    engine.state = State::Forbidden;
    engine.reason =
        "403: user edge-07 may not publish,\u{1b}[31m and this is said in so many words that they wrap".into();
    engine.advice = State::Forbidden.advice().into();
    model.said -= std::time::Duration::from_secs(12);
    model.away = Some((model.now - std::time::Duration::from_secs(5), "no daemon can be asked on /run/x.sock".into()));
    model
}

fn press(model: &mut Model, code: KeyCode) {
    assert!(model.key(KeyEvent::from(code), 5).is_continue());
}

#[test]
fn on_a_terminal_of_the_usual_size() {
    shows(
        &model(&NAMES),
        80,
        14,
        &[
            "framegate 1.2.3  pid 4711, up 3 h                                       every 1s",
            "engine  ✓ open for 10 min. Frames are published.",
            "published 8.0/s   waiting 594   caught up in about 74 s at this pace",
            "detector       state▼   per s  waiting  delivery  longest    last   dead",
            "Front Door     held       1.5       99      2 ms    40 ms     7 s      1",
            "Yard           silent     2.5      198      2 ms    40 ms    28 s      2",
            "Lobby          well       0.5        0      2 ms    40 ms   never      0",
            "Roof \\u{1b}[2J well       3.5      297      2 ms    40 ms    63 s      3",
            "",
            "",
            "",
            "",
            "",
            "q quit  ? help  s sort  r reverse  / filter  space hold                 1-4 of 4",
        ],
    );
}

#[test]
fn on_a_wide_one_there_is_room_for_every_column_and_the_reason() {
    shows(
        &model(&NAMES),
        120,
        20,
        &[
            "framegate 1.2.3  pid 4711, up 3 h                                                                               every 1s",
            "engine  ✓ open for 10 min. Frames are published.",
            "published 8.0/s   waiting 594   caught up in about 74 s at this pace   in flight 3 of 16   dead letters 3, 120.6 KiB",
            "memory 4 % of 256.0 MiB   spool 0 frames, 4.0 KiB of 2.0 GiB",
            "",
            "detector       state▼   per s  waiting  delivery  longest    last  published   dead why",
            "Front Door     held       1.5       99      2 ms    40 ms     7 s        900      1 /srv/x is mounted read-only",
            "Yard           silent     2.5      198      2 ms    40 ms    28 s       1800      2 no frame for longer than its silenc…",
            "Lobby          well       0.5        0      2 ms    40 ms   never          0      0",
            "Roof \\u{1b}[2J well       3.5      297      2 ms    40 ms    63 s       2700      3",
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "",
            "q quit  ? help  s sort  r reverse  / filter  space hold                                                         1-4 of 4",
        ],
    );
}

#[test]
fn on_a_small_one_columns_go_by_weight_and_the_state_stays() {
    shows(
        &model(&NAMES),
        50,
        12,
        &[
            "framegate 1.2.3  pid 4711, up 3 h         every 1s",
            "engine  ✓ open for 10 min. Frames are published.",
            "published 8.0/s   waiting 594   in flight 3 of 16",
            "detector       state▼   per s  waiting    last",
            "Front Door     held       1.5       99     7 s",
            "Yard           silent     2.5      198    28 s",
            "Lobby          well       0.5        0   never",
            "Roof \\u{1b}[2J well       3.5      297    63 s",
            "",
            "",
            "",
            "q quit  ? help  s sort  r reverse         1-4 of 4",
        ],
    );
    shows(
        &model(&NAMES),
        40,
        10,
        &[
            "framegate 1.2.3  pid 4711, up … every 1s",
            "engine  ✓ open for 10 min. Frames are p…",
            "published 8.0/s   waiting 594",
            "detector       state▼   per s  waiting",
            "Front Door     held       1.5       99",
            "Yard           silent     2.5      198",
            "Lobby          well       0.5        0",
            "Roof \\u{1b}[2J well       3.5      297",
            "",
            "q quit  ? help  s sort          1-4 of 4",
        ],
    );
}

#[test]
fn trouble_is_told_with_what_to_do_whatever_the_size() {
    let mut model = trouble();
    press(&mut model, KeyCode::Char('j'));
    shows(
        &model,
        80,
        22,
        &[
            "framegate 1.2.3  pid 4711, up 3 h                                       every 1s",
            "daemon  ✗ cannot be asked for 5 s; asked again all the time, and what is shown",
            "        is 12 s old. no daemon can be asked on /run/x.sock",
            "engine  ✗ forbidden for 10 min. The engine's user may not publish. Frames are",
            "        kept.",
            "seen    403: user edge-07 may not publish, [31m and this is said in so many",
            "        words that they wrap",
            "do      give the engine's user the Face Publishing permission; nothing else is",
            "        needed here",
            "published 8.0/s   waiting 594   in flight 3 of 16   dead letters 3, 120.6 KiB",
            "memory 4 % of 256.0 MiB   spool 0 frames, 4.0 KiB of 2.0 GiB",
            "",
            "detector       state▼   per s  waiting  delivery  longest    last   dead",
            "Front Door     held       1.5       99      2 ms    40 ms     7 s      1",
            "Yard           silent     2.5      198      2 ms    40 ms    28 s      2",
            "Lobby          well       0.5        0      2 ms    40 ms   never      0",
            "Roof \\u{1b}[2J well       3.5      297      2 ms    40 ms    63 s      3",
            "",
            "── Front Door ──────────────────────────────────────────────────────────────────",
            "held: /srv/x is mounted read-only. received 1000, published 900, dead letters 1,",
            "dropped 0, returned 0, waiting 99, refused 0; last frame 7 s ago",
            "q quit  ? help  s sort  r reverse  / filter  space hold                 1-4 of 4",
        ],
    );
    shows(
        &model,
        40,
        10,
        &[
            "framegate 1.2.3  pid 4711, up … every 1s",
            "daemon  ✗ cannot be asked for 5 s; aske…",
            "engine  ✗ forbidden for 10 min. The eng…",
            "do      give the engine's user the Face…",
            "published 8.0/s   waiting 594",
            "detector       state▼   per s  waiting",
            "Front Door     held       1.5       99",
            "Yard           silent     2.5      198",
            "held: /srv/x is mounted read-only. rece…",
            "q quit  ? help  s sort          1-2 of 4",
        ],
    );
}

#[test]
fn the_help_says_every_key_and_column() {
    let mut model = model(&NAMES);
    press(&mut model, KeyCode::Char('?'));
    shows(
        &model,
        80,
        24,
        &[
            "Keys",
            " q, Esc, Ctrl-C end",
            " ↑ ↓, k j       move the mark; PgUp PgDn, Home End",
            " s, >, →        sort by the next column",
            " S, <, ←        sort by the one before",
            " r              turn the order round",
            " /              show only names that hold a text; Esc clears it",
            " space          hold the picture; the daemon goes on",
            " ?              this help; any key closes it",
            "Columns",
            " state          held: its source cannot deliver (`framegate doctor` says what",
            "                mends it); silent: no frame for its silence_alarm; gone: not in",
            "                the configuration any more",
            " per s          frames that the engine accepted, mean of the last 10 s",
            " waiting        frames that are known and not yet settled",
            " delivery       from noticing a frame to its acceptance, mean of the last ones",
            " longest        the longest of these in the last minute",
            " last           since its last frame came",
            " published      accepted since the daemon's start",
            " dead           dead letters since then: `framegate dead-letter list`",
        ],
    );
}

#[test]
fn no_size_and_no_state_is_too_much_for_it() {
    let long = "門".repeat(300);
    for names in [&[][..], &["a"], &NAMES, &[&*long, "e\u{301}\u{200d}🙂", ""]] {
        for mut model in [model(names), trouble()] {
            for code in [KeyCode::Char('G'), KeyCode::Char('/'), KeyCode::Enter, KeyCode::Char(' '), KeyCode::Char('?')]
            {
                press(&mut model, code);
                for (width, height) in SIZES {
                    let lines = screen(&model, width, height);
                    assert!(lines.lines().all(|line| line.width() <= usize::from(width)), "{width}x{height}\n{lines}");
                }
            }
        }
    }
}

#[test]
fn a_thousand_detectors_are_scrolled_through_with_the_mark_in_sight() {
    let names: Vec<String> = (0..1000).map(|n| format!("Cam{n:04}")).collect();
    let mut model = model(&names.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(screen(&model, 80, 24).ends_with("1-16 of 1000"), "{}", screen(&model, 80, 24));
    model.sort = Column::Name;
    for (key, name, place) in [
        (KeyCode::End, "Cam0999", "988-1000 of 1000"),
        (KeyCode::PageUp, "Cam0994", "988-1000 of 1000"),
        (KeyCode::Home, "Cam0000", "1-13 of 1000"),
        (KeyCode::Down, "Cam0001", "1-13 of 1000"),
    ] {
        press(&mut model, key);
        let lines = screen(&model, 80, 24);
        assert!(lines.contains(&format!("── {name} ")) && lines.contains(&format!("\n{name} ")), "{lines}");
        assert!(lines.contains(place), "{lines}");
    }
    assert_eq!(page(&model, 80, 24), 13, "what the keys turn is what the screen shows");
}

#[test]
fn the_filter_shows_itself_while_it_is_typed_and_as_long_as_it_holds() {
    let mut model = model(&NAMES);
    for c in "/oo".chars() {
        press(&mut model, KeyCode::Char(c));
    }
    let lines = screen(&model, 80, 24);
    assert!(lines.ends_with("filter: oo▏  Enter keeps it, Esc clears it"), "{lines}");
    press(&mut model, KeyCode::Enter);
    let lines = screen(&model, 80, 24);
    assert!(lines.contains("filter: oo  q quit") && lines.contains("1-2 of 2") && !lines.contains("Lobby"), "{lines}");
    for c in "/zz".chars() {
        press(&mut model, KeyCode::Char(c));
    }
    assert!(screen(&model, 80, 24).contains("no detector's name holds this"));
}

#[test]
fn colours_only_add_to_words_and_can_be_left_out() {
    let mut model = trouble();
    let coloured = |model: &Model| buffer(model, 80, 24).content.iter().filter(|cell| cell.fg != Color::Reset).count();
    assert_eq!(coloured(&model), 0);
    let without = screen(&model, 80, 24);
    model.colours = true;
    assert!(coloured(&model) > 10);
    assert_eq!(screen(&model, 80, 24), without);
}

#[test]
fn a_held_picture_and_held_entries_say_so() {
    let mut model = model(&["a", "{path.0}"]);
    model.status.detectors.clear();
    press(&mut model, KeyCode::Char(' '));
    let lines = screen(&model, 60, 10);
    assert!(lines.contains("HELD, space goes on") && lines.contains("no frame has come yet"), "{lines}");
    assert!(lines.contains("held    ✗ {path.0} (/srv/x): /srv/x is mounted read-only"), "{lines}");
}
