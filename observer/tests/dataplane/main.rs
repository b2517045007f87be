//! The node's rules against the real kernel and the real tools, each test in a network namespace of
//! its own. Needs root, and Debian's nftables and iptables; fails without.

mod captures;
mod choices;
mod dumping;
mod encoding;
mod families;
mod following;
mod foreign;
mod kube_proxy;
mod namespace;
mod overrun;
mod random_changes;
mod running;
mod scenarios;
mod timeline;
mod timing;
mod trace;
