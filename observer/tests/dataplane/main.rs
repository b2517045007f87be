//! The node's rules against the real kernel and the real tools, each test in a network namespace of
//! its own. Needs root, and Debian's nftables and iptables; fails without.

mod captures;
mod families;
mod foreign;
mod namespace;
mod overrun;
mod running;
mod timing;
