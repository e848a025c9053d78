//! Word from the kernel that an interface, an address or a default route changed.
//!
//! In: nothing. Out: that something changed, at once and without saying what: whoever hears it looks.
//! Never asks the kernel anything, and needs no privilege. Where there is no such word (outside of Linux), opening fails and
//! looking from time to time must do.
//! Bounds: one socket; what the kernel could not queue for us counts as a change.

use std::io;

/// Hears of changes.
#[derive(Debug)]
pub(in crate::mesh) struct Watch(system::Socket);

impl Watch {
    /// Hears of changes from now on. Called within a runtime.
    ///
    /// # Errors
    /// Those of opening a socket, and [`io::ErrorKind::Unsupported`] where there is none of the kind.
    pub(in crate::mesh) fn open() -> io::Result<Self> {
        system::Socket::open().map(Self)
    }

    /// Waits until something changed that was not heard of before.
    ///
    /// # Errors
    /// Those of the socket, which is of no use any more.
    pub(in crate::mesh) async fn changed(&mut self) -> io::Result<()> {
        self.0.changed().await
    }
}

#[cfg(target_os = "linux")]
mod system {
    use std::io;

    use rustix::{
        io::Errno,
        net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, netlink::SocketAddrNetlink, recv, socket_with},
    };
    use tokio::{io::Interest, net::UdpSocket};

    /// Links, and addresses and routes of both families (`RTMGRP_*` of linux/rtnetlink.h).
    const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x100 | 0x400;

    /// Bytes of one read; the kernel's messages about one change fill at most a page or two, and what is cut off only
    /// counts as a change.
    const BUFFER_BYTES: usize = 16 * 1024;

    /// Bytes of `struct nlmsghdr`: length, type, flags, sequence, sender.
    const HEADER_BYTES: usize = 16;

    /// `RTM_NEWROUTE` and `RTM_DELROUTE`.
    const ROUTES: [u16; 2] = [24, 25];

    /// Where `struct rtmsg`, behind the header, has the length of the destination's prefix.
    const ROUTE_PREFIX_OFFSET: usize = HEADER_BYTES + 1;

    /// A netlink socket. Tokio has no type for one, but waiting until it can be read is the same for all datagrams.
    #[derive(Debug)]
    pub(super) struct Socket(UdpSocket);

    impl Socket {
        pub(super) fn open() -> io::Result<Self> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            // The default protocol of the family is the one of routing (NETLINK_ROUTE).
            let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
            bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
            UdpSocket::from_std(socket.into()).map(Self)
        }

        pub(super) async fn changed(&mut self) -> io::Result<()> {
            let mut buffer = vec![0; BUFFER_BYTES];
            loop {
                self.0.readable().await?;
                let read = self.0.try_io(Interest::READABLE, || {
                    recv(&self.0, buffer.as_mut_slice(), RecvFlags::empty()).map_err(io::Error::from)
                });
                match read {
                    Ok((len, _)) if concerns_us(&buffer[..len]) => return Ok(()),
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    // There was more than the kernel could keep for us.
                    Err(error) if Errno::from_io_error(&error) == Some(Errno::NOBUFS) => return Ok(()),
                    Err(error) => return Err(error),
                }
            }
        }
    }

    /// Whether any message is about more than a route to some place: a router's table changes all the time.
    pub(super) fn concerns_us(mut messages: &[u8]) -> bool {
        while let Some((length, kind)) = header(messages) {
            let is_default = messages.get(ROUTE_PREFIX_OFFSET).is_none_or(|prefix| *prefix == 0);
            if !ROUTES.contains(&kind) || is_default {
                return true;
            }
            // Messages begin at multiples of four bytes (NLMSG_ALIGNTO).
            let Some(rest) = messages.get(length.next_multiple_of(4)..) else { return false };
            messages = rest;
        }
        false
    }

    /// Length and type of the first message.
    fn header(messages: &[u8]) -> Option<(usize, u16)> {
        let [a, b, c, d, e, f, ..] = *messages.first_chunk::<HEADER_BYTES>()?;
        let (length, kind) = (u32::from_ne_bytes([a, b, c, d]), u16::from_ne_bytes([e, f]));
        let length = usize::try_from(length).ok().filter(|length| *length >= HEADER_BYTES)?;
        Some((length, kind))
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use std::{convert::Infallible, io};

    #[derive(Debug)]
    pub(super) struct Socket(Infallible);

    impl Socket {
        pub(super) fn open() -> io::Result<Self> {
            Err(io::ErrorKind::Unsupported.into())
        }

        #[expect(clippy::unused_async, reason = "it waits where there is something to wait for")]
        pub(super) async fn changed(&mut self) -> io::Result<()> {
            match self.0 {}
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(16 + body.len()).expect("a short message");
        let mut message = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10], body].concat();
        message.resize(message.len().next_multiple_of(4), 0);
        message
    }

    #[test]
    fn a_route_to_some_place_is_no_change_and_a_default_route_is_one() {
        let (new_address, new_route) = (20, 24);
        let (to_some, default) = (message(new_route, &[2, 24, 0, 0]), message(new_route, &[2, 0, 0, 0]));
        assert!(!system::concerns_us(&to_some));
        assert!(system::concerns_us(&default));
        assert!(system::concerns_us(&[to_some.clone(), default].concat()));
        assert!(system::concerns_us(&[to_some, message(new_address, &[2, 24, 0, 0])].concat()));
    }

    #[test]
    fn broken_messages_are_no_change_and_end_the_reading() {
        let whole = message(24, &[2, 24, 0, 0]);
        for len in 0..16 {
            assert!(!system::concerns_us(&whole[..len]), "{len}");
        }
        assert!(!system::concerns_us(&[0; 64]), "a length of nothing");
        let mut endless = whole;
        endless[..4].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(!system::concerns_us(&endless));
    }
}
