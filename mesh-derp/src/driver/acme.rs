//! Asks an authority for a certificate and keeps what it issues. What is asked for when is in [`crate::acme`].

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use instant_acme::{
    Account, AccountCredentials, AuthorizationStatus, Error, Identifier, NewAccount, NewOrder, Order, OrderStatus,
    Problem, RetryPolicy,
};

use super::{random_fraction, wall_clock, write_private_file};
use crate::acme::{Challenge, Failure, Name, Renewal, Settings, challenges};
use crate::tls::validation::Validations;
use crate::tls::{ClientTls, CurrentCertificate, ServerTls, TlsError, certificates_in};
use crate::x509::{self, Validity};

mod web;

use web::Web;

/// The file that holds the account.
const ACCOUNT_FILE: &str = "acme-account.json";
/// The file that holds chain and key.
const CERTIFICATE_FILE: &str = "acme.pem";
/// The profile for addresses at authorities that have profiles.
const SHORT_LIVED: &str = "shortlived";
/// How long an authority may take to validate names, and then to issue.
const PATIENCE: RetryPolicy =
    RetryPolicy::new().initial_delay(Duration::from_millis(250)).backoff(1.5).timeout(Duration::from_secs(120));

/// A certificate that an authority issues, and when to ask for it. A [`Keeper`](super::certificates::Keeper) drives it.
#[derive(Debug)]
pub struct Issuer {
    settings: Settings,
    account_file: PathBuf,
    certificate_file: PathBuf,
    tls: ClientTls,
    renewal: Renewal,
    /// Whether what is shown was issued, and is not of our own making.
    issued: bool,
}

/// Why there is no certificate.
#[derive(Debug)]
struct NotIssued {
    failure: Failure,
    cause: String,
}

impl From<Error> for NotIssued {
    fn from(error: Error) -> Self {
        let Error::Api(problem) = error else {
            return Self { failure: Failure::Trouble, cause: error.to_string() };
        };
        let failure = if is_trouble(&problem) { Failure::Trouble } else { Failure::Refused };
        Self { failure, cause: in_words(&problem) }
    }
}

impl From<TlsError> for NotIssued {
    fn from(error: TlsError) -> Self {
        Self { failure: Failure::Trouble, cause: error.to_string() }
    }
}

impl Issuer {
    /// Opens what is kept in `state_dir`. With it, what to show until there is something better: the kept certificate,
    /// or one of our own making for the same names. `listen` decides on the challenges.
    ///
    /// # Errors
    /// If the settings make no sense, a file cannot be read, or the kept account is damaged.
    pub fn open(
        settings: Settings,
        state_dir: &Path,
        listen: &[std::net::SocketAddr],
    ) -> Result<(Self, ServerTls), TlsError> {
        let url = settings.directory.parse::<hyper::Uri>().ok();
        if url.is_none_or(|url| url.scheme_str() != Some("https") || url.host().is_none()) {
            return Err(TlsError::Directory(settings.directory));
        }
        let tls = settings.ca_file.as_deref().map_or_else(ClientTls::system, ClientTls::with_ca_file)?;
        let certificate_file = state_dir.join(CERTIFICATE_FILE);
        let names: Vec<String> = settings.names.iter().map(Name::to_string).collect();
        let now = wall_clock();
        let kept = kept(&certificate_file);
        // What lacks a name or was issued elsewhere is shown, but not for long.
        let lasting =
            kept.as_ref().filter(|(directory, kept)| *directory == settings.directory && kept.is_valid_for(&names));
        let validity = lasting.and_then(|(_, kept)| x509::validity(kept.leaf()));
        let validity = validity.filter(|validity| !validity.left(now).is_zero());
        let renewal = Renewal::new(now, validity, challenges(settings.challenge, listen), random_fraction());
        let issued = kept.is_some();
        let shown = match kept {
            Some((_, kept)) => kept,
            None => {
                tracing::info!(
                    "no certificate yet for {}: one of our own making is shown until {} has issued one",
                    names.join(", "),
                    settings.directory
                );
                ServerTls::generate(&names)?
            }
        };
        let account_file = state_dir.join(ACCOUNT_FILE);
        let issuer = Self { settings, account_file, certificate_file, tls, renewal, issued };
        issuer.kept_account()?;
        Ok((issuer, shown))
    }

    /// When there is something to do.
    pub(super) const fn due(&self) -> SystemTime {
        self.renewal.poll_timeout()
    }

    /// Somebody asks for it.
    pub(super) fn handle_request(&mut self) {
        self.renewal.handle_request(wall_clock());
    }

    /// Asks the authority, and shows what it issues.
    pub(super) async fn ask(&mut self, current: &CurrentCertificate) {
        let Some(validations) = current.validations() else { return };
        let (names, directory, challenge) = (self.names(), &self.settings.directory, self.renewal.challenge());
        tracing::info!("asking {directory} for a certificate for {names} by {challenge}");
        let outcome = self.issue(challenge, validations).await;
        validations.clear();
        let outcome = outcome.and_then(|(text, validity)| {
            current.replace(self.parse(&text)?)?;
            Ok((text, validity))
        });
        match outcome {
            Ok((text, validity)) => {
                let days = validity.left(wall_clock()).as_secs() / (24 * 60 * 60);
                tracing::info!(days, "{directory} has issued a certificate for {names}");
                if let Err(error) = write_private_file(&self.certificate_file, text.as_bytes()) {
                    let file = self.certificate_file.display();
                    tracing::error!(
                        "{file}: {error}; the certificate is shown, but has to be asked for again at the next start"
                    );
                }
                self.issued = true;
                self.renewal.handle_issued(wall_clock(), validity, random_fraction());
            }
            Err(NotIssued { failure, cause }) => {
                let now = wall_clock();
                let wait = self.renewal.handle_failure(now, failure, random_fraction()).as_secs();
                let left = current.left(now).as_secs() / (24 * 60 * 60);
                let present = format!("the present one, valid for {left} more days");
                let shown = if self.issued { present } else { "one of our own making".to_owned() };
                tracing::error!(
                    "no certificate for {names} from {directory} by {challenge}: {cause}; next try in {wait} s, shown \
                     meanwhile: {shown}"
                );
            }
        }
    }

    /// Goes through one order. Yields what is to be kept.
    async fn issue(&self, challenge: Challenge, validations: &Validations) -> Result<(String, Validity), NotIssued> {
        let identifiers: Vec<Identifier> = self.settings.names.iter().map(identifier).collect();
        let (mut account, made_now) = self.account(self.kept_account()?).await?;
        let mut order = self.order(&account, &identifiers).await;
        if !made_now && matches!(&order, Err(Error::Api(problem)) if is_about(problem, "accountDoesNotExist")) {
            tracing::warn!("{} does not know the kept account any longer: making another one", self.settings.directory);
            (account, _) = self.account(None).await?;
            order = self.order(&account, &identifiers).await;
        }
        let mut order = order?;
        prove(&mut order, challenge, validations).await?;
        let key = order.finalize().await?;
        let chain = order.poll_certificate(&PATIENCE).await?;
        let text = format!("# {}\n{chain}\n{key}", self.settings.directory);
        let leaf = &certificates_in(chain.as_bytes(), &self.certificate_file)?[0];
        let validity = x509::validity(leaf).ok_or_else(|| NotIssued {
            failure: Failure::Trouble,
            cause: "what was issued cannot be read".to_owned(),
        })?;
        Ok((text, validity))
    }

    async fn order(&self, account: &Account, identifiers: &[Identifier]) -> Result<Order, Error> {
        let mut wanted = NewOrder::new(identifiers);
        let has_address = self.settings.names.iter().any(|name| matches!(name, Name::Address(_)));
        if has_address && account.profiles().any(|profile| profile.name == SHORT_LIVED) {
            wanted = wanted.profile(SHORT_LIVED);
        }
        account.new_order(&wanted).await
    }

    /// Signs in with the kept account, or makes one and keeps it; says which.
    async fn account(&self, kept: Option<AccountCredentials>) -> Result<(Account, bool), NotIssued> {
        let builder = Account::builder_with_http(Box::new(Web::new(self.tls.clone())));
        if let Some(kept) = kept {
            return Ok((builder.from_credentials(kept).await?, false));
        }
        let contact = self.settings.email.as_ref().map(|email| format!("mailto:{email}"));
        let contact = contact.as_deref();
        let wanted = NewAccount {
            contact: contact.as_slice(),
            terms_of_service_agreed: self.settings.agree_to_terms,
            only_return_existing: false,
        };
        let (account, credentials) = builder.create(&wanted, self.settings.directory.clone(), None).await?;
        let text = serde_json::to_vec_pretty(&credentials).map_err(Error::Json)?;
        let path = &self.account_file;
        write_private_file(path, &text).map_err(|source| TlsError::File { path: path.clone(), source })?;
        Ok((account, true))
    }

    /// The account at this directory, if one is kept. One at another directory is of no use.
    fn kept_account(&self) -> Result<Option<AccountCredentials>, TlsError> {
        let path = self.account_file.clone();
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(TlsError::File { path, source }),
        };
        let damaged = |error: serde_json::Error| {
            let reason = format!("no account in it ({error}); restore it, or remove it to make another account");
            TlsError::Content { path: path.clone(), reason }
        };
        let directory = serde_json::from_slice::<Kept>(&text).map_err(damaged)?.directory;
        let account = serde_json::from_slice(&text).map_err(damaged)?;
        Ok((directory == self.settings.directory).then_some(account))
    }

    fn parse(&self, text: &str) -> Result<ServerTls, TlsError> {
        let both = (text.as_bytes(), self.certificate_file.as_path());
        ServerTls::from_pem(both, both)
    }

    fn names(&self) -> String {
        let names: Vec<String> = self.settings.names.iter().map(Name::to_string).collect();
        names.join(", ")
    }
}

/// What is ours to read in a kept account.
#[derive(serde::Deserialize)]
struct Kept {
    #[serde(default)]
    directory: String,
}

/// The kept certificate and the directory it is from, if it can be used at all.
fn kept(file: &Path) -> Option<(String, ServerTls)> {
    let text = match std::fs::read(file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!("{}: {error}; asking for another certificate", file.display());
            return None;
        }
    };
    let first = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let directory = String::from_utf8_lossy(first.strip_prefix(b"# ").unwrap_or_default()).trim().to_owned();
    match ServerTls::from_pem((&text, file), (&text, file)) {
        Ok(kept) => Some((directory, kept)),
        Err(error) => {
            tracing::warn!("{error}; asking for another certificate");
            None
        }
    }
}

/// Proves every name that the authority does not hold proved already, and waits for its verdict.
async fn prove(order: &mut Order, challenge: Challenge, validations: &Validations) -> Result<(), NotIssued> {
    let kind = match challenge {
        Challenge::TlsAlpn01 => instant_acme::ChallengeType::TlsAlpn01,
        Challenge::Http01 => instant_acme::ChallengeType::Http01,
    };
    let not_validated = |cause: String| NotIssued { failure: Failure::Validation, cause };
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        let name = authorization.identifier().to_string();
        if authorization.status == AuthorizationStatus::Valid {
            continue;
        }
        let Some(mut handle) = authorization.challenge(kind.clone()) else {
            return Err(not_validated(format!("{name} cannot be proved this way there")));
        };
        let answer = handle.key_authorization();
        match challenge {
            Challenge::TlsAlpn01 => {
                let name = name.parse().map_err(|error| not_validated(format!("{name}: {error}")))?;
                let mut digest = [0; 32];
                digest.copy_from_slice(answer.digest().as_ref());
                validations.expect_tls(&name, &digest)?;
            }
            Challenge::Http01 => validations.expect_http(&handle.token, answer.as_str()),
        }
        handle.set_ready().await?;
    }
    match order.poll_ready(&PATIENCE).await {
        Ok(OrderStatus::Ready) => Ok(()),
        Ok(_) | Err(Error::Api(_)) => Err(not_validated(verdict(order).await)),
        Err(error) => Err(error.into()),
    }
}

/// What the authority has to say on the names that it could not validate.
async fn verdict(order: &mut Order) -> String {
    let mut found = Vec::new();
    let mut authorizations = order.authorizations();
    while let Some(Ok(mut authorization)) = authorizations.next().await {
        if authorization.refresh().await.is_err() {
            continue;
        }
        let problems = authorization.challenges.iter().filter_map(|challenge| challenge.error.as_ref());
        found.extend(problems.map(|problem| format!("{}: {}", authorization.identifier(), in_words(problem))));
    }
    if found.is_empty() { "the names were not validated, and no reason was given".to_owned() } else { found.join("; ") }
}

fn identifier(name: &Name) -> Identifier {
    match name {
        Name::Dns(name) => Identifier::Dns(name.clone()),
        Name::Address(address) => Identifier::Ip(*address),
    }
}

/// A problem document (RFC 7807) as one line.
fn in_words(problem: &Problem) -> String {
    let mut words = problem.detail.clone().unwrap_or_else(|| "refused without a reason".to_owned());
    for further in &problem.subproblems {
        words = format!("{words}; {further}");
    }
    if let Some(kind) = &problem.r#type {
        words = format!("{words} ({kind})");
    }
    // One line, whatever an authority writes.
    words.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn is_about(problem: &Problem, kind: &str) -> bool {
    problem.r#type.as_deref().and_then(|all| all.strip_prefix("urn:ietf:params:acme:error:")) == Some(kind)
}

/// Whether it is the authority's own trouble (RFC 8555 §6.7), and soon over.
fn is_trouble(problem: &Problem) -> bool {
    is_about(problem, "serverInternal")
        || is_about(problem, "badNonce")
        || problem.status.is_some_and(|status| status >= 500)
}
