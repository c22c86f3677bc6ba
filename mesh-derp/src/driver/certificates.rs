//! Keeps what a listener shows up to date: files that were replaced, a certificate that an authority renews, and the
//! meta-certificate that ages.
//!
//! Files are looked at once a minute, through symbolic links, by device, inode, size and time of change; so a link that
//! is pointed elsewhere, as certbot does it, counts as a change. What cannot be used changes nothing and is said once in
//! one line; the files are tried again when they change again, or on request. While two files are being replaced one
//! after the other, they do not belong together for a moment: that is such a case, and heals itself.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::Notify;

#[cfg(feature = "acme")]
use super::acme::Issuer;
use super::wall_clock;
use crate::tls::{CurrentCertificate, ServerTls, TlsError};

/// How often files are looked at, and certificates' ages.
const INTERVAL: Duration = Duration::from_secs(60);

/// A certificate chain and its private key, both PEM files; they may be one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFiles {
    /// The chain, leaf first.
    pub certificates: PathBuf,
    /// The leaf's private key.
    pub key: PathBuf,
}

impl CertificateFiles {
    /// Reads them.
    ///
    /// # Errors
    /// If a file cannot be read or does not hold what it should, or they do not belong together.
    pub fn load(&self) -> Result<ServerTls, TlsError> {
        ServerTls::from_pem_files(&self.certificates, &self.key)
    }
}

/// Keeps a [`CurrentCertificate`] up to date for as long as [`run`](Self::run) is polled.
#[derive(Debug)]
pub struct Keeper {
    current: Arc<CurrentCertificate>,
    files: Option<Watched>,
    #[cfg(feature = "acme")]
    issuer: Option<Issuer>,
    request: Arc<Notify>,
    interval: Duration,
}

#[derive(Debug)]
struct Watched {
    files: CertificateFiles,
    seen: [Option<Stamp>; 2],
}

/// What changes when a file is replaced or written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    len: u64,
    changed: (i64, i64),
}

impl Keeper {
    /// For a certificate that changes only by its meta-certificate.
    #[must_use]
    pub fn new(current: Arc<CurrentCertificate>) -> Self {
        Self {
            current,
            files: None,
            #[cfg(feature = "acme")]
            issuer: None,
            request: Arc::new(Notify::new()),
            interval: INTERVAL,
        }
    }

    /// Reads `files` again when they change or somebody asks for it.
    #[must_use]
    pub fn watching(mut self, files: CertificateFiles) -> Self {
        // Not looked at yet: they may have changed since they were read.
        self.files = Some(Watched { files, seen: [None, None] });
        self
    }

    /// Has an authority renew it. The certificate has to be one that
    /// [answers validations](CurrentCertificate::answering_validations).
    #[cfg(feature = "acme")]
    #[must_use]
    pub fn asking(mut self, issuer: Issuer) -> Self {
        self.issuer = Some(issuer);
        self
    }

    /// What to notify so that the files are read at once, changed or not, and that an authority that has failed is asked
    /// again at once.
    #[must_use]
    pub fn request(&self) -> Arc<Notify> {
        Arc::clone(&self.request)
    }

    /// Never ends. Safe to cancel.
    pub async fn run(mut self) -> Infallible {
        loop {
            let asked = tokio::time::timeout(self.wait(), self.request.notified()).await.is_ok();
            let now = wall_clock();
            self.current.refresh_meta(now);
            if let Some(watched) = &mut self.files {
                watched.look(&self.current, asked, now);
            }
            #[cfg(feature = "acme")]
            if let Some(issuer) = &mut self.issuer {
                if asked {
                    issuer.handle_request();
                }
                if issuer.due() <= now {
                    issuer.ask(&self.current).await;
                }
            }
        }
    }

    /// Never long: what is due is due by the calendar, which a suspended or corrected clock reaches sooner than a timer.
    fn wait(&self) -> Duration {
        #[cfg(feature = "acme")]
        if let Some(issuer) = &self.issuer {
            return issuer.due().duration_since(wall_clock()).unwrap_or_default().min(self.interval);
        }
        self.interval
    }
}

impl Watched {
    fn look(&mut self, current: &CurrentCertificate, asked: bool, now: SystemTime) {
        let stamps = stamps(&self.files);
        if !asked && stamps == self.seen {
            return;
        }
        // What was looked at before it was read is read again if it changes meanwhile.
        self.seen = stamps;
        let taken = self.files.load().and_then(|read| {
            if current.shows(&read) {
                return Ok(asked);
            }
            if read.left(now).is_zero() && !current.left(now).is_zero() {
                let path = self.files.certificates.clone();
                return Err(TlsError::Content { path, reason: "this certificate has expired".to_owned() });
            }
            current.replace(read).map(|()| true)
        });
        match taken {
            Ok(false) => {}
            Ok(true) => tracing::info!(file = %self.files.certificates.display(), "certificate loaded again"),
            Err(error) => tracing::error!("the certificate stays as it was: {error}"),
        }
    }
}

fn stamps(files: &CertificateFiles) -> [Option<Stamp>; 2] {
    [&files.certificates, &files.key].map(|file| stamp(file).ok())
}

#[cfg(unix)]
fn stamp(file: &Path) -> io::Result<Stamp> {
    use std::os::unix::fs::MetadataExt as _;
    let data = fs::metadata(file)?;
    // The inode's own time, which nobody can set: a copy that keeps the old file's time is noticed too.
    let changed = (data.ctime(), data.ctime_nsec());
    Ok(Stamp { device: data.dev(), inode: data.ino(), len: data.len(), changed })
}

#[cfg(not(unix))]
fn stamp(file: &Path) -> io::Result<Stamp> {
    let data = fs::metadata(file)?;
    let age = data.modified()?.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let changed = (i64::try_from(age.as_secs()).unwrap_or(i64::MAX), i64::from(age.subsec_nanos()));
    Ok(Stamp { device: 0, inode: 0, len: data.len(), changed })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::{DerpNode, RegionId};
    use crate::tls::ClientTls;
    use rustls::pki_types::CertificateDer;
    use std::net::SocketAddr;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};
    use tokio_rustls::client::TlsStream;
    use tokio_rustls::{TlsAcceptor, TlsConnector};

    /// A certificate for localhost and its key in `dir`.
    fn make(dir: &Path) -> (CertificateFiles, CertificateDer<'static>) {
        let made = ServerTls::load_or_generate(dir, &["localhost".to_owned()]).unwrap();
        let file = dir.join("tls.pem");
        (CertificateFiles { certificates: file.clone(), key: file }, made.leaf().clone())
    }

    /// An echo server that shows what is kept, looking at the files every 10 ms.
    async fn serve(files: &CertificateFiles) -> (SocketAddr, Arc<Notify>) {
        let keeping = Keeper::new(Arc::new(CurrentCertificate::new(files.load().unwrap(), None).unwrap()));
        let mut keeping = keeping.watching(files.clone());
        keeping.interval = Duration::from_millis(10);
        let (config, request) = (keeping.current.config().unwrap(), keeping.request());
        tokio::spawn(keeping.run());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let accepting = TlsAcceptor::from(Arc::clone(&config)).accept(stream);
                tokio::spawn(async move {
                    let (mut from, mut to) = tokio::io::split(accepting.await.unwrap());
                    tokio::io::copy(&mut from, &mut to).await.ok();
                });
            }
        });
        (address, request)
    }

    async fn connect(address: SocketAddr) -> TlsStream<TcpStream> {
        let mut node = DerpNode::new("x", RegionId::new(1).unwrap(), "localhost");
        node.insecure_for_tests = true;
        let config = ClientTls::with_roots(Vec::new()).unwrap().for_node(&node).unwrap();
        let stream = TcpStream::connect(address).await.unwrap();
        TlsConnector::from(config).connect("localhost".try_into().unwrap(), stream).await.unwrap()
    }

    fn shown(stream: &TlsStream<TcpStream>) -> CertificateDer<'static> {
        stream.get_ref().1.peer_certificates().unwrap()[0].clone()
    }

    async fn wait_for(address: SocketAddr, leaf: &CertificateDer<'_>) {
        let seen = async {
            while shown(&connect(address).await) != *leaf {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), seen).await.expect("the new certificate is never shown");
    }

    async fn echoes(stream: &mut TlsStream<TcpStream>) {
        let mut back = [0; 5];
        stream.write_all(b"still").await.unwrap();
        stream.read_exact(&mut back).await.unwrap();
        assert_eq!(&back, b"still");
    }

    #[tokio::test]
    async fn a_replaced_file_is_shown_to_new_connections_and_the_old_ones_live_on() {
        let dir = tempfile::tempdir().unwrap();
        let ((files, first), (next, second)) = (make(&dir.path().join("one")), make(&dir.path().join("two")));
        let (address, _) = serve(&files).await;
        let mut old = connect(address).await;
        assert_eq!(shown(&old), first);
        fs::copy(&next.certificates, &files.certificates).unwrap();
        wait_for(address, &second).await;
        echoes(&mut old).await;
    }

    #[tokio::test]
    async fn a_link_that_points_elsewhere_counts_as_a_change() {
        let dir = tempfile::tempdir().unwrap();
        let ((one, first), (two, second)) = (make(&dir.path().join("one")), make(&dir.path().join("two")));
        let (link, new) = (dir.path().join("live.pem"), dir.path().join("new.pem"));
        std::os::unix::fs::symlink(&one.certificates, &link).unwrap();
        let (address, _) = serve(&CertificateFiles { certificates: link.clone(), key: link.clone() }).await;
        wait_for(address, &first).await;
        std::os::unix::fs::symlink(&two.certificates, &new).unwrap();
        fs::rename(&new, &link).unwrap();
        wait_for(address, &second).await;
    }

    #[tokio::test]
    async fn a_file_that_is_no_good_changes_nothing_and_one_that_is_good_again_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let ((files, first), (next, second)) = (make(&dir.path().join("one")), make(&dir.path().join("two")));
        let (address, request) = serve(&files).await;
        for bad in [&b"no certificate"[..], &[], &fs::read(&files.key).unwrap()[..200]] {
            fs::write(&files.certificates, bad).unwrap();
            request.notify_one();
            tokio::time::sleep(Duration::from_millis(40)).await;
            assert_eq!(shown(&connect(address).await), first);
        }
        fs::remove_file(&files.certificates).unwrap();
        tokio::time::sleep(Duration::from_millis(40)).await;
        fs::copy(&next.certificates, &files.certificates).unwrap();
        wait_for(address, &second).await;
    }

    #[test]
    fn a_certificate_that_has_expired_does_not_replace_one_that_has_not() {
        let dir = tempfile::tempdir().unwrap();
        let (files, first) = make(dir.path());
        let current = CurrentCertificate::new(files.load().unwrap(), None).unwrap();
        let mut watched = Watched { seen: [None, None], files };
        let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
        let key = rcgen::KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem() + &key.serialize_pem();
        fs::write(&watched.files.certificates, pem).unwrap();
        watched.look(&current, false, wall_clock());
        assert_eq!(current.shown().cert[0], first);
    }
}
