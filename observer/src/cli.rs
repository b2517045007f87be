//! The command line: every flag, its environment variable and its limits.
//!
//! Pure. A value that cannot be used is refused here with exit code 2, never replaced.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use ureq::http::Uri;

use crate::dataplane::{Dataplane, cilium};
use crate::kernel::addresses::Range;
use crate::recommend::DEFAULT_MARGIN_SECONDS;
use crate::report::Output;

/// The largest margin that makes sense: far beyond any published gap.
const MARGIN_LIMIT_SECONDS: f64 = 3600.0;

const LEVELS: &str = "off, error, warn, info, debug or trace";

const EXIT_CODES: &str = "Exit codes:
  0  done, or stopped by SIGTERM or SIGINT
  1  failed while running: port taken, kubeconfig or cgroup root unusable, no agent answered,
     no dataplane found
  2  the command line is wrong
  3  this machine or its permissions cannot do it: no kernel BTF, or a capability is missing";

/// Measures how long a deleted pod keeps receiving new connections, and which preStop sleep its
/// workload needs.
#[derive(Debug, Parser)]
#[command(name = "observer", version, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Observe this node: attach to its kernel, follow its rules and the cluster, serve the figures
    #[command(after_help = EXIT_CODES)]
    Run(RunArgs),
    /// Ask the agents of all nodes and print what each workload needs
    #[command(after_help = EXIT_CODES)]
    Report(ReportArgs),
    /// Print what this node sends new connections to now, by Service; needs no running agent
    #[command(after_help = EXIT_CODES)]
    Backends(BackendsArgs),
}

/// Flags of `observer run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Name of this node, as the API server knows it (spec.nodeName by the downward API)
    #[arg(long, env = "NODE_NAME", value_name = "NAME", value_parser = node_name)]
    pub node_name: String,

    /// Kubeconfig file; without one the pod's ServiceAccount is used
    #[arg(long, env = "OBSERVER_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// Where to serve /metrics, /livez, /readyz and /v1/terminations
    #[arg(long, env = "OBSERVER_LISTEN", value_name = "ADDRESS:PORT", default_value = "[::]:9464")]
    pub listen: SocketAddr,

    /// The node's cgroups (version 2, or the directory of those of version 1): their directories tell
    /// which process is in which pod
    #[arg(
        long,
        env = "OBSERVER_CGROUP_ROOT",
        value_name = "DIR",
        default_value = "/sys/fs/cgroup"
    )]
    pub cgroup_root: PathBuf,

    /// Addresses of the cluster's pods and nodes, comma separated or repeated. A connection from
    /// elsewhere then counts as external (a load balancer); without this flag neither is told
    #[arg(
        long,
        env = "OBSERVER_CLUSTER_CIDR",
        value_name = "CIDR",
        value_delimiter = ',',
        value_parser = range
    )]
    pub cluster_cidr: Vec<Range>,

    /// Which rules to read.
    #[command(flatten)]
    pub rules: RulesArgs,

    /// How the log is written to stderr
    #[arg(long, env = "OBSERVER_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,

    /// What is logged: off, error, warn, info, debug, trace, or several such as info,observer=debug
    #[arg(
        long,
        env = "OBSERVER_LOG_LEVEL",
        value_name = "LEVEL",
        default_value = "info",
        value_parser = log_level
    )]
    pub log_level: String,
}

/// Flags of `observer report`.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// An agent, comma separated or repeated; ask those of all nodes, the slowest decides
    #[arg(
        long = "url",
        env = "OBSERVER_URLS",
        value_name = "http://HOST:PORT",
        value_delimiter = ',',
        required = true,
        value_parser = url
    )]
    pub urls: Vec<String>,

    /// How the report is printed
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    pub output: Output,

    /// Seconds to add to the largest need seen, before rounding up
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_MARGIN_SECONDS, value_parser = margin)]
    pub margin: f64,
}

/// Flags of all that read the node's rules.
#[derive(Clone, Debug, Args)]
pub struct RulesArgs {
    /// What turns Service addresses into pod addresses on this node; auto takes all there are
    #[arg(long, env = "OBSERVER_DATAPLANE", value_name = "KIND", default_value = "auto")]
    pub dataplane: DataplaneChoice,

    /// Where Cilium pins its maps: the node's bpf file system, and there tc/globals
    #[arg(long, env = "OBSERVER_CILIUM_MAPS", value_name = "DIR", default_value = cilium::MAPS)]
    pub cilium_maps: PathBuf,
}

/// Which dataplane to follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DataplaneChoice {
    /// All that are found; which one serves Services is told by /readyz and metrics.
    Auto,
    /// kube-proxy in nftables mode.
    Nftables,
    /// kube-proxy in iptables mode over `nf_tables`.
    IptablesNft,
    /// kube-proxy in iptables mode over the legacy tables.
    IptablesLegacy,
    /// kube-proxy in IPVS mode.
    Ipvs,
    /// Cilium in place of kube-proxy.
    Cilium,
}

impl DataplaneChoice {
    /// The only one to follow; `None` for all.
    #[must_use]
    pub fn only(self) -> Option<Dataplane> {
        match self {
            Self::Auto => None,
            Self::Nftables => Some(Dataplane::Nftables),
            Self::IptablesNft => Some(Dataplane::IptablesNft),
            Self::IptablesLegacy => Some(Dataplane::IptablesLegacy),
            Self::Ipvs => Some(Dataplane::Ipvs),
            Self::Cilium => Some(Dataplane::Cilium),
        }
    }
}

/// Flags of `observer backends`.
#[derive(Debug, Args)]
pub struct BackendsArgs {
    /// Which rules to read.
    #[command(flatten)]
    pub rules: RulesArgs,

    /// How they are printed
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    pub output: Output,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for a person.
    Text,
    /// One JSON object per line.
    Json,
}

/// A node's name becomes part of a field selector, where these characters have a meaning.
fn node_name(text: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
    if text.is_empty() || !text.chars().all(allowed) {
        return Err("a node's name has lower-case letters, digits, '-' and '.' only".to_owned());
    }
    Ok(text.to_owned())
}

fn range(text: &str) -> Result<Range, String> {
    let expected = || "write ADDRESS/PREFIX, for example 10.244.0.0/16 or fd00::/8".to_owned();
    let (address, prefix) = text.trim().split_once('/').ok_or_else(expected)?;
    let address: IpAddr = address.parse().map_err(|_invalid| expected())?;
    let prefix: u8 = prefix.parse().map_err(|_invalid| expected())?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    if prefix > longest {
        return Err(format!("the prefix of {address} is at most {longest}"));
    }
    let network = network(address, prefix);
    if network != address {
        return Err(format!(
            "{address} is one address in {network}/{prefix}: write {network}/{prefix} if all of \
             that is meant, or {address}/{longest} for the address alone"
        ));
    }
    Ok(Range { address, prefix })
}

/// The address with all bits after the prefix cleared.
fn network(address: IpAddr, prefix: u8) -> IpAddr {
    let prefix = u32::from(prefix);
    match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
            Ipv4Addr::from_bits(v4.to_bits() & mask).into()
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128 - prefix).unwrap_or(0);
            Ipv6Addr::from_bits(v6.to_bits() & mask).into()
        }
    }
}

/// A filter takes any word for the name of a module, and then logs nothing else.
fn log_level(text: &str) -> Result<String, String> {
    let is_level =
        |directive: &str| !directive.is_empty() && directive.parse::<LevelFilter>().is_ok();
    let unknown = |directive: &&str| !directive.contains(['=', '[', ']']) && !is_level(directive);
    if let Some(word) = text.split(',').find(unknown) {
        return Err(format!("'{word}' is no level: write {LEVELS}, or TARGET=LEVEL"));
    }
    EnvFilter::builder().parse(text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

fn url(text: &str) -> Result<String, String> {
    let usable = text.parse::<Uri>().is_ok_and(|url| {
        url.scheme_str() == Some("http") && url.host().is_some_and(|host| !host.is_empty())
    });
    if !usable {
        return Err("write http://HOST:9464; agents speak plain HTTP".to_owned());
    }
    Ok(text.to_owned())
}

fn margin(text: &str) -> Result<f64, String> {
    let seconds = text.parse::<f64>().ok().filter(|s| (0.0..=MARGIN_LIMIT_SECONDS).contains(s));
    seconds.ok_or_else(|| format!("write seconds from 0 to {MARGIN_LIMIT_SECONDS}"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_explains_itself_and_names_its_variable() {
        for command in Cli::command().get_subcommands() {
            for flag in command.get_arguments().filter(|flag| flag.get_id() != "help") {
                assert!(flag.get_help().is_some(), "{} has no help", flag.get_id());
            }
        }
        let run = Cli::command();
        let run = run.find_subcommand("run").expect("run");
        let without: Vec<_> = run
            .get_arguments()
            .filter(|flag| flag.get_id() != "help" && flag.get_env().is_none())
            .map(|flag| flag.get_id().as_str())
            .collect();
        assert_eq!(without, Vec::<&str>::new());
    }

    fn run_args(flags: &[&str]) -> Result<RunArgs, String> {
        let line = ["observer", "run", "--node-name=node-1"].iter().chain(flags);
        match Cli::try_parse_from(line).map_err(|error| error.to_string())?.command {
            Command::Run(args) => Ok(args),
            Command::Report(_) | Command::Backends(_) => Err("not a run".to_owned()),
        }
    }

    #[test]
    fn ranges_may_be_listed_and_repeated() {
        let flags = ["--cluster-cidr=10.244.0.0/16,fd00::/8", "--cluster-cidr", "192.168.0.0/24"];
        let ranges = run_args(&flags).expect("valid").cluster_cidr;
        let shown: Vec<String> =
            ranges.iter().map(|range| format!("{}/{}", range.address, range.prefix)).collect();
        assert_eq!(shown, ["10.244.0.0/16", "fd00::/8", "192.168.0.0/24"]);
    }

    #[test]
    fn a_range_may_be_everything_or_one_address() {
        for range in ["0.0.0.0/0", "::/0", "10.0.0.1/32", "fd00::1/128"] {
            run_args(&[&format!("--cluster-cidr={range}")]).expect(range);
        }
    }

    #[test]
    fn a_bad_value_says_what_to_write() {
        for (flag, words) in [
            ("--cluster-cidr=10.0.0.0", "write ADDRESS/PREFIX"),
            ("--cluster-cidr=10.0.0.0/33", "at most 32"),
            ("--cluster-cidr=ten/8", "write ADDRESS/PREFIX"),
            ("--cluster-cidr=10.0.0.1/8", "write 10.0.0.0/8 if"),
            ("--cluster-cidr=10.0.0.1/8", "or 10.0.0.1/32 for"),
            ("--cluster-cidr=10.0.0.1/0", "write 0.0.0.0/0 if"),
            ("--cluster-cidr=fd00:10:244::1/48", "write fd00:10:244::/48 if"),
            ("--listen=9464", "invalid socket address"),
            ("--log-format=xml", "possible values: text, json"),
            ("--log-level=observer=loud", "invalid"),
            ("--log-level=verbose", "'verbose' is no level: write off, error"),
            ("--log-level=info,observer", "'observer' is no level"),
            ("--log-level=", "'' is no level"),
        ] {
            let error = run_args(&[flag]).expect_err(flag);
            assert!(error.contains(words), "{flag}: {error}");
        }
    }

    #[test]
    fn levels_may_be_set_by_target_and_span() {
        for level in ["warn", "OFF", "info,observer=debug", "info,[span{field=1}]=trace"] {
            let args = run_args(&[&format!("--log-level={level}")]).expect(level);
            assert_eq!(args.log_level, level);
        }
    }

    #[test]
    fn a_node_name_cannot_smuggle_in_a_selector() {
        for name in ["", "Node", "a,spec.nodeName!=a"] {
            let line = ["observer", "run", "--node-name", name];
            let error = Cli::try_parse_from(line).expect_err(name).to_string();
            assert!(
                error.contains("lower-case") || error.contains("a value is required"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_report_needs_agents_and_a_sane_margin() {
        let report = |flags: &[&str]| {
            let line = ["observer", "report"].iter().chain(flags);
            Cli::try_parse_from(line).map(drop).map_err(|error| error.to_string())
        };
        let missing = report(&[]).expect_err("no agent");
        assert!(missing.contains("--url"), "{missing}");
        for url in ["https://a", "http://", "http://:9464", "http://a b", "a:9464", ""] {
            let error = report(&[&format!("--url={url}")]).expect_err(url);
            assert!(error.contains("write http://HOST:9464"), "{error}");
        }
        for margin in ["-1", "NaN", "inf", "much"] {
            let flag = format!("--margin={margin}");
            let error = report(&["--url=http://a:1", &flag]).expect_err(margin);
            assert!(error.contains("seconds from 0"), "{error}");
        }
        report(&["--url=http://a:1,http://b:1", "--margin=0.5", "--output=json"]).expect("valid");
    }
}
