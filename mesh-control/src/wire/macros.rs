//! The one macro that declares wire structs.
//!
//! Go's rules for a JSON object hold for every message alike: a member that is absent or `null` is the zero value, and
//! a zero value is left out when sending unless somebody relies on it. Writing that once keeps the declarations
//! readable: each line is the Rust field, its type, and its exact name on the wire.

/// Declares a message. `field: Type = "Name"` is left out when it is the default; `always` sends it even then;
/// `via "path"` reads it with the function at `path` instead of [`or_default`](super::lenient::or_default).
macro_rules! message {
    ($(#[$meta:meta])* pub struct $name:ident { $($body:tt)* }) => {
        message!(@fields [$(#[$meta])* pub struct $name] [] $($body)*);
    };
    (@fields [$($head:tt)*] [$($done:tt)*]
        $(#[$field_meta:meta])* $field:ident: $type:ty = $json:literal, $($rest:tt)*) => {
        message!(@fields [$($head)*] [$($done)*
            $(#[$field_meta])*
            #[serde(
                rename = $json, default,
                deserialize_with = "crate::wire::lenient::or_default",
                skip_serializing_if = "crate::wire::lenient::is_default"
            )]
            pub $field: $type,
        ] $($rest)*);
    };
    (@fields [$($head:tt)*] [$($done:tt)*]
        $(#[$field_meta:meta])* $field:ident: $type:ty = $json:literal always, $($rest:tt)*) => {
        message!(@fields [$($head)*] [$($done)*
            $(#[$field_meta])*
            #[serde(rename = $json, default, deserialize_with = "crate::wire::lenient::or_default")]
            pub $field: $type,
        ] $($rest)*);
    };
    (@fields [$($head:tt)*] [$($done:tt)*]
        $(#[$field_meta:meta])* $field:ident: $type:ty = $json:literal via $reader:literal, $($rest:tt)*) => {
        message!(@fields [$($head)*] [$($done)*
            $(#[$field_meta])*
            #[serde(
                rename = $json, default,
                deserialize_with = $reader,
                skip_serializing_if = "crate::wire::lenient::is_default"
            )]
            pub $field: $type,
        ] $($rest)*);
    };
    (@fields [$($head:tt)*] [$($done:tt)*]
        $(#[$field_meta:meta])* $field:ident: $type:ty = $json:literal always via $reader:literal, $($rest:tt)*) => {
        message!(@fields [$($head)*] [$($done)*
            $(#[$field_meta])*
            #[serde(rename = $json, default, deserialize_with = $reader)]
            pub $field: $type,
        ] $($rest)*);
    };
    (@fields [$($head:tt)*] [$($done:tt)*]) => {
        #[derive(Debug, Clone, PartialEq, Default, serde::Serialize, serde::Deserialize)]
        $($head)* { $($done)* }
    };
}
