//! The simulated engine from outside, through a plain HTTP client.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::Method;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tokio::io::AsyncWriteExt as _;

use super::engine::sha256;
use super::*;

/// More than any of this takes on a busy machine.
const SOON: Duration = Duration::from_secs(20);

struct Client {
    http: reqwest::Client,
    base: String,
}

impl Client {
    fn new(simulator: &Simulator) -> Self {
        Self::trusting(simulator, simulator.ca_pem().as_deref(), |builder| builder)
    }

    fn trusting(
        simulator: &Simulator,
        ca_pem: Option<&str>,
        with: impl Fn(reqwest::ClientBuilder) -> reqwest::ClientBuilder,
    ) -> Self {
        let mut roots = RootCertStore::empty();
        if let Some(pem) = ca_pem {
            roots.add(CertificateDer::from_pem_slice(pem.as_bytes()).expect("PEM")).expect("root");
        }
        let tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let builder = reqwest::Client::builder().tls_backend_preconfigured(tls).no_proxy();
        let builder = builder.redirect(reqwest::redirect::Policy::none()).timeout(SOON);
        Self { http: with(builder).build().expect("client"), base: simulator.base_url() }
    }

    async fn login(&self, username: &str, password: &str) -> reqwest::Response {
        let body = serde_json::json!({ "username": username, "password": password }).to_string();
        self.http
            .post(format!("{}/api/v1/authenticate", self.base))
            .header(CONTENT_TYPE, "application/json")
            .body(body)
            .send()
            .await
            .expect("login")
    }

    async fn token(&self, simulator: &Simulator) -> String {
        token_of(self.login(simulator.username(), simulator.password()).await).await
    }

    async fn renew(&self, token: &str) -> reqwest::Response {
        let url = format!("{}/api/v1/renewToken", self.base);
        self.http.get(url).header(AUTHORIZATION, format!("Bearer {token}")).send().await.expect("renew")
    }

    fn request(&self, token: &str, body: String) -> reqwest::RequestBuilder {
        self.http
            .post(format!("{}/api/v1/faceEdge/publish", self.base))
            .header(AUTHORIZATION, format!("Bearer {token}"))
            .header(CONTENT_TYPE, "application/json")
            .body(body)
    }

    async fn publish(&self, token: &str, n: u64) -> reqwest::Result<reqwest::Response> {
        self.request(token, body("Door", &image(n))).send().await
    }

    async fn status(&self, token: &str, n: u64) -> u16 {
        self.publish(token, n).await.expect("an answer").status().as_u16()
    }

    /// Publishes what is not going to be answered, and goes away when it is there.
    async fn publish_and_leave(&self, simulator: &Simulator, token: &str, n: u64) {
        tokio::select! {
            answer = self.publish(token, n) => panic!("answered: {answer:?}"),
            seen = simulator.wait_for(|counts| counts.in_flight == 1, SOON) => drop(seen.expect("it arrives")),
        }
    }

    async fn control(&self, method: Method, command: &str, body: &str) -> reqwest::Response {
        let root = self.base.trim_end_matches("/identities");
        let request = self.http.request(method, format!("{root}/__simulator/{command}"));
        request.body(body.to_owned()).send().await.expect("control")
    }
}

async fn token_of(answer: reqwest::Response) -> String {
    assert_eq!(answer.status(), 200);
    let json: serde_json::Value = serde_json::from_slice(&answer.bytes().await.expect("body")).expect("JSON");
    json["token"].as_str().expect("token").to_owned()
}

fn image(n: u64) -> Vec<u8> {
    [&[0xff, 0xd8, 0xff, 0xe0][..], &n.to_be_bytes()].concat()
}

fn body(detector: &str, image: &[u8]) -> String {
    serde_json::json!({
        "expanded": STANDARD.encode(image), "detectorName": detector,
        "ianaTimeZone": "America/Los_Angeles", "detectTimeUtc": "2026-11-23T11:00:00.123Z",
    })
    .to_string()
}

async fn start(faults: Faults) -> (Simulator, Client, String) {
    let simulator = Simulator::start(Options { faults, control: true, ..Options::default() }).await.expect("start");
    let client = Client::new(&simulator);
    let token = client.token(&simulator).await;
    (simulator, client, token)
}

#[tokio::test]
async fn a_frame_is_accepted_with_an_empty_answer_and_remembered() {
    let (simulator, client, token) = start(Faults::default()).await;
    let answer = client.publish(&token, 7).await.expect("answer");
    assert_eq!((answer.status().as_u16(), answer.bytes().await.expect("body").len()), (200, 0));
    let large = faces::face(1, 200_000);
    let answer = client.request(&token, body("Lobby", &large)).send().await.expect("answer");
    assert_eq!(answer.status(), 200);
    let accepted = simulator.accepted();
    assert_eq!(
        accepted.iter().map(|frame| (frame.order, &*frame.detector)).collect::<Vec<_>>(),
        [(0, "Door"), (1, "Lobby")]
    );
    assert_eq!(accepted[1].sha256, sha256(&large));
    assert_eq!((accepted[0].zone.as_str(), accepted[0].size), ("America/Los_Angeles", 12));
    assert_eq!(accepted[0].time.to_string(), "2026-11-23T11:00:00.123Z");
    let counts = simulator.counts();
    assert_eq!((counts.authenticate, counts.publish, counts.accepted, counts.statuses[&200]), (1, 2, 2, 3));
    assert_eq!((counts.violations, counts.in_flight), (0, 0));
    assert_eq!(simulator.arrivals().len(), 3);
}

#[tokio::test]
async fn flaws_are_answered_with_400_and_are_violations() {
    let (simulator, client, token) = start(Faults::default()).await;
    let answer = client.request(&token, body("Door", b"plain text")).send().await.expect("answer");
    assert_eq!(answer.status(), 400);
    assert!(answer.text().await.expect("text").contains("`expanded`"));
    assert_eq!(client.request("made up", "{}".into()).send().await.expect("answer").status(), 401);
    assert_eq!(client.http.get(client.base.clone() + "/api/v2/other").send().await.expect("answer").status(), 404);
    let login = client.http.post(client.base.clone() + "/api/v1/authenticate").body("{}").send().await.expect("answer");
    assert_eq!(login.status(), 400);
    let counts = simulator.counts();
    assert_eq!((counts.accepted, counts.violations), (0, 5), "{:?}", counts.violation_messages);
}

#[tokio::test]
async fn tokens_expire_are_revoked_and_renewed() {
    let (simulator, client, token) = start(Faults::default()).await;
    assert_eq!(client.login("framegate", "wrong").await.status(), 401);
    assert_eq!(client.login("nobody", "simulated").await.status(), 401);
    let renewed = token_of(client.renew(&token).await).await;
    assert_ne!(token, renewed);
    assert_eq!((client.status(&token, 1).await, client.status(&renewed, 2).await), (200, 200), "both live");
    simulator.revoke_all_tokens();
    assert_eq!((client.status(&renewed, 3).await, client.renew(&renewed).await.status().as_u16()), (401, 401));
    simulator.change(|faults| faults.token_ttl = Duration::ZERO);
    let expired = client.token(&simulator).await;
    assert_eq!((client.status(&expired, 4).await, client.renew(&expired).await.status().as_u16()), (401, 401));
    simulator.change(|faults| (faults.token_ttl, faults.single_token) = (SOON, true));
    let (first, second) = (client.token(&simulator).await, client.token(&simulator).await);
    assert_eq!((client.status(&first, 5).await, client.status(&second, 6).await), (401, 200), "the newer one only");
    simulator.change(|faults| (faults.login_status, faults.renew_status) = (Some(500), Some(403)));
    assert_eq!(client.login("framegate", "simulated").await.status(), 500);
    assert_eq!(client.renew(&second).await.status(), 403);
    assert_eq!(simulator.counts().violations, 0, "none of that is the client's fault");
}

/// Each row: the faults, and the status that a good frame of the detector `Door` gets.
#[tokio::test]
async fn each_fault_has_its_status() {
    let (simulator, client, token) = start(Faults::default()).await;
    let image_of_one = records::hex(&sha256(&image(1)));
    let redirect = Redirect { status: 307, location: "http://127.0.0.1:9/".into() };
    let rows: Vec<(Faults, u16)> = vec![
        (Faults::default(), 200),
        (Faults { error_rate: 1.0, error_statuses: vec![502], ..Faults::default() }, 502),
        (Faults { answer_all: Some(403), ..Faults::default() }, 403),
        (Faults { by_detector: [("Door".into(), 403)].into(), ..Faults::default() }, 403),
        (Faults { by_detector: [("Other".into(), 403)].into(), ..Faults::default() }, 200),
        (Faults { by_image: [(image_of_one, 500)].into(), ..Faults::default() }, 500),
        (Faults { refuse_share: 1.0, ..Faults::default() }, 400),
        (Faults { capacity: Some(0), ..Faults::default() }, 503),
        (Faults { rate: Some(1e-9), ..Faults::default() }, 429),
        (Faults { rate: Some(1e9), ..Faults::default() }, 200),
        (Faults { redirect: Some(redirect), ..Faults::default() }, 307),
        (Faults { portal: true, ..Faults::default() }, 200),
    ];
    for (faults, want) in rows {
        simulator.change(|now| *now = faults.clone());
        assert_eq!(client.status(&token, 1).await, want, "{faults:?}");
    }
    assert_eq!(simulator.counts().accepted, 3, "the portal takes nothing");
    assert_eq!(simulator.counts().violations, 0);
}

#[tokio::test]
async fn answers_carry_what_was_ordered() {
    let (simulator, client, token) = start(Faults::default()).await;
    simulator.change(|faults| (faults.answer_all, faults.retry_after) = (Some(429), Some("soon".into())));
    assert_eq!(client.publish(&token, 1).await.expect("answer").headers()["retry-after"], "soon");
    let location = "http://127.0.0.1:9/login".to_owned();
    simulator.change(|faults| faults.redirect = Some(Redirect { status: 302, location }));
    assert_eq!(client.publish(&token, 1).await.expect("answer").headers()["location"], "http://127.0.0.1:9/login");
    simulator
        .change(|faults| *faults = Faults { portal: true, clock_offset_seconds: -157_680_000, ..Faults::default() });
    let answer = client.login("framegate", "simulated").await;
    assert_eq!(answer.headers()["content-type"], "text/html; charset=utf-8");
    let date = httpdate::parse_http_date(answer.headers()["date"].to_str().expect("ASCII")).expect("a date");
    let years = date.elapsed().expect("past").as_secs() / 31_536_000;
    assert_eq!(years, 5, "the engine's clock is behind");
    assert!(answer.text().await.expect("page").contains("<!doctype html>"));
}

#[tokio::test]
async fn a_script_is_for_one_request_each() {
    let (simulator, client, token) = start(Faults::default()).await;
    simulator.script([Action::status(500), Action::CutBefore, Action::CutAfter, Action::Serve, Action::Hang]);
    assert_eq!(client.status(&token, 1).await, 500);
    let once =
        Client::trusting(&simulator, None, |builder| builder.retry(reqwest::retry::never()).pool_max_idle_per_host(0));
    assert!(once.publish(&token, 2).await.is_err(), "cut before");
    assert!(once.publish(&token, 3).await.is_err(), "cut after");
    assert_eq!(once.status(&token, 4).await, 200);
    once.publish_and_leave(&simulator, &token, 5).await;
    assert_eq!(once.status(&token, 6).await, 200);
    let counts = simulator.wait_for(|counts| counts.in_flight == 0, SOON).await.expect("the hanging one gave up");
    assert_eq!((counts.accepted, counts.cut), (3, 2), "3, 4 and 6");
    let kept: Vec<_> = simulator.accepted().iter().map(|frame| frame.sha256).collect();
    assert_eq!(kept, [3, 4, 6].map(|n| sha256(&image(n))));
}

#[tokio::test]
async fn slow_and_endless_answers_do_not_end_in_time() {
    let (simulator, client, token) = start(Faults::default()).await;
    for action in [Action::Trickle, Action::EndlessHeaders, Action::Flood] {
        simulator.script([action.clone()]);
        let request = client.request(&token, body("Door", &image(1))).timeout(Duration::from_secs(1));
        match request.send().await {
            Ok(answer) if action == Action::Flood => assert_eq!(answer.content_length(), Some(1 << 30)),
            Ok(answer) => assert!(answer.bytes().await.expect_err("no end").is_timeout(), "{action:?}"),
            Err(error) => assert!(action == Action::EndlessHeaders, "{action:?}: {error:?}"),
        }
    }
    assert_eq!(simulator.counts().accepted, 3, "each was taken");
}

#[tokio::test]
async fn requests_can_be_held_and_released_together() {
    let (simulator, client, token) = start(Faults { capacity: Some(3), ..Faults::default() }).await;
    simulator.hold();
    let all = futures_util::future::join_all((0..4).map(|n| client.status(&token, n)));
    let steer = async {
        simulator.wait_for(|counts| counts.in_flight == 4, SOON).await.expect("four at once");
        simulator.release();
    };
    let (mut statuses, ()) = tokio::join!(all, steer);
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 200, 200, 503], "three fit");
}

#[tokio::test]
async fn waiting_for_what_never_comes_returns_the_counts() {
    let (simulator, _client, _token) = start(Faults::default()).await;
    let counts = simulator.wait_for(|counts| counts.accepted == 1, Duration::from_millis(20)).await;
    assert_eq!(counts.expect_err("nothing was published").authenticate, 1);
}

#[tokio::test]
async fn down_refuses_connections_and_up_takes_the_same_port() {
    let (simulator, client, token) = start(Faults::default()).await;
    for round in 0..3 {
        assert_eq!(client.status(&token, round).await, 200);
        simulator.down().await;
        let error = client.publish(&token, round).await.expect_err("down");
        assert!(error.is_connect(), "{error:?}");
        simulator.up().await.expect("up");
        simulator.up().await.expect("up twice is up");
    }
    simulator.hold();
    let cut = async {
        simulator.wait_for(|counts| counts.in_flight == 1, SOON).await.expect("one in flight");
        simulator.cut_connections().await;
    };
    let (answer, ()) = tokio::join!(client.publish(&token, 8), cut);
    assert!(answer.is_err(), "cut while it waited");
    simulator.release();
    assert_eq!(client.status(&token, 9).await, 200, "new connections are welcome");
    simulator.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn after_a_cut_nothing_more_is_counted_of_the_connections_that_were() {
    let (simulator, _, _) = start(Faults::default()).await;
    for round in 0..100 {
        let before = simulator.counts().unknown;
        let asking: Vec<_> = (0..8)
            .map(|_| {
                let address = simulator.address();
                tokio::spawn(async move {
                    let mut stream = TcpStream::connect(address).await.expect("a connection");
                    // It never waits for an answer, so that there is always a request to be read.
                    while stream.write_all(b"GET /anything HTTP/1.1\r\nHost: engine\r\n\r\n").await.is_ok() {}
                })
            })
            .collect();
        let all_ask = |counts: &Counts| counts.open == 8 && counts.unknown > before + 100;
        simulator.wait_for(all_ask, SOON).await.expect("requests come");
        simulator.cut_connections().await;
        let cut = simulator.counts().unknown;
        for asking in asking {
            asking.await.expect("no panic");
        }
        assert_eq!(simulator.counts().unknown, cut, "round {round}");
    }
}

#[tokio::test]
async fn idle_connections_are_closed() {
    let options = Options { idle: Duration::from_millis(300), ..Options::default() };
    let simulator = Simulator::start(options).await.expect("start");
    let client = Client::new(&simulator);
    let token = client.token(&simulator).await;
    simulator.wait_for(|counts| (counts.connections, counts.open) == (1, 0), SOON).await.expect("closed by the engine");
    assert_eq!(client.status(&token, 1).await, 200);
    assert_eq!(simulator.counts().connections, 2);
}

#[tokio::test]
async fn http2_is_spoken_with_prior_knowledge_and_by_alpn() {
    let (simulator, _, token) = start(Faults::default()).await;
    let client = Client::trusting(&simulator, None, reqwest::ClientBuilder::http2_prior_knowledge);
    let answer = client.publish(&token, 1).await.expect("answer");
    assert_eq!((answer.version(), answer.status().as_u16()), (reqwest::Version::HTTP_2, 200));
    simulator.script([Action::CutAfter]);
    assert!(client.publish(&token, 2).await.is_err(), "a cut ends the whole connection");
    for (http2, version) in [(true, reqwest::Version::HTTP_2), (false, reqwest::Version::HTTP_11)] {
        let options = Options { tls: Some(Certificate::Good), http2, ..Options::default() };
        let simulator = Simulator::start(options).await.expect("start");
        let offering = Client { http: offering_h2(&simulator), base: simulator.base_url() };
        let answer = offering.login(simulator.username(), simulator.password()).await;
        assert_eq!((answer.version(), answer.status().as_u16()), (version, 200));
    }
}

/// A preconfigured TLS configuration has to name the protocols itself.
fn offering_h2(simulator: &Simulator) -> reqwest::Client {
    let mut roots = RootCertStore::empty();
    let pem = simulator.ca_pem().expect("TLS");
    roots.add(CertificateDer::from_pem_slice(pem.as_bytes()).expect("PEM")).expect("root");
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    reqwest::Client::builder().tls_backend_preconfigured(tls).no_proxy().build().expect("client")
}

/// Each row: the certificate, and whether a client that trusts the simulator's authority takes it.
#[tokio::test]
async fn certificates_are_as_ordered() {
    let options = Options { tls: Some(Certificate::Good), ..Options::default() };
    let simulator = Simulator::start(options).await.expect("start");
    assert!(simulator.base_url().starts_with("https://127.0.0.1:"));
    let login = |client: Client| async move {
        let url = format!("{}/api/v1/renewToken", client.base);
        client.http.get(url).header(AUTHORIZATION, "Bearer none").send().await.is_ok()
    };
    let mut pins = vec![];
    for (certificate, good) in [
        (Certificate::Good, true),
        (Certificate::Expired, false),
        (Certificate::NotYetValid, false),
        (Certificate::WrongName, false),
        (Certificate::SelfSigned, false),
        (Certificate::OtherAuthority, false),
        (Certificate::Good, true),
    ] {
        simulator.show_certificate(certificate).expect("show");
        assert_eq!(login(Client::new(&simulator)).await, good, "{certificate:?}");
        let pin = simulator.pin().expect("pin");
        assert_eq!(STANDARD.decode(&pin).expect("base64").len(), 32);
        assert!(!pins.contains(&pin), "each certificate has a key of its own");
        pins.push(pin);
    }
    assert!(!login(Client::trusting(&simulator, None, |builder| builder)).await, "without the authority");
}

#[tokio::test]
async fn a_prefix_is_kept_and_needed() {
    let options = Options { prefix: "/identities".into(), control: true, ..Options::default() };
    let simulator = Simulator::start(options).await.expect("start");
    assert!(simulator.base_url().ends_with("/identities"));
    let mut client = Client::new(&simulator);
    let token = client.token(&simulator).await;
    assert_eq!(client.status(&token, 1).await, 200);
    client.base = client.base.trim_end_matches("/identities").to_owned();
    assert_eq!(client.status(&token, 1).await, 404);
}

#[tokio::test]
async fn it_is_steered_over_http() {
    let (simulator, client, token) = start(Faults::default()).await;
    assert_eq!(client.status(&token, 1).await, 200);
    let counts = client.control(Method::GET, "counts", "").await.text().await.expect("text");
    let counts: serde_json::Value = serde_json::from_str(&counts).expect("JSON");
    assert_eq!((&counts["accepted"], &counts["statuses"]["200"]), (&1.into(), &2.into()));
    let lines = client.control(Method::GET, "accepted", "").await.text().await.expect("text");
    let line: serde_json::Value = serde_json::from_str(lines.lines().next().expect("a line")).expect("JSON");
    assert_eq!((&line["detector"], &line["time"]), (&"Door".into(), &"2026-11-23T11:00:00.123Z".into()));
    assert_eq!(line["sha256"], records::hex(&sha256(&image(1))));
    assert_eq!(client.control(Method::PUT, "faults", r#"{"answer_all":503}"#).await.status(), 204);
    assert_eq!(client.status(&token, 2).await, 503);
    assert_eq!(client.control(Method::PUT, "faults", r#"{"answer":503}"#).await.status(), 400);
    assert_eq!(client.control(Method::PUT, "faults", "{}").await.status(), 204);
    assert_eq!(client.control(Method::POST, "script", r#"["hang",{"answer":{"status":418}}]"#).await.status(), 204);
    client.publish_and_leave(&simulator, &token, 3).await;
    assert_eq!(client.status(&token, 4).await, 418);
    assert_eq!(client.control(Method::POST, "revoke-tokens", "").await.status(), 204);
    assert_eq!(client.status(&token, 5).await, 401);
    assert_eq!(client.control(Method::GET, "nonsense", "").await.status(), 404);
    assert_eq!(simulator.counts().violations, 0);
    let quiet = Simulator::start(Options::default()).await.expect("start");
    assert_eq!(Client::new(&quiet).control(Method::GET, "counts", "").await.status(), 404, "only where it is wanted");
}
