//! The built binary on a node where Cilium comes later and is upgraded. No API server answers: the
//! node's own figures do not wait for it.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output};
use std::thread::sleep;
use std::time::Duration;

use nix::mount::{MsFlags, mount, umount};
use serde_json::json;
use tempfile::TempDir;

use super::maps::{ACTIVE, TERMINATING, V4, pinned, with_bpffs};

const BINARY: &str = env!("CARGO_BIN_EXE_observer");
const ATTACHED: &str = r#"observer_probe_attached{method="tp_btf",signal="map_commit"} 1"#;

/// A minute in all, however busy the machine is: it ends a wait that would never end.
const LOOKS: u32 = 1200;
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// The daemon, stopped with the test whatever happens.
struct Daemon {
    child: Child,
    url: String,
    directory: TempDir,
}

impl Daemon {
    /// Starts it in this thread's namespaces.
    fn start(maps: &Path) -> Self {
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status();
        assert!(up.expect("ip (package iproute2)").success());
        let directory = TempDir::new().expect("a directory");
        let cgroups = directory.path().join("cgroups");
        fs::create_dir(&cgroups).expect("a directory");
        let none = None::<&str>;
        mount(none, &cgroups, Some("cgroup2"), MsFlags::empty(), none).expect("cgroup v2");
        let kubeconfig = directory.path().join("kubeconfig");
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}]
        });
        fs::write(&kubeconfig, config.to_string()).expect("a kubeconfig");
        let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound");
        let child = Command::new(BINARY)
            .env_clear()
            .args(["run", "--node-name=n", "--log-level=error", "--cilium-maps"])
            .arg(maps)
            .arg("--kubeconfig")
            .arg(kubeconfig)
            .arg("--cgroup-root")
            .arg(&cgroups)
            .arg(format!("--listen={port}"))
            .spawn()
            .expect("the binary starts");
        Self { child, url: format!("http://{port}"), directory }
    }

    /// Waits until the metrics have all these lines.
    fn wait_for(&self, lines: &[&str]) {
        self.wait_until("/metrics", |metrics| {
            lines.iter().all(|wanted| metrics.lines().any(|line| line == *wanted))
        });
    }

    /// Waits until what it says at `path`, ready or not, is as wanted.
    fn wait_until(&self, path: &str, is_wanted: impl Fn(&str) -> bool) {
        let url = format!("{}{path}", self.url);
        let mut said = String::new();
        for _ in 0..LOOKS {
            let request = ureq::get(&url).config().http_status_as_error(false).build();
            if let Ok(mut answer) = request.call() {
                said = answer.body_mut().read_to_string().expect("text");
                if is_wanted(&said) {
                    return;
                }
            }
            sleep(BETWEEN_LOOKS);
        }
        panic!("{path} says\n{said}");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        let _stopped = self.child.kill().and_then(|()| self.child.wait());
        // The directory stays behind when this fails, and shows it.
        let _unmounted = umount(&self.directory.path().join("cgroups"));
    }
}

#[test]
fn the_agent_follows_maps_that_come_change_and_are_made_anew() {
    with_bpffs(|maps| {
        let daemon = Daemon::start(&maps);
        daemon.wait_for(&["observer_dataplane_backends 0"]);

        let mut four = V4::create(&maps, "lb4", "v3");
        for id in 1..=2 {
            four.backend(id, ACTIVE);
        }
        four.service(1, &[1, 2], &[], 0);
        let serving = r#"observer_dataplane_serving{dataplane="cilium"} 1"#;
        daemon.wait_for(&[ATTACHED, serving, "observer_dataplane_backends 2"]);

        four.backend(2, TERMINATING);
        four.service(1, &[1], &[2], 2);
        daemon.wait_for(&["observer_dataplane_backends 1"]);

        for name in ["cilium_lb4_services_v2", "cilium_lb4_backends_v3"] {
            fs::remove_file(maps.join(name)).expect("unpin");
        }
        let mut anew = V4::create(&maps, "lb4", "v3");
        for id in 3..=5 {
            anew.backend(id, ACTIVE);
        }
        anew.service(1, &[3, 4, 5], &[], 0);
        daemon.wait_for(&["observer_dataplane_backends 3"]);
        anew.service(1, &[3, 4], &[], 3);
        daemon.wait_for(&["observer_dataplane_backends 2"]);

        fs::rename(maps.join("cilium_lb4_backends_v3"), maps.join("aside")).expect("hide a map");
        let unreadable = r#"observer_dataplane_unreadable{dataplane="cilium"} 1"#;
        daemon.wait_for(&[unreadable]);
        daemon.wait_until("/readyz", |said| {
            said.contains("dataplane: the table of cilium cannot be read since")
                && said.contains("Cilium 1.11 or newer is needed")
        });
        fs::rename(maps.join("aside"), maps.join("cilium_lb4_backends_v3")).expect("bring it back");
        daemon.wait_until("/metrics", |metrics| !metrics.contains(unreadable));
        daemon.wait_until("/readyz", |said| !said.contains("dataplane:"));

        fs::remove_dir_all(&maps).expect("Cilium is uninstalled");
        daemon.wait_for(&["observer_dataplane_backends 0"]);
    });
}

fn backends(maps: &Path) -> Output {
    let command = ["backends", "--dataplane=cilium", "--cilium-maps"];
    Command::new(BINARY).env_clear().args(command).arg(maps).output().expect("the binary starts")
}

#[test]
fn backends_are_printed_or_the_reason_why_not() {
    with_bpffs(|maps| {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
        let said = text(backends(&maps).stderr);
        assert!(said.contains("no maps of Cilium in"), "{said}");

        let mut four = V4::create(&maps, "lb4", "v3");
        four.backend(1, ACTIVE);
        four.backend(2, TERMINATING);
        four.service(1, &[1], &[2], 0);
        let printed = text(backends(&maps).stdout);
        assert_eq!(printed, "10.96.0.1:443 TCP\n  10.1.0.1:8080\n  10.1.0.2:8080  draining\n");

        fs::remove_file(maps.join("cilium_lb4_services_v2")).expect("unpin");
        drop(pinned::<[u8; 12], [u8; 16]>(&maps, "cilium_lb4_services_v2"));
        let said = text(backends(&maps).stderr);
        assert!(said.contains("cilium_lb4_services_v2 has keys of 12 bytes"), "{said}");
    });
}
