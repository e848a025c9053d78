//! Reads the text of a target expression by descent, one function for each rule of the grammar.
//!
//! In: the text. Out: the tree, or the first place where it breaks a rule. It keeps nothing but a position and a depth.
//! Bounds: the text's length is checked first; every bracket and negation counts towards the depth.

use super::{Key, MAX_TARGET_BYTES, MAX_TARGET_DEPTH, Node, TargetFault, TargetRule, Word};
use crate::id::SHORTEST_PREFIX;

/// Reads a whole text as one expression.
pub(super) fn parse(text: &str) -> Result<Node, TargetFault> {
    if text.len() > MAX_TARGET_BYTES {
        return Err(TargetFault { at: MAX_TARGET_BYTES, what: TargetRule::TooLong });
    }
    let mut reader = Reader { text: text.as_bytes(), at: 0, depth: 0 };
    if reader.peek().is_none() {
        return reader.fault(TargetRule::Empty);
    }
    let root = reader.either()?;
    match reader.peek() {
        None => Ok(root),
        Some(_) => reader.fault(TargetRule::ExpectedJoin),
    }
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
    depth: usize,
}

impl Reader<'_> {
    fn either(&mut self) -> Result<Node, TargetFault> {
        self.joined(b'|', Self::both, Node::Either)
    }

    fn both(&mut self) -> Result<Node, TargetFault> {
        self.joined(b'&', Self::part, Node::Both)
    }

    fn joined(
        &mut self,
        sign: u8,
        read: fn(&mut Self) -> Result<Node, TargetFault>,
        join: fn(Vec<Node>) -> Node,
    ) -> Result<Node, TargetFault> {
        let first = read(self)?;
        if self.peek() != Some(sign) {
            return Ok(first);
        }
        let mut parts = vec![first];
        while self.peek() == Some(sign) {
            self.at += 1;
            parts.push(read(self)?);
        }
        Ok(join(parts))
    }

    fn part(&mut self) -> Result<Node, TargetFault> {
        match self.peek() {
            Some(b'!') => {
                self.deeper()?;
                self.at += 1;
                let inner = self.part()?;
                self.depth -= 1;
                Ok(Node::Not(Box::new(inner)))
            }
            Some(b'(') => {
                self.deeper()?;
                let opened = self.at;
                self.at += 1;
                let inner = self.either()?;
                self.depth -= 1;
                self.close(opened)?;
                Ok(inner)
            }
            Some(_) | None => self.list(),
        }
    }

    fn close(&mut self, opened: usize) -> Result<(), TargetFault> {
        match self.peek() {
            Some(b')') => {
                self.at += 1;
                if self.peek() == Some(b',') { self.fault(TargetRule::ListOfWords) } else { Ok(()) }
            }
            Some(_) => self.fault(TargetRule::ExpectedJoin),
            None => Err(TargetFault { at: opened, what: TargetRule::Unclosed }),
        }
    }

    fn list(&mut self) -> Result<Node, TargetFault> {
        let mut words = vec![self.word()?];
        while self.peek() == Some(b',') {
            self.at += 1;
            if matches!(self.peek(), Some(b'!' | b'(')) {
                return self.fault(TargetRule::ListOfWords);
            }
            words.push(self.word()?);
        }
        Ok(Node::AnyOf(words))
    }

    fn word(&mut self) -> Result<Word, TargetFault> {
        self.peek();
        let start = self.at;
        let first = self.run();
        if first.is_empty() {
            return self.fault(TargetRule::ExpectedTerm);
        }
        if self.text.get(self.at) != Some(&b':') {
            let key = if first == "all" { Key::All } else { Key::Bare };
            return Ok(Word { key, pattern: first });
        }
        let key = match first.as_str() {
            "name" => Key::Name,
            "tag" => Key::Tag,
            "id" => Key::Id,
            "os" => Key::Os,
            "arch" => Key::Arch,
            _ => return Err(TargetFault { at: start, what: TargetRule::UnknownKey }),
        };
        self.at += 1;
        let value_at = self.at;
        let pattern = self.run();
        if pattern.is_empty() {
            return self.fault(TargetRule::MissingValue);
        }
        if key == Key::Id && !is_id(&pattern) {
            return Err(TargetFault { at: value_at, what: TargetRule::InvalidId });
        }
        Ok(Word { key, pattern })
    }

    /// Takes the characters from here on that may stand in a name, a tag or a pattern.
    fn run(&mut self) -> String {
        let rest = &self.text[self.at..];
        let len = rest.iter().position(|&byte| !is_word_byte(byte)).unwrap_or(rest.len());
        self.at += len;
        rest[..len].iter().map(|&byte| char::from(byte)).collect()
    }

    fn deeper(&mut self) -> Result<(), TargetFault> {
        self.depth += 1;
        if self.depth > MAX_TARGET_DEPTH { self.fault(TargetRule::TooDeep) } else { Ok(()) }
    }

    /// Skips spaces and shows the next byte.
    fn peek(&mut self) -> Option<u8> {
        while self.text.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    fn fault<T>(&self, what: TargetRule) -> Result<T, TargetFault> {
        Err(TargetFault { at: self.at, what })
    }
}

fn is_word_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'*' | b'?')
}

fn is_id(text: &str) -> bool {
    text.len() >= SHORTEST_PREFIX && text.bytes().all(|byte| byte.is_ascii_alphabetic() || matches!(byte, b'2'..=b'7'))
}
