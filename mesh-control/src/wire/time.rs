//! Wall-clock times as the protocol writes them: RFC 3339 text, with Go's zero time for "never".

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

const SECONDS_PER_DAY: i64 = 86_400;
/// 0001-01-01T00:00:00Z, Go's zero time.
const GO_ZERO: i64 = -62_135_596_800;
/// 9999-12-31T23:59:59Z, the last second that four digits of year can say.
const LAST: i64 = 253_402_300_799;

/// A moment in UTC, to the nanosecond, between the years 1 and 9999.
///
/// The default is Go's zero time, `0001-01-01T00:00:00Z`, which stands for "never" or "not set" in every message.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    seconds: i64,
    nanos: u32,
}

/// Why a text is no RFC 3339 time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected a time such as 2026-01-31T12:00:00Z")]
pub struct TimestampError;

impl Timestamp {
    /// Go's zero time: never, or not set.
    pub const ZERO: Self = Self { seconds: GO_ZERO, nanos: 0 };
    /// The expiry that means "log this node out" in a RegisterRequest: Unix time 123.
    pub const LOGOUT: Self = Self { seconds: 123, nanos: 0 };

    /// Seconds since 1970 and nanoseconds into that second. Out of range is moved to the nearest end.
    #[must_use]
    pub const fn from_unix(seconds: i64, nanos: u32) -> Self {
        if seconds < GO_ZERO {
            Self::ZERO
        } else if seconds > LAST {
            Self { seconds: LAST, nanos: 0 }
        } else {
            Self { seconds, nanos: if nanos > 999_999_999 { 999_999_999 } else { nanos } }
        }
    }

    /// Whole seconds since 1970, negative before.
    #[must_use]
    pub const fn unix_seconds(self) -> i64 {
        self.seconds
    }

    /// Nanoseconds into the second, below 10⁹.
    #[must_use]
    pub const fn nanos(self) -> u32 {
        self.nanos
    }

    /// Whether this is Go's zero time.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self == Self::ZERO
    }

    /// This time as the system's clock counts, or `None` before 1970.
    #[must_use]
    pub fn to_system(self) -> Option<SystemTime> {
        let seconds = u64::try_from(self.seconds).ok()?;
        UNIX_EPOCH.checked_add(Duration::new(seconds, self.nanos))
    }

    /// How far `other` lies in the past of this one; `None` if it lies ahead.
    #[must_use]
    pub fn since(self, other: Self) -> Option<Duration> {
        let nanos = (i128::from(self.seconds) - i128::from(other.seconds)) * 1_000_000_000 + i128::from(self.nanos)
            - i128::from(other.nanos);
        let nanos = u128::try_from(nanos).ok()?;
        let seconds = u64::try_from(nanos / 1_000_000_000).ok()?;
        let rest = u32::try_from(nanos % 1_000_000_000).ok()?;
        Some(Duration::new(seconds, rest))
    }
}

impl Default for Timestamp {
    fn default() -> Self {
        Self::ZERO
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        match time.duration_since(UNIX_EPOCH) {
            Ok(since) => Self::from_unix(i64::try_from(since.as_secs()).unwrap_or(LAST), since.subsec_nanos()),
            Err(before) => {
                let before = before.duration();
                let up = i64::from(before.subsec_nanos() > 0);
                let seconds = i64::try_from(before.as_secs()).unwrap_or(i64::MAX - 1);
                Self::from_unix(-seconds - up, if up == 1 { 1_000_000_000 - before.subsec_nanos() } else { 0 })
            }
        }
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = civil_from_days(self.seconds.div_euclid(SECONDS_PER_DAY));
        let second = self.seconds.rem_euclid(SECONDS_PER_DAY);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")?;
        if self.nanos > 0 {
            let digits = format!("{:09}", self.nanos);
            write!(f, ".{}", digits.trim_end_matches('0'))?;
        }
        f.write_str("Z")
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Timestamp {
    type Err = TimestampError;

    fn from_str(text: &str) -> Result<Self, TimestampError> {
        parse(text.as_bytes()).ok_or(TimestampError)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// RFC 3339 §5.6: `YYYY-MM-DDTHH:MM:SS[.fraction](Z|±HH:MM)`.
fn parse(text: &[u8]) -> Option<Timestamp> {
    let (head, rest) = text.split_at_checked(19)?;
    let separators = [(4, b'-'), (7, b'-'), (13, b':'), (16, b':')];
    if separators.iter().any(|&(at, byte)| head[at] != byte) || !matches!(head[10], b'T' | b't' | b' ') {
        return None;
    }
    let (year, month, day) = (number(&head[..4])?, number(&head[5..7])?, number(&head[8..10])?);
    let (hour, minute, second) = (number(&head[11..13])?, number(&head[14..16])?, number(&head[17..19])?);
    // A leap second reads as the second after, like everywhere in Unix time.
    if !(1..=12).contains(&month) || day < 1 || day > days_in(year, month) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let (nanos, zone) = match rest.strip_prefix(b".") {
        None => (0, rest),
        Some(after) => {
            let digits = after.iter().take_while(|byte| byte.is_ascii_digit()).count();
            let (fraction, zone) = after.split_at(digits);
            let kept = &fraction[..digits.min(9)];
            let scale = 10_u32.pow(u32::try_from(9 - kept.len()).ok()?);
            (u32::try_from(number(kept)?).ok()? * scale, zone)
        }
    };
    let offset = match zone {
        b"Z" | b"z" => 0,
        [sign @ (b'+' | b'-'), h1, h2, b':', m1, m2] => {
            let (hours, minutes) = (number(&[*h1, *h2])?, number(&[*m1, *m2])?);
            if hours > 23 || minutes > 59 {
                return None;
            }
            let seconds = hours * 3600 + minutes * 60;
            if *sign == b'+' { seconds } else { -seconds }
        }
        _ => return None,
    };
    let seconds = days_from_civil(year, month, day) * SECONDS_PER_DAY + hour * 3600 + minute * 60 + second - offset;
    Some(Timestamp::from_unix(seconds, nanos))
}

fn number(digits: &[u8]) -> Option<i64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

fn days_in(year: i64, month: i64) -> i64 {
    match month {
        4 | 6 | 9 | 11 => 30,
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        _ => 31,
    }
}

/// Days since 1970-01-01 in the proleptic Gregorian calendar. Years are counted from March, so that the leap day is
/// the last of its year and the months before it have fixed lengths.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// The inverse of [`days_from_civil`]: year, month, day.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_moments_read_and_write() {
        for (text, seconds, nanos) in [
            ("1970-01-01T00:00:00Z", 0, 0),
            ("1970-01-01T00:02:03Z", 123, 0),
            ("0001-01-01T00:00:00Z", GO_ZERO, 0),
            ("2000-02-29T23:59:59.5Z", 951_868_799, 500_000_000),
            ("2026-11-22T09:39:46.000000001Z", 1_795_340_386, 1),
            ("9999-12-31T23:59:59Z", LAST, 0),
        ] {
            let time = Timestamp::from_unix(seconds, nanos);
            assert_eq!(text.parse(), Ok(time), "{text}");
            assert_eq!(time.to_string(), text);
        }
        assert_eq!("2026-01-01T01:30:00+01:30".parse::<Timestamp>(), "2026-01-01T00:00:00Z".parse());
        assert!(Timestamp::default().is_zero());
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in ["", "2026-01-01", "2026-13-01T00:00:00Z", "2025-02-29T00:00:00Z", "2026-01-01T00:00:00", "x"] {
            assert_eq!(text.parse::<Timestamp>(), Err(TimestampError), "{text}");
        }
    }

    #[test]
    fn system_times_convert_both_ways() {
        let time = UNIX_EPOCH + Duration::new(1_700_000_000, 42);
        assert_eq!(Timestamp::from(time).to_system(), Some(time));
        let before = Timestamp::from(UNIX_EPOCH - Duration::from_millis(1500));
        assert_eq!((before.unix_seconds(), before.nanos()), (-2, 500_000_000));
        assert_eq!(before.to_system(), None);
    }

    proptest! {
        #[test]
        fn every_time_survives_its_text(seconds in GO_ZERO..=LAST, nanos in 0_u32..1_000_000_000) {
            let time = Timestamp::from_unix(seconds, nanos);
            prop_assert_eq!(time.to_string().parse(), Ok(time));
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".{0,40}") {
            let _ = text.parse::<Timestamp>();
        }
    }
}
