//! Asking a URL who may use the relay.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use mesh_noise::key::NodePublic;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use super::{Admission, Applicant, Deciding, Verdict};
use crate::driver::now;
use crate::driver::stream::Transport;
use crate::driver::tls_stream::TlsStream;
use crate::map::{DerpNode, RegionId};
use crate::tls::{ClientTls, TlsError, server_name};

/// How long an answer may take, waiting for one's turn included.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The longest answer that is read.
const MAX_ANSWER: usize = 4 * 1024;
/// How many questions are asked at once.
const AT_ONCE: usize = 64;
/// For how long a yes holds, so that all clients of a relay that has restarted may come back without asking again.
const REMEMBERED: Duration = Duration::from_secs(60);
/// How many yeses are remembered; beyond that the oldest are forgotten.
const MAX_REMEMBERED: usize = 16 * 1024;

/// What becomes of clients while the URL cannot be reached: no connection, no TLS, or no answer within 5 s. An answer that
/// is not `200`, too long, or malformed always turns the client away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Unreachable {
    /// They are turned away.
    #[default]
    Refuse,
    /// They are let in.
    Admit,
}

/// A text that is no URL to ask.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BadVerifyUrl {
    /// It has another form.
    #[error("verify URL {0:?}: expected http://HOST[:PORT][/PATH] or https://HOST[:PORT][/PATH]")]
    Form(String),
    /// Its host cannot be asked over TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Asks a URL whether a client may use the relay.
///
/// The question is `POST {"NodePublic":"nodekey:<hex>","Source":"<ip>"}`, the answer `200 {"Allow":<bool>}` of at most
/// 4 KiB, within 5 s. At most 64 questions are asked at once. A yes holds for a minute for the same node and address; a no
/// is asked again each time.
#[derive(Debug)]
pub struct Verify {
    node: DerpNode,
    authority: String,
    path: String,
    /// None for plain HTTP.
    tls: Option<ClientTls>,
    unreachable: Unreachable,
    asking: Semaphore,
    admitted: Mutex<Remembered>,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Question {
    node_public: NodePublic,
    source: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    allow: bool,
}

/// Why there is no answer.
enum Failed {
    Unreachable(String),
    Malformed(String),
}

impl Failed {
    fn unreachable(error: impl ToString) -> Self {
        Self::Unreachable(error.to_string())
    }
}

impl Verify {
    /// Asks `url`, whose certificate, if it is an `https://` URL, has to be what `tls` trusts.
    ///
    /// # Errors
    /// If that is no URL that can be asked.
    pub fn new(url: &str, tls: &ClientTls, unreachable: Unreachable) -> Result<Self, BadVerifyUrl> {
        let wrong = || BadVerifyUrl::Form(url.to_owned());
        let parsed: Uri = url.parse().map_err(|_| wrong())?;
        let secure = match parsed.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            Some(_) | None => return Err(wrong()),
        };
        let authority = parsed.authority().ok_or_else(wrong)?;
        if authority.as_str().contains('@') || authority.host().is_empty() {
            return Err(wrong());
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let any_region = RegionId::new(u16::MAX).ok_or_else(wrong)?;
        let mut node = DerpNode::new("", any_region, host);
        node.derp_port = authority.port_u16().unwrap_or(if secure { 443 } else { 80 });
        if secure {
            server_name(host)?;
        }
        Ok(Self {
            node,
            authority: authority.to_string(),
            path: parsed.path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string),
            tls: secure.then(|| tls.clone()),
            unreachable,
            asking: Semaphore::new(AT_ONCE),
            admitted: Mutex::new(Remembered::default()),
        })
    }

    async fn ask(&self, applicant: Applicant) -> Result<bool, Failed> {
        let question = Question { node_public: applicant.node, source: applicant.address.to_canonical().to_string() };
        let question = serde_json::to_vec(&question).map_err(Failed::unreachable)?;
        let _turn = self.asking.acquire().await.map_err(Failed::unreachable)?;
        let stream = self.connect().await?;
        let shaken = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = shaken.map_err(Failed::unreachable)?;
        let request = Request::post(&self.path)
            .header(HOST, &self.authority)
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(question)))
            .map_err(Failed::unreachable)?;
        // The connection ends when the exchange drops its sender; an answer that came before an early end still counts.
        let exchange = async move {
            let answer = sender.send_request(request).await.map_err(Failed::unreachable)?;
            if answer.status() != StatusCode::OK {
                return Err(Failed::Malformed(format!("answered {} and not 200", answer.status().as_u16())));
            }
            let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
            body.map(|body| body.to_bytes()).map_err(|error| match error.downcast::<hyper::Error>() {
                Ok(error) => Failed::unreachable(error),
                Err(_) => Failed::Malformed(format!("an answer of more than {MAX_ANSWER} bytes")),
            })
        };
        let (body, _) = tokio::join!(exchange, connection);
        let answer = crate::json::from_slice::<Answer>(&body?);
        answer.map(|answer| answer.allow).map_err(|error| Failed::Malformed(format!("the answer: {error}")))
    }

    async fn connect(&self) -> Result<Transport, Failed> {
        let tcp = TcpStream::connect((self.node.host_name.as_str(), self.node.derp_port)).await;
        let tcp = tcp.map_err(Failed::unreachable)?;
        let Some(tls) = &self.tls else { return Ok(Transport::Other(Box::new(tcp))) };
        let config = tls.for_node(&self.node).map_err(Failed::unreachable)?;
        let name = server_name(&self.node.host_name).map_err(Failed::unreachable)?;
        let (secured, _) = TlsStream::connect(config, name, tcp).await.map_err(Failed::unreachable)?;
        Ok(Transport::Other(Box::new(secured)))
    }

    fn remembered(&self) -> std::sync::MutexGuard<'_, Remembered> {
        self.admitted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Admission for Verify {
    fn admit(&self, applicant: Applicant) -> Pin<Box<dyn Future<Output = bool> + Send + '_>> {
        Box::pin(async move { self.decide(applicant).await.admits() })
    }

    fn decide(&self, applicant: Applicant) -> Deciding<'_> {
        Box::pin(async move {
            if self.remembered().has(now(), &applicant) {
                return Verdict::Admit;
            }
            let asked = tokio::time::timeout(TIMEOUT, self.ask(applicant)).await;
            match asked.unwrap_or_else(|_| Err(Failed::Unreachable("no answer within 5 s".to_owned()))) {
                Ok(true) => {
                    self.remembered().note(now(), applicant);
                    Verdict::Admit
                }
                Ok(false) => Verdict::Refuse,
                Err(Failed::Malformed(reason)) => {
                    tracing::warn!(url = %self.authority, %reason, "a client is turned away: the verify URL misbehaves");
                    Verdict::RefuseMalformed
                }
                Err(Failed::Unreachable(reason)) => match self.unreachable {
                    Unreachable::Admit => {
                        tracing::warn!(url = %self.authority, %reason, "a client is let in unasked: no verify URL");
                        Verdict::AdmitUnasked
                    }
                    Unreachable::Refuse => {
                        tracing::warn!(url = %self.authority, %reason, "a client is turned away: no verify URL");
                        Verdict::RefuseUnasked
                    }
                },
            }
        })
    }
}

/// Who was admitted in the last minute.
#[derive(Debug, Default)]
struct Remembered {
    until: HashMap<Applicant, Instant>,
    /// In the order in which they end.
    order: VecDeque<(Instant, Applicant)>,
}

impl Remembered {
    fn has(&mut self, now: Instant, applicant: &Applicant) -> bool {
        self.forget(now, MAX_REMEMBERED);
        self.until.contains_key(applicant)
    }

    fn note(&mut self, now: Instant, applicant: Applicant) {
        self.forget(now, MAX_REMEMBERED - 1);
        let until = now + REMEMBERED;
        self.until.insert(applicant, until);
        self.order.push_back((until, applicant));
    }

    fn forget(&mut self, now: Instant, most: usize) {
        while let Some((until, applicant)) = self.order.front().copied()
            && (until <= now || self.order.len() > most)
        {
            self.order.pop_front();
            // Asked twice at once, it may stand here twice; the later one counts.
            if self.until.get(&applicant) == Some(&until) {
                self.until.remove(&applicant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn applicant(number: u16) -> Applicant {
        let mut key = [0; 32];
        key[..2].copy_from_slice(&number.to_be_bytes());
        Applicant { node: NodePublic::from_bytes(key), address: Ipv4Addr::LOCALHOST.into() }
    }

    #[test]
    fn a_yes_holds_for_a_minute_and_few_are_kept() {
        let (start, mut remembered) = (now(), Remembered::default());
        remembered.note(start, applicant(1));
        assert!(remembered.has(start + REMEMBERED - Duration::from_millis(1), &applicant(1)));
        assert!(!remembered.has(start, &applicant(2)));
        remembered.note(start + REMEMBERED / 2, applicant(1));
        assert!(remembered.has(start + REMEMBERED, &applicant(1)));
        assert!(!remembered.has(start + REMEMBERED * 2, &applicant(1)));
        for number in 0..u16::try_from(MAX_REMEMBERED).unwrap() + 10 {
            remembered.note(start, applicant(number));
        }
        assert_eq!((remembered.until.len(), remembered.order.len()), (MAX_REMEMBERED, MAX_REMEMBERED));
        assert!(!remembered.has(start, &applicant(9)) && remembered.has(start, &applicant(10)));
    }

    #[test]
    fn only_a_url_can_be_asked() {
        let new = |url| Verify::new(url, &ClientTls::plain(), Unreachable::Refuse).map(|verify| verify.authority);
        assert_eq!(new("http://a.example/verify").unwrap(), "a.example");
        assert_eq!(new("https://a.example:8443").unwrap(), "a.example:8443");
        for wrong in ["", "a.example", "ftp://a.example/", "http://u@a.example/", "http:///x", "https://"] {
            assert!(new(wrong).is_err(), "{wrong}");
        }
    }
}
