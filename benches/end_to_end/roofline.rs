//! The roofline: the least code that does the daemon's work. It reads each file, builds the body, posts it over as many
//! connections with the same HTTP client, and unlinks the file. No watching, claims, checks, retries, metrics.
//!
//! Files are read and encoded where they are posted, on the runtime's own threads: a cached file is there in microseconds, and an
//! image that is handed to another thread costs a wake-up.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use framegate::encode::body::Body;
use framegate::frame::Detector;

use crate::frame::frame;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The engine
    #[arg(long)]
    pub url: String,
    /// Trust this CA (a PEM file)
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    #[arg(long)]
    pub connections: usize,
    /// The drop directories, each named as its detector
    #[arg(required = true)]
    pub directories: Vec<PathBuf>,
}

impl Args {
    /// As a command line.
    pub(crate) fn line(&self) -> Vec<OsString> {
        let mut line: Vec<OsString> = vec!["roofline".into(), "--url".into(), (&self.url).into()];
        line.extend(["--connections".into(), self.connections.to_string().into()]);
        if let Some(ca) = &self.ca {
            line.extend(["--ca".into(), ca.into()]);
        }
        line.extend(self.directories.iter().map(Into::into));
        line
    }
}

/// Publishes what is there, then waits for the end of standard input, so that what it used can be read.
pub(crate) fn run(args: &Args) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(publish_all(args));
    std::io::stdin().read_to_end(&mut Vec::new()).ok();
}

async fn publish_all(args: &Args) {
    let client = client(args);
    let bearer = log_in(&client, &args.url).await;
    let publish = format!("{}/api/v1/faceEdge/publish", args.url);
    let shared = Arc::new((files(&args.directories), AtomicUsize::new(0)));
    let mut posting = tokio::task::JoinSet::new();
    for _ in 0..args.connections {
        let (shared, client, bearer, publish) = (shared.clone(), client.clone(), bearer.clone(), publish.clone());
        posting.spawn(async move {
            let mut image = Vec::new();
            while let Some((file, detector)) = shared.0.get(shared.1.fetch_add(1, Ordering::Relaxed)) {
                image.clear();
                File::open(file).and_then(|mut it| it.read_to_end(&mut image)).expect("a file");
                let body = Body::build(&frame(detector), &image);
                let request = client
                    .post(&publish)
                    .header("Content-Type", "application/json")
                    .header("Accept", "*/*")
                    .header("Authorization", &bearer)
                    .body(body.bytes());
                let answer = request.send().await.expect("an answer");
                assert!(answer.status().is_success());
                answer.bytes().await.expect("its body");
                fs::remove_file(file).expect("removed");
            }
        });
    }
    posting.join_all().await;
}

fn files(directories: &[PathBuf]) -> Vec<(PathBuf, Arc<Detector>)> {
    let mut files = Vec::new();
    for directory in directories {
        let name = directory.file_name().expect("a name").to_string_lossy().into();
        let detector = Arc::new(Detector { name, time_zone: "UTC".into(), rate: 0.0, weight: 1 });
        let entries = fs::read_dir(directory).expect("a directory").flatten();
        files.extend(entries.map(|it| (it.path(), detector.clone())));
    }
    files
}

async fn log_in(client: &reqwest::Client, url: &str) -> String {
    let login = client
        .post(format!("{url}/api/v1/authenticate"))
        .header("Content-Type", "application/json")
        .body(r#"{"username":"framegate","password":"simulated"}"#);
    let answer = login.send().await.expect("a login").bytes().await.expect("an answer");
    let answer: serde_json::Value = serde_json::from_slice(&answer).expect("JSON");
    format!("Bearer {}", answer["token"].as_str().expect("a token"))
}

/// With the daemon's settings.
fn client(args: &Args) -> reqwest::Client {
    use rustls::pki_types::pem::PemObject as _;
    let mut roots = rustls::RootCertStore::empty();
    if let Some(ca) = &args.ca {
        let certificate = rustls::pki_types::CertificateDer::from_pem_file(ca).expect("a certificate");
        roots.add(certificate).expect("a CA");
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("protocols")
        .with_root_certificates(roots)
        .with_no_client_auth();
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .user_agent("roofline/1")
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .referer(false)
        .no_proxy()
        .connect_timeout(Duration::from_secs(3))
        .pool_max_idle_per_host(args.connections)
        .tcp_nodelay(true)
        .http1_only()
        .build()
        .expect("a client")
}
