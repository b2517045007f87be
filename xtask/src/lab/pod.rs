//! The process inside a pod: a small TCP server whose behaviour a test chooses, and which reports
//! on stdout what it did and when.
//!
//! It is this program again, started with the hidden subcommand `lab-pod`. One thread, one poll
//! loop: nothing delays an accept. It ends when its stdin closes, so that it never outlives the
//! lab.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, SocketAddrV6, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::ValueEnum;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn6, bind, listen, setsockopt, socket,
    sockopt,
};

use super::clock;

/// What the process does when it gets SIGTERM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum AtSigterm {
    /// Closes the listener, finishes open connections, exits.
    #[default]
    Drain,
    /// Closes the listener and exits at once.
    Close,
    /// Nothing: it serves until it is killed.
    Ignore,
}

/// Arguments of the hidden subcommand `lab-pod`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// What it answers to every connection
    #[arg(long)]
    name: String,
    /// The cgroup directory to enter before anything else
    #[arg(long)]
    cgroup: PathBuf,
    /// The port to listen on, all addresses of both families
    #[arg(long)]
    port: u16,
    /// What to do at SIGTERM
    #[arg(long, value_enum, default_value_t)]
    at_sigterm: AtSigterm,
    /// Wait this long before listening
    #[arg(long, default_value_t = 0)]
    listen_after_ms: u64,
    /// Never listen
    #[arg(long)]
    never_listen: bool,
    /// Keep connections open until the client closes them
    #[arg(long)]
    hold: bool,
    /// Stay at least this long after SIGTERM when draining
    #[arg(long, default_value_t = 0)]
    linger_ms: u64,
}

/// Serves until told to end.
///
/// # Errors
/// When it cannot enter its cgroup or listen.
pub fn run(args: &Args) -> Result<()> {
    fs::write(args.cgroup.join("cgroup.procs"), "0")
        .with_context(|| format!("cannot enter {}", args.cgroup.display()))?;
    let signals = SigSet::from(Signal::SIGTERM);
    signals.thread_block()?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let listen_at_ns = clock::boot_ns() + args.listen_after_ms * 1_000_000;
    let mut server = Server {
        listen_at_ns: (!args.never_listen).then_some(listen_at_ns),
        args: args.clone(),
        signals,
        listener: None,
        open: Vec::new(),
        exit_at_ns: None,
    };
    server.serve()?;
    report("exiting");
    Ok(())
}

struct Server {
    args: Args,
    signals: SignalFd,
    listener: Option<TcpListener>,
    listen_at_ns: Option<u64>,
    /// Connections that are held open.
    open: Vec<TcpStream>,
    /// Set when draining: the earliest moment to exit.
    exit_at_ns: Option<u64>,
}

/// What woke the loop.
struct Woken {
    signal: bool,
    command: bool,
    connection: bool,
}

impl Server {
    fn serve(&mut self) -> Result<()> {
        loop {
            if self.listen_at_ns.is_some_and(|at_ns| at_ns <= clock::boot_ns()) {
                self.listen_at_ns = None;
                self.listener = Some(open_listener(self.args.port)?);
                report("listening");
            }
            let woken = self.wait()?;
            if woken.connection {
                self.accept();
            }
            if woken.command && self.obey_command()? {
                return Ok(());
            }
            if woken.signal && self.signals.read_signal()?.is_some() && self.obey_sigterm() {
                return Ok(());
            }
            self.open.retain_mut(is_open);
            let drained = self.open.is_empty();
            if drained && self.exit_at_ns.is_some_and(|at_ns| at_ns <= clock::boot_ns()) {
                return Ok(());
            }
        }
    }

    fn wait(&self) -> Result<Woken> {
        let stdin = std::io::stdin();
        let mut polled = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(stdin.as_fd(), PollFlags::POLLIN),
        ];
        let streams = self.open.iter().map(AsFd::as_fd);
        let listener = self.listener.iter().map(AsFd::as_fd);
        polled.extend(listener.chain(streams).map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        match poll(&mut polled, self.timeout()) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
        let ready = |slot: usize| polled[slot].any().unwrap_or(false);
        let connection = self.listener.is_some() && ready(2);
        Ok(Woken { signal: ready(0), command: ready(1), connection })
    }

    fn timeout(&self) -> PollTimeout {
        let due_ns = self.listen_at_ns.or(self.exit_at_ns.filter(|_| self.open.is_empty()));
        due_ns.map_or(PollTimeout::NONE, |due_ns| {
            let left_ms = due_ns.saturating_sub(clock::boot_ns()).div_ceil(1_000_000);
            PollTimeout::from(u16::try_from(left_ms).unwrap_or(u16::MAX))
        })
    }

    /// Answers everything that waits in the accept queue.
    fn accept(&mut self) {
        while let Some(Ok((mut stream, _))) = self.listener.as_ref().map(TcpListener::accept) {
            // A client that is gone already has its own record of that.
            stream.write_all(format!("{}\n", self.args.name).as_bytes()).ok();
            if self.args.hold && stream.set_nonblocking(true).is_ok() {
                self.open.push(stream);
            }
        }
    }

    /// Returns whether to exit.
    fn obey_sigterm(&mut self) -> bool {
        report("sigterm");
        match self.args.at_sigterm {
            AtSigterm::Ignore => false,
            AtSigterm::Close => {
                self.close_listener();
                true
            }
            AtSigterm::Drain => {
                self.accept();
                self.close_listener();
                self.listen_at_ns = None;
                self.exit_at_ns = Some(clock::boot_ns() + self.args.linger_ms * 1_000_000);
                false
            }
        }
    }

    /// Obeys a line of the lab; returns whether to exit. End of input: the lab is gone.
    fn obey_command(&mut self) -> Result<bool> {
        let mut command = [0; 16];
        let length = std::io::stdin().read(&mut command)?;
        match &command[..length] {
            b"restart\n" => {
                self.close_listener();
                self.listen_at_ns = Some(clock::boot_ns() + self.args.listen_after_ms * 1_000_000);
                Ok(false)
            }
            b"crash\n" => std::process::exit(1),
            _ => Ok(true),
        }
    }

    fn close_listener(&mut self) {
        if let Some(listener) = self.listener.take() {
            drop(listener);
            report("listener_closed");
        }
    }
}

/// Whether the client still holds its end.
fn is_open(stream: &mut TcpStream) -> bool {
    match stream.read(&mut [0; 512]) {
        Ok(length) => length > 0,
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}

/// A dual-stack listener with the longest queue that the kernel allows.
fn open_listener(port: u16) -> Result<TcpListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Inet6, SockType::Stream, flags, None)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    setsockopt(&socket, sockopt::Ipv6V6Only, &false)?;
    let address = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0);
    bind(socket.as_raw_fd(), &SockaddrIn6::from(address))
        .with_context(|| format!("cannot bind {address}"))?;
    listen(&socket, Backlog::MAXALLOWABLE)?;
    Ok(TcpListener::from(socket))
}

/// One line for the lab: what, and when. A lab that is gone does not read it.
fn report(what: &str) {
    writeln!(std::io::stdout(), "{what} {}", clock::boot_ns()).ok();
}
