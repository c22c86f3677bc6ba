//! JSON as the other implementations read it: member names without regard to case, `null` for "nothing there".
//!
//! The programs that speak this protocol family decode with Go's `encoding/json`, which matches object members to struct
//! fields case-insensitively and lets `null` stand for any empty value. Some clients rely on the first (`HostInfo`,
//! `PreferredDerp`), servers on the second (`"Tags": null`). [`from_slice`] and [`from_str`] read that dialect into any
//! type that derives `serde::Deserialize`; [`Folding`] does the same over any self-describing deserializer.
//!
//! | input | where the type wants | becomes |
//! |---|---|---|
//! | a member whose name differs from a field's only in ASCII case | a struct field | that field |
//! | a member that matches no field | a struct | ignored |
//! | a member that matches a field a second time | a struct | ignored: the first one counts |
//! | any name | a map | a key, spelt as it came |
//! | `null` | list, map, string, number, bool | empty, zero, false |
//! | `null` | struct | the struct with no member given |
//! | `null` | `Option` | `None` |
//!
//! # Limits
//! Go lets the *last* duplicate win; here the first does. A struct with `#[serde(flatten)]` and an untagged enum read
//! through serde's own buffer, where names keep their case. Enum variants match exactly.

use std::borrow::Cow;
use std::fmt;

use serde::de::value::{BorrowedStrDeserializer, MapDeserializer, SeqDeserializer};
use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, EnumAccess, Error as _, IgnoredAny, IntoDeserializer, MapAccess,
    SeqAccess, VariantAccess, Visitor,
};

/// What is wrong with a text, and at which line and column.
pub type Error = serde_json::Error;

/// Reads one JSON value from UTF-8 bytes; only white space may follow it.
///
/// # Errors
/// If the bytes are not JSON, do not fit `T`, nest deeper than 128 levels, or go on after the value.
pub fn from_slice<'de, T: Deserialize<'de>>(bytes: &'de [u8]) -> Result<T, Error> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = T::deserialize(Folding::new(&mut reader))?;
    reader.end()?;
    Ok(value)
}

/// Reads one JSON value from text; only white space may follow it.
///
/// # Errors
/// As [`from_slice`].
pub fn from_str<'de, T: Deserialize<'de>>(text: &'de str) -> Result<T, Error> {
    from_slice(text.as_bytes())
}

/// For `#[serde(deserialize_with)]`: `null` is the default, also where the reader is not [`from_slice`].
///
/// # Errors
/// If the value is neither `null` nor a `T`.
pub fn null_as_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(reader: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(reader).map(Option::unwrap_or_default)
}

/// A deserializer over another, self-describing one, that reads the dialect described in the [module](self).
#[derive(Debug)]
pub struct Folding<D> {
    inner: D,
}

impl<D> Folding<D> {
    /// Wraps `inner`. Everything nested in what it reads is wrapped as well.
    pub const fn new(inner: D) -> Self {
        Self { inner }
    }
}

/// What a `null` stands for, by the type that was asked for.
#[derive(Clone, Copy)]
enum Null {
    Unit,
    False,
    Zero,
    Text,
    List,
    Map,
}

macro_rules! null_means {
    ($($method:ident => $null:ident),+ $(,)?) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
            self.inner.deserialize_any(Fold { visitor, null: Null::$null, fields: &[] })
        })+
    };
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Folding<D> {
    type Error = D::Error;

    null_means! {
        deserialize_any => Unit, deserialize_unit => Unit, deserialize_bool => False,
        deserialize_i8 => Zero, deserialize_i16 => Zero, deserialize_i32 => Zero, deserialize_i64 => Zero,
        deserialize_u8 => Zero, deserialize_u16 => Zero, deserialize_u32 => Zero, deserialize_u64 => Zero,
        deserialize_i128 => Zero, deserialize_u128 => Zero, deserialize_f32 => Zero, deserialize_f64 => Zero,
        deserialize_char => Unit, deserialize_str => Text, deserialize_string => Text,
        deserialize_bytes => Text, deserialize_byte_buf => Text, deserialize_identifier => Unit,
        deserialize_seq => List, deserialize_map => Map,
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        self.inner.deserialize_option(Fold { visitor, null: Null::Unit, fields: &[] })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        self.inner.deserialize_any(Fold { visitor, null: Null::Map, fields })
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        self.inner.deserialize_newtype_struct(name, Fold { visitor, null: Null::Unit, fields: &[] })
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(self, name: &'static str, visitor: V) -> Result<V::Value, Self::Error> {
        self.inner.deserialize_unit_struct(name, visitor)
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Result<V::Value, Self::Error> {
        self.inner.deserialize_any(Fold { visitor, null: Null::List, fields: &[] })
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _len: usize,
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        self.inner.deserialize_any(Fold { visitor, null: Null::List, fields: &[] })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        self.inner.deserialize_enum(name, variants, Fold { visitor, null: Null::Unit, fields: &[] })
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        self.inner.deserialize_ignored_any(visitor)
    }

    fn is_human_readable(&self) -> bool {
        self.inner.is_human_readable()
    }
}

/// The visitor that stands between: it gives `null` its meaning and wraps whatever is nested.
struct Fold<V> {
    visitor: V,
    null: Null,
    fields: &'static [&'static str],
}

macro_rules! pass_on {
    ($($method:ident($type:ty)),+ $(,)?) => {
        $(fn $method<E: serde::de::Error>(self, value: $type) -> Result<V::Value, E> {
            self.visitor.$method(value)
        })+
    };
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Fold<V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.visitor.expecting(f)
    }

    pass_on! {
        visit_bool(bool), visit_i8(i8), visit_i16(i16), visit_i32(i32), visit_i64(i64), visit_i128(i128),
        visit_u8(u8), visit_u16(u16), visit_u32(u32), visit_u64(u64), visit_u128(u128),
        visit_f32(f32), visit_f64(f64), visit_char(char),
        visit_str(&str), visit_borrowed_str(&'de str), visit_string(String),
        visit_bytes(&[u8]), visit_borrowed_bytes(&'de [u8]), visit_byte_buf(Vec<u8>),
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<V::Value, E> {
        match self.null {
            Null::Unit => self.visitor.visit_unit(),
            Null::False => self.visitor.visit_bool(false),
            Null::Zero => self.visitor.visit_u64(0),
            Null::Text => self.visitor.visit_borrowed_str(""),
            Null::List => self.visitor.visit_seq(SeqDeserializer::new(std::iter::empty::<()>())),
            Null::Map => self.visitor.visit_map(MapDeserializer::new(std::iter::empty::<((), ())>())),
        }
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<V::Value, E> {
        self.visitor.visit_none()
    }

    fn visit_some<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        self.visitor.visit_some(Folding::new(inner))
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        self.visitor.visit_newtype_struct(Folding::new(inner))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, inner: A) -> Result<V::Value, A::Error> {
        self.visitor.visit_seq(Items(inner))
    }

    fn visit_map<A: MapAccess<'de>>(self, inner: A) -> Result<V::Value, A::Error> {
        if self.fields.is_empty() {
            return self.visitor.visit_map(Items(inner));
        }
        self.visitor.visit_map(Members { inner, fields: self.fields, seen: vec![false; self.fields.len()] })
    }

    fn visit_enum<A: EnumAccess<'de>>(self, inner: A) -> Result<V::Value, A::Error> {
        self.visitor.visit_enum(Items(inner))
    }
}

/// Wraps nested values and leaves names alone: lists, maps, enum variants.
struct Items<A>(A);

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Items<A> {
    type Error = A::Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, A::Error> {
        self.0.next_element_seed(Nested(seed))
    }

    fn size_hint(&self) -> Option<usize> {
        self.0.size_hint()
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Items<A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, A::Error> {
        self.0.next_key_seed(seed)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, A::Error> {
        self.0.next_value_seed(Nested(seed))
    }

    fn size_hint(&self) -> Option<usize> {
        self.0.size_hint()
    }
}

impl<'de, A: EnumAccess<'de>> EnumAccess<'de> for Items<A> {
    type Error = A::Error;
    type Variant = Items<A::Variant>;

    fn variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<(T::Value, Self::Variant), A::Error> {
        let (name, content) = self.0.variant_seed(seed)?;
        Ok((name, Items(content)))
    }
}

impl<'de, A: VariantAccess<'de>> VariantAccess<'de> for Items<A> {
    type Error = A::Error;

    fn unit_variant(self) -> Result<(), A::Error> {
        self.0.unit_variant()
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, A::Error> {
        self.0.newtype_variant_seed(Nested(seed))
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, A::Error> {
        self.0.tuple_variant(len, Fold { visitor, null: Null::List, fields: &[] })
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, A::Error> {
        self.0.struct_variant(fields, Fold { visitor, null: Null::Map, fields })
    }
}

/// Renames the members of one object to the fields they mean.
struct Members<A> {
    inner: A,
    fields: &'static [&'static str],
    seen: Vec<bool>,
}

impl<A> Members<A> {
    fn position(&self, name: &str) -> Option<usize> {
        self.fields
            .iter()
            .position(|field| *field == name)
            .or_else(|| self.fields.iter().position(|field| field.eq_ignore_ascii_case(name)))
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Members<A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, A::Error> {
        while let Some(Name(name)) = self.inner.next_key()? {
            let Some(position) = self.position(&name) else {
                let name: &str = &name;
                return seed.deserialize(name.into_deserializer()).map(Some);
            };
            if std::mem::replace(&mut self.seen[position], true) {
                let IgnoredAny = self.inner.next_value()?;
                continue;
            }
            return seed.deserialize(BorrowedStrDeserializer::new(self.fields[position])).map(Some);
        }
        Ok(None)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, A::Error> {
        self.inner.next_value_seed(Nested(seed))
    }
}

/// A member's name, borrowed from the input where it holds no escapes.
struct Name<'de>(Cow<'de, str>);

impl<'de> Deserialize<'de> for Name<'de> {
    fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        struct NameVisitor;
        impl<'de> Visitor<'de> for NameVisitor {
            type Value = Name<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a member name")
            }

            fn visit_borrowed_str<E: serde::de::Error>(self, name: &'de str) -> Result<Name<'de>, E> {
                Ok(Name(Cow::Borrowed(name)))
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Name<'de>, E> {
                Ok(Name(Cow::Owned(name.to_owned())))
            }

            fn visit_borrowed_bytes<E: serde::de::Error>(self, name: &'de [u8]) -> Result<Name<'de>, E> {
                std::str::from_utf8(name).map(|name| Name(Cow::Borrowed(name))).map_err(E::custom)
            }
        }
        reader.deserialize_str(NameVisitor).map_err(D::Error::custom)
    }
}

/// A seed that reads through [`Folding`].
struct Nested<T>(T);

impl<'de, T: DeserializeSeed<'de>> DeserializeSeed<'de> for Nested<T> {
    type Value = T::Value;

    fn deserialize<D: Deserializer<'de>>(self, inner: D) -> Result<T::Value, D::Error> {
        self.0.deserialize(Folding::new(inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde::{Deserialize, Serialize};
    use std::collections::BTreeMap;

    #[derive(Debug, Default, PartialEq, Deserialize, Serialize)]
    #[serde(rename_all = "PascalCase", default)]
    struct Request {
        version: u32,
        hostinfo: Option<Host>,
        endpoints: Vec<String>,
        caps: BTreeMap<String, Vec<Host>>,
        stream: bool,
        node: Wrapped,
        choice: Option<Choice>,
        score: f64,
        raw: Option<serde_json::Value>,
    }

    #[derive(Debug, Default, PartialEq, Deserialize, Serialize)]
    #[serde(default)]
    struct Host {
        #[serde(rename = "IPNVersion")]
        version: String,
        #[serde(rename = "NetInfo")]
        net: Net,
    }

    #[derive(Debug, Default, PartialEq, Deserialize, Serialize)]
    #[serde(default)]
    struct Net {
        #[serde(rename = "PreferredDERP")]
        preferred: u16,
        #[serde(rename = "DERPLatency")]
        latency: BTreeMap<String, f64>,
    }

    #[derive(Debug, Default, PartialEq, Deserialize, Serialize)]
    struct Wrapped(Vec<Net>);

    #[derive(Debug, PartialEq, Deserialize, Serialize)]
    enum Choice {
        Nothing,
        One(Net),
        Two(Net, u8),
        #[serde(rename_all = "PascalCase")]
        Named {
            inner: Net,
        },
    }

    #[test]
    fn the_spelling_of_the_official_rust_client_is_understood() {
        let text = r#"{"Version":130,"HostInfo":{"IpnVersion":"0.6.1","App":"x",
            "NetInfo":{"PreferredDerp":900,"DerpLatency":{"900-v4":0.0017}}},"Endpoints":["10.99.0.4:55919"]}"#;
        let request: Request = from_str(text).unwrap();
        let host = request.hostinfo.unwrap();
        assert_eq!((request.version, host.version.as_str(), host.net.preferred), (130, "0.6.1", 900));
        assert_eq!(host.net.latency, BTreeMap::from([("900-v4".to_owned(), 0.0017)]));
        assert_eq!(request.endpoints, ["10.99.0.4:55919"]);
    }

    #[test]
    fn null_is_empty_everywhere() {
        let text = r#"{"version":null,"hostinfo":null,"endpoints":null,"caps":null,"stream":null,"node":null,
            "choice":null,"score":null,"raw":null}"#;
        assert_eq!(from_str::<Request>(text).unwrap(), Request::default());
        let nested = from_str::<Request>(r#"{"Hostinfo":{"IPNVersion":null,"NetInfo":null}}"#).unwrap();
        assert_eq!(nested.hostinfo, Some(Host::default()));
        let inside = from_str::<Request>(r#"{"Caps":{"a":null,"b":[null]},"Endpoints":[null,"x"]}"#).unwrap();
        assert_eq!(inside.caps["a"], []);
        assert_eq!(inside.caps["b"], [Host::default()]);
        assert_eq!(inside.endpoints, ["", "x"]);
        assert_eq!(from_str::<Vec<u8>>("null").unwrap(), Vec::<u8>::new());
        assert_eq!(from_str::<Request>("null").unwrap(), Request::default());
    }

    #[test]
    fn map_keys_keep_their_case_and_their_type() {
        let caps = from_str::<Request>(r#"{"CAPS":{"https://X/Cap":[],"https://x/cap":[]}}"#).unwrap().caps;
        assert_eq!(caps.keys().map(String::as_str).collect::<Vec<_>>(), ["https://X/Cap", "https://x/cap"]);
        let numbered: BTreeMap<u16, Net> = from_str(r#"{"900":{"preferredderp":1}}"#).unwrap();
        assert_eq!(numbered[&900].preferred, 1);
    }

    #[test]
    fn folding_reaches_through_newtypes_enums_and_lists() {
        let net = Net { preferred: 7, latency: BTreeMap::new() };
        let read = |text: &str| from_str::<Request>(text).unwrap();
        assert_eq!(read(r#"{"NODE":[{"PREFERREDDERP":7}]}"#).node, Wrapped(vec![net]));
        for (text, expected) in [
            (r#""Nothing""#, 0),
            (r#"{"One":{"preferredDerp":7}}"#, 7),
            (r#"{"Two":[{"preferredDerp":8},1]}"#, 8),
            (r#"{"Named":{"INNER":{"preferredDerp":9}}}"#, 9),
        ] {
            let found = match from_str::<Choice>(text).unwrap() {
                Choice::Nothing => 0,
                Choice::One(net) | Choice::Two(net, _) | Choice::Named { inner: net } => net.preferred,
            };
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn an_exact_name_beats_a_folded_one_and_repeats_do_not_fail() {
        #[derive(Debug, Deserialize, PartialEq)]
        struct Both {
            #[serde(default)]
            id: u8,
            #[serde(default, rename = "ID")]
            upper: u8,
        }
        assert_eq!(from_str::<Both>(r#"{"ID":1,"id":2}"#).unwrap(), Both { id: 2, upper: 1 });
        assert_eq!(from_str::<Request>(r#"{"Version":1,"version":2,"VERSION":3}"#).unwrap().version, 1);
    }

    #[test]
    fn escaped_names_and_raw_values_are_read() {
        assert_eq!(from_str::<Request>(r#"{"\u0056ersion":4}"#).unwrap().version, 4);
        let raw = from_str::<Request>(r#"{"Raw":{"Keep":[1,null,{"Case":true}]}}"#).unwrap().raw;
        assert_eq!(raw, Some(serde_json::json!({"Keep": [1, null, {"Case": true}]})));
        let boxed: BTreeMap<String, Box<serde_json::value::RawValue>> = from_str(r#"{"a":{"B": 1}}"#).unwrap();
        assert_eq!(boxed["a"].get(), r#"{"B": 1}"#);
    }

    #[test]
    fn text_after_the_value_and_wrong_types_are_errors() {
        assert!(from_str::<Request>("{} {}").is_err());
        assert!(from_str::<Request>(r#"{"Version":"x"}"#).is_err());
        assert!(from_str::<Request>(r#"{"Version":1"#).is_err());
        assert!(from_slice::<Request>(b"\xff").is_err());
        let deep = "[".repeat(100_000);
        assert!(from_str::<serde_json::Value>(&deep).is_err());
    }

    fn upper_or_lower(text: &str, upper: bool) -> String {
        if upper { text.to_ascii_uppercase() } else { text.to_ascii_lowercase() }
    }

    proptest! {
        #[test]
        fn any_case_reads_as_the_exact_spelling(version: u32, stream: bool, upper: bool,
                                               endpoints in proptest::collection::vec("[a-z0-9:.]{0,12}", 0..4)) {
            let request = Request { version, stream, endpoints, ..Request::default() };
            let mut object = serde_json::Map::new();
            let serde_json::Value::Object(exact) = serde_json::to_value(&request).unwrap() else { unreachable!() };
            for (name, value) in exact {
                object.insert(upper_or_lower(&name, upper), value);
            }
            let text = serde_json::to_string(&object).unwrap();
            prop_assert_eq!(from_str::<Request>(&text).unwrap(), request);
        }

        #[test]
        fn any_bytes_are_an_error_or_a_value(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = from_slice::<Request>(&bytes);
        }
    }
}
