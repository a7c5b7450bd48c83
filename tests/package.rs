//! The Debian package and its units, on Debians that really run: installed, started, disturbed, upgraded, removed.
//!
//! Each test boots a machine of its own with systemd 252 and one with 257 (`support::machine`). It needs root, mmdebstrap,
//! systemd-nspawn and debhelper, and is skipped where one of them is missing.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use serde_json::Value;
use support::faults::{skipped, works};
use support::machine::{Machine, package, repository, text};
use support::{PASSWORD, PATIENCE, eventually};

const INCOMING: &str = "/var/spool/framegate/incoming";
/// Of 100: what `systemd-analyze security` may find at most, 1.2 of 10.
const EXPOSURE_MAX: &str = "12";

/// Each test once for each systemd.
macro_rules! on_both {
    ($($test:ident)*) => {
        mod systemd_252 { $(#[test] fn $test() { super::$test("bookworm"); })* }
        mod systemd_257 { $(#[test] fn $test() { super::$test("trixie"); })* }
    };
}

on_both! {
    a_fresh_installation_waits_and_a_few_lines_start_it
    the_units_are_correct_and_little_exposed
    cameras_share_a_drop_directory_and_see_nothing_of_each_other
    nothing_is_writable_but_its_own_places_and_what_a_drop_in_opens
    credentials_come_late_and_encrypted
    the_journal_has_priorities_and_whole_sentences
    d1_killed_again_and_again_it_is_started_again_and_again
    d4_reloads_are_answered_and_a_bad_configuration_changes_nothing
    d4_a_stop_is_clean_and_a_wrong_configuration_is_not_started_for_ever
    d8_a_hang_is_noticed_by_the_watchdog
    the_push_socket_outlives_the_daemon
    upgrades_keep_what_was_changed_and_a_purge_says_what_it_leaves
}

fn a_fresh_installation_waits_and_a_few_lines_start_it(suite: &str) {
    let Some(machine) = Machine::with_package("a_fresh_installation", suite) else { return };
    machine.says("dpkg --install /root/framegate.deb; dpkg --verify framegate");
    assert_eq!(machine.property("ActiveState"), "inactive", "nothing is configured, and that is no failure");
    assert_eq!(machine.property("UnitFileState"), "enabled");
    assert!(machine.journal().contains("nothing is configured yet: edit /etc/framegate/framegate.toml"));
    machine.refuses("systemctl is-enabled framegate-push.socket");
    machine.says("systemctl restart framegate");
    assert_eq!(machine.property("ActiveState"), "inactive");

    machine.start_engine();
    machine.configure();
    let check = machine.says("framegate check");
    assert!(check.contains("password in /etc/credstore/engine-password") && !check.contains("warning: "), "{check}");
    machine.says("useradd --create-home --groups framegate-drop ftp; systemctl start framegate");
    machine.drop_face("ftp", &format!("{INCOMING}/Lobby"), 1);
    machine.until_accepted(1);
    machine.until(
        "systemctl status tells",
        "systemctl status framegate | grep -q 'Status: \"engine open; 1 published, 0 pending\"'",
    );
    assert!(machine.says("framegate status").contains("Lobby"));
    machine.says("framegate doctor");
    let metrics = machine.admin("/metrics");
    for name in ["process_start_time_seconds", "process_open_fds", "process_resident_memory_bytes"] {
        assert!(metrics.lines().any(|line| line.starts_with(name)), "{name}: the sandbox hides it\n{metrics}");
    }
    for file in [
        "/usr/share/bash-completion/completions/framegate",
        "/usr/share/zsh/vendor-completions/_framegate",
        "/usr/share/fish/vendor_completions.d/framegate.fish",
        "/usr/share/framegate/prometheus/scrape.yml",
        "/usr/share/framegate/prometheus/alerts.yml",
        "/usr/share/framegate/grafana/framegate.json",
        "/usr/share/man/man1/framegate.1.gz",
        "/usr/share/man/man1/framegate-dead-letter-retry.1.gz",
        "/etc/framegate/conf.d",
    ] {
        assert!(machine.path(file).exists(), "{file}");
    }
    let completed = machine.says(
        "bash -c '. /usr/share/bash-completion/completions/framegate
                  COMP_WORDS=(framegate rel) COMP_CWORD=1
                  $(complete -p framegate | sed \"s/.*-F //; s/ .*//\") framegate rel framegate; echo ${COMPREPLY[*]}'",
    );
    assert_eq!(completed, "reload\n");
    machine.says("framegate check --config /usr/share/doc/framegate/examples/framegate.toml");
}

fn the_units_are_correct_and_little_exposed(suite: &str) {
    let Some(machine) = Machine::with_package("the_units", suite) else { return };
    machine.says("dpkg --install /root/framegate.deb");
    let units = "framegate.service framegate-push.socket";
    // It succeeds also where it does not know a key. Manual pages are not installed here.
    let output = machine.shell(&format!("systemd-analyze verify --man=no {units}"));
    assert_eq!(text(&output), "");
    machine.says(&format!("systemd-analyze security --offline=true --threshold={EXPOSURE_MAX} framegate.service"));
    // As the units ask for it; that the kernel holds them is shown where a machine has the controllers for it.
    for (limit, value) in [
        ("MemoryMax", "1073741824"),
        ("TasksMax", "1024"),
        ("LimitNOFILE", "65536"),
        ("LimitCORE", "0"),
        ("Restart", "always"),
        ("StartLimitIntervalUSec", "0"),
        ("Type", "notify"),
    ] {
        assert_eq!(machine.property(limit), value, "{limit}");
    }
    for example in ["drop-directories", "credentials", "engine-only"] {
        let at = "/etc/systemd/system/framegate.service.d";
        machine.says(&format!("mkdir -p {at}; cp /usr/share/doc/framegate/examples/{example}.conf {at}/"));
        // What stands there as an example must be right too.
        machine.says(&format!("sed -i 's/^#\\([A-Z]\\)/\\1/' {at}/{example}.conf"));
        let output = machine.shell("systemctl daemon-reload; systemd-analyze verify --man=no framegate.service");
        assert_eq!(text(&output), "", "{example}");
    }
    assert!(machine.says("systemctl cat framegate").contains("IPAddressDeny=any"));
}

fn cameras_share_a_drop_directory_and_see_nothing_of_each_other(suite: &str) {
    let Some(machine) = Machine::set_up("cameras_share", suite) else { return };
    let gate = format!("{INCOMING}/Gate");
    machine.drop_face("ftp", &format!("{INCOMING}/Lobby"), 1);
    machine.drop_face("cam", &gate, 2);
    assert!(machine.may("ftp", &format!("cp /tmp/face-1.jpg {INCOMING}/between.txt")));
    assert!(machine.may("ftp", &format!("cat {INCOMING}/between.txt {INCOMING}/Lobby/1.jpg")), "its own");
    for (user, script) in [
        ("cam", format!("ls {INCOMING}/Lobby")),
        ("cam", format!("cat {INCOMING}/Lobby/1.jpg")),
        ("cam", format!("cat {INCOMING}/between.txt")),
        ("cam", format!("rm -f {INCOMING}/between.txt")),
        ("cam", format!("mv {INCOMING}/Lobby {INCOMING}/Elsewhere")),
        ("stranger", format!("ls {INCOMING}")),
        ("stranger", format!("ls {gate}")),
        ("stranger", format!("cp /tmp/face-1.jpg {INCOMING}/1.jpg")),
        ("stranger", "ls /var/lib/framegate".to_owned()),
        ("ftp", "ls /var/lib/framegate".to_owned()),
        ("stranger", "framegate status".to_owned()),
        ("stranger", "cat /etc/credstore/engine-password".to_owned()),
    ] {
        assert!(!machine.may(user, &script), "{user} may: {script}");
    }
    machine.says("systemctl start framegate");
    machine.until_accepted(2);
    machine.until("published files are gone", &format!("! ls {INCOMING}/Lobby/* {gate}/*"));

    // What no ACL can help: a file that its writer made private.
    assert!(machine.may("cam", &format!("install -m 0600 /tmp/face-2.jpg {gate}/private.jpg")));
    machine.until("it is said", "journalctl --unit=framegate | grep -q 'private.jpg'");
    machine
        .says(&format!("echo no image > {gate}/broken.jpg; chown cam {gate}/broken.jpg; chmod 0640 {gate}/broken.jpg"));
    machine.until("a dead letter is kept", "framegate dead-letter list | grep -q unsupported");
    let seen_by_all =
        machine.says("find /var/lib/framegate /var/spool/framegate/incoming /run/framegate -type f -perm /o=rwx");
    assert_eq!(seen_by_all, "", "no image, no name of one, is for everybody");
}

fn nothing_is_writable_but_its_own_places_and_what_a_drop_in_opens(suite: &str) {
    let Some(machine) = Machine::running("nothing_is_writable", suite) else { return };
    let writable = |machine: &Machine| -> BTreeSet<String> {
        // As the daemon: in its mount namespace, with its user and groups and no privilege. Other processes' /proc is hidden.
        let pid = machine.property("MainPID");
        let find = "find / -path /proc -prune -o \\( -type d -o -type f \\) -writable -print 2>/dev/null || true";
        let all = machine.says(&format!(
            "nsenter --mount --target {pid} setpriv --reuid framegate --regid framegate --init-groups \
             --inh-caps=-all --bounding-set=-all sh -c '{find}'"
        ));
        let own = ["/var/lib/framegate", INCOMING, "/run/framegate", "/tmp", "/var/tmp"];
        // Newer ones let each service watch its own memory pressure.
        let foreign = |path: &&str| {
            !own.iter().any(|own| path.starts_with(own)) && !path.ends_with("/framegate.service/memory.pressure")
        };
        assert!(own.iter().all(|own| all.lines().any(|line| line == *own)), "this should be found:\n{all}");
        all.lines().filter(foreign).map(str::to_owned).collect()
    };
    assert_eq!(writable(&machine), BTreeSet::new());

    // The drop-in that comes along opens /srv, with what is mounted there later.
    machine.says(
        "mkdir -p /etc/systemd/system/framegate.service.d /srv/cameras /srv/archive
         cp /usr/share/doc/framegate/examples/drop-directories.conf /etc/systemd/system/framegate.service.d/
         chown framegate: /srv/archive; chmod 0700 /srv/archive
         cat >> /etc/framegate/conf.d/garage.toml <<-END
\t\t[[detectors]]
\t\tname = \"Garage\"
\t\ttime_zone = \"UTC\"
\t\t[detectors.directory]
\t\tpath = \"/srv/cameras\"
\t\tafter_publish = \"archive\"
\t\tarchive = \"/srv/archive\"
\t\tEND
         systemctl daemon-reload; systemctl restart framegate
         mount -t tmpfs -o mode=0700 tmpfs /srv/cameras
         chown framegate:framegate-drop /srv/cameras; chmod 3770 /srv/cameras
         setfacl -d -m u::rwx,u:framegate:rwx,g::---,m::rwx,o::--- /srv/cameras",
    );
    machine.drop_face("cam", "/srv/cameras", 5);
    machine.until_accepted(1);
    machine.until("it is archived", "find /srv/archive -name 5.jpg | grep -q .");
    assert_eq!(machine.says("find /srv/archive -type f -perm /o=rwx"), "");

    // A directory of an FTP server's own group, as the drop-in's second half has it.
    machine.says(
        "sed -i 's/^#\\(SupplementaryGroups=ftp\\)/\\1/' /etc/systemd/system/framegate.service.d/drop-directories.conf
         install -d -o ftp -g ftp -m 2770 /srv/ftp
         sed 's/Garage/Yard/; s|/srv/cameras|/srv/ftp|; /archive/d' /etc/framegate/conf.d/garage.toml > /etc/framegate/conf.d/yard.toml
         systemctl daemon-reload; systemctl restart framegate",
    );
    let drop = "umask 027; cp /tmp/face-5.jpg /srv/ftp/6.jpg.part; mv /srv/ftp/6.jpg.part /srv/ftp/6.jpg";
    assert!(machine.may("ftp", drop));
    machine.until_accepted(2);
    machine.until("it is gone", "! ls /srv/ftp/6.jpg");
}

fn credentials_come_late_and_encrypted(suite: &str) {
    let Some(machine) = Machine::set_up("credentials", suite) else { return };
    machine.says("rm /etc/credstore/engine-password; systemctl start framegate");
    machine.drop_face("ftp", &format!("{INCOMING}/Lobby"), 1);
    machine.until("the lack is said", "journalctl --unit=framegate --priority=warning | grep -q engine-password");
    assert_eq!(machine.property("ActiveState"), "active", "without its password it runs, and keeps its frames");
    assert_eq!(machine.accepted(), 0);

    machine.says(&format!(
        "mkdir -p /etc/systemd/system/framegate.service.d /etc/credstore.encrypted
         echo {PASSWORD} | systemd-creds encrypt --name=engine-password - /etc/credstore.encrypted/engine-password
         sed 's/^#\\(LoadCredentialEncrypted\\)/\\1/' /usr/share/doc/framegate/examples/credentials.conf \
             > /etc/systemd/system/framegate.service.d/credentials.conf
         systemctl daemon-reload; systemctl restart framegate"
    ));
    machine.until_accepted(1);
    assert!(!machine.may("stranger", "cat /run/credentials/framegate.service/engine-password"));
    assert!(!machine.journal().contains(PASSWORD));
}

fn the_journal_has_priorities_and_whole_sentences(suite: &str) {
    let Some(machine) = Machine::running("the_journal", suite) else { return };
    machine.says("rm /etc/credstore/engine-password; systemctl restart framegate");
    machine.says("echo '[publish]\nattempts = 0' > /etc/framegate/conf.d/wrong.toml");
    machine.refuses("systemctl reload framegate");
    machine.says("echo '[log]\nformat = \"json\"' > /etc/framegate/conf.d/wrong.toml; systemctl restart framegate");
    let journal = machine.says("journalctl --sync; journalctl --unit=framegate --output=json _COMM=framegate + _SYSTEMD_UNIT=framegate.service");
    let mut seen = BTreeSet::new();
    let mut json = 0;
    for line in journal.lines() {
        let entry: Value = serde_json::from_str(line).expect("JSON");
        let field = |name: &str| entry[name].as_str().unwrap_or_default().to_owned();
        if field("_TRANSPORT") != "stdout" {
            continue; // systemd's own remarks
        }
        let (message, priority) = (field("MESSAGE"), field("PRIORITY"));
        assert!(!message.is_empty() && !message.starts_with('<'), "{line}");
        json += u32::from(serde_json::from_str::<Value>(&message).is_ok_and(|it| it["message"].is_string()));
        assert_eq!(field("SYSLOG_IDENTIFIER"), "framegate", "{line}");
        for (part, expected) in [
            ("framegate is running", "6"),
            ("stopping: nothing more is taken", "6"),
            ("cannot read the secret file", "4"),
            ("the new configuration is refused", "3"),
            ("nothing is configured yet", "5"),
        ] {
            if message.contains(part) {
                assert_eq!(priority, expected, "{line}");
                seen.insert(part);
            }
        }
    }
    assert_eq!(seen.len(), 5, "{seen:?}\n{journal}");
    assert!(json >= 2, "what is asked for as JSON is JSON, and has its priority too: {journal}");
    let errors = machine.says("journalctl --unit=framegate --priority=err --output=cat");
    assert!(errors.contains("wrong.toml:2:1: publish.attempts"), "{errors}");
}

fn d1_killed_again_and_again_it_is_started_again_and_again(suite: &str) {
    let Some(machine) = Machine::set_up("d1_killed", suite) else { return };
    // systemd gives up after five starts in ten seconds, unless it is told not to.
    drop_in(&machine, "RestartSec=100ms");
    machine.says("systemctl start framegate");
    for kill in 1..=7_u64 {
        machine.drop_face("cam", &format!("{INCOMING}/Gate"), kill);
        machine.says("systemctl kill --signal=KILL framegate");
        eventually("it is started again", PATIENCE, || {
            let restarts = machine.property("NRestarts") == kill.to_string();
            (restarts && machine.property("ActiveState") == "active").then_some(())
        });
    }
    machine.until_accepted(7);
    machine.until("nothing is left", &format!("! find {INCOMING} -name '*.jpg' | grep ."));
}

fn d4_reloads_are_answered_and_a_bad_configuration_changes_nothing(suite: &str) {
    let Some(machine) = Machine::running("d4_reloads", suite) else { return };
    let pid = machine.property("MainPID");
    let entry = "cat > /etc/framegate/conf.d/gate.toml <<END
[[detectors]]
name = \"Gate\"
time_zone = \"UTC\"
directory = { path = \"/var/lib/framegate/gate\" }
END";
    machine.says(&format!("install -d -o framegate -m 0700 /var/lib/framegate/gate; {entry}"));
    assert!(machine.says("framegate reload").contains("1 detector entries unchanged, 1 started"));
    machine.says("sed -i s/Gate/Door/ /etc/framegate/conf.d/gate.toml; systemctl reload framegate");
    machine.says("echo 'weight = 0' >> /etc/framegate/conf.d/gate.toml");
    let why = "weight";
    assert!(machine.refuses("framegate reload").contains(why));
    machine.refuses("systemctl reload framegate");
    assert!(machine.journal().contains("the new configuration is refused, the old one goes on"));
    assert_eq!(machine.property("ActiveState"), "active");
    assert_eq!(machine.property("MainPID"), pid, "it was never restarted");
    machine.drop_face("cam", &format!("{INCOMING}/Lobby"), 1);
    machine.until_accepted(1);
    machine.says("sed -i /weight/d /etc/framegate/conf.d/gate.toml; systemctl reload framegate");
    let metrics = machine.admin("/metrics");
    for line in
        ["framegate_config_reloads_total{result=\"success\"} 3", "framegate_config_reloads_total{result=\"failure\"} 2"]
    {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
}

fn d4_a_stop_is_clean_and_a_wrong_configuration_is_not_started_for_ever(suite: &str) {
    let Some(machine) = Machine::running("d4_a_stop", suite) else { return };
    machine.says("systemctl stop engine; curl -X POST 127.0.0.1:6009 || true");
    for number in 0..20 {
        machine.drop_face("cam", &format!("{INCOMING}/Gate"), number);
    }
    machine.says("systemctl stop framegate");
    assert_eq!((machine.property("Result"), machine.property("ExecMainStatus")), ("success".into(), "0".into()));
    let left = machine
        .says(&format!("find {INCOMING}/Gate -name '*.jpg' | wc -l; find {INCOMING}/.framegate -type f | wc -l"));
    assert_eq!(left, "20\n0\n", "frames are back in their directory, and nothing else is left");
    machine.refuses("test -e /run/framegate/control.sock");

    machine.says("echo '[publish]\nattempts = 0' > /etc/framegate/conf.d/wrong.toml");
    machine.refuses("systemctl start framegate");
    eventually("it has failed", PATIENCE, || (machine.property("ActiveState") == "failed").then_some(()));
    assert_eq!((machine.property("ExecMainStatus"), machine.property("NRestarts")), ("78".into(), "0".into()));
    assert!(machine.says("journalctl --unit=framegate --priority=err").contains("wrong.toml:2:1: publish.attempts"));
    machine.says("rm /etc/framegate/conf.d/wrong.toml; systemctl start framegate");
    machine.start_engine();
    machine.until_accepted(20);
}

fn d8_a_hang_is_noticed_by_the_watchdog(suite: &str) {
    let Some(machine) = Machine::set_up("d8_a_hang", suite) else { return };
    assert_eq!(machine.property("WatchdogUSec"), "30s");
    drop_in(&machine, "WatchdogSec=2");
    machine.says("systemctl start framegate");
    let pid = machine.property("MainPID");
    machine.says(&format!("kill -STOP {pid}"));
    machine.drop_face("cam", &format!("{INCOMING}/Gate"), 1);
    machine.until_accepted(1);
    assert_ne!(machine.property("MainPID"), pid);
    assert_eq!(machine.property("NRestarts"), "1");
    assert!(machine.journal().contains("Watchdog timeout"));
    machine.refuses("ls /var/lib/systemd/coredump/* /var/lib/framegate/core* /core*");
}

fn the_push_socket_outlives_the_daemon(suite: &str) {
    let Some(machine) = Machine::running("the_push_socket", suite) else { return };
    machine.says("systemctl stop framegate; systemctl enable --now framegate-push.socket; systemctl start framegate");
    let seen = || machine.says("stat --format='%A %U %G' /run/framegate /run/framegate/push.sock");
    let expected = "drwxr-xr-x framegate framegate\nsrw-rw---- framegate framegate-drop\n";
    assert_eq!(seen(), expected);
    machine.says("systemctl restart framegate");
    assert_eq!(seen(), expected, "neither taken away nor given to somebody else");
    machine.says("systemctl stop framegate");
    assert_eq!(seen(), expected, "nor by a stop");
    // This starts the daemon again, too.
    let connect = "curl --silent --max-time 1 --unix-socket /run/framegate/push.sock http://push/ || test $? != 7";
    assert!(machine.may("cam", connect), "a member of the group may connect");
    assert!(!machine.may("stranger", connect), "others may not");
    machine.says("dpkg --remove framegate");
    machine.refuses("systemctl is-active framegate-push.socket framegate.service");
}

fn upgrades_keep_what_was_changed_and_a_purge_says_what_it_leaves(suite: &str) {
    let Some(machine) = Machine::with_package("upgrades", suite) else { return };
    // A next version, with another configuration in it and the same binary.
    machine.says(
        "dpkg-deb --raw-extract /root/framegate.deb /root/next
         sed -i 's/^Version: .*/Version: 99.0-1/' /root/next/DEBIAN/control
         echo '# of the next version' >> /root/next/etc/framegate/framegate.toml
         dpkg-deb -Zgzip -z1 --build /root/next /root/next.deb",
    );
    machine.says("dpkg --install /root/framegate.deb; dpkg --install /root/next.deb");
    assert!(machine.says("cat /etc/framegate/framegate.toml").contains("of the next version"), "untouched: replaced");
    machine.says("dpkg --purge framegate; dpkg --install /root/framegate.deb");

    machine.start_engine();
    machine.configure();
    machine.says("useradd --create-home --groups framegate-drop cam; systemctl start framegate");
    let pid = machine.property("MainPID");
    machine.says("DEBIAN_FRONTEND=noninteractive dpkg --force-confdef --force-confold --install /root/next.deb");
    let kept = machine.says("cat /etc/framegate/framegate.toml");
    assert!(kept.contains("\n[engine]\n") && !kept.contains("of the next version"), "edited: kept\n{kept}");
    assert!(machine.path("/etc/framegate/framegate.toml.dpkg-dist").exists(), "and the new one is laid beside it");
    assert_eq!(machine.property("ActiveState"), "active");
    assert_ne!(machine.property("MainPID"), pid, "the new version runs");
    machine.drop_face("cam", &format!("{INCOMING}/Gate"), 1);
    machine.until_accepted(1);

    machine.says("systemctl disable --now framegate; dpkg --force-confold --install /root/framegate.deb");
    assert_eq!(machine.property("UnitFileState"), "disabled", "it stays as it was, also on the way back");
    assert_eq!(machine.property("ActiveState"), "inactive");
    assert!(machine.says("dpkg-query -W framegate").contains("0."));
    machine.says("systemctl enable --now framegate");
    machine.drop_face("cam", &format!("{INCOMING}/Gate"), 2);
    machine.until_accepted(2);

    machine.says(&format!("echo no image > {INCOMING}/Gate/broken.jpg; chown framegate {INCOMING}/Gate/broken.jpg"));
    machine.until("there is a dead letter", "framegate dead-letter list | grep -q unsupported");
    machine.says("dpkg --remove framegate");
    machine.refuses("systemctl is-active framegate");
    machine.says("test -f /etc/framegate/framegate.toml; ls /var/lib/framegate/dead-letter/*.image");
    assert_eq!(machine.says("find /var/lib/framegate /var/spool/framegate -type f -perm /o=rwx"), "");

    machine.says("dpkg --install /root/framegate.deb");
    assert_eq!(machine.property("ActiveState"), "active", "installed again it goes on with what was left");
    machine.drop_face("cam", &format!("{INCOMING}/Gate"), 3);
    machine.until_accepted(3);

    // A configuration that a next version does not take must not leave the package half installed.
    machine.says("echo '[publish]\nattempts = 0' > /etc/framegate/conf.d/wrong.toml");
    machine.says("dpkg --force-confold --install /root/next.deb; dpkg --audit");
    let installed = machine.says("dpkg-query --show --showformat='${Status} ${Version}' framegate");
    assert_eq!(installed, "install ok installed 99.0-1");
    eventually("it has failed", PATIENCE, || (machine.property("ActiveState") == "failed").then_some(()));
    assert!(machine.journal().contains("wrong.toml:2:1: publish.attempts"));

    machine.says("rm /etc/framegate/conf.d/wrong.toml; dpkg --remove framegate");
    machine.drop_face("cam", &format!("{INCOMING}/Gate"), 4);
    let said = machine.says("dpkg --purge framegate 2>&1");
    assert!(!said.contains("warning"), "{said}");
    for part in [
        "removing /var/lib/framegate: 2 files of dead letters",
        "left: /var/spool/framegate, 1 files that were not published",
        "left: /etc/credstore/engine-password",
        "left: the user framegate",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    machine.refuses("ls -d /etc/framegate /var/lib/framegate /run/framegate /etc/systemd/system/*/framegate*");
    machine.says(&format!("test -f {INCOMING}/Gate/4.jpg"));
}

/// Changes the service before its start.
fn drop_in(machine: &Machine, line: &str) {
    let at = "/etc/systemd/system/framegate.service.d";
    machine.says(&format!("mkdir -p {at}; printf '[Service]\n{line}\n' > {at}/test.conf; systemctl daemon-reload"));
}

#[test]
fn lintian_finds_nothing_but_what_is_explained() {
    let package = match package() {
        Ok(package) => package,
        Err(why) => return skipped("lintian", why),
    };
    if !works("lintian", &["--version"]) {
        return skipped("lintian", "no lintian: apt-get install lintian");
    }
    // Not every build has the words that are no words, which an override explains.
    let arguments = ["--display-info", "--pedantic", "--suppress-tags=unused-override"];
    let output = Command::new("lintian").args(arguments).arg(package).output().expect("it starts");
    assert!(output.status.success() && output.stdout.is_empty(), "{}", text(&output));
}

#[test]
fn shellcheck_finds_nothing() {
    if !works("shellcheck", &["--version"]) {
        return skipped("shellcheck", "no shellcheck: apt-get install shellcheck");
    }
    let scripts = fs::read_dir(repository().join("scripts")).expect("a directory");
    let mut scripts: Vec<_> = scripts.map(|it| it.expect("an entry").path()).collect();
    scripts.extend([".ci/run", "debian/framegate.prerm", "debian/framegate.postrm"].map(|it| repository().join(it)));
    assert!(scripts.len() > 3);
    let output = Command::new("shellcheck").args(scripts).output().expect("it starts");
    assert!(output.status.success(), "{}", text(&output));
}
