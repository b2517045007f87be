//! The built binary: what it says and how it exits when something is wrong, and one run from start
//! to SIGTERM against a small API server. Needs root, as the daemon does.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::Uri;
use axum::response::{IntoResponse as _, Response};
use futures::StreamExt as _;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tempfile::TempDir;

const BINARY: &str = env!("CARGO_BIN_EXE_observer");
const NOBODY: u32 = 65534;
/// A minute in all, however busy the machine is: it ends a wait that would never end.
const LOOKS: u32 = 1200;
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);
const NO_DATAPLANE: &str = "dataplane: no dataplane is found: neither rules of kube-proxy (nftables, \
    iptables, IPVS) nor maps of Cilium; is hostNetwork set, and the node's /sys/fs/bpf mounted?\n";

fn observer(flags: &[&str]) -> Command {
    let mut command = Command::new(BINARY);
    // Only the flags decide, not the machine's environment; a backtrace is not a clear line.
    command.env_clear().env("RUST_BACKTRACE", "1").args(flags);
    command
}

/// What the captured rules send connections to.
const SERVICES: &str = "\
default/kubernetes:https TCP
  10.99.0.1:6443
default/np:http TCP
  10.244.0.18:8080
  10.244.0.19:8080
  10.244.0.20:8080
default/udp:u UDP
  10.244.0.18:5353
  10.244.0.19:5353
  10.244.0.20:5353
default/web:http TCP
  10.244.0.18:8080
  10.244.0.19:8080
  10.244.0.20:8080
";

/// Exit code and what was said on stderr.
fn outcome(mut command: Command) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = command.output().expect("the binary starts");
    (status.code(), String::from_utf8(stderr).expect("text"))
}

fn kubeconfig(directory: &TempDir, server: &str) -> PathBuf {
    let path = directory.path().join("kubeconfig");
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}]
    });
    fs::write(&path, config.to_string()).expect("a kubeconfig");
    path
}

/// A cgroup v2 hierarchy of the test's own: not every machine has one at the default place.
struct Cgroups(TempDir);

impl Cgroups {
    fn mount() -> Self {
        let directory = TempDir::new().expect("a directory");
        let none = None::<&str>;
        mount(none, directory.path(), Some("cgroup2"), MsFlags::empty(), none).expect("mounted");
        Self(directory)
    }

    fn flag(&self) -> String {
        format!("--cgroup-root={}", text(self.0.path()))
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        // The directory stays behind when this fails, and shows it.
        let _unmounted = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

#[test]
fn an_unknown_flag_value_is_a_usage_error() {
    let (code, said) = outcome(observer(&["run", "--node-name=n", "--log-format=xml"]));
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("[possible values: text, json]"), "{said}");
}

#[test]
fn a_missing_kubeconfig_is_named_in_one_line() {
    let flags = ["run", "--node-name=n", "--listen=127.0.0.1:0", "--kubeconfig=/none/here"];
    let (code, said) = outcome(observer(&flags));
    assert_eq!((code, said.lines().count()), (Some(1), 1), "{said}");
    assert!(said.starts_with("error: kubeconfig /none/here cannot be used: check"), "{said}");
}

#[test]
fn a_kubeconfig_that_is_none_is_named_in_one_line() {
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("kubeconfig");
    fs::write(&path, "clusters: 7").expect("a file");
    let kubeconfig = format!("--kubeconfig={}", text(&path));
    let flags = ["run", "--node-name=n", "--listen=127.0.0.1:0", &kubeconfig];
    let (code, said) = outcome(observer(&flags));
    assert_eq!((code, said.lines().count()), (Some(1), 1), "{said}");
    assert!(said.contains("cannot be used: check --kubeconfig"), "{said}");
}

/// The client would panic, in a task, when it is first used.
#[test]
fn a_kubeconfig_whose_server_is_no_url_is_named_in_one_line() {
    let directory = TempDir::new().expect("a directory");
    for server in ["nonsense", "node-1:6443", "ftp://node-1"] {
        let kubeconfig = format!("--kubeconfig={}", text(&kubeconfig(&directory, server)));
        let flags = ["run", "--node-name=n", "--listen=127.0.0.1:0", &kubeconfig];
        let (code, said) = outcome(observer(&flags));
        assert_eq!((code, said.lines().count()), (Some(1), 1), "{said}");
        assert!(said.contains("not http://HOST or https://HOST"), "{said}");
    }
}

#[test]
fn a_proxy_is_refused_and_what_sets_it_is_named() {
    let directory = TempDir::new().expect("a directory");
    let kubeconfig = format!("--kubeconfig={}", text(&kubeconfig(&directory, "https://node-1")));
    let mut command = observer(&["run", "--node-name=n", "--listen=127.0.0.1:0", &kubeconfig]);
    command.env("HTTPS_PROXY", "http://proxy:3128");
    let (code, said) = outcome(command);
    assert_eq!((code, said.lines().count()), (Some(1), 1), "{said}");
    assert!(said.contains("http://proxy:3128/: unset HTTPS_PROXY"), "{said}");
}

#[test]
fn a_cgroup_root_that_is_none_is_named_before_anything_is_attached() {
    let directory = TempDir::new().expect("a directory");
    let kubeconfig =
        format!("--kubeconfig={}", text(&kubeconfig(&directory, "http://127.0.0.1:1")));
    for root in ["/none/here", text(directory.path())] {
        let cgroup_root = format!("--cgroup-root={root}");
        let flags = ["run", "--node-name=n", "--listen=127.0.0.1:0", &kubeconfig, &cgroup_root];
        let (code, said) = outcome(observer(&flags));
        assert_eq!((code, said.lines().count()), (Some(1), 1), "{said}");
        assert!(said.contains(root) && said.contains("check --cgroup-root"), "{said}");
    }
}

#[test]
fn outside_a_pod_a_kubeconfig_is_asked_for() {
    let (code, said) = outcome(observer(&["run", "--node-name=n", "--listen=127.0.0.1:0"]));
    assert_eq!((code, said.lines().count()), (Some(1), 1), "{said}");
    assert!(said.contains("give --kubeconfig FILE"), "{said}");
}

#[test]
fn a_taken_port_is_named_before_anything_is_attached() {
    let holder = TcpListener::bind("127.0.0.1:0").expect("a port");
    let listen = format!("--listen={}", holder.local_addr().expect("bound"));
    let (code, said) = outcome(observer(&["run", "--node-name=n", &listen]));
    assert_eq!((code, said.lines().count()), (Some(1), 1), "{said}");
    assert!(said.contains("choose another --listen"), "{said}");
}

#[test]
fn without_permission_it_says_which_capabilities_are_needed() {
    let directory = TempDir::new().expect("a directory");
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("opened");
    let binary = directory.path().join("observer");
    fs::copy(BINARY, &binary).expect("a copy that anyone may run");
    let kubeconfig = kubeconfig(&directory, "http://127.0.0.1:1");
    let cgroups = Cgroups::mount();
    let mut command = Command::new(&binary);
    command.env_clear().args(["run", "--node-name=n", "--listen=127.0.0.1:0", "--log-level=error"]);
    command.arg(cgroups.flag()).arg(format!("--kubeconfig={}", text(&kubeconfig)));
    command.uid(NOBODY).gid(NOBODY);
    let (code, said) = outcome(command);
    assert_eq!((code, said.lines().count()), (Some(3), 1), "{said}");
    assert!(said.contains("capabilities BPF, PERFMON, NET_ADMIN and NET_RAW"), "{said}");
}

#[test]
fn a_report_without_any_agent_fails_and_names_each() {
    let flags = ["report", "--url=http://127.0.0.1:1", "--url=http://127.0.0.1:2"];
    let (code, said) = outcome(observer(&flags));
    assert_eq!((code, said.lines().count()), (Some(1), 3), "{said}");
    assert!(said.contains("http://127.0.0.1:1: no answer: check"), "{said}");
    assert!(said.ends_with("error: no agent answered\n"), "{said}");
}

/// Every failed request to the API server logs a line, so it soon finds that nobody reads.
#[test]
fn a_log_that_nobody_reads_does_not_stop_it() {
    let directory = TempDir::new().expect("a directory");
    let kubeconfig =
        format!("--kubeconfig={}", text(&kubeconfig(&directory, "http://127.0.0.1:1")));
    let cgroups = Cgroups::mount();
    let cgroup_root = cgroups.flag();
    let flags = ["run", "--node-name=n", "--listen=127.0.0.1:0", &kubeconfig, &cgroup_root];
    let child = observer(&flags).stderr(Stdio::piped()).spawn().expect("the binary starts");
    let mut daemon = Daemon(child);
    let mut log = BufReader::new(daemon.0.stderr.take().expect("piped"));
    let mut said = String::new();
    while !said.contains("pod watch: cannot list") {
        said.clear();
        assert_ne!(log.read_line(&mut said).expect("text"), 0, "it ended");
        assert!(!said.contains("kube_client"), "the watch says it better: {said}");
    }
    assert!(said.contains("the API server is http://127.0.0.1:1"), "{said}");
    drop(log);
    let pid = i32::try_from(daemon.0.id()).expect("a pid");
    kill(Pid::from_raw(pid), Signal::SIGTERM).expect("signalled");
    assert_eq!(daemon.0.wait().expect("it ends").code(), Some(0));
}

/// Lists are empty; watches stay open and silent.
async fn empty_cluster(uri: Uri) -> Response {
    if uri.query().is_some_and(|query| query.contains("watch=true")) {
        let silence = futures::stream::pending::<Result<Bytes, std::io::Error>>();
        let headers_now = futures::stream::iter([Ok(Bytes::from("\n"))]);
        return Body::from_stream(headers_now.chain(silence)).into_response();
    }
    let kind = if uri.path().ends_with("/pods") { "PodList" } else { "EndpointSliceList" };
    let list = json!({"kind": kind, "metadata": {"resourceVersion": "1"}, "items": []});
    axum::Json(list).into_response()
}

/// The daemon, stopped with the test whatever happens.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        let _stopped = self.0.kill().and_then(|()| self.0.wait());
    }
}

/// Status and body, once the daemon answers at all.
async fn get(url: String) -> Option<(u16, String)> {
    let asked = tokio::task::spawn_blocking(move || {
        let config = ureq::Agent::config_builder().http_status_as_error(false).build();
        let mut answer = ureq::Agent::new_with_config(config).get(&url).call().ok()?;
        Some((answer.status().as_u16(), answer.body_mut().read_to_string().ok()?))
    });
    asked.await.expect("no panic")
}

async fn wait_until_ready(url: &str) {
    let mut last = None;
    for _ in 0..LOOKS {
        last = get(format!("{url}/readyz")).await;
        if let Some((200, body)) = &last {
            assert!(body.starts_with("ok\ndataplane: nftables serves Services ("), "{body}");
            return;
        }
        tokio::time::sleep(BETWEEN_LOOKS).await;
    }
    panic!("not ready: {last:?}");
}

/// Waits for the words that say what is missing.
async fn wait_until_it_says(url: &str, words: &str) {
    let mut last = None;
    for _ in 0..LOOKS {
        last = get(format!("{url}/readyz")).await;
        if last.as_ref().is_some_and(|(status, body)| *status == 503 && body == words) {
            return;
        }
        tokio::time::sleep(BETWEEN_LOOKS).await;
    }
    panic!("not {words}: {last:?}");
}

/// A network namespace for this thread and those it starts, with nothing but a loopback device.
fn own_network() {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace: this test needs root");
    run(Command::new("ip").args(["link", "set", "lo", "up"]));
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn load_kube_proxys_rules() {
    let rules = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/captures/nftables-1.36/0-before.nft");
    run(Command::new("nft").args(["-f", rules]));
}

#[test]
fn backends_are_printed_by_service_or_their_absence_explained() {
    own_network();
    let (code, said) = outcome(observer(&["backends"]));
    assert_eq!(code, Some(1), "{said}");
    assert!(said.starts_with("error: no dataplane is found: "), "{said}");

    load_kube_proxys_rules();
    let printed = observer(&["backends"]).output().expect("the binary starts");
    assert_eq!(text_of(&printed.stdout), SERVICES);
    assert!(text_of(&printed.stderr).starts_with("nftables serves Services ("), "{printed:?}");
    let printed = observer(&["backends", "--output=json", "--dataplane=nftables"]).output();
    let printed = printed.expect("the binary starts");
    let listing: serde_json::Value = serde_json::from_slice(&printed.stdout).expect("JSON");
    assert_eq!(listing["serving"], "nftables");
    let (code, said) = outcome(observer(&["backends", "--dataplane=iptables-legacy"]));
    assert_eq!((code, said.contains("no dataplane is found")), (Some(1), true), "{said}");
}

#[test]
fn backends_without_permission_say_which_is_needed() {
    let mut command = observer(&["backends"]);
    command.uid(NOBODY).gid(NOBODY);
    let (code, said) = outcome(command);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.starts_with("error: not permitted ("), "{said}");
}

fn text_of(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("text")
}

#[tokio::test]
async fn it_becomes_ready_serves_and_stops_at_sigterm() {
    own_network();
    let api = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let server = format!("http://{}", api.local_addr().expect("bound"));
    tokio::spawn(async move { axum::serve(api, Router::new().fallback(empty_cluster)).await });
    let directory = TempDir::new().expect("a directory");
    let kubeconfig = format!("--kubeconfig={}", text(&kubeconfig(&directory, &server)));
    let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound");
    let listen = format!("--listen={port}");
    let cgroups = Cgroups::mount();
    let cgroup_root = cgroups.flag();
    let flags =
        ["run", "--node-name=node-1", "--log-format=json", &listen, &kubeconfig, &cgroup_root];
    let child = observer(&flags).stderr(Stdio::piped()).spawn().expect("the binary starts");
    let mut daemon = Daemon(child);
    let log = BufReader::new(daemon.0.stderr.take().expect("piped"));
    let (sender, said) = std::sync::mpsc::sync_channel(1024);
    std::thread::spawn(move || log.lines().map_while(Result::ok).try_for_each(|l| sender.send(l)));

    let url = format!("http://{port}");
    wait_until_it_says(&url, NO_DATAPLANE).await;
    load_kube_proxys_rules();
    wait_until_ready(&url).await;
    let (status, metrics) = get(format!("{url}/metrics")).await.expect("metrics");
    assert_eq!(status, 200);
    assert!(
        metrics.contains(r#"observer_probe_attached{method="tp_btf",signal="socket_state"} 1"#)
    );
    let (status, body) = get(format!("{url}/v1/terminations")).await.expect("terminations");
    assert!(status == 200 && body.contains(r#""node":"node-1""#), "{body}");
    let mut report = observer(&["report", &format!("--url={url}")]);
    let report = tokio::task::spawn_blocking(move || report.output().expect("a report"));
    let report = report.await.expect("no panic");
    assert!(report.status.success());
    assert!(report.stdout.starts_with(b"No termination seen yet"));

    let message = |line: String| {
        serde_json::from_str::<serde_json::Value>(&line).expect(&line)["message"].clone()
    };
    let mut messages = Vec::new();
    while messages.last() != Some(&json!("ready")) {
        let line = said.recv_timeout(BETWEEN_LOOKS * LOOKS).expect("it says when it is ready");
        messages.push(message(line));
    }
    let pid = i32::try_from(daemon.0.id()).expect("a pid");
    kill(Pid::from_raw(pid), Signal::SIGTERM).expect("signalled");
    let status = daemon.0.wait().expect("it ends");
    assert_eq!(status.code(), Some(0));
    messages.extend(said.iter().map(message));
    let started = messages.iter().position(|message| *message == "started");
    let ready = messages.iter().position(|message| *message == "ready");
    assert!(started.is_some() && started < ready, "{messages:?}");
    assert_eq!(messages.iter().filter(|message| **message == "ready").count(), 1);
    assert_eq!(messages.last(), Some(&json!("stopping: detaching the probes")));
}
