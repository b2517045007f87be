//! iptables-legacy by the real kernel and tools, with the kernel's own function hooked.

use observer::facts::BackendStep;
use observer::kernel::probes::LEGACY_COMMIT;

use super::following::Running;
use super::machine::{in_namespace, require_guest, run, runtime};

const FIRST: &str = "default/web Tcp 10.244.0.18 8080";
const SECOND: &str = "default/web Tcp 10.244.0.19 8080";

/// kube-proxy's nat table for one Service with this pod, and a filter table: two commits.
fn restore(pod: &str) {
    let rules = format!(
        "*filter
:FORWARD ACCEPT [0:0]
-A FORWARD -m comment --comment {pod} -j ACCEPT
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-AAAAAAAAAAAAAAAA - [0:0]
:KUBE-SEP-BBBBBBBBBBBBBBBB - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A KUBE-SERVICES -d 10.96.0.80/32 -p tcp -m comment --comment \"default/web cluster IP\" \
-m tcp --dport 80 -j KUBE-SVC-AAAAAAAAAAAAAAAA
-A KUBE-SVC-AAAAAAAAAAAAAAAA -j KUBE-SEP-BBBBBBBBBBBBBBBB
-A KUBE-SEP-BBBBBBBBBBBBBBBB -p tcp -m tcp -j DNAT --to-destination {pod}:8080
COMMIT
"
    );
    run("iptables-legacy-restore", &rules);
}

#[test]
#[ignore = "runs in a guest: cargo xtask guest"]
fn each_replaced_table_is_told_with_the_span_of_the_replacing() {
    use BackendStep::{Added, Removed};
    require_guest();
    in_namespace(|| {
        runtime().block_on(async {
            restore("10.244.0.18");
            let mut running = Running::start(Some(&LEGACY_COMMIT)).await;
            assert_eq!(running.present, [FIRST]);
            let steps = [(FIRST, Removed), (SECOND, Added)];
            let changes = running.expect(|| restore("10.244.0.19"), &steps).await;
            println!("one restore: the change is known to {:?}", changes[0].uncertainty);

            // Neither to read a table, the first time too, nor to replace another tells of a
            // commit.
            let commits = running.counters.commits.get();
            run("iptables-legacy -t nat -L -n", "");
            run("ip6tables-legacy -t nat -L -n", "");
            run("iptables-legacy-restore", "*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n");
            let steps = [(FIRST, Added), (SECOND, Removed)];
            running.expect(|| restore("10.244.0.18"), &steps).await;
            let more = running.counters.commits.get() - commits;
            assert!((1..=2).contains(&more), "one commit, told for both IP versions: {more}");
        });
    });
}
