//! Names: from whatever a machine calls itself to one unique DNS label (control.md §11.3).

/// Longest DNS label in bytes (RFC 1035 §2.3.4).
const LABEL_MAX: usize = 63;

/// Makes a DNS label of a host name. Never empty: `node` when nothing usable is left.
#[must_use]
pub fn label(hostname: &str) -> String {
    let mut rest = hostname;
    for suffix in [".local", ".localdomain", ".lan"] {
        rest = rest.strip_suffix(suffix).unwrap_or(rest);
    }
    let mut end = rest.len().min(LABEL_MAX);
    while !rest.is_char_boundary(end) {
        end -= 1;
    }
    let rest = rest[..end].trim_matches(|c: char| !c.is_ascii_alphanumeric());
    let label: String = rest
        .chars()
        .filter_map(|c| match c {
            ' ' | '.' | '@' | '_' | '-' => Some('-'),
            c if c.is_ascii_alphanumeric() => Some(c.to_ascii_lowercase()),
            _ => None,
        })
        .collect();
    if label.is_empty() { "node".to_owned() } else { label }
}

/// The first of `base`, `base-1`, `base-2`, … that is not taken, shortened to stay a label.
pub fn unique(base: &str, taken: impl Fn(&str) -> bool) -> String {
    if !taken(base) {
        return base.to_owned();
    }
    let mut number = 1_u64;
    loop {
        let suffix = format!("-{number}");
        let room = LABEL_MAX - suffix.len();
        let candidate = format!("{}{suffix}", base.get(..room).unwrap_or(base));
        if !taken(&candidate) {
            return candidate;
        }
        number += 1;
    }
}

/// Whether `name` is `base` or `base` with a number after it, that is, one that [`unique`] may have made of it.
#[must_use]
pub fn is_derived(name: &str, base: &str) -> bool {
    if name == base {
        return true;
    }
    let Some((stem, number)) = name.rsplit_once('-') else { return false };
    !number.is_empty()
        && number.bytes().all(|b| b.is_ascii_digit())
        && (stem == base || (name.len() == LABEL_MAX && base.starts_with(stem)))
}

/// Checks a name that a person chose: already a label, in its canonical form.
#[must_use]
pub fn is_label(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= LABEL_MAX
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn labels_match_the_published_examples() {
        for (hostname, expected) in [
            ("OBERON", "oberon"),
            ("The cat's iPhone 4(SE)", "the-cats-iphone-4se"),
            ("mon.ipn.dev", "mon-ipn-dev"),
            ("admin@example.com", "admin-example-com"),
            (".bound.ary.", "bound-ary"),
            ("-a-", "a"),
            ("computer.local", "computer"),
            ("computer.lan", "computer"),
            ("", "node"),
            ("日本", "node"),
        ] {
            assert_eq!(label(hostname), expected, "{hostname}");
        }
        assert_eq!(label(&"test.".repeat(20)), format!("{}tes", "test-".repeat(12)));
    }

    #[test]
    fn collisions_get_the_first_free_number() {
        let taken = ["web", "web-1", "web-3"];
        assert_eq!(unique("web", |name| taken.contains(&name)), "web-2");
        assert_eq!(unique("db", |name| taken.contains(&name)), "db");
        assert!(is_derived("web-2", "web") && is_derived("web", "web"));
        assert!(!is_derived("web-x", "web") && !is_derived("webs", "web"));
    }

    proptest! {
        #[test]
        fn every_host_name_becomes_a_label(hostname in "\\PC{0,90}") {
            let base = label(&hostname);
            prop_assert!(is_label(&base), "{base}");
            let next = unique(&base, |name| name == base);
            prop_assert!(next.len() <= LABEL_MAX && is_derived(&next, &base));
        }
    }
}
