//! The kernel programs under the guest's kernel: the verifier takes them, they attach, they count.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, TcpStream};

use observer::facts::Outcome;
use observer::kernel::probes::{LEGACY_COMMIT, NFT_COMMIT, Probe};
use observer::kernel::{self, Started};

use super::machine::{hierarchy, require_guest, run, runtime};

fn start() -> Started {
    kernel::start(hierarchy()).expect("the kernel side starts")
}

#[test]
#[ignore = "runs in a guest: cargo xtask guest"]
fn every_signal_attaches_that_the_kernel_has() {
    require_guest();
    runtime().block_on(async {
        let mut kernel = start();
        for signal in [&LEGACY_COMMIT, &NFT_COMMIT] {
            kernel.probes.watch(signal, true).expect("attach");
        }
        let release = run("uname -r", "");
        // There the tracepoint tells nothing without a socket: `packet_dropped` does.
        let lacking: &[&str] = if release.starts_with("6.1.") { &["reset_sent"] } else { &[] };
        let off = kernel.probes.states().iter().filter(|probe| probe.method.is_none());
        let off: Vec<&Probe> = off.collect();
        let names: Vec<&str> = off.iter().map(|probe| probe.signal).collect();
        assert_eq!(names, lacking, "Linux {release}: {off:?}");
    });
}

#[test]
#[ignore = "runs in a guest: cargo xtask guest"]
fn a_refusal_is_counted() {
    require_guest();
    let address = IpAddr::V4(Ipv4Addr::LOCALHOST);
    runtime().block_on(async {
        let mut kernel = start();
        kernel.addresses.set_local(&BTreeSet::from([address])).expect("addresses");
        let error = TcpStream::connect((address, 8081)).expect_err("nobody listens");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        let reading = kernel.counters.read().expect("counters");
        let refused = reading
            .arrivals
            .iter()
            .filter(|arrivals| (arrivals.port, arrivals.outcome) == (8081, Outcome::Refused));
        let counts: Vec<_> = refused.map(|arrivals| (arrivals.address, arrivals.count)).collect();
        assert_eq!(counts, [(address, 1)], "{}", run("uname -r", ""));
    });
}
