//! Byte strings inside typed parts, in one piece.
//!
//! On the wire they are what postcard makes of a `Vec<u8>`: a length and the bytes. Derived code would move them one
//! by one, which costs more than sealing them; `#[serde(with = "crate::wire::bytes")]` moves them at once.

use std::fmt;

use serde::{Deserializer, Serializer, de};

pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    deserializer.deserialize_byte_buf(ByteString)
}

struct ByteString;

impl de::Visitor<'_> for ByteString {
    type Value = Vec<u8>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a byte string")
    }

    fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
        Ok(bytes.to_vec())
    }

    fn visit_byte_buf<E: de::Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use crate::wire;

    #[derive(Serialize, Deserialize)]
    struct InOnePiece(#[serde(with = "crate::wire::bytes")] Vec<u8>);

    #[derive(Serialize, Deserialize)]
    struct OneByOne(Vec<u8>);

    #[test]
    fn bytes_in_one_piece_are_the_bytes_one_by_one_on_the_wire() {
        for len in [0, 1, 127, 128, 300, 70_000] {
            let bytes: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
            let encoded = wire::encode(&InOnePiece(bytes.clone()));
            assert_eq!(encoded, wire::encode(&OneByOne(bytes.clone())));
            assert_eq!(wire::decode::<InOnePiece>(&encoded, usize::MAX).unwrap().0, bytes);
        }
    }

    #[test]
    fn rejects_a_length_beyond_the_bytes_there_are() {
        assert!(wire::decode::<InOnePiece>(&[0xFF, 0xFF, 0xFF, 0xFF, 0x0F, 1], 100).is_err());
    }
}
