//! One ask for many: the request is sealed once, under a key that each recipient gets in a sealed message of its own.

use std::time::{Duration, Instant};

use aes_gcm::{
    Aes256Gcm, KeyInit,
    aead::{Aead, Payload},
};
use rand_core::CryptoRng;
use zeroize::Zeroizing;

use super::{
    Dropped, Exchange,
    asks::{Words, draw_id},
};
use crate::{
    fault::Misbehaved,
    id::{InstanceId, RequestId, Slot},
    limits::{MAX_FRAME_BYTES, MAX_MESSAGE_BYTES, MAX_MULTICAST, MAX_MULTICAST_PART_BYTES},
    request::Request,
    wire::{decode, encode, relay::multicast},
};

const LABEL: &[u8] = b"peerfleet multicast v1";

/// Bytes of a multicast before its first part.
const HEADER_BYTES: usize = 7;

/// Bytes before each part.
const PART_HEADER_BYTES: usize = 6;

/// The part that all recipients share.
pub(super) struct Shared {
    /// Seals this part alone, so its nonce may be constant.
    pub(super) key: Zeroizing<[u8; 32]>,
    /// Binds a recipient's share to this part: AES-GCM alone does not commit to its key.
    pub(super) digest: [u8; 32],
    sealed: Vec<u8>,
}

impl Shared {
    fn seal(request: &[u8], rng: &mut impl CryptoRng) -> Self {
        let mut key = Zeroizing::new([0; 32]);
        rng.fill_bytes(&mut *key);
        let payload = Payload { msg: request, aad: LABEL };
        let sealed = Aes256Gcm::new((&*key).into()).encrypt(&[0; 12].into(), payload);
        let sealed = sealed.expect("a request is far below the cipher's bound");
        Self { key, digest: *blake3::hash(&sealed).as_bytes(), sealed }
    }

    /// Opens the shared part that came with a share.
    pub(super) fn open(key: &[u8; 32], digest: &[u8; 32], sealed: &[u8]) -> Result<Request, Dropped> {
        if blake3::hash(sealed) != blake3::Hash::from_bytes(*digest) {
            return Err(Misbehaved::Forged.into());
        }
        let payload = Payload { msg: sealed, aad: LABEL };
        let opened = Aes256Gcm::new(key.into()).decrypt(&[0; 12].into(), payload);
        Ok(decode(&opened.map_err(|_| Misbehaved::Forged)?, MAX_MESSAGE_BYTES)?)
    }
}

/// A multicast being put together.
struct Batch {
    tag: u32,
    parts: Vec<(Slot, Vec<u8>)>,
    bytes: usize,
}

impl Exchange {
    /// Asks many the same. Who can be sent to at once gets a share of one multicast; every one of them ends for itself.
    pub fn ask_many(
        &mut self,
        to: &[InstanceId],
        request: Request,
        deadline: Duration,
        now: Instant,
        rng: &mut impl CryptoRng,
    ) -> Vec<(InstanceId, RequestId)> {
        let encoded = bytes::Bytes::from(encode(&request));
        let asked: Vec<(InstanceId, RequestId, bool)> = to
            .iter()
            .map(|to| {
                let id = draw_id(rng);
                (*to, id, self.take_on(id, *to, encoded.clone(), deadline, now))
            })
            .collect();
        let sendable = |asked: &&(InstanceId, RequestId, bool)| asked.2 && self.can_send_to(asked.0);
        if asked.iter().filter(sendable).take(2).count() == 2 {
            self.send_shared(&asked, &encoded, now, rng);
        } else {
            asked.iter().filter(|asked| asked.2).for_each(|(_, id, _)| self.send_ask(*id, now, rng));
        }
        asked.into_iter().map(|(to, id, _)| (to, id)).collect()
    }

    fn send_shared(
        &mut self,
        asked: &[(InstanceId, RequestId, bool)],
        encoded: &[u8],
        now: Instant,
        rng: &mut impl CryptoRng,
    ) {
        let shared = Shared::seal(encoded, rng);
        let mut batch = self.new_batch(&shared);
        for (_, id, _) in asked.iter().filter(|asked| asked.2) {
            let Some((slot, part)) = self.seal_ask(*id, Words::Shared(&shared), now, rng) else { continue };
            debug_assert!(part.len() <= MAX_MULTICAST_PART_BYTES, "a share is of fixed size but for two small numbers");
            let bytes = PART_HEADER_BYTES + part.len();
            if batch.parts.len() == MAX_MULTICAST || batch.bytes + bytes > MAX_FRAME_BYTES {
                self.send_batch(&batch, &shared);
                batch = self.new_batch(&shared);
            }
            batch.bytes += bytes;
            batch.parts.push((slot, part));
            self.ask_sent(*id, batch.tag, now);
        }
        self.send_batch(&batch, &shared);
    }

    fn new_batch(&mut self, shared: &Shared) -> Batch {
        Batch { tag: self.draw_tag(), parts: Vec::new(), bytes: HEADER_BYTES + shared.sealed.len() }
    }

    fn send_batch(&mut self, batch: &Batch, shared: &Shared) {
        if !batch.parts.is_empty() {
            let parts = batch.parts.iter().map(|(slot, part)| (*slot, part.as_slice()));
            self.transmits.push_back(multicast(batch.tag, parts, &shared.sealed));
        }
    }
}
