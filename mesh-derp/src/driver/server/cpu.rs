//! How much CPU time this process may use, and has used.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::server::CpuLimit;

/// Where control groups are found.
const ROOT: &str = "/sys/fs/cgroup";

/// CPU time that the process has used since it began, all threads together.
pub(super) fn used() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// The files that say how much this process may use. They are kept open, so that a process that gives up its rights can
/// still see a change.
#[derive(Debug)]
pub(super) struct LimitFiles {
    groups: Vec<Group>,
}

#[derive(Debug)]
enum Group {
    /// `QUOTA PERIOD`, the first of which may be `max`.
    Two { max: File },
    /// A file each; the quota is -1 where there is none.
    One { quota: File, period: File },
}

impl LimitFiles {
    /// Those of the control group of this process and of the groups around it. None where there are none.
    pub(super) fn open() -> Self {
        let groups = fs::read_to_string("/proc/self/cgroup").map(|text| folders(&text)).unwrap_or_default();
        Self { groups: groups.iter().filter_map(|folder| Group::open(folder)).collect() }
    }

    /// The tightest limit now.
    pub(super) fn read(&self) -> Option<CpuLimit> {
        let share = |limit: &CpuLimit| limit.quota.as_secs_f64() / limit.period.as_secs_f64();
        self.groups.iter().filter_map(Group::read).min_by(|a, b| share(a).total_cmp(&share(b)))
    }
}

impl Group {
    fn open(folder: &Path) -> Option<Self> {
        let open = |name: &str| File::open(folder.join(name)).ok();
        open("cpu.max")
            .map(|max| Self::Two { max })
            .or_else(|| Some(Self::One { quota: open("cpu.cfs_quota_us")?, period: open("cpu.cfs_period_us")? }))
    }

    fn read(&self) -> Option<CpuLimit> {
        let text = match self {
            Self::Two { max } => content(max)?,
            Self::One { quota, period } => format!("{} {}", content(quota)?, content(period)?),
        };
        parse(&text)
    }
}

fn content(file: &File) -> Option<String> {
    let mut bytes = [0; 64];
    let read = file.read_at(&mut bytes, 0).ok()?;
    Some(String::from_utf8_lossy(bytes.get(..read)?).into_owned())
}

/// A quota and a period in microseconds.
fn parse(text: &str) -> Option<CpuLimit> {
    let mut numbers = text.split_whitespace();
    let mut next = || numbers.next()?.parse().ok().filter(|us| *us > 0).map(Duration::from_micros);
    Some(CpuLimit { quota: next()?, period: next()? })
}

/// The folders that `/proc/self/cgroup` means, each with those around it.
fn folders(text: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let top = match controllers {
            "" => PathBuf::from(ROOT),
            some if some.split(',').any(|name| name == "cpu") => Path::new(ROOT).join(controllers),
            _ => continue,
        };
        let inner = path.trim_start_matches('/');
        let mut folder = top.join(inner);
        found.push(folder.clone());
        while folder != top && folder.pop() {
            found.push(folder.clone());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_control_groups_are_understood() {
        let found = folders("4:cpu,cpuacct:/box/one\n3:memory:/box\n0::/box/one\n");
        let expected = [
            "/sys/fs/cgroup/cpu,cpuacct/box/one",
            "/sys/fs/cgroup/cpu,cpuacct/box",
            "/sys/fs/cgroup/cpu,cpuacct",
            "/sys/fs/cgroup/box/one",
            "/sys/fs/cgroup/box",
            "/sys/fs/cgroup",
        ];
        assert_eq!(found, expected.map(PathBuf::from));
        assert!(folders("").is_empty() && folders("garbage\n::\n1:cpu").len() <= 1);
    }

    #[test]
    fn a_limit_is_read_and_none_is_told_from_it() {
        let limit = CpuLimit { quota: Duration::from_millis(35), period: Duration::from_millis(100) };
        assert_eq!(parse("35000 100000\n"), Some(limit));
        for none in ["max 100000\n", "-1 100000", "", "0 100000", "5"] {
            assert_eq!(parse(none), None, "{none:?}");
        }
    }

    #[test]
    fn time_is_used() {
        let before = used();
        let mut sum = 0_u64;
        for number in 0..3_000_000_u64 {
            sum = std::hint::black_box(sum.wrapping_mul(31).wrapping_add(number));
        }
        assert!(used() > before, "{sum}");
    }
}
