//! Every parser of frames and typed parts: no input panics, and what reads back is what was written.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use peerfleet_proto::{
    limits::MAX_HEAD_BYTES,
    request::{Outcome, Request, exec, transfer},
    sealed::Sealed,
    wire::{
        decode, encode,
        message::Message,
        relay::{PeerFrame, PeerToRelay, RelayFrame, RelayToPeer},
    },
};
use serde_roundtrip::same;

mod serde_roundtrip {
    /// What decodes must encode to something that decodes to the same.
    macro_rules! same {
        ($bytes:expr, $($type:ty),*) => {$(
            if let Ok(value) = decode::<$type>($bytes, MAX_HEAD_BYTES) {
                assert_eq!(decode::<$type>(&encode(&value), MAX_HEAD_BYTES).as_ref(), Ok(&value));
            }
        )*};
    }
    pub(crate) use same;
}

fuzz_target!(|data: &[u8]| {
    if let Ok(PeerFrame::Multicast(multicast)) = PeerFrame::split(data) {
        assert_eq!(multicast.parts().count(), multicast.len());
    }
    let _ = RelayFrame::read(&Bytes::copy_from_slice(data));
    let _ = Sealed::split(data);
    same!(data, Message, Request, Outcome, PeerToRelay, RelayToPeer);
    same!(data, exec::FromHost, exec::FromCaller, transfer::RangeRequest, transfer::RangeReply, transfer::Progress);
});
