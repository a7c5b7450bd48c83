//! A headless Chromium with one page: the browser that a technician has, told what to do in its own protocol over a pipe, one
//! JSON text after the other, each ended by a zero byte. So there is no driver, socket or port between.
//!
//! Where Chromium is missing [`Page::open`] gives `None`; the test then has said so with [`skipped`] and returns.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::faults::{skipped, works};
use super::{PATIENCE, eventually};

/// The browser's own traffic and services would be in the way; the sandbox does not work for root.
const FLAGS: [&str; 12] = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
];

/// The page, and the browser around it. Dropped, all of it is gone.
pub struct Page {
    browser: Child,
    orders: ChildStdin,
    news: Receiver<Value>,
    session: Option<String>,
    calls: u64,
    seen: VecDeque<Value>,
    _profile: TempDir,
}

impl Page {
    /// An empty page.
    pub fn open(test: &str) -> Option<Self> {
        if !works("chromium", &["--version"]) {
            skipped(test, "no chromium: apt-get install chromium");
            return None;
        }
        let profile = tempfile::tempdir().expect("a temporary directory");
        // The browser speaks on descriptors 3 and 4.
        let mut browser = Command::new("sh")
            .args(["-c", "exec chromium \"$@\" 3<&0 4>&1 </dev/null >/dev/null", "sh"])
            .args(FLAGS)
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .env("HOME", profile.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("sh starts");
        let orders = browser.stdin.take().expect("a pipe");
        let news = listen(BufReader::new(browser.stdout.take().expect("a pipe")));
        let (session, seen) = (None, VecDeque::new());
        let mut page = Self { browser, orders, news, session, calls: 0, seen, _profile: profile };
        let target = page.call("Target.createTarget", &json!({ "url": "about:blank" }));
        let attached = page.call("Target.attachToTarget", &json!({ "targetId": target["targetId"], "flatten": true }));
        page.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log", "Network"] {
            page.call(&format!("{domain}.enable"), &json!({}));
        }
        page.size(1280, 900);
        Some(page)
    }

    /// Loads an address, and waits until all of it is there.
    #[track_caller]
    pub fn go(&mut self, url: &str) {
        self.seen.clear();
        let answer = self.call("Page.navigate", &json!({ "url": url }));
        assert!(answer["errorText"].is_null(), "{url}: {answer}");
        self.until_loaded();
    }

    /// Waits until a document has been loaded since the last look.
    #[track_caller]
    pub fn until_loaded(&mut self) {
        eventually("the page is loaded", PATIENCE, || {
            self.hear();
            let at = self.seen.iter().position(|event| event["method"] == "Page.loadEventFired")?;
            self.seen.remove(at)
        });
    }

    /// What an expression gives in the page, also one that has to be waited for.
    #[track_caller]
    pub fn ask(&mut self, expression: &str) -> Value {
        let parameters = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let answer = self.call("Runtime.evaluate", &parameters);
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer}");
        answer["result"]["value"].clone()
    }

    /// What an expression gives as text.
    #[track_caller]
    pub fn text(&mut self, expression: &str) -> String {
        let value = self.ask(expression);
        value.as_str().unwrap_or_else(|| panic!("{expression} gives {value}")).to_owned()
    }

    /// Waits until an expression is true.
    #[track_caller]
    pub fn until(&mut self, what: &str, expression: &str) {
        eventually(what, PATIENCE, || (self.ask(expression) == json!(true)).then_some(()));
    }

    /// Presses the tabulator key, with or without shift.
    pub fn tab(&mut self, back: bool) {
        for kind in ["keyDown", "keyUp"] {
            let modifiers = if back { 8 } else { 0 };
            let key = json!({ "type": kind, "key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9, "modifiers": modifiers });
            self.call("Input.dispatchKeyEvent", &key);
        }
    }

    /// The window's size in CSS pixels; a narrow one is a phone's.
    pub fn size(&mut self, width: u32, height: u32) {
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600 });
        self.call("Emulation.setDeviceMetricsOverride", &metrics);
    }

    /// `light` or `dark`, as the technician's system has it.
    pub fn scheme(&mut self, scheme: &str) {
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call("Emulation.setEmulatedMedia", &json!({ "features": features }));
    }

    /// From the next load on no script of the page runs.
    pub fn without_scripts(&mut self) {
        self.call("Emulation.setScriptExecutionDisabled", &json!({ "value": true }));
    }

    /// A picture of the whole page, not only of what fits the window: where it was written.
    #[track_caller]
    pub fn picture(&mut self, name: &str) -> PathBuf {
        let answer = self.call("Page.captureScreenshot", &json!({ "captureBeyondViewport": true }));
        let picture = BASE64_STANDARD.decode(answer["data"].as_str().expect("a picture")).expect("base64");
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("status-page");
        std::fs::create_dir_all(&directory).expect("a directory can be made");
        let path = directory.join(format!("{name}.png"));
        std::fs::write(&path, picture).expect("a picture can be written");
        path
    }

    /// Everything that the browser complained about since the last load: errors, warnings, what the page's policy forbids.
    pub fn complaints(&mut self) -> Vec<String> {
        self.hear();
        let complaint = |event: &Value| {
            let parameters = &event["params"];
            match event["method"].as_str()? {
                "Runtime.exceptionThrown" => Some(parameters["exceptionDetails"].to_string()),
                "Log.entryAdded" => Some(parameters["entry"].to_string()),
                "Runtime.consoleAPICalled" => Some(parameters["args"].to_string()),
                _ => None,
            }
        };
        self.seen.iter().filter_map(complaint).collect()
    }

    /// Every address that was asked for since the last load.
    pub fn requests(&mut self) -> Vec<String> {
        self.hear();
        let requests = self.seen.iter().filter(|event| event["method"] == "Network.requestWillBeSent");
        requests.map(|event| event["params"]["request"]["url"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// Takes in what the browser has told in the meantime.
    fn hear(&mut self) {
        self.seen.extend(self.news.try_iter());
    }

    #[track_caller]
    fn call(&mut self, method: &str, parameters: &Value) -> Value {
        self.calls += 1;
        let mut order = json!({ "id": self.calls, "method": method, "params": parameters });
        if let Some(session) = &self.session {
            order["sessionId"] = json!(session);
        }
        self.orders.write_all(format!("{order}\0").as_bytes()).expect("the browser runs");
        loop {
            let news = self.news.recv_timeout(PATIENCE).unwrap_or_else(|error| panic!("{method}: {error}"));
            if news["id"] != self.calls {
                self.seen.push_back(news);
                continue;
            }
            assert!(news["error"].is_null(), "{method}: {news}");
            return news["result"].clone();
        }
    }
}

/// Hands on what the browser says, until it ends.
fn listen(mut from: BufReader<impl std::io::Read + Send + 'static>) -> Receiver<Value> {
    let (tell, news) = mpsc::channel();
    std::thread::spawn(move || {
        let mut text = Vec::new();
        while from.read_until(0, &mut text).is_ok_and(|read| read > 0) {
            text.pop();
            let news = serde_json::from_slice(&text).expect("the browser speaks JSON");
            if tell.send(news).is_err() {
                break;
            }
            text.clear();
        }
    });
    news
}

impl Drop for Page {
    fn drop(&mut self) {
        let _ended_already = self.browser.kill();
        let _reaped = self.browser.wait();
    }
}
