//! Which kernel runs, for what it is known to do wrong.

/// Major, minor and patch level.
pub(super) type Version = (u32, u32, u32);

/// The version of the running kernel; none if it does not say.
pub(super) fn running() -> Option<Version> {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").ok().map(|release| version(&release))
}

/// The version in a release (`uname -r`); what is missing or no number counts as 0.
pub(super) fn version(release: &str) -> Version {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    (next(), next(), next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read_as_far_as_they_are_numbers() {
        assert_eq!(version("6.18.44-fc-v669"), (6, 18, 44));
        assert_eq!(version("7.1"), (7, 1, 0));
        assert_eq!(version("unknown"), (0, 0, 0));
    }
}
