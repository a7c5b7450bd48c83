//! The spool with a real directory and a real queue; the test is the engine.

use bytes::Bytes;
use tokio::time::timeout;

use super::*;
use crate::frame::Frame;
use crate::queue::{self, Outlet, Taken};
use crate::settle::Receipt;

const PATIENCE: Duration = Duration::from_secs(20);

struct Life {
    spool: Arc<Spool>,
    metrics: Arc<Metrics>,
    outlet: Outlet,
    stop: CancellationToken,
    running: tokio::task::JoinHandle<()>,
}

impl Life {
    /// A life of a spool in this directory, from its opening on.
    async fn begin(config: &Config, entries: &[Arc<Entry>]) -> Self {
        let metrics = Metrics::new();
        let (intake, outlet) = queue::queue(64 << 20, &metrics);
        let (spool, inbox) = Spool::new(config, intake, metrics.clone());
        spool.reconfigure(config, entries);
        let stop = CancellationToken::new();
        let running = tokio::spawn(run(spool.clone(), inbox, stop.clone()));
        let life = Self { spool, metrics, outlet, stop, running };
        life.until("it is open", || life.spool.held().is_none()).await;
        life
    }

    async fn until(&self, what: &str, condition: impl Fn() -> bool) {
        let waiting = async {
            while !condition() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("never: {what}; {:?}", self.spool.held()));
    }

    async fn put(&self, n: u64) -> Result<(), Refused> {
        self.spool.put(arrival(n, 1000)).await
    }

    /// The next frame, taken.
    async fn next(&mut self) -> (Frame, Receipt, Vec<u8>) {
        let delivery = timeout(PATIENCE, self.outlet.next()).await.expect("a frame is offered").unwrap();
        delivery.lease.begun();
        let mut image = Vec::new();
        match (delivery.take)(&mut image) {
            Taken::Frame(frame, receipt) | Taken::Base64(frame, receipt) => (frame, receipt, image),
            other @ (Taken::Flawed(..) | Taken::Gone) => panic!("{other:?}"),
        }
    }

    async fn end(self) -> Arc<Metrics> {
        self.stop.cancel();
        drop(self.outlet);
        timeout(PATIENCE, self.running).await.expect("it ends").unwrap();
        for detector in self.metrics.detectors() {
            let it = detector.counts();
            let accounted = it.published + it.dead_lettered + it.dropped + it.returned;
            // Nobody counts as published in here.
            assert!(it.pending >= 0 && it.received >= accounted, "{it:?}");
        }
        self.metrics
    }
}

fn config(directory: &Path) -> Config {
    Config { directory: directory.join("spool"), max_size: ByteSize::mib(8) }
}

fn arrival(n: u64, size: usize) -> Arrival {
    Arrival {
        id: FrameId::generate(),
        flaw: None,
        entry: "{detectorName}".into(),
        source: SourceKind::Push,
        detector: "Cam".into(),
        time_zone: "America/Los_Angeles".into(),
        detect_time: Timestamp::from_millisecond(1_800_000_000_000 + i64::try_from(n).unwrap()).unwrap(),
        received_at: Timestamp::now(),
        name: format!("request {n}"),
        image: Image {
            bytes: Bytes::from(vec![u8::try_from(n % 251).unwrap(); size]),
            base64: n.is_multiple_of(2),
            size: size as u64,
        },
    }
}

fn number(frame: &Frame) -> i64 {
    frame.detect_time.as_millisecond() - 1_800_000_000_000
}

fn entry(keys: &str) -> Arc<Entry> {
    let text = format!("name = '{{detectorName}}'\ntime_zone = 'UTC'\npush = {{}}\n{keys}");
    Arc::new(toml::from_str(&text).unwrap())
}

#[tokio::test]
async fn a_frame_comes_out_as_it_was_put_and_is_gone_when_it_is_settled() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let mut life = Life::begin(&config, &[entry("rate = 3.0\nweight = 2")]).await;
    life.put(7).await.unwrap();
    assert_eq!(list(&config.directory, &Which::default()).unwrap()[0].original_name, "request 7");
    let (frame, receipt, image) = life.next().await;
    assert_eq!((number(&frame), &*frame.detector.name, frame.source), (7, "Cam", SourceKind::Push));
    assert_eq!(
        (&*frame.detector.time_zone, frame.detector.rate, frame.detector.weight),
        ("America/Los_Angeles", 3.0, 2)
    );
    assert_eq!(image, vec![7; 1000]);
    receipt.settle(Disposition::Accepted);
    life.until("it is forgotten", || life.spool.totals().0 == 0).await;
    life.end().await;
    let life = Life::begin(&config, &[]).await;
    assert_eq!(life.spool.totals(), (0, 0), "also after a restart");
    life.end().await;
}

#[tokio::test]
async fn what_was_not_settled_is_there_in_the_next_life_with_its_id_and_without_its_entry() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let mut life = Life::begin(&config, &[]).await;
    for n in 0..3 {
        life.put(n).await.unwrap();
    }
    let (frame, receipt, _) = life.next().await;
    assert_eq!(number(&frame), 2, "the freshest first");
    life.stop.cancel();
    receipt.settle(Disposition::Released);
    let metrics = life.end().await;
    let counts = metrics.detector("Cam").counts();
    assert_eq!((counts.received, counts.returned, counts.pending), (3, 3, 0));

    let mut life = Life::begin(&config, &[]).await;
    let (again, receipt, _) = life.next().await;
    assert_eq!((&again.id, again.received_at), (&frame.id, frame.received_at));
    drop(receipt);
    assert_eq!(metrics.detector("Cam").counts().received, 3);
    life.end().await;
}

#[tokio::test]
async fn the_longest_names_are_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let life = Life::begin(&config, &[]).await;
    let longest = Arrival {
        entry: "\"".repeat(255).into(),
        detector: "\\".repeat(255),
        name: "\u{7}".repeat(65_535),
        ..arrival(1, 10)
    };
    life.spool.put(longest).await.unwrap();
    // Its source should have refused that; here it may not cost those behind it.
    life.spool.put(Arrival { detector: "\u{7}".repeat(65_535), ..arrival(2, 10) }).await.unwrap();
    life.put(3).await.unwrap();
    life.end().await;
    assert_eq!(list(&config.directory, &Which::default()).unwrap().len(), 3);
}

#[tokio::test]
async fn what_comes_while_the_disk_syncs_is_synced_together_and_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let mut life = Life::begin(&config, &[entry("order = 'oldest-first'")]).await;
    let puts: Vec<_> = (0..200).map(|n| life.spool.put(arrival(n, 100))).collect();
    // Polled backwards: the order is that of the calls.
    for put in puts.into_iter().rev() {
        put.await.unwrap();
    }
    let text = life.metrics.render();
    let syncs = text.lines().find_map(|line| line.strip_prefix("framegate_spool_syncs_total ")).unwrap();
    assert!(syncs.parse::<u64>().unwrap() < 20, "{syncs} syncs for 200 frames");
    let mut ids = Vec::new();
    for n in 0..200 {
        let (frame, receipt, _) = life.next().await;
        assert_eq!(number(&frame), n);
        ids.push(frame.id);
        receipt.settle(Disposition::Accepted);
    }
    assert!(ids.is_sorted());
    life.end().await;
}

#[tokio::test]
async fn a_full_spool_refuses_new_frames_keeps_the_old_and_takes_more_when_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config { max_size: ByteSize::mib(2), ..config(dir.path()) };
    let mut life = Life::begin(&config, &[]).await;
    let mut n = 0;
    while life.spool.put(arrival(n, 40 << 10)).await.is_ok() {
        n += 1;
        assert!(life.spool.totals().1 <= 2 << 20);
    }
    assert!((35..50).contains(&n), "{n} frames of 40 KiB in 2 MiB");
    assert!(life.spool.held().unwrap().contains("full"), "{:?}", life.spool.held());
    assert_eq!(life.spool.totals().0, n);
    for _ in 0..n / 2 {
        life.next().await.1.settle(Disposition::Accepted);
    }
    life.until("there is room", || life.spool.held().is_none()).await;
    life.spool.put(arrival(n, 40 << 10)).await.unwrap();
    life.end().await;
}

#[tokio::test]
async fn a_released_frame_comes_again_and_one_that_is_too_old_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let mut life = Life::begin(&config, &[]).await;
    life.put(1).await.unwrap();
    drop(life.next().await.1);
    let (frame, receipt, _) = life.next().await;
    assert_eq!(number(&frame), 1);
    life.spool.reconfigure(&config, &[entry("max_age = '1s'")]);
    drop((frame, receipt));
    let old = Arrival { detect_time: Timestamp::now() - Duration::from_secs(5), ..arrival(2, 10) };
    life.spool.put(old).await.unwrap();
    let delivery = timeout(PATIENCE, life.outlet.next()).await.unwrap().unwrap();
    assert!(matches!((delivery.take)(&mut Vec::new()), Taken::Gone));
    life.until("it is dropped", || life.metrics.detector("Cam").counts().dropped == 1).await;
    life.end().await;
}

#[tokio::test]
async fn an_operator_purges_what_is_not_in_hand() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let mut life = Life::begin(&config, &[]).await;
    for n in 0..5 {
        life.put(n).await.unwrap();
    }
    life.spool.put(Arrival { detector: "Other".into(), ..arrival(9, 10) }).await.unwrap();
    let (_, receipt, _) = life.next().await;
    let which = Which { detector: Some("Cam".into()), ..Which::default() };
    let purged = life.spool.purge(which.clone()).await.unwrap();
    assert_eq!(purged.removed + purged.in_hand, 5);
    assert!(purged.in_hand >= 1 && purged.removed >= 3, "{purged:?}");
    assert_eq!(life.metrics.detector("Cam").counts().dropped, purged.removed);
    assert_eq!(super::purge(&config, &which).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
    drop(receipt);
    life.end().await;
    let left = list(&config.directory, &Which::default()).unwrap();
    assert_eq!(left.len() as u64, 1 + purged.in_hand);
    assert_eq!(super::purge(&config, &Which::default()).unwrap().removed, left.len() as u64);
    assert!(!holds_frames(&config.directory));
}

#[tokio::test]
async fn a_directory_that_cannot_be_used_is_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    std::fs::write(&config.directory, "in the way").unwrap();
    let metrics = Metrics::new();
    let (intake, _outlet) = queue::queue(1 << 20, &metrics);
    let (spool, inbox) = Spool::new(&config, intake, metrics.clone());
    let stop = CancellationToken::new();
    let running = tokio::spawn(run(spool.clone(), inbox, stop.clone()));
    while !spool.held().is_some_and(|why| why.contains("File exists")) {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert!(matches!(spool.put(arrival(0, 10)).await, Err(Refused::Broken(_))));
    std::fs::remove_file(&config.directory).unwrap();
    timeout(PATIENCE, async {
        while spool.put(arrival(0, 10)).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("it recovers");
    stop.cancel();
    running.await.unwrap();
    assert_eq!(spool.put(arrival(0, 10)).await, Err(Refused::Stopping));
}
