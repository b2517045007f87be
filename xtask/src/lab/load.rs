//! Clients: connections at a steady rate from one place to one address, each one recorded.
//!
//! A connect is non-blocking and polled, so that what ended it is the socket's own error, and a
//! timeout is never taken for a refusal.

use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, anyhow};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6, connect, getsockopt, socket,
    sockopt,
};

use super::clock;
use super::netns::Namespace;

/// Past this, a connect has failed: more than one lost SYN (resent after 1 s), less than patience.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Within this, the pod has sent its name.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// The most that one load makes, whoever forgets to stop it.
const MOST_ATTEMPTS: u64 = 100_000;

/// How one connection went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Connected, and the pod answered with this name.
    Served(String),
    /// `connect()` returned ECONNREFUSED.
    Refused,
    /// `connect()` did not end in time.
    TimedOut,
    /// `connect()` returned another error.
    Failed(Errno),
    /// Connected, then reset.
    Reset,
    /// Connected, then closed or silent without a name.
    NoAnswer,
}

/// One connection of a load. Moments are ns of `CLOCK_BOOTTIME`.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// Just before `connect()`.
    pub started_ns: u64,
    /// Just after `connect()` ended, one way or the other.
    pub connected_ns: u64,
    /// The client's port; 0 when it never got one.
    pub local_port: u16,
    /// How it went.
    pub outcome: Outcome,
}

/// A load that runs until it is stopped.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<Vec<Attempt>>>>,
}

impl Load {
    /// `per_second` connections to `target`, shared by `threads` threads in `namespace`.
    pub(crate) fn start(
        namespace: &Namespace,
        target: SocketAddr,
        per_second: u32,
        threads: u32,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let pause_ns = 1_000_000_000 / u64::from(per_second.max(1)) * u64::from(threads);
        let begin_ns = clock::boot_ns();
        let run = |thread: u32| {
            let stop = Arc::clone(&stop);
            let first_ns = begin_ns + pause_ns / u64::from(threads) * u64::from(thread);
            let most = MOST_ATTEMPTS / u64::from(threads);
            namespace.thread(move || attempts(target, first_ns, pause_ns, most, &stop))
        };
        let threads = (0..threads).map(run).collect();
        Self { stop, threads }
    }

    /// Stops and returns every attempt, in the order they began.
    ///
    /// # Errors
    /// When a thread could not enter the namespace, or panicked.
    pub fn stop(mut self) -> Result<Vec<Attempt>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        for thread in self.threads.drain(..) {
            all.extend(thread.join().map_err(|_panic| anyhow!("a client thread panicked"))??);
        }
        all.sort_by_key(|attempt| attempt.started_ns);
        Ok(all)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn attempts(
    target: SocketAddr,
    first_ns: u64,
    pause_ns: u64,
    most: u64,
    stop: &AtomicBool,
) -> Vec<Attempt> {
    let mut made = Vec::new();
    for number in 0..most {
        clock::sleep_until(first_ns + number * pause_ns);
        if stop.load(Ordering::Relaxed) {
            break;
        }
        made.push(attempt(target));
    }
    made
}

/// Connects once, in the caller's network namespace.
pub(crate) fn attempt(target: SocketAddr) -> Attempt {
    let started_ns = clock::boot_ns();
    let connected = connect_within(target, CONNECT_TIMEOUT);
    let connected_ns = clock::boot_ns();
    let (local_port, outcome) = match connected {
        Ok(stream) => (stream.local_addr().map_or(0, |local| local.port()), answer(stream)),
        Err((port, Errno::ECONNREFUSED)) => (port, Outcome::Refused),
        Err((port, Errno::ETIMEDOUT)) => (port, Outcome::TimedOut),
        Err((port, errno)) => (port, Outcome::Failed(errno)),
    };
    Attempt { started_ns, connected_ns, local_port, outcome }
}

/// Connects; an error comes with the local port.
fn connect_within(target: SocketAddr, limit: Duration) -> Result<TcpStream, (u16, Errno)> {
    let family = if target.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(family, SockType::Stream, flags, None).map_err(|errno| (0, errno))?;
    let begun = match target {
        SocketAddr::V4(target) => connect(socket.as_raw_fd(), &SockaddrIn::from(target)),
        SocketAddr::V6(target) => connect(socket.as_raw_fd(), &SockaddrIn6::from(target)),
    };
    let finished = match begun {
        Err(Errno::EINPROGRESS) => finish(&socket, limit),
        other => other,
    };
    let stream = TcpStream::from(socket);
    match finished {
        Ok(()) => Ok(stream),
        Err(errno) => Err((stream.local_addr().map_or(0, |local| local.port()), errno)),
    }
}

fn finish(socket: &OwnedFd, limit: Duration) -> Result<(), Errno> {
    let mut waiting = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
    let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    if poll(&mut waiting, limit)? == 0 {
        return Err(Errno::ETIMEDOUT);
    }
    match getsockopt(socket, sockopt::SocketError)? {
        0 => Ok(()),
        errno => Err(Errno::from_raw(errno)),
    }
}

/// Reads the pod's line.
fn answer(mut stream: TcpStream) -> Outcome {
    if stream.set_nonblocking(false).and(stream.set_read_timeout(Some(ANSWER_TIMEOUT))).is_err() {
        return Outcome::NoAnswer;
    }
    let mut line = Vec::new();
    let mut chunk = [0; 128];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return Outcome::NoAnswer,
            Ok(length) => line.extend(&chunk[..length]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Outcome::Reset,
            Err(_) => return Outcome::NoAnswer,
        }
        match line.split_last() {
            Some((b'\n', name)) => return Outcome::Served(String::from_utf8_lossy(name).into()),
            Some(_) if line.len() < 512 => {}
            _ => return Outcome::NoAnswer,
        }
    }
}
