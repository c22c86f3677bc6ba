//! Asks relays by plain HTTP whether somebody answers in their place.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::report::PortalCheck;

/// How long a relay, or a portal, has to answer.
const TIMEOUT: Duration = Duration::from_secs(1);
/// More of an answer is not read.
const MAX_ANSWER: usize = 16 * 1024;

/// Asks all at once; the first answer decides. `None` if nobody answers within a second.
pub async fn look_for_portal(checks: Vec<PortalCheck>) -> Option<bool> {
    let mut asked: JoinSet<Option<bool>> = checks.into_iter().map(ask).collect();
    let first = async {
        while let Some(answer) = asked.join_next().await {
            if let Ok(Some(found)) = answer {
                return Some(found);
            }
        }
        None
    };
    tokio::time::timeout(TIMEOUT, first).await.ok().flatten()
}

async fn ask(check: PortalCheck) -> Option<bool> {
    let mut stream = TcpStream::connect(check.address).await.ok()?;
    stream.write_all(&check.request).await.ok()?;
    let mut answer = Vec::new();
    while answer.len() < MAX_ANSWER {
        if let Some(found) = check.judge(&answer) {
            return Some(found);
        }
        if stream.read_buf(&mut answer).await.ok()? == 0 {
            break;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    /// Answers one request with `answer`, in two pieces.
    async fn asked(answer: &'static str) -> Option<bool> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = [0; 1024];
            assert!(stream.read(&mut buffer).await.unwrap() > 0);
            let (one, other) = answer.split_at(answer.len() / 2);
            for piece in [one, other] {
                stream.write_all(piece.as_bytes()).await.unwrap();
                stream.flush().await.unwrap();
            }
        });
        look_for_portal(vec![PortalCheck::at(address, "relay.example")]).await
    }

    #[tokio::test]
    async fn a_relay_answers_for_itself_and_a_hotel_in_its_place() {
        let right = "HTTP/1.1 204 No Content\r\nX-Tailscale-Response: response ts_relay.example\r\n\r\n";
        assert_eq!(asked(right).await, Some(false));
        assert_eq!(asked("HTTP/1.1 302 Found\r\nLocation: http://hotel.example/\r\n\r\n").await, Some(true));
        assert_eq!(asked("").await, None, "nobody answers");
        assert_eq!(look_for_portal(Vec::new()).await, None);
    }
}
