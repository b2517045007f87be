//! Where a pod's process is put below the cgroup root. Pure.

/// How the kubelet's cgroup driver lays out pods, with containerd as the runtime.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CgroupLayout {
    /// The systemd driver: slices and scopes.
    #[default]
    Systemd,
    /// The cgroupfs driver: plain directories.
    Cgroupfs,
}

/// `status.qosClass`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Qos {
    Guaranteed,
    Burstable,
    BestEffort,
}

impl Qos {
    /// `None` for a class that does not exist.
    pub(super) fn parse(class: &str) -> Option<Self> {
        match class {
            "Guaranteed" => Some(Self::Guaranteed),
            "Burstable" => Some(Self::Burstable),
            "BestEffort" => Some(Self::BestEffort),
            _ => None,
        }
    }

    /// Guaranteed pods have no directory of their class.
    fn name(self) -> Option<&'static str> {
        match self {
            Self::Guaranteed => None,
            Self::Burstable => Some("burstable"),
            Self::BestEffort => Some("besteffort"),
        }
    }
}

impl CgroupLayout {
    /// A pod's directory, relative to the root.
    pub(super) fn pod(self, qos: Qos, uid: &str) -> String {
        match (self, qos.name()) {
            (Self::Systemd, None) => {
                format!("kubepods.slice/kubepods-pod{}.slice", uid.replace('-', "_"))
            }
            (Self::Systemd, Some(class)) => format!(
                "kubepods.slice/kubepods-{class}.slice/kubepods-{class}-pod{}.slice",
                uid.replace('-', "_")
            ),
            (Self::Cgroupfs, None) => format!("kubepods/pod{uid}"),
            (Self::Cgroupfs, Some(class)) => format!("kubepods/{class}/pod{uid}"),
        }
    }

    /// A container's directory within its pod's.
    pub(super) fn container(self, id: &str) -> String {
        match self {
            Self::Systemd => format!("cri-containerd-{id}.scope"),
            Self::Cgroupfs => id.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_driver_and_class_has_its_own_directory() {
        let pod = |layout: CgroupLayout, class: &str| {
            layout.pod(Qos::parse(class).expect("a class"), "a-b")
        };
        let systemd = CgroupLayout::Systemd;
        assert_eq!(pod(systemd, "Guaranteed"), "kubepods.slice/kubepods-poda_b.slice");
        assert_eq!(
            pod(systemd, "BestEffort"),
            "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-poda_b.slice"
        );
        assert_eq!(systemd.container("f00"), "cri-containerd-f00.scope");
        assert_eq!(pod(CgroupLayout::Cgroupfs, "Guaranteed"), "kubepods/poda-b");
        assert_eq!(pod(CgroupLayout::Cgroupfs, "Burstable"), "kubepods/burstable/poda-b");
        assert_eq!(CgroupLayout::Cgroupfs.container("f00"), "f00");
        assert_eq!(Qos::parse("burstable"), None);
    }
}
