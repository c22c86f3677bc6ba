//! The page behind a printed URL: who asks to join, and a form for a one-time code.
//!
//! No script, no cookie, nothing loaded from elsewhere: the content security policy allows one inline style sheet, by
//! its hash, and posting the form back. Every text that came from outside is escaped. A code is the only authority, so
//! there is nothing that another site could make a browser do.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderValue, Request, StatusCode, header};
use hyper::body::Incoming as RequestBody;

use super::http::{Answer, body, read_body, with_type};
use super::{CommandError, Coordinator};
use crate::admin::Admin;
use crate::server::state::{Redeemed, Refusal};
use crate::server::{Actor, Login, LoginId, LoginStatus};

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:34rem;margin:3rem auto;padding:0 1rem;\
color:#1a1a1a;background:#fff}h1{font-size:1.4rem}dt{color:#666;font-size:.85rem}dd{margin:0 0 .6rem;\
font-family:ui-monospace,monospace;overflow-wrap:anywhere}label{display:block;margin:.8rem 0 .2rem}\
input{font:inherit;padding:.4rem .6rem;width:100%;box-sizing:border-box}button{font:inherit;margin-top:1rem;\
padding:.5rem 1.2rem}.note{border-left:4px solid #c33;padding-left:.8rem}.done{border-color:#2a7}";

/// `GET /register/<id>`.
pub(super) fn show(coordinator: &Arc<Coordinator>, id: &str) -> Answer {
    match find(coordinator, id) {
        Some(login) => document(StatusCode::OK, "A machine asks to join", &describe(&login, None)),
        None => unknown(),
    }
}

/// `POST /register/<id>` with the form's fields.
pub(super) async fn submit(
    coordinator: &Arc<Coordinator>,
    id: &str,
    request: Request<RequestBody>,
    from: SocketAddr,
) -> Answer {
    let form = match read_body(request).await {
        Ok(form) => form,
        Err(refusal) => return *refusal,
    };
    let (mut code, mut user) = (String::new(), String::new());
    for (name, value) in fields(&form) {
        match name.as_str() {
            "code" => code = value,
            "user" => user = value,
            _ => {}
        }
    }
    let Some(id) = LoginId::from_url(id) else { return unknown() };
    let visitor = Admin::new(Arc::clone(coordinator), Actor::Visitor(from.ip()));
    match visitor.redeem(&id, &code, Some(user.trim())).await {
        Ok(Redeemed::Approved(_)) => document(
            StatusCode::OK,
            "Approved",
            "<p class=\"note done\">The machine is joining. You can close this page.</p>",
        ),
        Ok(Redeemed::WrongCode { tries_left: 0 }) => document(
            StatusCode::FORBIDDEN,
            "Too many wrong codes",
            "<p class=\"note\">This request is closed. The machine will print a new URL.</p>",
        ),
        Ok(Redeemed::WrongCode { tries_left }) => {
            let note = format!("This code does not work. Attempts left: {tries_left}.");
            again(coordinator, &id, StatusCode::FORBIDDEN, &note)
        }
        Ok(Redeemed::UserNeeded) => {
            again(coordinator, &id, StatusCode::BAD_REQUEST, "Say which user the machine belongs to.")
        }
        Err(CommandError::Refused(Refusal::UnknownLogin(_))) => unknown(),
        Err(error) => {
            let note = format!("<p class=\"note\">{}</p>", escape(&error.to_string()));
            document(StatusCode::SERVICE_UNAVAILABLE, "That did not work", &note)
        }
    }
}

fn find(coordinator: &Arc<Coordinator>, id: &str) -> Option<Login> {
    let id = LoginId::from_url(id)?;
    coordinator.read(|view| view.state.login(&id, view.now).cloned())
}

fn unknown() -> Answer {
    document(
        StatusCode::NOT_FOUND,
        "Nothing is waiting here",
        "<p class=\"note\">The machine has joined already, has given up, or its time has run out.</p>",
    )
}

fn again(coordinator: &Arc<Coordinator>, id: &LoginId, status: StatusCode, note: &str) -> Answer {
    match find(coordinator, &id.0) {
        Some(login) => document(status, "A machine asks to join", &describe(&login, Some(note))),
        None => unknown(),
    }
}

/// What is known of the machine, and the form unless somebody has already approved it.
fn describe(login: &Login, note: Option<&str>) -> String {
    let mut html = String::new();
    if let Some(note) = note {
        let _ = write!(html, "<p class=\"note\">{}</p>", escape(note));
    }
    let from = login.from.map_or_else(|| "unknown".to_owned(), |from| from.to_string());
    let os = if login.os.is_empty() { "not said" } else { &login.os };
    let facts = [
        ("Host name", login.hostname.clone()),
        ("System", os.to_owned()),
        ("Node key", login.node_key.short()),
        ("Machine key", login.machine.short()),
        ("Asks from", from),
        ("Request", login.id.to_string()),
    ];
    html.push_str("<dl>");
    for (name, value) in facts {
        let _ = write!(html, "<dt>{name}</dt><dd>{}</dd>", escape(&value));
    }
    html.push_str("</dl>");
    if login.status != LoginStatus::Waiting {
        html.push_str("<p class=\"note done\">Approved. The machine is joining.</p>");
        return html;
    }
    html.push_str(
        "<p>Approve it only if you have just started it yourself. An operator makes a code with \
         <code>mesh admin codes create</code>.</p>\
         <form method=\"post\"><label for=\"code\">One-time code</label>\
         <input id=\"code\" name=\"code\" required maxlength=\"64\" autocomplete=\"one-time-code\" autofocus>\
         <label for=\"user\">User who owns the machine (may be empty if there is only one)</label>\
         <input id=\"user\" name=\"user\" maxlength=\"64\" autocomplete=\"username\">\
         <button>Approve</button></form>",
    );
    html
}

fn document(status: StatusCode, title: &str, content: &str) -> Answer {
    let html = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><meta name=\"referrer\" \
         content=\"no-referrer\"><title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>{content}\
         </body></html>\n"
    );
    let mut response = with_type(body(status, html.into()), "text/html; charset=utf-8");
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, STYLE.as_bytes());
    let policy = format!(
        "default-src 'none'; style-src 'sha256-{}'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
        STANDARD.encode(digest)
    );
    let headers = response.headers_mut();
    if let Ok(policy) = HeaderValue::from_str(&policy) {
        headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// Makes a text safe between tags and inside quoted attributes.
fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            // Controls, and marks that would reorder what follows them.
            c if c.is_control()
                || matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') =>
            {
                safe.push('\u{fffd}');
            }
            c => safe.push(c),
        }
    }
    safe
}

/// The fields of an `application/x-www-form-urlencoded` body.
fn fields(body: &[u8]) -> impl Iterator<Item = (String, String)> {
    body.split(|byte| *byte == b'&').map(|pair| {
        let mut parts = pair.splitn(2, |byte| *byte == b'=');
        let mut next = || unescape(parts.next().unwrap_or_default());
        (next(), next())
    })
}

fn unescape(text: &[u8]) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        match byte {
            b'+' => bytes.push(b' '),
            b'%' => match after.split_first_chunk::<2>() {
                Some((digits, after)) if digits.iter().all(u8::is_ascii_hexdigit) => {
                    let mut value = [0];
                    // Two digits were just seen.
                    let _ = hex::decode_to_slice(digits, &mut value);
                    bytes.push(value[0]);
                    rest = after;
                }
                _ => bytes.push(b'%'),
            },
            byte => bytes.push(byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn forms_are_read_as_browsers_send_them() {
        let read: Vec<_> = fields(b"code=AB%2dCD+EF&user=a%40b&x").collect();
        let expected = [("code", "AB-CD EF"), ("user", "a@b"), ("x", "")];
        assert_eq!(read, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    #[test]
    fn markup_from_outside_stays_text() {
        assert_eq!(escape("<script>'\"&\u{202e}"), "&lt;script&gt;&#39;&quot;&amp;\u{fffd}");
    }

    proptest! {
        #[test]
        fn any_form_is_read(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for (name, value) in fields(&bytes) {
                prop_assert!(!escape(&name).contains('<') && !escape(&value).contains('"'));
            }
        }
    }
}
