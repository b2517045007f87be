//! What init loaded works: the kernel takes rules of every kind that kube-proxy writes.

use super::machine::{in_namespace, require_guest, run};

#[test]
#[ignore = "runs in a guest: cargo xtask guest"]
fn ipvs_takes_a_service_with_each_scheduler_of_kube_proxy() {
    require_guest();
    for scheduler in ["rr", "wrr", "sh"] {
        in_namespace(move || {
            run(&format!("ipvsadm -A -t 192.0.2.1:80 -s {scheduler}"), "");
            run("ipvsadm -a -t 192.0.2.1:80 -r 198.51.100.7:8080 -m -w 3", "");
            assert_eq!(
                run("ipvsadm -S -n", ""),
                format!(
                    "-A -t 192.0.2.1:80 -s {scheduler}\n\
                     -a -t 192.0.2.1:80 -r 198.51.100.7:8080 -m -w 3\n"
                )
            );
        });
    }
}

#[test]
#[ignore = "runs in a guest: cargo xtask guest"]
fn both_iptables_backends_take_what_kube_proxy_writes() {
    require_guest();
    for backend in ["iptables-legacy", "iptables-nft"] {
        in_namespace(move || {
            let rules = include_str!("../captures/iptables-legacy/0-before.txt");
            run(&format!("{backend}-restore"), rules);
            let taken = run(&format!("{backend} -t nat -S"), "");
            assert!(taken.contains("--to-destination 10.244.0.26:8080"), "{backend}: {taken}");
        });
    }
}
