//! The publisher against a tiny engine on loopback.

use std::collections::HashSet;
use std::sync::atomic::AtomicU32;

use axum::extract::State as Shared;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::*;
use crate::frame::{Detector, FrameId, SourceKind};
use crate::settle::Reason;

const PATIENCE: Duration = Duration::from_secs(20);

/// What the engine saw, and how it answers.
#[derive(Default)]
struct Engine {
    logins: AtomicU32,
    renewals: AtomicU32,
    /// The number of the token that is good.
    good: AtomicU32,
    posts: Mutex<Vec<(HeaderMap, Bytes)>>,
    paths: Mutex<HashSet<String>>,
    script: Mutex<Option<Script>>,
}

type Script = Box<dyn FnMut(&[u8]) -> Option<Response> + Send>;

async fn answer(Shared(engine): Shared<Arc<Engine>>, uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    engine.paths.lock().unwrap().insert(uri.path().to_owned());
    let token = |n: u32| format!(r#"{{"username":"u","token":"t{n}"}}"#).into_response();
    if uri.path().ends_with("/authenticate") {
        engine.logins.fetch_add(1, Ordering::SeqCst);
        let sent: serde_json::Value = serde_json::from_slice(&body).unwrap();
        if sent != serde_json::json!({"username": "edge", "password": "hunter2"}) {
            return (StatusCode::UNAUTHORIZED, "no").into_response();
        }
        return token(engine.good.load(Ordering::SeqCst));
    }
    if uri.path().ends_with("/renewToken") {
        engine.renewals.fetch_add(1, Ordering::SeqCst);
        return StatusCode::UNAUTHORIZED.into_response();
    }
    if headers["authorization"] != format!("Bearer t{}", engine.good.load(Ordering::SeqCst)).as_str() {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    if let Some(script) = engine.script.lock().unwrap().as_mut()
        && let Some(answer) = script(&body)
    {
        return answer;
    }
    engine.posts.lock().unwrap().push((headers, body));
    StatusCode::OK.into_response()
}

struct Rig {
    engine: Arc<Engine>,
    publisher: Arc<Publisher>,
    metrics: Arc<Metrics>,
    tasks: JoinSet<()>,
    password: tempfile::TempDir,
}

impl Rig {
    async fn start(config: Config) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base_url = format!("http://{}/identities", listener.local_addr().unwrap());
        Self::with(&config, engine::Config { base_url, ..engine::Config::default() }, |app, tasks| {
            tasks.spawn(async move { axum::serve(listener, app).await.unwrap() });
        })
    }

    fn with(
        config: &Config,
        engine_config: engine::Config,
        serve: impl FnOnce(axum::Router, &mut JoinSet<()>),
    ) -> Self {
        let engine = Arc::new(Engine::default());
        let mut tasks = JoinSet::new();
        serve(axum::Router::new().fallback(answer).with_state(engine.clone()), &mut tasks);
        let password = tempfile::tempdir().unwrap();
        write_password(&password, "hunter2");
        let engine_config = engine::Config { username: Some("edge".into()), ..engine_config };
        let secrets = engine::Secrets { password_file: Some(password.path().join("password")), token_file: None };
        let metrics = Metrics::new();
        let publisher = Publisher::new(&engine_config, secrets, config, metrics.clone()).unwrap();
        let clockwork = publisher.clone();
        tasks.spawn(async move { clockwork.run(CancellationToken::new()).await });
        Self { engine, publisher, metrics, tasks, password }
    }

    fn script(&self, script: impl FnMut(&[u8]) -> Option<Response> + Send + 'static) {
        *self.engine.script.lock().unwrap() = Some(Box::new(script));
    }

    /// Publishes these bodies at once; the outcomes in the same order.
    async fn publish(&self, bodies: &[&str]) -> Vec<Outcome> {
        let all = bodies.iter().map(|body| async {
            let frame = frame("cam", 0.0);
            self.publisher.publish(&frame, Bytes::from((*body).to_owned()), || ()).await
        });
        tokio::time::timeout(PATIENCE, futures_util::future::join_all(all)).await.expect("all are settled in time")
    }

    async fn eventually(&self, what: &str, holds: impl Fn(&EngineStatus) -> bool) {
        let wait = async {
            while !holds(&self.publisher.status()) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE / 2, wait)
            .await
            .unwrap_or_else(|_| panic!("{what}: {:?}", self.publisher.status()));
    }

    fn posts(&self) -> usize {
        self.engine.posts.lock().unwrap().len()
    }
}

fn write_password(dir: &tempfile::TempDir, text: &str) {
    use std::os::unix::fs::PermissionsExt as _;
    let path = dir.path().join("password");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

fn frame(detector: &str, rate: f64) -> Frame {
    Frame {
        id: FrameId::generate(),
        detector: Arc::new(Detector { name: detector.into(), time_zone: "UTC".into(), rate, weight: 1 }),
        detect_time: Timestamp::now(),
        received_at: Timestamp::now(),
        noticed: Instant::now(),
        source: SourceKind::Directory,
        original_name: "x.jpg".into(),
        image_bytes: 1,
    }
}

fn quick() -> Config {
    Config { backoff_min: Duration::from_millis(5), backoff_max: Duration::from_millis(50), ..Config::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_frame_is_posted_once_with_the_right_headers_after_one_login() {
    let rig = Rig::start(quick()).await;
    let bodies: Vec<String> = (0..200).map(|n| format!("{{\"n\":{n}}}")).collect();
    let begun = AtomicU32::new(0);
    let all = bodies.iter().map(|body| async {
        let begin = || {
            begun.fetch_add(1, Ordering::SeqCst);
        };
        rig.publisher.publish(&frame("cam", 0.0), Bytes::from(body.clone()), begin).await
    });
    let outcomes = tokio::time::timeout(PATIENCE, futures_util::future::join_all(all)).await.unwrap();
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Accepted));
    assert_eq!(begun.load(Ordering::SeqCst), 200);
    assert_eq!(rig.engine.logins.load(Ordering::SeqCst), 1);
    let posts = rig.engine.posts.lock().unwrap();
    let sent: HashSet<&[u8]> = posts.iter().map(|(_, body)| &body[..]).collect();
    assert_eq!((posts.len(), sent.len()), (200, 200));
    for (headers, body) in posts.iter() {
        assert_eq!(headers["content-type"], "application/json");
        assert_eq!(headers["content-length"], body.len().to_string().as_str());
        assert!(!headers.contains_key("transfer-encoding"));
    }
    let paths = rig.engine.paths.lock().unwrap();
    assert_eq!(
        *paths,
        HashSet::from(["/identities/api/v1/authenticate".into(), "/identities/api/v1/faceEdge/publish".into()])
    );
    let text = rig.metrics.render();
    assert!(text.contains(r#"framegate_publish_attempts_total{result="200"} 200"#), "{text}");
    assert!(text.contains(r#"framegate_engine_state{state="open"} 1"#), "{text}");
    assert!(text.contains(r#"framegate_engine_state{state="credentials"} 0"#), "{text}");
    assert!(text.contains("framegate_frames_in_flight 0"), "{text}");
    assert!(!text.contains("hunter2") && !text.contains("Bearer"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_expires_under_32_publishes_costs_one_renewal_and_one_login() {
    let rig = Rig::start(quick()).await;
    rig.publish(&["{}"; 64]).await;
    rig.engine.good.store(1, Ordering::SeqCst);
    assert_eq!(rig.publish(&["{}"; 32]).await, vec![Outcome::Accepted; 32]);
    assert_eq!(rig.engine.renewals.load(Ordering::SeqCst), 1);
    assert_eq!(rig.engine.logins.load(Ordering::SeqCst), 2);
    assert_eq!(rig.posts(), 96);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_pauses_and_a_reload_after_correcting_it_goes_on() {
    let rig = Rig::start(quick()).await;
    write_password(&rig.password, "wrong");
    let frame = frame("cam", 0.0);
    let publishing = rig.publisher.publish(&frame, Bytes::from_static(b"{}"), || ());
    let correcting = async {
        rig.eventually("paused", |status| status.state == State::Credentials).await;
        assert!(!rig.publisher.status().reason.contains("wrong"));
        write_password(&rig.password, "hunter2");
        let config = engine::Config {
            base_url: rig.publisher.live.load().client.base(),
            username: Some("edge".into()),
            ..engine::Config::default()
        };
        let secrets = engine::Secrets { password_file: Some(rig.password.path().join("password")), token_file: None };
        rig.publisher.reconfigure(&config, secrets, &quick()).unwrap();
    };
    let (outcome, ()) = tokio::time::timeout(PATIENCE, async { tokio::join!(publishing, correcting) }).await.unwrap();
    assert_eq!(outcome, Outcome::Accepted);
    assert_eq!(rig.engine.logins.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_is_not_followed_and_pauses() {
    let rig = Rig::start(quick()).await;
    rig.script(|_| Some((StatusCode::FOUND, [("location", "/stolen")]).into_response()));
    let frame = frame("cam", 0.0);
    let publishing = rig.publisher.publish(&frame, Bytes::from_static(b"{}"), || ());
    let watching = async {
        rig.eventually("paused", |status| status.state == State::UnexpectedAnswer).await;
        *rig.engine.script.lock().unwrap() = None;
    };
    let (outcome, ()) = tokio::time::timeout(PATIENCE, async { tokio::join!(publishing, watching) }).await.unwrap();
    assert_eq!(outcome, Outcome::Accepted);
    assert!(!rig.engine.paths.lock().unwrap().contains("/stolen"));
    assert_eq!(rig.publisher.status().state, State::Open);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_bad_frame_among_good_ones_is_refused_and_the_rest_pass() {
    for (status, reason) in [(400, Reason::Rejected), (403, Reason::Forbidden), (500, Reason::ServerError)] {
        let rig = Rig::start(Config { attempts: 3, ..quick() }).await;
        rig.script(move |body| {
            (body == b"bad").then(|| (StatusCode::from_u16(status).unwrap(), "field missing").into_response())
        });
        let good = async {
            // There is always another frame until the bad one is settled.
            let mut accepted = 0;
            while accepted < 400 {
                assert_eq!(rig.publish(&["{}"; 4]).await, vec![Outcome::Accepted; 4]);
                accepted += 4;
            }
        };
        let (outcomes, ()) = tokio::join!(rig.publish(&["bad"]), good);
        let Outcome::Refused(refusal) = &outcomes[0] else { panic!("{status}: {outcomes:?}") };
        assert_eq!((refusal.reason, refusal.status), (reason, Some(status)));
        assert_eq!(refusal.message, "field missing");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_absent_engine_pauses_and_a_stop_releases() {
    let rig = Rig::start(quick()).await;
    rig.publish(&["{}"]).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base_url = format!("http://{}", listener.local_addr().unwrap());
    let config = engine::Config { base_url, username: Some("edge".into()), ..engine::Config::default() };
    let secrets = engine::Secrets { password_file: Some(rig.password.path().join("password")), token_file: None };
    drop(listener);
    rig.publisher.reconfigure(&config, secrets, &quick()).unwrap();
    let frame = frame("cam", 0.0);
    let publishing = rig.publisher.publish(&frame, Bytes::from_static(b"{}"), || ());
    let stopping = async {
        rig.eventually("paused", |status| status.state == State::Unreachable).await;
        rig.publisher.stop();
    };
    let (outcome, ()) = tokio::time::timeout(PATIENCE, async { tokio::join!(publishing, stopping) }).await.unwrap();
    assert_eq!(outcome, Outcome::Released { said: None }, "the login failed, no attempt was made");
}

/// Answers logins, drops the first publish after reading its head, accepts the second.
async fn losing_engine(listener: TcpListener) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut publishes = 0;
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"}") {
            if stream.read_buf(&mut head).await.unwrap() == 0 {
                break;
            }
        }
        let body = if head.starts_with(b"POST /api/v1/authenticate") {
            r#"{"username":"edge","token":"t"}"#
        } else {
            publishes += 1;
            if publishes == 1 {
                continue;
            }
            ""
        };
        let answer = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        stream.write_all(answer.as_bytes()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_is_counted_as_ambiguous_and_the_frame_is_sent_again() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base_url = format!("http://{}", listener.local_addr().unwrap());
    let rig = Rig::with(&quick(), engine::Config { base_url, ..engine::Config::default() }, |_, tasks| {
        tasks.spawn(losing_engine(listener));
    });
    assert_eq!(rig.publish(&["{}"]).await, [Outcome::Accepted]);
    let text = rig.metrics.render();
    assert!(text.contains("framegate_publish_ambiguous_total 1"), "{text}");
    assert!(text.contains(r#"framegate_publish_attempts_total{result="reset"} 1"#), "{text}");
    assert!(text.contains(r#"framegate_publish_retries_total{reason="ambiguous"} 1"#), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rates_hold_for_the_box_and_for_each_detector() {
    let rig = Rig::start(Config { rate: 100.0, burst: 1, ..quick() }).await;
    let began = std::time::Instant::now();
    let all = (0..20).map(|n| {
        let rig = &rig;
        async move {
            let frame = if n % 2 == 0 { frame("slow", 20.0) } else { frame("fast", 0.0) };
            rig.publisher.publish(&frame, Bytes::from_static(b"{}"), || ()).await
        }
    });
    tokio::time::timeout(PATIENCE, futures_util::future::join_all(all)).await.unwrap();
    // 20 frames and a login at 100 per second.
    assert!(began.elapsed() >= Duration::from_millis(200), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_publish_gives_its_place_back() {
    let rig = Rig::start(quick()).await;
    rig.publish(&["{}"]).await;
    rig.script(|_| Some((StatusCode::SERVICE_UNAVAILABLE, [("retry-after", "600")]).into_response()));
    let frame = frame("cam", 0.0);
    {
        let publishing = rig.publisher.publish(&frame, Bytes::from_static(b"{}"), || ());
        let watching = rig.eventually("throttled", |status| status.state == State::Throttled && status.waiting == 1);
        tokio::select! {
            outcome = publishing => panic!("{outcome:?}"),
            () = watching => {}
        }
    }
    let status = rig.publisher.status();
    assert_eq!((status.waiting, status.in_flight), (0, 0));
}

/// A TLS server with a certificate of its own making; its base URL and its pin.
async fn tls_server(
    expires: i32,
) -> (TcpListener, tokio_rustls::TlsAcceptor, String, String, rcgen::CertifiedKey<rcgen::KeyPair>) {
    let mut params = rcgen::CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()]).unwrap();
    params.not_after = rcgen::date_time_ymd(expires, 1, 1);
    let signing_key = rcgen::KeyPair::generate().unwrap();
    let made = rcgen::CertifiedKey { cert: params.self_signed(&signing_key).unwrap(), signing_key };
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![made.cert.der().clone()],
            rustls::pki_types::PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into()),
        )
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base_url = format!("https://{}", listener.local_addr().unwrap());
    let spki = rcgen::PublicKeyData::subject_public_key_info(&made.signing_key);
    let pin = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &spki);
    let pin = base64::engine::general_purpose::STANDARD.encode(pin.as_ref());
    (listener, tokio_rustls::TlsAcceptor::from(Arc::new(config)), base_url, pin, made)
}

async fn serve_tls(listener: TcpListener, acceptor: tokio_rustls::TlsAcceptor, app: axum::Router) {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let (acceptor, app) = (acceptor.clone(), app.clone());
        connections.spawn(async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let service = hyper_util::service::TowerToHyperService::new(app);
            let io = hyper_util::rt::TokioIo::new(stream);
            drop(hyper::server::conn::http1::Builder::new().serve_connection(io, service).await);
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pins_and_ca_files_let_the_right_server_in_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, other_ca) = (dir.path().join("ca.pem"), dir.path().join("other.pem"));
    let other = rcgen::generate_simple_self_signed(vec!["127.0.0.1".into()]).unwrap();
    std::fs::write(&other_ca, other.cert.pem()).unwrap();
    let wrong_pin = "00".repeat(32);
    for (ca_file, pinned, insecure, expires, expected) in [
        (None, Some(true), false, 2999, State::Open),
        (None, Some(true), false, 2001, State::UnexpectedAnswer),
        (None, Some(false), false, 2999, State::UnexpectedAnswer),
        (Some(&ca), None, false, 2999, State::Open),
        (Some(&ca), None, false, 2001, State::UnexpectedAnswer),
        (Some(&other_ca), None, false, 2999, State::UnexpectedAnswer),
        (Some(&other_ca), Some(true), false, 2999, State::UnexpectedAnswer),
        (None, None, true, 2001, State::Open),
    ] {
        let (listener, acceptor, base_url, pin, made) = tls_server(expires).await;
        std::fs::write(&ca, made.cert.pem()).unwrap();
        let config = engine::Config {
            base_url: base_url.clone(),
            ca_file: ca_file.cloned(),
            pin_sha256: pinned.map(|right| if right { pin.clone() } else { wrong_pin.clone() }).into_iter().collect(),
            danger_accept_invalid_certs: insecure,
            ..engine::Config::default()
        };
        let rig = Rig::with(&quick(), config, |app, tasks| {
            tasks.spawn(serve_tls(listener, acceptor, app));
        });
        assert_eq!(tls::fetch_pin(&base_url).await.unwrap().pin_sha256, pin);
        let frame = frame("cam", 0.0);
        let publishing = rig.publisher.publish(&frame, Bytes::from_static(b"{}"), || ());
        let watching = async {
            if expected == State::Open {
                rig.eventually("posted", |_| rig.posts() == 1).await;
            } else {
                rig.eventually("paused", |status| status.state == expected).await;
                rig.publisher.stop();
            }
        };
        let (outcome, ()) = tokio::time::timeout(PATIENCE, async { tokio::join!(publishing, watching) }).await.unwrap();
        let good = match &outcome {
            Outcome::Accepted => expected == State::Open,
            Outcome::Released { .. } => expected != State::Open,
            Outcome::Refused(_) => false,
        };
        assert!(good, "{outcome:?} {ca_file:?} {pinned:?} {insecure} {expires} {:?}", rig.publisher.status());
        assert!(rig.tasks.len() == 2 && rig.publisher.status().insecure == insecure);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_speaks_no_tls_is_unreachable() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = engine::Config {
        base_url: format!("https://{}", listener.local_addr().unwrap()),
        danger_accept_invalid_certs: true,
        ..engine::Config::default()
    };
    let rig = Rig::with(&quick(), config, |app, tasks| {
        tasks.spawn(async move { axum::serve(listener, app).await.unwrap() });
    });
    let frame = frame("cam", 0.0);
    let publishing = rig.publisher.publish(&frame, Bytes::from_static(b"{}"), || ());
    let watching = async {
        rig.eventually("paused", |status| status.state == State::Unreachable).await;
        assert!(rig.publisher.status().reason.contains("TLS failed"), "{}", rig.publisher.status().reason);
        rig.publisher.stop();
    };
    let (outcome, ()) = tokio::time::timeout(PATIENCE, async { tokio::join!(publishing, watching) }).await.unwrap();
    assert!(matches!(outcome, Outcome::Released { .. }), "{outcome:?}");
}
