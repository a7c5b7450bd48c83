//! What the documentation says exists, exists.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).expect("a file of the repository")
}

#[test]
fn every_metric_in_the_documentation_is_in_the_table() {
    let table = read("src/metrics.rs");
    let mut seen = BTreeSet::new();
    for path in [
        "README.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "docs/growing.md",
        "deploy/grafana/framegate.json",
        "deploy/prometheus/alerts.yml",
        "tests/alerts_test.yml",
    ] {
        let text = read(path);
        for (at, _) in text.match_indices("framegate_") {
            let name: String = text[at + "framegate_".len()..]
                .chars()
                .take_while(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '_')
                .collect();
            let of_histogram = ["_bucket", "_sum", "_count"].iter().find_map(|part| name.strip_suffix(part));
            let name = of_histogram.unwrap_or(&name).to_owned();
            assert!(table.contains(&format!("\"{name}\"")), "{path} names framegate_{name}, which does not exist");
            seen.insert(name);
        }
    }
    assert!(seen.len() > 10, "the documentation names hardly a metric: {seen:?}");
}

#[test]
fn every_module_is_on_the_map_once() {
    let page = read("ARCHITECTURE.md");
    let map = page.split("```").nth(1).expect("the map is the first block");
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).expect("src can be listed") {
        let path = entry.expect("src can be listed").path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.file_name().and_then(|name| name.to_str()).expect("our names are UTF-8");
            assert_eq!(map.matches(&format!(" {name}")).count(), 1, "src/{name} on the map");
        }
    }
}

#[test]
fn links_between_pages_lead_somewhere() {
    let mut links = 0;
    let docs = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")).expect("docs can be listed");
    let docs = docs.map(|page| format!("docs/{}", page.expect("docs can be listed").file_name().to_string_lossy()));
    let pages = docs
        .filter(|page| Path::new(page).extension().is_some_and(|it| it == "md"))
        .chain(["README.md", "ARCHITECTURE.md"].map(str::to_owned));
    for page in &pages.collect::<Vec<_>>() {
        let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join(page).parent().expect("a directory").to_owned();
        for target in read(page).split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if !target.starts_with("http") && !target.starts_with('#') {
                assert!(beside.join(target).exists(), "{page} links to {target}");
                links += 1;
            }
        }
    }
    assert!(links > 3, "the pages hold hardly a link");
}
