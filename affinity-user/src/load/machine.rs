//! Machines and kernels that accept the programs, but on which they would not work correctly.

use std::fs;

use rustix::system::uname;

/// Why the programs would not work correctly here.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unsuitable {
    /// Readers of a pin rely on loads that are not reordered with each other, which x86-64 guarantees. On other machines BPF
    /// programs can request that (`BPF_LOAD_ACQ`) from Linux 6.15 on:
    /// <https://elixir.bootlin.com/linux/v6.15/source/include/uapi/linux/bpf.h>.
    #[error("this machine is {0}: affinity supports only x86-64")]
    Machine(String),
    /// The programs prepare new connections in per-CPU memory. With PREEMPT_RT the scheduler may switch to another packet in
    /// the middle of that. Until Linux 6.17, `local_bh_disable` took a per-CPU lock that prevented this; since 6.18 (and
    /// 6.12.57) it only prevents migration:
    /// <https://elixir.bootlin.com/linux/v6.18/source/kernel/softirq.c> (`CONFIG_PREEMPT_RT_NEEDS_BH_LOCK`).
    #[error("this kernel is built with PREEMPT_RT, where one packet can preempt another on the same CPU")]
    Realtime,
}

impl Unsuitable {
    /// What to do about it.
    #[must_use]
    pub const fn advice(&self) -> &'static str {
        match self {
            Self::Machine(_) => "use an x86-64 machine",
            Self::Realtime => "boot a kernel without PREEMPT_RT (see `uname -v`)",
        }
    }
}

/// What a kernel reports about itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Kernel {
    /// As in `uname -m`.
    pub machine: String,
    /// As in `uname -r`.
    pub release: String,
    /// As in `uname -v`: begins with a number and words such as `SMP` and `PREEMPT_DYNAMIC`.
    pub version: String,
    /// The content of `/sys/kernel/realtime`, which kernels with PREEMPT_RT have.
    pub realtime: Option<String>,
}

impl Kernel {
    /// The running kernel.
    #[must_use]
    pub fn running() -> Self {
        let names = uname();
        let text = |name: &std::ffi::CStr| name.to_string_lossy().into_owned();
        Self {
            machine: text(names.machine()),
            release: text(names.release()),
            version: text(names.version()),
            realtime: fs::read_to_string("/sys/kernel/realtime").ok(),
        }
    }

    /// Whether the programs work correctly on it.
    ///
    /// # Errors
    /// Why they do not.
    pub fn suits(&self) -> Result<(), Unsuitable> {
        if self.machine != "x86_64" {
            return Err(Unsuitable::Machine(self.machine.clone()));
        }
        let says_so = self.version.split_whitespace().any(|word| word == "PREEMPT_RT");
        if says_so || self.realtime.as_ref().is_some_and(|flag| flag.trim() == "1") {
            return Err(Unsuitable::Realtime);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(machine: &str, version: &str, realtime: Option<&str>) -> Kernel {
        Kernel {
            machine: machine.to_owned(),
            release: "6.1.0-50-amd64".to_owned(),
            version: version.to_owned(),
            realtime: realtime.map(str::to_owned),
        }
    }

    #[test]
    fn a_realtime_kernel_is_refused_by_either_sign() {
        let usual = "#1 SMP PREEMPT_DYNAMIC Debian 6.1.176-1 (2026-11-02)";
        let debian_rt = "#1 SMP PREEMPT_RT Debian 6.1.176-1 (2026-11-02)";
        assert_eq!(kernel("x86_64", usual, None).suits(), Ok(()));
        assert_eq!(kernel("x86_64", usual, Some("0\n")).suits(), Ok(()));
        assert_eq!(kernel("x86_64", debian_rt, None).suits(), Err(Unsuitable::Realtime));
        assert_eq!(kernel("x86_64", usual, Some("1\n")).suits(), Err(Unsuitable::Realtime));
    }

    #[test]
    fn other_machines_than_x86_64_are_refused() {
        for machine in ["aarch64", "riscv64", "s390x", "i686"] {
            let refused = kernel(machine, "#1 SMP PREEMPT_DYNAMIC", None).suits();
            assert_eq!(refused, Err(Unsuitable::Machine(machine.to_owned())));
        }
    }

    #[test]
    fn a_refusal_is_one_line() {
        for refusal in [Unsuitable::Realtime, Unsuitable::Machine("aarch64".to_owned())] {
            let line = format!("{refusal}: {}", refusal.advice());
            assert!(!line.contains('\n') && line.len() < 200, "{line}");
        }
    }
}
