//! How this machine gets out to a relay: through which proxy, and whom it trusts besides the system's authorities.
//!
//! In: flags, variables, file; the variables that other programs share (`HTTPS_PROXY` and its kin). Out: a
//! [`DialConfig`] for one relay. `proxy` (flag, `PEER_PROXY`, file) goes before the shared variables and holds for every
//! relay; those are looked at only if nobody set it, and only where `NO_PROXY` does not except the relay. A proxy that
//! would be used and does not read is an error: going without it could be just what a network's owner forbids.
//! Bound: a file of authorities of [`MAX_CA_FILE_BYTES`].

use std::{
    fmt,
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use super::{Layers, Origin, Sourced, bad, bypass, pick};
use crate::{
    env::{self, Env},
    failure::{Failure, Result},
    mesh::{Authorities, DialConfig, Proxy, ProxyChoice, RelayUrl},
};

/// Longest file of authorities: ten times the bundle of all that browsers trust (some 220 KiB).
pub const MAX_CA_FILE_BYTES: u64 = 2 * 1024 * 1024;

/// What was set about the way to a relay.
#[derive(Clone)]
pub struct Network {
    proxy: Option<Sourced<ProxyChoice>>,
    ca_file: Option<Sourced<PathBuf>>,
    shared: Env,
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The shared variables may hold a password.
        f.debug_struct("Network").field("proxy", &self.proxy).field("ca_file", &self.ca_file).finish_non_exhaustive()
    }
}

impl Network {
    pub(super) fn new(layers: &Layers<'_>, env: &Env) -> Self {
        Self {
            proxy: pick(layers, |layer| layer.proxy.clone(), "--proxy", env::PROXY),
            ca_file: pick(layers, |layer| layer.ca_file.clone(), "--ca-file", env::CA_FILE),
            shared: env.clone(),
        }
    }

    /// No proxy from now on, whatever was set: for a relay on this very machine.
    pub fn go_directly(&mut self) {
        self.proxy = Some(Sourced { value: ProxyChoice::Direct, origin: Origin::Default });
    }

    /// What `relay` is dialled with.
    ///
    /// # Errors
    /// If the proxy to go through does not read, or the file of authorities cannot be used.
    pub fn dial_config(&self, relay: &RelayUrl) -> Result<DialConfig> {
        let authorities = match &self.ca_file {
            Some(file) => read_authorities(&file.value)?,
            None => Authorities::default(),
        };
        Ok(DialConfig { proxy: self.proxy_for(relay)?.map(|proxy| proxy.value), authorities })
    }

    /// The proxy that leads to `relay`, if there is one, and who named it.
    ///
    /// # Errors
    /// If it does not read. The failure never repeats it, because it may hold a password.
    pub fn proxy_for(&self, relay: &RelayUrl) -> Result<Option<Sourced<Proxy>>> {
        if let Some(Sourced { value, origin }) = &self.proxy {
            return Ok(match value {
                ProxyChoice::Direct => None,
                ProxyChoice::Through(proxy) => Some(Sourced { value: proxy.clone(), origin: origin.clone() }),
            });
        }
        let Some((variable, text)) = self.shared_proxy(relay)? else { return Ok(None) };
        let except = self.first_set(&env::NO_PROXY)?.map(|(_, text)| text).unwrap_or_default();
        if bypass::excepts(&except, relay.host(), relay.port()) {
            return Ok(None);
        }
        let value = text.parse().map_err(|fault| {
            bad(variable, fault).hint(format!("correct or unset {variable}, or go without it by `--proxy none`"))
        })?;
        Ok(Some(Sourced { value, origin: Origin::Environment(variable) }))
    }

    fn shared_proxy(&self, relay: &RelayUrl) -> Result<Option<(&'static str, String)>> {
        let own = if relay.is_secure() { &env::HTTPS_PROXY } else { &env::HTTP_PROXY };
        Ok(match self.first_set(own)? {
            Some(found) => Some(found),
            None => self.first_set(&env::ALL_PROXY)?,
        })
    }

    fn first_set(&self, names: &[&'static str]) -> Result<Option<(&'static str, String)>> {
        for name in names.iter().copied() {
            if let Some(text) = self.shared.text(name)? {
                return Ok(Some((name, text)));
            }
        }
        Ok(None)
    }
}

fn read_authorities(path: &Path) -> Result<Authorities> {
    let what = || Failure::fixable(format!("cannot use {} for certificate authorities", path.display()));
    let pem = read_bounded(path).map_err(|error| {
        what().cause(error).hint("--ca-file, PEER_CA_FILE or ca-file names a file with certificates in PEM")
    })?;
    Authorities::from_pem(&pem).map_err(|fault| {
        what().cause(fault).hint(
            "it takes certificates in PEM, one or more; `openssl x509 -inform der -in FILE` turns a binary one into it",
        )
    })
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_CA_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_CA_FILE_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is longer than 2 MiB"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
