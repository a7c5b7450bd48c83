//! What an answer means: `publish::verdict` of the crate.

#[path = "../../src/publish/verdict.rs"]
#[expect(dead_code, reason = "only what is measured is used here")]
mod verdict;

use std::time::SystemTime;

use bytes::Bytes;
use divan::{Bencher, black_box};

use self::verdict::{Reply, judge};

/// The engine's 200, which is empty, and a refusal with a message.
#[divan::bench(args = [(200, ""), (400, r#"{"message":"the image holds no face"}"#)])]
fn verdict_of(bencher: Bencher<'_, '_>, (status, body): (u16, &'static str)) {
    let body = Bytes::from_static(body.as_bytes());
    let answer = Ok(Reply { status, body, complete: true, retry_after: None, date: None });
    let now = SystemTime::now();
    bencher.bench_local(|| judge(black_box(&answer), now));
}
